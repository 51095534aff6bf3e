"""The records of a run on disk, metrics.jsonl and spikes.jsonl: read them, and cut them back."""

import json
from pathlib import Path
from typing import Any

from shared import atomic


def keep_records(path: Path, *, up_to_step: int, is_evaluated: bool = True) -> None:
    """Drop the records after step `up_to_step`, and a last line that a crash cut short.

    If the checkpoint of that step has no evaluation loss, the record of its evaluation goes too:
    the resumed run evaluates it again.
    """
    if not path.exists():
        return
    records = [
        record
        for record in read_records(path)
        if record["step"] <= up_to_step
        and (is_evaluated or record["step"] < up_to_step or "eval_loss" not in record)
    ]
    # The file is replaced, not cut: a crash here leaves the old one.
    lines = "".join(
        json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in records
    )
    atomic.write_bytes(path, lines.encode("utf-8"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of the file, without a last line that a crash cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
