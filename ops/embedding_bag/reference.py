"""The NumPy reference: the equation of `spec`, one bag after another. Slow, plain and the oracle everywhere.

Sums and weights are taken in float64 and rounded once, so that the result is at least as exact as that of
any backend that accumulates in float32. Norms are taken in the accumulation type, because the contract says
so and because ``norm > max_norm`` is a decision, not a rounding.
"""

from __future__ import annotations

import decimal
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attributes import takes
from . import spec


@takes(spec.Attributes)
def embedding_bag(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: spec.Mode = "mean",
    sparse: bool = False,
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    **further: Any,
) -> np.ndarray:
    """Pool rows of ``weight``, bag by bag, in NumPy.

    Args:
        x: indices, int32 or int64, [N] with ``offsets`` or [B, L] with a bag per row.
        weight: the table, [V, D], of one of `spec.TABLE_DTYPES`.
        offsets: int32 or int64, [B] (or [B + 1] with ``include_last_offset``): where each bag begins in ``x``.
        per_sample_weights: of the table's dtype, shaped like ``x``; mode "sum", or mean and sqrtn with a divisor.
        **attributes: those of `spec.Attributes`.
        scale_grad_by_freq, sparse: concern the gradient alone; no effect here.

    Returns:
        [B, D], of the table's dtype.

    Raises:
        TypeError, IndexError, ValueError: see `spec.check_inputs`.
    """
    del scale_grad_by_freq, sparse
    x, weight = np.asarray(x), np.asarray(weight)
    offsets = None if offsets is None else np.asarray(offsets)
    per_sample_weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
    attributes = spec.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset, **further)
    spec.check_inputs(weight, x, offsets, per_sample_weights, attributes)

    with np.errstate(all="ignore"):
        return pooled(x, weight, offsets, per_sample_weights, attributes).astype(weight.dtype)


def pooled(
    x: np.ndarray,
    weight: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    attributes: spec.Attributes,
    norms: npt.DTypeLike | None = None,
) -> np.ndarray:
    """The result before it is rounded, [B, D] float64, of inputs that were checked.

    Args:
        norms: the type that the norms of rows are taken in, by default the accumulation type of ``weight``.
    """
    num_rows, dim = weight.shape
    mode, skipped = attributes.mode, attributes.padding_idx
    bags = _bags(x, offsets, attributes.include_last_offset)
    indices = x.reshape(-1)
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    skipped = None if skipped is None else skipped % num_rows

    output = np.zeros((len(bags), dim), np.float64)
    with np.errstate(all="ignore"):
        for i, (begin, end) in enumerate(bags):
            positions = [k for k in range(begin, end) if is_used(indices[k], skipped, attributes)]
            if not positions:
                continue
            rows = weight[indices[positions]].astype(np.float64)
            if attributes.max_norm is not None:
                measured = weight[indices[positions]].astype(norms or weight.dtype)
                rows *= clip(measured, attributes.max_norm, attributes.norm_type)[:, None]
            if weights is not None:
                rows *= weights[positions].astype(np.float64)[:, None]
            if mode == "max":
                output[i] = rows.max(axis=0)
            else:
                output[i] = rows.sum(axis=0)
                if attributes.divides:
                    output[i] /= divisor_of(positions, weights, attributes)
    return output


def is_used(index: Any, skipped: int | None, attributes: spec.Attributes) -> bool:
    """Whether a position with this index is one of rows(i); ``skipped``: the padded row, not negative."""
    return bool(index != skipped and (index >= 0 or attributes.negative == "refuse"))


def divisors(
    x: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    num_rows: int,
    attributes: spec.Attributes,
) -> np.ndarray:
    """What each bag's sum is divided by, [B, 1] float64; 1 for bags without rows and for the other modes."""
    skipped = None if attributes.padding_idx is None else attributes.padding_idx % num_rows
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    indices = x.reshape(-1)
    bags = _bags(x, offsets, attributes.include_last_offset)
    found = np.ones((len(bags), 1))
    for i, bag in enumerate(bags):
        positions = [k for k in range(*bag) if is_used(indices[k], skipped, attributes)]
        if positions and attributes.divides:
            found[i] = divisor_of(positions, weights, attributes)
    return found


def divisor_of(positions: Sequence[int], weights: np.ndarray | None, attributes: spec.Attributes) -> np.float64:
    """What mean and sqrtn divide by, for a bag of these positions; ``weights``: per_sample_weights [N], or None."""
    total = np.float64(len(positions))
    if weights is not None and attributes.divisor == "weights":
        used = weights[positions].astype(np.float64)
        total = np.float64((used * used if attributes.mode == "sqrtn" else used).sum())
    return np.float64(np.sqrt(total) if attributes.mode == "sqrtn" else total)


def clip(rows: np.ndarray, max_norm: float, norm_type: float) -> np.ndarray:
    """The factor of each row [K] that brings its norm down to ``max_norm``; 1 for rows that are within it."""
    dtype = spec.accumulation_dtype(rows.dtype).type
    magnitudes = np.abs(rows.astype(dtype))
    if np.isinf(norm_type):
        norms = magnitudes.max(axis=1, initial=0)
    else:
        p = dtype(norm_type)
        norms = _power(_power(magnitudes, p).sum(axis=1), dtype(1) / p)
    limit = dtype(max_norm)
    return np.where(norms > limit, limit / (norms + dtype(spec.EPSILON)), dtype(1))


def _power(x: np.ndarray, p: np.floating) -> np.ndarray:
    """x ** p for x >= 0, the same bits on every machine: NumPy's own depend on the processor and on its release.

    Both ways round a power that is more exact than the result can be, so that only what lies within 10^-9 of a tie
    could differ: of float32 those in float64, of float64 those of 40 digits, a tenth of a millisecond each.
    """
    if p in (0.5, 1, 2):  # the usual norms and their roots, which IEEE 754 rounds
        return np.sqrt(x) if p == 0.5 else x if p == 1 else x * x
    if x.dtype == np.float32:
        return (x.astype(np.float64) ** float(p)).astype(np.float32)
    exponent = decimal.Decimal(float(p))
    with decimal.localcontext(decimal.Context(40, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])):
        powers = [float(decimal.Decimal(value) ** exponent) for value in x.ravel().tolist()]
    return np.array(powers, np.float64).reshape(x.shape)


def _bags(x: np.ndarray, offsets: np.ndarray | None, include_last_offset: bool) -> list[tuple[int, int]]:
    if offsets is None:
        num_bags, length = x.shape
        return [(i * length, (i + 1) * length) for i in range(num_bags)]
    ends = [int(o) for o in offsets] if include_last_offset else [*(int(o) for o in offsets), len(x)]
    return list(itertools.pairwise(ends))
