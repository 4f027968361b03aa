"""Rows gathered by indices and reduced over one of their axes, as anybody may write them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite import nodes
from lucid_onnx.rewrite.expressions import Dim, Expression, constant, from_array, input_of, number, subexpressions
from lucid_onnx.rewrite.normal_form import make

from .bag import FLOATS, Bag, Guess, Obstructed
from .columns import column, declared, expanded, permuted, same_shape
from .masks import counted, means_negatives, padding_of
from .rows import Obstacle, Rows, Step, find_rows
from .shared import MODES

#: Reductions that a bag has no mode for.
_OTHER_REDUCTIONS = frozenset(
    ("ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")
)
_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


class GatherReduce:
    """Rows gathered by indices and reduced: the model is not an export of a bag, and keeps its meaning.

    The rows are indices [.., L] or of any other order, of which one axis or more is reduced, by

    1. a reduction: the rows as they are, in every mode.
    2. a sum of rows that were multiplied by a number per index or that a Where selected: mode sum.
    3. a MatMul or an Einsum of one row of numbers and rows: as 2.
    4. a sum of 2 or 3, divided by the number of rows that are left, or by a number above zero and up to one where none
       are: a mean.
    5. any of these over 16-bit rows that were cast to a wider type, cast back.

    Numbers become per_sample_weights. A mask of one index becomes the padding_idx where that means the same: where it
    selects, or where the row of that index is known to be finite. (A mask that multiplies keeps NaN: 0 times infinity
    is NaN.) Any other mask that selects becomes weights 0 and 1, and an index that it does not select is replaced by
    that of a finite row, if the table is a constant; else the two differ where such a row is not finite.

    A mean or maximum over no columns is not a row of zeros: L must be known to be above zero, or be assumed to be, or
    nodes beside the bag keep what the model says.
    An index of -1 is legal for Gather and means the last row; a bag rejects it. Where a mask tells indices below zero
    from others, they are counted from the end before the bag.

    Args:
        assume_nonempty: L is above zero, though the model does not say so.
        keep_empty: where L may be 0, write what keeps a mean over nothing NaN and a maximum an error, in opset 15.
    """

    def __init__(self, *, assume_nonempty: bool = False, keep_empty: bool = False) -> None:
        self._assume_nonempty, self._keep_empty = assume_nonempty, keep_empty

    def __call__(self, root: Expression) -> Iterator[Guess | Obstructed]:
        if root.op == "Div":
            yield from self._mean(root)  # 4
        elif root.op == "Cast":
            yield from self._narrowed(root)  # 5
        elif root.op == "Squeeze":
            yield from self._squeezed(root)
        else:
            found = _pooled(root)
            if found is None or (found.rows is not None and (_is_lowered(found.rows) or _is_of_a_loop(found.rows))):
                return
            if isinstance(found, Obstacle):
                if found.rows is None or not _is_of_rows(found.rows.table):
                    yield None, found.reason
            elif not _is_one_of_several(root, found):
                yield self._guess(found, root, found.rows.type)

    def _guess(self, pooled: _Pooled, root: Expression, to: ir.DataType) -> Guess | Obstructed:
        """The bag, if its result has the type ``to``."""
        bag = _bag(pooled)
        if isinstance(bag, Obstacle):
            return None, bag.reason
        if pooled.rows.table.type != to:
            return bag, (
                f"rows of {bag.table_dtype} are pooled in {FLOATS[to]} and the result stays so, while a bag's result "
                f"has its table's type; with the table in {FLOATS[to]} it is a bag"
            )
        reason = self._why_maybe_empty(pooled) if pooled.mode != "sum" and pooled.rows.is_plain else None
        if reason is not None and self._keep_empty and 0 not in (pooled.rows.indices.dims or ()):
            return _keeping_empty(bag), root
        return bag, reason or root

    def _why_maybe_empty(self, pooled: _Pooled) -> str | None:
        """Why bags may be empty in a mode where that matters, or None."""
        dims = pooled.rows.indices.dims or ()
        lengths = [dims[k] for k in pooled.reduced]
        if self._assume_nonempty and 0 not in lengths:
            return None
        open_length: Dim = next((d for d in lengths if not isinstance(d, int) or d == 0), 1)
        if open_length == 1:
            return None
        result = "NaN" if pooled.mode == "mean" else "an error or -inf"
        known = "unknown" if open_length is None else repr(open_length)
        return (
            f"the length of the bags is {known}: a {pooled.mode} over no columns is {result} to the model, and "
            "zeros to a bag; assume_nonempty takes it to be above 0"
        )

    def _mean(self, root: Expression) -> Iterator[Guess | Obstructed]:
        """A Div that is no mean stays behind the bag of its sum, which is found by itself.

        Where the divisor is repeated in all columns, as by sentence-transformers, it is divided by one number per bag.
        """
        pooled, bag = _mean_of(root)
        if pooled is not None and bag is not None and pooled.rows.table.type == pooled.rows.type:
            yield bag, root
            return
        sums, divisor = (*root.inputs, None)[:2]
        pooled = _reshaped_pool(sums) if _has_one_user(sums) else None
        if pooled is None or divisor is None or "D" not in pooled.layout or pooled.rows.table.type != pooled.rows.type:
            return
        axis = pooled.layout.index("D") - len(pooled.layout)
        is_wide = divisor.dims is not None and len(divisor.dims) >= -axis and divisor.dims[axis] not in (1, None)
        numbers = column(divisor, axis, pooled.rows.width) if is_wide else None
        bag, written = self._guess(pooled, root, pooled.rows.type)
        if numbers is not None and numbers.rank is not None and bag is not None and written is root:
            inner = bag.result or (lambda e: e)
            narrow = make("Unsqueeze", numbers, [numbers.rank + 1 + axis])
            yield dataclasses.replace(bag, result=lambda e: make("Div", inner(e), narrow)), root

    def _narrowed(self, root: Expression) -> Iterator[Guess | Obstructed]:
        """Rows of 16 bits that are pooled in float32: so does a bag, which rounds once, at the end."""
        x, to = root.inputs[0], ir.DataType(root.attributes["to"])
        if x is None or to not in FLOATS or to.itemsize != 2:
            return
        mean, bag = _mean_of(x)
        pooled = mean or _reshaped_pool(x)
        if pooled is None or (pooled.rows.table.type, pooled.rows.type) != (to, ir.DataType.FLOAT):
            return
        if bag is not None:
            yield bag, root
        else:
            yield self._guess(pooled, root, to)

    def _squeezed(self, root: Expression) -> Iterator[Guess | Obstructed]:
        """The [B, 1, D] of a MatMul, which nothing else uses, as [B, D]."""
        pooled = _reshaped_pool(root) if _has_one_user(root.inputs[0]) else None
        if pooled is None:
            return
        bag, written = self._guess(pooled, root, pooled.rows.type)
        if bag is not None and written is root:
            yield bag, root


def _has_one_user(e: Expression | None) -> bool:
    """Whether a value is read once, so that it goes with what reads it."""
    value = None if e is None else e.value
    return value is not None and not value.is_graph_output() and len(value.uses()) == 1


# ---- What is reduced.


@dataclasses.dataclass(frozen=True, eq=False)
class _Pooled:
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


def _pooled(root: Expression) -> _Pooled | Obstacle | None:
    """The rows that an operator pools; why they are not a bag's; None if it pools none."""
    if root.op in MODES or root.op in _OTHER_REDUCTIONS:
        return _reduced(root)
    if root.op == "GlobalAveragePool":
        return _global_average(root)
    if root.op == "MatMul":
        return _multiplied(root)
    return _einsum(root) if root.op == "Einsum" else None


