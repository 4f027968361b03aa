"""The NumPy reference: the equation of `spec`, one bag after another. Slow, plain and the oracle everywhere.

Products and sums are taken in float64 and rounded once. What is a decision and no rounding is taken in the accumulation
type, because the contract says so: whether a row is clipped, and which of the clipped rows is a column's maximum.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..attributes import takes
from ..embedding_bag import reference as embedding_bag
from ..embedding_bag import spec as bags
from . import spec


class Entries(NamedTuple):
    """What the positions give, before anything is rounded or added up."""

    rows: np.ndarray  #: int64 [M]: the table's row of each position that counts
    values: np.ndarray  #: float64 [M, D]
    per_sample_weights: np.ndarray  #: float64, as indices: the gradient of the weights


@takes(spec.Attributes)
def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: bags.Mode = "mean",
    sparse: bool = False,
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    **further: Any,
) -> tuple[np.ndarray, ...]:
    """The gradient of a bag, in NumPy.

    Args:
        grad_output: the gradient of the bag's output, [B, D] of the table's dtype.
        x, weight, offsets, per_sample_weights: of the bag.
        **attributes: those of `spec.Attributes`.
        sparse: one entry a position instead of a whole table.

    Returns:
        The operator's outputs in order (see `spec.Variant.outputs`), of the table's dtype; ``rows`` is int64.

    Raises:
        TypeError, IndexError, ValueError: see `spec.check_inputs`.
    """
    grad_output, x, weight = np.asarray(grad_output), np.asarray(x), np.asarray(weight)
    offsets = None if offsets is None else np.asarray(offsets)
    weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
    attributes = spec.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, scale_grad_by_freq=scale_grad_by_freq, **further
    )
    op = spec.variant(sparse=sparse, two_d=x.ndim == 2, weighted=weights is not None)
    found = entries(grad_output, x, weight, offsets, weights, attributes)
    with np.errstate(all="ignore"):
        if op.sparse:
            outputs = [found.rows, found.values.astype(weight.dtype)]
        else:
            outputs = [dense(found, len(weight)).astype(weight.dtype)]
        if op.weighted:
            outputs.append(found.per_sample_weights.astype(weight.dtype))
    return tuple(outputs)


def dense(found: Entries, num_rows: int) -> np.ndarray:
    """The gradient of the whole table, [V, D] float64: the entries added up, one after another."""
    table = np.zeros((num_rows, found.values.shape[1]))
    np.add.at(table, found.rows, found.values)
    return table


def entries(
    grad_output: np.ndarray,
    indices: np.ndarray,
    weight: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    attributes: spec.Attributes,
    *,
    magnitudes: bool = False,
) -> Entries:
    """What each position gives, in float64.

    With ``magnitudes``, how large what is added up is, for inputs that are magnitudes.

    Raises:
        TypeError, IndexError, ValueError: see `spec.check_inputs`.
    """
    spec.check_inputs(grad_output, weight, indices, offsets, per_sample_weights, attributes)
    num_rows, dim = weight.shape
    skipped = None if attributes.padding_idx is None else attributes.padding_idx % num_rows
    flat = indices.reshape(-1).astype(np.int64)
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1).astype(np.float64)
    of_weights = np.zeros(len(flat))
    positions: list[int] = []
    values: list[np.ndarray] = []
    with np.errstate(all="ignore"):
        for gradient, bag in zip(grad_output.astype(np.float64), _bags(indices, offsets, attributes), strict=True):
            kept = [k for k in bag if embedding_bag.is_used(flat[k], skipped, attributes)]
            if not kept:
                continue
            positions += kept
            rows = _clipped(weight[flat[kept]], attributes)
            if attributes.mode == "max":
                won = np.arange(len(kept))[:, None] == _first_maximum(rows)
                values.append(np.where(won, gradient, 0.0))
            else:
                divisor = embedding_bag.divisor_of(kept, weights, attributes) if attributes.divides else np.float64(1)
                factor = np.ones(len(kept)) if weights is None else weights[kept]
                by_weights = attributes.divides and attributes.divisor == "weights"
                if magnitudes and by_weights and weights is not None:
                    # A relative error of the divisor, which may cancel, is one of all that it divides.
                    largest = embedding_bag.divisor_of(kept, np.abs(weights), attributes)
                    divisor, factor = np.abs(divisor) / (1 + largest / np.abs(divisor)), np.abs(factor)
                values.append(gradient / divisor * factor[:, None])
                dots = (gradient / divisor * rows.astype(np.float64)).sum(axis=1)
                if by_weights:
                    shares = np.ones(len(kept)) if attributes.mode == "mean" else factor / divisor
                    through = (factor * dots).sum() / divisor * shares
                    dots = dots + through if magnitudes else dots - through
                of_weights[kept] = dots
        found = np.concatenate([np.zeros((0, dim)), *values])
        used = flat[positions]
        if attributes.scale_grad_by_freq:
            found /= np.bincount(used, minlength=num_rows)[used][:, None]
    return Entries(used, found, of_weights.reshape(indices.shape))


def _clipped(rows: np.ndarray, attributes: spec.Attributes) -> np.ndarray:
    """Rows [K, D] as the bag reads them, in the accumulation type."""
    dtype = embedding_bag.spec.accumulation_dtype(rows.dtype)
    if attributes.max_norm is None:
        return rows.astype(dtype)
    return rows.astype(dtype) * embedding_bag.clip(rows, attributes.max_norm, attributes.norm_type)[:, None]


def _first_maximum(rows: np.ndarray) -> np.ndarray:
    """Of each column of [K, D] the first row that has the maximum; a NaN is the maximum."""
    nans = np.isnan(rows)
    largest = np.where(nans.any(axis=0), nans, rows == rows.max(axis=0))
    return largest.argmax(axis=0)


def _bags(indices: np.ndarray, offsets: np.ndarray | None, attributes: spec.Attributes) -> list[range]:
    """The positions of each bag."""
    if offsets is None:
        num_bags, length = indices.shape
        return [range(i * length, (i + 1) * length) for i in range(num_bags)]
    bounds = [int(o) for o in offsets]
    if not attributes.include_last_offset:
        bounds.append(len(indices))
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]
