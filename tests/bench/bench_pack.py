"""Time the packer on a million lengths, and print seconds and density for each capacity.

python tests/bench/bench_pack.py
"""

import time

import numpy as np
import numpy.typing as npt

from prep.selection.best_fit import pack_best_fit


def chat_lengths(number: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return lengths with the shape of real chat data: median 168, mean 320, a tail to 28,000
    tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(168), 1.13, number)
    return np.clip(drawn, 8, 28_561).astype(np.int64)


def main(number: int = 1_000_000) -> None:
    lengths = chat_lengths(number)
    tie = np.random.default_rng(1).integers(0, 1 << 64, number, np.uint64)
    print(f"{number} lengths, median {np.median(lengths):.0f}, mean {lengths.mean():.0f}")
    print(f"{'capacity':>8} {'seconds':>8} {'packs':>8} {'density %':>10}")
    for capacity in (1024, 2048, 4096, 8192, 32768):
        cut = np.minimum(lengths, capacity)
        start = time.perf_counter()
        _, pack_offsets = pack_best_fit(cut, capacity=capacity, tie_break=tie)
        seconds = time.perf_counter() - start
        packs = len(pack_offsets) - 1
        print(
            f"{capacity:>8} {seconds:>8.2f} {packs:>8}"
            f" {100 * cut.sum() / (packs * capacity):>10.3f}"
        )


if __name__ == "__main__":
    main()
