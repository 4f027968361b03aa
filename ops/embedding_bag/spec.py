"""EmbeddingBag: the contract that every expression of the operator keeps.

For bag ``i`` whose positions in ``indices`` are ``K(i)``::

    rows(i)   = { k in K(i) : indices[k] != padding_idx }
    row(k)    = weight[indices[k]] * clip(indices[k]) * per_sample_weights[k]
    clip(r)   = max_norm / (norm(r) + 1e-7)   where max_norm is given and norm(r) > max_norm, else 1
    norm(r)   = (sum_d |weight[r, d]| ** norm_type) ** (1 / norm_type)     (the largest |.| for inf)

    sum:  output[i] = sum of row(k) over rows(i)
    mean: output[i] = sum / max(1, |rows(i)|)
    max:  output[i] = elementwise maximum over rows(i)
    a bag with no rows is a row of zeros in every mode

``K(i)`` is ``offsets[i] <= k < offsets[i + 1]``. Without ``include_last_offset`` the last bag ends at
``len(indices)``; with it ``offsets`` has one entry more than there are bags and its last entry ends the
last bag. Positions after that entry belong to no bag and are never read. With 2-D indices ``[B, L]``
every row of ``indices`` is a bag.

Arithmetic: float16 and bfloat16 tables accumulate in float32, and every result is rounded once, at the
end. Norms are taken in float32 (double for double). A padded position is skipped: neither its row nor its
weight is looked at. NaN and infinity in a selected row spread as in ``numpy.sum`` and ``numpy.max``.

The ONNX operator comes under one name per combination of inputs (`VARIANTS`), because a function body
cannot ask whether an input is there. All share these attributes, every one of them written on every
node, because neither a kernel nor onnx's own inliner sees a function's defaults:

==================== ===== =====================================================================
mode                 INT   0 sum, 1 mean, 2 max (ATen's numbers)
padding_idx          INT   the padded row, negative from the end; `NO_PADDING` for none
max_norm             FLOAT the largest norm, ``+inf`` for none
max_norm_lo          FLOAT what rounding ``max_norm`` to FLOAT lost (ONNX has no double attribute)
norm_type            FLOAT the p of the norm, ``+inf`` for the largest magnitude
norm_type_lo         FLOAT as ``max_norm_lo``
stash_type           INT   the type to accumulate in: FLOAT, or DOUBLE for double tables
include_last_offset  INT   0 or 1; only on the names that take offsets
==================== ===== =====================================================================
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

DOMAIN = "ai.lucid"
VERSION = 1
MODES = ("sum", "mean", "max")
#: The ``padding_idx`` attribute that stands for "no padding": no legal value, and no index equals it
#: even after the number of rows was added.
NO_PADDING = -(2**63)
EPSILON = 1e-7
#: The oldest and newest ONNX opset that the lowering is written for.
MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 16, 26, 18

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TABLE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64))
INDEX_DTYPES = (np.dtype(np.int32), np.dtype(np.int64))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One operator name: which inputs it takes, in order."""

    name: str
    two_d: bool
    weighted: bool
    table = "weight"  #: the input that is the table, or its first part
    outputs = ("output",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (
            "weight",
            "indices",
            *(() if self.two_d else ("offsets",)),
            *(("per_sample_weights",) if self.weighted else ()),
        )


#: The closed set of operator names.
VARIANTS: Mapping[str, Variant] = {
    v.name: v
    for v in (
        Variant("EmbeddingBag", two_d=False, weighted=False),
        Variant("EmbeddingBagWeighted", two_d=False, weighted=True),
        Variant("EmbeddingBag2D", two_d=True, weighted=False),
        Variant("EmbeddingBag2DWeighted", two_d=True, weighted=True),
    )
}


def variant(*, two_d: bool, weighted: bool) -> Variant:
    """The operator name for 1-D or 2-D indices, with or without per_sample_weights."""
    return VARIANTS["EmbeddingBag" + ("2D" if two_d else "") + ("Weighted" if weighted else "")]


def accumulation_dtype(table: npt.DTypeLike) -> np.dtype:
    """float64 for a float64 table, float32 for every other."""
    return np.dtype(np.float64 if np.dtype(table) == np.float64 else np.float32)


def split_double(value: float) -> tuple[float, float]:
    """``value`` as two float32 numbers whose sum is it to 48 bits: FLOAT is all that ONNX attributes have."""
    with np.errstate(over="ignore"):
        high = float(np.float32(value))
    if math.isinf(value):
        return value, 0.0
    if math.isinf(high):  # above float32's range: keep the sum finite
        high = math.copysign(float(np.finfo(np.float32).max), value)
    with np.errstate(over="ignore", under="ignore"):
        return high, float(np.float32(value - high))


@dataclasses.dataclass(frozen=True)
class Attributes:
    """The parameters of a bag, checked. ``None`` for ``padding_idx`` and ``max_norm`` means off.

    Raises:
        ValueError: naming the parameter and its value, if one is outside its range.
        TypeError: if one is of a type that cannot be meant.
    """

    mode: str = "mean"
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    include_last_offset: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode = {self.mode!r} is not one of 'sum', 'mean', 'max'")
        if self.padding_idx is not None:
            object.__setattr__(self, "padding_idx", _integer("padding_idx", self.padding_idx))
        if self.max_norm is not None:
            value = _real("max_norm", self.max_norm)
            if not value >= 0:
                raise ValueError(f"max_norm = {value!r} must be >= 0")
            object.__setattr__(self, "max_norm", None if math.isinf(value) else value)
        value = _real("norm_type", self.norm_type)
        if not value > 0:
            raise ValueError(f"norm_type = {value!r} must be > 0")
        object.__setattr__(self, "norm_type", value)
        if not isinstance(self.include_last_offset, (bool, np.bool_)):
            raise TypeError(f"include_last_offset = {self.include_last_offset!r} must be a bool")
        object.__setattr__(self, "include_last_offset", bool(self.include_last_offset))

    def check(self, *, weighted: bool, num_rows: int | None) -> None:
        """Refuse what the inputs make wrong: weights with mean or max, a padding_idx outside the table.

        Args:
            weighted: whether per_sample_weights are given.
            num_rows: V, or None where it is not known yet.
        """
        if weighted and self.mode != "sum":
            raise ValueError(f"per_sample_weights needs mode 'sum', got mode = {self.mode!r}")
        if self.padding_idx is None:
            return
        if num_rows is None:
            if not -(2**63) < self.padding_idx < 2**63:
                raise ValueError(f"padding_idx = {self.padding_idx} does not fit int64")
        elif not -num_rows <= self.padding_idx < num_rows:
            raise ValueError(
                f"padding_idx = {self.padding_idx} is outside [-{num_rows}, {num_rows}), the rows of weight"
            )

    def to_onnx(self, op: Variant, *, double: bool) -> dict[str, int | float]:
        """The node's attributes, all of them. ``double``: the table is float64."""
        max_norm = split_double(math.inf if self.max_norm is None else self.max_norm)
        norm_type = split_double(self.norm_type)
        return {
            "mode": MODES.index(self.mode),
            "padding_idx": NO_PADDING if self.padding_idx is None else self.padding_idx,
            "max_norm": max_norm[0],
            "max_norm_lo": max_norm[1],
            "norm_type": norm_type[0],
            "norm_type_lo": norm_type[1],
            "stash_type": 11 if double else 1,  # TensorProto.DOUBLE, TensorProto.FLOAT
            **({} if op.two_d else {"include_last_offset": int(self.include_last_offset)}),
        }

    @classmethod
    def from_onnx(cls, attributes: Mapping[str, int | float]) -> Attributes:
        """The inverse of `to_onnx`; what a node leaves out has its default."""
        a = dict(attributes)
        mode = a.get("mode", 1)
        if mode not in range(len(MODES)):
            raise ValueError(f"mode = {mode} is not 0 (sum), 1 (mean) or 2 (max)")
        padding_idx = int(a.get("padding_idx", NO_PADDING))
        return cls(
            mode=MODES[int(mode)],
            padding_idx=None if padding_idx == NO_PADDING else padding_idx,
            max_norm=a.get("max_norm", math.inf) + a.get("max_norm_lo", 0.0),
            norm_type=a.get("norm_type", 2.0) + a.get("norm_type_lo", 0.0),
            include_last_offset=bool(a.get("include_last_offset", 0)),
        )


#: The attribute names of a variant, in order.
def attribute_names(op: Variant) -> tuple[str, ...]:
    return tuple(Attributes().to_onnx(op, double=False))


def check_table(weight: np.ndarray) -> None:
    """Refuse a table that is not [V, D] of a supported dtype."""
    if weight.dtype not in TABLE_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}, expected float32, float16, bfloat16 or float64")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [V, D]")


