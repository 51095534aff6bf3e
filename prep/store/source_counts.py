"""What the chunks of one source add up to."""

from dataclasses import dataclass, field
from typing import Any

from prep.conversations.formats import PLAIN_MESSAGES, Conversion


@dataclass
class SourceCounts:
    """Counts and lists of the rows of one source in the chunks that are added so far."""

    conversion: Conversion = PLAIN_MESSAGES
    rows: int = 0
    tokens: int = 0
    rows_slow_path: int = 0
    rows_cross_checked: int = 0
    rows_audited: int = 0
    messages_dropped: int = 0
    messages_untrained: int = 0  # marked `train: false`
    calls_not_json: int = 0  # tool calls whose arguments are text but no JSON object
    rejects: list[tuple[int, str, str]] = field(default_factory=list)  # row, reason, detail
    unrendered: list[tuple[int, str]] = field(default_factory=list)  # row, reason
    groups: set[str] = field(default_factory=set)  # of a split source: the values of its column

    def add(self, facts: dict[str, Any]) -> None:
        """Add the facts of one chunk."""
        self.rows += facts["rows"]
        self.tokens += facts["tokens"]
        self.rows_slow_path += facts["rows_slow_path"]
        self.rows_cross_checked += facts["rows_cross_checked"]
        self.rows_audited += facts["rows_audited"]
        self.messages_dropped += facts["messages_dropped"]
        self.messages_untrained += facts["messages_untrained"]
        self.calls_not_json += facts["calls_not_json"]
        self.rejects += [(row, reason, detail) for row, reason, detail in facts["rejects"]]
        self.unrendered += [(row, reason) for row, reason in facts["unrendered"]]
        self.groups |= set(facts.get("groups", ()))
