"""EmbeddingBagGrad in standard ONNX: right at any thread count, with memory in proportion to positions and outputs.

The gradient of a row is itself a sum of a bag: of the rows of grad_output that its positions belong to. So the
positions are sorted by row, the rows that occur become bags, and `..embedding_bag.lowering` pools them, in its
fixed order of additions. Then each row of the table reads its sum, if it has one: nothing is scattered to a target
that occurs twice, and no scatter has a reduction (with one it races in ONNX Runtime, see there).

Positions that are skipped or belong to no bag are left out at the start: after ``valid`` none is skipped.

Of the names without Weighted, mode "max" alone looks at the table. It takes the bags' maxima by the same lowering,
and of the rows that are equal to theirs the first, by a count of those before. That is in an If that ONNX
Runtime folds; as an If inside an If does not inline there, the rows that are read and clipped before it are none
for the other modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx

from ..embedding_bag import spec as bags
from ..embedding_bag.lowering import (
    Segments,
    Table,
    as_counts,
    by_weights,
    clipped,
    divides,
    divisor_of,
    is_by_weights,
    is_dividing,
    pool,
    read_bags,
    refusal,
    stash,
    where_sqrtn,
)
from ..emit import Emitter, forms
from . import spec

_INT = onnx.AttributeProto.INT
_MAX = bags.MODES.index("max")


def expand(e: Emitter, op: spec.Variant, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Write the operator's nodes into ``e``."""
    bags.check_opset(e.opset)
    named = dict(zip(op.inputs, inputs, strict=True))
    result = dict(zip(op.outputs, outputs, strict=True))
    weight = named["weight"]
    at = _positions(e, op, named)
    gradient = e.cast_to_attribute(named["grad_output"], "stash_type")  # [B, D]
    weights = None
    if op.weighted:
        flat = e.cast_to_attribute(e.Reshape(named["per_sample_weights"], [-1]), "stash_type")
        weights = e.Gather(flat, at.valid)  # [M]
        gradient = _divided(e, gradient, at, weights)
        rows = _rows(e, weight, at.row)
        products = e.reduce("ReduceSum", e.Mul(rows, e.Gather(gradient, at.bag)), 1)
        products = _through_divisor(e, products, weights, at)
        spread = e.ScatterElements(e.Expand(stash(e, 0), at.bags.num_indices), at.valid, products)
        spread = e.Reshape(spread, e.Shape(named["indices"]), allowzero=1)
        e.node("CastLike", (spread, weight), {}, result["grad_per_sample_weights"])
        source = _Source(gradient, at.bag)
    else:
        source = _values(e, weight, gradient, at)
    if op.sparse:
        _write_entries(e, source, weights, at, weight, result)
    else:
        _write_table(e, source, weights, at, weight, result["grad_weight"])


class _Positions(NamedTuple):
    """The M positions that belong to a bag and are not skipped, in order."""

    bags: Segments
    valid: str  #: [M]: their numbers
    row: str  #: [M]: the row of each
    bag: str  #: [M]: the bag of each
    starts: str  #: [B]: the first of each bag among the M
    counts: str  #: [B]: how many each bag has
    total: str  #: [1]: M
    num_rows: str  #: [1]: V
    dim: str  #: [1]: D