def _is_one_of_several(root: Expression, pooled: _Pooled) -> bool:
    """Whether this is one of the bags that are written one after another: not to be fused by itself."""
    if pooled.kept or _before_growing(pooled.rows.indices).op != "Slice":
        return False
    waiting = [] if root.value is None else [root.value]
    while waiting:
        for user, _ in waiting.pop().uses():
            if user.op_type == "Concat":
                return True
            if user.op_type in ("Reshape", "Unsqueeze"):
                waiting += user.outputs
    return False


def _is_of_rows(table: Expression) -> bool:
    """Whether a table was computed from rows of another one, so that it is none that a bag was meant for."""
    return any(e.op == "Gather" and e.rank != 1 for e in subexpressions(table, 100))


def _is_of_a_loop(rows: Rows) -> bool:
    """Whether indices [L] are cut out of others at bounds that are computed, as for a bag in a Loop."""
    indices = _before_growing(rows.indices)
    return (
        rows.indices.rank == 1
        and indices.op == "Slice"
        and any(e is None or e.array is None for e in indices.inputs[1:])
    )


def _before_growing(indices: Expression) -> Expression:
    """Indices before they were cast, or expanded to the shape of weights."""
    while indices.op in ("Cast", "Expand") and indices.inputs[0] is not None:
        indices = indices.inputs[0]
    return indices