def check_inputs(
    weight: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    attributes: Attributes,
) -> None:
    """Refuse everything that the contract refuses, in one order that every backend shares.

    The dtypes and shapes first, then ``offsets``, then the indices; of several bad positions the lowest is named.

    Raises:
        TypeError: a dtype outside the table above.
        IndexError: an index outside [0, V) at a position that belongs to a bag and is not padded.
        ValueError: everything else.
    """
    check_table(weight)
    check_layout(indices, offsets, per_sample_weights, weight.dtype, attributes)
    num_rows = weight.shape[0]
    attributes.check(weighted=per_sample_weights is not None, num_rows=num_rows)
    used = indices
    if offsets is not None:
        check_offsets(offsets, len(indices), attributes.include_last_offset)
        if attributes.include_last_offset:
            used = indices[: int(offsets[-1])]
    bad = (used < 0) | (used >= num_rows)
    if attributes.padding_idx is not None:
        bad &= used != attributes.padding_idx % num_rows
    if bad.any():
        k = np.unravel_index(int(bad.argmax()), bad.shape)
        where = ", ".join(str(int(i)) for i in k)
        raise IndexError(f"indices[{where}] = {int(used[k])} is outside [0, {num_rows})")


def check_layout(
    indices: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    table_dtype: np.dtype,
    attributes: Attributes,
) -> None:
    """The part of `check_inputs` that looks at dtypes and shapes alone."""
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices has dtype {indices.dtype}, expected int32 or int64")
    if offsets is not None and offsets.dtype not in INDEX_DTYPES:
        raise TypeError(f"offsets has dtype {offsets.dtype}, expected int32 or int64")
    if per_sample_weights is not None and per_sample_weights.dtype != table_dtype:
        raise TypeError(
            f"per_sample_weights has dtype {per_sample_weights.dtype}, weight has {table_dtype}: they must be equal"
        )
    if indices.ndim not in (1, 2):
        raise ValueError(f"indices has shape {list(indices.shape)}, expected [N] or [B, L]")
    if indices.ndim == 2 and offsets is not None:
        raise ValueError(
            f"offsets given, shape {list(offsets.shape)}, but indices has shape {list(indices.shape)}: "
            "with [B, L] every row is a bag"
        )
    if indices.ndim == 1 and offsets is None:
        raise ValueError(f"offsets missing: indices has shape {list(indices.shape)}, and [N] needs them")
    if offsets is not None:
        if offsets.ndim != 1:
            raise ValueError(f"offsets has shape {list(offsets.shape)}, expected one dimension")
        if len(offsets) == 0 and attributes.include_last_offset:
            raise ValueError("offsets is empty, shape [0]: include_last_offset needs at least one entry")
        if len(offsets) == 0 and len(indices) > 0:
            raise ValueError(f"offsets is empty, shape [0], but indices has {len(indices)} entries")
    if per_sample_weights is not None and per_sample_weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights has shape {list(per_sample_weights.shape)}, "
            f"indices has shape {list(indices.shape)}: they must be equal"
        )


def check_offsets(offsets: np.ndarray, num_indices: int, include_last_offset: bool) -> None:
    """Refuse offsets that do not start at 0, decrease, or pass the number of indices."""
    if len(offsets) == 0:
        return
    if offsets[0] != 0:
        raise ValueError(f"offsets[0] = {int(offsets[0])} must be 0")
    decreases = offsets[1:] < offsets[:-1]
    passes = offsets[1:] > num_indices
    bad = decreases | passes
    if bad.any():
        i = int(bad.argmax()) + 1
        if decreases[i - 1]:
            raise ValueError(
                f"offsets[{i}] = {int(offsets[i])} is below offsets[{i - 1}] = {int(offsets[i - 1])}: "
                "offsets must not decrease"
            )
        raise ValueError(f"offsets[{i}] = {int(offsets[i])} is past the number of indices, {num_indices}")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Integral, np.integer)):
        raise TypeError(f"{name} = {value!r} must be an integer or None")
    return int(value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating)):
        raise TypeError(f"{name} = {value!r} must be a real number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} = {value!r} is more than a double holds") from error
