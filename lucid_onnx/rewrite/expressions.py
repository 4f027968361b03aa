"""Graphs as expressions in a normal form, so that two ways to write one computation compare equal.

An `Expression` is what a value of a graph is computed from. Building one takes away what does not change a value:
Identity, a Cast to the type that is there already, an If whose condition is known, arithmetic over constants, the
shape of something whose shape is fixed, and where an opset keeps an axis, as an attribute or as an input. Each of
these steps keeps the value exactly, so that equal expressions mean equal values. The opposite does not hold: what is
written in another way altogether compares as different, and a caller then leaves it alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

#: Constants with more elements than this are not looked into.
_LARGEST_CONSTANT = 2**16
#: Two nodes of these may differ though all that is written is equal.
_RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
)
#: What became the second input in a later opset: operator and attribute.
_AXES = dict.fromkeys(
    ("Squeeze", "Unsqueeze", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceProd", "ReduceL1", "ReduceL2"), "axes"
)
_BOOLEAN = frozenset(
    ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not", "IsNaN", "IsInf")
)
_INT64_RESULT = frozenset(("Shape", "Size", "NonZero"))
#: Attributes without which a node is no such operator; the checker says so, if it comes to that.
_REQUIRED = {"Cast": ("to",), "Loop": ("body",), "If": ("then_branch", "else_branch"), "Concat": ("axis",)}
#: Operators whose result has the type of another input than the first.
_TYPED_BY = {"Where": 1, "SequenceInsert": 1}

Dim = int | str | None


@dataclasses.dataclass(eq=False)
class Expression:
    """A computation. Compare with `difference`, never with ``==``.

    Attributes:
        op: the operator; "Constant" with ``array``, "Value" for what is not looked behind, "Variable" for an input
            of a loop's body.
        output: which output of the operator.
        bodies: of a Loop: the body's variables and its results.
        value: the graph's value that this is, where there is one.
        folded: the inputs that a constant was computed from.
        dtype, shape: as they follow from what it is computed from, as far as they do: two expressions that are
            equal agree in them, whatever their graphs say. The normal form looks at nothing else.
        told: what its graph says of the value, for `type` and `dims`.
    """

    op: str
    inputs: tuple[Expression | None, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output: int = 0
    body: Body | None = None
    array: np.ndarray | None = None
    dtype: ir.DataType | None = None
    shape: tuple[Dim, ...] | None = None
    value: ir.Value | None = None
    folded: tuple[Expression, ...] = ()
    told: Expression | None = None

    @property
    def type(self) -> ir.DataType | None:
        """The element type, of a sequence that of its tensors."""
        return self.dtype if self.dtype is not None or self.told is None else self.told.dtype

    @property
    def dims(self) -> tuple[Dim, ...] | None:
        """The dimensions: numbers, names, or None."""
        told = None if self.told is None else self.told.shape
        if self.shape is None or told is None or len(self.shape) != len(told):
            return told if self.shape is None else self.shape
        return tuple(a if a is not None else b for a, b in zip(self.shape, told, strict=True))

    @property
    def rank(self) -> int | None:
        """The number of dimensions."""
        return None if self.dims is None else len(self.dims)

    def constant(self) -> int | float | bool | None:
        """The number, where this is a constant of one element."""
        if self.array is None or self.array.size != 1:
            return None
        return self.array.reshape(-1)[0].item()  # type: ignore[no-any-return]

    def __str__(self) -> str:
        if self.array is not None:
            text = np.array2string(self.array, threshold=8, separator=", ").replace("\n", "")
            return f"the constant {text} ({_dtype_name(self.dtype)} {list(self.array.shape)})"
        if self.op in ("Value", "Variable"):
            return f"{self.op.lower()} {self.value.name!r}" if self.value is not None else self.op.lower()
        settings = ", ".join(f"{k}={v}" for k, v in self.attributes.items())
        name = "" if self.value is None or not self.value.name else f" {self.value.name!r}"
        return f"{self.op}({settings}){name}" if settings else f"{self.op}{name}"


@dataclasses.dataclass(eq=False)
class Body:
    """A loop's body: its variables, and what it computes from them and from outside."""

    variables: tuple[Expression, ...]
    results: tuple[Expression | None, ...]


