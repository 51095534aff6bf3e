"""A source of a build: its samples are there once it is tokenised, and never silently empty."""

from pathlib import Path

import pytest

from prep.config import SourceConfig
from prep.selection.source import Source
from prep.sources.resolve import resolve_source
from prep.store.sample_store import SampleStore
from prep.store.source_counts import SourceCounts


def test_a_source_has_no_samples_before_it_is_tokenised(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = SourceConfig(path="rows.jsonl", name="mine")
    source = Source(resolve_source(config, tmp_path, {}), config, SourceCounts())
    with pytest.raises(RuntimeError, match="source 'mine' is not tokenised yet"):
        _ = source.samples
    source.store = SampleStore(tmp_path, ())
    assert source.samples is source.store
