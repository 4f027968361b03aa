"""Rows that are reduced, as the bag that they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite.expressions import Dim, Expression, constant, from_array, input_of, number
from lucid_onnx.rewrite.normal_form import make

from .bag import Bag
from .columns import declared, expanded, permuted
from .finite import Magnitudes, finite_row, is_finite_row
from .masks import means_negatives
from .rows import Obstacle, Rows, Step
from .truth import Truth, all_of, are_at_least_0, integers_of, is_not, truth_of

#: Types whose sums and quotients are those of a bag.
WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True, eq=False)
class Pooled:
    """Rows that are reduced.

    Attributes:
        reduced: the axes of the rows' indices that are reduced.
        layout: the result's axes: an axis of the indices, "D" for the table's columns (missing where there is one
            column, whose axis is not kept), or None for an axis of size 1.
    """

    rows: Rows
    reduced: tuple[int, ...]
    mode: str
    layout: tuple[int | str | None, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes of the rows' indices that stay."""
        return tuple(k for k in range(self.rows.indices.rank or 0) if k not in self.reduced)

    def shaped(self, e: Expression) -> Expression:
        """The result, of a bag's [B, D]."""
        kept, indices, table = self.kept, self.rows.indices, self.rows.table
        if not kept:
            e = make("Squeeze", e, [0])
        elif len(kept) > 1:
            dims = [(indices.dims or (None,) * (kept[-1] + 1))[k] for k in kept]
            e = make("Reshape", e, _shape_of(indices, kept, dims, table, self.rows.width))
        order: list[int | str] = [*kept, "D"]
        if "D" not in self.layout:
            e, order = make("Squeeze", e, [len(kept)]), [*kept]
        present = [label for label in self.layout if label is not None]
        e = permuted(e, [order.index(label) for label in present])
        ones = [k for k, label in enumerate(self.layout) if label is None]
        return make("Unsqueeze", e, ones) if ones else e

    def flat(self, e: Expression) -> Expression:
        """[B, L] of an expression in the shape of the indices."""
        e = permuted(e, (*self.kept, *self.reduced))
        if len(self.kept) == len(self.reduced) == 1:
            return e
        if e.array is not None:
            rows = math.prod(e.array.shape[: len(self.kept)])
            return from_array(e.array.reshape(rows, math.prod(e.array.shape[len(self.kept) :])))
        return make("Flatten", e, axis=len(self.kept))


def _shape_of(
    indices: Expression, kept: Sequence[int], dims: Sequence[Dim], table: Expression, width: Dim
) -> Expression:
    """Of some axes of the indices, and the table's columns."""
    sizes: list[Dim] = [*dims, width]
    if all(isinstance(d, int) and d > 0 for d in sizes[1:]):
        return constant([-1, *sizes[1:]])
    shape = make("Shape", indices)
    parts = [make("Gather", shape, [k]) for k in kept]
    parts.append(constant([width]) if isinstance(width, int) else make("Gather", make("Shape", table), [1]))
    return make("Concat", *parts, axis=0)


class Found(NamedTuple):
    """A bag, and which positions it skips: those of its padding_idx, and those where not all of ``kept`` are true."""

    bag: Bag
    kept: Truth


def bag_of(pooled: Pooled, magnitudes: Magnitudes, *, as_weights: bool = False) -> Found | Obstacle:
    """The bag of rows that are reduced.

    Args:
        as_weights: skip no position: a mask is weights of 0 and 1.
    """
    rows = pooled.rows
    indices, mode, steps = rows.indices, pooled.mode, rows.steps
    if has_negatives(indices):
        return Obstacle("its indices have numbers below zero by construction, which count from the end")
    if mode == "max" and steps:
        return _masked_maximum(pooled, magnitudes)
    if (step := next((s for s in steps if s.filler), None)) is not None:
        return Obstacle(step.otherwise, rows)
    divided = mode == "mean" and bool(steps)
    if divided and rows.type not in WIDE:
        return Obstacle("ReduceMean over weighted rows of 16 bits is not a mean of rows, and its sum may be too large")
    counts_negatives = any(means_negatives(s.numbers, indices) for s in steps)
    if counts_negatives:  # no mask of theirs is that of a bag's indices, which are not below zero
        rows = dataclasses.replace(rows, steps=tuple(s._replace(padding=None) for s in steps))
    parts = _taken_apart(rows, magnitudes, as_weights=as_weights or divided)
    if isinstance(parts, Obstacle):
        return parts
    indices = _looked_up(rows, parts, counts_negatives)
    weights = parts.weights
    if weights is not None:
        weights = declared(pooled.flat(expanded(weights, make("Shape", rows.indices))), rows.table.type, (None, None))
    attributes = spec.Attributes(
        mode,
        padding_idx=parts.padding_idx,
        negative="skip" if parts.kept else "refuse",
        divisor="count" if divided and weights is not None else None,
    )
    found = _bag(pooled, indices, weights, attributes)
    return Found(found, (*parts.kept, *parts.padded))


