"""nn.EmbeddingBag as torch.onnx.export(dynamo=True) writes it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.rewrite.expressions import Expression, constant, first_input, input_of, number, subexpressions
from lucid_onnx.rewrite.normal_form import loop, make

from .bag import Bag, Guess
from .shared import MODES, REDUCTIONS, bags_between, is_all, is_held


def torch_dynamo(root: Expression) -> Iterator[Guess]:
    """nn.EmbeddingBag as torch's exporter over torch.export writes it: a Loop that inserts row by row in a sequence.

    With max_norm the table is written anew, with the rows in use scaled down; that becomes the bag's max_norm.

    It is taken for what torch means. The Loop fails where there are no bags, works in float32 for every table, and
    reads the last row for an index of -1. With include_last_offset, mean, max and padding it goes on to the end of the
    indices in the last bag, which is another bag only where the last offset says otherwise.
    """
    found = _found(root)
    if found is None:
        return
    clipped = _clipped(found.weight)
    # Before torch 2.13 an index was compared with padding_idx as it is.
    wrapping = (True,) if found.padding_idx is None else (True, False)
    for mode in found.modes:
        for bag in bags_between(found.weight, found.indices, found.bounds, found.weights, mode, found.padding_idx):
            if clipped is not None:
                for offsets, flat in itertools.product(_offsets(bag), (True, False)):
                    whole = clipped.bag(bag)
                    yield whole, _written(whole, offsets, found.column, clips_flat=flat)
            for offsets, wraps in itertools.product(_offsets(bag), wrapping):
                yield bag, _written(bag, offsets, found.column, wraps=wraps)


# ---- What there is.


class _Found(NamedTuple):
    """What a Loop pools."""

    weight: Expression
    indices: Expression
    weights: Expression | None
    column: Expression | None  #: the constant [N, 1] that the rows are multiplied by, where it is one
    bounds: Expression
    modes: Sequence[str]  #: what the mode may be
    padding_idx: int | None


def _found(root: Expression) -> _Found | None:
    sequence = root.inputs[0] if root.op == "Cast" else root
    outer = input_of(sequence, "ConcatFromSequence")
    if outer is None or outer.op != "Loop" or outer.body is None or len(outer.body.results) != 3:
        return None
    inserted = next((r for r in outer.body.results if r is not None and r.op == "SequenceInsert"), None)
    if inserted is None or len(inserted.inputs) != 2 or inserted.inputs[1] is None:
        return None
    parts = list(subexpressions(inserted.inputs[1]))
    scaled = next((e for e in parts if _is_scaled_gather(e)), None)
    # Behind the loop's body stands the rest of the model, with reductions of its own: the nearest is meant, but mean
    # and max have a sum beside them.
    modes = list(dict.fromkeys(MODES[e.op] for e in parts if e.op in MODES))
    if scaled is None or not modes:
        return None
    gather, column = scaled.inputs
    if gather is None or gather.inputs[0] is None or gather.inputs[1] is None:
        return None
    if not _fits(column, gather.inputs[1]):
        return None
    weights, held = _weights(column)
    padding_idx = None
    inner = next((e for e in parts if e.op == "Loop" and e is not outer), None)
    if inner is None:
        bounds = _bounds_of_slices(parts)
    else:
        bounds, padding_idx = _bounds_of_loop(inner)
        if padding_idx is None:
            return None
    if bounds is None:
        return None
    return _Found(gather.inputs[0], gather.inputs[1], weights, held, bounds, modes, padding_idx)


def _is_scaled_gather(e: Expression) -> bool:
    if e.op != "Mul" or any(i is None for i in e.inputs):
        return False
    gather, column = e.inputs
    if gather is None or column is None or gather.op != "Gather":
        return False
    return column.op == "Unsqueeze" or (is_held(column) and column.rank == 2)


def _fits(column: Expression | None, indices: Expression) -> bool:
    """Whether a column is [N, 1] for indices [N], where the model holds its numbers: N must be fixed then."""
    if column is None or (column.op == "Unsqueeze" and not is_held(column.inputs[0] or column)):
        return column is not None
    if column.dims is None or indices.dims is None or len(indices.dims) != 1:
        return False
    return isinstance(indices.dims[0], int) and column.dims == (indices.dims[0], 1)


def _weights(column: Expression | None) -> tuple[Expression | None, Expression | None]:
    """The weights of a column, None where there are none; and the column, where it has to be taken as it is."""
    factors = first_input(column)
    if column is None or number(input_of(factors, "Expand")) == 1:
        return None, None
    if column.op != "Unsqueeze":
        return (None if is_all(column, 1) else make("Reshape", column, [-1])), column
    return (None, column) if factors is not None and is_all(factors, 1) else (factors, None)


def _bounds_of_slices(parts: Sequence[Expression]) -> Expression | None:
    """``bounds`` of ``If(Equal(Slice(bounds, ..), ..), ..)``: nothing is padded."""
    slices = (first_input(e) for e in parts if e.op == "Equal")
    return next((first_input(e) for e in slices if e is not None and e.op == "Slice"), None)


def _bounds_of_loop(inner: Expression) -> tuple[Expression | None, int | None]:
    """``bounds`` of ``Loop(none, condition, kept, Gather(bounds, ..))``, and the padding_idx that it leaves out."""
    bounds = next((first_input(e) for e in inner.inputs[2:] if e is not None and e.op == "Gather"), None)
    numbers = (number(e.inputs[1]) for e in subexpressions(inner) if e.op == "Equal")
    padding_idx = next((n for n in numbers if n is not None), None)
    return bounds, None if padding_idx is None else int(padding_idx)


class _Clipped(NamedTuple):
    """What torch's embedding_renorm may have made a table from."""

    table: Expression
    max_norm: float
    norm_type: float

    def bag(self, bag: Bag) -> Bag:
        """A bag over the clipped table as one with max_norm."""
        found = bag.with_attributes(max_norm=self.max_norm, norm_type=self.norm_type)
        return dataclasses.replace(found, weight=self.table)


