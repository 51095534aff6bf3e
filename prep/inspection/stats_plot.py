"""The numbers of a shard set as a picture.

length of sequences, log scale, with percentiles   |  fill of packs
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
_MAX_BARS = 30  # the smallest of more sources share one
_MAX_NAME = 44  # characters
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
    numbers = stats(shard_set)
    sources = _bars(numbers["sources"])
    lengths = [np.diff(shard["seq_offsets"]) for shard in shard_set.shards]
    image = io.BytesIO()
    with mpl.rc_context(_STYLE):
        height = 3.6 + 0.55 + 0.34 * max(len(sources), 2)
        # A Figure without pyplot needs no display and keeps no global state.
        figure = Figure(figsize=(11, height), layout="constrained", dpi=130)
        panels: dict[str, Any] = figure.subplot_mosaic(
            [["lengths", "fill"], ["sources", "sources"]],
            width_ratios=[2.1, 1],
            height_ratios=[3.6, height - 3.6],
        )
        headline = (
            f"{_short(numbers['name'])}   {numbers['fingerprint'][:16]}\n"
            f"{numbers['sequences']:,} sequences, {numbers['tokens']:,} tokens,"
            f" {numbers['loss_tokens']:,} trained ({numbers['loss_share']:.1%}), in"
            f" {numbers['packs']:,} packs of {numbers['max_seq_len']:,}"
        )
        figure.suptitle(headline, x=0.01, ha="left", fontsize=11)
        _draw_lengths(panels["lengths"], np.concatenate([np.zeros(0, np.int64), *lengths]), numbers)
        _draw_fill(panels["fill"], _fill(shard_set), numbers)
        _draw_sources(panels["sources"], sources)
        figure.savefig(image, format="png")
    try:
        atomic.write_bytes(out, image.getvalue())
    except OSError as exc:
        raise ArtifactError(
            f"cannot write {out}: {exc.strerror}; give --plot another file"
        ) from exc


def _draw_lengths(axes: Any, lengths: npt.NDArray[np.int64], numbers: dict[str, Any]) -> None:
    axes.set_title("length of sequences")
    axes.set_xlabel("tokens, log scale")
    axes.set_ylabel("sequences")
    if not len(lengths):
        return
    low, high = int(lengths.min()), int(lengths.max())
    # Bounds half-way between whole numbers: each bin of the log scale has a length that can fall
    # into it.
    bounds = np.unique(np.round(np.geomspace(low, high + 1, 61))) - 0.5
    axes.hist(lengths, bins=bounds if len(bounds) > 1 else [low - 0.5, low + 0.5], color=_TOKENS)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.5, high * 1.8)  # a power of two, and room for the last label
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    spread = numbers["sequence_length"]
    axes.set_title(f"length of sequences: {low:,} to {high:,}, mean {spread['mean']:,.1f}")
    top = axes.get_ylim()[1] * 1.3
    axes.set_ylim(0, top)
    # Each label has its own line, since two may stand at one length.
    for number, name in enumerate(_PERCENTILES):
        axes.axvline(spread[name], color=_INK, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.annotate(
            f"{'median' if name == 'p50' else name} {spread[name]:,}",
            (spread[name], top * (0.98 - 0.055 * number)),
            xytext=(3, 0),
            textcoords="offset points",
            va="top",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )


def _draw_fill(axes: Any, fill: npt.NDArray[np.float64], numbers: dict[str, Any]) -> None:
    axes.set_title(f"fill of packs: density {numbers['density']:.2%}")
    axes.set_xlabel(f"% full; {int((fill < 0.99).sum()):,} of {len(fill):,} packs are under 99%")
    axes.set_ylabel("packs, log scale")
    if not len(fill):
        return
    low = float(np.floor(fill.min() * 20) * 5)
    # Bins of at most 5 %, from the emptiest pack up to full.
    axes.hist(fill * 100, bins=np.linspace(min(low, 95.0), 100, 26), color=_TOKENS)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")


def _draw_sources(axes: Any, sources: list[dict[str, Any]]) -> None:
    positions = np.arange(len(sources))
    for key, offset, color, label in (
        ("token_share", -0.19, _TOKENS, "share of the tokens"),
        ("loss_share", 0.19, _LOSS, "share of the loss tokens"),
    ):
        shares = [100 * source[key] for source in sources]
        axes.barh(positions + offset, shares, 0.36, color=color, label=label)
    axes.set_yticks(positions, [_short(source["name"]) for source in sources])
    axes.set_ylim(max(len(sources), 2) - 0.5, -0.5)  # the first source on top
    ends = [100 * max(source["token_share"], source["loss_share"]) for source in sources]
    axes.set_xlim(0, max(ends, default=1.0) * 1.3 or 1.0)  # room for the text behind a bar
    axes.set_xlabel("%")
    axes.set_title("sources")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    for position, end, source in zip(positions, ends, sources, strict=True):
        trained = source["loss_tokens"] / source["tokens"] if source["tokens"] else 0.0
        text = (
            f"  {_million(source['tokens'])} tokens, {_million(source['loss_tokens'])} trained"
            f" ({trained:.0%})"
        )
        axes.text(end, position, text, va="center", color=_SOFT, fontsize=8)


def _bars(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sources in order; of more than fit, the largest, and the others as one."""
    if len(sources) <= _MAX_BARS:
        return sources
    # Of equally large sources the first have a bar.
    by_size = sorted(range(len(sources)), key=lambda index: (-sources[index]["tokens"], index))
    largest = [sources[index] for index in sorted(by_size[: _MAX_BARS - 1])]
    rest = [sources[index] for index in by_size[_MAX_BARS - 1 :]]
    sums = {
        key: sum(source[key] for source in rest)
        for key in ("tokens", "loss_tokens", "token_share", "loss_share")
    }
    return [*largest, {"name": f"{len(rest)} smaller sources", **sums}]


def _fill(shard_set: ShardSet) -> npt.NDArray[np.float64]:
    """Return tokens / max_seq_len of every pack, float64 [P]."""
    tokens = [np.diff(shard["seq_offsets"][shard["pack_offsets"]]) for shard in shard_set.shards]
    return np.concatenate([np.zeros(0, np.int64), *tokens]) / shard_set.manifest.max_seq_len


def _short(name: str) -> str:
    """Return a name that fits beside its bar: the end tells files apart, so the middle goes."""
    text = printable(name.encode("utf-8", "surrogatepass"))
    if len(text) <= _MAX_NAME:
        return text
    half = (_MAX_NAME - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _million(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
