"""Numbers that are the same in every column of a row: an expression [.., L, D] as one of [.., L].

Masks and weights come as [B, L, 1], or repeated D times. What counts is that the value is constant along that axis,
however it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.rewrite import nodes
from lucid_onnx.rewrite.expressions import Dim, Expression, constant, difference, from_array, input_of, number
from lucid_onnx.rewrite.normal_form import make, normal
from lucid_onnx.rewrite.shapes import elements

#: Elementwise operators, whose operands are broadcast.
_ELEMENTWISE = frozenset(
    ("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Div", "Equal", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual")
)
_ELEMENTWISE |= {"IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not"}
_ELEMENTWISE |= {"Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softplus", "Sqrt", "Sub", "Tanh"}
_ELEMENTWISE |= {"Where", "Xor"}
#: Reductions, which take their axes as the second input.
_REDUCTIONS = frozenset(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"))
#: How far an expression is followed.
_DEPTH = 40


class _Found(NamedTuple):
    expression: Expression  #: without the axis
    size: Dim  #: the axis' own size


def column(e: Expression | None, axis: int, width: Dim) -> Expression | None:
    """An expression without an axis along which it is constant; None where it is not known to be.

    What has fewer dimensions, and so no such axis, is given back as it is.

    Args:
        axis: counted from the end, so below zero.
        width: the number of columns that the axis may have, besides one.
    """
    found = None if e is None else _without(e, axis, _DEPTH)
    if found is None or (found.size != 1 and (found.size is None or found.size != width)):
        return None
    return found.expression


def _without(e: Expression, axis: int, depth: int) -> _Found | None:
    rank = e.rank
    if rank is not None and rank < -axis:
        return _Found(e, 1)
    if depth == 0:
        return None
    found = None
    if e.array is not None:
        return _of_array(e, axis)
    if e.op in _ELEMENTWISE:
        found = _of_elementwise(e, axis, depth)
    elif (rule := _RULES.get(e.op)) is not None and rank is not None:
        found = rule(e, axis, depth)
    if found is None and rank is not None and e.dims is not None and e.dims[axis] == 1:
        found = _Found(make("Squeeze", e, [axis]), 1)
    if found is not None and e.dims is not None and e.op != "Expand":
        declared(found.expression, e.type, np.delete(np.array(e.dims, object), axis).tolist())
    return found


def declared(e: Expression, dtype: ir.DataType | None, dims: Sequence[Dim]) -> Expression:
    """The expression, with what is known of its type and dimensions where it does not follow from its inputs."""
    if e.declared is None and (e.shape is None or e.dtype is None):
        e.declared = Expression("Value", dtype=dtype, shape=tuple(dims))
    return e


def _of_array(e: Expression, axis: int) -> _Found | None:
    assert e.array is not None
    size = e.array.shape[axis]
    if not size:
        return None
    first = np.take(e.array, [0], axis)
    same = size == 1 or _bytes_of(e.array) == _bytes_of(np.broadcast_to(first, e.array.shape))
    return _Found(from_array(first.squeeze(axis)), size) if same else None


def _bytes_of(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _of_elementwise(e: Expression, axis: int, depth: int) -> _Found | None:
    size: Dim = 1
    inputs: list[Expression | None] = []
    for operand in e.inputs:
        found = None if operand is None else _without(operand, axis, depth - 1)
        if operand is not None and found is None:
            return None
        if found is not None and found.size != 1:
            if size not in (1, found.size) or found.size is None:
                return None
            size = found.size
        inputs.append(None if found is None else found.expression)
    return _Found(normal(e.op, tuple(inputs), e.attributes, None, 0), size)


def _unsqueeze(e: Expression, axis: int, depth: int) -> _Found | None:
    axes = _positions(e.inputs[1] if len(e.inputs) == 2 else None, e.rank)
    x, rank = e.inputs[0], e.rank
    if axes is None or x is None or rank is None:
        return None
    place = axis + rank
    if place in axes:
        rest = [a - (a > place) for a in axes if a != place]
        return _Found(make("Unsqueeze", x, rest) if rest else x, 1)
    kept = [k for k in range(rank) if k not in axes]
    found = _without(x, kept.index(place) - len(kept), depth - 1)
    if found is None:
        return None
    return found._replace(expression=make("Unsqueeze", found.expression, [a - (a > place) for a in axes]))


def _squeeze(e: Expression, axis: int, depth: int) -> _Found | None:
    x = e.inputs[0]
    rank = None if x is None else x.rank
    axes = _positions(e.inputs[1] if len(e.inputs) == 2 else None, rank)
    if axes is None or x is None or rank is None:
        return None
    kept = [k for k in range(rank) if k not in axes]
    place = kept[axis]
    found = _without(x, place - rank, depth - 1)
    if found is None:
        return None
    return found._replace(expression=make("Squeeze", found.expression, [a - (a > place) for a in axes]))


def _expand(e: Expression, axis: int, depth: int) -> _Found | None:
    x, target = (*e.inputs, None)[:2]
    found = None if x is None else _without(x, axis, depth - 1)
    sizes = elements(target)
    if found is None or target is None or sizes is None or len(sizes) < -axis:
        return None
    size = sizes[axis] if found.size == 1 else found.size
    if size != found.size and found.size != 1:
        return None
    rest = without_element(target, axis)
    if rest is None:
        return None
    return _Found(expanded(found.expression, rest), size)


def _tile(e: Expression, axis: int, depth: int) -> _Found | None:
    x, repeats = (*e.inputs, None)[:2]
    times = elements(repeats)
    found = None if x is None else _without(x, axis, depth - 1)
    rest = None if repeats is None else without_element(repeats, axis)
    if found is None or times is None or rest is None or not isinstance(times[axis], int):
        return None
    size = times[axis] if found.size == 1 else found.size
    if found.size != 1 and times[axis] != 1:
        return None
    once = rest.array is not None and (rest.array == 1).all()
    return _Found(found.expression if once else make("Tile", found.expression, rest), size)


def _reshape(e: Expression, axis: int, depth: int) -> _Found | None:
    """Reshape to [.., 1], or of [.., n, m] to [.., n * m]."""
    x, target = (*e.inputs, None)[:2]
    sizes = elements(target)
    if x is None or target is None or sizes is None or axis != -1 or not sizes:
        return None
    rest = without_element(target, -1)
    if rest is None:
        return None
    if sizes[-1] == 1:
        return _Found(make("Reshape", x, rest, **e.attributes), 1)
    leading, merged, size = sizes[:-1], x, 1
    if x.rank is None or x.dims is None or x.rank < len(sizes) or not _equal_dims(x.dims[: len(leading)], leading):
        return None
    for _ in range(x.rank - len(leading)):
        found = _without(merged, -1, depth - 1)
        if found is None or not isinstance(found.size, int):
            return None
        merged, size = found.expression, size * found.size
    return _Found(merged, size) if sizes[-1] in (-1, size) else None


def _transpose(e: Expression, axis: int, depth: int) -> _Found | None:
    x, rank = e.inputs[0], e.rank
    if x is None or rank is None:
        return None
    perm = list(e.attributes.get("perm", reversed(range(rank))))
    place = perm[axis]
    found = _without(x, place - rank, depth - 1)
    if found is None:
        return None
    rest = [k - (k > place) for k in perm if k != place]
    return found._replace(expression=permuted(found.expression, rest))


def _reduction(e: Expression, axis: int, depth: int) -> _Found | None:
    x = e.inputs[0]
    rank = None if x is None else x.rank
    axes = _positions(e.inputs[1] if len(e.inputs) == 2 else None, rank)
    if axes is None or x is None or rank is None:
        return None
    keepdims = bool(e.attributes.get("keepdims"))
    kept = list(range(rank)) if keepdims else [k for k in range(rank) if k not in axes]
    place = kept[axis]
    if place in axes:  # and it stays, as 1
        if axes != [place]:
            return None
        return _Found(make(e.op, x, [place], keepdims=0), 1)
    found = _without(x, place - rank, depth - 1)
    if found is None:
        return None
    rest = [a - (a > place) for a in axes]
    return found._replace(expression=make(e.op, found.expression, rest, keepdims=int(keepdims)))


def _gather(e: Expression, axis: int, depth: int) -> _Found | None:
    """A number for each index, from a list of them."""
    numbers, indices = (*e.inputs, None)[:2]
    if numbers is None or indices is None or numbers.rank != 1 or e.attributes.get("axis") != 0:
        return None
    found = _without(indices, axis, depth - 1)
    return None if found is None else found._replace(expression=make("Gather", numbers, found.expression))


def _constant_of_shape(e: Expression, axis: int, depth: int) -> _Found | None:
    target = e.inputs[0]
    sizes, rest = elements(target), None if target is None else without_element(target, axis)
    if sizes is None or rest is None:
        return None
    return _Found(make("ConstantOfShape", rest, **e.attributes), sizes[axis])


_RULES = {
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    **dict.fromkeys(_REDUCTIONS, _reduction),
}


# ---- Shapes.


def _positions(axes: Expression | None, rank: int | None) -> list[int] | None:
    """The axes of a constant, counted from the first."""
    if axes is None or axes.array is None or rank is None:
        return None
    return sorted(int(a) + (rank if a < 0 else 0) for a in axes.array.reshape(-1))


def without_element(sizes: Expression, place: int) -> Expression | None:
    """A list of sizes without one, which is counted from the end; None where the list is written in another way.

    1. A constant.
    2. ``Shape(x)``, without the last one: of rows that is the shape of their indices.
    3. A Concat of single sizes.
    """
    if sizes.array is not None:  # 1
        flat = sizes.array.reshape(-1)
        return from_array(np.delete(flat, place)) if len(flat) >= -place else None
    count = elements(sizes)
    if count is None:
        return None
    kept = [k for k in range(len(count)) if k != len(count) + place]
    if sizes.op == "Shape" and not {"start", "end"} & set(sizes.attributes):  # 2
        x = sizes.inputs[0]
        if place == -1 and x is not None and x.op == "Gather" and x.attributes.get("axis") == 0:
            table, indices = x.inputs
            if table is not None and table.rank == 2 and indices is not None:
                return make("Shape", indices)
        return make("Gather", sizes, kept)
    if sizes.op == "Concat":  # 3
        parts, position = [], 0
        for part in sizes.inputs:
            length = len(elements(part) or ())
            if part is None or not position <= len(count) + place < position + length:
                parts.append(part)
            elif length > 1:
                rest = without_element(part, len(count) + place - position - length)
                if rest is None:
                    return make("Gather", sizes, kept)
                parts.append(rest)
            position += length
        if len(parts) == 1:
            return parts[0]
        return make("Concat", *parts, axis=0) if parts else constant([])
    return make("Gather", sizes, kept)


def _equal_dims(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether dimensions are known to be equal."""
    return len(a) == len(b) and all(x is not None and x == y for x, y in zip(a, b, strict=True))


