"""The picture of a set: drawn for any number of sources and any shape of set, whole or not at
all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lettered_sets import Columns, write_lettered_set

from prep.cli.main import cli
from prep.inspection.stats_plot import _bars, _fill, _short, plot_stats
from shared import config
from shared.errors import ArtifactError, PrerequisiteError
from shared.shard_format import Manifest, fingerprint_of_manifest
from shared.shard_reader import ShardSet, open_shard_set

NAMES = [f"source-{index:02d}" for index in range(100)]


def plotted_set(
    path: Path, *, num_sources: int = 3, names: list[str] | None = None, equal: bool = False
) -> ShardSet:
    """A set with a few sequences of each source, of many lengths or of one."""
    rng = np.random.default_rng(num_sources)
    lengths = [
        12 if equal else int(length) for length in rng.lognormal(4, 1, num_sources * 3).clip(2, 512)
    ]
    packs = [
        [("u" * (length // 2) + "a" * (length - length // 2), _mask(length))] for length in lengths
    ]
    names = names or NAMES[:num_sources]

    def spoil(columns: Columns) -> None:
        columns["seq_origin"][:, 0] = np.arange(len(lengths)) % num_sources

    def declare(manifest: dict[str, Any]) -> None:
        first = manifest["sources"][0]
        manifest["sources"] = [
            {
                **first,
                "name": name,
                "tokens": sum(lengths[index::num_sources]),
                "loss_tokens": sum(
                    _mask(length).count("1") for length in lengths[index::num_sources]
                ),
            }
            for index, name in enumerate(names)
        ]
        manifest["fingerprint"] = fingerprint_of_manifest(config.build(Manifest, manifest, "test"))

    write_lettered_set(path, [packs], max_seq_len=512, spoil=spoil, declare=declare)
    return open_shard_set(path)


def _mask(length: int) -> str:
    return "0" * (length // 2) + "1" * (length - length // 2)


def picture(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def share(pixels: np.ndarray, color: str) -> float:
    return float(
        (pixels == np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])).all(axis=2).mean()
    )


@pytest.mark.parametrize("num_sources", [1, 2, 7, 30])
def test_any_number_of_sources_gives_a_picture_with_bars(num_sources: int, tmp_path: Path) -> None:
    plot_stats(
        plotted_set(tmp_path / "set", num_sources=num_sources), tmp_path / "new" / "stats.png"
    )
    pixels = picture(tmp_path / "new" / "stats.png")
    assert pixels.shape[1] > 1300
    assert pixels.shape[0] > 500 + 40 * num_sources
    assert share(pixels, "#8aa4c8") > 0.01
    assert share(pixels, "#23883f") > 0.01


def test_a_set_of_one_length_gives_a_picture(tmp_path: Path) -> None:
    plot_stats(plotted_set(tmp_path / "set", equal=True), tmp_path / "stats.png")
    assert share(picture(tmp_path / "stats.png"), "#8aa4c8") > 0.03


@pytest.mark.parametrize(
    "name",
    [
        "$x_{1}$ costs $5",
        "a" * 300,
        "new\nline\x1b[2J",
        "<b>&amp;",
        "\\frac{",
        "sp ace",
        "%s {0} %(x)d",
    ],
)
def test_any_name_of_a_source_can_be_drawn(name: str, tmp_path: Path) -> None:
    plot_stats(plotted_set(tmp_path / "set", names=[name, "b", "c"]), tmp_path / "stats.png")
    assert picture(tmp_path / "stats.png").shape[1] > 1300


def test_a_long_name_keeps_both_ends() -> None:
    name = "org/data-" + "x" * 80 + "-validation"
    assert _short(name).startswith("org/data-xx")
    assert _short(name).endswith("xx-validation")
    assert len(_short(name)) <= 44
    assert _short("short") == "short"


def test_the_smallest_of_too_many_sources_share_a_bar() -> None:
    sources = [
        {
            "name": name,
            "tokens": index + 1,
            "loss_tokens": index,
            "token_share": (index + 1) / 820,
            "loss_share": 0.0,
        }
        for index, name in enumerate(NAMES[:40])
    ]
    bars = _bars(sources)
    assert [bar["name"] for bar in bars] == [*NAMES[11:40], "11 smaller sources"]
    assert sum(bar["tokens"] for bar in bars) == sum(source["tokens"] for source in sources)
    assert sum(bar["token_share"] for bar in bars) == pytest.approx(1)
    assert _bars(sources[:30]) == sources[:30]


def test_the_fill_of_packs_averages_to_the_density(tmp_path: Path) -> None:
    shard_set = plotted_set(tmp_path / "set", num_sources=5)
    fill = _fill(shard_set)
    assert len(fill) == shard_set.num_packs
    assert fill.mean() == pytest.approx(shard_set.manifest.totals.density)


def test_plotting_does_not_change_matplotlib_for_others(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plot_stats(plotted_set(tmp_path / "set"), tmp_path / "stats.png")
    assert dict(mpl.rcParams) == before


def test_the_command_draws_beside_the_numbers(tmp_path: Path) -> None:
    path = str(plotted_set(tmp_path / "set").path)
    plain = CliRunner().invoke(cli, ["stats", path, "--json"])
    drawn = CliRunner().invoke(
        cli, ["stats", path, "--json", "--plot", str(tmp_path / "stats.png")]
    )
    assert (drawn.exit_code, drawn.stdout) == (0, plain.stdout)
    assert json.loads(drawn.stdout)["sequences"] == 9
    assert picture(tmp_path / "stats.png").ndim == 3


def test_a_missing_matplotlib_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = plotted_set(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PrerequisiteError, match=r"--plot needs matplotlib.*pip install"):
        plot_stats(shard_set, tmp_path / "stats.png")
    done = CliRunner().invoke(
        cli, ["stats", str(shard_set.path), "--plot", str(tmp_path / "stats.png")]
    )
    assert (done.exit_code, done.stdout) == (6, "")
    assert done.stderr.startswith("error: --plot needs matplotlib")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "stats.png").exists()


def test_without_a_plot_matplotlib_is_not_loaded(tmp_path: Path) -> None:
    path = str(plotted_set(tmp_path / "set").path)
    code = (
        f"import sys; from prep.cli.main import cli; cli(['stats', {path!r}],"
        " standalone_mode=False); "
    )
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)


def test_a_file_that_cannot_be_written_keeps_what_is_there(tmp_path: Path) -> None:
    shard_set = plotted_set(tmp_path / "set")
    (tmp_path / "there.png").mkdir()
    with pytest.raises(ArtifactError, match="give --plot another file"):
        plot_stats(shard_set, tmp_path / "there.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "there.png"]
