"""The placeholder nodes of an export, and what a bag reads through them.

A translation sees one operator at a time. What takes two it leaves as a placeholder, which
`lucid_onnx.torch.resolve` replaces in the finished graph:

* ``EmbeddingRenorm``: torch clips the rows of a table *in the table*, then looks them up. The lookup takes the norm
  from this node, which nothing reads any more.
* ``Embedding``: a lookup that is pooled is a bag, another one is a Gather.
* ``PackedEmbeddingBag``: a bag over rows as torch packs quantized values. What they are shows in the finished graph.
* ``BatchedEmbeddingBags``: the bags of several features, over indices and offsets in the packed layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

from lucid_onnx.builder import TABLE_TYPES
from lucid_onnx.ops.attributes import either
from lucid_onnx.ops.embedding_bag import spec

RENORM, LOOKUP, PACKED, BATCHED = "EmbeddingRenorm", "Embedding", "PackedEmbeddingBag", "BatchedEmbeddingBags"
#: torch's numbers of the modes.
SUM, MEAN, MAX = range(3)


class RejectedError(ValueError):
    """A bag that cannot be exported. torch wraps its own errors around this one."""


class Norm(NamedTuple):
    """What a table's rows were clipped to."""

    max_norm: float | None = None
    norm_type: float = 2.0


def unclipped(weight: ir.Value, indices: ir.Value) -> tuple[ir.Value, Norm]:
    """The table behind a weight, and what max_norm clipped the rows of ``indices`` in it to.

    Where several bags share a table, torch clips it for one after another. Clipping rows twice to one norm is
    clipping them once, so such a chain leads back to the table itself.
    """
    weight = source(weight)
    node = weight.producer()
    if node is None or not is_ours(node, RENORM):
        return weight, Norm()
    norm = norm_of(node)
    if source(node.inputs[1]) is not source(indices):
        raise ValueError(
            f"{name_of(weight)} is read by a bag without a max_norm of its own after another lookup changed it in "
            f"place (max_norm = {norm.max_norm}): the model would have to change its table as it runs"
        )
    while node is not None and is_ours(node, RENORM):
        if norm_of(node) != norm:
            raise ValueError(
                f"{name_of(weight)} is shared by lookups of max_norm = {norm_of(node).max_norm} (norm_type = "
                f"{norm_of(node).norm_type}) and {norm.max_norm} (norm_type = {norm.norm_type}), each of which "
                "changes it in place for the next: the model would have to change its table as it runs"
            )
        weight = source(node.inputs[0])
        node = weight.producer()
    return weight, norm


def norm_of(node: ir.Node) -> Norm:
    """The attributes of an ``EmbeddingRenorm``."""
    return Norm(node.attributes["max_norm"].as_float(), node.attributes["norm_type"].as_float())


def bag_attributes(
    weight: ir.Value,
    indices: ir.Value,
    mode: int,
    padding_idx: int | None,
    norm: Norm,
    include_last_offset: bool,
    *,
    weighted: bool,
) -> spec.Attributes:
    """The parameters of a bag, checked together with its inputs' types."""
    if not is_table(weight):
        raise TypeError(
            f"a bag's weight is {weight.dtype} {weight.shape}; expected [V, D] of {either(spec.TABLE_DTYPES)}"
        )
    if indices.dtype not in map(ir.DataType.from_numpy, spec.INDEX_DTYPES):
        raise TypeError(f"a bag's indices are {indices.dtype}; expected {either(spec.INDEX_DTYPES)}")
    if mode not in (SUM, MEAN, MAX):
        raise ValueError(f"mode = {mode} of torch.embedding_bag is not 0 (sum), 1 (mean) or 2 (max)")
    attributes = spec.Attributes(
        spec.ATEN_MODES[mode], padding_idx, norm.max_norm, norm.norm_type, include_last_offset=include_last_offset
    )
    num_rows = dims(weight)[0]
    attributes.check(weighted=weighted, num_rows=num_rows if isinstance(num_rows, int) else None)
    return attributes


def is_table(value: ir.Value) -> bool:
    """Whether a bag can pool its rows: [V, D], of a dtype that the operator takes."""
    return value.dtype in [ir.DataType(t) for t in TABLE_TYPES.values()] and len(dims(value)) == 2


def dims(value: ir.Value) -> tuple[Any, ...]:
    """The sizes of a value, ints or symbols; () where its shape is unknown."""
    return () if value.shape is None else tuple(value.shape)


def is_ours(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of these operators of our domain."""
    return node.domain == spec.DOMAIN and node.op_type in op_types


def source(value: ir.Value | None) -> ir.Value:
    """The value behind Identity nodes, which is what detach and alias become."""
    if value is None:
        raise AssertionError("an operator of ours lacks an input")
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def name_of(value: ir.Value) -> str:
    """The table behind clipping nodes, for an error message."""
    value = source(value)
    node = value.producer()
    while node is not None and is_ours(node, RENORM):
        value = source(node.inputs[0])
        node = value.producer()
    return f"the table {value.name!r}"


def put_in_place(last: ir.Node, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put ``new`` in the place of ``old``, whose output is that of ``last``."""
    graph = last.graph
    if graph is None:
        raise AssertionError(f"node {last.name!r} is in no graph")
    ir.convenience.replace_nodes_and_values(graph, last, old, new, last.outputs, new[-1].outputs)