def _is_lowered(rows: Rows) -> bool:
    """Whether these are a part of a bag that `lower` wrote, which sends indices below zero behind the table."""
    table_rows = rows.table.dims[0] if rows.table.dims else None
    for e in subexpressions(rows.indices, 300):
        less = input_of(e, "Where")
        if less is None or less.op != "Less" or less.inputs[0] is not e.inputs[2] or number(less.inputs[1]) != 0:
            continue
        behind = e.inputs[1]
        if number(behind) == table_rows or any(
            part.op == "Shape" for part in subexpressions(input_of(behind, "Cast"), 10)
        ):
            return True
    return False


def _reshaped_pool(e: Expression | None) -> _Pooled | None:
    """What is pooled before axes of size 1 are put in or taken away."""
    if e is None:
        return None
    if e.op in ("Squeeze", "Unsqueeze") and len(e.inputs) == 2 and e.inputs[1] is not None:
        inner, axes = _reshaped_pool(e.inputs[0]), e.inputs[1].array
        if inner is None or axes is None:
            return None
        rank = len(inner.layout) + (axes.size if e.op == "Unsqueeze" else 0)
        places = {int(a) + (rank if a < 0 else 0) for a in axes.reshape(-1)}
        if e.op == "Unsqueeze":
            rest = iter(inner.layout)
            return dataclasses.replace(inner, layout=tuple(None if k in places else next(rest) for k in range(rank)))
        if any(label is not None for k, label in enumerate(inner.layout) if k in places):
            return None
        layout = tuple(label for k, label in enumerate(inner.layout) if k not in places)
        return dataclasses.replace(inner, layout=layout)
    found = _pooled(e)
    return found if isinstance(found, _Pooled) else None


def _labels(rows: Rows) -> list[int | str | None]:
    """The axes of rows, as a result's layout has them."""
    axes: list[int | str | None] = list(range(rows.indices.rank or 0))
    if rows.place is not None:
        axes.insert(rows.place, "D")
    return axes


def _reduced(root: Expression) -> _Pooled | Obstacle | None:
    x, axes = (*root.inputs, None)[:2]
    found = find_rows(x, {})
    if found is None or x is None:
        return None
    if isinstance(found, Obstacle):
        # What goes over columns is a norm or a score, and no pooling.
        over = None if axes is None or axes.array is None else axes.array.reshape(-1).tolist()
        if over is None or -1 in over or (x.rank or 0) - 1 in over:
            return None
        if root.op == "ReduceMax":
            return Obstacle(
                f"ReduceMax over rows that were changed is not a max of rows ({found.reason}); where all rows of a bag "
                "are masked, a bag is zeros",
                found.rows,
            )
        return found
    if axes is None or axes.array is None or not axes.array.size:
        return Obstacle(f"{root.op} goes over {_axes_name(axes)}, not over an axis of the indices", found)
    places = {int(a) + (found.rank if a < 0 else 0) for a in axes.array.reshape(-1)}
    if found.place in places or not all(0 <= p < found.rank for p in places):
        if not found.is_plain:
            return None
        rows = "axis 1" if found.rank == 3 else "an axis of the indices"
        return Obstacle(f"{root.op} goes over {_axes_name(axes)}, not over the rows of a bag, {rows}", found)
    if root.op in _OTHER_REDUCTIONS:
        return Obstacle(f"{root.op} pools rows, and a bag has the modes sum, mean and max", found)
    return _over(found, places, MODES[root.op], keepdims=bool(root.attributes["keepdims"]))


def _over(rows: Rows, places: set[int], mode: str, *, keepdims: bool) -> _Pooled:
    labels = _labels(rows)
    layout = [None if k in places else label for k, label in enumerate(labels) if keepdims or k not in places]
    return _Pooled(rows, tuple(rows.index_axis(p) for p in sorted(places)), mode, tuple(layout))


def _global_average(root: Expression) -> _Pooled | Obstacle | None:
    """A mean over all axes behind the second one, [B, D, L]."""
    found = find_rows(root.inputs[0] if root.inputs else None, {})
    if not isinstance(found, Rows) or found.place != 1 or found.rank < 3:
        return None
    return _over(found, set(range(2, found.rank)), "mean", keepdims=True)


