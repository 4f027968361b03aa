"""How others write a bag. Each pattern guesses a bag from a graph, and says how it would be written if it were one.

A guess may be careless, the comparison of the two is not: a pattern yields pairs of a `Bag` and of the expression
that its exporter makes of that bag, and only where the graph is that expression, node for node in normal form, is it
replaced. A pattern's docstring says where the meaning of the bag and of the graph part all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from lucid_onnx.ops import OPERATOR_OF, quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import LONGEST_BAG, Ragged

from .expressions import Dim, Expression, Reader, constant, difference, inside, loop, make

_REDUCTIONS = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "max"}
_REDUCE = {mode: op for op, mode in _REDUCTIONS.items()}
_FLOATS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_SCALES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_INT64_MAX = 2**63 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Bag:
    """A bag over expressions; without ``offsets`` the indices are [B, L]."""

    weight: Expression
    indices: Expression
    offsets: Expression | None
    per_sample_weights: Expression | None
    attributes: spec.Attributes
    keepdims: bool = False  #: the graph keeps an axis of one where the bags' rows were

    @property
    def op(self) -> Any:
        """The operator's name and inputs."""
        return spec.variant(two_d=self.offsets is None, weighted=self.per_sample_weights is not None)

    @property
    def table_dtype(self) -> str:
        """NumPy's (or ml_dtypes') name of the type of the table's elements."""
        return _FLOATS[self.weight.type or ir.DataType.FLOAT]

    @property
    def table_shape(self) -> tuple[Dim, ...]:
        """As far as it is known."""
        return self.weight.dims or ()

    @property
    def table(self) -> dict[str, Expression]:
        """The inputs that make the table, by name; the first one is what is reported."""
        return {"weight": self.weight}

    @property
    def inputs(self) -> dict[str, Expression]:
        """By the operator's names, in order."""
        given = {
            **self.table,
            "indices": self.indices,
            "offsets": self.offsets,
            "per_sample_weights": self.per_sample_weights,
        }
        return {name: found for name in self.op.inputs if (found := given[name]) is not None}

    def to_onnx(self) -> dict[str, int | float]:
        """The node's attributes."""
        return self.attributes.to_onnx(self.op, double=self.weight.type == ir.DataType.DOUBLE)

    def objection(self) -> str | None:
        """Why the operator does not take these inputs, or None."""
        table = self.weight
        if table.type not in _FLOATS:
            return f"the table has type {_name(table.type)}, expected float32, float16, bfloat16 or float64"
        if table.rank != 2:
            return f"the table has {_rank(table)}, expected two"
        for name, value in (("indices", self.indices), ("offsets", self.offsets)):
            if value is not None and value.type not in _INTEGERS:
                return f"{name} have type {_name(value.type)}, expected int32 or int64"
        if self.indices.rank != (2 if self.offsets is None else 1):
            return f"the indices have {_rank(self.indices)}, expected {'two' if self.offsets is None else 'one'}"
        if self.offsets is not None and self.offsets.rank != 1:
            return f"the offsets have {_rank(self.offsets)}, expected one"
        weights = self.per_sample_weights
        if weights is not None and weights.type != table.type:
            return f"per_sample_weights have type {_name(weights.type)}, the table has {_name(table.type)}"
        if weights is not None and weights.rank != self.indices.rank:
            return f"per_sample_weights have {_rank(weights)}, expected as many as the indices"
        if self.indices.array is not None and (self.indices.array < 0).any():
            return f"the indices are constant, and {int(self.indices.array.min())} is among them"
        rows = table.dims[0] if table.dims is not None and isinstance(table.dims[0], int) else None
        try:
            self.attributes.check(weighted=weights is not None, num_rows=rows)
        except ValueError as error:
            return str(error)
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedBag(Bag):
    """A bag over codes: ``weight`` is the scale, whose type its rows have."""

    codes: Expression = dataclasses.field(kw_only=True)
    second: tuple[str, Expression] | None = None  #: "zero_point" or "bias", and it

    @property
    def op(self) -> Any:
        return quantized_embedding_bag.spec.variant(
            second=None if self.second is None else self.second[0],
            two_d=self.offsets is None,
            weighted=self.per_sample_weights is not None,
        )

    @property
    def table_dtype(self) -> str:
        return self.meaning.codes_type

    @property
    def table_shape(self) -> tuple[Dim, ...]:
        return (*(self.codes.dims or (None,))[:1], self.meaning.embedding_dim)

    @property
    def table(self) -> dict[str, Expression]:
        return {"codes": self.codes, "scale": self.weight, **({} if self.second is None else dict([self.second]))}

    @property
    def meaning(self) -> quantized_embedding_bag.spec.Attributes:
        """The attributes, which are those of a bag over codes."""
        assert isinstance(self.attributes, quantized_embedding_bag.spec.Attributes)
        return self.attributes

    def objection(self) -> str | None:
        stored = ir.DataType.from_numpy(self.meaning.codes.stored)
        if self.codes.type != stored or self.codes.rank != 2:
            return f"the codes have type {_name(self.codes.type)} and {_rank(self.codes)}"
        for name, numbers in self.table.items():
            if name != "codes" and (numbers.type not in _SCALES or numbers.type != self.weight.type):
                return f"{name} has type {_name(numbers.type)}, expected float32 or float16 as scale"
            if name != "codes" and numbers.rank != 1:
                return f"{name} has {_rank(numbers)}, expected one"
        # The rest is as for rows of the scale's type.
        like = Expression("Value", dtype=self.weight.type, shape=(self.table_shape[0], self.meaning.embedding_dim))
        return Bag(like, self.indices, self.offsets, self.per_sample_weights, self.attributes).objection()

    def to_onnx(self) -> dict[str, int | float]:
        return self.meaning.to_onnx(self.op)


