"""Our own standard form: what `lower` wrote is undone, and what a tool made of our functions by inlining them.

The present lowering writes out the bag that was guessed, and the graph must be equal to that. So a lowered model is
recognised by the release that wrote it, and by any later release whose lowering did not change: what was written
before there were pieces is `Ragged("blocks")`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import onnx
import onnx_ir as ir

from lucid_onnx.graph import node_lists_of
from lucid_onnx.ops import OPERATOR_OF, quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import LONGEST_BAG, Ragged
from lucid_onnx.ops.emit import Fact
from lucid_onnx.rewrite.expressions import Expression, difference, first_input, input_of, number, subexpressions
from lucid_onnx.rewrite.normal_form import INT64_MAX, make
from lucid_onnx.rewrite.reader import Reader

from .bag import FLOATS, SCALES, Bag, Guess, QuantizedBag
from .shared import without_cast

_T = TypeVar("_T")
#: How many expressions of a graph are looked at for the parts of one bag.
_LARGEST_BAG = 2000
#: The types of quantized tables, and their names.
_CODES = {ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8"}


class _Table(NamedTuple):
    """A table of rows; of a quantized table ``rows`` is the scale."""

    rows: Expression
    codes: Expression | None = None
    second: tuple[str, Expression] | None = None
    codes_type: str = ""
    dim: int = 0


class _Inputs(NamedTuple):
    """The other inputs of a bag."""

    indices: Expression
    offsets: Expression | None
    weights: Expression | None


class Lowered:
    """A bag as `ops.embedding_bag.lowering` writes it, in each way of `Ragged`.

    Args:
        opset: the model's; the lowering depends on it.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset
        # Most nodes that are tried are parts of one bag, and the same bag is guessed for each.
        self._written = functools.lru_cache(maxsize=64)(self._read)

    def __call__(self, root: Expression) -> Iterator[Guess]:
        way = _way_of(root)
        if not spec.MIN_OPSET <= self._opset <= spec.MAX_OPSET or way is None:
            return
        parts = list(subexpressions(root, _LARGEST_BAG))
        longest = _first_found(_longest_bag(p) for p in parts) if way == "padded" else None
        ragged = Ragged(way, longest)
        indices = _first_found(_guarded(p) for p in parts)
        if indices is None:
            return
        for table in self._tables(parts):
            flat = without_cast(indices)
            if way == "pieces":
                weights = _first_found(_of_positions(p, table.rows) for p in parts)
                found = [_Inputs(flat, None, weights)] if flat.rank == 2 else []
            else:
                weights = _first_found(_extended(p, table.rows) for p in parts)
                found = list(_inputs(parts, flat, weights))
            for inputs in found:
                if way == "padded" and longest is None and inputs.offsets is not None:
                    continue  # nothing tells how far flat bags are padded
                guesses = (
                    self._bag(table, inputs, attributes)
                    for mode in _modes(root, parts)
                    for attributes in _attributes(parts, mode, inputs)
                )
                bags = [bag for bag in guesses if bag.why_invalid() is None]
                writers: tuple[_Writer, ...] = (*_lowered_for(inputs.indices), _inlined)
                guessed = itertools.product(writers, bags)
                for write, bag in sorted(guessed, key=lambda g: g[1].attributes.max_norm is None):  # the likely first
                    written = bag.op.name, tuple(bag.to_onnx().items()), ragged, write
                    yield bag, self._written(*written, *bag.inputs.values())

    def _tables(self, parts: list[Expression]) -> Iterator[_Table]:
        """What the table may be."""
        tables = [e.inputs[0] for e in parts if e.op == "Gather" and e.inputs[0] is not None and e.inputs[0].rank == 2]
        weight = next((t for t in tables if t.type in FLOATS and t.op in ("Value", "Constant")), None)
        if weight is None and not any(t.type in _CODES for t in tables):  # else the rows of a quantized table
            weight = next((t for t in tables if t.type in FLOATS), None)
        if weight is not None:
            yield _Table(weight)

    def _bag(self, table: _Table, inputs: _Inputs, attributes: spec.Attributes) -> Bag:
        return Bag(table.rows, *inputs, attributes)

    def _read(
        self,
        name: str,
        attributes: tuple[tuple[str, int | float], ...],
        ragged: Ragged,
        write: _Writer,
        *inputs: Expression,
    ) -> Expression:
        """The value of such a bag, as it is written."""
        graph = write(name, attributes, self._opset, ragged)
        reader = Reader()
        reader.of.update(zip(graph.inputs, inputs, strict=True))
        reader.read(graph)
        return reader.of[graph.outputs[0]]


