"""The finished graph of an export: its placeholders become bags or a Gather, or raise an error.

`resolve_placeholders` takes what two operators of torch tell together. `pool_lookups` then searches the simplified
graph as `lucid_onnx.fuse` does: one recogniser serves files and modules.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite import Unfused
from lucid_onnx.rewrite.nodes import where
from lucid_onnx.rewrite.search import Search

from .features import quantized_bag, quantized_table, replace_batched
from .placeholders import (
    BATCHED,
    LOOKUP,
    PACKED,
    RENORM,
    dims,
    is_ours,
    is_table,
    name_of,
    norm_of,
    put_in_place,
    source,
    unclipped,
)
from .simplify import fold_constants

#: The key in the meta of a Gather that was torch's embedding, which takes no negative indices.
_EMBEDS = "lucid_onnx.embeds"
#: Operators through which indices come to a bag.
_MOVES_INDICES = ("Cast", "Expand", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Where")


def resolve_placeholders(model: ir.Model) -> None:
    """Replace the lookups, in place, and give bags of [B, L] their shapes.

    What clips a table stays a placeholder until `take_over_norms`.
    """
    common.IdentityEliminationPass()(model)  # constant folding would copy a small table behind one
    common.RemoveUnusedNodesPass()(model)  # clippings whose norm a bag took over, and the half of a max nobody reads
    fold_constants(model)  # axes that are computed
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    collections: set[tuple[int, str, bool]] = set()
    for graph in graphs:
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            if is_ours(node, LOOKUP):
                weight, indices = source(node.inputs[0]), source(node.inputs[1])
                gather = ir.node("Gather", [weight, indices], {"axis": 0}, name=node.name)
                gather.meta[_EMBEDS] = True
                put_in_place(node, [node], [gather])
            elif is_ours(node, PACKED):
                _replace_packed(node, model.graph)
            elif is_ours(node, BATCHED):
                replace_batched(node, model.graph, collections)
            elif is_ours(node, *(op.name for op in spec.VARIANTS.values() if op.two_d)):
                node.outputs[0].shape = ir.Shape([dims(source(node.inputs[1]))[0], dims(source(node.inputs[0]))[1]])
    common.RemoveUnusedNodesPass()(model)


def pool_lookups(model: ir.Model) -> list[Unfused]:
    """Put a bag in the place of lookups and what pools them, in place; what looked like one and is left, and why.

    A lookup that was not torch's embedding counts negative indices from the end of the table, which a bag rejects: such
    indices are counted from there before the bag. A lookup whose rows are read by more than poolings is hidden from the
    search, for its rows are in memory anyway.
    """
    indexed = [_counted_from_the_end(node) for node in _lookups(model) if _EMBEDS not in node.meta]
    common.NameFixPass()(model)
    hidden: set[str | None] = set()
    shared: list[Unfused] = []
    readers = {node.name: _readers(node) for node in _lookups(model)}
    if any(len(found) > 1 for found in readers.values()):
        trial = model.clone()
        _search(trial, hidden)
        for left in _lookups(trial):
            others = _readers(left)
            if 0 < len(others) < len(readers.get(left.name, [])):
                hidden.add(left.name)
                reason = f"its rows are read by {others[0]} as well, so that no bag saves them"
                shared.append(Unfused(where(left), "Embedding", reason))
    unfused = [*shared, *reversed(_search(model, hidden))]
    for gather, indices in indexed:
        if gather.graph is not None:  # no bag took its place
            gather.replace_input_with(1, indices)
    common.RemoveUnusedNodesPass()(model)
    return unfused


def _lookups(model: ir.Model) -> list[ir.Node]:
    """The nodes that gather rows of a table."""
    found = [n for n in model.graph.all_nodes() if n.domain == "" and n.op_type in ("Gather", "GatherND")]
    return [n for n in found if is_table(source(n.inputs[0])) and _row_numbers(n) is not None]


def _row_numbers(node: ir.Node) -> ir.Value | None:
    """The indices of a Gather of rows, or of a GatherND whose last axis is one coordinate, as torch writes indexing."""
    indices = node.inputs[1]
    if indices is not None and node.op_type == "GatherND":
        column, rank = indices.producer(), len(dims(indices))
        axes = None if column is None or column.op_type != "Unsqueeze" else column.inputs[1]
        array = None if axes is None else ir.convenience.get_const_tensor(axes)
        last = array is not None and [int(a) % rank for a in array.numpy().reshape(-1)] == [rank - 1]
        indices = column.inputs[0] if column is not None and last else None
    takes_rows = "axis" not in node.attributes or node.attributes["axis"].as_int() == 0
    is_index = indices is not None and indices.dtype in map(ir.DataType.from_numpy, spec.INDEX_DTYPES)
    return indices if takes_rows and is_index and isinstance(dims(source(node.inputs[0]))[0], int) else None


def _counted_from_the_end(node: ir.Node) -> tuple[ir.Node, ir.Value]:
    """Put a Gather of indices that are not negative in the place of a lookup; it, and the indices that there were."""
    weight, indices = source(node.inputs[0]), _row_numbers(node)
    if indices is None or indices.dtype is None:
        raise AssertionError(f"{node} is not a lookup")
    tape, dtype = ir.tape.Tape(), indices.dtype.numpy()
    zero, num_rows = (ir.tensor(np.array(n, dtype)) for n in (0, dims(weight)[0]))
    is_negative = tape.op("Less", [indices, tape.op("Constant", [], {"value": zero})])
    rest = tape.op("Add", [indices, tape.op("Constant", [], {"value": num_rows})])
    counted = tape.op("Where", [is_negative, rest, indices])
    for value, kind in ((is_negative, ir.DataType.BOOL), (rest, indices.dtype), (counted, indices.dtype)):
        value.type, value.shape = ir.TensorType(kind), indices.shape
    tape.op("Gather", [weight, counted], {"axis": 0}, name=node.name)
    put_in_place(node, [node], tape.nodes)
    return tape.nodes[-1], indices


def _readers(node: ir.Node) -> list[str]:
    """What reads a node's result, and more than its shape."""
    (rows,) = node.outputs
    found = [where(n) for n in rows.consumers() if n.op_type != "Shape"]
    return [*found, "the model's output"] if rows.is_graph_output() else found


