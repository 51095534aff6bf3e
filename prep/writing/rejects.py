"""rejects.jsonl.zst: every row that a set left out or cut short, with the reason."""

import json
from collections.abc import Sequence
from pathlib import Path

from prep.selection.source import SelectedSource
from shared.shard_format import REJECTS_NAME


def write_rejects(out: Path, sources: Sequence[SelectedSource]) -> None:
    """Write one JSON object per line, by source and row, compressed with zstd."""
    import zstandard

    lines = []
    for selected in sources:
        counts = selected.source.counts
        events = [(row, reason, detail) for row, reason, detail in counts.rejects]
        events += [(row, "unrendered", reason) for row, reason in counts.unrendered]
        events += selected.selection.listed
        for row, reason, detail in sorted(events):
            event = {
                "source": selected.source.name,
                "row": row,
                "reason": reason,
                "detail": detail,
            }
            lines.append(json.dumps(event, sort_keys=True, ensure_ascii=False) + "\n")
    (out / REJECTS_NAME).write_bytes(zstandard.compress("".join(lines).encode("utf-8", "replace")))
