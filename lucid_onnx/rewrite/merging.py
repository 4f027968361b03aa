"""Put one EmbeddingBagCollection in the place of bags whose results a Concat lays beside each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection


@dataclasses.dataclass(frozen=True)
class Merged:
    """Bags that became one node: the Concat that they ended in, what they were, and their tables in order."""

    where: str
    op: str
    mode: str
    tables: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unmerged:
    """A bag that a Concat lays beside others, and that was left as it is, and why."""

    where: str
    bag: str
    reason: str


class _Part(NamedTuple):
    """A bag that ends in an input of a Concat."""

    node: ir.Node
    unsqueeze: ir.Node | None  # what gives its result an axis of one in the middle

    def key(self) -> dict[str, Any]:
        """What neighbours must have in common."""
        attributes = {a.name: a.value for a in self.node.attributes.values()}
        if self.unsqueeze is not None:
            attributes["the columns of the table"] = _columns(self.node)
        return {"op_type": self.node.op_type, "an axis of one": self.unsqueeze is not None, **attributes}


def merge(model: ir.Model) -> tuple[tuple[Merged, ...], tuple[Unmerged, ...]]:
    """Merge bags of a model, in place, whose ``ai.lucid`` nodes have all of their attributes written on them.

    Neighbours among the inputs of a Concat become one node if they are EmbeddingBag nodes of one name and of equal
    attributes, whose results nothing else reads. The Concat joins results [B, D] over their last axis, or over axis 1
    what an Unsqueeze made [B, 1, D] of them. Its other inputs stay where they are.
    """
    merged: list[Merged] = []
    unmerged: list[Unmerged] = []
    bodies = [f for f in model.functions.values() if f.domain != spec.DOMAIN]
    nodes = [*model.graph.all_nodes(), *(n for f in bodies for n in f.all_nodes())]
    names = _free_names(model, nodes)
    signatures = {_signature(n) for n in nodes if n.domain == spec.DOMAIN and n.op_type in collection.VARIANTS}
    for node in nodes:
        if node.op_type != "Concat" or node.domain not in ("", "ai.onnx"):
            continue
        parts = [_part(value) for value in node.inputs]
        if sum(part is not None for part in parts) < 2:
            continue
        reasons = [None if part is None else _objection(node, part) for part in parts]
        inputs: list[ir.Value | None] = []
        before: list[ir.Node] = []
        for run in _runs(parts, reasons):
            bags = [part for part in (parts[k] for k in run) if part is not None]
            if len(run) > 1:
                signature = _of(bags).signature
                if signature in signatures or len(signatures) < collection.MOST_SIGNATURES:
                    signatures.add(signature)
                    before += _collection(bags, names)
                    inputs.append(before[-1].outputs[0])
                    mode = spec.MODES[bags[0].node.attributes["mode"].as_int()]
                    tables = tuple(_name(bag.node.inputs[0]) for bag in bags)
                    merged.append(Merged(_where(node), bags[0].node.op_type, mode, tables))
                    continue
                for k in run:
                    reasons[k] = f"the model has collections of {len(signatures)} kinds already, and may not have more"
            elif bags and reasons[run[0]] is None:
                reasons[run[0]] = _alone(run[0], parts, reasons)
            inputs += [node.inputs[k] for k in run]
        unmerged += [
            Unmerged(_where(node), _where(part.node), reason)
            for part, reason in zip(parts, reasons, strict=True)
            if part is not None and reason is not None
        ]
        if before:
            _replace(node, before, inputs)
    if merged:
        RemoveUnusedNodesPass()(model)
    return tuple(merged), tuple(unmerged)


def _part(value: ir.Value | None) -> _Part | None:
    node = None if value is None else value.producer()
    unsqueeze = None
    if node is not None and node.op_type == "Unsqueeze" and node.domain in ("", "ai.onnx"):
        # Of a result [B, D] the middle: 1, or the last but one of what comes out.
        if _axes(node) not in ([1], [-2]) or node.inputs[0] is None:
            return None
        node, unsqueeze = node.inputs[0].producer(), node
    if node is None or node.domain != spec.DOMAIN or node.op_type not in OPERATOR_OF:
        return None
    return None if node.op_type in collection.VARIANTS else _Part(node, unsqueeze)


def _objection(concat: ir.Node, part: _Part) -> str | None:
    """Why a bag cannot be part of a collection, whatever its neighbours are; None if it can."""
    if part.node.op_type not in spec.VARIANTS:
        return f"it is {part.node.op_type}, and the tables of a collection are rows, not codes"
    axis = concat.attributes["axis"].as_int()
    if axis not in ((1, -1) if part.unsqueeze is None else (1, -2)):
        return f"the Concat is over axis {axis}, and not over the one that bags lie beside each other in"
    for node in (part.node, part.unsqueeze):
        if node is None:
            continue
        result = node.outputs[0]
        if result.is_graph_output():
            return f"its result {_name(result)!r} is an output of the graph"
        if len(result.uses()) != 1:
            return f"its result {_name(result)!r} is read {len(result.uses())} times"
        if node.graph is not concat.graph:
            return "it stands outside of the subgraph that the Concat is in"
    if part.unsqueeze is not None and not _columns(part.node):
        return "the columns of its table are not known, which a collection with an axis for the tables needs"
    return None


def _runs(parts: Sequence[_Part | None], reasons: Sequence[str | None]) -> Iterator[list[int]]:
    """The numbers of all inputs, neighbours that can be merged together."""
    keys = [None if p is None or r is not None else p.key() for p, r in zip(parts, reasons, strict=True)]
    run = [0]
    for k in range(1, len(parts)):
        if keys[k] is not None and keys[k] == keys[run[-1]]:
            run.append(k)
        else:
            yield run
            run = [k]
    yield run


def _alone(k: int, parts: Sequence[_Part | None], reasons: Sequence[str | None]) -> str:
    """Why a bag that could be part of a collection has no neighbour for it."""
    own = parts[k]
    for other in (k - 1, k + 1):
        part = parts[other] if 0 <= other < len(parts) else None
        if own is None or part is None or reasons[other] is not None:
            continue
        a, b = own.key(), part.key()
        name = next(n for n in {**a, **b} if a.get(n) != b.get(n))
        return f"its neighbour, {_where(part.node)}, has {name} = {b.get(name)}, and it has {a.get(name)}"
    return "the inputs of the Concat beside it are no bags that could be merged"


def _of(bags: Sequence[_Part]) -> collection.Variant:
    op = spec.VARIANTS[bags[0].node.op_type]
    return collection.variant(num_tables=len(bags), layout="rows" if op.two_d else "ragged", weighted=op.weighted)


def _collection(bags: Sequence[_Part], names: Iterator[str]) -> list[ir.Node]:
    """The node, and what brings its result into the shape that the Concat's inputs had together."""
    op, first = _of(bags), bags[0].node
    given = dict.fromkeys(spec.VARIANTS[first.op_type].inputs)
    inputs = [bag.node.inputs[k] for k in range(len(given)) for bag in bags]
    attributes = {
        **{a.name: a.value for a in first.attributes.values()},
        "num_tables": op.num_tables,
        "layout": collection.LAYOUTS.index(op.layout),
        "weighted": int(op.weighted),
    }
    node = ir.node(op.name, inputs, attributes, domain=spec.DOMAIN)
    node.outputs[0].name = next(names)
    # ONNX Runtime 1.17 does not find out the type of a node's output whose inputs are variadic.
    table, pooled = first.inputs[0], first.outputs[0]
    node.outputs[0].type = pooled.type or (None if table is None else table.type)
    if bags[0].unsqueeze is None:
        return [node]
    # 0: as many as there are.
    shape = ir.node("Constant", [], {"value_ints": [0, len(bags), _columns(first)]})
    shape.outputs[0].name = next(names)
    reshape = ir.node("Reshape", [node.outputs[0], shape.outputs[0]])
    reshape.outputs[0].name = next(names)
    reshape.outputs[0].type = node.outputs[0].type
    return [node, shape, reshape]


