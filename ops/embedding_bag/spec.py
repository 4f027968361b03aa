"""EmbeddingBag: the specification that every implementation of the operator keeps.

For bag ``i`` whose positions in ``indices`` are ``K(i)``::

    rows(i)   = { k in K(i) : indices[k] != padding_idx, and indices[k] >= 0 where negative is "skip" }
    row(k)    = weight[indices[k]] * clip(indices[k]) * per_sample_weights[k]
    clip(r)   = max_norm / (norm(r) + 1e-7)   where max_norm is given and norm(r) > max_norm, else 1
    norm(r)   = (sum_d |weight[r, d]| ** norm_type) ** (1 / norm_type)     (the largest |.| for inf)

    sum:   output[i] = sum of row(k) over rows(i)
    mean:  output[i] = sum / n(i)
    max:   output[i] = elementwise maximum over rows(i)
    sqrtn: output[i] = sum / sqrt(n(i))
    n(i)      = |rows(i)|; where divisor is "weights", the sum over rows(i) of per_sample_weights[k] (mean),
                or of their squares (sqrtn)
    a bag with no rows is a row of zeros in every mode

``K(i)`` is ``offsets[i] <= k < offsets[i + 1]``. Without ``include_last_offset`` the last bag ends at
``len(indices)``; with it ``offsets`` has one entry more than there are bags and its last entry ends the
last bag. Positions after that entry belong to no bag and are never read. With 2-D indices ``[B, L]``
every row of ``indices`` is a bag.

Arithmetic: float16 and bfloat16 tables accumulate in float32, and every result is rounded once, at the
end. Norms are taken in float32 (double for double). A position of ``K(i)`` that is not in ``rows(i)`` is skipped:
neither its row nor its weight is looked at, and it is not counted. NaN and infinity in a selected row spread as in
``numpy.sum`` and ``numpy.max``. A division by an n(i) of 0, which only weights can give, is IEEE 754's.

Maxima take no per_sample_weights, and mean and sqrtn only with a divisor: PyTorch rejects them, so what they mean
must be said. FBGEMM divides by the count, TensorFlow's combiners by the weights. Without per_sample_weights every
weight is 1, and both divisors are the count. Neither sum nor max have one.

The ONNX operator has one name per combination of inputs (`VARIANTS`), because a function body cannot ask
whether an input is there. All share these attributes, which `Attributes` declares. Every one of them is
written on every node, because neither a kernel nor onnx's own inliner sees a function's defaults:

=================== ===== ============================== ===============================================================
attribute           type  values                         meaning
=================== ===== ============================== ===============================================================
mode                INT   0 sum, 1 mean, 2 max, 3 sqrtn  how the rows of a bag are pooled
padding_idx         INT   in [-V, V), or -2**63 for none a row whose positions are skipped
max_norm            FLOAT >= 0, or +inf for none         rows with a larger norm are scaled down to it, as they are read
max_norm_lo         FLOAT                                what rounding max_norm to FLOAT lost
norm_type           FLOAT > 0                            the p of that norm, infinity for the largest magnitude
norm_type_lo        FLOAT                                what rounding norm_type to FLOAT lost
stash_type          INT   1 FLOAT, 11 DOUBLE             the type to accumulate in, DOUBLE for float64 tables
include_last_offset INT   0 or 1                         the last offset ends the last bag; not on the names with 2D
negative            INT   0 refuse, 1 skip               whether an index below 0 is an error or skipped
divisor             INT   0 none, 1 count, 2 weights     what mean and sqrtn with per_sample_weights divide by
=================== ===== ============================== ===============================================================
The numbers of the first three modes are ATen's. ONNX has no double attribute, so a float is two FLOAT attributes,
whose sum has 48 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..attributes import Attribute, BaseAttributes, Choice, Flag, OptionalIndex, Real, attribute, decided, either
from ..attributes import split_double as split_double  # what max_norm and norm_type are in ONNX
from ..variants import BaseVariant, Dims, Value, bag_values

DOMAIN = "ai.lucid"
VERSION = 1
Mode = Literal["sum", "mean", "max", "sqrtn"]
Negative = Literal["refuse", "skip"]
Divisor = Literal["count", "weights"]
#: The modes, each at its number in ONNX.
MODES: tuple[str, ...] = get_args(Mode)
#: Those that PyTorch has, each at its number in ATen.
ATEN_MODES = MODES[:3]
#: The ``padding_idx`` attribute that stands for "no padding": no legal value, and no index equals it
#: even after the number of rows was added.
NO_PADDING = -(2**63)
EPSILON = 1e-7
#: The oldest and newest ONNX opset that the lowering is written for.
MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 16, 26, 18

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TABLE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64))
INDEX_DTYPES = (np.dtype(np.int32), np.dtype(np.int64))


def check_opset(opset: Any, words: str | None = None) -> None:
    """Raise TypeError or ValueError if the lowering is not written for a version of the standard operators.

    ``words`` name it in the message, by default ``opset = <opset>``.
    """
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset = {opset!r} must be an integer")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(f"{words or f'opset = {opset}'} is outside [{MIN_OPSET}, {MAX_OPSET}]")


@dataclasses.dataclass(frozen=True)
class Variant(BaseVariant):
    """One operator name: which inputs it takes, in order."""

    name: str
    two_d: bool
    weighted: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return (
            "weight",
            "indices",
            *(() if self.two_d else ("offsets",)),
            *(("per_sample_weights",) if self.weighted else ()),
        )

    def values(self, attributes: Attributes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Value]:
        num_rows, dim = shapes.get("weight", ("num_rows", "embedding_dim"))
        return {
            "weight": Value("table", (num_rows, dim)),
            **bag_values(two_d=self.two_d, include_last_offset=attributes.include_last_offset),
            "output": Value("bags", ("num_bags", dim)),
        }


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


@dataclasses.dataclass(frozen=True)
class Attributes(BaseAttributes):
    """The parameters of a bag, checked. ``None`` for ``padding_idx`` and ``max_norm`` means off."""

    mode: str = attribute(
        Choice({mode: number for number, mode in enumerate(MODES)}, or_text=True),
        "mean",
        "how the rows of a bag are pooled",
    )
    padding_idx: int | None = attribute(OptionalIndex(NO_PADDING), None, "a row whose positions are skipped")
    max_norm: float | None = attribute(
        Real(at_least=0, none_is_infinity=True), None, "rows with a larger norm are scaled down to it, as they are read"
    )
    norm_type: float = attribute(Real(above=0), 2.0, "the p of that norm, infinity for the largest magnitude")
    stash_type: ClassVar[Attribute] = decided(
        Choice({"FLOAT": 1, "DOUBLE": 11}),
        lambda op, double: "DOUBLE" if double else "FLOAT",
        "the type to accumulate in, DOUBLE for float64 tables",
    )
    include_last_offset: bool = attribute(
        Flag(),
        False,
        "the last offset ends the last bag",
        where="not on the names with 2D",
        applies=lambda op: not op.two_d,
    )
    negative: str = attribute(
        Choice({text: number for number, text in enumerate(get_args(Negative))}),
        "refuse",
        "whether an index below 0 is an error or skipped",
        keyword_only=True,
    )
    divisor: str | None = attribute(
        Choice({text: 1 + number for number, text in enumerate(get_args(Divisor))}, none=0),
        None,
        "what mean and sqrtn with per_sample_weights divide by",
        keyword_only=True,
    )

    def check(self, *, weighted: bool, num_rows: int | None) -> None:
        """Raise ValueError for weights that the mode does not take, and a padding_idx outside the table.

        Args:
            weighted: whether per_sample_weights are given.
            num_rows: V, or None where it is not known yet.
        """
        if weighted and self.mode != "sum" and not (self.divides and self.divisor):
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

    @property
    def divides(self) -> bool:
        """Whether the mode divides the sum of a bag's rows."""
        return self.mode in ("mean", "sqrtn")

    def as_table(self, dtype: str, shape: Dims | None) -> tuple[str, Dims | None]:
        """What the table's input stands for: the dtype and shape of its rows, of those that the input has."""
        return dtype, shape