def _lowered_for(indices: Expression) -> Iterator[_Writer]:
    """How a bag may have been lowered: with what is known of its indices [B, L] now, and without."""
    dims = tuple(d if isinstance(d, int) else None for d in indices.dims or ())
    if len(dims) == 2 and any(d is not None for d in dims):
        yield _lowered_of(dims)
    yield _lowered


@functools.lru_cache(maxsize=64)  # one for one: what a bag is written by is compared
def _lowered_of(dims: tuple[int | None, ...]) -> _Writer:
    return functools.partial(_lowered, dims=dims)


@functools.lru_cache(maxsize=64)  # the bags of a model are often alike
def _lowered(
    name: str,
    attributes: tuple[tuple[str, int | float], ...],
    opset: int,
    ragged: Ragged,
    dims: tuple[int | None, ...] | None = None,
) -> ir.Graph:
    """The nodes of a bag in the standard form. Only to be read."""
    operator = OPERATOR_OF[name]
    op = operator.spec.VARIANTS[name]
    facts = {"indices": Fact(dims=dims)}
    return _graph(op, operator.lowering.nodes(op, op.inputs, ("output",), dict(attributes), opset, "_", ragged, facts))


@functools.lru_cache(maxsize=64)
def _inlined(name: str, attributes: tuple[tuple[str, int | float], ...], opset: int, ragged: Ragged) -> ir.Graph:
    """The nodes of a bag's function where a tool has put them in the place of a node. Only to be read."""
    operator = OPERATOR_OF[name]
    op = operator.spec.VARIANTS[name]
    nodes = operator.lowering.function(op, opset, ragged).node
    given = dict(attributes)
    for inner in node_lists_of(nodes):
        for node in inner:
            for attribute in node.attribute:
                if attribute.ref_attr_name:
                    value = onnx.helper.make_attribute(attribute.name, given[attribute.ref_attr_name])
                    attribute.CopyFrom(value)
    return _graph(op, nodes)


def _graph(op: Any, nodes: Sequence[onnx.NodeProto]) -> ir.Graph:
    values = [onnx.ValueInfoProto(name=i) for i in (*op.inputs, "output")]
    return ir.serde.deserialize_graph(onnx.helper.make_graph(nodes, "bag", values[:-1], values[-1:]))


#: Writes the nodes of a bag: by its name, attributes, opset and way.
_Writer = Callable[[str, "tuple[tuple[str, int | float], ...]", int, Ragged], ir.Graph]


# ---- The parts of a bag.


#: The last node of bags in pieces.
_POOLS = ("ReduceSum", "ReduceMax", "If", "Expand")


def _way_of(root: Expression) -> str | None:
    """How a bag may have been lowered: Cast? Div? Slice? and then the rows of three rounds, a Loop, or all bags.

    In pieces, a reduction of all rows, or an If that chooses one.
    """
    e = without_cast(root)
    e = without_cast(input_of(e, "Div") or e)
    rows = first_input(e)
    rows = None if rows is None else without_cast(rows)
    if e.op == "Slice" and rows is not None and rows.op in ("Gather", "Slice", *_POOLS):  # without a column of weights
        e, rows = rows, first_input(rows)
    if e.op == "Gather" and rows is not None and rows.op == "Concat":
        return {4: "blocks", 3: "padded"}.get(len(rows.inputs))
    if e.op == "Where" and len(e.inputs) == 3 and e.inputs[1] is not None:  # a maximum
        outer, e, rows = e, e.inputs[1], first_input(e.inputs[1])
        if e.op == "Where" or e.array is not None:  # NaN, where a row has one
            e = (e if e.op == "Where" else outer).inputs[2] or e
    if e.op in _POOLS:
        return "pieces"
    looped = input_of(rows, "Reshape")
    return "loop" if e.op == "Slice" and looped is not None and looped.op == "Loop" else None


def _first_found(found: Iterator[_T | None]) -> _T | None:
    return next((f for f in found if f is not None), None)


def _longest_bag(e: Expression) -> int | None:
    """What the lengths of bags are compared with."""
    lengths = input_of(e, "Greater")
    limit = number(e.inputs[1]) if lengths is not None and lengths.op == "Sub" else None
    return limit if isinstance(limit, int) and 1 <= limit <= LONGEST_BAG else None


def _guarded(e: Expression) -> Expression | None:
    """``indices`` of ``Where(Less(indices, 0), .., indices)``, which makes negative ones invalid."""
    less = input_of(e, "Where")
    if less is None or less.op != "Less" or e.inputs[2] is None or number(less.inputs[1]) != 0:
        return None
    return e.inputs[2] if less.inputs[0] is e.inputs[2] else None