def _multiplied(root: Expression) -> _Pooled | Obstacle | None:
    """MatMul of numbers [.., 1, L] and rows [.., L, D], or of rows [.., D, L] and numbers [.., L, 1]."""
    for operand, other, place in ((1, 0, -1), (0, 1, -2)):
        factor = root.inputs[other] if len(root.inputs) == 2 else None
        rows = find_rows(root.inputs[operand], {}) if factor is not None else None
        if isinstance(rows, Obstacle) and place == -1 and factor is not None and _is_row(factor):
            return rows
        if not isinstance(rows, Rows) or rows.axis != place or factor is None or rows.rank < 2:
            continue
        kept = -2 if place == -1 else -1  # the axis of the numbers that is to be 1
        if factor.rank == 1:
            numbers: Expression | None = factor
        else:
            numbers = column(factor, kept, 1)
        if numbers is None or factor.rank is None:
            return Obstacle(
                f"a MatMul weighs the same rows in several ways at once, by {factor} of {_dims_name(factor)}; by a "
                "row of numbers [.., 1, L] it would be a bag with per_sample_weights"
            )
        found = rows.after(False, numbers)
        if isinstance(found, Obstacle):
            return found
        over = found.rank - (2 if place == -1 else 1)
        return _over(found, {over}, "sum", keepdims=factor.rank != 1)
    return None


def _is_row(e: Expression) -> bool:
    """Whether this is one row of numbers, [.., 1, L] or [L]."""
    return e.dims is not None and (len(e.dims) == 1 or e.dims[-2] == 1)


def _einsum(root: Expression) -> _Pooled | Obstacle | None:
    """Numbers and rows, each axis with a letter: letters that the result lacks are summed over."""
    equation = str(root.attributes.get("equation", "")).replace(" ", "")
    operands, _, output = equation.partition("->")
    letters = operands.split(",")
    if len(letters) != 2 or len(root.inputs) != 2 or "." in equation or "->" not in equation:
        return None
    for rows_at, other in ((0, 1), (1, 0)):
        factor, rows = root.inputs[other], find_rows(root.inputs[rows_at], {})
        mine, theirs = letters[rows_at], letters[other]
        if rows is None or factor is None:
            continue
        if isinstance(rows, Obstacle):
            return rows if mine[-1:] in set(output) - set(theirs) and set(mine) - set(output) else None
        if rows.place is None or len(mine) != rows.rank or any(len(set(t)) != len(t) for t in (mine, theirs, output)):
            continue
        columns = mine[rows.place]
        summed = [k for k, letter in enumerate(mine) if letter not in output]
        if columns not in output or columns in theirs or not summed:
            continue  # a product with the columns is a score, and no pooling
        if not set(theirs) <= set(mine) or not set(output) <= set(mine) or factor.rank != len(theirs):
            return Obstacle(
                f"an Einsum {equation!r} weighs the same rows in several ways at once, by {factor}; without a letter "
                "of its own there it would be a bag with per_sample_weights"
            )
        inner = mine.replace(columns, "")
        numbers = permuted(factor, [theirs.index(letter) for letter in inner if letter in theirs])
        missing = [k for k, letter in enumerate(inner) if letter not in theirs]
        found = rows.after(False, make("Unsqueeze", numbers, missing) if missing else numbers)
        if isinstance(found, Obstacle):
            return found
        pooled = _over(found, set(summed), "sum", keepdims=False)
        labels = dict(zip((letter for letter in mine if letter in output), pooled.layout, strict=True))
        return dataclasses.replace(pooled, layout=tuple(labels[letter] for letter in output))
    return None


# ---- The bag.