def _positions(e: Emitter, op: spec.Variant, named: dict[str, str]) -> _Positions:
    """The positions that count, and an error where an index or the shape of grad_output is wrong."""
    num_rows, dim = e.Shape(named["weight"], start=0, end=1), e.Shape(named["weight"], start=1)
    found = read_bags(e, op, named, num_rows)
    indices = found.indices
    used = e.Not(e.Equal(indices, found.skipped.row))
    if not op.two_d:  # the last bag's end, or where there is no bag its start, which is 0 too
        end = e.reduce("ReduceMax", e.Concat(found.ends, [0], axis=0), 0, keepdims=1)
        used = e.And(used, e.Less(e.Range(0, e.Squeeze(found.num_indices), 1), end))
    inside = e.Less(indices, num_rows)
    shape = e.Concat(found.num_bags, dim, axis=0)
    wrong = e.Concat(e.And(used, e.Not(inside)), e.Not(e.Equal(e.Shape(named["grad_output"]), shape)), axis=0)
    used = e.And(used, inside)  # where no runtime raises an error, nothing is written past the table either
    valid = e.Add(e.Squeeze(e.NonZero(used), [0]), refusal(e, wrong))
    before = e.CumSum(e.Concat([0], e.Cast(used, to=onnx.TensorProto.INT64), axis=0), 0)  # [N + 1]
    starts = e.Gather(before, found.starts)
    counts = e.Sub(e.Gather(before, found.ends), starts)
    # Bags that have a position have different first ones, so the targets are distinct. A dummy bag is behind them.
    some = e.Squeeze(e.NonZero(e.Greater(counts, 0)), [0])
    count = e.Shape(valid)
    first = e.Concat(e.Gather(starts, some), count, axis=0)
    marks = e.ScatterElements(e.Expand(0, e.Add(count, 1)), first, e.Expand(1, e.Shape(first)))
    numbers = e.Slice(e.Sub(e.CumSum(marks, 0), 1), [0], count)
    bag = e.Gather(e.Concat(some, found.num_bags, axis=0), numbers)
    return _Positions(found, valid, e.Gather(indices, valid), bag, starts, counts, count, num_rows, dim)


def _rows(e: Emitter, weight: str, index: str, *, ties: bool = False) -> str:
    """The rows [K, D] of the table as a bag reads them, for index [K]; with ``ties`` equal ones are equal bits."""
    rows = e.cast_to_attribute(e.Gather(weight, e.Unsqueeze(index, [0])), "stash_type")
    return str(e.Squeeze(clipped(e, rows, ties=ties), [0]))


class _Source(NamedTuple):
    """What the positions give their rows, but for weights: ``table[number]``."""

    table: str  #: [K, D], of the accumulation type
    number: str  #: [M]


def _values(e: Emitter, weight: str, gradient: str, at: _Positions) -> _Source:
    """The rows of grad_output for a sum, divided for mean and sqrtn; for max a row of values for each position."""
    divided = _divided(e, gradient, at, None)
    if e.is_static and not e.knows(lambda a: a["mode"] == _MAX):
        return _Source(divided, at.bag)
    is_max = e.Equal(e.attribute("mode", _INT), _MAX)
    read = at.row
    if not e.is_static:
        read = e.Slice(at.row, [0], e.Mul(at.total, e.Cast(is_max, to=onnx.TensorProto.INT64)))
        stash(e, 0)
    rows = _rows(e, weight, read, ties=True)
    table = e.select(
        lambda a: a["mode"] == _MAX,
        lambda: is_max,
        lambda b: _of_maximum(b, rows, gradient, at),
        lambda b: divided,
    )
    number = e.Range(0, e.Squeeze(at.total), 1)
    return _Source(table, number if e.is_static else e.Where(is_max, number, at.bag))


def _divided(e: Emitter, gradient: str, at: _Positions, weights: str | None) -> str:
    """grad_output [B, D] divided as its bag is; ``weights`` are those of the M positions."""

    def by_count(b: Emitter) -> str:
        return str(b.Div(gradient, divisor_of(b, as_counts(b, at.counts))))

    if weights is None:
        return e.select(divides, lambda: is_dividing(e), by_count, lambda b: gradient)
    divided = e.select(
        lambda a: divides(a) and not by_weights(a),
        lambda: e.And(is_dividing(e), e.Not(is_by_weights(e))),
        by_count,
        lambda b: gradient,
    )
    return e.select(
        by_weights,
        lambda: is_by_weights(e),
        lambda b: b.Div(gradient, divisor_of(b, _totals(b, [_shares(b, weights)], at))),
        lambda b: divided,
    )