def _extended(e: Expression, weight: Expression) -> Expression | None:
    """per_sample_weights of ``Concat(Cast(Reshape(weights)), Expand(0))``."""
    if e.op != "Concat" or len(e.inputs) != 2 or e.attributes["axis"] != 0:
        return None
    body, extra = e.inputs
    if body is None or extra is None or extra.op not in ("Expand", "Constant") or body.dtype not in FLOATS:
        return None
    found = without_cast(body) if body.dtype != weight.dtype else body
    return found if found.dtype == weight.dtype and found.rank == 1 else None


def _of_positions(e: Expression, weight: Expression) -> Expression | None:
    """per_sample_weights [B, L], which rows are multiplied with: as they are or turned, cut, and as a column."""
    found = input_of(e.inputs[1], "Unsqueeze") if e.op == "Mul" and len(e.inputs) == 2 else None
    while found is not None and found.op in ("If", "Reshape", "Slice", "Transpose"):
        found = found.inputs[1] if found.op == "If" else first_input(found)
    if found is None or found.dtype not in FLOATS:
        return None
    found = without_cast(found) if found.dtype != weight.dtype else found
    return found if found.dtype == weight.dtype and found.rank == 2 and not _is_row_of(found, weight) else None


def _is_row_of(e: Expression, numbers: Expression) -> bool:
    """Whether ``e`` is numbers of a table's rows, such as the scales of quantized ones."""
    return e.op == "Gather" and e.inputs[0] is numbers


def _inputs(parts: list[Expression], flat: Expression, weights: Expression | None) -> Iterator[_Inputs]:
    """The other inputs, for indices [B, L] and for flat ones."""
    matrix = input_of(flat, "Reshape")
    if matrix is not None and matrix.rank == 2:
        yield _Inputs(
            matrix, None, first_input(weights) if weights is not None and weights.op == "Reshape" else weights
        )
    shape = make("Shape", flat)
    pairs = [p.inputs for p in parts if p.op == "Concat" and len(p.inputs) == 2]
    starts = [e for e, end in pairs if e is not None and difference(end, shape) is None]
    if starts:  # of several, all but the offsets are computed from the offsets
        offsets = min(starts, key=lambda e: sum(1 for _ in subexpressions(e, _LARGEST_BAG)))
        yield _Inputs(flat, without_cast(offsets), weights)


def _modes(root: Expression, parts: list[Expression]) -> tuple[str, ...]:
    """What the mode may be."""
    quotient = next((e for e in (root, first_input(root)) if e is not None and e.op == "Div"), None)
    if quotient is not None:
        is_root = _is_root(quotient.inputs[1])
        return ("mean", "sqrtn") if is_root is None else ("sqrtn",) if is_root else ("mean",)
    # A maximum looks for NaN, which ReduceMax would lose.
    return ("max",) if any(e.op == "IsNaN" and not _is_of_norm(e) for e in parts) else ("sum",)


def _is_root(divisor: Expression | None) -> bool | None:
    """Whether a square root is divided by; None for a constant, of which that is not known."""
    while divisor is not None and divisor.op in ("Cast", "Unsqueeze", "Where"):
        which = number(divisor.inputs[0]) if divisor.op == "Where" else None
        if divisor.op == "Where" and which is None:
            break
        divisor = divisor.inputs[0 if which is None else 1 if which else 2]  # of what an inlined function decides
    return None if divisor is None or divisor.array is not None else divisor.op == "Sqrt"


def _is_of_norm(e: Expression) -> bool:
    """Whether ``e`` is the ``IsNaN(Concat(Abs(rows), zeros))`` of an infinity norm."""
    inside = first_input(e)
    magnitudes = None if inside is None or inside.op != "Concat" else first_input(inside)
    return magnitudes is not None and magnitudes.op == "Abs"


def _attributes(parts: list[Expression], mode: str, inputs: _Inputs) -> Iterator[spec.Attributes]:
    """What may have been written, the most particular first."""
    paddings = {None, *(v for p in parts if p.op == "Equal" for v in _paddings(p))}
    clips = list(dict.fromkeys((None, *(_clip(p) for p in parts if p.op == "Greater"))))
    lasts = (False,) if inputs.offsets is None else (False, True)
    ordered = sorted(paddings, key=lambda p: (p is None, p or 0))
    divisors = (None,) if mode in ("sum", "max") or inputs.weights is None else get_args(spec.Divisor)
    for negative, divisor, last, padding_idx, clip in itertools.product(
        get_args(spec.Negative), divisors, lasts, ordered, reversed(clips)
    ):
        max_norm, norm_type = clip or (None, 2.0)
        yield spec.Attributes(mode, padding_idx, max_norm, norm_type, last, negative=negative, divisor=divisor)


