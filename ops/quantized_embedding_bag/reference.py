"""The NumPy reference: the table as it is meant, in float64, and `embedding_bag`'s reference over that.

Norms are taken in float32, as the contract says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..attributes import takes
from ..embedding_bag import reference as embedding_bag
from ..embedding_bag import spec as bags
from . import spec

if TYPE_CHECKING:
    from typing import Unpack


def dequantize(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None, bias: np.ndarray | None = None
) -> np.ndarray:
    """The rows that quantized values [V, D] stand for, float64 [V, D]; scale, zero_point and bias are [V].

    Raises:
        TypeError: a dtype outside the table in `spec`.
        ValueError: a shape outside it, or both zero_point and bias.
    """
    spec.codes_type(codes)
    spec.check_row_numbers("scale", scale, len(codes))
    if zero_point is not None and bias is not None:
        raise ValueError("zero_point and bias are given, and one excludes the other")
    rows = codes.astype(np.float64)
    with np.errstate(invalid="ignore"):  # an infinite scale of a zero
        if zero_point is not None:
            spec.check_row_numbers("zero_point", zero_point, len(codes), scale.dtype)
            rows -= zero_point.astype(np.float64)[:, None]
        rows *= scale.astype(np.float64)[:, None]
        if bias is not None:
            spec.check_row_numbers("bias", bias, len(codes), scale.dtype)
            rows += bias.astype(np.float64)[:, None]
    return rows


@takes(spec.Attributes)
def quantized_embedding_bag(
    x: npt.ArrayLike,
    codes: npt.ArrayLike,
    scale: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    *,
    zero_point: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    per_sample_weights: npt.ArrayLike | None = None,
    **attributes: Unpack[bags.Keywords],
) -> np.ndarray:
    """Pool rows of a quantized table, bag by bag, in NumPy. [B, D] of ``scale``'s dtype.

    Arguments as in `lucid_onnx.quantized_embedding_bag`.

    Raises:
        TypeError, IndexError, ValueError: see `dequantize` and `..embedding_bag.spec.check_inputs`.
    """
    scale = np.asarray(scale)
    table = dequantize(
        np.asarray(codes),
        scale,
        None if zero_point is None else np.asarray(zero_point),
        None if bias is None else np.asarray(bias),
    )
    weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
    if weights is not None and weights.dtype != scale.dtype:
        raise TypeError(f"per_sample_weights has dtype {weights.dtype}, scale has {scale.dtype}: they must be equal")
    x, offsets = np.asarray(x), None if offsets is None else np.asarray(offsets)
    weights = None if weights is None else weights.astype(np.float64)
    meaning = bags.Attributes(**attributes)
    bags.check_inputs(table, x, offsets, weights, meaning)
    with np.errstate(all="ignore"):
        return embedding_bag.pooled(x, table, offsets, weights, meaning, np.float32).astype(scale.dtype)