def _name(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name.lower()


def _rank(e: Expression) -> str:
    return "an unknown number of dimensions" if e.rank is None else f"{e.rank} dimensions"


#: What a graph may be, and how that would be written; or, in words, why it is none after all.
Guess = tuple[Bag, "Expression | str"]
Pattern = Callable[[Expression], Iterator[Guess]]


# ---- torch.onnx.export(dynamo=False).


def torch_legacy(root: Expression) -> Iterator[Guess]:
    """nn.EmbeddingBag as torch's TorchScript exporter writes it: a Loop over the bags, stacking what each gives.

    Taken for what torch means: the Loop fails, or gives NaN, on an empty bag in mode mean or max, and reads the
    last row for an index of -1; a bag gives zeros, and refuses a negative index as torch does.
    """
    if root.op != "Loop" or root.output != 0 or len(root.inputs) != 2 or root.body is None:
        return
    if len(root.body.results) != 2:
        return
    reduced = root.body.results[1]
    if reduced is None or reduced.op not in _REDUCTIONS:
        return
    mode, rows, weights = _REDUCTIONS[reduced.op], reduced.inputs[0], None
    if rows is not None and rows.op == "Mul":
        rows, scale = rows.inputs
        part = scale.inputs[0] if scale is not None and scale.op == "Unsqueeze" else None
        if part is None or part.op != "Slice":
            return
        weights = part.inputs[0]
    if rows is None or rows.op != "Gather" or rows.inputs[1] is None or rows.inputs[1].op != "Slice":
        return
    weight, indices = rows.inputs[0], rows.inputs[1].inputs[0]
    bounds = _gathered(rows.inputs[1].inputs[1])
    if weight is None or indices is None or bounds is None:
        return
    for bag in _guesses(weight, indices, bounds, weights, mode, None):
        yield bag, _as_legacy(bag)


def _gathered(e: Expression | None) -> Expression | None:
    """``bounds`` of ``Unsqueeze(Gather(bounds, i))``."""
    if e is not None and e.op == "Unsqueeze" and e.inputs[0] is not None and e.inputs[0].op == "Gather":
        return e.inputs[0].inputs[0]
    return None


def _guesses(
    weight: Expression,
    indices: Expression,
    bounds: Expression,
    weights: Expression | None,
    mode: str,
    padding_idx: int | None,
) -> Iterator[Bag]:
    """The bags that may lie behind flat indices and the bounds of bags, the plainest first."""
    attributes = spec.Attributes(mode, padding_idx=padding_idx)
    flat = (indices, weights)
    if all(e is None or e.op == "Reshape" for e in flat):
        matrix, factors = (None if e is None else e.inputs[0] for e in flat)
        if matrix is not None and matrix.rank == 2 and (factors is None or factors.rank == 2):
            yield Bag(weight, matrix, None, factors, attributes)
    if bounds.op in ("Concat", "ScatterElements") and bounds.inputs[0] is not None:
        last = bounds.op == "ScatterElements"
        found = dataclasses.replace(attributes, include_last_offset=last)
        yield Bag(weight, indices, bounds.inputs[0], weights, found)
    yield Bag(weight, indices, bounds, weights, dataclasses.replace(attributes, include_last_offset=True))


def _as_legacy(bag: Bag) -> Expression:
    indices, offsets, weights = bag.indices, bag.offsets, bag.per_sample_weights
    if offsets is None:
        shape = make("Shape", indices)
        offsets = make("Range", constant(0), make("ReduceProd", shape, keepdims=0), make("Gather", shape, constant(1)))
        indices = make("Reshape", indices, [-1])
        weights = None if weights is None else make("Reshape", weights, [-1])
    bounds = offsets
    if not bag.attributes.include_last_offset:
        end = make("Unsqueeze", make("Gather", make("Shape", indices), constant(0)), [0])
        bounds = make("Concat", offsets, end, axis=0)
    ends = make("Slice", bounds, [1], [_INT64_MAX], [0], [1])
    true = constant(True, np.bool_)

    def body(i: Expression, _: Expression) -> Sequence[Expression]:
        at = [make("Unsqueeze", make("Gather", b, i), [0]) for b in (bounds, ends)]
        rows = make("Gather", bag.weight, make("Slice", indices, *at, [0]))
        if weights is not None:
            rows = make("Mul", rows, make("Unsqueeze", make("Slice", weights, *at, [0]), [1]))
        return true, make(_REDUCE[bag.attributes.mode], rows, [0], keepdims=0)

    return loop(make("Gather", make("Shape", ends), constant(0)), true, [], body)


# ---- One bag after another, written out.


def unrolled(root: Expression) -> Iterator[Guess]:
    """A fixed number of bags, each a Slice of the indices, a Gather and a reduction, put together by a Concat.

    This is what torch's TorchScript exporter makes of nn.EmbeddingBag at opset 10, where the bounds of each bag are
    read from the offsets, and what a Python loop over bags becomes, where they are numbers.

    Bounds that are read are taken for what torch means, as in `torch_legacy`. With bounds that are numbers the graph
    keeps its own meaning: a mean or a maximum over no rows, or a Slice past the end, is no bag's.
    """
    if root.op != "Concat" or root.attributes.get("axis") != 0 or any(e is None for e in root.inputs):
        return
    parts = [_sliced_rows(e) for e in root.inputs]
    if parts[0] is None:
        return
    mode, weight, indices, weights, start, _ = parts[0]
    bounds = _gathered(start)
    if bounds is not None:
        for bag in _read_bounds(weight, indices, bounds, weights, mode):
            yield bag, _counted(bag, len(parts)) or _as_unrolled(root, bag, bounds)
        return
    ends = [None if p is None else (_number(p[4]), _number(p[5])) for p in parts]
    numbers = [(int(e[0]), int(e[1])) for e in ends if e is not None and e[0] is not None and e[1] is not None]
    if len(numbers) != len(parts):
        return
    flat = [numbers[0][0], *(end for _, end in numbers)]
    attributes = spec.Attributes(mode, include_last_offset=True)
    bag = Bag(weight, indices, constant(flat), weights, attributes)
    reason = _unlike_bags(numbers, mode, indices)
    yield bag, reason or _as_unrolled(root, bag, constant(flat))


_Part = tuple[str, Expression, Expression, "Expression | None", "Expression | None", "Expression | None"]


def _sliced_rows(e: Expression | None) -> _Part | None:
    """Mode, weight, indices, weights, start and end of one bag that is written out; None for something else."""
    reduced = _first(e) if e is not None and e.op == "Unsqueeze" else e
    rows = _first(reduced)
    if reduced is None or reduced.op not in _REDUCTIONS or rows is None:
        return None
    weights = None
    if rows.op == "Mul" and len(rows.inputs) == 2:
        rows, scale = rows.inputs
        part = _first(scale) if scale is not None and scale.op == "Unsqueeze" else None
        weights = _first(part) if part is not None and part.op == "Slice" else None
        if weights is None or rows is None:
            return None
    at = rows.inputs[1] if rows.op == "Gather" else None
    if at is None or at.op != "Slice" or len(at.inputs) != 4:
        return None
    weight, indices = rows.inputs[0], at.inputs[0]
    if weight is None or indices is None or weight.rank != 2:
        return None
    return _REDUCTIONS[reduced.op], weight, indices, weights, at.inputs[1], at.inputs[2]


def _read_bounds(
    weight: Expression, indices: Expression, bounds: Expression, weights: Expression | None, mode: str
) -> Iterator[Bag]:
    """The bags whose bounds are those: offsets with the largest number behind them, or with their own end."""
    last = bounds.inputs[1] if bounds.op == "Concat" and len(bounds.inputs) == 2 else None
    if _number(last) == _INT64_MAX and bounds.inputs[0] is not None:
        yield Bag(weight, indices, bounds.inputs[0], weights, spec.Attributes(mode))
    yield Bag(weight, indices, bounds, weights, spec.Attributes(mode, include_last_offset=True))


def _counted(bag: Bag, count: int) -> str | None:
    """Why the bags that are written out are not those of the offsets, or None."""
    assert bag.offsets is not None
    expected = count + bag.attributes.include_last_offset
    length = bag.offsets.dims[0] if bag.offsets.dims is not None and len(bag.offsets.dims) == 1 else None
    if length == expected:
        return None
    known = "unknown" if length is None else repr(length)
    return f"it has {count} bags, which takes {expected} offsets, and how many there are is {known}"


def _unlike_bags(bounds: Sequence[tuple[int, int]], mode: str, indices: Expression) -> str | None:
    """Why slices of these bounds are not the bags of one list of indices, or None."""
    if bounds[0][0] != 0:
        return f"its first bag begins at {bounds[0][0]}, not at 0"
    for k, (one, other) in enumerate(itertools.pairwise(bounds)):
        if one[1] != other[0]:
            return f"bag {k} ends at {one[1]}, and bag {k + 1} begins at {other[0]}"
    for k, (start, end) in enumerate(bounds):
        if end < start or (mode != "sum" and end == start):
            return f"bag {k} goes from {start} to {end}, and its {mode} is no row of zeros to the model"
    count = indices.dims[0] if indices.dims is not None and len(indices.dims) == 1 else None
    if not isinstance(count, int) or count < bounds[-1][1]:
        known = "unknown" if count is None else repr(count)
        return f"its bags end at {bounds[-1][1]}, and the number of indices is {known}"
    return None


def _as_unrolled(root: Expression, bag: Bag, bounds: Expression) -> Expression:
    """The bags written out, each with its axis kept by the reduction or put back behind it, as the graph does."""
    written = []
    for k, e in enumerate(root.inputs):
        at = [make("Unsqueeze", make("Gather", bounds, constant(i)), [0]) for i in (k, k + 1)]
        rows = make("Gather", bag.weight, make("Slice", bag.indices, *at, [0]))
        if bag.per_sample_weights is not None:
            rows = make("Mul", rows, make("Unsqueeze", make("Slice", bag.per_sample_weights, *at, [0]), [1]))
        keepdims = int(e is not None and e.op != "Unsqueeze")
        reduced = make(_REDUCE[bag.attributes.mode], rows, [0], keepdims=keepdims)
        written.append(reduced if keepdims else make("Unsqueeze", reduced, [0]))
    return make("Concat", *written, axis=0)


# ---- torch.onnx.export(dynamo=True).


def torch_dynamo(root: Expression) -> Iterator[Guess]:
    """nn.EmbeddingBag as torch's exporter over torch.export writes it: a Loop that inserts row by row in a sequence.

    With max_norm the table is written anew, with the rows in use scaled down; that becomes the bag's max_norm.

    Taken for what torch means: the Loop fails where there are no bags, works in float32 for every table, and reads
    the last row for an index of -1. With include_last_offset, mean, max and padding it goes on to the end of the
    indices in the last bag, which is another bag only where the last offset says otherwise.
    """
    sequence = root.inputs[0] if root.op == "Cast" else root
    if sequence is None or sequence.op != "ConcatFromSequence":
        return
    found = sequence.inputs[0]
    if found is None or found.op != "Loop" or found.body is None or len(found.body.results) != 3:
        return
    inserted = next((r for r in found.body.results if r is not None and r.op == "SequenceInsert"), None)
    if inserted is None or len(inserted.inputs) != 2 or inserted.inputs[1] is None:
        return
    row = inserted.inputs[1]
    parts = list(inside(row))
    scaled = next((e for e in parts if _is_scaled_gather(e)), None)
    # Behind the loop's body stands the rest of the model, with reductions of its own: the nearest is meant, but mean
    # and max have a sum beside them.
    modes = list(dict.fromkeys(_REDUCTIONS[e.op] for e in parts if e.op in _REDUCTIONS))
    if scaled is None or not modes:
        return
    gather, scale = scaled.inputs
    if gather is None or scale is None or gather.inputs[0] is None or gather.inputs[1] is None:
        return
    weight, indices, factors = gather.inputs[0], gather.inputs[1], scale.inputs[0]
    if factors is not None and factors.op == "Expand" and _number(_first(factors)) == 1:
        factors = None
    padding_idx = None
    inner = next((e for e in parts if e.op == "Loop" and e is not found), None)
    if inner is None:  # If(Equal(Slice(bounds, ..), ..), ..)
        slices = (_first(e) for e in parts if e.op == "Equal")
        bounds = next((_first(e) for e in slices if e is not None and e.op == "Slice"), None)
    else:  # Loop(none, condition, kept, Gather(bounds, ..))
        bounds = next((_first(e) for e in inner.inputs[2:] if e is not None and e.op == "Gather"), None)
        numbers = (_number(e.inputs[1]) for e in inside(inner) if e.op == "Equal")
        number = next((n for n in numbers if n is not None), None)
        if number is None:
            return
        padding_idx = int(number)
    if bounds is None:
        return
    clipped = _clipped(weight)
    for mode in modes:
        for bag in _guesses(weight, indices, bounds, factors, mode, padding_idx):
            if clipped is not None:
                table, max_norm, norm_type = clipped
                attributes = dataclasses.replace(bag.attributes, max_norm=max_norm, norm_type=norm_type)
                whole = dataclasses.replace(bag, weight=table, attributes=attributes)
                for offsets, flat in itertools.product(_dynamo_offsets(bag), (True, False)):
                    yield whole, _as_dynamo(whole, offsets, clips_flat=flat)
            # Before torch 2.13 an index was compared with padding_idx as it is.
            for offsets, wraps in itertools.product(
                _dynamo_offsets(bag), (True,) if padding_idx is None else (True, False)
            ):
                yield bag, _as_dynamo(bag, offsets, wraps=wraps)


def _clipped(weight: Expression) -> tuple[Expression, float, float] | None:
    """The table, max_norm and norm_type of what torch's embedding_renorm may have made."""
    table, selected = _first(weight), weight.inputs[2] if weight.op == "ScatterND" and len(weight.inputs) == 3 else None
    over = _first(selected) if selected is not None and selected.op == "Where" else None
    if table is None or over is None or over.op != "Greater" or over.inputs[0] is None:
        return None
    norm, max_norm = over.inputs[0], _number(over.inputs[1])
    norm_type = {"ReduceL1": 1.0, "ReduceL2": 2.0}.get(norm.op)
    if max_norm is None or not max_norm >= 0 or norm_type is None:
        return None
    return table, float(max_norm), norm_type


def _as_clipped(bag: Bag, indices: Expression) -> Expression:
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


def _dynamo_offsets(bag: Bag) -> Iterator[Expression]:
    """The offsets; for indices [B, L] what the exporter computes, from the indices or the weights, in either order."""
    if bag.offsets is not None:
        yield bag.offsets
        return
    for matrix in (bag.indices, bag.per_sample_weights):
        if matrix is not None:
            rows, columns = (make("Squeeze", make("Shape", matrix, start=k, end=k + 1)) for k in (0, 1))
            for total in (make("Mul", columns, rows), make("Mul", rows, columns)):
                yield make("Range", constant(0), total, columns)


def _first(e: Expression | None) -> Expression | None:
    return e.inputs[0] if e is not None and e.inputs else None


def _number(e: Expression | None) -> int | float | bool | None:
    return None if e is None else e.constant()


def _is_scaled_gather(e: Expression) -> bool:
    if e.op != "Mul" or any(i is None for i in e.inputs):
        return False
    gather, scale = e.inputs
    return gather is not None and scale is not None and gather.op == "Gather" and scale.op == "Unsqueeze"


def _as_dynamo(bag: Bag, offsets: Expression, *, clips_flat: bool = True, wraps: bool = True) -> Expression:
    """How the exporter writes a bag.

    Args:
        clips_flat: the rows to clip are found by indices [B * L], and not by indices [B, L].
        wraps: an index below zero is compared with padding_idx as the row that it means.
    """
    indices = bag.indices if bag.offsets is not None else make("Reshape", bag.indices, [-1])
    last = bag.attributes.include_last_offset
    table = bag.weight if bag.attributes.max_norm is None else _as_clipped(bag, indices if clips_flat else bag.indices)
    padded = bag.attributes.padding_idx is not None
    indices_1d = indices if padded else make("Reshape", indices, [-1])
    weights = bag.per_sample_weights
    if weights is None:
        one = make("Expand", constant([1], np.float32), make("Shape", indices, start=0))
        weights = make("CastLike", one, table)
    elif bag.offsets is None:
        weights = make("Reshape", weights, [-1])
    rows = make("Mul", make("Gather", table, indices_1d), make("Unsqueeze", weights, [1]))
    rows = make("Cast", rows, to=int(ir.DataType.FLOAT))
    width = make("Shape", table, start=1)
    zeros = make("Expand", constant([0], np.float32), make("Concat", constant([1]), width, axis=0))
    write = functools.partial(_padded_rows, wraps=wraps) if padded else _plain_rows
    total = make("Reshape", make("Size", indices), [-1]) if padded else make("Shape", indices_1d)
    bags = make("Size", offsets)
    if last:
        bags = make("Sub", bags, 1)
        bounds = make("ScatterElements", offsets, [-1], total) if padded else offsets
    else:
        bounds = make("Concat", offsets, total, axis=0)

    def body(i: Expression, condition: Expression, rows_so_far: Expression, k: Expression) -> Sequence[Expression]:
        row = write(bag, indices, rows, bounds, bags, total, k, zeros)
        next_k = make("Add", k, 1)
        return make("Less", next_k, bags), make("SequenceInsert", rows_so_far, row), next_k

    empty = make("SequenceEmpty")
    looped = loop(None, make("Less", constant(0), bags), [empty, constant(0)], body)
    return make("Cast", make("ConcatFromSequence", looped, axis=0), to=int(bag.weight.type or ir.DataType.FLOAT))


def _reduce(mode: str, rows: Expression) -> Expression:
    return make(_REDUCE[mode], rows, [0])


def _select(condition: Expression, then: Expression, otherwise: Expression) -> Expression:
    return make("If", condition, then, otherwise)


def _plain_rows(
    bag: Bag,
    indices: Expression,
    rows: Expression,
    bounds: Expression,
    bags: Expression,
    total: Expression,
    k: Expression,
    zeros: Expression,
) -> Expression:
    at = make("Reshape", k, [-1])
    start = make("Slice", bounds, at, make("Add", at, 1))
    end = make("Slice", bounds, make("Add", at, 1), make("Add", at, 2))
    part = make("Slice", rows, start, end)
    is_last = make("Equal", k, make("Sub", bags, 1))
    mode = bag.attributes.mode
    if mode == "mean":
        number = make("Sub", make("Shape", indices, start=0, end=1), start)
        sums = _reduce("sum", part)
        mean = make("Div", sums, make("Cast", number, to=int(ir.DataType.FLOAT)))
        mean = _select(make("Greater", number, constant(0)), mean, sums)
        pooled = _select(is_last, mean, _reduce("mean", part))
    elif mode == "max":
        pooled = _reduce("max", _select(is_last, make("Slice", rows, start, total), part))
    else:
        pooled = _reduce("sum", part)
    return _select(make("Equal", start, end), zeros, pooled)


def _padded_rows(
    bag: Bag,
    indices: Expression,
    rows: Expression,
    bounds: Expression,
    bags: Expression,
    total: Expression,
    k: Expression,
    zeros: Expression,
    *,
    wraps: bool,
) -> Expression:
    start, end = make("Gather", bounds, k), make("Gather", bounds, make("Add", k, 1))
    num_rows = make("Squeeze", make("Shape", bag.weight, start=0, end=1))  # the clipped table has as many
    padding_idx = constant(bag.attributes.padding_idx)

    def body(i: Expression, condition: Expression, kept: Expression, j: Expression) -> Sequence[Expression]:
        index = make("Gather", indices, j)
        row = _select(make("Less", index, _zero(index)), make("Add", index, num_rows), index) if wraps else index
        keep = make("Not", make("Equal", row, padding_idx))
        longer = make("Concat", kept, make("Reshape", j, [-1]), axis=0)
        next_j = make("Add", j, 1)
        return make("Less", next_j, end), _select(keep, longer, kept), next_j

    nothing = make("Shape", indices, start=0, end=0)
    kept = loop(None, make("Less", start, end), [nothing, start], body)
    is_empty = make("Equal", make("Size", kept), constant(0))
    return _select(is_empty, zeros, _reduce(bag.attributes.mode, make("Gather", rows, kept)))


def _zero(like: Expression) -> Expression:
    return make("CastLike", constant(0), like)


# ---- ATen nodes.

_ATEN_INPUTS = (
    *("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)


def aten(node: ir.Node, inputs: Sequence[Expression | None]) -> tuple[Bag | None, str | None]:
    """An ATen node whose ``operator`` is embedding_bag: the bag, or why it is none.

    torch wrote mode, include_last_offset and padding_idx as attributes, and ONNX Runtime's training took ATen's whole
    list of arguments as inputs; both are read, and a padding_idx of -1 means none, as in ATen.
    """
    given = dict(zip(_ATEN_INPUTS, inputs, strict=False))
    if len(inputs) > len(_ATEN_INPUTS):
        return None, f"it has {len(inputs)} inputs, expected at most {len(_ATEN_INPUTS)}"
    if any(given.get(name) is None for name in ("weight", "indices", "offsets")):
        return None, "it lacks one of weight, indices and offsets"
    settings: dict[str, int] = {}
    for name, default in (("mode", 0), ("include_last_offset", 0), ("padding_idx", -1)):
        written = given.get(name)
        attribute = node.attributes.get(name)
        if written is not None:
            value = written.constant()
            if value is None:
                return None, f"its {name} is not constant"
        else:
            value = default if attribute is None else attribute.value
        if not isinstance(value, int):
            return None, f"its {name} is {value!r}, expected an integer"
        settings[name] = int(value)
    if settings["mode"] not in range(len(spec.MODES)):
        return None, f"its mode is {settings['mode']}, expected 0 (sum), 1 (mean) or 2 (max)"
    if settings["padding_idx"] < -1:
        return None, f"its padding_idx is {settings['padding_idx']}"
    attributes = spec.Attributes(
        spec.MODES[settings["mode"]],
        padding_idx=None if settings["padding_idx"] == -1 else settings["padding_idx"],
        include_last_offset=bool(settings["include_last_offset"]),
    )
    weight, indices = given["weight"], given["indices"]
    assert weight is not None
    assert indices is not None
    return Bag(weight, indices, given["offsets"], given.get("per_sample_weights"), attributes), None


# ---- Gather and a reduction.


class GatherReduce:
    """Rows gathered by indices [B, L] and reduced over L: the model is no export of a bag, and keeps its own meaning.

    Plain, in every mode; times a weight per index, in mode sum; and with rows that are selected away by their index
    (Where, or a mask to multiply with), in mode sum, which makes the index a padding_idx. A mask multiplies: zero
    times infinity is NaN. Only where the padded row is known to be finite is skipping it the same; elsewhere the
    mask is taken as weights. Such a sum divided by the number of rows that are left, with at least a number above zero
    and up to one in its place, is a mean. A mean or maximum over no columns is no row of zeros, so L must be known to
    be above zero, or be said to be.

    An index of -1 is legal for Gather and means the last row; a bag refuses it.

    Args:
        assume_nonempty: L is above zero, though the model does not say so.
    """

    def __init__(self, *, assume_nonempty: bool = False) -> None:
        self._assume_nonempty = assume_nonempty

    def __call__(self, root: Expression) -> Iterator[Guess]:
        if root.op == "Div":
            yield from self._masked_mean(root)
        if root.op not in _REDUCTIONS or len(root.inputs) != 2:
            return
        rows, axes = root.inputs
        if rows is None or axes is None:
            return
        mode, mask, factors = _REDUCTIONS[root.op], None, None
        gather: Expression | None = rows
        if rows.op == "Mul":
            gather, factors = _factors(rows)
        elif rows.op == "Where":
            gather, mask = _selected(rows)
        if gather is None or gather.op != "Gather" or gather.attributes.get("axis") != 0:
            return
        weight, indices = gather.inputs
        if weight is None or indices is None or weight.rank != 2 or indices.rank != 2 or weight.type not in _FLOATS:
            return
        bag = Bag(weight, indices, None, None, spec.Attributes(mode), keepdims=bool(root.attributes["keepdims"]))
        if axes.constant() not in (1, -2):
            yield bag, f"{root.op} goes over {_axes_name(axes)}, not over the rows of a bag, axis 1"
        elif _has_negatives(indices):
            yield bag, "its indices have numbers below zero by construction, which count from the end"
        elif rows.op == "Gather":
            yield bag, self._objection(bag) or root
        elif mode != "sum":
            yield bag, f"{root.op} over rows that a {rows.op} has changed is no {mode} of rows"
        elif rows.op == "Where":
            yield self._padded(bag, mask, root)
        else:
            yield self._weighted(bag, factors, root)

    def _masked_mean(self, root: Expression) -> Iterator[Guess]:
        """A sum over rows that are not padded, over their number. The number stands in the mask's own type."""
        sums, number = root.inputs
        counted = _at_least(number)
        if sums is None or sums.op != "ReduceSum" or counted is None or counted.op != "ReduceSum":
            return
        for bag, written in self(sums):
            padded = bag.attributes.padding_idx
            if written is not sums or padded is None:
                reason = "the rows are not known to be those that are left without one index, or finite without"
                yield bag, f"it divides a sum by a number, but {reason}"
                return
            mask = make("Equal", bag.indices, make("CastLike", constant(padded), bag.indices))
            kept = make("Cast", make("Not", mask), to=int(bag.weight.type or ir.DataType.FLOAT))
            # Counts are exact in float32 up to 2 ** 24, in 16 bits only up to a few hundreds.
            if bag.weight.type not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                yield bag, "it counts rows in 16 bits, where a bag counts exactly"
                return
            shaped = make("Unsqueeze", kept, [-1])
            if bag.keepdims:
                ways = [make("ReduceSum", shaped, axes, keepdims=1) for axes in ([1], [-2])]
            else:
                ways = [make("ReduceSum", shaped, axes, keepdims=0) for axes in ([1], [-2])]
                ways += [make("ReduceSum", kept, axes, keepdims=1) for axes in ([1], [-1])]
            parted = [difference(counted, way) for way in ways]
            attributes = dataclasses.replace(bag.attributes, mode="mean")
            mean = dataclasses.replace(bag, attributes=attributes)
            yield mean, root if None in parted else "it divides by something else than the number of rows that are left"

    def _objection(self, bag: Bag) -> str | None:
        length = bag.indices.dims[1] if bag.indices.dims else None
        if bag.attributes.mode == "sum" or self._assume_nonempty or (isinstance(length, int) and length > 0):
            return None
        what = "NaN" if bag.attributes.mode == "mean" else "an error or -inf"
        known = "unknown" if length is None else repr(length)
        return (
            f"the length of the bags is {known}: a {bag.attributes.mode} over no columns is {what} to the model, and "
            "zeros to a bag; assume_nonempty takes it for above 0"
        )

    def _padded(self, bag: Bag, mask: Expression | None, root: Expression) -> Guess:
        padded = _padded_index(mask, bag.indices)
        if padded is None:
            return bag, "the Where selects rows by something else than one index"
        return self._with_padding(bag, padded), root

    def _weighted(self, bag: Bag, scale: Expression | None, root: Expression) -> Guess:
        factors = None
        if scale is not None and scale.op == "Unsqueeze" and scale.inputs[1] is not None:
            factors = scale.inputs[0] if scale.inputs[1].constant() in (2, -1) else None
        if factors is None:
            return bag, "the rows are multiplied with something else than a number for each index"
        found = dataclasses.replace(bag, per_sample_weights=factors)
        mask = _first(factors) if factors.op == "Cast" else None
        padded = None if mask is None or mask.op != "Not" else _padded_index(_first(mask), bag.indices)
        if padded is None and not _same_shape(factors, bag.indices):
            return found, "the rows are multiplied with numbers whose shape is not known to be that of the indices"
        if padded is not None and _finite_row(bag.weight, padded):
            found = self._with_padding(bag, padded)
        return found, root

    def _with_padding(self, bag: Bag, padded: int) -> Bag:
        return dataclasses.replace(bag, attributes=dataclasses.replace(bag.attributes, padding_idx=padded))


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


def _at_least(number: Expression | None) -> Expression | None:
    """What is counted in ``Max(count, c)`` or ``Clip(count, c)``, for 0 < c <= 1: all that changes is 0."""
    if number is None or number.op not in ("Max", "Clip") or len(number.inputs) < 2:
        return None
    if any(i is not None for i in number.inputs[2:]):
        return None
    for count, least in (number.inputs[:2], number.inputs[1::-1]):
        value = _number(least)
        if value is not None and 0 < value <= 1 and least is not None and least.array is not None:
            return count if least.array.ndim <= 1 else None
        if number.op == "Clip":
            return None
    return None


def _axes_name(axes: Expression) -> str:
    return "axes that are computed" if axes.array is None else f"axes {axes.array.reshape(-1).tolist()}"


def _factors(rows: Expression) -> tuple[Expression | None, Expression | None]:
    """The Gather and the other factor of a product."""
    one, other = rows.inputs
    return (one, other) if one is not None and one.op == "Gather" else (other, one)


def _selected(rows: Expression) -> tuple[Expression | None, Expression | None]:
    """The Gather of a Where against zeros, and what is true for the rows that go; None for something else."""
    if len(rows.inputs) != 3:
        return None, None
    condition, then, otherwise = rows.inputs
    if condition is None or then is None or otherwise is None or condition.op != "Unsqueeze":
        return next((e for e in rows.inputs if e is not None and e.op == "Gather"), None), None
    if condition.inputs[1] is None or condition.inputs[1].constant() not in (2, -1):
        return next((e for e in rows.inputs if e is not None and e.op == "Gather"), None), None
    mask = condition.inputs[0]
    if _is_zero(then):
        return otherwise, mask
    if _is_zero(otherwise) and mask is not None:
        return then, mask.inputs[0] if mask.op == "Not" else None
    return (then if then.op == "Gather" else otherwise), None


def _is_zero(e: Expression) -> bool:
    """Whether a Where over [B, L, D] takes zeros from this, and no further dimension."""
    return e.array is not None and e.array.ndim <= 3 and e.constant() == 0


def _padded_index(mask: Expression | None, indices: Expression) -> int | None:
    """``p`` where ``mask`` is ``indices == p``."""
    if mask is None or mask.op != "Equal" or len(mask.inputs) != 2:
        return None
    for side, other in (mask.inputs, mask.inputs[::-1]):
        if side is not None and other is not None and difference(side, indices) is None:
            value = other.constant() if other.array is not None and other.array.ndim <= 2 else None
            return int(value) if value is not None and value >= 0 else None
    return None


def _finite_row(weight: Expression, row: int) -> bool:
    """Whether a row of a constant table is known, and finite. Of external data, which is mapped, no more is read."""
    value = weight.value
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    if isinstance(value.const_value, ir.ExternalTensor) and not os.path.isfile(value.const_value.path):
        return False
    table = value.const_value.numpy()
    return row < len(table) and bool(np.isfinite(table[row].astype(np.float64)).all())


# ---- Our own standard form.


#: How many expressions of a graph are looked at for the parts of one bag.
_LARGEST_BAG = 2000


class _Table(NamedTuple):
    """A table of rows; of codes with numbers beside them, ``rows`` is the scale."""

    rows: Expression
    codes: Expression | None = None
    second: tuple[str, Expression] | None = None
    codes_type: str = ""
    dim: int = 0


class Standard:
    """The nodes that `ops.embedding_bag.lowering` writes for a bag, in each way: what ``lower`` did is undone, exactly.

    Args:
        opset: the model's; the lowering depends on it.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset

    def __call__(self, root: Expression) -> Iterator[Guess]:
        way = _way_of(root)
        if not spec.MIN_OPSET <= self._opset <= spec.MAX_OPSET or way is None:
            return
        parts = list(inside(root, _LARGEST_BAG))
        ragged = Ragged(
            way, next((n for p in parts if (n := _limit(p)) is not None), None) if way == "padded" else None
        )
        indices = next((e for p in parts if (e := self._guarded(p)) is not None), None)
        for table in self._tables(parts):
            if indices is None:
                return
            flat = _without_cast(indices)
            weights = next((e for p in parts if (e := _extended(p, table.rows)) is not None), None)
            mean = any(e.op == "Div" for e in (root, _first(root)) if e is not None)
            # A maximum looks for NaN, which ReduceMax would lose.
            modes = ("mean",) if mean else ("max",) if any(e.op == "IsNaN" for e in parts) else ("sum",)
            for inputs in self._inputs(parts, flat, weights):
                for attributes in self._attributes(parts, modes, two_d=inputs[1] is None):
                    bag = self._bag(table, inputs, attributes)
                    if bag.objection() is None:
                        yield bag, self._written(bag, ragged)

    def _tables(self, parts: list[Expression]) -> Iterator[_Table]:
        """What the table may be."""
        tables = [e.inputs[0] for e in parts if e.op == "Gather" and e.inputs[0] is not None and e.inputs[0].rank == 2]
        weight = next((t for t in tables if t.type in _FLOATS and t.op in ("Value", "Constant")), None)
        weight = weight or next((t for t in tables if t.type in _FLOATS), None)
        if weight is not None:
            yield _Table(weight)

    def _bag(
        self,
        table: _Table,
        inputs: tuple[Expression, Expression | None, Expression | None],
        attributes: spec.Attributes,
    ) -> Bag:
        return Bag(table.rows, *inputs, attributes)

    def _inputs(
        self, parts: list[Expression], flat: Expression, weights: Expression | None
    ) -> Iterator[tuple[Expression, Expression | None, Expression | None]]:
        """Indices, offsets and per_sample_weights, for indices [B, L] and for flat ones."""
        matrix = _first(flat) if flat.op == "Reshape" else None
        if matrix is not None and matrix.rank == 2:
            yield matrix, None, _first(weights) if weights is not None and weights.op == "Reshape" else weights
        shape = make("Shape", flat)
        pairs = [p.inputs for p in parts if p.op == "Concat" and len(p.inputs) == 2]
        starts = [e for e, end in pairs if e is not None and difference(end, shape) is None]
        if starts:  # of several, all but the offsets are computed from the offsets
            offsets = min(starts, key=lambda e: sum(1 for _ in inside(e, _LARGEST_BAG)))
            yield flat, _without_cast(offsets), weights

    def _guarded(self, e: Expression) -> Expression | None:
        """The indices behind what stands in for a refusal of negative ones."""
        if e.op == "BitwiseAnd" and e.inputs[1] is not None and e.inputs[1].constant() == _INT64_MAX:
            return e.inputs[0]
        if e.op == "Where" and e.inputs[0] is not None and e.inputs[0].op == "Less" and e.inputs[2] is not None:
            less = e.inputs[0]
            is_zero = less.inputs[1] is not None and less.inputs[1].constant() == 0
            return e.inputs[2] if is_zero and less.inputs[0] is e.inputs[2] else None
        return None

    def _attributes(self, parts: list[Expression], modes: Sequence[str], *, two_d: bool) -> Iterator[spec.Attributes]:
        """What may have been written, the most particular first."""
        paddings = {None, *(v for p in parts if p.op == "Equal" for v in _paddings(p))}
        clips = list(dict.fromkeys((None, *(_clip(p) for p in parts if p.op == "Greater"))))
        for mode, last in itertools.product(modes, (False,) if two_d else (False, True)):
            for padding_idx in sorted(paddings, key=lambda p: (p is None, p or 0)):
                for clip in reversed(clips):
                    max_norm, norm_type = clip or (None, 2.0)
                    yield spec.Attributes(mode, padding_idx, max_norm, norm_type, last)

    def _written(self, bag: Bag, ragged: Ragged) -> Expression:
        graph = _lowered(bag.op.name, tuple(bag.to_onnx().items()), self._opset, ragged)
        reader = Reader()
        reader.of.update(zip(graph.inputs, bag.inputs.values(), strict=True))
        reader.read(graph)
        return reader.of[graph.outputs[0]]


@functools.lru_cache(maxsize=64)  # the bags of a model are often alike
def _lowered(name: str, attributes: tuple[tuple[str, int | float], ...], opset: int, ragged: Ragged) -> ir.Graph:
    """The nodes of a bag in the standard form. Only to be read."""
    operator = OPERATOR_OF[name]
    op = operator.spec.VARIANTS[name]
    inputs = op.inputs
    nodes = operator.lowering.nodes(op, inputs, ("output",), dict(attributes), opset, "_", ragged)
    return ir.serde.deserialize_graph(
        onnx.helper.make_graph(nodes, "bag", [_untyped(i) for i in inputs], [_untyped("output")])
    )


#: How a number per row is put to the codes: the operator's node, and the number's name.
_SECOND = {"Mul": "scale", "Sub": "zero_point", "Add": "bias"}


def _row_numbers(e: Expression) -> Expression | None:
    """The numbers [V] behind the second operand, a column of theirs at the rows that are read."""
    column = e.inputs[1] if len(e.inputs) == 2 else None
    inner = _first(column) if column is not None and column.op == "Unsqueeze" else None
    gather = None if inner is None else _without_cast(inner)
    numbers = _first(gather) if gather is not None and gather.op == "Gather" else None
    return numbers if numbers is not None and numbers.rank == 1 and numbers.type in _SCALES else None


class QuantizedStandard(Standard):
    """The same for bags over codes, as `ops.quantized_embedding_bag.lowering` writes them.

    The number of columns must be known: codes of 4 bits do not tell it, nor does a table that is an input.
    """

    def _tables(self, parts: list[Expression]) -> Iterator[_Table]:
        gathered = [e.inputs[0] for e in parts if e.op == "Gather" and e.inputs[0] is not None]
        kinds = {ir.DataType.INT8: ("int8",), ir.DataType.UINT8: ("uint8", "int4", "uint4")}
        codes = next((t for t in gathered if t.rank == 2 and t.type in kinds), None)
        if codes is None or codes.type is None or codes.dims is None:
            return
        columns = codes.dims[1]
        if not isinstance(columns, int):
            return
        columns_of = {op: [c for e in parts if e.op == op and (c := _row_numbers(e)) is not None] for op in _SECOND}
        scale = next((c for c in columns_of["Mul"] if _extended(c, c) is None), None)  # and no weights
        if scale is None:
            return
        second = next(((_SECOND[op], found[0]) for op, found in columns_of.items() if op != "Mul" and found), None)
        if not any(e.op == "Floor" for e in parts):  # which halves of bytes are taken apart with
            yield _Table(scale, codes, second, kinds[codes.type][0], columns)
            return
        conditions = [e.inputs[0] for e in parts if e.op == "Where"]
        signed = [bool(c.constant()) for c in conditions if c is not None and c.array is not None]
        ends = [_number(e.inputs[2]) for e in parts if e.op == "Slice" and len(e.inputs) == 4]
        for name, dim in itertools.product(("int4", "uint4"), (2 * columns, 2 * columns - 1)):
            if (name == "int4") in signed and dim in ends:
                yield _Table(scale, codes, second, name, dim)

    def _bag(
        self,
        table: _Table,
        inputs: tuple[Expression, Expression | None, Expression | None],
        attributes: spec.Attributes,
    ) -> Bag:
        fields = {f.name: getattr(attributes, f.name) for f in dataclasses.fields(attributes)}
        meaning = quantized_embedding_bag.spec.Attributes(
            **fields, codes_type=table.codes_type, embedding_dim=table.dim
        )
        assert table.codes is not None
        return QuantizedBag(table.rows, *inputs, meaning, codes=table.codes, second=table.second)


def _untyped(name: str) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name)


def _way_of(root: Expression) -> str | None:
    """How a bag may have been lowered: Cast? Div? and then the rows of three rounds, of a Loop, or of all bags."""
    e = root
    if e.op == "Cast" and e.inputs[0] is not None:
        e = e.inputs[0]
    if e.op == "Div" and e.inputs[0] is not None:
        e = e.inputs[0]
    rows = _first(e)
    if e.op == "Gather" and rows is not None and rows.op == "Concat":
        return {4: "blocks", 3: "padded"}.get(len(rows.inputs))
    if e.op == "Where" and len(e.inputs) == 3 and e.inputs[1] is not None:  # a maximum
        e, rows = e.inputs[1], _first(e.inputs[1])
    looped = _first(rows)
    if e.op == "Slice" and rows is not None and rows.op == "Reshape" and looped is not None and looped.op == "Loop":
        return "loop"
    return None


def _limit(e: Expression) -> int | None:
    """What the lengths of bags are compared with."""
    lengths = _first(e)
    limit = _number(e.inputs[1]) if e.op == "Greater" and lengths is not None and lengths.op == "Sub" else None
    return limit if isinstance(limit, int) and 1 <= limit <= LONGEST_BAG else None


def _without_cast(e: Expression) -> Expression:
    return e.inputs[0] if e.op == "Cast" and e.inputs[0] is not None else e


def _extended(e: Expression, weight: Expression) -> Expression | None:
    """per_sample_weights of ``Concat(Cast(Reshape(weights)), Expand(0))``."""
    if e.op != "Concat" or len(e.inputs) != 2 or e.attributes["axis"] != 0:
        return None
    body, extra = e.inputs
    if body is None or extra is None or extra.op not in ("Expand", "Constant") or body.dtype not in _FLOATS:
        return None
    found = _without_cast(body) if body.dtype != weight.dtype else body
    return found if found.dtype == weight.dtype and found.rank == 1 else None


def _paddings(equal: Expression) -> Iterator[int]:
    """The values of padding_idx that a comparison of indices may have been made from."""
    side = equal.inputs[1]
    for e in inside(side, 20):
        for part in (e, *e.folded):
            value = part.constant()
            if part.dtype == ir.DataType.INT64 and isinstance(value, int) and abs(value) < _INT64_MAX:
                yield value


def _clip(greater: Expression) -> tuple[float, float] | None:
    """max_norm and norm_type, from the comparison of a norm with its limit."""
    norm, limit = greater.inputs
    if limit is None or norm is None:
        return None
    max_norm = _sum_of_parts(limit)
    if max_norm is None:
        return None
    if norm.op == "ReduceMax":
        return max_norm, math.inf
    if norm.op != "Pow" or norm.inputs[0] is None or _first(norm.inputs[0]) is None:
        return None
    power = _first(norm.inputs[0])
    p = power.inputs[1] if power is not None and power.op == "Pow" else None
    norm_type = None if p is None else _sum_of_parts(p)
    return None if norm_type is None else (max_norm, norm_type)


def _sum_of_parts(e: Expression) -> float | None:
    """A number that was written as two FLOAT attributes and added up."""
    waiting, parts = [e], []
    while waiting:
        found = waiting.pop()
        sources = [s for s in found.folded if s is not None] or [i for i in found.inputs if i is not None]
        if found.dtype == ir.DataType.FLOAT and found.array is not None and not found.folded:
            parts.append(float(found.array.reshape(-1)[0]))
        elif found.op in ("Add", "Cast", "Constant") and sources:
            waiting += sources
        else:
            return None
    return sum(parts) if len(parts) in (1, 2) else None


def _same_shape(a: Expression, b: Expression) -> bool:
    """Whether the dimensions are known to be equal."""
    if a.dims is None or b.dims is None or len(a.dims) != len(b.dims):
        return False
    return all(x is not None and x == y for x, y in zip(a.dims, b.dims, strict=True))
