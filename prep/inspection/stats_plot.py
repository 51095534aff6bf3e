"""The numbers of a shard set as a picture: how long sequences are, how full packs are, what each
source weighs.

sequence length, log scale, with percentiles   |  pack fill
source by source: share of the tokens, share of the loss tokens
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.inspection.stats import stats
from prep.inspection.token_text import printable
from shared import atomic
from shared.errors import ArtifactError, PrerequisiteError
from shared.shard_reader import ShardSet

_TOKENS, _LOSS, _INK, _SOFT, _GRID = "#8aa4c8", "#23883f", "#2b2d31", "#6b6f76", "#e4e4e0"
_STYLE = {
    "font.size": 9,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": _GRID,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.parse_math": False,  # a source may have $ in its name
}
_MOST_SOURCES = 30  # bars; the smallest of more sources share one
_LONGEST_NAME = 44  # characters
_PERCENTILES = ("p5", "p50", "p95", "p99")


def plot_stats(shard_set: ShardSet, out: Path) -> None:
    """Draw the PNG `out`, in one piece.

    Raises PrerequisiteError where matplotlib is missing, ArtifactError where `out` cannot be
    written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise PrerequisiteError(
            f"--plot needs matplotlib, which cannot be imported ({exc}); pip install"
            " 'matplotlib>=3.9'"
        ) from exc
    found = stats(shard_set)
    sources = _bars(found["sources"])
    image = io.BytesIO()
    with mpl.rc_context(_STYLE):
        height = 3.6 + 0.55 + 0.34 * max(len(sources), 2)
        figure = Figure(
            figsize=(11, height), layout="constrained", dpi=130
        )  # no pyplot: no display, no global state
        panels: dict[str, Any] = figure.subplot_mosaic(
            [["lengths", "fill"], ["sources", "sources"]],
            width_ratios=[2.1, 1],
            height_ratios=[3.6, height - 3.6],
        )
        figure.suptitle(_headline(found), x=0.01, ha="left", fontsize=11)
        _draw_lengths(panels["lengths"], _lengths(shard_set), found)
        _draw_fill(panels["fill"], _fill(shard_set), found)
        _draw_sources(panels["sources"], sources)
        figure.savefig(image, format="png")
    try:
        atomic.write_bytes(out, image.getvalue())
    except OSError as exc:
        raise ArtifactError(
            f"cannot write {out}: {exc.strerror}; give --plot another file"
        ) from exc


def _headline(found: dict[str, Any]) -> str:
    name = _short(found["name"])
    return (
        f"{name}   {found['fingerprint'][:16]}\n{found['sequences']:,} sequences,"
        f" {found['tokens']:,} tokens, {found['loss_tokens']:,} trained"
        f" ({found['loss_share']:.1%}), in {found['packs']:,} packs of {found['max_seq_len']:,}"
    )


def _draw_lengths(axes: Any, lengths: npt.NDArray[np.int64], found: dict[str, Any]) -> None:
    axes.set_title("length of sequences")
    axes.set_xlabel("tokens, log scale")
    axes.set_ylabel("sequences")
    if not len(lengths):
        return
    low, high = int(lengths.min()), int(lengths.max())
    # bounds half-way between whole numbers: no bin of a log scale is empty only because no length
    # falls in it
    bounds = np.unique(np.round(np.geomspace(low, high + 1, 61))) - 0.5
    axes.hist(lengths, bins=bounds if len(bounds) > 1 else [low - 0.5, low + 0.5], color=_TOKENS)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.5, high * 1.8)  # a power of two, and room for the last label
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    spread = found["sequence_length"]
    axes.set_title(f"length of sequences: {low:,} to {high:,}, mean {spread['mean']:,.1f}")
    top = axes.get_ylim()[1] * 1.3
    axes.set_ylim(0, top)
    for number, name in enumerate(
        _PERCENTILES
    ):  # each label on a line of its own: two may stand at one length
        axes.axvline(spread[name], color=_INK, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.annotate(
            f"{'median' if name == 'p50' else name} {spread[name]:,}",
            (spread[name], top * (0.98 - 0.055 * number)),
            xytext=(3, 0), textcoords="offset points", va="top", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip


def _draw_fill(axes: Any, fill: npt.NDArray[np.float64], found: dict[str, Any]) -> None:
    axes.set_title(f"fill of packs: density {found['density']:.2%}")
    axes.set_xlabel(f"% full; {int((fill < 0.99).sum()):,} of {len(fill):,} packs are under 99%")
    axes.set_ylabel("packs, log scale")
    if not len(fill):
        return
    low = float(np.floor(fill.min() * 20) * 5)
    axes.hist(fill * 100, bins=np.linspace(min(low, 95.0), 100, 26), color=_TOKENS)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")


def _draw_sources(axes: Any, sources: list[dict[str, Any]]) -> None:
    places = np.arange(len(sources))
    axes.barh(
        places - 0.19,
        [100 * s["token_share"] for s in sources],
        0.36,
        color=_TOKENS,
        label="share of the tokens",
    )
    axes.barh(
        places + 0.19,
        [100 * s["loss_share"] for s in sources],
        0.36,
        color=_LOSS,
        label="share of the loss tokens",
    )
    axes.set_yticks(places, [_short(source["name"]) for source in sources])
    axes.set_ylim(max(len(sources), 2) - 0.5, -0.5)  # the first source on top
    axes.set_xlim(
        0,
        max((100 * max(s["token_share"], s["loss_share"]) for s in sources), default=1.0) * 1.3
        or 1.0,
    )
    axes.set_xlabel("%")
    axes.set_title("sources")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    for place, source in zip(places, sources, strict=True):
        end = 100 * max(source["token_share"], source["loss_share"])
        trained = source["loss_tokens"] / source["tokens"] if source["tokens"] else 0.0
        text = (
            f"  {_million(source['tokens'])} tokens, {_million(source['loss_tokens'])} trained"
            f" ({trained:.0%})"
        )
        axes.text(end, place, text, va="center", color=_SOFT, fontsize=8)


def _bars(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sources in order; of more than fit, the largest, and the others as one."""
    if len(sources) <= _MOST_SOURCES:
        return sources
    by_size = sorted(range(len(sources)), key=lambda index: (-sources[index]["tokens"], index))
    kept = sorted(by_size[: _MOST_SOURCES - 1])
    rest = [sources[index] for index in by_size[_MOST_SOURCES - 1 :]]
    sums = {
        key: sum(source[key] for source in rest)
        for key in ("tokens", "loss_tokens", "token_share", "loss_share")
    }
    return [*(sources[index] for index in kept), {"name": f"{len(rest)} smaller sources", **sums}]


def _lengths(shard_set: ShardSet) -> npt.NDArray[np.int64]:
    return np.concatenate(
        [np.zeros(0, np.int64), *(np.diff(shard["seq_offsets"]) for shard in shard_set.shards)]
    )


def _fill(shard_set: ShardSet) -> npt.NDArray[np.float64]:
    """Return tokens / max_seq_len of every pack, float64 [P]."""
    tokens = [np.diff(shard["seq_offsets"][shard["pack_offsets"]]) for shard in shard_set.shards]
    return np.concatenate([np.zeros(0, np.int64), *tokens]) / shard_set.manifest.max_seq_len


def _short(name: str) -> str:
    """Return a name that fits beside its bar: the end is what tells files apart, so the middle
    goes."""
    shown = printable(name.encode("utf-8", "surrogatepass"))
    if len(shown) <= _LONGEST_NAME:
        return shown
    half = (_LONGEST_NAME - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"


def _million(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
