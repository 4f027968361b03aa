"""Rows gathered by indices and reduced over one of their axes, as anybody may write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from lucid_onnx.rewrite.expressions import Dim, Expression, constant, difference, input_of, number, subexpressions
from lucid_onnx.rewrite.normal_form import make

from .bag import FLOATS, Bag, Guess, Obstructed
from .columns import column, declared, is_filled_with, permuted
from .divisors import Mean, mean_of
from .finite import Magnitudes
from .masks import is_zero
from .pooled import WIDE, Pooled, bag_of, has_negatives
from .rows import Obstacle, Rows, find_rows
from .shared import MODES

#: Reductions that a bag has no mode for.
_OTHER_REDUCTIONS = frozenset(
    ("ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")
)


class GatherReduce:
    """Rows gathered by indices and reduced: the model is not an export of a bag, and keeps its meaning.

    The rows are indices [.., L] or of any other order, of which one axis or more is reduced, by

    1. a reduction: the rows as they are, in every mode.
    2. a sum of rows that were multiplied by a number per index or that a Where selected: mode sum.
    3. a MatMul or an Einsum of one row of numbers and rows: as 2.
    4. a sum of 2 or 3, divided by the number of rows that are left (or by a number above zero and up to one where none
       are), by the number of all rows, by the sum of weights, or by the root of one of these: mean and sqrtn.
    5. 4, with zero where the divisor is zero.
    6. a maximum of rows that a mask has put another number in the place of.
    7. any of these over 16-bit rows that were cast to a wider type, cast back.

    Numbers become per_sample_weights. A mask of one index becomes the padding_idx, and any other mask of 0 and 1
    indices below zero that are skipped, where that means the same: where it selects, or where what it multiplies is
    known to be finite. (A mask that multiplies keeps NaN: 0 times infinity is NaN.) Else it becomes weights 0 and 1. An
    index that such weights do not select is replaced by that of a finite row, if the table is a constant; else the two
    differ where such a row is not finite.

    A mean or maximum over no columns is not a row of zeros: L must be known to be above zero, or be assumed to be, or
    nodes beside the bag keep what the model says.
    An index of -1 is legal for Gather and means the last row; a bag rejects it, and one that skips indices below zero
    is given one behind the table instead. Where a mask tells indices below zero from others, they are counted from the
    end before the bag.

    Args:
        assume_nonempty: L is above zero, though the model does not say so.
        keep_empty: where L may be 0, write what keeps a mean over nothing NaN and a maximum an error, in opset 15.
    """

    def __init__(self, *, assume_nonempty: bool = False, keep_empty: bool = False) -> None:
        self._assume_nonempty, self._keep_empty = assume_nonempty, keep_empty
        self._magnitudes = Magnitudes()

    def __call__(self, root: Expression) -> Iterator[Guess | Obstructed]:
        if root.op in ("Div", "Where"):
            yield from self._mean(root)  # 4, 5
        elif root.op == "Cast":
            yield from self._narrowed(root)  # 7
        elif root.op == "Squeeze":
            yield from self._squeezed(root)
        else:
            found = _pooled(root)
            if found is None or (found.rows is not None and (_is_lowered(found.rows) or _is_of_a_loop(found.rows))):
                return
            if isinstance(found, Obstacle):
                if found.rows is None or not _is_of_rows(found.rows.table):
                    yield None, found.reason
            elif not _is_one_of_several(root, found) and not _is_of_segments(found.rows):
                yield self._guess(found, root, found.rows.type)

    def _guess(self, pooled: Pooled, root: Expression, to: ir.DataType) -> Guess | Obstructed:
        """The bag, if its result has the type ``to``."""
        found = bag_of(pooled, self._magnitudes)
        if isinstance(found, Obstacle):
            return None, found.reason
        bag = found.bag
        if pooled.rows.table.type != to:
            return bag, (
                f"rows of {bag.table_dtype} are pooled in {FLOATS[to]} and the result stays so, while a bag's result "
                f"has its table's type; with the table in {FLOATS[to]} it is a bag"
            )
        matters = pooled.mode == "max" or (pooled.mode == "mean" and pooled.rows.is_plain)
        whole, reason = self._with_rows(pooled, bag) if matters else (bag, None)
        return whole, reason or root

    def _with_rows(self, pooled: Pooled, bag: Bag) -> tuple[Bag, str | None]:
        """A bag whose lengths are to be above 0: with nodes beside it if they may be 0, or why that cannot be."""
        reason = self._why_maybe_empty(pooled)
        if reason is not None and self._keep_empty and 0 not in (pooled.rows.indices.dims or ()):
            return _keeping_empty(bag), None
        return bag, reason

    def _why_maybe_empty(self, pooled: Pooled) -> str | None:
        """Why bags may be empty in a mode where that matters, or None."""
        dims = pooled.rows.indices.dims or ()
        lengths = [dims[k] for k in pooled.reduced]
        if self._assume_nonempty and 0 not in lengths:
            return None
        open_length: Dim = next((d for d in lengths if not isinstance(d, int) or d == 0), 1)
        if open_length == 1:
            return None
        result = "an error or -inf" if pooled.mode == "max" else "NaN"
        mode = "max" if pooled.mode == "max" else "mean"
        known = "unknown" if open_length is None else repr(open_length)
        return (
            f"the length of the bags is {known}: a {mode} over no columns is {result} to the model, and "
            "zeros to a bag; assume_nonempty takes it to be above 0"
        )

    def _divided(self, root: Expression) -> tuple[Pooled, Bag] | None:
        """The bag of a mean, in whatever way it is written."""
        if root.op == "Where":
            return self._guarded(root)
        sums, divisor = root.inputs if root.op == "Div" and len(root.inputs) == 2 else (None, None)
        found = mean_of(_reshaped_pool(sums), divisor, self._magnitudes)
        if found is None:
            return None
        bag, reason = self._with_rows(found.pooled, found.bag) if found.needs_rows else (found.bag, None)
        return None if reason is not None else (found.pooled, bag)

    def _guarded(self, root: Expression) -> tuple[Pooled, Bag] | None:
        """A mean that is zero where it would be divided by 0: ``Where(n == 0, 0, sums / n)``."""
        condition, nothing, quotient = root.inputs if len(root.inputs) == 3 else (None, None, None)
        if quotient is None or quotient.op != "Div" or nothing is None or not is_filled_with(nothing, 0):
            return None
        found: Mean | None = None
        sums, divisor = quotient.inputs
        if divisor is not None and divisor.op == "Where" and not is_zero(condition, divisor):
            inner, _, divisor = divisor.inputs  # of what is not 0, and so not divided by here
            if condition is None or difference(inner, condition) is not None:
                return None
        pooled = _reshaped_pool(sums)
        if pooled is not None and is_zero(condition, divisor):
            one = make("Cast", constant(1), to=int((divisor or root).type or pooled.rows.type))
            found = mean_of(pooled, make("Where", condition, one, divisor), self._magnitudes)
            found = found or mean_of(pooled, divisor, self._magnitudes)
        if found is None or (nothing.rank or 0) > len(found.pooled.layout):
            found = None
        if found is None or not found.may_divide_by_0:
            return None if found is None else (found.pooled, found.bag)
        bag = found.bag
        shaped = bag.result or (lambda e: e)
        return found.pooled, dataclasses.replace(bag, result=lambda e: make("Where", condition, nothing, shaped(e)))

    def _mean(self, root: Expression) -> Iterator[Guess | Obstructed]:
        """A Div that is no mean stays behind the bag of its sum, which is found by itself.

        Where the divisor is repeated in all columns, as by sentence-transformers, it is divided by one number per bag.
        """
        found = self._divided(root)
        if found is not None and found[0].rows.table.type == found[0].rows.type:
            yield found[1], root
            return
        sums, divisor = (*root.inputs, None)[:2]
        pooled = _reshaped_pool(sums) if root.op == "Div" and _has_one_user(sums) else None
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
        divided = self._divided(x)
        pooled = _reshaped_pool(x) if divided is None else divided[0]
        if pooled is None or (pooled.rows.table.type, pooled.rows.type) != (to, ir.DataType.FLOAT):
            return
        if divided is not None:
            yield divided[1], root
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


def _keeping_empty(bag: Bag) -> Bag:
    """A bag [B, L] whose mean is NaN and whose maximum an error where L is 0."""
    if bag.attributes.mode == "max":  # [B, 0] has no reshape to [B, 1]
        checked = make("Reshape", bag.indices, make("Max", make("Shape", bag.indices), [0, 1]), allowzero=1)
        return dataclasses.replace(bag, indices=declared(checked, bag.indices.type, (None, None)))
    dtype = bag.weight.type or ir.DataType.FLOAT
    wide = dtype if dtype in WIDE else ir.DataType.FLOAT  # there and back is exact; few runtimes add in 16 bits

    def result(e: Expression) -> Expression:
        length = make("Cast", make("Shape", bag.indices, start=1, end=2), to=int(wide))
        nothing = make("Div", constant([0], wide.numpy()), length)
        e = make("Cast", make("Add", make("Cast", e, to=int(wide)), nothing), to=int(dtype))
        return e if bag.result is None else bag.result(e)

    return dataclasses.replace(bag, result=result)


# ---- What is reduced.


def _pooled(root: Expression) -> Pooled | Obstacle | None:
    """The rows that an operator pools; why they are not a bag's; None if it pools none."""
    if root.op in MODES or root.op in _OTHER_REDUCTIONS:
        return _reduced(root)
    if root.op == "GlobalAveragePool":
        return _global_average(root)
    if root.op == "MatMul":
        return _multiplied(root)
    return _einsum(root) if root.op == "Einsum" else None


