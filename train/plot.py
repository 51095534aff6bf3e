"""The curves of one or more runs, drawn from metrics.jsonl: loss, learning rate, tokens per second."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared import atomic
from shared.errors import ArtifactError
from train.metrics import read_records
from train.run_dir import RunDir

_PANELS = (
    ("train_loss", "training loss"),
    ("learning_rate", "learning rate"),
    ("per_device_tps", "tokens / s / device"),
)
_COLOURS = ("#3b6fb6", "#d1603d", "#3f9b6c", "#8d5fb0", "#b58a2a", "#4f9fae", "#b5477d", "#6d6d6d")
_INK, _GRID = "#333333", "#e3e3e3"
_SMOOTH_FROM = 40  # records: shorter curves are drawn as they are


def plot_runs(run_dirs: list[Path], out: Path) -> None:
    """Draw the runs over one another into the PNG `out`. Raises ArtifactError for a run without records."""
    runs = {label: _read(path) for label, path in zip(_labels(run_dirs), run_dirs, strict=True)}
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "font.size": 9,
        "axes.edgecolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _GRID,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 5.4), layout="constrained", dpi=130)  # without pyplot: no display, no global state
        rows = [["train_loss", "train_loss"], ["learning_rate", "per_device_tps"]]
        places: dict[str, Any] = figure.subplot_mosaic(rows, height_ratios=[1.7, 1])
        for name, title in _PANELS:
            _draw_panel(places[name], name, title, runs)
        if len(runs) > 1:
            places["train_loss"].legend(frameon=False)
        else:
            figure.suptitle(next(iter(runs)), x=0.01, ha="left", fontweight="bold")
        image = io.BytesIO()
        figure.savefig(image, format="png")
    atomic.write_bytes(out, image.getvalue())


def moving_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the mean over `width` values around each one, over fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(len(values))
    start = np.maximum(0, index - width // 2)
    end = np.minimum(len(values), index + width // 2 + 1)
    return np.asarray((sums[end] - sums[start]) / (end - start))


def _draw_panel(axes: Any, name: str, title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    for number, (label, records) in enumerate(runs.items()):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if not points:
            continue
        steps, values = (np.array(column, np.float64) for column in zip(*points, strict=True))
        colour = _COLOURS[number % len(_COLOURS)]
        if name == "train_loss" and len(values) >= _SMOOTH_FROM:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, moving_mean(values, len(values) // 25), color=colour, linewidth=1.8, label=label)
        else:
            marker = "o" if len(values) == 1 else None
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, label=label)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("step")
    if name == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    else:
        axes.set_ylim(bottom=0)


def _read(run_dir: Path) -> list[dict[str, Any]]:
    metrics = RunDir(run_dir).metrics
    records = read_records(metrics) if metrics.is_file() else []
    if not records:
        raise ArtifactError(f"{metrics} holds no records; expected the directory of a run that has logged a step")
    return records


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """Return the directories' names, or whole paths where two share a name."""
    names = [path.resolve().name for path in run_dirs]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]
