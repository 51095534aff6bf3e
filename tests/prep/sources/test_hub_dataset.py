"""Hub ids through the real client, against a hub on the loopback device: the commit is resolved
once and then stays."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import COMMIT, REPOSITORY, serve_dataset
from repository import ROOT

ROWS = [
    {"id": f"r{number}", "messages": [{"role": "user", "content": f"Hi {number}"}]}
    for number in range(30)
]

# the client reads its settings when it is imported, so each case needs a new process
PROGRAM = """
import json, sys
from pathlib import Path
from prep.sources.chunk import parse_chunk
from prep.config import SourceConfig
from prep.sources.reader import iter_chunks
from prep.sources.resolve import remember, resolve_source
from shared.errors import DataError
keys, known = json.loads(sys.argv[1])
try:
    source = resolve_source(SourceConfig(**keys), Path("."), known)
    rows = [row for chunk in iter_chunks(source, source_index=0) for row in parse_chunk(chunk)]
    print(json.dumps({"identity": source.identity(), "known": remember([source]), "rows": rows}))
except DataError as exc:
    print(json.dumps({"error": str(exc)}))
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    (root / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:20]), root / "data" / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[20:]), root / "data" / "train-00001-of-00002.parquet")
    (root / "README.md").write_text("# Chats\n")
    with serve_dataset(root) as url:
        yield url


def read(
    home: Path, endpoint: str, *, known: dict[str, str] | None = None, **keys: Any
) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    if not endpoint:
        environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    arguments = json.dumps([{"path": REPOSITORY, **keys}, known or {}])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_hub_id_gives_its_rows_and_then_needs_no_network(endpoint: str, tmp_path: Path) -> None:
    online = read(tmp_path, endpoint)
    assert online["identity"] == {"hub_id": REPOSITORY, "revision": COMMIT, "split": "train"}
    assert [record for _, _, record in online["rows"]] == ROWS
    assert online["rows"][29][:2] == [29, f"{REPOSITORY} (row 29)"]
    assert online["known"] == {f"hub:{REPOSITORY}@main": COMMIT}
    assert read(tmp_path, "", known=online["known"]) == online


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"revision": "v9"}, "hub data set 'org/chats' at revision 'v9' cannot be resolved"),
        ({"path": "org/other"}, "hub data set 'org/other' at revision 'main' cannot be resolved"),
        ({"split": "validation"}, "org/chats, split 'validation', cannot be read"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    keys: dict[str, str], expected: str, endpoint: str, tmp_path: Path
) -> None:
    assert expected in read(tmp_path, endpoint, **keys)["error"]


def test_a_hub_that_does_not_answer_is_reported_in_one_line(tmp_path: Path) -> None:
    """No traceback: the client's error has another class than in the release before."""
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "m.toml").write_text(
        'name = "m"\nmax_seq_len = 64\ntokenizer.name = "org/tokenizer"\ntemplate.name = "tulu"\n'
        '[[sources]]\npath = "rows.jsonl"\n'
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [Path(sys.executable).with_name("sft-prep"), "build", "--mixture", "m.toml"]
    done = subprocess.run(
        [*command, "--out", "set"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert (
        "tokenizer.name = 'org/tokenizer': no such directory, and the hub does not give"
        in done.stderr
    )