def _dtype_name(dtype: ir.DataType | None) -> str:
    return "?" if dtype is None else dtype.name.lower()


# ---- Building.


def constant(value: Any, dtype: Any = np.int64) -> Expression:
    """A constant, by default int64."""
    return _constant(np.asarray(value, dtype))


def _constant(array: np.ndarray, value: ir.Value | None = None, folded: tuple[Expression, ...] = ()) -> Expression:
    return Expression(
        "Constant",
        array=array,
        dtype=ir.DataType.from_numpy(array.dtype),
        shape=array.shape,
        value=value,
        folded=folded,
    )


def make(op: str, *inputs: Expression | int | Sequence[int] | None, output: int = 0, **attributes: Any) -> Expression:
    """An operator of the standard domain over its inputs, in normal form; ints and lists are int64 constants.

    Attributes are those of the newest opset: axes are inputs. Defaults may be left out.
    """
    operands = tuple(i if i is None or isinstance(i, Expression) else constant(i) for i in inputs)
    return _normal(op, operands, attributes, None, output)


def loop(
    trip: Expression | None,
    condition: Expression | None,
    carried: Sequence[Expression],
    body: Callable[..., Sequence[Expression]],
    output: int = 0,
) -> Expression:
    """A Loop; ``body`` takes the iteration's number, the condition and what is carried, and gives the results."""
    variables = _variables(carried)
    return _looped((trip, condition, *carried), Body(variables, tuple(body(*variables))), output)


def _looped(
    inputs: tuple[Expression | None, ...],
    body: Body,
    output: int,
    value: ir.Value | None = None,
    told: Expression | None = None,
) -> Expression:
    """A Loop, with what it carries in an order of its own: exporters write it in any, and not always in the same."""
    count = len(inputs) - 2
    order = sorted(range(count), key=lambda k: (_order(inputs[2 + k]), k))
    whole = [*order, *range(count, len(body.results) - 1)]  # what is stacked comes behind, as it is
    inputs = (*inputs[:2], *(inputs[2 + k] for k in order))
    variables = (*body.variables[:2], *(body.variables[2 + k] for k in order))
    results = (body.results[0], *(body.results[1 + k] for k in whole))
    output = whole.index(output)
    result = results[output + 1]
    dtype = None if result is None else result.dtype
    return Expression("Loop", inputs, output=output, body=Body(variables, results), dtype=dtype, value=value, told=told)


def _order(e: Expression | None) -> tuple[str, bytes]:
    if e is None:
        return "", b""
    return e.op, b"" if e.array is None else e.array.tobytes()


def _variables(carried: Sequence[Expression | None], values: Sequence[ir.Value | None] = ()) -> tuple[Expression, ...]:
    dtypes = [ir.DataType.INT64, ir.DataType.BOOL, *(None if c is None else c.dtype for c in carried)]
    padded = itertools.chain(values, itertools.repeat(None))
    return tuple(
        Expression("Variable", dtype=dtype, shape=() if k < 2 else None, value=value)
        for (k, dtype), value in zip(enumerate(dtypes), padded, strict=False)
    )


