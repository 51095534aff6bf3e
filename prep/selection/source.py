"""One source on its way through a build: what it is, its samples, what is taken of them."""

from dataclasses import dataclass

from prep.config import SourceConfig
from prep.selection.sequences import Selection
from prep.sources.resolve import ResolvedSource
from prep.store.sample_store import SampleStore
from prep.store.source_counts import SourceCounts


@dataclass(slots=True)
class Source:
    """A source of the mixture, or one group of a source that is split."""

    resolved: ResolvedSource
    """Which files it is, and what identifies their content."""
    config: SourceConfig
    """How the mixture uses it."""
    counts: SourceCounts
    """What became of its rows, as far as they are read."""
    store: SampleStore | None = None
    """Its samples, once they are tokenised; the groups of a split source share them."""

    @property
    def name(self) -> str:
        return self.resolved.name

    @property
    def samples(self) -> SampleStore:
        """Its samples. Raises RuntimeError before they are tokenised."""
        if self.store is None:
            raise RuntimeError(f"source {self.name!r} is not tokenised yet")
        return self.store


@dataclass(frozen=True, slots=True)
class SelectedSource:
    """What a set takes of a source."""

    source: Source
    config: SourceConfig
    """How this set uses it: an evaluation set takes every row once."""
    selection: Selection
