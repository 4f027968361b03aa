"""A small writer of ONNX nodes, so that a lowering reads like the arithmetic that it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Fact(NamedTuple):
    """What is known of a value before any run."""

    type: int = 0  #: of its elements, an ``onnx.TensorProto.DataType``; 0 if unknown
    dims: tuple[int | None, ...] | None = None  #: None where a dimension, or their number, is unknown


#: What is known of a model's values, by name.
Facts = Mapping[str, Fact]


class Emitter:
    """Appends nodes to a list; every value is a string, the name of an ONNX value.

    ``e.Add(a, b)`` appends an Add node and returns its output's name. Operands that are Python ints or
    lists of ints become int64 constants. Integer arithmetic therefore reads ``e.Add(n, 1)``. The same
    expression is written once, however often it is asked for.

    Args:
        opset: the version of the standard operators.
        prefix: the start of every name, so that several expansions live in one graph.
        attributes: the values of the operator's attributes where they are known. Without them the nodes
            refer to the attributes of the function that they are the body of.
        choice: which of an operator's lowerings to write, for whoever has several; None for the usual one.
        facts: what is known of the values that the nodes read.

    What decides between ways to write an expansion is known of all attributes or of none. A type to cast to
    decides nothing, and may be left to the function where the rest is known (see `with_attributes`).
    """

    def __init__(
        self,
        opset: int,
        prefix: str = "",
        attributes: dict[str, int | float] | None = None,
        choice: Any = None,
        facts: Facts | None = None,
    ) -> None:
        self.opset = opset
        self.choice = choice
        self._facts = facts or {}
        self._part = ""
        self._parts: dict[str, int] = {}  # how many nodes each part has so far
        self.nodes: list[onnx.NodeProto] = []
        self.prefix = prefix
        self._attributes = attributes
        self._names = iter(range(10**9))
        self._known: dict[tuple[Any, ...], str] = {}  # expression -> its value's name

    def name(self) -> str:
        return f"{self.prefix}{next(self._names)}"

    def part(self, name: str) -> None:
        """The nodes that follow get this name, and numbers where they are several, for whoever reads the graph."""
        self._part = name

    def fact(self, value: str) -> Fact:
        """What is known of a value that the nodes read."""
        return self._facts.get(value, Fact())

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def emit(*inputs: str | int | Sequence[int], **attributes: Any) -> str:
            return self.node(op_type, inputs, attributes)

        return emit

    def node(
        self,
        op_type: str,
        inputs: Sequence[str | int | Sequence[int]],
        attributes: dict[str, Any],
        output: str | None = None,
    ) -> str:
        names = [i if isinstance(i, str) else self.int64(i) for i in inputs]
        if op_type == "Cast" and attributes and self.fact(names[0]).type == attributes["to"]:
            return names[0]
        key = (op_type, *names, repr(sorted(attributes.items())))
        if output is None:
            if key in self._known:
                return self._known[key]
            output = self._known[key] = self.name()
        if self._part and op_type != "Constant":
            attributes = {"name": self._node_name(), **attributes}
        self.nodes.append(helper.make_node(op_type, names, [output], **attributes))
        return output

    def _node_name(self) -> str:
        number = self._parts[self._part] = self._parts.get(self._part, 0) + 1
        return f"{self.prefix}{self._part}{'' if number == 1 else f'_{number}'}"

    def multi_output(
        self, op_type: str, inputs: Sequence[str | int | Sequence[int]], attributes: dict[str, Any], count: int
    ) -> tuple[str, ...]:
        """A node of ``count`` outputs; the names of them."""
        first, *others = (self.name() for _ in range(count))
        self.node(op_type, inputs, attributes, first)
        self.nodes[-1].output.extend(others)
        return (first, *others)

    def with_attributes(self, attributes: dict[str, int | float]) -> Emitter:
        """This emitter, writing to the same nodes, where the given attributes have the given values.

        Attributes that are not given stay what they are: known, or the function's. Constants are written anew, as in
        a branch ONNX Runtime cannot take away a Cast that does nothing if the branch uses both sides of it.
        """
        view = copy.copy(self)
        view._attributes = {**(self._attributes or {}), **attributes}
        view._known = {key: value for key, value in self._known.items() if key[0] not in ("attribute", "Constant")}
        return view

    def rename(self, value: str, output: str) -> None:
        """Give a value, which nothing reads, the name ``output``."""
        for node in self.nodes:
            node.output[:] = [output if name == value else name for name in node.output]

    def int64(self, value: int | Sequence[int]) -> str:
        """An int64 constant: a scalar for an int, one dimension for a sequence."""
        return self.constant(np.asarray(value, np.int64))

    def constant(self, value: np.ndarray | np.generic) -> str:
        key = ("Constant", value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = self.node(
                "Constant", (), {"value": numpy_helper.from_array(np.asarray(value))}, self.name()
            )
        return self._known[key]

    def attribute(self, name: str, kind: int) -> str:
        """The operator's attribute (``onnx.AttributeProto.INT`` or ``FLOAT``) as a scalar int64 or float."""
        key = ("attribute", name)
        if key not in self._known:
            slot = "value_int" if kind == onnx.AttributeProto.INT else "value_float"
            if self._attributes is not None and name in self._attributes:
                self._known[key] = self.node("Constant", (), {slot: self._attributes[name]}, self.name())
            else:
                self._known[key] = self.node("Constant", (), {}, self.name())
                self.nodes[-1].attribute.append(
                    onnx.AttributeProto(name=slot, ref_attr_name=name, type=kind)  # type: ignore[arg-type]
                )
        return self._known[key]

    def cast_to_attribute(self, x: str, name: str) -> str:
        """Cast ``x`` to the type that the INT attribute ``name`` gives (a TensorProto.DataType)."""
        if self._attributes is not None and name in self._attributes:
            return str(self.Cast(x, to=self._attributes[name]))
        key = ("cast to attribute", x, name)
        if key in self._known:
            return self._known[key]
        output = self._known[key] = self.node("Cast", (x,), {}, self.name())
        self.nodes[-1].attribute.append(
            onnx.AttributeProto(name="to", ref_attr_name=name, type=onnx.AttributeProto.INT)
        )
        return output

    def select(
        self,
        test: Callable[[dict[str, int | float]], bool],
        condition: Callable[[], str],
        then: Callable[[Emitter], str],
        otherwise: Callable[[Emitter], str],
    ) -> str:
        """``then`` or ``otherwise``: decided now where the attributes are known, else an If on ``condition``.

        The condition depends on attributes alone, so that a runtime folds the If away after inlining.
        """
        if self._attributes is not None:
            return then(self) if test(self._attributes) else otherwise(self)
        where = condition()
        branches = {}
        for key, write in (("then_branch", then), ("else_branch", otherwise)):
            inner = self._inside()
            result = inner._made(write(inner))
            nodes = needed(inner.nodes, [result])
            branches[key] = helper.make_graph(nodes, key, [], [onnx.ValueInfoProto(name=result)])
        return self.node("If", (where,), branches, self.name())

    def branch(
        self,
        condition: str,
        then: Callable[[Emitter], str],
        otherwise: Callable[[Emitter], str],
        *,
        names: tuple[str, str],
        rank: int,
        kind: int | None = None,
    ) -> str:
        """``then`` or ``otherwise``, as a run decides: an If on a scalar.

        Args:
            names: of the two graphs.
            rank: the number of dimensions of both results.
            kind: their type; by default that of ``stash_type``. IREE wants types, which a function cannot know.
        """
        if kind is None and self._attributes is not None:
            kind = int(self._attributes.get("stash_type", 0)) or None
        branches: dict[str, Any] = {"name": self._node_name()}
        for key, name, write in zip(("then_branch", "else_branch"), names, (then, otherwise), strict=True):
            inner = self._inside()
            if self.is_static:  # IREE does not see that an axis is constant which was written outside
                inner._known = {key: value for key, value in inner._known.items() if key[0] != "Constant"}
            result = inner._made(write(inner))
            typed = onnx.ValueInfoProto(name=result)
            if kind is not None:
                typed = helper.make_tensor_value_info(result, kind, [None] * rank)
            branches[key] = helper.make_graph(needed(inner.nodes, [result]), name, [], [typed])
        return self.node("If", (condition,), branches, self.name())

    def stacked(self, count: str, write: Callable[[Emitter, str], str]) -> str:
        """What ``write`` gives for 0 (int64, scalar), 1 and so on, ``count`` of them, stacked by a Loop.

        The values have one shape, and ``count`` [1] is above zero: of no values a runtime cannot tell the shape.
        """
        inner = self._inside()
        number, going = self.name(), self.name()
        result = inner._made(write(inner, number))
        goes_on = inner.node("Identity", (going,), {}, self.name())
        inputs = [
            helper.make_tensor_value_info(number, onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(going, onnx.TensorProto.BOOL, []),
        ]
        outputs = [
            helper.make_tensor_value_info(goes_on, onnx.TensorProto.BOOL, []),
            onnx.ValueInfoProto(name=result),  # untyped, as the type may depend on an attribute
        ]
        body = helper.make_graph(needed(inner.nodes, [goes_on, result]), "body", inputs, outputs)
        start = self.constant(np.bool_(True))
        return self.node("Loop", (self.Squeeze(count), start), {"body": body}, self.name())

    def _inside(self) -> Emitter:
        """For the nodes of a subgraph: outer values are seen inside, not the other way."""
        inner = Emitter(self.opset, self.prefix, self._attributes, self.choice, self._facts)
        inner.name = self.name  # type: ignore[method-assign]  # one numbering, no shadowed names
        inner._part, inner._parts = self._part, self._parts
        inner._known = dict(self._known)
        return inner

    def _made(self, result: str) -> str:
        """``result``, as a value that the subgraph has made itself."""
        made = bool(self.nodes) and result in self.nodes[-1].output
        return result if made else str(self.Identity(result))

    def function(
        self, domain: str, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str]
    ) -> onnx.FunctionProto:
        """The nodes so far as a model-local function."""
        nodes = needed(self.nodes, outputs)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_function(
            domain, name, list(inputs), list(outputs), nodes, imports, attributes=list(attributes)
        )

    @property
    def is_static(self) -> bool:
        """Whether the attributes are known, so that nothing has to be decided in the graph."""
        return self._attributes is not None

    def knows(self, test: Callable[[dict[str, int | float]], bool]) -> bool:
        """Whether the attributes are known and pass the test."""
        return self._attributes is not None and test(self._attributes)

    def reduce(self, op_type: str, x: str, axis: int, keepdims: int = 0) -> str:
        """A reduction over one axis; axes were an attribute before opset 18, except on ReduceSum."""
        if op_type == "ReduceSum" or self.opset >= 18:
            return self.node(op_type, (x, [axis]), {"keepdims": keepdims})
        return self.node(op_type, (x,), {"axes": [axis], "keepdims": keepdims})


