"""The list of rejects names every row that was left out or cut, by source and row, as JSON."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import zstandard

from prep.writing.rejects import write_rejects


def read(path: Path) -> list[dict[str, object]]:
    data = zstandard.decompress((path / "rejects.jsonl.zst").read_bytes())
    return [json.loads(line) for line in data.decode("utf-8").split("\n")[:-1]]


def test_events_of_all_kinds_are_sorted_by_row_within_their_source(tmp_path: Path) -> None:
    draw = random.Random(0)
    sources, expected = [], []
    for name in ("b", "a"):
        rows = draw.sample(range(100), 30)
        rejects = [(row, "malformed", f"line {row}") for row in rows[:10]]
        unrendered = [(row, "tool message") for row in rows[10:20]]
        listed = [(row, "truncated", "24 tokens cut to 16") for row in rows[20:]]
        counts = SimpleNamespace(rejects=rejects, unrendered=unrendered)
        sources.append(
            SimpleNamespace(
                source=SimpleNamespace(name=name, counts=counts),
                selection=SimpleNamespace(listed=listed),
            )
        )
        events = [*rejects, *((row, "unrendered", reason) for row, reason in unrendered), *listed]
        keys = ("source", "row", "reason", "detail")
        expected += [dict(zip(keys, (name, *event), strict=True)) for event in sorted(events)]
    write_rejects(tmp_path, sources)
    assert read(tmp_path) == expected


def test_a_message_with_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    counts = SimpleNamespace(rejects=[(0, "malformed", "\ud800 caf\u00e9\u2028")], unrendered=[])
    source = SimpleNamespace(name="a", counts=counts)
    write_rejects(tmp_path, [SimpleNamespace(source=source, selection=SimpleNamespace(listed=[]))])
    assert [event["detail"] for event in read(tmp_path)] == ["? caf\u00e9\u2028"]