def _clipped(weight: Expression) -> _Clipped | None:
    """For ``ScatterND(table, rows, Where(Greater(norm, max_norm), ..))``."""
    selected = weight.inputs[2] if weight.op == "ScatterND" and len(weight.inputs) == 3 else None
    table, over = first_input(weight), input_of(selected, "Where")
    if table is None or over is None or over.op != "Greater" or over.inputs[0] is None:
        return None
    max_norm = number(over.inputs[1])
    norm_type = {"ReduceL1": 1.0, "ReduceL2": 2.0}.get(over.inputs[0].op)
    if max_norm is None or not max_norm >= 0 or norm_type is None:
        return None
    return _Clipped(table, float(max_norm), norm_type)


# ---- How it is written.


def _offsets(bag: Bag) -> Iterator[Expression]:
    """The offsets; for indices [B, L] what the exporter computes, from the indices or the weights, in either order."""
    if bag.offsets is not None:
        yield bag.offsets
        return
    for matrix in (bag.indices, bag.per_sample_weights):
        if matrix is not None:
            rows, columns = (make("Squeeze", make("Shape", matrix, start=k, end=k + 1)) for k in (0, 1))
            for total in (make("Mul", columns, rows), make("Mul", rows, columns)):
                yield make("Range", 0, total, columns)


class _Pooling(NamedTuple):
    """What the body of the outer loop reads."""

    bag: Bag
    indices: Expression  #: [N]
    rows: Expression  #: [N, D], of all indices, times their weights
    bounds: Expression
    bags: Expression  #: how many there are
    total: Expression  #: N
    zeros: Expression  #: what an empty bag gives


def _written(
    bag: Bag, offsets: Expression, column: Expression | None, *, clips_flat: bool = True, wraps: bool = True
) -> Expression:
    """How the exporter writes a bag.

    Args:
        column: the weights, or ones, as a constant [N, 1]: where the number of indices is fixed the exporter computes
            them itself.
        clips_flat: the rows to clip are found by indices [B * L], and not by indices [B, L].
        wraps: an index below zero is compared with padding_idx as the row that it means.
    """
    indices = bag.indices if bag.offsets is not None else make("Reshape", bag.indices, [-1])
    table = bag.weight if bag.attributes.max_norm is None else _clip(bag, indices if clips_flat else bag.indices)
    padded = bag.attributes.padding_idx is not None
    indices_1d = indices if padded else make("Reshape", indices, [-1])
    weights = bag.per_sample_weights
    if weights is None:
        one = make("Expand", constant([1], np.float32), make("Shape", indices, start=0))
        weights = make("CastLike", one, table)
    elif bag.offsets is None:
        weights = make("Reshape", weights, [-1])
    rows = make("Mul", make("Gather", table, indices_1d), column or make("Unsqueeze", weights, [1]))
    rows = make("Cast", rows, to=int(ir.DataType.FLOAT))
    width = make("Shape", table, start=1)
    zeros = make("Expand", constant([0], np.float32), make("Concat", [1], width, axis=0))
    total = make("Reshape", make("Size", indices), [-1]) if padded else make("Shape", indices_1d)
    bags = make("Size", offsets)
    if bag.attributes.include_last_offset:
        bags = make("Sub", bags, 1)
        bounds = make("ScatterElements", offsets, [-1], total) if padded else offsets
    else:
        bounds = make("Concat", offsets, total, axis=0)
    pooling = _Pooling(bag, indices, rows, bounds, bags, total, zeros)

    def body(i: Expression, condition: Expression, rows_so_far: Expression, k: Expression) -> Sequence[Expression]:
        row = _padded_row(pooling, k, wraps=wraps) if padded else _plain_row(pooling, k)
        next_k = make("Add", k, 1)
        return make("Less", next_k, bags), make("SequenceInsert", rows_so_far, row), next_k

    looped = loop(None, make("Less", 0, bags), [make("SequenceEmpty"), constant(0)], body)
    return make("Cast", make("ConcatFromSequence", looped, axis=0), to=int(bag.weight.type or ir.DataType.FLOAT))