def needed(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Those of the nodes that lead to an output.

    The others do harm in ONNX Runtime before 1.19: from the second run of a shape on, the memory of what is not read
    is other values' too, which are silently wrong then.
    """
    read = set(outputs)
    found = []
    for node in reversed(list(nodes)):
        if read.intersection(node.output):
            read.update(reads(node))
            found.append(node)
    found.reverse()
    return found


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those of its subgraphs among them."""
    yield from node.input
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (output.name for output in graph.output)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among a node's attributes: a branch, a body, or several in one attribute."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def forms(
    spec: Any, expand: Callable[[Emitter, Any, Sequence[str], Sequence[str]], None]
) -> tuple[Callable[[Any, int], onnx.FunctionProto], Callable[..., list[onnx.NodeProto]]]:
    """An operator's ``function`` and ``nodes``, from what writes its nodes into an Emitter."""

    def function(op: Any, opset: int, choice: Any = None) -> onnx.FunctionProto:
        """The operator as a model-local function, generic in its attributes and dtypes."""
        e = Emitter(opset, choice=choice)
        expand(e, op, op.inputs, op.outputs)
        return e.function(spec.DOMAIN, op.name, op.inputs, op.outputs, spec.Attributes.onnx_names(op))

    def nodes(
        op: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: dict[str, int | float],
        opset: int,
        prefix: str,
        choice: Any = None,
        facts: Facts | None = None,
    ) -> list[onnx.NodeProto]:
        """The operator as standard nodes for one node's attributes (see ``spec.Attributes.to_onnx``)."""
        e = Emitter(opset, prefix, attributes, choice, facts)
        expand(e, op, inputs, outputs)
        return needed(e.nodes, outputs)

    return function, nodes
