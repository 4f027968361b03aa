"""The shapes of expressions, as far as the operators that bags are written in tell them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from .expressions import Dim, Expression, number

REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")

_Shape = tuple[Dim, ...]
_Inputs = Sequence["Expression | None"]


def shape_of(op: str, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    """The shape, as far as the operators that bags are written in tell it."""
    if op == "Reshape":
        return _reshaped(inputs)
    if op == "Range":
        return _range_shape(inputs)
    if op == "NonZero":
        return (None, None)
    if op == "ConstantOfShape":
        return elements(inputs[0]) if inputs else None
    first = _first_shape(inputs)
    rule = None if first is None else _SHAPES.get(op)
    if rule is None or first is None:
        return None
    try:
        return rule(first, inputs, attributes)
    except (KeyError, TypeError, ValueError):
        return None  # such a node runs nowhere


def _first_shape(inputs: _Inputs) -> _Shape | None:
    return None if not inputs or inputs[0] is None else inputs[0].shape


def elements(e: Expression | None) -> tuple[Dim, ...] | None:
    """The numbers of a list of sizes, or of one: numbers, the names of axes, or None for a size that is not known.

    None where it is not known that they are sizes, or how many. A constant's may be below zero.
    """
    first = None if e is None or not e.inputs else e.inputs[0]
    if e is None or e.array is not None:
        few = e is not None and e.array is not None and e.array.ndim <= 1 and e.array.dtype.kind == "i"
        return tuple(int(d) for d in e.array.reshape(-1)) if few else None  # type: ignore[union-attr]
    if first is None:
        return None
    if e.op == "Shape":
        return None if first.shape is None else first.shape[slice(e.attributes.get("start"), e.attributes.get("end"))]
    if e.op == "Concat":
        parts = [elements(i) for i in e.inputs]
        return tuple(d for p in parts if p is not None for d in p) if None not in parts else None
    found = elements(first) if e.op in ("Cast", "Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze") else None
    if found is None or e.op in ("Squeeze", "Unsqueeze"):
        return found
    if e.op == "Cast":
        return found if e.attributes["to"] in (int(ir.DataType.INT64), int(ir.DataType.INT32)) else None
    arrays = [None if i is None else i.array for i in e.inputs[1:]]
    if any(a is None for a in arrays):
        return None
    if e.op == "Reshape":
        return found if arrays[0].tolist() in ([-1], [], [len(found)]) else None  # type: ignore[union-attr]
    try:
        if e.op == "Gather":
            return tuple(found[int(k)] for k in arrays[0].reshape(-1))  # type: ignore[union-attr]
        if len(arrays) > 3 or any(a.size != 1 for a in arrays):  # type: ignore[union-attr]
            return None
        begin, end = (int(a.reshape(-1)[0]) for a in arrays[:2])  # type: ignore[union-attr]
        return found[begin:end]
    except IndexError:
        return None  # such a node runs nowhere


def _reshaped(inputs: _Inputs) -> _Shape | None:
    target = inputs[1] if len(inputs) == 2 else None
    if target is None:
        return None
    first = _first_shape(inputs)
    if target.array is not None and is_flattening(target) and first is not None:
        return (product(first) if are_fixed(first) else None,)
    found = elements(target)
    if found is None:
        return None
    return tuple(d if isinstance(d, str) or (d is not None and d > 0) else None for d in found)


def _range_shape(inputs: _Inputs) -> _Shape:
    """The length of ``Range(c, size + c, 1)`` is that size."""
    start, limit, step = (*inputs, None, None, None)[:3]
    begin = number(start)
    if begin is None or number(step) != 1 or limit is None:
        return (None,)
    if begin != 0 and limit.op == "Cast":
        limit = limit.inputs[0]
    if begin != 0 and limit is not None and limit.op == "Add" and number(limit.inputs[1]) == begin:
        begin, limit = 0, limit.inputs[0]
    found = elements(limit) if begin == 0 else None
    return found if found is not None and len(found) == 1 else (None,)


def _same(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape:
    return first


def _shape_of_shape(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape:
    return (len(first[slice(attributes.get("start"), attributes.get("end"))]),)


def _broadcast(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    result: _Shape = ()
    for e in inputs:
        if e is None or e.shape is None:
            return None
        length = max(len(result), len(e.shape))
        a, b = ((1,) * (length - len(s)) + s for s in (result, e.shape))
        result = tuple(_common(x, y) for x, y in zip(a, b, strict=True))
    return result


def _common(x: Dim, y: Dim) -> Dim:
    """The dimension that two are broadcast to: what is no number is 1 or equal to the other's number."""
    if x == 1 or y in (1, x):
        return y if x == 1 else x
    return next((d for d in (x, y) if isinstance(d, int)), None)