def expanded(e: Expression, shape: Expression) -> Expression:
    """``Expand(e, shape)``, or ``e`` where that is known to change nothing."""
    sizes = elements(shape)
    if sizes is not None and e.dims is not None and len(sizes) <= len(e.dims):
        inner = e.dims[len(e.dims) - len(sizes) :]
        if all(n == 1 or (n is not None and n == d) for n, d in zip(sizes, inner, strict=True)):
            return e
    source = input_of(shape, "Shape")
    if source is not None and not {"start", "end"} & set(shape.attributes) and same_shape(e, source):
        return e
    return make("Expand", e, shape)


def permuted(e: Expression, perm: Sequence[int]) -> Expression:
    """``Transpose(e, perm)``, or ``e`` where nothing moves."""
    if list(perm) == sorted(perm):
        return e
    if e.array is not None:
        return from_array(np.ascontiguousarray(e.array.transpose(perm)))
    return make("Transpose", e, perm=tuple(perm))


def same_shape(a: Expression, b: Expression) -> bool:
    """Whether two expressions are known to have the same shape: by their dimensions, or by what they come from."""
    if a.dims is not None and b.dims is not None and _equal_dims(a.dims, b.dims):
        return True
    return difference(_shape_source(a), _shape_source(b)) is None


def _shape_source(e: Expression) -> Expression:
    """What an expression has its shape from."""
    for _ in range(_DEPTH):
        operands = [i for i in e.inputs if i is not None and i.rank != 0]
        if e.op == "Gather" and e.attributes.get("axis") == 0 and operands and operands[0].rank == 1:
            source = operands[-1]
        elif e.op in ("ConstantOfShape", "Expand"):
            of = e.inputs[-1]
            whole = of is not None and of.op == "Shape" and not {"start", "end"} & set(of.attributes)
            if not whole or of is None or (e.op == "Expand" and len(operands) != 1):
                return e
            source = of.inputs[0] or e
        elif e.op in _ELEMENTWISE and len(operands) == 1:
            source = operands[0]
        elif e.op == "Squeeze" and e.dims is not None and number(e.inputs[-1]) in (-1, len(e.dims)):
            rows = input_of(e, "Squeeze")  # of a table [V, 1]
            if rows is None or rows.op != "Gather" or rows.rank != len(e.dims) + 1 or rows.attributes.get("axis") != 0:
                return e
            source = rows.inputs[1] or e
        else:
            return e
        if source is e:
            return e
        e = source
    return e


