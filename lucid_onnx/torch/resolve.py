"""The finished graph of an export: its placeholders become bags or a Gather, or raise an error.

`resolve_placeholders` takes what two operators of torch tell together. `pool_lookups` then searches the simplified
graph as `lucid_onnx.fuse` does: one recogniser serves files and modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable
from lucid_onnx.rewrite import Unfused
from lucid_onnx.rewrite.nodes import where
from lucid_onnx.rewrite.search import Search

from .placeholders import (
    LOOKUP,
    MAX,
    MEAN,
    PACKED,
    RENORM,
    SUM,
    bag_attributes,
    dims,
    is_ours,
    is_table,
    name_of,
    norm_of,
    source,
    unclipped,
)
from .simplify import fold_constants

#: The key in the meta of a Gather that was torch's embedding, which takes no negative indices.
_EMBEDS = "lucid_onnx.embeds"
#: Reductions that pool, by ONNX operator: the mode.
_POOLINGS = {"ReduceSum": SUM, "ReduceMean": MEAN, "ReduceMax": MAX}


def resolve_placeholders(model: ir.Model) -> None:
    """Replace the lookups, in place, and give bags of [B, L] their shapes.

    What max_norm clips stays a placeholder until `pool_lookups`.
    """
    IdentityEliminationPass()(model)  # constant folding would copy a small table behind one
    RemoveUnusedNodesPass()(model)  # the clippings whose norm a bag took over, and the half of a max that nobody reads
    fold_constants(model)  # axes that are computed
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            if is_ours(node, LOOKUP):
                _replace_lookup(node)
            elif is_ours(node, PACKED):
                _replace_packed(node, model.graph)
            elif is_ours(node, *(op.name for op in spec.VARIANTS.values() if op.two_d)):
                node.outputs[0].shape = ir.Shape([dims(source(node.inputs[1]))[0], dims(source(node.inputs[0]))[1]])
    RemoveUnusedNodesPass()(model)


def pool_lookups(model: ir.Model) -> list[Unfused]:
    """Put a bag in the place of lookups and what pools them, in place; what looked like one and is left, and why.

    Two kinds of lookups are hidden from the search. One that was not torch's embedding counts negative indices from the
    end of the table, which a bag rejects. One whose rows are read by more than poolings is in memory anyway.
    """
    hidden = {n.name for n in _lookups(model) if _EMBEDS not in n.meta}
    shared: list[Unfused] = []
    readers = {n.name: _readers(n) for n in _lookups(model) if n.name not in hidden}
    if any(len(found) > 1 for found in readers.values()):
        trial = model.clone()
        _search(trial, hidden)
        for left in _lookups(trial):
            others = _readers(left)
            if 0 < len(others) < len(readers.get(left.name, [])):
                hidden.add(left.name)
                reason = f"its rows are read by {others[0]} as well, so that no bag saves them"
                shared.append(Unfused(where(left), "Embedding", reason))
    return [*shared, *reversed(_search(model, hidden))]


def _lookups(model: ir.Model) -> list[ir.Node]:
    """The Gathers of rows of a table."""
    gathers = (n for n in model.graph.all_nodes() if n.op_type == "Gather" and n.domain == "")
    return [n for n in gathers if is_table(source(n.inputs[0]))]


def _readers(node: ir.Node) -> list[str]:
    """What reads a node's result, and more than its shape."""
    (rows,) = node.outputs
    found = [where(n) for n in rows.consumers() if n.op_type != "Shape"]
    return [*found, "the model's output"] if rows.is_graph_output() else found