def _replace(concat: ir.Node, before: list[ir.Node], inputs: Sequence[ir.Value | None]) -> None:
    """Put nodes, and a Concat of what is left to join, in the place of a Concat."""
    graph, value = concat.graph, concat.outputs[0]
    assert graph is not None
    if len(inputs) > 1:
        before.append(ir.node("Concat", list(inputs), {"axis": concat.attributes["axis"].as_int()}, name=concat.name))
    result = before[-1].outputs[0]
    name = value.name
    value.name = f"{name}_unmerged"
    result.name, result.type, result.shape, result.doc_string = name, value.type, value.shape, value.doc_string
    result.metadata_props.update(value.metadata_props)
    graph.insert_before(concat, before)
    value.replace_all_uses_with(result, replace_graph_outputs=True)


def _axes(unsqueeze: ir.Node) -> list[int] | None:
    """The axes of an Unsqueeze, as far as they are constant."""
    if (attribute := unsqueeze.attributes.get("axes")) is not None:
        return list(attribute.as_ints())
    axes = unsqueeze.inputs[1] if len(unsqueeze.inputs) > 1 else None
    if axes is None:
        return None
    tensor = axes.const_value
    producer = axes.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        for name in ("value", "value_ints", "value_int"):
            if (attribute := producer.attributes.get(name)) is not None:
                found = attribute.value.numpy() if name == "value" else attribute.value
                return [int(a) for a in (found if isinstance(found, (list, tuple)) else [*_flat(found)])]
    return None if tensor is None else [int(a) for a in _flat(tensor.numpy())]


def _flat(values: Any) -> Iterator[int]:
    yield from getattr(values, "ravel", lambda: [values])()


def _columns(bag: ir.Node) -> int | None:
    """D of a bag's table, where it is fixed."""
    table = bag.inputs[0]
    shape = None if table is None else table.shape
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int):
        return None
    return shape[1]


def _signature(node: ir.Node) -> tuple[int, str, bool]:
    return collection.VARIANTS[node.op_type].of({a.name: a.value for a in node.attributes.values()}).signature


def _free_names(model: ir.Model, nodes: Sequence[ir.Node]) -> Iterator[str]:
    taken = {v.name for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}
    taken |= {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    return (name for k in itertools.count() if (name := f"collection_{k}") not in taken)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _where(node: ir.Node) -> str:
    name = node.name or next((v.name for v in node.outputs if v.name), "")
    return f"node {name!r} ({node.op_type})"