def _bag(pooled: Pooled, indices: Expression, weights: Expression | None, attributes: spec.Attributes) -> Bag:
    table, old = pooled.rows.table, pooled.rows.indices
    bag = Bag(table, declared(pooled.flat(indices), old.type, (None, None)), None, weights, attributes)
    plain = len(pooled.kept) == 1 and pooled.layout == (pooled.kept[0], "D")
    return bag if plain else dataclasses.replace(bag, result=pooled.shaped)


# ---- Maxima of rows that a mask has put something else in the place of.


def _masked_maximum(pooled: Pooled, magnitudes: Magnitudes) -> Found | Obstacle:
    """A maximum of the rows that are kept, and beside it what stands for the others.

    1. The filler is -inf, or no row has a smaller number: a bag without rows is the filler.
    2. It may be larger than a row's numbers: so is it where a row is not kept.
    """
    rows, table = pooled.rows, pooled.rows.table
    fillers = {s.filler for s in rows.steps}
    truths = [truth_of(s.numbers) for s in rows.steps]
    what = "Where" if any(s.selects for s in rows.steps) else "Mul"
    largest = magnitudes.largest(table)
    if None in truths or len(fillers) > 1:
        return Obstacle(
            f"ReduceMax over rows that a {what} has changed is not a max of rows: a zero may be the largest number, "
            "and a bag knows only masks of truth values"
        )
    (filler,) = fillers
    if any(s.is_added and not _swallows(filler, largest, rows.type) for s in rows.steps):
        return Obstacle(
            f"ReduceMax over rows that were changed is not a max of rows ({rows.steps[-1].otherwise}): they are not "
            "known to be so small that nothing of them is left in the sum"
        )
    if not math.isfinite(largest) and not (filler == -math.inf and all(s.selects for s in rows.steps)):
        return Obstacle(
            f"ReduceMax over rows that a {what} has changed is not a max of rows: {filler:g} may be the largest "
            "number, since the table's numbers are not known"
        )
    kept = tuple(c for truth in truths if truth is not None for c in truth)
    parts = _Parts(None, (), None, kept, None)
    indices = _looked_up(rows, parts, any(means_negatives(s.numbers, rows.indices) for s in rows.steps))
    bag = _bag(pooled, indices, None, spec.Attributes("max", negative="skip"))
    mask = pooled.flat(expanded(all_of(kept), make("Shape", rows.indices)))
    number = constant(filler, (table.type or ir.DataType.FLOAT).numpy())

    def result(e: Expression) -> Expression:
        if -largest < filler:  # 2
            e = make("Where", _is_any(make("Not", mask)), make("Max", e, number), e)
        if filler:  # else the bag is that already
            e = make("Where", _is_any(mask), e, number)
        return pooled.shaped(e)

    return Found(dataclasses.replace(bag, result=result), kept)


def _swallows(filler: float, largest: float, dtype: ir.DataType) -> bool:
    """Whether a number added to any of that magnitude is the number itself."""
    with np.errstate(all="ignore"):
        c, most = (np.asarray(x, dtype.numpy()) for x in (filler, largest))
        return bool(np.isfinite(most) and c + most == c and c - most == c)


def _is_any(mask: Expression) -> Expression:
    """Whether a mask [B, L] is true anywhere in a bag, [B, 1]."""
    count = make("ReduceSum", make("Cast", mask, to=int(ir.DataType.INT32)), [1], keepdims=1)
    return make("Greater", count, constant(0, np.int32))


# ---- Indices.


