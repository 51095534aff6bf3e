"""Every run has a plot, whatever its records lack."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shared.errors import ArtifactError
from train.results.plot import moving_mean, plot_runs, sources_of, titles


def _run(
    path: Path,
    *,
    steps: int,
    loss: float | None = 2.0,
    sources: Sequence[str] = (),
    evaluated: bool = False,
) -> Path:
    path.mkdir(parents=True)
    records = [
        {
            "step": step,
            "train_loss": None if loss is None or step == 2 else loss / step,
            "learning_rate": 1e-3 / step,
            "per_device_tps": 1000.0,
            **{f"train_loss/{source}": None if step == 3 else 1.0 for source in sources},
        }
        for step in range(1, steps + 1)
    ]
    if evaluated:
        records.append(
            {"step": steps, "eval_loss": 1.5, **{f"eval_loss/{source}": 1.5 for source in sources}}
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _size(image: Path) -> tuple[int, int]:
    data = image.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_one_run_becomes_an_image(tmp_path: Path, steps: int) -> None:
    plot_runs([_run(tmp_path / "a", steps=steps)], tmp_path / "loss.png")
    width, height = _size(tmp_path / "loss.png")
    assert width > 800
    assert height > 400


def test_runs_of_the_same_name_are_drawn_over_one_another(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "x" / "run", steps=50), _run(tmp_path / "y" / "run", steps=60)]
    plot_runs(runs, tmp_path / "both.png")
    plot_runs(runs[:1], tmp_path / "one.png")
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "one.png").read_bytes()


@pytest.mark.parametrize("num_sources", [2, 45])
def test_each_source_has_a_panel_up_to_30(num_sources: int, tmp_path: Path) -> None:
    plain = _run(tmp_path / "a", steps=9)
    names = [f"source {index} $x$ {'long' * 9}" for index in range(num_sources)]
    plot_runs([plain], tmp_path / "plain.png")
    runs = [plain, _run(tmp_path / "b", steps=9, sources=names, evaluated=True)]
    plot_runs(runs, tmp_path / "sources.png")
    rows = min(-(-num_sources // 5), 6)
    added = _size(tmp_path / "sources.png")[1] - _size(tmp_path / "plain.png")[1]
    assert added == pytest.approx(221 * rows, abs=2)


def test_titles_of_panels_tell_long_names_apart() -> None:
    long = [
        "ai2-adapt-dev/tulu_v3.9_synthetic_finalresp_wildguardmixtrain_decontaminated_50k",
        "ai2-adapt-dev/tulu_v3.9_wildjailbreak_decontaminated_50k",
        "allenai/tulu-3-sft-personas-math-grade",
    ]
    assert len(set(titles(long))) == 3
    assert all(len(title) <= 28 for title in titles(long))
    assert titles(["a/x", "b/x"]) == ["a/x", "b/x"]
    first, second = titles(["a-long/" + "x" * 40, "b-long/" + "x" * 40])
    assert first.startswith("a-long")
    assert second.startswith("b-long")
    assert titles(["cost in $"]) == [r"cost in \$"]


def test_one_source_has_no_panel_of_its_own(tmp_path: Path) -> None:
    one = _run(tmp_path / "a", steps=9, sources=["only"], evaluated=True)
    runs = [one, _run(tmp_path / "b", steps=9)]
    for run in runs:
        plot_runs([run], run / "loss.png")
    assert _size(runs[0] / "loss.png") == _size(runs[1] / "loss.png")


def test_sources_count_where_they_have_a_loss() -> None:
    null = {"train_loss/a/x": None, "train_loss/never": None}
    records = [
        {"step": 1, "train_loss": 1.0, "train_loss/b": 2.0, **null},
        {"step": 1, "eval_loss": 1.0, "eval_loss/a/x": 1.0, "eval_loss/b": 1.0},
    ]
    assert sources_of([records]) == {"a/x": 1, "b": 2}
    assert sources_of([records[:1]]) == {}


def test_an_evaluation_has_a_panel(tmp_path: Path) -> None:
    images = []
    for name, evaluated in (("a/run", False), ("b/run", True)):
        run = _run(tmp_path / name, steps=9, evaluated=evaluated)
        plot_runs([run], run / "loss.png")
        images.append((run / "loss.png").read_bytes())
    assert images[0] != images[1]


def test_a_run_without_any_loss_still_gives_an_image(tmp_path: Path) -> None:
    plot_runs([_run(tmp_path / "a", steps=3, loss=None)], tmp_path / "loss.png")
    _size(tmp_path / "loss.png")


def test_a_directory_that_is_no_run_is_an_error_and_leaves_no_image(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no records"):
        plot_runs([tmp_path], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_plotting_does_not_change_matplotlib_for_others(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plot_runs([_run(tmp_path / "a", steps=5)], tmp_path / "loss.png")
    assert dict(mpl.rcParams) == before


def test_moving_mean_equals_the_mean_of_each_neighbourhood() -> None:
    values = np.random.default_rng(0).normal(size=30)
    for width in (1, 2, 3, 8):
        expected = [values[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(30)]
        np.testing.assert_allclose(moving_mean(values, width), expected, atol=1e-12)
