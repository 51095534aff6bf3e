"""A mixture of Tulu 3's size: 939,343 rows in 19 sources, about 490 tokens a row, made from real
conversations.

Each row joins turns of random conversations up to a length drawn from a log-normal distribution, so
that no row is a copy. Prints the seconds of a cold build, of a second one, and of re-packings that
need no tokenizer, with the peak memory of the largest process; then of a cold build of the same
rows as one source, split by a column, and of one that uses another share of a group.

    python tests/bench/bench_scale.py [--rows 939343] [--conversations GLOB] [--tokenizer DIR]
                                      [--keep DIR]
"""

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SOURCES = 19
# Whole turns overshoot: rows come out at about 490 tokens.
MEAN_TOKENS, SIGMA, BYTES_PER_TOKEN = 330, 1.0, 4.2
SFT_PREP = Path(sys.executable).parent / "sft-prep"


def turns_of(pattern: Path) -> list[tuple[bytes, bytes, int]]:
    """Return (user, assistant, bytes) of every exchange, each already JSON."""
    turns = []
    for file in sorted(pattern.parent.glob(pattern.name)):
        with gzip.open(file, "rb") as stream:
            for line in stream.read().split(b"\n"):
                messages = json.loads(line)["messages"] if line.strip() else []
                for first, second in pairwise(messages):
                    roles = (first["role"], second["role"])
                    if roles != ("user", "assistant") or second.get("tool_calls"):
                        continue
                    user, assistant = (
                        json.dumps(message["content"], ensure_ascii=False).encode()
                        for message in (first, second)
                    )
                    turns.append((user, assistant, len(user) + len(assistant)))
    return turns


def write_sources(folder: Path, turns: list[tuple[bytes, bytes, int]], rows: int) -> list[Path]:
    draw = random.Random(0)
    files = [folder / f"source-{number:02d}.jsonl" for number in range(SOURCES)]
    mean = MEAN_TOKENS * BYTES_PER_TOKEN
    for number, file in enumerate(files):
        with file.open("wb") as stream:
            for _ in range(rows * (number + 1) // SOURCES - rows * number // SOURCES):
                # 0.6065 is exp(-sigma^2 / 2), which makes the mean of the draws 1.
                wanted = draw.lognormvariate(0.0, SIGMA) * mean * 0.6065
                parts: list[bytes] = []
                while wanted > 0 or not parts:
                    user, assistant, size = turns[draw.randrange(len(turns))]
                    turn = b'{"role":"user","content":%s},{"role":"assistant","content":%s}'
                    parts.append(turn % (user, assistant))
                    wanted -= size
                row = b'{"source":"group-%02d","messages":[%s]}\n'
                stream.write(row % (number, b",".join(parts)))
    return files


def write_mixture(folder: Path, name: str, tokenizer: str, sources: list[str]) -> Path:
    lines = [f'name = "{name}"', "max_seq_len = 4096", f'tokenizer.name = "{tokenizer}"']
    lines += ['template.name = "tulu"', "template.add_bos = true"]
    lines += [f"[[sources]]\n{source}" for source in sources]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(title: str, *arguments: object) -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [SFT_PREP, "build", *map(str, arguments)], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{title:<44} {seconds:>8.1f} s   largest process so far {peak:,.0f} MiB", flush=True)
    if title.startswith("cold"):
        print(done.stdout.splitlines()[0].split(": ", 1)[1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=939_343)
    parser.add_argument("--conversations", default=str(DATA / "conversations" / "*.jsonl.gz"))
    parser.add_argument("--tokenizer", default=str(DATA / "tokenizers" / "olmo2-dolma2"))
    parser.add_argument("--keep", type=Path, help="Where to make the files, and leave them.")
    options = parser.parse_args()
    turns = turns_of(Path(options.conversations))
    if not turns:
        sys.exit(
            f"no conversations at {options.conversations}: give --conversations and --tokenizer"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        files = write_sources(folder, turns, options.rows)
        mixture = write_mixture(
            folder, "scale", options.tokenizer, [f'path = "{file}"' for file in files]
        )
        one = f'path = "{folder}/source-*.jsonl"\nsplit_by = "source"'
        split = write_mixture(folder, "split", options.tokenizer, [one])
        thinned = f"{one}\ngroup_epochs = {{ group-00 = 0.5 }}"
        thin = write_mixture(folder, "thin", options.tokenizer, [thinned])
        print(
            f"{options.rows:,} rows, {sum(file.stat().st_size for file in files) / 1e6:,.0f} MB of"
            " JSON lines",
            flush=True,
        )
        common = ("--mixture", mixture, "--store", folder / "store", "--workers", 2)
        timed("cold build, 2 workers", *common, "--out", folder / "set")
        timed("the same again", *common, "--out", folder / "set")
        timed("max_seq_len = 2048", *common, "--out", folder / "a", "--set", "max_seq_len=2048")
        for title, out, setting in (
            ("train_on = last_assistant", "b", "mask.train_on=last_assistant"),
            ("over_length = drop", "c", "lengths.over_length=drop"),
            ("half of the first source", "d", "sources.0.fraction=0.5"),
        ):
            timed(title, *common, "--out", folder / out, "--set", setting)
        common = ("--store", folder / "store", "--workers", 2)
        timed("cold build, split by a column", "--mixture", split, *common, "--out", folder / "e")
        timed("half of the first group", "--mixture", thin, *common, "--out", folder / "f")


if __name__ == "__main__":
    main()