class Keywords(TypedDict, total=False):
    """The attributes as calls and builders take them, for type checkers; `Attributes` declares them."""

    mode: Mode
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    include_last_offset: bool
    negative: Negative
    divisor: Divisor | None


def check_table(weight: np.ndarray) -> None:
    """Raise TypeError or ValueError if a table is not [V, D] of a supported dtype."""
    if weight.dtype not in TABLE_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {either(TABLE_DTYPES)}")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [V, D]")


def check_inputs(
    weight: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    attributes: Attributes,
) -> None:
    """Raise the operator's errors, in one order that every backend shares.

    The dtypes and shapes first, then ``offsets``, then the indices; of several bad positions the lowest is named.

    Raises:
        TypeError: a dtype outside the table above.
        IndexError: an index outside [0, V) at a position that belongs to a bag and is not skipped.
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
    bad = bad_indices(used, num_rows, attributes)
    if bad.any():
        k = np.unravel_index(int(bad.argmax()), bad.shape)
        where = ", ".join(str(int(i)) for i in k)
        raise IndexError(f"indices[{where}] = {int(used[k])} is outside [0, {num_rows})")


def bad_indices(indices: np.ndarray, num_rows: int, attributes: Attributes) -> np.ndarray:
    """Which indices are neither of a row nor skipped, bool."""
    bad = (indices < 0) | (indices >= num_rows)
    if attributes.padding_idx is not None:
        bad &= indices != attributes.padding_idx % num_rows
    if attributes.negative == "skip":
        bad &= indices >= 0
    return np.asarray(bad)


def check_layout(
    indices: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    table_dtype: np.dtype,
    attributes: Attributes,
) -> None:
    """The part of `check_inputs` that looks at dtypes and shapes alone."""
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices has dtype {indices.dtype}, expected {either(INDEX_DTYPES)}")
    if offsets is not None and offsets.dtype not in INDEX_DTYPES:
        raise TypeError(f"offsets has dtype {offsets.dtype}, expected {either(INDEX_DTYPES)}")
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
    """Raise ValueError for offsets that do not start at 0, decrease, or pass the number of indices."""
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
