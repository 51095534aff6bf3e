"""The records of a run on disk, metrics.jsonl: what export, plots and spikes read without a log."""

import json
from pathlib import Path
from typing import Any

from shared import atomic


def keep_records(path: Path, *, up_to_step: int, is_evaluated: bool = True) -> None:
    """Drop the records of metrics.jsonl after step `up_to_step`, and a last line that a crash cut
    short.

    If that step is yet to be evaluated, a record of its evaluation goes too.
    """
    if not path.exists():
        return
    kept = [
        record
        for record in read_records(path)
        if record["step"] <= up_to_step
        and (is_evaluated or record["step"] < up_to_step or "eval_loss" not in record)
    ]
    lines = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in kept)
    atomic.write_bytes(path, lines.encode("utf-8"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