def _bag(pooled: _Pooled) -> Bag | Obstacle:
    """The bag of rows that are reduced."""
    rows = pooled.rows
    indices, mode, steps = rows.indices, pooled.mode, rows.steps
    if _has_negatives(indices):
        return Obstacle("its indices have numbers below zero by construction, which count from the end")
    if steps and mode == "max":
        what = "Where" if any(s.selects for s in steps) else "Mul"
        return Obstacle(
            f"ReduceMax over rows that a {what} has changed is not a max of rows: a zero may be the largest number"
        )
    divided = mode == "mean" and bool(steps)
    if divided and rows.type not in _WIDE:
        return Obstacle("ReduceMean over weighted rows of 16 bits is not a mean of rows, and its sum may be too large")
    if any(means_negatives(s.numbers, indices) for s in steps):
        indices = _counted_from_the_start(indices, rows.table)
        # No mask of theirs is that of a bag's indices, which are not below zero.
        rows = dataclasses.replace(rows, steps=tuple(s._replace(padding=None) for s in steps))
    found = _taken_apart(rows)
    if isinstance(found, Obstacle):
        return found
    padding_idx, weights, selected = found
    if selected is not None and (row := _finite_row(rows.table)) is not None:
        indices = make("Where", selected, indices, _like(row, indices))

    def result(e: Expression) -> Expression:
        e = pooled.shaped(e)
        return make("Div", e, _number_of(pooled, rows.type)) if divided else e

    def flat(e: Expression) -> Expression:
        return _flat(e, pooled)

    if weights is not None:
        weights = declared(flat(expanded(weights, make("Shape", rows.indices))), rows.table.type, (None, None))
    bag = Bag(
        rows.table,
        declared(flat(indices), rows.indices.type, (None, None)),
        None,
        weights,
        spec.Attributes("sum" if divided else mode, padding_idx=padding_idx),
    )
    plain = not divided and len(pooled.kept) == 1 and pooled.layout == (pooled.kept[0], "D")
    return bag if plain else dataclasses.replace(bag, result=result)


def _keeping_empty(bag: Bag) -> Bag:
    """A bag [B, L] whose mean is NaN and whose maximum an error where L is 0."""
    if bag.attributes.mode == "max":  # [B, 0] has no reshape to [B, 1]
        checked = make("Reshape", bag.indices, make("Max", make("Shape", bag.indices), [0, 1]), allowzero=1)
        return dataclasses.replace(bag, indices=declared(checked, bag.indices.type, (None, None)))
    dtype = bag.weight.type or ir.DataType.FLOAT
    wide = dtype if dtype in _WIDE else ir.DataType.FLOAT  # there and back is exact; few runtimes add in 16 bits

    def result(e: Expression) -> Expression:
        length = make("Cast", make("Shape", bag.indices, start=1, end=2), to=int(wide))
        nothing = make("Div", constant([0], wide.numpy()), length)
        e = make("Cast", make("Add", make("Cast", e, to=int(wide)), nothing), to=int(dtype))
        return e if bag.result is None else bag.result(e)

    return dataclasses.replace(bag, result=result)


def _flat(e: Expression, pooled: _Pooled) -> Expression:
    """[B, L] of an expression in the shape of the indices."""
    e = permuted(e, (*pooled.kept, *pooled.reduced))
    if len(pooled.kept) == len(pooled.reduced) == 1:
        return e
    if e.array is not None:
        rows = math.prod(e.array.shape[: len(pooled.kept)])
        return from_array(e.array.reshape(rows, math.prod(e.array.shape[len(pooled.kept) :])))
    return make("Flatten", e, axis=len(pooled.kept))


def _number_of(pooled: _Pooled, dtype: ir.DataType) -> Expression:
    """How many rows are in each bag, as a number of the rows' type; 1 for none, whose mean ONNX Runtime takes for 0."""
    shape = make("Shape", pooled.rows.indices)
    size = make("Gather", shape, pooled.reduced[0])
    for k in pooled.reduced[1:]:
        size = make("Mul", size, make("Gather", shape, k))
    number = make("Cast", size, to=int(dtype))
    if number.array is not None:
        return from_array(np.maximum(number.array, 1).astype(number.array.dtype))
    return make("Max", number, make("Cast", constant(1), to=int(dtype)))


def _like(value: int, indices: Expression) -> Expression:
    return make("Cast", constant(value), to=int(indices.type or ir.DataType.INT64))


def _counted_from_the_start(indices: Expression, table: Expression) -> Expression:
    """What Gather makes of indices below zero."""
    rows = make("Cast", make("Gather", make("Shape", table), 0), to=int(indices.type or ir.DataType.INT64))
    return make("Where", make("Less", indices, _like(0, indices)), make("Add", indices, rows), indices)