def _search(model: ir.Model, hidden: set[str | None]) -> list[Unfused]:
    """Fuse a model, in place, but for the lookups of these names; what is left, the last node first."""
    nodes = [n for n in _lookups(model) if n.name in hidden]
    for node in nodes:
        node.domain = spec.DOMAIN  # an operator that no pattern knows
    search = Search(model, {}, assume_nonempty=False)
    search.run()
    for node in nodes:
        node.domain = ""
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
            table, norm = unclipped(source(node.inputs[0]), source(node.inputs[op.inputs.index("indices")]))
            found = spec.Attributes.from_onnx({a.name: a.value for a in node.attributes.values()})
            found = dataclasses.replace(found, max_norm=norm.max_norm, norm_type=norm.norm_type)
            attributes = found.to_onnx(op, double=table.dtype == ir.DataType.DOUBLE)
            node.attributes.update((a.name, a) for a in ir.convenience.convert_attributes(attributes))
            node.replace_input_with(0, table)
    RemoveUnusedNodesPass()(model)
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


def _replace_lookup(lookup: ir.Node) -> None:
    """Make a lookup of rows a bag together with the reduction behind it, or a Gather."""
    weight, indices = source(lookup.inputs[0]), source(lookup.inputs[1])
    pooling = _pooling(lookup, weight, indices)
    if pooling is None:
        gather = ir.node("Gather", [weight, indices], {"axis": 0}, name=lookup.name)
        gather.meta[_EMBEDS] = True
        _replace(lookup, [lookup], [gather])
        return
    last, mode = pooling.nodes[0], pooling.mode
    try:
        table, norm = unclipped(weight, indices)
        attributes = bag_attributes(table, indices, mode, None, norm, include_last_offset=False, weighted=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    op = spec.variant(two_d=True, weighted=False)
    open_length = not isinstance(dims(indices)[1], int)
    new = _NewNodes()
    if mode == MAX and open_length:
        indices = new.without_empty_bags(indices)
    pooled = new.add(
        op.name,
        [table, indices],
        attributes.to_onnx(op, double=table.dtype == ir.DataType.DOUBLE),
        domain=spec.DOMAIN,
        name=last.name,
    )
    if mode == MEAN and open_length:
        pooled = new.nan_if_empty(pooled, indices, table.dtype)
    if pooling.keepdims:
        new.add("Unsqueeze", [pooled, new.constant(np.array([1]))])
    _replace(last, pooling.nodes, new.nodes)


def _replace_packed(node: ir.Node, graph: ir.Graph) -> None:
    """Make a bag over packed rows one over the quantized values, scales and biases in them, which become initializers.

    Raises:
        ValueError: the rows are not a constant.
    """
    rows = source(node.inputs[0])
    if rows.const_value is None or not rows.is_initializer():
        raise ValueError(f"the packed rows {rows.name!r} are computed; a bag over quantized values needs constant ones")
    attributes = {a.name: a.value for a in node.attributes.values()}
    codes_type = {8: "uint8", 4: "uint4"}[attributes["bits"]]
    table = QuantizedTable.from_torch_prepacked(rows.const_value.numpy(), codes_type)
    given: dict[str, ir.Value | None] = {}
    for name, array in table.inputs.items():
        whole = f"{rows.name}.{name}"
        if whole not in graph.initializers:
            tensor = ir.tensor(array, name=whole)
            value = ir.Value(name=whole, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(value)
        given[name] = graph.initializers[whole]
    inputs = (*node.inputs, None, None)[:4]
    given |= dict(zip(("indices", "offsets", "per_sample_weights"), inputs[1:], strict=True))
    op = quantized_embedding_bag.spec.variant(
        second="bias", two_d=given["offsets"] is None, weighted=given["per_sample_weights"] is not None
    )
    meaning = quantized_embedding_bag.spec.Attributes(
        "sum",
        include_last_offset=bool(attributes["include_last_offset"]),
        codes_type=codes_type,
        embedding_dim=table.embedding_dim,
    )
    bag = ir.node(op.name, [given[i] for i in op.inputs], meaning.to_onnx(op), domain=spec.DOMAIN, name=node.name)
    _replace(node, [node], [bag])


class _NewNodes:
    """The nodes that a pooled lookup becomes, in their order."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None, **where: Any
    ) -> ir.Value:
        self.nodes.append(ir.node(op_type, inputs, attributes, **where))
        return self.nodes[-1].outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.add("Constant", [], {"value": ir.tensor(array)})

    def without_empty_bags(self, indices: ir.Value) -> ir.Value:
        """``indices`` [B, L], or an error at run time where L is 0.

        A maximum over nothing is an error in torch, where a bag has a row of zeros. [B, 0] has no reshape to [B, 1].
        """
        shape = self.add("Max", [self.add("Shape", [indices]), self.constant(np.array([0, 1]))])
        return self.add("Reshape", [indices, shape], {"allowzero": 1})

    def nan_if_empty(self, pooled: ir.Value, indices: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``pooled`` plus 0 / L, which is 0, or NaN where the L of ``indices`` [B, L] is 0.

        A mean over nothing is NaN in torch, where a bag has a row of zeros.
        """
        wide = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        size = self.add("Cast", [self.add("Shape", [indices], {"start": 1, "end": 2})], {"to": wide})
        nothing = self.add("Div", [self.constant(np.zeros(1, wide.numpy())), size])
        if dtype != wide:  # there and back is exact, and not every runtime adds in 16 bits
            pooled = self.add("Cast", [pooled], {"to": wide})
        pooled = self.add("Add", [pooled, nothing])
        return pooled if dtype == wide else self.add("Cast", [pooled], {"to": dtype})


class _Pooling(NamedTuple):
    """A lookup [B, L, D], and the reduction over L that is its only reader."""

    nodes: tuple[ir.Node, ...]  #: from the last to the lookup
    mode: int
    keepdims: bool  #: whether L stays, as 1


def _pooling(lookup: ir.Node, weight: ir.Value, indices: ir.Value) -> _Pooling | None:
    """The reduction that pools a lookup, or None."""
    if len(dims(indices)) != 2 or not is_table(weight):
        return None
    nodes = [lookup]
    reduction = _only_reader(lookup)
    widened = reduction is not None and _casts(reduction, ir.DataType.FLOAT) and weight.dtype.itemsize == 2
    if widened and reduction is not None:  # 16-bit reductions are written in float32, as a bag sums them
        nodes.insert(0, reduction)
        reduction = _only_reader(reduction)
    if reduction is None or reduction.domain != "" or reduction.op_type not in _POOLINGS:
        return None
    nodes.insert(0, reduction)
    if widened:
        narrow = _only_reader(reduction)
        if narrow is None or not _casts(narrow, weight.dtype):
            return None
        nodes.insert(0, narrow)
    axes = None
    if len(reduction.inputs) > 1 and reduction.inputs[1] is not None:
        axes = ir.convenience.get_const_tensor(reduction.inputs[1])
    if axes is None or [axis % 3 for axis in axes.numpy().reshape(-1).tolist()] != [1]:
        return None
    mode = _POOLINGS[reduction.op_type]
    if mode != SUM and dims(indices)[1] == 0:  # a mean of nothing is NaN, a maximum an error; a bag has zeros
        return None
    keepdims = reduction.attributes.get("keepdims")
    return _Pooling(tuple(nodes), mode, keepdims is None or keepdims.as_int() != 0)


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads a node's one output, as its first input and in the same graph; or None."""
    (output,) = node.outputs
    readers = tuple(output.uses())
    if output.is_graph_output() or len(readers) != 1 or readers[0].idx != 0:
        return None
    return readers[0].node if readers[0].node.graph is node.graph else None


def _casts(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.domain == "" and node.op_type == "Cast" and node.attributes["to"].as_int() == dtype


def _replace(last: ir.Node, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put ``new`` in the place of ``old``, whose output is that of ``last``."""
    graph = last.graph
    if graph is None:
        raise AssertionError(f"node {last.name!r} is in no graph")
    ir.convenience.replace_nodes_and_values(graph, last, old, new, last.outputs, new[-1].outputs)
