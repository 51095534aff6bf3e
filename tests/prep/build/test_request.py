"""What a build may know from the set that it finds: hashes unless told not to, and its date."""

import dataclasses
import json
from pathlib import Path

import pytest
from prep_builds import mixture_of, plan_of

from prep.build.request import BuildRequest, known_facts
from prep.inputs import KNOWN_DATE


@pytest.fixture
def request_for(tmp_path: Path) -> BuildRequest:
    out = tmp_path / "out"
    out.mkdir()
    (out / "build_info.json").write_text(json.dumps({"known": {"/rows.jsonl": [1, 2, 3, 4, "x"]}}))
    manifest = {"config": {"template": {"date": "2026-03-01"}}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return plan_of(mixture_of([tmp_path / "rows.jsonl"], tmp_path / "tokenizer"), out)


def test_a_rehash_forgets_hashes_and_keeps_the_date(request_for: BuildRequest) -> None:
    date = {KNOWN_DATE: "2026-03-01"}
    assert known_facts(request_for) == {"/rows.jsonl": [1, 2, 3, 4, "x"], **date}
    assert known_facts(dataclasses.replace(request_for, rehash=True)) == date


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"null", b"{}", b'{"known": 3}', b"\xff"]
)
def test_a_record_that_cannot_be_read_counts_as_none(
    content: bytes | None, request_for: BuildRequest
) -> None:
    for name in ("build_info.json", "manifest.json"):
        (request_for.out / name).unlink()
        if content is not None:
            (request_for.out / name).write_bytes(content)
    assert known_facts(request_for) == {}
