"""The normal form of expressions, in which two ways to write one computation compare equal.

Building an expression takes away what does not change a value: Identity, a Cast to the type that is there already, an
If whose condition is known, arithmetic over constants, the shape of something whose shape is fixed, and whether an
opset has an axis as an attribute or as an input. Each of these rules keeps the value exactly, so that equal expressions
mean equal values. The opposite does not hold: what is written in another way altogether compares as different, and a
caller then leaves it alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from .expressions import Body, Expression, constant, from_array, number
from .shapes import REDUCTIONS, are_fixed, elements, is_flattening, product, shape_of

#: Constants with more elements than this are not looked into.
LARGEST_CONSTANT = 2**16
INT64_MAX = 2**63 - 1

# ---- Building.


def make(op: str, *inputs: Expression | int | Sequence[int] | None, output: int = 0, **attributes: Any) -> Expression:
    """An operator of the standard domain over its inputs, in normal form; ints and lists are int64 constants.

    Attributes are those of the newest opset: axes are inputs. Defaults may be left out.
    """
    operands = tuple(i if i is None or isinstance(i, Expression) else constant(i) for i in inputs)
    return normal(op, operands, attributes, None, output)


def normal(
    op: str,
    inputs: tuple[Expression | None, ...],
    attributes: Mapping[str, Any],
    value: ir.Value | None,
    output: int,
) -> Expression:
    """The node in normal form; may give back one of its inputs."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node = _Node(op, inputs, with_defaults(op, attributes), value, output)
    for rule in _RULES.get(op, ()):
        found = rule(node)
        if isinstance(found, Expression):
            return found
        node = found or node
    expression = Expression(op, node.inputs, node.attributes, output, value=value)
    given = tuple(i for i in node.inputs if i is not None)
    folded = _fold(expression)
    if folded is not None:
        return from_array(folded, value, given)
    if output == 0:
        expression.dtype = _dtype(op, given, node.attributes)
        expression.shape = shape_of(op, node.inputs, node.attributes)
    return expression


def loop(
    trip: Expression | None,
    condition: Expression | None,
    carried: Sequence[Expression],
    body: Callable[..., Sequence[Expression]],
    output: int = 0,
) -> Expression:
    """A Loop; ``body`` takes the iteration's number, the condition and what is carried, and gives the results."""
    found = variables(carried)
    return normal_loop((trip, condition, *carried), Body(found, tuple(body(*found))), output)


def normal_loop(
    inputs: tuple[Expression | None, ...],
    body: Body,
    output: int,
    value: ir.Value | None = None,
    declared: Expression | None = None,
) -> Expression:
    """A Loop with its carried values sorted: an exporter may write them in any order."""
    count = len(inputs) - 2
    order = sorted(range(count), key=lambda k: (_sort_key(inputs[2 + k]), k))
    whole = [*order, *range(count, len(body.results) - 1)]  # stacked results come last, in the order that they have
    inputs = (*inputs[:2], *(inputs[2 + k] for k in order))
    body = Body(
        (*body.variables[:2], *(body.variables[2 + k] for k in order)),
        (body.results[0], *(body.results[1 + k] for k in whole)),
    )
    output = whole.index(output)
    result = body.results[output + 1]
    dtype = None if result is None else result.dtype
    return Expression("Loop", inputs, output=output, body=body, dtype=dtype, value=value, declared=declared)


def _sort_key(e: Expression | None) -> tuple[str, bytes]:
    if e is None:
        return "", b""
    return e.op, b"" if e.array is None else e.array.tobytes()


def variables(carried: Sequence[Expression | None], values: Sequence[ir.Value | None] = ()) -> tuple[Expression, ...]:
    """The variables of a loop's body: the iteration's number, the condition, and what is carried."""
    dtypes = [ir.DataType.INT64, ir.DataType.BOOL, *(None if c is None else c.dtype for c in carried)]
    padded = itertools.chain(values, itertools.repeat(None))
    return tuple(
        Expression("Variable", dtype=dtype, shape=() if k < 2 else None, value=value)
        for (k, dtype), value in zip(enumerate(dtypes), padded, strict=False)
    )


