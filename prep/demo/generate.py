"""Write the files of the demo mixture: training rows by skill, held-out questions, a tokenizer.

    python prep/demo/generate.py        writes into this folder the files that ship

Everything follows from one seed: tests/prep/demo/test_generate.py generates it again and compares.
What a held-out question asks about (`Exercise.key`) occurs in no training question of its skill.
"""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from prep.demo.skills import SKILLS, Exercise
from shared import atomic
from shared.hashing import canonical_json, seed_from

TRAIN_ROWS = {"add": 3000, "pick": 4000, "reverse": 4000, "shift": 4000, "sort": 4000}
HELD_OUT_ROWS = 60  # per skill
VOCAB_LIMIT = 512

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

Row = dict[str, Any]

_SEED = 20
# what a system message asks for, and the form of the answers then
_MANNERS = (("Answer in a sentence.", "The answer is {}."), ("Shout.", "{}!"))
_MANNERS_SHARE = 0.25
# words with the space before them, digits one by one: the pattern of the Qwen tokenizers
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def generate() -> dict[str, bytes]:
    """Return the content of every file, by its path in this folder."""
    # A generator for each skill and side: more rows of one change no other.
    train: dict[str, list[Row]] = {}
    held_out: list[Row] = []
    for skill, draw in SKILLS.items():
        rng = random.Random(seed_from("demo", _SEED, skill, "held out"))
        of_key: dict[str, Row] = {}
        while len(of_key) < HELD_OUT_ROWS:
            exercise = draw(rng)
            row = {"skill": skill, "messages": _messages(exercise, rng)}
            of_key.setdefault(exercise.key, row)
        held_out += of_key.values()
        # No training row repeats another, or asks about what a held-out row asks about.
        rng = random.Random(seed_from("demo", _SEED, skill, "train"))
        of_text: dict[str, Row] = {}
        while len(of_text) < TRAIN_ROWS[skill]:
            exercise = draw(rng)
            row = {"messages": _messages(exercise, rng)}
            if exercise.key not in of_key:
                of_text.setdefault(json.dumps(row), row)
        train[skill] = list(of_text.values())
    files = {
        f"{skill}.jsonl.gz": gzip.compress(_json_lines(rows), mtime=0)
        for skill, rows in train.items()
    }
    files["heldout.jsonl"] = _json_lines(held_out)
    tokenizer = train_tokenizer(row for rows in train.values() for row in rows)
    files["tokenizer/tokenizer.json"] = canonical_json(json.loads(tokenizer.to_str()))
    files["tokenizer/tokenizer_config.json"] = canonical_json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
    )
    return files


def train_tokenizer(rows: Iterable[Row]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the rows' text; its control tokens are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(text, special=True, normalized=False)
        for text in (END_OF_TEXT, TURN_START, TURN_END)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        f"{message['role']}\n{message['content']}" for row in rows for message in row["messages"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _messages(exercise: Exercise, rng: random.Random) -> list[dict[str, str]]:
    messages, form = [], "{}"
    if rng.random() < _MANNERS_SHARE:
        manner, form = rng.choice(_MANNERS)
        messages.append({"role": "system", "content": manner})
    for question, answer in exercise.turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": form.format(answer)})
    return messages


def _json_lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8")


def main() -> None:
    """Write the files beside this one."""
    folder = Path(__file__).parent
    for name, data in generate().items():
        atomic.write_bytes(folder / name, data)


if __name__ == "__main__":
    main()
