"""The curves of one or more runs over one another, drawn from their metrics.jsonl.

training loss (wide)
learning rate | tokens / s / device | evaluation loss      the last only if a run has one
a small panel for each source: its training loss, and its evaluation loss dashed with dots
"""

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared import atomic
from shared.errors import ArtifactError
from train.run.directory import RunDir
from train.run.records import read_records

Records = list[dict[str, Any]]

_COLOURS = ("#3b6fb6", "#d1603d", "#3f9b6c", "#8d5fb0", "#b58a2a", "#4f9fae", "#b5477d", "#6d6d6d")
_INK, _GRID = "#333333", "#e3e3e3"
_STYLE = {
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
# Curves of fewer records are not smoothed.
_SMOOTH_FROM = 40
_SOURCES_PER_ROW = 5
_MAX_SOURCES = 30
# Characters that fit over a small panel.
_MAX_NAME = 28


def plot_runs(run_dirs: list[Path], out: Path) -> None:
    """Draw the runs over one another into the PNG `out`.

    Raises ArtifactError for a run without records.
    """
    labels = [path.resolve().name for path in run_dirs]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in run_dirs]
    runs: dict[str, Records] = {}
    for label, path in zip(labels, run_dirs, strict=True):
        metrics = RunDir(path).metrics
        runs[label] = read_records(metrics) if metrics.is_file() else []
        if not runs[label]:
            raise ArtifactError(
                f"{metrics} holds no records; expected the directory of a run that has logged a"
                " step"
            )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    counts = sources_of(runs.values())
    # Of many sources those with the most losses are drawn, in alphabetical order.
    shown = sorted(sorted(counts, key=lambda source: -counts[source])[:_MAX_SOURCES])
    rows = -(-len(shown) // _SOURCES_PER_ROW)
    with mpl.rc_context(_STYLE):
        # Without pyplot there is no display and no global state.
        figure = Figure(
            figsize=(11 if rows else 9, 5.4 + 1.7 * rows), layout="constrained", dpi=130
        )
        main: Any = figure
        if rows:
            halves: Any = figure.subfigures(2, 1, height_ratios=[5.4, 1.7 * rows])
            main, below = halves
            _draw_sources(below, runs, shown, len(counts))
        loss_axes = _draw_main(main, runs)
        if len(runs) > 1:
            loss_axes.legend(frameon=False)
        else:
            main.suptitle(next(iter(runs)), x=0.01, ha="left", fontweight="bold")
        image = io.BytesIO()
        figure.savefig(image, format="png")
    atomic.write_bytes(out, image.getvalue())


def sources_of(runs: Iterable[Records]) -> dict[str, int]:
    """Return how many losses each source has; nothing if there is only one source.

    Its curve would be that of the loss itself.
    """
    counts = Counter(
        key.partition("/")[2]
        for records in runs
        for record in records
        for key, value in record.items()
        if key.startswith(("train_loss/", "eval_loss/")) and value is not None
    )
    return dict(sorted(counts.items())) if len(counts) > 1 else {}


def moving_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the mean over `width` values around each one, over fewer at the ends."""
    # Each mean is a difference of two running sums, so that the width costs nothing.
    sums = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(len(values))
    start = np.maximum(0, index - width // 2)
    end = np.minimum(len(values), index + width // 2 + 1)
    return np.asarray((sums[end] - sums[start]) / (end - start))


def _draw_main(figure: Any, runs: dict[str, Records]) -> Any:
    """Draw the panels of the whole runs and return that of the training loss."""
    titles = {"learning_rate": "learning rate", "per_device_tps": "tokens / s / device"}
    if any(record.get("eval_loss") is not None for records in runs.values() for record in records):
        titles["eval_loss"] = "evaluation loss"
    panels = figure.subplot_mosaic(
        [["train_loss"] * len(titles), list(titles)], height_ratios=[1.7, 1]
    )
    for name, title in {"train_loss": "training loss", **titles}.items():
        axes = panels[name]
        for number, (label, records) in enumerate(runs.items()):
            _draw_curve(axes, records, name, colour=_COLOURS[number % len(_COLOURS)], label=label)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step")
        if name == "learning_rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        else:
            axes.set_ylim(bottom=0)
    return panels["train_loss"]


def _draw_sources(
    figure: Any, runs: dict[str, Records], shown: list[str], num_sources: int
) -> None:
    """Draw a small panel for each source, all on one scale of steps."""
    rows = -(-len(shown) // _SOURCES_PER_ROW)
    panels = figure.subplots(rows, _SOURCES_PER_ROW, sharex=True, squeeze=False).ravel()
    for axes, source, title in zip(panels, shown, titles(shown), strict=False):
        for number, records in enumerate(runs.values()):
            colour = _COLOURS[number % len(_COLOURS)]
            _draw_curve(axes, records, f"train_loss/{source}", colour=colour)
            # Two curves in a panel are told apart by colour, those of two runs already are.
            colour = _INK if len(runs) == 1 else colour
            _draw_curve(axes, records, f"eval_loss/{source}", colour=colour)
        axes.set_title(title, loc="left", fontsize=7.5)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    some = f", {len(shown)} of {num_sources}" if len(shown) < num_sources else ""
    figure.suptitle(
        f"loss by source{some}: training, and evaluation (dashed)", x=0.01, ha="left", fontsize=9
    )


def _draw_curve(
    axes: Any, records: Records, name: str, *, colour: str, label: str | None = None
) -> None:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    if not points:
        return
    steps, values = (np.array(column, np.float64) for column in zip(*points, strict=True))
    if name.startswith("eval_loss"):
        style = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 3}
    elif name.startswith("train_loss") and len(values) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        values = moving_mean(values, max(3, len(values) // 25))
        style = {"linewidth": 1.6}
    else:
        # A line through one point would be invisible.
        style = {"linewidth": 1.4, "marker": "o" if len(values) == 1 else None}
    axes.plot(steps, values, color=colour, label=label, **style)


def titles(sources: list[str]) -> list[str]:
    """Return the names of sources as titles that fit over small panels.

    If some are too long, all lose what comes before the last slash, unless two would then be equal;
    names that are still too long lose their middle.
    """
    last = [source.rpartition("/")[2] for source in sources]
    if max(map(len, sources), default=0) > _MAX_NAME and len(set(last)) == len(set(sources)):
        sources = last
    head, tail = _MAX_NAME // 2 - 1, _MAX_NAME // 2 - 2
    short = [
        name if len(name) <= _MAX_NAME else f"{name[:head]}...{name[-tail:]}" for name in sources
    ]
    # matplotlib reads what is between two $ as mathematics.
    return [name.replace("$", r"\$") for name in short]
