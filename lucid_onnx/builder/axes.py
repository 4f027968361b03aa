"""Names of axes that are true: what ragged bags read has as many positions as it has, whatever else there is.

Exporters are told the names of axes by their callers. facebookresearch/dlrm gives those of the dense features, of the
offsets and of all indices one name, ``batch_size``. Values whose shapes have equal names are of equal size to ONNX
Runtime, which then gives one's memory to another.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx

from lucid_onnx.graph import node_lists_of, reads
from lucid_onnx.ops import OPERATOR_OF, variant
from lucid_onnx.ops.embedding_bag import spec

#: Operators whose result has the last axis of all of their inputs, where that is not 1.
_ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike"),
        *("Ceil", "Clip", "Div", "Equal", "Exp", "Floor", "Greater", "GreaterOrEqual", "Identity", "Less"),
        *("LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Relu", "Round", "Sigmoid"),
        *("Sign", "Sqrt", "Sub", "Tanh", "Where", "Xor"),
    )
)
#: Operators whose results have the last axis of their first input: of a row that is taken from a matrix.
_ROWS_OF_FIRST = frozenset(("Slice", "Split", "Squeeze"))


def separate(model: onnx.ModelProto) -> None:
    """Give what each ragged bag of a graph reads an axis name of its own, where another input has the same; in place.

    A bag's indices and its per_sample_weights keep one name in common. So do bags that read the same input. Names that
    were declared for what is computed from such inputs go.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.input}
    nodes = list(itertools.chain.from_iterable(node_lists_of(graph.node)))
    makers = {name: node for node in nodes for name in node.output}
    groups = [group for group in (_sources(names, makers, inputs) for names in _read(nodes)) if group]
    names = _Names(graph)
    changed: set[str] = set()
    for group in _joined(groups):
        for old in sorted({last for name in group if (last := _last_axis(inputs[name]))}):
            members = [name for name in group if _last_axis(inputs[name]) == old]
            if not names.has_another(old, members):
                continue
            names.replaced.add(old)
            new = names.fresh(f"num_{members[0]}")
            for name in members:
                inputs[name].type.tensor_type.shape.dim[-1].dim_param = new
            changed.update(members)
    if changed:
        _forget(graph, nodes, changed, names.replaced)


def _read(nodes: Iterable[onnx.NodeProto]) -> Iterator[list[str]]:
    """The indices and per_sample_weights of each ragged bag."""
    for node in nodes:
        if node.domain != spec.DOMAIN or node.op_type not in OPERATOR_OF:
            continue
        integers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        try:
            op = variant(node.op_type, integers)
            op.check_node_inputs(node.input)
        except ValueError:
            continue  # `convert` says what is wrong
        named = dict(zip(op.inputs, node.input, strict=True))
        for bag in op.bags:
            if bag.offsets is not None:
                weights = bag.indices.replace("indices", "per_sample_weights")
                yield [named[name] for name in (bag.indices, weights) if name in named]


def _sources(
    names: Iterable[str], makers: Mapping[str, onnx.NodeProto], inputs: Mapping[str, onnx.ValueInfoProto]
) -> set[str]:
    """The inputs of the graph whose last axis is that of these values [N]."""
    waiting, seen, found = list(names), set(), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in inputs:
            found.add(name)
        node = makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _ELEMENTWISE:
            waiting += node.input
        elif node.op_type in _ROWS_OF_FIRST:
            waiting += node.input[:1]
        elif node.op_type == "Gather":
            # A row of a matrix, by a number; or numbers that are looked up one by one.
            waiting += node.input[:1] if node.input[0] in inputs else node.input[1:2]
    return found


def _joined(groups: Iterable[set[str]]) -> list[list[str]]:
    """The groups, those that share an input as one."""
    group_of: dict[str, set[str]] = {}
    for group in groups:
        joined = group.union(*(group_of[name] for name in group if name in group_of))
        group_of.update(dict.fromkeys(joined, joined))
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


def _axes(values: Iterable[onnx.ValueInfoProto]) -> Iterator[str]:
    """The names of all axes of values."""
    return (dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim)


def _last_axis(value: onnx.ValueInfoProto) -> str:
    """The name of the last axis, "" without one."""
    dims = value.type.tensor_type.shape.dim
    return dims[-1].dim_param if dims else ""


class _Names:
    """The names of axes of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.replaced: set[str] = set()
        self._of_inputs = Counter(_axes(graph.input))
        self._taken = set(_axes(itertools.chain(graph.input, graph.output, graph.value_info)))

    def has_another(self, axis: str, members: Sequence[str]) -> bool:
        """Whether more axes of inputs had this name than the last ones of the members."""
        return self._of_inputs[axis] > len(members)

    def fresh(self, stem: str) -> str:
        """A name that no axis has."""
        name = next(
            n for n in itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(1))) if n not in self._taken
        )
        self._taken.add(name)
        return name


def _forget(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], changed: set[str], replaced: set[str]) -> None:
    """Take back what is declared of values that are computed from ``changed``, up to bags."""
    found = set(changed)
    for node in nodes:
        if node.domain != spec.DOMAIN and found.intersection(reads(node)):
            found.update(node.output)
    found -= changed
    for value in [v for v in graph.value_info if v.name in found and _has_names(v)]:
        graph.value_info.remove(value)
    for value in graph.output:
        if value.name in found:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in replaced:
                    dim.ClearField("dim_param")


def _has_names(value: Any) -> bool:
    return any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