def _search(model: ir.Model, hidden: set[str | None]) -> list[Unfused]:
    """Fuse a model, in place, but for the lookups of these names; what is left, the last node first."""
    unknown = [n for n in _lookups(model) if n.name in hidden]
    unknown += [n for n in model.graph.all_nodes() if is_ours(n, RENORM)]
    domains = [node.domain for node in unknown]
    for node in unknown:
        node.domain = "hidden"  # where no pattern looks
    search = Search(model, {})
    search.run()
    for node, domain in zip(unknown, domains, strict=True):
        node.domain = domain
    return search.unfused


def take_over_norms(model: ir.Model) -> None:
    """Give bags the max_norm of the placeholders that clip their tables, in place.

    Of our domain, only the operators of the contract are left then.

    Raises:
        ValueError: a clipped table is read by something that is not a bag.
    """
    for node in list(model.graph.all_nodes()):
        if is_ours(node, *spec.VARIANTS) and _is_clipped(node.inputs[0]):
            op = spec.VARIANTS[node.op_type]
            table, norm = unclipped(source(node.inputs[0]), _clipped(node, op))
            found = spec.Attributes.from_onnx({a.name: a.value for a in node.attributes.values()})
            found = dataclasses.replace(found, max_norm=norm.max_norm, norm_type=norm.norm_type)
            attributes = found.to_onnx(op, double=table.dtype == ir.DataType.DOUBLE)
            node.attributes.update((a.name, a) for a in ir.convenience.convert_attributes(attributes))
            node.replace_input_with(0, table)
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph.all_nodes():
        if is_ours(node, RENORM):
            readers = ", ".join(repr(n.name) for n in node.outputs[0].consumers()) or "the model's output"
            raise ValueError(
                f"{name_of(node.outputs[0])} is read by {readers} after max_norm = {norm_of(node).max_norm} changed "
                "it in place; only bags, and a torch.nn.Embedding that is pooled over its sequence, can be exported "
                "with max_norm"
            )


def _is_clipped(table: ir.Value | None) -> bool:
    producer = source(table).producer()
    return producer is not None and is_ours(producer, RENORM)


def _clipped(bag: ir.Node, op: spec.Variant) -> ir.Value:
    """The indices that a table was clipped for, if those of a bag are made of them; else the bag's own.

    What the search puts in the place of an index that a mask takes away has the weight 0.
    """
    own = source(bag.inputs[op.inputs.index("indices")])
    clipping = source(bag.inputs[0]).producer()
    waiting, seen = [own], set[ir.Value]()
    while waiting and clipping is not None:
        value = source(waiting.pop())
        if value is source(clipping.inputs[1]):
            return value
        maker = value.producer()
        if value not in seen and maker is not None and maker.op_type in _MOVES_INDICES:
            waiting += [
                i for i in (maker.inputs[1:] if maker.op_type == "Where" else maker.inputs[:1]) if i is not None
            ]
        seen.add(value)
    return own


def _replace_packed(node: ir.Node, graph: ir.Graph) -> None:
    """Make a bag over packed rows one over the quantized values, scales and biases in them, which become initializers.

    Raises:
        ValueError: the rows are not a constant.
    """
    attributes = {a.name: a.value for a in node.attributes.values()}
    rows = source(node.inputs[0])
    table = quantized_table(rows, attributes["bits"], graph, rows.name or "")
    inputs = (*node.inputs, None, None)[:4]
    given = dict(zip(("indices", "offsets", "per_sample_weights"), inputs[1:], strict=True))
    bag = quantized_bag(table, given, "sum", last=bool(attributes["include_last_offset"]))
    bag.name = node.name
    put_in_place(node, [node], [bag])