def _shares(e: Emitter, weights: str) -> str:
    """What a position adds to its bag's total, [M, 1]."""
    column = e.Unsqueeze(weights, [1])
    return where_sqrtn(e, e.Mul(column, column), column)


def _totals(e: Emitter, columns: list[str], at: _Positions) -> str:
    """The sums of each bag of columns [M, 1], side by side; ones for bags without positions."""
    values = e.Concat(*columns, axis=1)
    table = Table(at.total, e.int64([len(columns)]), lambda e, index: e.Gather(values, index), values)
    sums = _pool(e, "sum", table, e.Range(0, e.Squeeze(at.total), 1), at.starts, at)
    return str(e.Where(e.Unsqueeze(e.Greater(at.counts, 0), [1]), sums, stash(e, 1)))


def _through_divisor(e: Emitter, products: str, weights: str, at: _Positions) -> str:
    """The gradient of the weights [M], given as if their bag's divisor did not depend on them."""

    def corrected(b: Emitter) -> str:
        column, product = b.Unsqueeze(weights, [1]), b.Unsqueeze(products, [1])
        totals = _totals(b, [_shares(b, weights), b.Mul(column, product)], at)  # [B, 2]
        divisor = divisor_of(b, b.Slice(totals, [0], [1], [1]))
        common = b.Gather(b.Div(b.Slice(totals, [1], [2], [1]), divisor), at.bag)  # [M, 1]
        share = where_sqrtn(b, b.Div(b.Mul(common, column), b.Gather(divisor, at.bag)), common)
        return b.Squeeze(b.Sub(product, share), [1])

    return e.select(by_weights, lambda: is_by_weights(e), corrected, lambda b: products)


def _of_maximum(e: Emitter, rows: str, gradient: str, at: _Positions) -> str:
    """[M, D]: the bag's gradient in the columns where a position is its bag's first maximum, else 0."""
    numbers = e.Range(0, e.Squeeze(at.total), 1)
    largest = _pool(
        e, "max", Table(at.total, at.dim, lambda e, index: e.Gather(rows, index), rows), numbers, at.starts, at
    )
    largest = e.Gather(largest, at.bag)
    wins = e.Or(e.Equal(rows, largest), e.And(e.IsNaN(rows), e.IsNaN(largest)))
    # How many winners there are before a row, and before the first row of its bag.
    before = e.CumSum(e.Cast(wins, to=onnx.TensorProto.INT32), 0, exclusive=1)
    before_bag = e.Gather(before, e.Gather(at.starts, at.bag))
    first = e.And(wins, e.Equal(before, before_bag))
    return str(e.Where(first, e.Gather(gradient, at.bag), stash(e, 0)))


def _pool(
    e: Emitter, mode: str, table: Table, numbers: str, starts: str, at: _Positions, weights: str | None = None
) -> str:
    """[S, D]: the rows ``numbers`` [M] of a table pooled over the segments that begin at ``starts`` [S]."""
    op = bags.variant(two_d=False, weighted=weights is not None)
    # A plain bag: what this operator's attributes say of padding and norms is not meant for it.
    plain = bags.Attributes(mode, include_last_offset=True).to_onnx(op, double=False)
    del plain["stash_type"]
    output = e.name()
    inputs = ("", numbers, e.Concat(starts, at.total, axis=0), *(() if weights is None else (weights,)))
    inner = e.with_attributes(plain)
    inner.choice = None  # a row may occur more often than a bag is long, and a loop over rows would have no end
    pool(inner, op, inputs, output, table)
    return output


class _Sorted(NamedTuple):
    """The positions by row, and within a row as they were: U rows occur."""

    order: str  #: [M]: the positions, sorted
    rows: str  #: [U]: the rows, ascending
    starts: str  #: [U]: where each begins
    lengths: str  #: [U]: how many positions have it


