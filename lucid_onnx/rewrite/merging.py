"""Put one EmbeddingBagCollection in the place of bags whose results a Concat concatenates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lucid_onnx.ops import OPERATOR_OF, quantized_embedding_bag
from lucid_onnx.ops.attributes import Choice
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import lowering
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.emit import Emitter

from . import nodes
from .reader import constant_array, small_array


@dataclasses.dataclass(frozen=True)
class Merged:
    """Bags that became one node: the Concat that they ended in, what they were, and their tables in order."""

    where: str
    op: str
    mode: str
    tables: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unmerged:
    """A bag that was left as it is, and why. ``where`` is the node that reads its result: a Concat, or another."""

    where: str
    bag: str
    reason: str


def merge(model: ir.Model) -> tuple[tuple[Merged, ...], tuple[Unmerged, ...]]:
    """Merge the bags of a model, in place.

    Neighbours among the inputs of a Concat become one node if they are EmbeddingBag nodes of one name and of equal
    attributes, whose results nothing else reads. The Concat joins results [B, D] over their last axis, or over axis 1
    what an Unsqueeze made [B, 1, D] of them. Its other inputs stay where they are.

    Bags get all of their attributes written on them. One that is not valid is left as it is.
    """
    work = _Merging(model)
    work.run()
    if work.merged:
        RemoveUnusedNodesPass()(model)
    return tuple(work.merged), tuple(work.unmerged)


class _Part(NamedTuple):
    """A bag that ends in an input of a Concat."""

    node: ir.Node
    unsqueeze: ir.Node | None  # what makes [B, 1, D] of its result

    def key(self) -> dict[str, Any]:
        """What neighbours must have in common."""
        attributes = _attributes(self.node)
        if self.unsqueeze is not None:
            attributes["the columns of the table"] = _columns(self.node)
        return {"op_type": self.node.op_type, "an axis of one": self.unsqueeze is not None, **attributes}


class _Merging:
    """Merges the bags of a model; lists what it merged and what it did not."""

    def __init__(self, model: ir.Model) -> None:
        self.merged: list[Merged] = []
        self.unmerged: list[Unmerged] = []
        self._told: set[ir.Node] = set()  # bags that are in one of these lists
        bodies = [f for f in model.functions.values() if f.domain != spec.DOMAIN]
        self._nodes = [n for graph in (model.graph, *bodies) for n in graph.all_nodes()]
        self._names = nodes.free_names(model, "collection")
        self._opset = nodes.opset(model.opset_imports)
        ours = [n for n in self._nodes if n.domain == spec.DOMAIN]
        self._signatures = {_signature(n) for n in ours if n.op_type in collection.VARIANTS}
        self._valid = {n for n in ours if n.op_type in spec.VARIANTS and _complete(n)}

    def run(self) -> None:
        for node in self._nodes:
            if node.op_type == "Concat" and nodes.is_standard(node) and _has_axis(node):
                parts = [self._part(value) for value in node.inputs]
                if sum(part is not None for part in parts) > 1:
                    self._merge_inputs(node, parts)
        self._report_others()

    def _report_others(self) -> None:
        """Tell of the bags that no Concat has beside others."""
        names = {*spec.VARIANTS, *quantized_embedding_bag.spec.VARIANTS}
        bags = [n for n in self._nodes if n.domain == spec.DOMAIN and n.op_type in names]
        for bag in bags:
            if bag not in self._told:
                reader, reason = _why_apart(bag, alone=len(bags) == 1)
                self.unmerged.append(Unmerged(reader, nodes.where(bag), reason))

    def _part(self, value: ir.Value | None) -> _Part | None:
        node = None if value is None else value.producer()
        unsqueeze = None
        if node is not None and node.op_type == "Unsqueeze" and nodes.is_standard(node):
            # Of a result [B, D] the middle: 1, or the last but one of what comes out.
            if _axes(node) not in ([1], [-2]) or node.inputs[0] is None:
                return None
            node, unsqueeze = node.inputs[0].producer(), node
        if node is None or node.domain != spec.DOMAIN or node.op_type not in OPERATOR_OF:
            return None
        if node.op_type in collection.VARIANTS or (node.op_type in spec.VARIANTS and node not in self._valid):
            return None
        return _Part(node, unsqueeze)

    def _merge_inputs(self, concat: ir.Node, parts: Sequence[_Part | None]) -> None:
        """Merge what can be among the inputs of a Concat."""
        self._told.update(part.node for part in parts if part is not None)
        reasons = [None if part is None else _why_not(concat, part) for part in parts]
        inputs: list[ir.Value | None] = []
        written: list[ir.Node] = []
        for run in _runs(parts, reasons):
            bags = [part for part in (parts[k] for k in run) if part is not None]
            if len(run) > 1 and self._takes(_variant(bags)):
                written += _collection(bags, self._names, self._opset)
                inputs.append(written[-1].outputs[0])
                self._report(concat, bags)
                continue
            if len(run) > 1:
                for k in run:
                    kinds = len(self._signatures)
                    reasons[k] = f"the model has collections of {kinds} kinds already, and may not have more"
            elif bags and reasons[run[0]] is None:
                reasons[run[0]] = _why_alone(run[0], parts, reasons)
            inputs += [concat.inputs[k] for k in run]
        self.unmerged += [
            Unmerged(nodes.where(concat), nodes.where(part.node), reason)
            for part, reason in zip(parts, reasons, strict=True)
            if part is not None and reason is not None
        ]
        if written:
            if len(inputs) > 1:
                axis = concat.attributes["axis"].as_int()
                written.append(ir.node("Concat", inputs, {"axis": axis}, name=concat.name))
            name = concat.outputs[0].name or ""
            nodes.replace(concat, written, name, f"{name}_unmerged")

    def _takes(self, op: collection.Variant) -> bool:
        """Whether the model may have such a collection; if so, it is counted from now on."""
        signature = (op.num_tables, collection.LAYOUTS.index(op.layout), op.weighted)
        if signature not in self._signatures and len(self._signatures) >= collection.MOST_SIGNATURES:
            return False
        self._signatures.add(signature)
        return True

    def _report(self, concat: ir.Node, bags: Sequence[_Part]) -> None:
        first = bags[0].node
        tables = tuple(_name(bag.node.inputs[0]) for bag in bags)
        mode = spec.MODES[first.attributes["mode"].as_int()]
        self.merged.append(Merged(nodes.where(concat), first.op_type, mode, tables))


# ---- The bags of a Concat.


def _has_axis(concat: ir.Node) -> bool:
    """Whether a Concat has the attribute that it must have; onnx.checker tells of one that has not."""
    axis = concat.attributes.get("axis")
    return axis is not None and axis.type == ir.AttributeType.INT


def _why_not(concat: ir.Node, part: _Part) -> str | None:
    """Why a bag cannot be part of a collection, whatever its neighbours are; None if it can."""
    if part.node.op_type not in spec.VARIANTS:
        return _why_quantized(part.node)
    axis = concat.attributes["axis"].as_int()
    if axis not in ((1, -1) if part.unsqueeze is None else (1, -2)):
        return f"the Concat is over axis {axis}, and not over the one that a collection concatenates over"
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


def _why_quantized(bag: ir.Node) -> str:
    return f"it is {bag.op_type}, and collections do not support quantized tables"


def _why_apart(bag: ir.Node, *, alone: bool) -> tuple[str, str]:
    """What reads the result of a bag that no Concat has beside another one, and why that is not merged."""
    result = bag.outputs[0]
    readers = [use.node for use in result.uses()]
    name = _name(result)
    if result.is_graph_output() or not readers:
        return "", f"its result {name!r} is an output of the graph, and no Concat joins it with another bag's"
    reader = readers[0]
    where = nodes.where(reader)
    if bag.op_type not in spec.VARIANTS:
        return where, _why_quantized(bag)
    if alone:
        return where, "it is the only bag of the model"
    if len(readers) > 1:
        return where, f"its result {name!r} is read {len(readers)} times, and not by a Concat alone"
    if reader.op_type == "Unsqueeze" and nodes.is_standard(reader) and _axes(reader) in ([1], [-2]):
        where = nodes.where(next((use.node for use in reader.outputs[0].uses()), reader))
    if reader.op_type in ("Concat", "Unsqueeze") and nodes.is_standard(reader):
        return where, "no Concat has its result beside another bag's, as it is or behind an Unsqueeze over axis 1"
    return where, f"its result {name!r} is read by {where}, and not by a Concat with other bags' results"


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


def _why_alone(k: int, parts: Sequence[_Part | None], reasons: Sequence[str | None]) -> str:
    """Why a bag that could be part of a collection has no neighbour for it."""
    own = parts[k]
    for other in (k - 1, k + 1):
        part = parts[other] if 0 <= other < len(parts) else None
        if own is None or part is None or reasons[other] is not None:
            continue
        a, b = own.key(), part.key()
        name = next(n for n in {**a, **b} if a.get(n) != b.get(n))
        theirs, its = (_in_words(name, key.get(name)) for key in (b, a))
        return f"its neighbour, {nodes.where(part.node)}, has {name} = {theirs}, and it has {its}"
    return "the inputs of the Concat beside it are not bags that could be merged"


# ---- The collection.


def _variant(bags: Sequence[_Part]) -> collection.Variant:
    op = spec.VARIANTS[bags[0].node.op_type]
    return collection.variant(num_tables=len(bags), layout="rows" if op.two_d else "ragged", weighted=op.weighted)


def _collection(bags: Sequence[_Part], names: Iterator[str], opset: int) -> list[ir.Node]:
    """The node, and what brings its result into the shape that the Concat's inputs had together."""
    op, first = _variant(bags), bags[0].node
    count = len(spec.VARIANTS[first.op_type].inputs)
    inputs = [bag.node.inputs[k] for k in range(count) for bag in bags]
    counted = [f"{lowering.counted(op)}_{t}" for t in range(len(bags))]
    place = op.inputs.index(counted[0])
    inputs[place] = _unchecked(op, dict(zip(counted, inputs[place:], strict=False)), opset)
    attributes = {
        **_attributes(first),
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


def _unchecked(op: collection.Variant, given: Mapping[str, ir.Value | None], opset: int) -> ir.Value | None:
    """What tells how many bags the first of the tables has, without the check that a lowered collection has there.

    ``given`` is what tells it for all of them, by the names of the collection's inputs.
    """
    name = next(iter(given))
    value = given[name]
    reshape = None if value is None else value.producer()
    if reshape is None or reshape.op_type != "Reshape":
        return value
    read = {**given, name: reshape.inputs[0]}
    names = {id(v): n for n, v in reversed(read.items())}  # tables may have the same bags
    emitter = Emitter(opset)
    last = lowering.checked(emitter, op, {n: names[id(v)] for n, v in read.items()})
    made = {output: node for node in emitter.nodes for output in node.output}
    return reshape.inputs[0] if _is(value, last, made, read) else value


def _is(
    value: ir.Value | None, name: str, made: Mapping[str, onnx.NodeProto], given: Mapping[str, ir.Value | None]
) -> bool:
    """Whether a value is computed as that of the name is by the nodes ``made``, from the same ``given`` values."""
    if name in given or value is None:
        return name in given and value is given[name]
    node, producer = made[name], value.producer()
    if producer is None or producer.op_type != node.op_type or not nodes.is_standard(producer):
        return False
    if node.op_type == "Constant":
        array = constant_array(producer)
        expected = numpy_helper.to_array(node.attribute[0].t)
        return array is not None and array.dtype == expected.dtype and np.array_equal(array, expected)
    expected_attributes = {a.name: ir.from_proto(a).value for a in node.attribute}
    return (
        _attributes(producer) == expected_attributes
        and len(producer.inputs) == len(node.input)
        and all(_is(v, n, made, given) for v, n in zip(producer.inputs, node.input, strict=True))
    )


# ---- What nodes say.


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {a.name: a.value for a in node.attributes.values()}


def _in_words(name: str, value: Any) -> Any:
    """A value of an attribute; of one that is a choice, the text that a caller gives."""
    declared = next((a for a in spec.Attributes.table() if a.name == name), None)
    if declared is None or not isinstance(declared.kind, Choice):
        return value
    return repr(declared.kind.decode(name, {name: value}, declared.default))


def _signature(node: ir.Node) -> tuple[Any, Any, bool]:
    """What a collection's function is written for."""
    a = _attributes(node)
    return a.get("num_tables"), a.get("layout"), bool(a.get("weighted"))


def _complete(bag: ir.Node) -> bool:
    """Write all attributes of a bag on it, as `convert` does; False if it is not valid, which `convert` reports."""
    op, given = spec.VARIANTS[bag.op_type], {}
    if len(bag.inputs) != len(op.inputs) or None in bag.inputs:
        return False
    for attribute in bag.attributes.values():
        if attribute.is_ref() or attribute.name not in spec.Attributes.onnx_names(op):
            return False
        try:
            given[attribute.name] = spec.Attributes.read(ir.to_proto(attribute))
        except ValueError:
            return False
    table = bag.inputs[0]
    dtype, shape = (None, None) if table is None else (table.dtype, table.shape)
    rows = None if shape is None or len(shape) != 2 or not isinstance(shape[0], int) else shape[0]
    double = given.get("stash_type") == ir.DataType.DOUBLE if dtype is None else dtype == ir.DataType.DOUBLE
    try:
        attributes = spec.Attributes.from_onnx(given)
        attributes.check(weighted=op.weighted, num_rows=rows)
    except (TypeError, ValueError):
        return False
    bag.attributes.clear()
    for attribute in ir.convenience.convert_attributes(attributes.to_onnx(op, double=double)):
        bag.attributes[attribute.name] = attribute
    return True


def _axes(unsqueeze: ir.Node) -> list[int] | None:
    """The axes of an Unsqueeze, if they are constant."""
    if (attribute := unsqueeze.attributes.get("axes")) is not None:
        return list(attribute.as_ints()) if attribute.type == ir.AttributeType.INTS else None
    axes = unsqueeze.inputs[1] if len(unsqueeze.inputs) > 1 else None
    if axes is None:
        return None
    producer = axes.producer()
    array = None if axes.const_value is None else small_array(axes.const_value)
    if array is None and producer is not None and producer.op_type == "Constant":
        array = constant_array(producer)
    return None if array is None else [int(a) for a in array.ravel()]


def _columns(bag: ir.Node) -> int | None:
    """D of a bag's table, where it is fixed."""
    table = bag.inputs[0]
    shape = None if table is None else table.shape
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int):
        return None
    return shape[1]


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