def _normal(
    op: str,
    inputs: tuple[Expression | None, ...],
    attributes: Mapping[str, Any],
    value: ir.Value | None,
    output: int,
) -> Expression:
    """The node in normal form; may give back one of its inputs."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    given = [i for i in inputs if i is not None]
    first = given[0] if given else None
    attributes = _with_defaults(op, attributes)
    if op == "Identity" and first is not None:
        return first
    if op == "CastLike" and len(given) == 2 and given[1].dtype is not None:
        op, inputs, attributes = "Cast", (given[0],), {"to": int(given[1].dtype)}
        given = given[:1]
    if op == "Cast" and first is not None:
        attributes = {"to": attributes["to"]}
        if first.dtype is not None and int(first.dtype) == attributes["to"]:
            return first
        if first.op == "Unsqueeze" and first.inputs[0] is not None:
            return _normal(
                "Unsqueeze", (make("Cast", first.inputs[0], **attributes), *first.inputs[1:]), {}, value, output
            )
        if first.op == "Expand" and first.inputs[0] is not None and first.inputs[0].array is not None:
            return _normal("Expand", (make("Cast", first.inputs[0], **attributes), first.inputs[1]), {}, value, output)
    axes = inputs[1] if op in _AXES and len(inputs) == 2 else None
    if axes is not None and axes.array is not None and axes.array.ndim == 0:  # as torch 2.6 writes it
        inputs = (inputs[0], _constant(axes.array.reshape(1)))
        given = [i for i in inputs if i is not None]
    if op == "Slice" and len(inputs) == 5 and (steps := inputs[4]) is not None and steps.array is not None:
        inputs = inputs[:4] if (steps.array == 1).all() else inputs
    if op == "Slice" and first is not None and len(inputs) in (3, 4) and _is_whole(inputs):
        return first
    if op == "Reshape" and len(given) == 2 and given[1].array is not None and given[1].array.tolist() == [-1]:
        attributes = {}  # no zeros to allow
        while given[0].op == "Reshape" and given[0].inputs[0] is not None:
            target = given[0].inputs[1]
            if target is not None and target.array is not None and target.array.tolist() == [-1]:
                return given[0]
            given[0] = given[0].inputs[0]
        inputs = tuple(given)
        if given[0].shape is not None and len(given[0].shape) == 1:
            return given[0]
    if op == "If" and first is not None and first.array is not None and len(inputs) == 3:
        chosen = inputs[1] if bool(first.array.reshape(-1)[0]) else inputs[2]
        if chosen is not None:
            return chosen
    if op == "Shape" and attributes.get("start") == 0:
        attributes = {k: v for k, v in attributes.items() if k != "start"}
    if op == "Shape" and first is not None and first.shape is not None:
        part = first.shape[slice(attributes.get("start"), attributes.get("end"))]
        if all(isinstance(d, int) for d in part):
            return _constant(np.asarray(part, np.int64), value)
    size = None if op != "Size" or first is None or first.shape is None else first.shape
    if size is not None and all(isinstance(d, int) for d in size):
        return _constant(np.asarray(_product(size), np.int64), value)
    expression = Expression(op, inputs, attributes, output, value=value)
    folded = _fold(expression)
    if folded is not None:
        return _constant(folded, value, tuple(given))
    if output == 0:
        expression.dtype, expression.shape = _dtype(op, given, attributes), _shape(op, inputs, attributes)
    return expression


_DEFAULTS: dict[str, dict[str, Any]] = {}


def _with_defaults(op: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    if op not in _DEFAULTS:
        _DEFAULTS[op] = {}
        if onnx.defs.has(op):
            for name, attribute in onnx.defs.get_schema(op).attributes.items():
                if attribute.default_value.type != onnx.AttributeProto.UNDEFINED:
                    default = onnx.helper.get_attribute_value(attribute.default_value)
                    _DEFAULTS[op][name] = default.decode() if isinstance(default, bytes) else default
    return {**_DEFAULTS[op], **attributes}


def set_attributes(e: Expression) -> dict[str, Any]:
    """The attributes that differ from what the newest opset has where they are missing."""
    defaults = _with_defaults(e.op, {})
    return {name: value for name, value in e.attributes.items() if name not in defaults or defaults[name] != value}


def _dtype(op: str, inputs: Sequence[Expression], attributes: Mapping[str, Any]) -> ir.DataType | None:
    if op in _BOOLEAN:
        return ir.DataType.BOOL
    if op in _INT64_RESULT:
        return ir.DataType.INT64
    if op == "Cast":
        return ir.DataType(attributes["to"])
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


def _shape(op: str, inputs: Sequence[Expression | None], attributes: Mapping[str, Any]) -> tuple[Dim, ...] | None:
    """The shape, as far as the operators that bags are written in tell it."""
    first = inputs[0] if inputs else None
    if op == "Reshape" and len(inputs) == 2 and inputs[1] is not None and inputs[1].array is not None:
        if inputs[1].array.tolist() == [-1] and first is not None and first.shape is not None:
            known = all(isinstance(d, int) for d in first.shape)
            return (_product(first.shape) if known else None,)
        return tuple(None if d < 0 or d == 0 else int(d) for d in inputs[1].array.reshape(-1))
    if op in ("Range", "NonZero"):
        return (None,) if op == "Range" else (None, None)
    if first is None or first.shape is None:
        return None
    if op in ("Cast", "Not", "Neg", "Abs", "Clip", "CumSum", "Sign", "IsNaN", "ScatterND", "ScatterElements"):
        return first.shape
    if op == "Shape":
        return (len(first.shape[slice(attributes.get("start"), attributes.get("end"))]),)
    if op in ("Equal", "Less", "Greater", "GreaterOrEqual", "LessOrEqual", "Add", "Sub", "Mul", "Div", "And", "Or"):
        shapes = [i.shape if i is not None else None for i in inputs]
        return _broadcast(shapes)
    if op == "Concat" and attributes.get("axis") == 0 and len(first.shape) == 1:
        lengths = [None if i is None or i.shape is None else i.shape[0] for i in inputs]
        return (sum(lengths) if all(isinstance(n, int) for n in lengths) else None,)  # type: ignore[arg-type]
    if op == "Slice":
        return _sliced(first.shape, inputs)
    if op == "Gather" and len(inputs) == 2 and inputs[1] is not None and inputs[1].shape is not None:
        axis = attributes["axis"] % max(len(first.shape), 1)
        return (*first.shape[:axis], *inputs[1].shape, *first.shape[axis + 1 :])
    if op == "Unsqueeze" and len(inputs) == 2 and inputs[1] is not None and inputs[1].array is not None:
        axes = [int(a) for a in inputs[1].array.reshape(-1)]
        rank = len(first.shape) + len(axes)
        rest = iter(first.shape)
        return tuple(1 if k in {a % rank for a in axes} else next(rest) for k in range(rank))
    return None


def _is_whole(inputs: Sequence[Expression | None]) -> bool:
    """Whether a Slice takes everything, from 0 to the largest number that there is."""
    starts, ends = (None if i is None else i.array for i in inputs[1:3])
    if starts is None or ends is None or ends.dtype != np.int64:
        return False
    return bool((starts == 0).all() and (ends == np.iinfo(np.int64).max).all())


def _product(shape: tuple[Dim, ...]) -> int:
    return math.prod(d for d in shape if isinstance(d, int))


def _broadcast(shapes: Iterable[tuple[Dim, ...] | None]) -> tuple[Dim, ...] | None:
    result: tuple[Dim, ...] = ()
    for shape in shapes:
        if shape is None:
            return None
        length = max(len(result), len(shape))
        a, b = ((1,) * (length - len(s)) + s for s in (result, shape))
        result = tuple(y if x == 1 else x if y in (1, x) else None for x, y in zip(a, b, strict=True))
    return result


def _sliced(shape: tuple[Dim, ...], inputs: Sequence[Expression | None]) -> tuple[Dim, ...] | None:
    arrays = [None if i is None else i.array for i in inputs[1:]]
    if len(shape) != 1 or len(inputs) > 4:
        return None
    if isinstance(shape[0], int) and all(a is not None and a.size == 1 for a in arrays):
        begin, end = (int(a.reshape(-1)[0]) for a in arrays[:2] if a is not None)
        return (len(range(shape[0])[begin:end]),)
    return (None,)


def _fold(e: Expression) -> np.ndarray | None:
    """The operator over constants, computed; None where it is none, or not one of these."""
    arrays = [None if i is None else i.array for i in e.inputs]
    if not arrays or any(a is None for a in arrays):
        return None
    x: list[np.ndarray] = [a for a in arrays if a is not None]
    try:
        with np.errstate(all="ignore"):
            result = _compute(e.op, x, e.attributes)
    except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError):
        return None  # not for us to judge: it stays as it is written
    if result is None or result.size > _LARGEST_CONSTANT:
        return None
    return result


_NUMPY: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Equal": np.equal,
    "Less": np.less,
    "Greater": np.greater,
    "Not": np.logical_not,
    "And": np.logical_and,
    "Or": np.logical_or,
}


def _compute(op: str, x: list[np.ndarray], attributes: Mapping[str, Any]) -> np.ndarray | None:
    if op in _NUMPY:
        if any(a.dtype != x[0].dtype for a in x):
            return None  # such a graph runs nowhere
        return np.asarray(_NUMPY[op](*x))
    if op == "Cast":
        target = ir.DataType(attributes["to"])
        return None if target == ir.DataType.STRING else x[0].astype(target.numpy())
    if op == "Concat":
        return np.concatenate(x, attributes["axis"])
    if op == "Expand":
        shape = np.broadcast_shapes(x[0].shape, tuple(int(d) for d in x[1]))
        return np.broadcast_to(x[0], shape) if np.prod(shape, dtype=float) <= _LARGEST_CONSTANT else None
    if op == "Gather":
        return np.take(x[0], x[1], attributes["axis"])
    if op == "Reshape" and not (x[1] == 0).any():
        return x[0].reshape([int(d) for d in x[1]])
    if op == "Squeeze":
        return x[0].squeeze(tuple(int(a) for a in x[1]) if len(x) > 1 else None)
    if op == "Unsqueeze":
        return np.expand_dims(x[0], tuple(int(a) for a in x[1]))
    if op == "ReduceProd" and len(x) == 1:
        return np.asarray(np.prod(x[0], keepdims=bool(attributes["keepdims"]), dtype=x[0].dtype))
    if op == "Range" and x[0].dtype.kind == "i" and len(range(*map(int, x))) <= _LARGEST_CONSTANT:
        return np.asarray(range(int(x[0]), int(x[1]), int(x[2])), x[0].dtype)
    if op == "Slice" and x[0].ndim == 1 and len(x) <= 4 and x[1].size == 1:
        return x[0][int(x[1].reshape(-1)[0]) : int(x[2].reshape(-1)[0])]
    return None


# ---- Reading graphs.

#: What is known from elsewhere of a value that carries no type or shape itself, by name.
Known = Mapping[str, ir.Value]


class Reader:
    """The expressions of a graph's values, and of its subgraphs' values.

    Args:
        known: what shape inference found, by value name, for the values of the outermost graph.
    """

    def __init__(self, known: Known | None = None) -> None:
        self.of: dict[ir.Value, Expression] = {}
        self._known = known or {}

    def read(self, graph: ir.Graph | ir.Function) -> None:
        """Learn a graph and what stands inside of it. Values from outside must have been learnt before."""
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            if value not in self.of:
                self.of[value] = self._source(value)
        for node in graph:
            self._read_node(node)

    def _source(self, value: ir.Value) -> Expression:
        # An initializer that is an input, too, can be overridden by the caller.
        if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
            array = _small_array(value.const_value)
            if array is not None:
                return _constant(array, value)
        return self._opaque(value)

    def _opaque(self, value: ir.Value) -> Expression:
        told = self._known.get(value.name or "", value)
        dtype, shapes = value.dtype or told.dtype, [value.shape, told.shape]
        if value.const_value is not None:
            dtype = dtype or value.const_value.dtype
            shapes.append(ir.Shape(d for d in value.const_value.shape if isinstance(d, int)))
        shape = next((s for s in shapes if s is not None), None)
        dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
        return Expression("Value", dtype=dtype, shape=dims, value=value)

    def _read_node(self, node: ir.Node) -> None:
        inputs = tuple(None if v is None else self._value(v) for v in node.inputs)
        graphs = [a for a in node.attributes.values() if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)]
        refers = any(a.is_ref() for a in node.attributes.values())
        whole = all(name in node.attributes for name in _REQUIRED.get(node.op_type, ()))
        standard = node.domain in ("", "ai.onnx") and node.op_type not in _RANDOM and not refers and whole
        if standard and node.op_type == "Loop":
            return self._read_loop(node, inputs)
        for attribute in graphs:
            for graph in [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs():
                self.read(graph)
        if standard and node.op_type == "If":
            then, other = (node.attributes[n].as_graph() for n in ("then_branch", "else_branch"))
            for k, value in enumerate(node.outputs):
                branches = (self._value(then.outputs[k]), self._value(other.outputs[k]))
                read = _normal("If", (*inputs[:1], *branches), {}, value, 0)
                if read.value is value:
                    read.told = self._opaque(value)
                self.of[value] = read
            return
        for k, value in enumerate(node.outputs):
            if not standard or graphs:
                self.of[value] = self._opaque(value)
            elif node.op_type == "Constant":
                array = _constant_node(node)
                self.of[value] = self._opaque(value) if array is None else _constant(array, value)
            else:
                attributes = {name: _plain(a) for name, a in node.attributes.items()}
                read = _normal(node.op_type, _as_newest(node.op_type, inputs, attributes), attributes, value, k)
                if read.value is value:
                    read.told = self._opaque(value)
                self.of[value] = read

    def _read_loop(self, node: ir.Node, inputs: tuple[Expression | None, ...]) -> None:
        graph = node.attributes["body"].as_graph()
        while len(inputs) < 2:
            inputs = (*inputs, None)
        variables = _variables(inputs[2:], graph.inputs)
        for variable, value in zip(variables, graph.inputs, strict=True):
            variable.told = self._opaque(value)
        self.of.update(zip(graph.inputs, variables, strict=True))
        self.read(graph)
        body = Body(variables, tuple(self._value(v) for v in graph.outputs))
        for k, value in enumerate(node.outputs):
            self.of[value] = _looped(inputs, body, k, value, self._opaque(value))

    def _value(self, value: ir.Value) -> Expression:
        if value not in self.of:
            self.of[value] = self._source(value)
        return self.of[value]


def _small_array(tensor: ir.TensorProtocol) -> np.ndarray | None:
    """The numbers of a small tensor that the model holds itself."""
    if isinstance(tensor, ir.ExternalTensor) or tensor.dtype == ir.DataType.STRING or tensor.size > _LARGEST_CONSTANT:
        return None
    return tensor.numpy()


def _constant_node(node: ir.Node) -> np.ndarray | None:
    attribute = next(iter(node.attributes.values()), None)
    if attribute is None or attribute.is_ref():
        return None
    match attribute.name:
        case "value":
            return _small_array(attribute.as_tensor())
        case "value_int" | "value_ints":
            return np.asarray(attribute.value, np.int64)
        case "value_float" | "value_floats":
            return np.asarray(attribute.value, np.float32)
    return None


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
    return tuple(attribute.value) if isinstance(attribute.value, list) else attribute.value


def _as_newest(
    op: str, inputs: tuple[Expression | None, ...], attributes: dict[str, Any]
) -> tuple[Expression | None, ...]:
    """The inputs with what older opsets kept in an attribute; takes it out of ``attributes``."""
    if op in _AXES and _AXES[op] in attributes:
        return (*inputs[:1], constant(attributes.pop(_AXES[op])))
    return inputs


# ---- Comparing.


def difference(a: Expression | None, b: Expression | None) -> tuple[Expression | None, Expression | None] | None:
    """None where both compute the same; else the first place where they part."""
    waiting: list[tuple[Expression | None, Expression | None]] = [(a, b)]
    seen: set[tuple[int, int]] = set()
    paired: dict[int, Expression] = {}
    while waiting:
        x, y = waiting.pop()
        if x is y:
            continue
        if x is None or y is None:
            return x, y
        if (id(x), id(y)) in seen:
            continue
        seen.add((id(x), id(y)))
        if x.op == "Variable" and paired.get(id(x)) is y:
            continue
        if x.op != y.op or x.op in ("Value", "Variable") or x.output != y.output:
            return x, y
        if x.array is not None or y.array is not None:
            if not _equal(x, y):
                return x, y
            continue
        if len(x.inputs) != len(y.inputs) or dict(x.attributes) != dict(y.attributes):
            return x, y
        if x.body is not None and y.body is not None:
            one, other = x.body, y.body
            if len(one.variables) != len(other.variables) or len(one.results) != len(other.results):
                return x, y
            paired.update((id(p), q) for p, q in zip(one.variables, other.variables, strict=True))
            waiting += reversed(list(zip(one.results, other.results, strict=True)))
        waiting += reversed(list(zip(x.inputs, y.inputs, strict=True)))
    return None


def _equal(x: Expression, y: Expression) -> bool:
    if x.array is None or y.array is None or x.dtype != y.dtype or x.array.shape != y.array.shape:
        return False
    return x.array.tobytes() == y.array.tobytes()


def inside(expression: Expression | None, limit: int = 2000) -> Iterator[Expression]:
    """An expression and what it is computed from, breadth first, loops' bodies included; at most ``limit`` of them."""
    waiting: list[Expression | None] = [expression]
    seen: set[int] = set()
    for found in waiting:  # grows while it is walked
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if len(seen) > limit:
            return
        yield found
        waiting += found.inputs
        if found.body is not None:
            waiting += found.body.results