def _taken_apart(rows: Rows) -> tuple[int | None, Expression | None, Expression | None] | Obstacle:
    """padding_idx, weights, and what selects rows besides, of what was done to rows.

    1. The last step selects all rows but those of one index, which the bag does.
    2. A product with the mask of an index whose row is finite, and with nothing else that may not be.
    """
    steps, padding_idx = list(rows.steps), None
    if steps and steps[-1].selects and steps[-1].padding is not None:  # 1
        padding_idx = steps.pop().padding
    else:  # 2
        masks = {s.padding for s in steps if s.padding is not None and not s.selects}
        if len(masks) == 1 and not any(s.selects for s in steps):
            (p,) = masks
            others = [s for s in steps if s.padding is None]
            if p is not None and _is_finite_row(rows.table, p) and all(_is_finite(s.numbers) for s in others):
                padding_idx, steps = p, others
    weights, selected = None, None
    narrow = 0
    for step in steps:
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
    return padding_idx, weights, selected


def _narrowed_numbers(step: Step, rows: Rows) -> Expression | None:
    """The numbers in the table's type, if that has them all."""
    numbers, to = step.numbers, rows.table.type
    if to is None or numbers.type == to or numbers.type not in _WIDE:
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


def _constant_table(weight: Expression) -> np.ndarray | None:
    """The rows of a constant table. Of external data, which is mapped, no more is read than is looked at."""
    value = weight.value
    if weight.array is not None:
        return weight.array
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return nodes.table(value)


def _is_finite_row(weight: Expression, row: int) -> bool:
    """Whether a row of a constant table is known, and finite."""
    table = _constant_table(weight)
    return table is not None and row < len(table) and bool(np.isfinite(table[row].astype(np.float64)).all())


#: Among so many rows one that is finite is looked for.
_FEW = 1000


def _finite_row(weight: Expression) -> int | None:
    """The first row of a constant table that is finite, if it is among the first few."""
    table = _constant_table(weight)
    if table is None or not len(table):
        return None
    finite = np.isfinite(table[:_FEW].astype(np.float64)).all(axis=1)
    return int(finite.argmax()) if finite.any() else None


# ---- Means.


def _mean_of(root: Expression) -> tuple[_Pooled, Bag] | tuple[None, None]:
    """What is pooled, and the bag, of a sum that is divided by the number of the rows that it has left."""
    sums, divisor = root.inputs if root.op == "Div" and len(root.inputs) == 2 else (None, None)
    pooled = _reshaped_pool(sums)
    if pooled is None or pooled.mode != "sum" or pooled.rows.type not in _WIDE:
        return None, None
    bag = _bag(pooled)
    if not isinstance(bag, Bag) or bag.per_sample_weights is not None or not _is_count(divisor, pooled, bag):
        return None, None
    return pooled, bag.with_attributes(mode="mean")


def _is_count(divisor: Expression | None, pooled: _Pooled, bag: Bag) -> bool:
    """Whether a divisor is the number of rows that a bag with a padding_idx keeps."""
    padding_idx, indices = bag.attributes.padding_idx, pooled.rows.indices
    if padding_idx is None or divisor is None or (divisor.rank or 0) > len(pooled.layout):
        return False
    # Without the axes of size 1, and that of the columns: an axis for each one of the indices that stays.
    n: Expression | None = divisor
    layout = pooled.layout
    for place in range(len(layout)):
        axis, label = place - len(layout), layout[place]
        if not isinstance(label, int) and n is not None:
            n = column(n, axis, pooled.rows.width if label == "D" else 1)
    kept = [label for label in layout if isinstance(label, int)]
    count = counted(n)
    if count is None or count.op != "ReduceSum" or kept != sorted(kept):
        return False
    mask, axes = (*count.inputs, None)[:2]
    if mask is None or axes is None or axes.array is None or mask.rank is None or count.attributes["keepdims"]:
        return False
    over = sorted(int(a) + (mask.rank if a < 0 else 0) for a in axes.array.reshape(-1))
    found = padding_of(mask, indices)
    same = found is not None and found.kept and found.padding_idx == padding_idx
    return same and mask.rank == indices.rank and over == sorted(pooled.reduced) and same_shape(mask, indices)


# ---- Indices that count from the end.

#: Of which inputs an element of the result may be taken as it is.
_TAKES: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("Cast", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"), (0,)
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


def _axes_name(axes: Expression | None) -> str:
    if axes is None:
        return "all axes"
    return "axes that are computed" if axes.array is None else f"axes {axes.array.reshape(-1).tolist()}"


def _dims_name(e: Expression) -> str:
    return "an unknown shape" if e.dims is None else f"shape {[d if d is not None else '?' for d in e.dims]}"
