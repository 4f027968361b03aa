"""Rows pooled by the number of their segment, as tf2onnx writes TensorFlow's segment operators.

tf.math.segment_sum, _mean and _max, unsorted_segment_sum, and sparse_segment_sum, _mean and _sqrt_n become one graph:
the segments' numbers are sorted (TopK) and counted (Unique), positions are put into a grid [segments, longest] that
is -1 elsewhere (ScatterND), and the rows with a row of zeros behind them are gathered by that grid and reduced. Under
tf.nn.embedding_lookup_sparse the rows are those of a table, looked up once for every distinct index.

The bag takes the indices in the order of the sorted segments, and as offsets how many there are of each, added up:
an integer or two per index in the place of a grid of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite.expressions import Expression, constant, difference, first_input, input_of, number
from lucid_onnx.rewrite.normal_form import INT64_MAX, make

from .bag import INTEGERS, Bag, Guess
from .masks import is_zero
from .shared import without_cast

_MODES = {"ReduceSum": "sum", "ReduceMax": "max"}


class _Segments(NamedTuple):
    """What a grid was made from."""

    numbers: Expression  #: int64 [N], the segment of each position
    total: Expression  #: int64 [1], how many segments there are
    is_given: bool  #: the total does not come from the numbers
    ordered: Expression  #: the graph's own sorted numbers
    at: Expression  #: and where those were

    def sorted(self, output: int) -> Expression:
        """``ordered`` and ``at``, as they are written."""
        shape = make("Shape", self.numbers)
        return make("TopK", self.numbers, shape, output=output, axis=0, largest=0, sorted=1)

    def unique(self, output: int) -> Expression:
        """The distinct numbers, and of each position which one it has, and how many have each."""
        return make("Unique", self.sorted(0), output=output, axis=0, sorted=1)

    def counts(self, zeros: Expression) -> Expression:
        """int64 [segments]."""
        return make("ScatterElements", zeros, self.unique(0), self.unique(3), axis=0)


def segments(root: Expression) -> Iterator[Guess]:
    """A lookup in a table whose rows are pooled by segment.

    1. A sum or a maximum.
    2. A sum that is divided by the number of rows or by its root, or by the sum of weights or the root of the sum of
       their squares: a mean, or sqrtn. Any other divisor stays behind a bag of sums.
    3. As 2, and 0 where the divisor is 0 (div_no_nan).

    It is taken for what TensorFlow means. The mean of an empty segment between others is zeros, where the graph has
    0 / 0, and so is its maximum, where the graph has -inf. A negative segment is rejected, as TensorFlow's sorted
    operators do (the graph counts it from the end), and a negative index, as by all bags.
    """
    if root.op == "Div":
        yield from _mean(*root.inputs)  # 2
    elif root.op == "Where":
        yield from _guarded(*root.inputs)  # 3
    else:
        yield from _sum_or_maximum(root)  # 1


def _sum_or_maximum(root: Expression) -> Iterator[Guess]:
    found, data = _grid_of(root), _data_of(root)
    looked_up = None if data is None else _looked_up(data)
    if found is None or data is None or looked_up is None:
        return
    weight, indices, factors = looked_up
    bag = Bag(
        weight,
        _declared(make("Gather", indices, found.at), indices.type),
        _offsets(found),
        None if factors is None else _declared(make("Gather", factors, found.at), factors.type),
        spec.Attributes(_MODES[root.op]),
    )
    if root.op == "ReduceMax" and found.is_given:
        yield bag, "the number of segments is given, and the maximum of an empty one is not a row of zeros"
    elif root.op == "ReduceMax" and factors is not None:
        yield bag, "a maximum over rows times weights is not a bag"
    else:
        yield bag, _written(root.op, data, found)


def _mean(sums: Expression | None, divisor: Expression | None) -> Iterator[Guess]:
    if sums is None or sums.op != "ReduceSum":
        return
    for bag, written in _sum_or_maximum(sums):
        found = _grid_of(sums)
        if isinstance(written, str) or found is None:
            return
        for of, mode, scale in _divisors(divisor, sums, found, bag):
            if difference(divisor, scale) is None:  # else the sum is a bag
                weighted = bag.per_sample_weights is not None
                yield bag.with_attributes(mode=mode, divisor=of if weighted else None), make("Div", written, scale)
                return


def _guarded(condition: Expression | None, nothing: Expression | None, quotient: Expression | None) -> Iterator[Guess]:
    if condition is None or nothing is None or number(nothing) != 0 or quotient is None or quotient.op != "Div":
        return
    if not is_zero(condition, quotient.inputs[1]):
        return
    for bag, written in _mean(*quotient.inputs):
        assert not isinstance(written, str)
        if bag.attributes.divisor == "weights":  # of which the sum may be 0, with rows
            bag = dataclasses.replace(bag, result=lambda e: make("Where", condition, nothing, e))
        yield bag, make("Where", condition, nothing, written)


# ---- What there is.


def _data_of(root: Expression) -> Expression | None:
    """The rows, in front of the one that holes in the grid read."""
    rows = root.inputs[0] if root.op in _MODES and len(root.inputs) == 2 else None
    table = rows.inputs[0] if rows is not None and rows.op == "Gather" else None
    return table.inputs[0] if table is not None and table.op == "Concat" and len(table.inputs) == 2 else None


def _grid_of(root: Expression) -> _Segments | None:
    rows = root.inputs[0] if root.op in _MODES and len(root.inputs) == 2 else None
    grid = rows.inputs[1] if rows is not None and rows.op == "Gather" else None
    if grid is None or grid.op != "ScatterND" or len(grid.inputs) != 3:
        return None
    holes, places, at = grid.inputs
    ordered = first_input(first_input(places))
    shape = first_input(holes)
    count = input_of(shape, "Concat")
    numbers = input_of(at, "TopK")
    if shape is not None and shape.array is not None and shape.array.shape == (2,):
        count = constant(shape.array[:1])
    if count is None or numbers is None or ordered is None or at is None:
        return None
    return _Segments(numbers, count, difference(count, _largest(numbers)) is not None, ordered, at)


def _looked_up(data: Expression) -> tuple[Expression, Expression, Expression | None] | None:
    """Table, indices and weights of rows; None where they are not looked up."""
    factors, column = None, _column_of(data)
    if column is not None:
        rows = next((e for e in data.inputs if e is not column), None)
        factors = _of_column(column)
        if factors is None or rows is None:
            return None
        data = rows
    if data.op != "Gather" or data.attributes.get("axis") != 0:
        return None
    weight, indices = data.inputs
    if weight is not None and indices is not None and weight.op == "Gather" and weight.attributes.get("axis") == 0:
        table, distinct = weight.inputs
        every = None if distinct is None else _repeated(distinct, indices)
        if every is not None and every.rank == 1:
            weight, indices = table, every
    if weight is None or indices is None or weight.rank != 2 or indices.rank != 1:
        return None
    return weight, indices, factors


def _column_of(data: Expression) -> Expression | None:
    """What rows are multiplied by."""
    if data.op != "Mul" or len(data.inputs) != 2:
        return None
    one, other = data.inputs
    return other if one is not None and one.op == "Gather" else one


def _repeated(distinct: Expression, inverse: Expression) -> Expression | None:
    """``x`` where ``distinct[inverse]`` is x: its distinct numbers, and for each element which one it is.

    tf2onnx has Unique work in 64 bits, and casts what goes in and comes out.
    """
    if inverse.type in INTEGERS:
        inverse = without_cast(inverse)
    kept = distinct.type if distinct.op == "Cast" else None
    found = first_input(distinct) if kept is not None else distinct
    if found is None or (found.op, found.output, inverse.op) != ("Unique", 0, "Unique") or "axis" in found.attributes:
        return None
    every = first_input(found)
    if difference(inverse, make("Unique", every, output=2, **found.attributes)) is not None:
        return None
    if kept is not None:  # a cast there and back
        every = input_of(every, "Cast")
        return every if every is not None and every.type == kept in INTEGERS else None
    return every


def _of_column(column: Expression | None) -> Expression | None:
    """w [N] of what is w [N, 1], however it got that axis."""
    inner = first_input(column)
    if column is None or inner is None or inner.rank != 1 or len(column.inputs) != 2 or column.inputs[1] is None:
        return None
    target = column.inputs[1]
    if column.op == "Unsqueeze":
        return inner if number(target) in (1, -1) else None
    if column.op != "Reshape":
        return None
    if target.array is not None:
        return inner if target.array.tolist() == [-1, 1] else None
    return inner if difference(_uncast(target), make("Concat", make("Shape", inner), [1], axis=0)) is None else None


def _uncast(e: Expression) -> Expression:
    """A computation of sizes without its casts to 32 bits and back, which no size needs."""
    if e.op == "Cast" and e.inputs[0] is not None:
        return _uncast(e.inputs[0])
    if e.op == "Concat":
        return make("Concat", *(None if i is None else _uncast(i) for i in e.inputs), axis=e.attributes["axis"])
    if e.array is not None and e.array.dtype == np.int32:
        return constant(e.array)
    return e


def _declared(e: Expression, dtype: ir.DataType | None) -> Expression:
    """``e``, of this type and of one dimension."""
    e.declared = Expression("Value", dtype=dtype, shape=(None,))
    return e


# ---- How it is written.


def _largest(numbers: Expression) -> Expression:
    """One more than the largest number, [1]."""
    return make("Unsqueeze", make("Add", make("ReduceMax", numbers, [0], keepdims=0), 1), [0])


def _filled(shape: Expression, filler: float, dtype: ir.DataType) -> Expression:
    value = (dtype, (1,), np.asarray([filler], dtype.numpy()).tobytes())
    return make("ConstantOfShape", shape, value=value)


def _written(op: str, data: Expression, found: _Segments) -> Expression:
    """The reduction, without what it is divided by."""
    dtype = data.type or ir.DataType.FLOAT
    counts = found.unique(3)
    each = make("Range", 0, make("Squeeze", make("Shape", found.numbers), [0]), 1)
    place = make("Mod", each, make("Gather", counts, found.unique(2)))
    at = [make("Unsqueeze", e, [-1]) for e in (found.sorted(0), place)]
    longest = make("ReduceMax", counts, [0], keepdims=1)
    holes = _filled(make("Concat", found.total, longest, axis=0), -1, ir.DataType.INT64)
    grid = make("ScatterND", holes, make("Concat", *at, axis=1), found.sorted(1))
    width = make("Slice", make("Shape", data), [1], [INT64_MAX], [0])
    nothing = _filled(width, 0 if op == "ReduceSum" else -np.inf, dtype)
    rows = make("Gather", make("Concat", data, make("Unsqueeze", nothing, [0]), axis=0), grid)
    return make(op, rows, [1], keepdims=0)


def _divisors(
    divisor: Expression | None, sums: Expression, found: _Segments, bag: Bag
) -> Iterator[tuple[spec.Divisor, str, Expression]]:
    """What a mean and sqrtn divide by, each with its attributes."""
    for mode in ("mean", "sqrtn"):
        yield "count", mode, _counts(divisor, found, bag, is_root=mode == "sqrtn")
    data = _data_of(sums)
    column = None if data is None else _column_of(data)
    if column is None:
        return
    yield "weights", "mean", _written("ReduceSum", column, found)
    for squares in (make("Mul", column, column), make("Pow", column, constant(2, _numpy(column)))):
        yield "weights", "sqrtn", make("Sqrt", _written("ReduceSum", squares, found))


def _numpy(e: Expression) -> np.dtype:
    return np.dtype((e.type or ir.DataType.FLOAT).numpy())


def _counts(divisor: Expression | None, found: _Segments, bag: Bag, *, is_root: bool) -> Expression:
    """The counts, scattered into zeros that are written in either of two ways."""
    scale = first_input(divisor)
    scale = first_input(scale) if found.is_given else scale
    scattered = first_input(first_input(scale) if is_root else scale)
    zeros, same = first_input(scattered), _filled(found.total, 0, ir.DataType.INT64)
    if zeros is not None and zeros.array is not None and found.total.array is not None:
        same = constant(np.zeros(int(found.total.array[0]), np.int64))
    counts = make("Cast", found.counts(same), to=int(bag.weight.type or ir.DataType.FLOAT))
    counts = make("Sqrt", counts) if is_root else counts
    if found.is_given:
        counts = make("Max", counts, constant(1, np.float32))
    return make("Unsqueeze", counts, [1])


# ---- What the bag reads.


def _offsets(found: _Segments) -> Expression:
    """Where each segment begins among the sorted ones.

    Without Unique, which ONNX Runtime is slow at, and with no target twice. A negative number becomes one that
    ScatterElements rejects.
    """
    numbers = found.ordered
    first = make("Sub", make("Slice", numbers, [0], [1], [0]), [1])  # another number than the first one
    before = make("Slice", make("Concat", first, numbers, axis=0), [0], [-1], [0])
    starts = make("Reshape", make("NonZero", make("Not", make("Equal", before, numbers))), [-1])
    ends = make("Slice", make("Concat", starts, make("Shape", found.numbers), axis=0), [1], [INT64_MAX], [0])
    which = make("Gather", numbers, starts)
    which = make("Where", make("Less", which, 0), found.total, which)
    none = make("Expand", constant([0]), found.total)
    counts = make("ScatterElements", none, which, make("Sub", ends, starts), axis=0)
    return _declared(make("CumSum", counts, 0, exclusive=1), ir.DataType.INT64)