def _looked_up(rows: Rows, parts: _Parts, counts_negatives: bool) -> Expression:
    """The indices of the bag.

    Gather counts an index below zero from the end, and a bag rejects it. One that skips those must not be given any
    but for the positions that are not kept: others are sent behind the table, which is an error.
    """
    indices, table, kept = rows.indices, rows.table, parts.kept
    if not kept:
        if counts_negatives:
            indices = _counted_from_the_start(indices, table)
        if parts.selected is not None and (row := finite_row(table)) is not None:
            indices = make("Where", parts.selected, indices, _like(row, indices))
        return indices
    if any(are_at_least_0(c, indices) for c in kept):
        rest = [c for c in kept if not (are_at_least_0(c, indices) and _is_lowest(c))]
    else:
        rest = list(kept)
        if counts_negatives:
            indices = _counted_from_the_start(indices, table)
        if not is_never_negative(indices):
            behind = make("Cast", make("Gather", make("Shape", table), 0), to=int(indices.type or ir.DataType.INT64))
            indices = make("Where", make("Greater", indices, _like(-1, indices)), indices, behind)
    return make("Where", all_of(rest), indices, _like(-1, indices)) if rest else indices


def _is_lowest(condition: Expression) -> bool:
    """Whether a condition that excludes indices below zero excludes no others."""
    return number(condition.inputs[1]) == (-1 if condition.op == "Greater" else 0)


def _like(value: int, indices: Expression) -> Expression:
    return make("Cast", constant(value), to=int(indices.type or ir.DataType.INT64))


def _counted_from_the_start(indices: Expression, table: Expression) -> Expression:
    """What Gather makes of indices below zero."""
    rows = make("Cast", make("Gather", make("Shape", table), 0), to=int(indices.type or ir.DataType.INT64))
    return make("Where", make("Less", indices, _like(0, indices)), make("Add", indices, rows), indices)


#: Of which inputs an element of the result may be taken as it is.
_TAKES: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("Cast", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"), (0,)
)
_TAKES |= {"If": (1, 2), "ScatterElements": (0, 2), "ScatterND": (0, 2), "Where": (1, 2)}


def is_never_negative(e: Expression | None, depth: int = 20) -> bool:
    """Whether integers are known not to be below zero."""
    if e is None or depth == 0:
        return False
    if e.array is not None:
        return e.array.dtype.kind in "biu" and bool((e.array >= 0).all())
    if e.op == "Cast" and e.inputs[0] is not None:
        source, to = e.inputs[0], e.type
        if source.type in (ir.DataType.BOOL, ir.DataType.UINT8, ir.DataType.UINT16):
            return True
        return source.type == ir.DataType.INT32 and to == ir.DataType.INT64 and is_never_negative(source, depth - 1)
    if e.op == "Mod":
        return not e.attributes.get("fmod") and _is_at_least(e.inputs[1], 1)
    if e.op == "Clip":
        return (
            len(e.inputs) > 1 and all(i is None or _is_at_least(i, 0) for i in e.inputs[1:]) and e.inputs[1] is not None
        )
    if e.op in ("Max", "BitwiseAnd"):
        return any(_is_at_least(i, 0) for i in e.inputs)
    if e.op in _TAKES and not e.op.startswith("Scatter"):
        return all(is_never_negative(e.inputs[k], depth - 1) for k in _TAKES[e.op] if k < len(e.inputs))
    return False


def _is_at_least(e: Expression | None, least: int) -> bool:
    return e is not None and e.array is not None and e.array.dtype.kind in "iu" and bool((e.array >= least).all())


def has_negatives(e: Expression | None) -> bool:
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


# ---- What was done to rows.


class _Parts(NamedTuple):
    """What was done to rows, as a bag has it.

    Attributes:
        padded: the condition that ``padding_idx`` stands for, as the graph has it.
        kept: conditions on the positions that are there; the others are skipped.
        selected: a condition that is in the weights, on positions whose rows may be any finite ones.
    """

    padding_idx: int | None
    padded: Truth
    weights: Expression | None
    kept: Truth
    selected: Expression | None


