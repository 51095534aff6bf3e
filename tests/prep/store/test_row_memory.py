"""A large row takes at most 12 bytes of memory for each of its own, over what the process has."""

import subprocess
import sys
from pathlib import Path

import pytest
from repository import HELPERS

_PEAK = """
import json, sys
sys.path.insert(0, {tests!r})
from raw_chunks import builder, chunk_of
kind = {kind!r}
unit = "Hello world, hello there. The answer is 42. "
if kind == "many messages":
    texts = [unit * 30] * (8_000_000 // len(unit) // 30)
else:
    text = unit + "\\u6771\\u4eac" if kind == "beyond ASCII" else unit
    texts = ["a", text * (8_000_000 // len(unit))]
def row(texts):
    turns = [dict(role=["user", "assistant"][i % 2], content=text) for i, text in enumerate(texts)]
    return chunk_of([json.dumps(dict(messages=turns), ensure_ascii=False).encode()])
chunks = builder("chatml")
chunks.build(row(["a", "b"]))
chunk = row(texts)
def status(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
facts = chunks.build(chunk).facts
assert facts["samples"] == 1, facts["rejects"]
print((status("VmHWM") - before) / len(chunk.payload), facts["tokens"] / len(chunk.payload))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("kind", ["one message", "many messages", "beyond ASCII"])
def test_a_large_row_takes_at_most_12_bytes_a_byte(kind: str) -> None:
    code = _PEAK.format(tests=str(HELPERS[0]), kind=kind)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if "PermissionError" in ended.stderr:
        pytest.skip("the peak of a process cannot be reset here")
    assert ended.returncode == 0, ended.stderr
    peak, tokens = map(float, ended.stdout.split())
    assert peak < 12, f"{peak:.1f} bytes a byte at {tokens:.2f} tokens a byte"
