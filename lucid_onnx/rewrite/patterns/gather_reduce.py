"""Rows gathered by indices [B, L] and reduced over L, as anybody may write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite import nodes
from lucid_onnx.rewrite.expressions import Expression, constant, difference, input_of, number
from lucid_onnx.rewrite.normal_form import make

from .bag import FLOATS, Bag, Guess
from .shared import MODES


class GatherReduce:
    """Rows gathered by indices [B, L] and reduced over L: the model is not an export of a bag, and keeps its meaning.

    1. The rows as they are, in every mode.
    2. Rows that a Where sets to zero by their index, in mode sum: the index becomes the padding_idx.
    3. Rows times a number per index, in mode sum: the numbers become per_sample_weights. If they are the mask of
       an index, that one becomes the padding_idx if its row is known to be finite. (A mask multiplies, and zero
       times infinity is NaN.)
    4. A sum of 2 or 3 with a padding_idx, divided by the number of rows that are left, or by a number above zero and up
       to one where none are: a mean.

    A mean or maximum over no columns is not a row of zeros, so L must be known to be above zero, or be assumed to be.
    An index of -1 is legal for Gather and means the last row; a bag rejects it.

    Args:
        assume_nonempty: L is above zero, though the model does not say so.
    """

    def __init__(self, *, assume_nonempty: bool = False) -> None:
        self._assume_nonempty = assume_nonempty

    def __call__(self, root: Expression) -> Iterator[Guess]:
        if root.op == "Div":
            yield from self._masked_mean(root)  # 4
        elif root.op in MODES and len(root.inputs) == 2:
            yield from self._reduction(root)

    def _reduction(self, root: Expression) -> Iterator[Guess]:
        rows, axes = root.inputs
        if rows is None or axes is None:
            return
        mask, factors = None, None
        gather: Expression | None = rows
        if rows.op == "Where":
            gather, mask = _selected(rows)
        elif rows.op == "Mul":
            gather, factors = _factors(rows)
        if gather is None or gather.op != "Gather" or gather.attributes.get("axis") != 0:
            return
        weight, indices = gather.inputs
        if weight is None or indices is None or weight.rank != 2 or indices.rank != 2 or weight.type not in FLOATS:
            return
        mode = MODES[root.op]
        bag = Bag(weight, indices, None, None, spec.Attributes(mode), keepdims=bool(root.attributes["keepdims"]))
        if number(axes) not in (1, -2):
            yield bag, f"{root.op} goes over {_axes_name(axes)}, not over the rows of a bag, axis 1"
        elif _has_negatives(indices):
            yield bag, "its indices have numbers below zero by construction, which count from the end"
        elif rows.op == "Gather":  # 1
            yield bag, self._why_maybe_empty(bag) or root
        elif mode != "sum":
            yield bag, f"{root.op} over rows that a {rows.op} has changed is not a {mode} of rows"
        elif rows.op == "Where":  # 2
            yield _padded(bag, mask, root)
        else:  # 3
            yield _weighted(bag, factors, root)

    def _why_maybe_empty(self, bag: Bag) -> str | None:
        """Why bags may be empty in a mode where that matters, or None."""
        length = bag.indices.dims[1] if bag.indices.dims else None
        if bag.attributes.mode == "sum" or self._assume_nonempty or (isinstance(length, int) and length > 0):
            return None
        result = "NaN" if bag.attributes.mode == "mean" else "an error or -inf"
        known = "unknown" if length is None else repr(length)
        return (
            f"the length of the bags is {known}: a {bag.attributes.mode} over no columns is {result} to the model, and "
            "zeros to a bag; assume_nonempty takes it to be above 0"
        )

    def _masked_mean(self, root: Expression) -> Iterator[Guess]:
        sums, divisor = root.inputs
        count = _at_least(divisor)
        if sums is None or sums.op != "ReduceSum" or count is None or count.op != "ReduceSum":
            return
        for bag, written in self(sums):
            if written is not sums or bag.attributes.padding_idx is None:
                reason = "the sum is not known to skip one index, or what it skips is not known to be finite"
                yield bag, f"it divides a sum by a number, but {reason}"
            elif bag.weight.type not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                # The number has the rows' type, and is exact in float32 up to 2 ** 24, in 16 bits to a few hundreds.
                yield bag, "it counts rows in 16 bits, where a bag counts exactly"
            elif all(difference(count, way) is not None for way in _counts(bag)):
                mean = bag.with_attributes(mode="mean")
                yield mean, "it divides by something else than the number of rows that are left"
            else:
                yield bag.with_attributes(mode="mean"), root
            return


# ---- 2 and 3: rows that are changed.


def _selected(rows: Expression) -> tuple[Expression | None, Expression | None]:
    """The Gather of a Where against zeros, and the mask that is true for the rows that go.

    1. Where(Unsqueeze(mask), zeros, gather).
    2. Where(Unsqueeze(Not(mask)), gather, zeros).
    3. Anything else: the mask is None.
    """
    if len(rows.inputs) != 3:
        return None, None
    condition, then, otherwise = rows.inputs
    if condition is None or then is None or otherwise is None or not _adds_last_axis(condition):
        return next((e for e in rows.inputs if e is not None and e.op == "Gather"), None), None
    mask = condition.inputs[0]
    if _is_zero(then):  # 1
        return otherwise, mask
    if _is_zero(otherwise) and mask is not None:  # 2
        return then, input_of(mask, "Not")
    return (then if then.op == "Gather" else otherwise), None  # 3


def _adds_last_axis(e: Expression) -> bool:
    """Whether this makes [B, L, 1] of [B, L]."""
    return e.op == "Unsqueeze" and number(e.inputs[1]) in (2, -1)


def _is_zero(e: Expression) -> bool:
    """Whether a Where over [B, L, D] takes zeros from this, and no further dimension."""
    return e.array is not None and e.array.ndim <= 3 and number(e) == 0


def _factors(rows: Expression) -> tuple[Expression | None, Expression | None]:
    """The Gather and the other factor of a product."""
    one, other = rows.inputs
    return (one, other) if one is not None and one.op == "Gather" else (other, one)


def _padded(bag: Bag, mask: Expression | None, root: Expression) -> Guess:
    padding_idx = _padding_idx(mask, bag.indices)
    if padding_idx is None:
        return bag, "the Where selects rows by something else than one index"
    return bag.with_attributes(padding_idx=padding_idx), root


def _weighted(bag: Bag, column: Expression | None, root: Expression) -> Guess:
    factors = column.inputs[0] if column is not None and _adds_last_axis(column) else None
    if factors is None:
        return bag, "the rows are multiplied by something else than a number for each index"
    found = dataclasses.replace(bag, per_sample_weights=factors)
    padding_idx = _padding_idx(input_of(input_of(factors, "Cast"), "Not"), bag.indices)
    if padding_idx is None and not _same_shape(factors, bag.indices):
        return found, "the rows are multiplied by numbers whose shape is not known to be that of the indices"
    if padding_idx is not None and _is_finite_row(bag.weight, padding_idx):
        return bag.with_attributes(padding_idx=padding_idx), root
    return found, root


def _padding_idx(mask: Expression | None, indices: Expression) -> int | None:
    """``p`` where ``mask`` is ``indices == p``."""
    if mask is None or mask.op != "Equal" or len(mask.inputs) != 2:
        return None
    for side, other in (mask.inputs, mask.inputs[::-1]):
        if side is not None and other is not None and difference(side, indices) is None:
            value = number(other) if other.array is not None and other.array.ndim <= 2 else None
            return int(value) if value is not None and value >= 0 else None
    return None


def _same_shape(a: Expression, b: Expression) -> bool:
    """Whether the dimensions are known to be equal."""
    if a.dims is None or b.dims is None or len(a.dims) != len(b.dims):
        return False
    return all(x is not None and x == y for x, y in zip(a.dims, b.dims, strict=True))


def _is_finite_row(weight: Expression, row: int) -> bool:
    """Whether a row of a constant table is known, and finite. Of external data, which is mapped, no more is read."""
    value = weight.value
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    table = nodes.table(value)
    return table is not None and row < len(table) and bool(np.isfinite(table[row].astype(np.float64)).all())


# ---- 4: means.


def _at_least(divisor: Expression | None) -> Expression | None:
    """``count`` of ``Max(count, c)`` or ``Clip(count, c)``, for 0 < c <= 1: only a count of 0 is changed."""
    if divisor is None or divisor.op not in ("Max", "Clip") or len(divisor.inputs) < 2:
        return None
    if any(i is not None for i in divisor.inputs[2:]):
        return None
    for count, least in (divisor.inputs[:2], divisor.inputs[1::-1]):
        value = number(least)
        if value is not None and 0 < value <= 1 and least is not None and least.array is not None:
            return count if least.array.ndim <= 1 else None
        if divisor.op == "Clip":
            return None
    return None


def _counts(bag: Bag) -> list[Expression]:
    """The ways to count the rows of a bag that are not padded, as numbers of the table's type."""
    mask = make("Equal", bag.indices, make("CastLike", constant(bag.attributes.padding_idx), bag.indices))
    kept = make("Cast", make("Not", mask), to=int(bag.weight.type or ir.DataType.FLOAT))
    column = make("Unsqueeze", kept, [-1])
    if bag.keepdims:
        return [make("ReduceSum", column, axes, keepdims=1) for axes in ([1], [-2])]
    return [
        *(make("ReduceSum", column, axes, keepdims=0) for axes in ([1], [-2])),
        *(make("ReduceSum", kept, axes, keepdims=1) for axes in ([1], [-1])),
    ]


# ---- Indices that count from the end.

#: Of which inputs an element of the result may be taken as it is.
_TAKES: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("Cast", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"), (0,)
)
_TAKES |= {"If": (1, 2), "ScatterElements": (0, 2), "ScatterND": (0, 2), "Where": (1, 2)}


def _has_negatives(e: Expression | None) -> bool:
    """Whether some elements are numbers below zero that the graph itself puts there, as tf2onnx does for holes."""
    waiting = [e]
    while waiting:
        found = waiting.pop()
        if found is None:
            continue
        if found.op == "ConstantOfShape" and isinstance(filler := found.attributes.get("value"), tuple):
            dtype, _, data = filler
            if (np.frombuffer(data, dtype.numpy()) < 0).any():
                return True
        elif found.array is not None and found.array.dtype.kind == "i" and (found.array < 0).any():
            return True
        taken = range(len(found.inputs)) if found.op == "Concat" else _TAKES.get(found.op, ())
        waiting += [found.inputs[k] for k in taken if k < len(found.inputs)]
    return False


def _axes_name(axes: Expression) -> str:
    return "axes that are computed" if axes.array is None else f"axes {axes.array.reshape(-1).tolist()}"