# ---- Attributes.

_DEFAULTS: dict[str, dict[str, Any]] = {}


def with_defaults(op: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, with the newest opset's defaults for those that are missing."""
    if op not in _DEFAULTS:
        _DEFAULTS[op] = {}
        if onnx.defs.has(op):
            for name, attribute in onnx.defs.get_schema(op).attributes.items():
                if attribute.default_value.type != onnx.AttributeProto.UNDEFINED:
                    default = onnx.helper.get_attribute_value(attribute.default_value)
                    _DEFAULTS[op][name] = default.decode() if isinstance(default, bytes) else default
    return {**_DEFAULTS[op], **attributes}


def set_attributes(e: Expression) -> dict[str, Any]:
    """The attributes that differ from the newest opset's defaults."""
    defaults = with_defaults(e.op, {})
    return {name: value for name, value in e.attributes.items() if name not in defaults or defaults[name] != value}


# ---- Rules. Each takes a node, and gives what it is equal to: an expression, or a node that is written in another way.
# None: the rule says nothing about this node.


class _Node(NamedTuple):
    op: str
    inputs: tuple[Expression | None, ...]
    attributes: dict[str, Any]
    value: ir.Value | None
    output: int

    @property
    def first(self) -> Expression | None:
        return self.inputs[0] if self.inputs else None

    def again(self, op: str, inputs: tuple[Expression | None, ...], attributes: Mapping[str, Any]) -> Expression:
        """Another node for the same value, in normal form."""
        return normal(op, inputs, attributes, self.value, self.output)


_Rule = Callable[[_Node], "Expression | _Node | None"]


def _identity_of_x_is_x(node: _Node) -> Expression | None:
    return node.first


def _not_of_not_x_is_x(node: _Node) -> Expression | None:
    x = node.first
    return x.inputs[0] if x is not None and x.op == "Not" else None


def _castlike_to_a_known_type_is_cast(node: _Node) -> Expression | None:
    like = node.inputs[1] if len(node.inputs) == 2 else None
    if node.first is None or like is None or like.dtype is None:
        return None
    return node.again("Cast", (node.first,), {"to": int(like.dtype)})


def _cast_has_its_type_alone(node: _Node) -> _Node:
    return node._replace(attributes={"to": node.attributes["to"]})


def _cast_to_the_same_type_is_x(node: _Node) -> Expression | None:
    x = node.first
    return x if x is not None and x.dtype is not None and int(x.dtype) == node.attributes["to"] else None


def _cast_of_unsqueeze_is_unsqueeze_of_cast(node: _Node) -> Expression | None:
    x = node.first
    if x is None or x.op != "Unsqueeze" or x.inputs[0] is None:
        return None
    return node.again("Unsqueeze", (make("Cast", x.inputs[0], **node.attributes), *x.inputs[1:]), {})


def _cast_of_an_expanded_constant_is_expand_of_cast(node: _Node) -> Expression | None:
    x = node.first
    if x is None or x.op != "Expand" or x.inputs[0] is None or x.inputs[0].array is None:
        return None
    return node.again("Expand", (make("Cast", x.inputs[0], **node.attributes), x.inputs[1]), {})


def _an_axis_is_a_list_of_one(node: _Node) -> _Node | None:
    """torch 2.6 writes a scalar."""
    axes = node.inputs[1] if len(node.inputs) == 2 else None
    if axes is None or axes.array is None or axes.array.ndim:
        return None
    return node._replace(inputs=(node.inputs[0], from_array(axes.array.reshape(1))))


def _slice_by_steps_of_one_needs_no_steps(node: _Node) -> _Node | None:
    steps = node.inputs[4] if len(node.inputs) == 5 else None
    if steps is None or steps.array is None or not (steps.array == 1).all():
        return None
    return node._replace(inputs=node.inputs[:4])


def _slice_from_0_to_the_end_is_x(node: _Node) -> Expression | None:
    if len(node.inputs) not in (3, 4):
        return None
    starts, ends = (None if i is None else i.array for i in node.inputs[1:3])
    if starts is None or ends is None or ends.dtype != np.int64:
        return None
    return node.first if (starts == 0).all() and (ends == INT64_MAX).all() else None


def _flattening_takes_away_inner_reshapes(node: _Node) -> Expression | _Node | None:
    x = node.first
    if x is None or len(node.inputs) != 2 or not is_flattening(node.inputs[1]):
        return None
    while x.op == "Reshape" and x.inputs[0] is not None:
        if is_flattening(x.inputs[1]):
            return x
        x = x.inputs[0]
    if x.shape is not None and len(x.shape) == 1:
        return x
    return node._replace(inputs=(x, node.inputs[1]), attributes={})  # and no zeros to allow


def _if_of_a_known_condition_is_its_branch(node: _Node) -> Expression | None:
    condition = node.first
    if condition is None or condition.array is None or len(node.inputs) != 3:
        return None
    return node.inputs[1] if bool(condition.array.reshape(-1)[0]) else node.inputs[2]


def _where_of_one_known_condition_is_its_branch(node: _Node) -> Expression | None:
    condition, *branches = node.inputs if len(node.inputs) == 3 else (None,)
    if condition is None or condition.array is None or condition.array.ndim:
        return None
    then, otherwise = branches
    if then is None or otherwise is None or then.shape is None or then.shape != otherwise.shape:
        return None
    if then.array is not None and otherwise.array is not None:  # as 4-bit quantized values choose between two numbers
        return None
    return (then if condition.array else otherwise) if are_fixed(then.shape) else None


def _shape_starts_at_0(node: _Node) -> _Node | None:
    if node.attributes.get("start") != 0:
        return None
    return node._replace(attributes={k: v for k, v in node.attributes.items() if k != "start"})


def _shape_that_is_fixed_is_a_constant(node: _Node) -> Expression | None:
    if node.first is None or node.first.shape is None:
        return None
    part = node.first.shape[slice(node.attributes.get("start"), node.attributes.get("end"))]
    return from_array(np.asarray(part, np.int64), node.value) if are_fixed(part) else None


def _sizes_that_are_fixed_are_constants(node: _Node) -> Expression | None:
    """A Gather or Slice of a Shape, of which the rest may be open."""
    if node.first is None or node.first.op != "Shape":
        return None
    array = None if len(node.inputs) != 2 or node.inputs[1] is None else node.inputs[1].array
    found = elements(Expression(node.op, node.inputs, node.attributes))
    if found is None or not are_fixed(found) or (node.op == "Gather" and array is None):
        return None
    sizes = np.asarray(found, np.int64)
    return from_array(sizes if array is None else sizes.reshape(array.shape), node.value)


def _sizes_are_not_below_zero(node: _Node) -> Expression | None:
    """``x`` of ``Where(x == -1, anything, x)``, as torch's exporter has it before an Expand."""
    condition, _, sizes = node.inputs if len(node.inputs) == 3 else (None, None, None)
    if condition is None or sizes is None or condition.op != "Equal" or len(condition.inputs) != 2:
        return None
    x, holes = condition.inputs
    found = elements(sizes)
    if x is not sizes or holes is None or holes.array is None or not (holes.array < 0).all() or found is None:
        return None
    if holes.array.size != len(found) or any(isinstance(d, int) and d < 0 for d in found):
        return None
    return sizes


def _squeeze_of_kept_axes_keeps_none(node: _Node) -> Expression | None:
    x = node.first
    if x is None or x.op not in REDUCTIONS or not x.attributes.get("keepdims") or len(x.inputs) != 2:
        return None
    axes = [
        None if e is None or e.array is None else e.array.reshape(-1).tolist() for e in (x.inputs[1], node.inputs[-1])
    ]
    if axes[0] is None or axes[0] != axes[1] or len(node.inputs) != 2:
        return None
    return node.again(x.op, x.inputs, {**x.attributes, "keepdims": 0})


def _size_that_is_fixed_is_a_constant(node: _Node) -> Expression | None:
    if node.first is None or node.first.shape is None or not are_fixed(node.first.shape):
        return None
    return from_array(np.asarray(product(node.first.shape), np.int64), node.value)


def _dequantized_rows_are_rows_of_what_is_dequantized(node: _Node) -> Expression | None:
    """With one scale for all: rows of 8-bit values that are gathered and then dequantized, or the other way round."""
    rows, numbers = node.first, node.inputs[1:]
    if rows is None or rows.op != "Gather" or len(rows.inputs) != 2 or rows.attributes["axis"] != 0:
        return None
    codes, indices = rows.inputs
    if codes is None or len(codes.shape or ()) != 2 or not are_fixed(codes.shape or ()):
        return None
    scale = numbers[0] if numbers else None
    if codes.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or scale is None or scale.shape not in ((), (1,)):
        return None
    if scale.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or any(
        e is None or e.shape != scale.shape for e in numbers
    ):
        return None
    table = make("DequantizeLinear", codes, *numbers, **node.attributes)
    return node.again("Gather", (table, indices), {"axis": 0})


def _rows_by_one_coordinate_are_gathered(node: _Node) -> Expression | None:
    """``GatherND(x, Unsqueeze(places, -1))``, as torch's exporter writes ``x[places]``."""
    places = node.inputs[1] if len(node.inputs) == 2 else None
    if places is None or places.op != "Unsqueeze" or node.attributes["batch_dims"]:
        return None
    inner, axis = places.inputs[0], number(places.inputs[1])
    if inner is None or axis is None or (axis != -1 and axis != inner.rank):
        return None
    return node.again("Gather", (node.first, inner), {"axis": 0})


#: Operators whose axes became the second input in a later opset.
_WITH_AXES = ("Squeeze", "Unsqueeze", *REDUCTIONS)

#: The rules of each operator, which are applied one after another.
_RULES: dict[str, tuple[_Rule, ...]] = {
    "Identity": (_identity_of_x_is_x,),
    "Not": (_not_of_not_x_is_x,),
    "CastLike": (_castlike_to_a_known_type_is_cast,),
    "Cast": (
        _cast_has_its_type_alone,
        _cast_to_the_same_type_is_x,
        _cast_of_unsqueeze_is_unsqueeze_of_cast,
        _cast_of_an_expanded_constant_is_expand_of_cast,
    ),
    "DequantizeLinear": (_dequantized_rows_are_rows_of_what_is_dequantized,),
    "Slice": (
        _slice_by_steps_of_one_needs_no_steps,
        _slice_from_0_to_the_end_is_x,
        _sizes_that_are_fixed_are_constants,
    ),
    "Gather": (_sizes_that_are_fixed_are_constants,),
    "GatherND": (_rows_by_one_coordinate_are_gathered,),
    "Where": (_sizes_are_not_below_zero, _where_of_one_known_condition_is_its_branch),
    "Reshape": (_flattening_takes_away_inner_reshapes,),
    "If": (_if_of_a_known_condition_is_its_branch,),
    "Shape": (_shape_starts_at_0, _shape_that_is_fixed_is_a_constant),
    "Size": (_size_that_is_fixed_is_a_constant,),
    **dict.fromkeys(_WITH_AXES, (_an_axis_is_a_list_of_one,)),
    "Squeeze": (_an_axis_is_a_list_of_one, _squeeze_of_kept_axes_keeps_none),
}


def as_newest(
    op: str, inputs: tuple[Expression | None, ...], attributes: dict[str, Any]
) -> tuple[Expression | None, ...]:
    """The inputs, with what older opsets have in an attribute; takes it out of ``attributes``."""
    if op in _WITH_AXES and "axes" in attributes:
        return (*inputs[:1], constant(attributes.pop("axes")))
    return inputs


def as_opset(
    op: str, inputs: tuple[Expression | None, ...], attributes: dict[str, Any], opset: int
) -> tuple[tuple[Expression | None, ...], dict[str, Any]]:
    """Inputs and attributes as an opset has them: the opposite of `as_newest`."""
    since = 13 if op in ("Squeeze", "Unsqueeze", "ReduceSum") else 18
    axes = inputs[1] if len(inputs) == 2 else None
    if op not in _WITH_AXES or opset >= since or axes is None or axes.array is None:
        return inputs, attributes
    return inputs[:1], {**attributes, "axes": axes.array.reshape(-1).tolist()}


# ---- Types.

_BOOLEAN = frozenset(
    ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not", "IsNaN", "IsInf")
)
_INT64_RESULT = frozenset(("Shape", "Size", "NonZero"))
#: Operators whose result has the type of another input than the first.
_TYPED_BY = {"Where": 1, "SequenceInsert": 1}


def _dtype(op: str, inputs: Sequence[Expression], attributes: Mapping[str, Any]) -> ir.DataType | None:
    if op in _BOOLEAN:
        return ir.DataType.BOOL
    if op in _INT64_RESULT:
        return ir.DataType.INT64
    if op == "Cast":
        return ir.DataType(attributes["to"])
    if op == "DequantizeLinear":
        given = attributes.get("output_dtype")
        return ir.DataType(given) if given else inputs[1].dtype if len(inputs) > 1 else None
    if op == "If":
        types = {i.dtype for i in inputs[1:]}
        return types.pop() if len(types) == 1 else None
    if op == "SequenceEmpty":
        return ir.DataType(attributes.get("dtype", ir.DataType.FLOAT))
    if op not in ("SequenceInsert", "ConcatFromSequence") and (not inputs or not _keeps_type(op)):
        return None
    position = _TYPED_BY.get(op, 0)
    return inputs[position].dtype if position < len(inputs) else None


_KEEPS_TYPE: dict[str, bool] = {}


def _keeps_type(op: str) -> bool:
    """Whether an operator's schema says that its result has the type of its first (or `_TYPED_BY`) input."""
    if op not in _KEEPS_TYPE:
        _KEEPS_TYPE[op] = False
        if onnx.defs.has(op):
            schema = onnx.defs.get_schema(op)
            position = _TYPED_BY.get(op, 0)
            if schema.inputs and schema.outputs and position < len(schema.inputs):
                _KEEPS_TYPE[op] = schema.inputs[position].type_str == schema.outputs[0].type_str
    return _KEEPS_TYPE[op]


# ---- Arithmetic over constants.


def _fold(e: Expression) -> np.ndarray | None:
    """The operator over constants, computed; None where an input is not constant, or for another operator."""
    arrays: list[np.ndarray] = []
    for i in e.inputs:
        if i is None or i.array is None:
            return None
        arrays.append(i.array)
    compute = _COMPUTE.get(e.op) if arrays else None
    if compute is None:
        return None
    try:
        with np.errstate(all="ignore"):
            result = compute(arrays, e.attributes)
    except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError):
        return None  # such a node runs nowhere, and stays as it is written
    return None if result is None or result.size > LARGEST_CONSTANT else result