def _clip(bag: Bag, indices: Expression) -> Expression:
    """The table with the rows in use scaled down."""
    table, a = bag.weight, bag.attributes
    used = make("Unique", indices)
    rows = make("Gather", table, used)
    norm = make("ReduceL1" if a.norm_type == 1 else "ReduceL2", rows, [1], keepdims=1)
    limit, epsilon = (make("CastLike", constant(n, np.float32), table) for n in (a.max_norm, 1e-7))
    scaled = make("Mul", rows, make("Div", limit, make("Add", norm, epsilon)))
    return make(
        "ScatterND", table, make("Unsqueeze", used, [1]), make("Where", make("Greater", norm, limit), scaled, rows)
    )


def _reduce(mode: str, rows: Expression) -> Expression:
    return make(REDUCTIONS[mode], rows, [0])


def _select(condition: Expression, then: Expression, otherwise: Expression) -> Expression:
    return make("If", condition, then, otherwise)


def _plain_row(p: _Pooling, k: Expression) -> Expression:
    """What bag ``k`` gives without padding: its rows are a Slice."""
    at = make("Reshape", k, [-1])
    start = make("Slice", p.bounds, at, make("Add", at, 1))
    end = make("Slice", p.bounds, make("Add", at, 1), make("Add", at, 2))
    part = make("Slice", p.rows, start, end)
    is_last = make("Equal", k, make("Sub", p.bags, 1))
    mode = p.bag.attributes.mode
    if mode == "mean":
        pooled = _select(is_last, _mean_to_the_end(p, part, start), _reduce("mean", part))
    elif mode == "max":
        pooled = _reduce("max", _select(is_last, make("Slice", p.rows, start, p.total), part))
    else:
        pooled = _reduce("sum", part)
    return _select(make("Equal", start, end), p.zeros, pooled)


def _mean_to_the_end(p: _Pooling, part: Expression, start: Expression) -> Expression:
    """The mean of the last bag, which goes on to the end of the indices."""
    count = make("Sub", make("Shape", p.indices, start=0, end=1), start)
    sums = _reduce("sum", part)
    mean = make("Div", sums, make("Cast", count, to=int(ir.DataType.FLOAT)))
    return _select(make("Greater", count, 0), mean, sums)


def _padded_row(p: _Pooling, k: Expression, *, wraps: bool) -> Expression:
    """What bag ``k`` gives with padding: an inner Loop collects the positions that are kept."""
    start, end = make("Gather", p.bounds, k), make("Gather", p.bounds, make("Add", k, 1))
    num_rows = make("Squeeze", make("Shape", p.bag.weight, start=0, end=1))  # the clipped table has as many
    padding_idx = constant(p.bag.attributes.padding_idx)

    def body(i: Expression, condition: Expression, kept: Expression, j: Expression) -> Sequence[Expression]:
        index = make("Gather", p.indices, j)
        is_negative = make("Less", index, make("CastLike", 0, index))
        row = _select(is_negative, make("Add", index, num_rows), index) if wraps else index
        keep = make("Not", make("Equal", row, padding_idx))
        longer = make("Concat", kept, make("Reshape", j, [-1]), axis=0)
        next_j = make("Add", j, 1)
        return make("Less", next_j, end), _select(keep, longer, kept), next_j

    nothing = make("Shape", p.indices, start=0, end=0)
    kept = loop(None, make("Less", start, end), [nothing, start], body)
    is_empty = make("Equal", make("Size", kept), 0)
    return _select(is_empty, p.zeros, _reduce(p.bag.attributes.mode, make("Gather", p.rows, kept)))