def _sorted(e: Emitter, at: _Positions) -> _Sorted:
    # A dummy of row V behind the others keeps every tensor non-empty. The keys are distinct, so that it does not
    # matter whether a runtime's sort is stable.
    total = e.Add(at.total, 1)
    keys = e.Add(e.Mul(e.Concat(at.row, at.num_rows, axis=0), total), e.Range(0, e.Squeeze(total), 1))
    keys, _ = e.multi_output("TopK", (keys, total), {"axis": 0, "largest": 0, "sorted": 1}, 2)
    row = e.Div(keys, total)
    order = e.Slice(e.Sub(keys, e.Mul(row, total)), [0], at.total)
    new = e.Greater(e.Sub(row, e.Concat([-1], e.Slice(row, [0], at.total), axis=0)), 0)
    starts = e.Squeeze(e.NonZero(new), [0])  # [U + 1]
    kept = e.Sub(e.Shape(starts), 1)
    begins = e.Slice(starts, [0], kept)
    lengths = e.Sub(e.Slice(starts, [1], e.Shape(starts)), begins)
    return _Sorted(order, e.Gather(row, begins), begins, lengths)


def _by_frequency(e: Emitter, values: str, lengths: str) -> str:
    """Rows divided by numbers [K]."""
    return str(e.Div(values, e.Unsqueeze(e.cast_to_attribute(lengths, "stash_type"), [1])))


def _write_table(e: Emitter, source: _Source, weights: str | None, at: _Positions, weight: str, output: str) -> None:
    """grad_weight [V, D]."""
    by_row = _sorted(e, at)
    table = Table(
        e.Shape(source.table, start=0, end=1), at.dim, lambda e, index: e.Gather(source.table, index), source.table
    )
    sorted_weights = None if weights is None else e.Gather(weights, by_row.order)
    sums = _pool(e, "sum", table, e.Gather(source.number, by_row.order), by_row.starts, at, sorted_weights)
    sums = e.select(
        lambda a: a["scale_grad_by_freq"] == 1,
        lambda: e.Equal(e.attribute("scale_grad_by_freq", _INT), 1),
        lambda b: _by_frequency(b, sums, by_row.lengths),
        lambda b: sums,
    )
    # Every row of the result reads its sum, or the row of zeros behind them.
    occurring = e.Shape(by_row.rows)
    place = e.Expand(occurring, at.num_rows)
    place = e.ScatterElements(place, by_row.rows, e.Range(0, e.Squeeze(occurring), 1))
    zero = e.Expand(stash(e, 0), e.Concat([1], at.dim, axis=0))
    e.node("Gather", (e.CastLike(e.Concat(sums, zero, axis=0), weight), place), {}, output)


def _write_entries(
    e: Emitter, source: _Source, weights: str | None, at: _Positions, weight: str, result: dict[str, str]
) -> None:
    """rows [M] and values [M, D]."""
    values = e.Gather(source.table, source.number)
    if weights is not None:
        values = e.Mul(values, e.Unsqueeze(weights, [1]))

    def divided(b: Emitter) -> str:
        by_row = _sorted(b, at)
        # The number of each position's row among those that occur, by where the rows begin.
        marks = b.ScatterElements(b.Expand(0, at.total), by_row.starts, b.Expand(1, b.Shape(by_row.starts)))
        lengths = b.Gather(by_row.lengths, b.Sub(b.CumSum(marks, 0), 1))
        return _by_frequency(b, values, b.ScatterElements(lengths, by_row.order, lengths))

    values = e.select(
        lambda a: a["scale_grad_by_freq"] == 1,
        lambda: e.Equal(e.attribute("scale_grad_by_freq", _INT), 1),
        divided,
        lambda b: values,
    )
    e.node("Identity", (at.row,), {}, result["rows"])
    e.node("CastLike", (values, weight), {}, result["values"])


function, nodes = forms(spec, expand)