_Arrays = list[np.ndarray]
_Compute = Callable[[_Arrays, Mapping[str, Any]], "np.ndarray | None"]


def _elementwise(function: Callable[..., Any]) -> _Compute:
    def compute(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
        if any(a.dtype != x[0].dtype for a in x):
            return None  # such a graph runs nowhere
        if not _is_small(np.broadcast_shapes(*(a.shape for a in x))):
            return None
        return np.asarray(function(*x))

    return compute


def _is_small(shape: Iterable[int]) -> bool:
    """Whether a constant of that shape is looked into. Asked before it is made: a few bytes may ask for terabytes."""
    return math.prod(shape) <= LARGEST_CONSTANT


def _mod(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    """Of integers, with the sign of the divisor."""
    if attributes.get("fmod") or x[0].dtype.kind not in "iu" or (x[1] == 0).any():
        return None
    return _elementwise(np.mod)(x, attributes)


def _concat(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    return np.concatenate(x, attributes["axis"]) if _is_small([sum(a.size for a in x)]) else None


def _gather(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    axis = attributes["axis"]
    rest = [d for k, d in enumerate(x[0].shape) if k != axis % x[0].ndim]
    return np.take(x[0], x[1], axis) if _is_small([*rest, x[1].size]) else None


def _cast(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    target = ir.DataType(attributes["to"])
    return None if target == ir.DataType.STRING else x[0].astype(target.numpy())


def _expand(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    shape = np.broadcast_shapes(x[0].shape, tuple(int(d) for d in x[1]))
    return np.broadcast_to(x[0], shape) if _is_small(shape) else None


def _reshape(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    return None if (x[1] == 0).any() else x[0].reshape([int(d) for d in x[1]])


def _squeeze(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray:
    return x[0].squeeze(tuple(int(a) for a in x[1]) if len(x) > 1 else None)


def _reduce_prod(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    if len(x) != 1:
        return None
    return np.asarray(np.prod(x[0], keepdims=bool(attributes["keepdims"]), dtype=x[0].dtype))


def _range(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    if x[0].dtype.kind != "i":
        return None
    numbers = range(*map(int, x))
    return np.asarray(numbers, x[0].dtype) if len(numbers) <= LARGEST_CONSTANT else None


def _slice(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    if x[0].ndim != 1 or len(x) > 4 or x[1].size != 1:
        return None
    return x[0][int(x[1].reshape(-1)[0]) : int(x[2].reshape(-1)[0])]


def _constant_of_shape(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    shape = tuple(int(d) for d in x[0])
    dtype, _, data = attributes.get("value", (ir.DataType.FLOAT, (1,), bytes(4)))
    return np.full(shape, np.frombuffer(data, dtype.numpy())[0]) if _is_small(shape) else None


def _one_hot(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    places, depth = x[0].reshape(-1, 1), int(x[1].reshape(-1)[0])
    if x[0].ndim != 1 or attributes["axis"] != -1 or not _is_small([places.size, max(depth, 0)]):
        return None
    hot = np.where(places < 0, places + depth, places) == np.arange(depth)
    return np.where(hot, x[2][1], x[2][0])


def _where(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray | None:
    """Of sizes alone: what our lowering chooses by a constant is read by a pattern."""
    if x[1].dtype != np.int64 or x[2].dtype != np.int64:
        return None
    return np.where(*x) if _is_small(np.broadcast_shapes(*(a.shape for a in x))) else None


def _is_inf(x: _Arrays, attributes: Mapping[str, Any]) -> np.ndarray:
    positive, negative = (bool(attributes[f"detect_{sign}"]) for sign in ("positive", "negative"))
    return np.asarray(np.isinf(x[0]) & np.where(x[0] > 0, positive, negative))


_COMPUTE: dict[str, _Compute] = {
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Equal": _elementwise(np.equal),
    "Less": _elementwise(np.less),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "LessOrEqual": _elementwise(np.less_equal),
    "Mod": _mod,
    "Not": _elementwise(np.logical_not),
    "And": _elementwise(np.logical_and),
    "Or": _elementwise(np.logical_or),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "IsInf": _is_inf,
    "IsNaN": _elementwise(np.isnan),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": lambda x, attributes: np.expand_dims(x[0], tuple(int(a) for a in x[1])),
    "ReduceProd": _reduce_prod,
    "OneHot": _one_hot,
    "Where": _where,
    "Range": _range,
    "Slice": _slice,
}