def fits(e: Expression, into: Expression) -> bool:
    """Whether broadcasting an expression with another is known to leave the other's shape as it is."""
    if e.rank is None or into.rank is None or e.dims is None or into.dims is None or e.rank > into.rank:
        return e.rank == 0
    inner = into.dims[into.rank - e.rank :]
    if all(a == 1 or (a is not None and a == b) for a, b in zip(e.dims, inner, strict=True)):
        return True
    return e.rank == into.rank and same_shape(e, into)


# ---- Constants.


def whole_array(e: Expression) -> np.ndarray | None:
    """The numbers of a constant, also of one that is too large for the normal form to look into."""
    if e.array is not None or e.value is None:
        return e.array
    value = e.value
    if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
        return nodes.table(value)
    producer = value.producer()
    tensor = None if producer is None or producer.op_type != "Constant" else producer.attributes.get("value")
    return None if tensor is None or tensor.is_ref() else tensor.as_tensor().numpy()


def filler_of(e: Expression) -> float | None:
    """The number that every element is known to be."""
    while True:
        if e.op == "ConstantOfShape":
            filler = e.attributes.get("value")
            return 0.0 if filler is None else float(np.frombuffer(filler[2], filler[0].numpy())[0])
        if (
            e.op not in ("Cast", "Expand", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
            or e.inputs[0] is None
        ):
            array = whole_array(e)
            if array is None or not array.size:
                return None
            first = array.reshape(-1)[0]
            return float(first) if bool((array == first).all()) else None
        e = e.inputs[0]


def is_filled_with(e: Expression, value: float) -> bool:
    """Whether every element is known to be that number."""
    return filler_of(e) == value