def _paddings(equal: Expression) -> Iterator[int]:
    """The values of padding_idx that a comparison of indices may have been made from."""
    side = equal.inputs[1]
    for e in subexpressions(side, 20):
        for part in (e, *e.folded_from):
            value = number(part)
            if part.dtype == ir.DataType.INT64 and isinstance(value, int) and abs(value) < INT64_MAX:
                yield value


def _clip(greater: Expression) -> tuple[float, float] | None:
    """max_norm and norm_type, from the comparison of a norm with its limit."""
    norm, limit = greater.inputs
    if limit is None or norm is None:
        return None
    max_norm = _sum_of_parts(limit)
    if max_norm is None:
        return None
    if norm.op == "Where" and norm.inputs[-1] is not None:  # of a row with a NaN
        norm = norm.inputs[-1]
    if norm.op == "ReduceMax":
        return max_norm, math.inf
    power = first_input(input_of(norm, "Pow"))
    p = power.inputs[1] if power is not None and power.op == "Pow" else None
    norm_type = None if p is None else _sum_of_parts(p)
    return None if norm_type is None else (max_norm, norm_type)


def _sum_of_parts(e: Expression) -> float | None:
    """A number that was written as two FLOAT attributes and added up."""
    waiting, parts = [e], []
    while waiting:
        found = waiting.pop()
        sources = list(found.folded_from) or [i for i in found.inputs if i is not None]
        if found.dtype == ir.DataType.FLOAT and found.array is not None and not found.folded_from:
            parts.append(float(found.array.reshape(-1)[0]))
        elif found.op in ("Add", "Cast", "Constant") and sources:
            waiting += sources
        else:
            return None
    return sum(parts) if len(parts) in (1, 2) else None


# ---- Bags over quantized tables.

#: The operator that a number per row is applied to the quantized values with, and the number's name.
_NUMBERS = {"Mul": "scale", "Sub": "zero_point", "Add": "bias"}


class QuantizedLowered(Lowered):
    """A bag over a quantized table, as `ops.quantized_embedding_bag.lowering` writes it.

    The number of columns must be known: neither values of 4 bits tell it, nor a table that is an input.
    """

    def _tables(self, parts: list[Expression]) -> Iterator[_Table]:
        """What the table may be.

        1. Values of 8 bits, one in a byte.
        2. Values of 4 bits, two in a byte, which a Floor takes apart.
        """
        gathered = [e.inputs[0] for e in parts if e.op == "Gather" and e.inputs[0] is not None]
        codes = next((t for t in gathered if t.rank == 2 and t.type in _CODES), None)
        if codes is None or codes.type is None or codes.dims is None or not isinstance(codes.dims[1], int):
            return
        columns = codes.dims[1]
        per_row = {op: _row_numbers(parts, op) for op in _NUMBERS}
        scale = next((c for c in per_row["Mul"] if _extended(c, c) is None), None)  # and not weights
        if scale is None:
            return
        second = next(((_NUMBERS[op], found[0]) for op, found in per_row.items() if op != "Mul" and found), None)
        if not any(e.op == "Floor" for e in parts):  # 1
            yield _Table(scale, codes, second, _CODES[codes.type], columns)
        elif codes.type == ir.DataType.UINT8:  # 2
            signed = _signs(parts)
            ends = [number(e.inputs[2]) for e in parts if e.op == "Slice" and len(e.inputs) == 4]
            for name, dim in itertools.product(("int4", "uint4"), (2 * columns, 2 * columns - 1)):
                if (name == "int4") in signed and dim in ends:
                    yield _Table(scale, codes, second, name, dim)

    def _bag(self, table: _Table, inputs: _Inputs, attributes: spec.Attributes) -> Bag:
        fields = {f.name: getattr(attributes, f.name) for f in dataclasses.fields(attributes)}
        meaning = quantized_embedding_bag.spec.Attributes(
            **fields, codes_type=table.codes_type, embedding_dim=table.dim
        )
        assert table.codes is not None
        return QuantizedBag(table.rows, *inputs, meaning, codes=table.codes, second=table.second)


def _row_numbers(parts: list[Expression], op: str) -> list[Expression]:
    """The numbers [V] whose column, at the rows that are read, is the second operand of such a node."""
    found = []
    for e in parts:
        column = e.inputs[1] if e.op == op and len(e.inputs) == 2 else None
        at_rows = input_of(column, "Unsqueeze")
        numbers = None if at_rows is None else input_of(without_cast(at_rows), "Gather")
        if numbers is not None and numbers.rank == 1 and numbers.type in SCALES:
            found.append(numbers)
    return found


def _signs(parts: list[Expression]) -> list[bool]:
    """The constants that a Where chooses by: whether values of 4 bits are signed."""
    conditions = [e.inputs[0] for e in parts if e.op == "Where"]
    return [bool(number(c)) for c in conditions if c is not None and c.array is not None]
