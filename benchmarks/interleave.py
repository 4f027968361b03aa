"""Fair comparisons on a noisy machine: results are checked first, then the sides take turns in one process."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Collection

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the quartiles of the ratio to the baseline, turn by turn."""

    median: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:8.3f} ms   {self.ratio:6.2f}x ({self.low:.2f} to {self.high:.2f})"


def compare(
    sides: dict[str, Callable[[int], np.ndarray]],
    *,
    batches: int = 1,
    turns: int = 30,
    tolerance: float = 1e-4,
    unchecked: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every side, one after another, ``turns`` times; ratios are the first side's time over the others'.

    Args:
        sides: what to time, by name. Each takes the number of a batch of input.
        batches: how many batches there are. Each call gets the next, so that with enough of them no call finds its
            rows in the caches.
        unchecked: sides that compute something else, which the caller checks.
        clock: seconds; ``time.process_time`` counts what the process has worked, whatever else the machine does.

    Raises:
        AssertionError: the sides do not compute the same, within ``tolerance`` absolute and relative.
    """
    names = list(sides)
    expected = _comparable(sides[names[0]](0))
    for name in names[1:]:
        if name in unchecked:
            continue
        actual = _comparable(sides[name](0))
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    times: dict[str, list[float]] = {name: [] for name in names}
    batch = itertools.cycle(range(batches))
    for turn in range(turns + 3):
        # The order rotates, so that no side always runs after the same one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            number = next(batch)
            begin = clock()
            sides[name](number)
            elapsed = clock() - begin
            if turn >= 3:
                times[name].append(elapsed)
    result = {}
    for name in names:
        ratios = sorted(a / b for a, b in zip(times[names[0]], times[name], strict=True))
        quarter = len(ratios) // 4
        result[name] = Timing(
            statistics.median(times[name]), statistics.median(ratios), ratios[quarter], ratios[-quarter - 1]
        )
    return result


def _comparable(array: np.ndarray) -> np.ndarray:
    """The array in float32 if it is bfloat16, which NumPy's comparison does not support. The cast is exact."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