def _taken_apart(rows: Rows, magnitudes: Magnitudes, *, as_weights: bool) -> _Parts | Obstacle:
    """What a bag makes of what was done to rows.

    1. Where nothing is left to be masked beside it: the mask of one index, as padding_idx.
    2. Masks, as positions that are skipped.
    3. All others, as weights.
    """
    steps, padding_idx = list(rows.steps), None
    kept: Truth = ()
    padded: Truth = ()
    if not as_weights:
        found = _padding(rows)
        left, skipping = _skipped(rows, magnitudes)
        if found is not None and (not skipping or not any(truth_of(s.numbers) is not None for s in found[1])):
            padding_idx, steps = found  # 1
            padded = tuple(s.numbers for s in rows.steps if s.padding == padding_idx and s not in steps)
        elif skipping:  # 2
            steps, kept = left, skipping
    weights, selected = None, None
    narrow = 0
    for step in steps:  # 3
        if step.selects:
            mask = make("Cast", step.numbers, to=int(rows.table.type or 0))
            weights = (
                mask if weights is None else make("Where", step.numbers, weights, make("CastLike", constant(0), mask))
            )
            selected = step.numbers if selected is None else make("And", selected, step.numbers)
            continue
        numbers = _narrowed_numbers(step, rows)
        if numbers is None:
            return Obstacle(
                f"rows of 16 bits are multiplied by {step.numbers} in a wider type, while per_sample_weights have the "
                "table's type; numbers that are cast from that type, or from bool, would fit"
            )
        narrow += step.numbers.type != rows.table.type and not _is_truth(step.numbers)
        weights = numbers if weights is None else make("Mul", weights, numbers)
    if narrow > 1:
        return Obstacle(
            "rows of 16 bits are multiplied twice in a wider type, and per_sample_weights have the table's type"
        )
    return _Parts(padding_idx, padded, weights, kept, selected)


def _padding(rows: Rows) -> tuple[int, list[Step]] | None:
    """padding_idx, and the steps that are left.

    1. The last step selects all rows but those of one index, which the bag does.
    2. A product with the mask of an index whose row is finite, and with nothing else that may not be.
    """
    steps = list(rows.steps)
    if steps and steps[-1].selects and steps[-1].padding is not None:  # 1
        return steps[-1].padding, steps[:-1]
    masks = {s.padding for s in steps if s.padding is not None and not s.selects}
    if len(masks) == 1 and not any(s.selects for s in steps):  # 2
        (p,) = masks
        others = [s for s in steps if s.padding is None]
        if p is not None and is_finite_row(rows.table, p) and all(_is_finite(s.numbers) for s in others):
            return p, others
    return None


def _skipped(rows: Rows, magnitudes: Magnitudes) -> tuple[list[Step], Truth]:
    """The steps that are left, and the conditions of those that only take positions away.

    A position that is skipped adds nothing to a sum. So does zero times whatever comes after it, if that is finite.

    1. A choice of zero.
    2. A product with 0 and 1, over a table and after numbers that are finite.
    3. A product with integers, of which zeros are skipped; the others stay weights.
    """
    steps = list(rows.steps)
    kept: list[Expression] = []
    finite = [s.selects or truth_of(s.numbers) is not None or magnitudes.is_finite(s.numbers) for s in steps]
    left = []
    for k, step in enumerate(steps):
        truth = truth_of(step.numbers)
        stays = True
        if all(finite[k + 1 :]):
            if truth is not None and step.selects:  # 1
                kept, stays = [*kept, *truth], False
            elif all(finite[:k]) and magnitudes.is_finite(rows.table):
                integers = integers_of(step.numbers)
                if truth is not None:  # 2
                    kept, stays = [*kept, *truth], False
                elif integers is not None:  # 3
                    kept.append(is_not(integers, 0))
        if stays:
            left.append(step)
    return left, tuple(kept)


def _narrowed_numbers(step: Step, rows: Rows) -> Expression | None:
    """The numbers in the table's type, if that has them all."""
    numbers, to = step.numbers, rows.table.type
    if to is None or numbers.type == to or numbers.type not in WIDE:
        return numbers
    if numbers.array is not None:
        cast = numbers.array.astype(to.numpy())
        return from_array(cast) if np.array_equal(cast.astype(numbers.array.dtype), numbers.array) else None
    source = input_of(numbers, "Cast")
    if source is None or source.type not in (to, ir.DataType.BOOL):
        return None
    return make("Cast", source, to=int(to))


def _is_truth(e: Expression) -> bool:
    source = input_of(e, "Cast")
    return source is not None and source.type == ir.DataType.BOOL


def _is_finite(e: Expression) -> bool:
    """Whether all numbers are known to be finite."""
    if e.array is not None:
        return bool(np.isfinite(e.array.astype(np.float64)).all())
    return _is_truth(e)
