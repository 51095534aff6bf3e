"""A hash of 64-bit integers, for draws that depend on nothing but their key: splitmix64."""

import numpy as np
import numpy.typing as npt

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the hash of each value, uint64 like `values`: one step of splitmix64 (Steele, Lea and
    Flood 2014), a bijection."""
    # the wrap around 2**64 is meant; numpy would warn of it for a single number
    with np.errstate(over="ignore"):
        return finalize(values + _INCREMENT)


def finalize(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return each value with every input bit spread over all output bits: splitmix64 without its
    increment."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