def _is_one_of_several(root: Expression, pooled: Pooled) -> bool:
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


def _is_of_segments(rows: Rows) -> bool:
    """Whether these are numbers by segment with a row of zeros behind them, as tf2onnx adds up weights."""
    return rows.table.op == "Concat" and has_negatives(rows.indices)


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


def _reshaped_pool(e: Expression | None) -> Pooled | None:
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
    return found if isinstance(found, Pooled) else None


def _labels(rows: Rows) -> list[int | str | None]:
    """The axes of rows, as a result's layout has them."""
    axes: list[int | str | None] = list(range(rows.indices.rank or 0))
    if rows.place is not None:
        axes.insert(rows.place, "D")
    return axes


def _reduced(root: Expression) -> Pooled | Obstacle | None:
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


def _over(rows: Rows, places: set[int], mode: str, *, keepdims: bool) -> Pooled:
    labels = _labels(rows)
    layout = [None if k in places else label for k, label in enumerate(labels) if keepdims or k not in places]
    return Pooled(rows, tuple(rows.index_axis(p) for p in sorted(places)), mode, tuple(layout))


def _global_average(root: Expression) -> Pooled | Obstacle | None:
    """A mean over all axes behind the second one, [B, D, L]."""
    found = find_rows(root.inputs[0] if root.inputs else None, {})
    if not isinstance(found, Rows) or found.place != 1 or found.rank < 3:
        return None
    return _over(found, set(range(2, found.rank)), "mean", keepdims=True)


def _multiplied(root: Expression) -> Pooled | Obstacle | None:
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


def _einsum(root: Expression) -> Pooled | Obstacle | None:
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


def _axes_name(axes: Expression | None) -> str:
    if axes is None:
        return "all axes"
    return "axes that are computed" if axes.array is None else f"axes {axes.array.reshape(-1).tolist()}"


def _dims_name(e: Expression) -> str:
    return "an unknown shape" if e.dims is None else f"shape {[d if d is not None else '?' for d in e.dims]}"
