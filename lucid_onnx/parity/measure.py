"""The difference between two arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """What an output must be.

    Attributes:
        rounded: the expected array, of the output's dtype.
        exact: the same before rounding, float64.
        tolerance: the largest error of each element, float64, infinite where the result is not finite.
    """

    rounded: np.ndarray
    exact: np.ndarray
    tolerance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a comparison found.

    Attributes:
        kind: "equal" within the tolerance, or the worst of "count", "dtype", "shape", "NaN", "infinity" and "value".
        same_bits: the bits of ``Expected.rounded``.
        max_abs, max_rel: over the elements that are finite on both sides.
        max_ulp: their distance in units in the last place, from ``Expected.rounded``; None for integers.
        margin: the largest error, measured in tolerances.
        wrong, size: how many elements are wrong, and how many there are.
        where: the first wrong element, in words.
    """

    kind: str = "equal"
    same_bits: bool = True
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int | None = None
    margin: float = 0.0
    wrong: int = 0
    size: int = 0
    where: str = ""


_SEVERITY = ("equal", "value", "infinity", "NaN", "shape", "dtype", "count")


def compare(got: Sequence[np.ndarray], expected: Sequence[Expected]) -> Difference:
    """All outputs at once: the worst of each number, and the worst kind."""
    if len(got) != len(expected):
        return Difference("count", same_bits=False, where=f"{len(got)} outputs, expected {len(expected)}")
    found = [
        _compare(g, e, k if len(expected) > 1 else None) for k, (g, e) in enumerate(zip(got, expected, strict=True))
    ]
    worst = max(found, key=lambda d: (_SEVERITY.index(d.kind), d.margin), default=Difference())
    ulps = [d.max_ulp for d in found if d.max_ulp is not None]
    return dataclasses.replace(
        worst,
        same_bits=all(d.same_bits for d in found),
        max_abs=max((d.max_abs for d in found), default=0.0),
        max_rel=max((d.max_rel for d in found), default=0.0),
        max_ulp=max(ulps) if ulps else None,
        margin=max((d.margin for d in found), default=0.0),
        wrong=sum(d.wrong for d in found),
        size=sum(d.size for d in found),
    )


def _compare(got: np.ndarray, expected: Expected, output: int | None) -> Difference:
    name = "output" if output is None else f"output {output}"
    want = expected.rounded
    if got.dtype != want.dtype:
        where = f"{name} has dtype {got.dtype}, expected {want.dtype}"
        return Difference("dtype", same_bits=False, size=want.size, where=where)
    if got.shape != want.shape:
        where = f"{name} has shape {list(got.shape)}, expected {list(want.shape)}"
        return Difference("shape", same_bits=False, size=want.size, where=where)
    same_bits = got.tobytes() == want.tobytes()
    if not _is_float(want.dtype):
        off = got != want
        where = _where(name, off, got, want, None)
        kind = "value" if off.any() else "equal"
        return Difference(kind, same_bits, wrong=int(off.sum()), size=want.size, where=where)
    value, exact, tolerance = got.astype(np.float64), expected.exact, expected.tolerance
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.abs(value - exact)
        nan = np.isnan(value) != np.isnan(exact)
        same = (value == exact) | (np.isnan(value) & np.isnan(exact)) | (got == want)
        infinite = ~same & ~nan & ~(np.isfinite(value) & np.isfinite(exact))
        finite = np.isfinite(value) & np.isfinite(exact)
        off = ~same & ~(finite & (error <= tolerance))
        error = np.where(same | ~finite, np.where(finite & ~same, error, 0.0), error)
        margin = np.where(error == 0, 0.0, error / tolerance)
        relative = np.where(error == 0, 0.0, error / np.abs(exact))
    if nan.any():
        kind = "NaN"
    elif infinite.any():
        kind = "infinity"
    else:
        kind = "value" if off.any() else "equal"
    both = np.isfinite(value) & np.isfinite(want.astype(np.float64))
    return Difference(
        kind,
        same_bits,
        max_abs=_max(error),
        max_rel=_max(relative),
        max_ulp=ulps(got[both], want[both]),
        margin=_max(margin),
        wrong=int(off.sum()),
        size=want.size,
        where=_where(name, off, got, exact, tolerance),
    )


def _max(values: np.ndarray) -> float:
    return float(np.nanmax(values, initial=0.0))


def _where(name: str, off: np.ndarray, got: np.ndarray, exact: np.ndarray, tolerance: np.ndarray | None) -> str:
    if not off.any():
        return ""
    k = np.unravel_index(int(off.argmax()), off.shape)
    place = ", ".join(str(int(i)) for i in k)
    within = "" if tolerance is None or not np.isfinite(tolerance[k]) else f" within {tolerance[k]:.3g}"
    return f"{name}[{place}] = {_number(got[k])}, expected {_number(exact[k])}{within}"


def _number(value: np.generic) -> str:
    return f"{float(value):.9g}"


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == _BFLOAT16


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance of two arrays of finite floats, counted in the numbers of their dtype between them."""
    if a.size == 0:
        return 0
    bits = 8 * a.dtype.itemsize
    x, y = (_ordered(v, bits) for v in (a, b))
    return int(np.max(np.maximum(x, y) - np.minimum(x, y)))


def _ordered(values: np.ndarray, bits: int) -> np.ndarray:
    """Floats as unsigned integers in the same order, with both zeros alike."""
    signed = np.ascontiguousarray(values).view(f"int{bits}").astype(np.int64)
    lowest = -(1 << (bits - 1))
    ordered = np.where(signed < 0, lowest - signed, signed)
    return ordered.view(np.uint64) ^ np.uint64(1 << 63)  # an offset of 2^63
