"""The expressions of a graph's values."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from . import nodes
from .expressions import Body, Expression, from_array
from .normal_form import LARGEST_CONSTANT, as_newest, normal, normal_loop, variables

#: Two nodes of these may give different results though all that is written is equal.
_RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
)
#: Attributes without which a node is not valid, so that it is not looked into, as without inputs that it needs.
_REQUIRED = {"Cast": ("to",), "Loop": ("body",), "If": ("then_branch", "else_branch"), "Concat": ("axis",)}

#: How many elements may be kept of constants that nodes compute: small nodes would else ask for any amount of memory.
#: Constants of a few elements, which decide what a graph means, are not counted.
_MOST_COMPUTED, _FEW = 2**22, 64

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
        self._room = _MOST_COMPUTED

    def read(self, graph: ir.Graph | ir.Function) -> None:
        """Read a graph and its subgraphs. The values from outside that it uses must have been read before."""
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            if value not in self.of:
                self.of[value] = self._source(value)
        for node in graph:
            self._read_node(node)

    def _source(self, value: ir.Value) -> Expression:
        """What no node computes."""
        # An initializer that is also an input can be overridden by the caller.
        if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
            array = small_array(value.const_value)
            if array is not None:
                return from_array(array, value)
        return self._opaque(value)

    def _opaque(self, value: ir.Value) -> Expression:
        """A value whose computation is not looked at, with its type and shape."""
        known = self._known.get(value.name or "", value)
        dtype, shapes = value.dtype or known.dtype, [value.shape, known.shape]
        if value.const_value is not None:
            dtype = dtype or value.const_value.dtype
            shapes.append(ir.Shape(d for d in value.const_value.shape if isinstance(d, int)))
        shape = next((s for s in shapes if s is not None), None)
        dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
        return Expression("Value", dtype=dtype, shape=dims, value=value)

    def _read_node(self, node: ir.Node) -> None:
        inputs = tuple(None if v is None else self._value(v) for v in node.inputs)
        standard = _is_standard(node)
        if standard and node.op_type == "Loop":
            self._read_loop(node, inputs)
            return
        graphs = list(nodes.subgraphs(node))
        for graph in graphs:
            self.read(graph)
        if standard and node.op_type == "If":
            then, otherwise = (node.attributes[n].as_graph() for n in ("then_branch", "else_branch"))
            for k, value in enumerate(node.outputs):
                branches = (self._value(then.outputs[k]), self._value(otherwise.outputs[k]))
                self._declare(value, normal("If", (*inputs[:1], *branches), {}, value, 0))
        elif not standard or graphs:
            self.of.update((value, self._opaque(value)) for value in node.outputs)
        elif node.op_type == "Constant":
            array = constant_array(node)
            for value in node.outputs:
                self.of[value] = self._opaque(value) if array is None else from_array(array, value)
        elif node.op_type == "Dropout":  # which is standard where it is off
            self.of.update((value, self._opaque(value)) for value in node.outputs)
            self._declare(node.outputs[0], normal("Identity", inputs[:1], {}, node.outputs[0], 0))
        else:
            for k, value in enumerate(node.outputs):
                attributes = {name: _plain(a) for name, a in node.attributes.items()}
                newest = as_newest(node.op_type, inputs, attributes)
                self._declare(value, normal(node.op_type, newest, attributes, value, k))

    def _declare(self, value: ir.Value, found: Expression) -> None:
        """Take down a value's expression, with what the graph declares of it."""
        if found.value is value:
            if found.array is not None and found.array.size > _FEW:
                self._room -= found.array.size
                found = self._opaque(value) if self._room < 0 else found
            found.declared = self._opaque(value)
        self.of[value] = found

    def _read_loop(self, node: ir.Node, inputs: tuple[Expression | None, ...]) -> None:
        graph = node.attributes["body"].as_graph()
        while len(inputs) < 2:
            inputs = (*inputs, None)
        found = variables(inputs[2:], graph.inputs)
        for variable, value in zip(found, graph.inputs, strict=True):
            variable.declared = self._opaque(value)
        self.of.update(zip(graph.inputs, found, strict=True))
        self.read(graph)
        body = Body(found, tuple(self._value(v) for v in graph.outputs))
        for k, value in enumerate(node.outputs):
            self.of[value] = normal_loop(inputs, body, k, value, self._opaque(value))

    def _value(self, value: ir.Value) -> Expression:
        if value not in self.of:
            self.of[value] = self._source(value)
        return self.of[value]


def _is_standard(node: ir.Node) -> bool:
    """Whether the operator's name and attributes say what a node computes."""
    return (
        nodes.is_standard(node)
        and (node.op_type not in _RANDOM or _is_dropout_that_is_off(node))
        and not any(a.is_ref() for a in node.attributes.values())
        and all(name in node.attributes for name in _REQUIRED.get(node.op_type, ()))
        and len(node.inputs) >= _fewest_inputs().get(node.op_type, 0)
        and all(
            _attribute_types().get((node.op_type, a.name), {a.type.name}) >= {a.type.name}
            for a in node.attributes.values()
        )
    )


def _is_dropout_that_is_off(node: ir.Node) -> bool:
    """Whether this is a Dropout that gives its input: training_mode is not given, or known to be false."""
    if node.op_type != "Dropout" or "is_test" in node.attributes:  # of opset 6, which trains by default
        return False
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return True
    producer = mode.producer()
    if producer is not None:
        array = constant_array(producer) if producer.op_type == "Constant" else None
    else:
        is_held = mode.is_initializer() and not mode.is_graph_input() and mode.const_value is not None
        array = small_array(mode.const_value) if is_held and mode.const_value is not None else None
    return array is not None and not array.any()


@functools.cache
def _fewest_inputs() -> dict[str, int]:
    """By standard operator, the inputs that it needs in every opset."""
    fewest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            fewest[schema.name] = min(fewest.get(schema.name, schema.min_input), schema.min_input)
    return fewest


@functools.cache
def _attribute_types() -> dict[tuple[str, str], set[str]]:
    """By standard operator and attribute, the names of the types that it has in some opset."""
    types: dict[tuple[str, str], set[str]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            for name, attribute in schema.attributes.items():
                types.setdefault((schema.name, name), set()).add(attribute.type.name)  # type: ignore[attr-defined]
    return types


def small_array(tensor: ir.TensorProtocol) -> np.ndarray | None:
    """The numbers of a small tensor that the model holds itself; `files.read` has put those in that were outside."""
    if isinstance(tensor, ir.ExternalTensor) or tensor.dtype == ir.DataType.STRING or tensor.size > LARGEST_CONSTANT:
        return None
    return tensor.numpy()


def constant_array(node: ir.Node) -> np.ndarray | None:
    """The numbers of a Constant node; None where there are too many, or for text."""
    attribute = next(iter(node.attributes.values()), None)
    if attribute is None or attribute.is_ref():
        return None
    match attribute.name:
        case "value":
            return small_array(attribute.as_tensor())
        case "value_int" | "value_ints":
            return np.asarray(attribute.value, np.int64)
        case "value_float" | "value_floats":
            return np.asarray(attribute.value, np.float32)
    return None


def _plain(attribute: ir.Attr) -> Any:
    """The value of an attribute, to be compared with ``==``."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if isinstance(tensor, ir.ExternalTensor):
            return (tensor.dtype, tuple(tensor.shape), tensor.location, tensor.offset, tensor.length)
        return (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
    return tuple(attribute.value) if isinstance(attribute.value, list) else attribute.value