def _tiled(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    repeats = elements(inputs[1]) if len(inputs) == 2 else None
    if repeats is None or len(repeats) != len(first):
        return (None,) * len(first)
    both = zip(first, repeats, strict=True)
    return tuple(
        d if n == 1 else n if d == 1 else d * n if isinstance(d, int) and isinstance(n, int) else None for d, n in both
    )


def _flattened(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape:
    axis = attributes["axis"]
    sides = (first[:axis], first[axis:])
    return tuple(s[0] if len(s) == 1 else product(s) if are_fixed(s) else None for s in sides)


def _multiplied(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    """Of MatMul."""
    other = inputs[1].shape if len(inputs) == 2 and inputs[1] is not None else None
    if other is None or len(first) < 2 or len(other) < 2:
        return None
    left, right = (Expression("Value", shape=s[:-2]) for s in (first, other))
    batch = _broadcast((), (left, right), {})
    return None if batch is None else (*batch, first[-2], other[-1])


def _concatenated(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    axis = attributes["axis"] + len(first) * (attributes["axis"] < 0)
    shapes = [None if e is None else e.shape for e in inputs]
    if not 0 <= axis < len(first) or any(s is not None and len(s) != len(first) for s in shapes):
        return None
    lengths = [None if s is None else s[axis] for s in shapes]
    joined = sum(n for n in lengths if isinstance(n, int)) if are_fixed(lengths) else None
    return (*first[:axis], joined, *first[axis + 1 :])


def _sliced(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    arrays = [None if e is None else e.array for e in inputs[1:]]
    if len(first) != 1 or len(arrays) > 3:
        axes = arrays[2] if len(arrays) > 2 else None
        sliced = range(len(first)) if axes is None else {int(a) % max(len(first), 1) for a in axes.reshape(-1)}
        return tuple(None if k in sliced else d for k, d in enumerate(first))
    if isinstance(first[0], int) and all(a is not None and a.size == 1 for a in arrays):
        begin, end = (int(a.reshape(-1)[0]) for a in arrays[:2] if a is not None)
        return (len(range(first[0])[begin:end]),)
    return (None,)


def _gathered(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    indices = inputs[1] if len(inputs) == 2 else None
    if indices is None or indices.shape is None:
        return None
    axis = attributes["axis"] % max(len(first), 1)
    return (*first[:axis], *indices.shape, *first[axis + 1 :])


def _unsqueezed(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    given = inputs[1] if len(inputs) == 2 else None
    if given is None or given.array is None:
        return None
    rank = len(first) + given.array.size
    axes = {int(a) % rank for a in given.array.reshape(-1)}
    rest = iter(first)
    return tuple(1 if k in axes else next(rest) for k in range(rank))


def _gathered_by_rows(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    """Of GatherND, whose indices have the coordinates in their last axis."""
    indices = inputs[1] if len(inputs) == 2 else None
    if indices is None or not indices.shape or not isinstance(indices.shape[-1], int):
        return None
    return (*indices.shape[:-1], *first[attributes["batch_dims"] + indices.shape[-1] :])


def _of_second(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    return None if len(inputs) < 2 or inputs[1] is None else inputs[1].shape


def _squeezed(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    axes = _axes(first, inputs)
    return None if axes is None else tuple(d for k, d in enumerate(first) if k not in axes)


def _reduced(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    axes = _axes(first, inputs)
    if axes is None:
        return None
    kept: _Shape = (1,) if attributes["keepdims"] else ()
    return tuple(n for k, d in enumerate(first) for n in (kept if k in axes else (d,)))


def _axes(first: _Shape, inputs: _Inputs) -> set[int] | None:
    """The constant axes that are the second input."""
    given = inputs[1] if len(inputs) == 2 else None
    if given is None or given.array is None or not given.array.size:
        return None
    axes = {int(a) + len(first) * (a < 0) for a in given.array.reshape(-1)}
    return axes if axes <= set(range(len(first))) else None


def _transposed(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    order = attributes.get("perm", range(len(first))[::-1])
    return tuple(first[k] for k in order) if sorted(order) == list(range(len(first))) else None


def _expanded(first: _Shape, inputs: _Inputs, attributes: Mapping[str, Any]) -> _Shape | None:
    """As long as the target, whose numbers may be unknown."""
    target = inputs[1] if len(inputs) == 2 else None
    sizes = elements(target)
    if sizes is not None:
        return _broadcast(first, (inputs[0], Expression("Value", shape=sizes)), {})
    if target is None or target.shape is None or len(target.shape) != 1 or not isinstance(target.shape[0], int):
        return None
    return (None,) * max(len(first), target.shape[0])


#: By operator: the shape of the result, from that of the first input and the rest.
_SHAPES: dict[str, Callable[[_Shape, _Inputs, Mapping[str, Any]], _Shape | None]] = {
    **dict.fromkeys(
        (
            *(
                "Abs",
                "Acos",
                "Acosh",
                "Asin",
                "Asinh",
                "Atan",
                "Atanh",
                "BitwiseNot",
                "Cast",
                "CastLike",
                "Ceil",
                "Clip",
            ),
            *("Cos", "Cosh", "CumSum", "DequantizeLinear", "Elu", "Erf", "Exp", "Floor", "Identity", "IsInf", "IsNaN"),
            *("LeakyRelu", "Log", "LogSoftmax", "Neg", "Not", "QuantizeLinear", "Reciprocal", "Relu", "Round"),
            *("ScatterElements", "ScatterND", "Sigmoid", "Sign", "Sin", "Sinh", "Softmax", "Softplus", "Sqrt", "Tan"),
            *("Tanh", "Trilu"),
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater"),
            *("GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum"),
            *("Where", "Xor"),
        ),
        _broadcast,
    ),
    **dict.fromkeys(REDUCTIONS, _reduced),
    "Concat": _concatenated,
    "Expand": _expanded,
    "Flatten": _flattened,
    "Gather": _gathered,
    "GatherElements": _of_second,
    "GatherND": _gathered_by_rows,
    "MatMul": _multiplied,
    "Shape": _shape_of_shape,
    "Slice": _sliced,
    "Squeeze": _squeezed,
    "Tile": _tiled,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}


def are_fixed(dims: Iterable[Dim]) -> bool:
    return all(isinstance(d, int) for d in dims)


def product(shape: _Shape) -> int:
    return math.prod(d for d in shape if isinstance(d, int))


def is_flattening(target: Expression | None) -> bool:
    """Whether a Reshape to this has one dimension."""
    return target is not None and target.array is not None and target.array.tolist() == [-1]
