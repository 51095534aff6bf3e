"""The mixture: a temperature, what it makes of sizes, and how often each source is then used."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.build.summary import summary_lines
from prep.inspection.verification.verify import verify
from prep.selection.mixture import epochs_at
from shared.shard_reader import ShardSet

SIZES = st.lists(st.integers(0, 10**9), min_size=1, max_size=6).filter(any)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def rows_used(shards: ShardSet) -> list[tuple[int, int]]:
    """Return (source, row) of every sequence, in order."""
    origin = np.concatenate([shard["seq_origin"] for shard in shards.shards])
    return sorted((int(source), int(row)) for source, row, _ in origin)


@settings(max_examples=100, deadline=None)
@given(tokens=SIZES, temperature=st.floats(0.5, 100))
def test_shares_are_powers_of_sizes_and_the_total_stays(
    tokens: list[int], temperature: float
) -> None:
    epochs = epochs_at(temperature, tokens)
    used = [times * count for times, count in zip(epochs, tokens, strict=True)]
    rounding = [count * 1e-6 for count in tokens]
    assert abs(sum(used) - sum(tokens)) <= sum(rounding) + 1
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            if a and b:
                wanted = used[j] * (a / b) ** (1 / temperature)
                slack = rounding[i] + rounding[j] * (a / b) ** (1 / temperature)
                assert used[i] == pytest.approx(wanted, rel=1e-6, abs=slack)
    assert [bool(times) for times in epochs] == [bool(count) for count in tokens]


def test_temperature_one_changes_nothing_and_a_high_one_makes_shares_equal() -> None:
    assert epochs_at(1.0, [10, 1000, 0]) == [1.0, 1.0, 0.0]
    assert epochs_at(1e9, [10, 1000]) == pytest.approx([50.5, 0.505])
    assert epochs_at(1e-3, [10, 1000]) == [1e-06, 1.01]  # at a low one the largest takes all


def test_a_temperature_is_realised_as_epochs_that_the_manifest_states(
    tmp_path: Path, tokenizer: Path
) -> None:
    sizes = {"large": 400, "small": 25}
    paths = [
        write_rows(tmp_path / f"{k}.jsonl", [chat(f"{i:03}", f"{i:03}") for i in range(n)])
        for k, n in sizes.items()
    ]
    mixed = build_set(
        mixture_of(paths, tokenizer, mixing={"temperature": 2}),
        tmp_path / "mixed",
        store=tmp_path / "s",
    )
    epochs = [source.details["epochs_used"] for source in mixed.manifest.sources]
    assert epochs == pytest.approx([0.85, 3.4], abs=0.02)  # 400 and 25 rows weigh like 20 and 5
    used = [row for row in rows_used(mixed) if row[0] == 1]
    assert {used.count((1, row)) for row in range(25)} == {3, 4}
    tokens = [source.tokens for source in mixed.manifest.sources]
    assert tokens[0] / tokens[1] == pytest.approx(4, rel=0.03)
    assert any("used 3.4 times" in line for line in summary_lines(mixed.manifest, mixed.path))
    assert verify(mixed.path)
    sources = [{"path": str(p), "epochs": e} for p, e in zip(paths, epochs, strict=True)]
    again = build_set(mixture_of(sources, tokenizer), tmp_path / "stated", store=tmp_path / "s")
    assert again.manifest.fingerprint == mixed.manifest.fingerprint


def test_max_epochs_bounds_what_a_temperature_repeats(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"large": 300, "small": 2}
    paths = [
        write_rows(tmp_path / f"{k}.jsonl", [chat(f"{i:03}", "b") for i in range(n)])
        for k, n in sizes.items()
    ]
    used = {}
    for name, mixing in {"free": {}, "bound": {"max_epochs": 3}}.items():
        tables = mixture_of(paths, tokenizer, mixing={"temperature": 100, **mixing})
        shards = build_set(tables, tmp_path / name, store=tmp_path / "s")
        assert verify(shards.path)
        used[name] = rows_used(shards).count((1, 0))
    assert used["free"] > 50
    assert used["bound"] == 3
    warnings = [record.message for record in caplog.records if "max_epochs" in record.message]
    assert len(warnings) == 1  # of the free one
    assert warnings[0].startswith(f"small is used {used['free']}")
