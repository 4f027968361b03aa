"""Bags of several features, and bags over quantized tables, in the place of their placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable

from .placeholders import MEAN, dims, put_in_place, source

#: The key in the meta of packed rows: the table in them.
_PARTS = "lucid_onnx.parts"
_WEIGHTS = "per_sample_weights"
#: The inputs of a bag beside its table, by name; weights may be None, and so may offsets.
Given = Mapping[str, ir.Value | None]


class Quantized(NamedTuple):
    """A quantized table whose parts are initializers."""

    table: QuantizedTable
    inputs: Mapping[str, ir.Value]


def quantized_table(rows: ir.Value, bits: int, graph: ir.Graph, name: str) -> Quantized:
    """The table in packed rows, once for all bags over them; its initializers are called ``name`` and what they are.

    Raises:
        ValueError: the rows are not a constant.
    """
    if (known := rows.meta.get(_PARTS)) is not None:
        return known  # type: ignore[no-any-return]
    if rows.const_value is None or not rows.is_initializer():
        raise ValueError(f"the packed rows {rows.name!r} are computed; a bag over quantized values needs constant ones")
    table = QuantizedTable.from_torch_prepacked(rows.const_value.numpy(), {8: "uint8", 4: "uint4"}[bits])
    if any(f"{name}.{part}" in graph.initializers for part in table.inputs):
        name = f"{rows.name}.{name}"
    inputs = {}
    for part, array in table.inputs.items():
        tensor = ir.tensor(array, name=f"{name}.{part}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        inputs[part] = value
    found = rows.meta[_PARTS] = Quantized(table, inputs)
    return found


def quantized_bag(found: Quantized, given: Given, mode: str, *, last: bool, divisor: str | None = None) -> ir.Node:
    """A bag over a quantized table; ``last`` is include_last_offset."""
    weighted = given[_WEIGHTS] is not None
    op = quantized_embedding_bag.spec.variant(second="bias", two_d=given["offsets"] is None, weighted=weighted)
    meaning = quantized_embedding_bag.spec.Attributes(
        mode,
        include_last_offset=last,
        divisor=divisor,
        codes_type=found.table.codes_type,
        embedding_dim=found.table.embedding_dim,
    )
    meaning.check(weighted=weighted, num_rows=found.table.shape[0])
    inputs = {**found.inputs, **given}
    return ir.node(op.name, [inputs[i] for i in op.inputs], meaning.to_onnx(op), domain=spec.DOMAIN)


def replace_batched(node: ir.Node, graph: ir.Graph, collections: set[tuple[int, str, bool]]) -> None:
    """Put one collection in the place of a placeholder of bags, or a bag for each feature and a Concat.

    Quantized tables have a bag each, and so have floats where a model has as many kinds of collections as it may have.

    Args:
        graph: the model's, which gets the initializers of quantized tables.
        collections: the kinds of collections that the model has so far.
    """
    a: dict[str, Any] = {a.name: a.value for a in node.attributes.values()}
    tables = [source(table) for table in node.inputs[: a["num_tables"]]]
    keys, table_of, is_float = list(a["keys"]), list(a["table_of"]), not any(a["bits"])
    inputs = (*node.inputs[a["num_tables"] :], None)[:3]
    given: Given = dict(zip(("indices", "offsets", _WEIGHTS), inputs, strict=True))
    weighted = given[_WEIGHTS] is not None
    mode = spec.ATEN_MODES[a["mode"]]
    divisor = "count" if weighted and a["mode"] == MEAN else None  # as FBGEMM divides
    for table, name in zip(tables, a["names"], strict=True):
        if is_float and name and name not in graph.initializers:
            table.name = name
    # The bags of each feature are those of a key: all that there are, or a part of them.
    packed = is_float and len(keys) > 1 and keys == list(range(a["num_keys"]))
    signature = (len(keys), "packed" if packed else "ragged", weighted)
    merges = is_float and len(keys) > 1
    merges = merges and (signature in collections or len(collections) < collection.MOST_SIGNATURES)
    tape = ir.tape.Tape()
    if packed and merges:
        parts, last = [given], True
    elif a["num_keys"] == 1:
        parts, last = [given] * len(keys), True
    else:
        whole = _parts(tape, given, a["num_keys"])
        parts, last = [whole[k] for k in keys], False
    made: list[ir.Node]
    if merges:
        collections.add(signature)
        op = collection.variant(num_tables=signature[0], layout=signature[1], weighted=weighted)
        each = [[tables[t] for t in table_of], *([part[name] for part in parts] for name in given)]
        values = [value for group in each for value in group if value is not None]
        meaning = collection.Attributes(mode, include_last_offset=last, divisor=divisor)
        made = [ir.node(op.name, values, meaning.to_onnx(op, double=_is_double(tables[0])), domain=spec.DOMAIN)]
    else:
        made = []
        for part, t in zip(parts, table_of, strict=True):
            if is_float:
                made.append(_bag(tables[t], part, mode, last=last, divisor=divisor))
                columns = dims(tables[t])[1]
            else:
                found = quantized_table(tables[t], a["bits"][t], graph, a["names"][t] or tables[t].name or "")
                made.append(quantized_bag(found, part, mode, last=last, divisor=divisor))
                columns = found.table.embedding_dim
            (bags,) = made[-1].outputs  # of which ONNX Runtime 1.17 may not infer the type
            bags.type, bags.shape = node.outputs[0].type, ir.Shape([dims(node.outputs[0])[0], columns])
        if len(made) > 1:
            made.append(ir.node("Concat", [bag.outputs[0] for bag in made], {"axis": 1}))
    made[-1].name = node.name
    put_in_place(node, [node], [*tape.nodes, *made])


def _bag(table: ir.Value, given: Given, mode: str, *, last: bool, divisor: str | None) -> ir.Node:
    """A bag over a table of floats."""
    weighted = given[_WEIGHTS] is not None
    op = spec.variant(two_d=False, weighted=weighted)
    meaning = spec.Attributes(mode, include_last_offset=last, divisor=divisor)
    inputs = {"weight": table, **given}
    attributes = meaning.to_onnx(op, double=_is_double(table))
    return ir.node(op.name, [inputs[i] for i in op.inputs], attributes, domain=spec.DOMAIN)


def _is_double(table: ir.Value) -> bool:
    return table.dtype == ir.DataType.DOUBLE


def _parts(tape: ir.tape.Tape, given: Given, num_keys: int) -> list[Given]:
    """The indices of each key, the offsets [B] of its bags among them, and their weights.

    Two Splits (three with weights), however many keys there are.
    """
    indices, offsets, weights = given["indices"], given["offsets"], given[_WEIGHTS]
    assert indices is not None
    assert offsets is not None

    def constant(value: Any) -> ir.Value:
        return tape.op("Constant", [], {"value": ir.tensor(np.array(value, np.int64))})

    one, all_of_it = constant([1]), constant([-1])
    num_bags = tape.op("Div", [tape.op("Sub", [tape.op("Size", [offsets]), one]), constant([num_keys])])  # [1]
    edges = tape.op("Gather", [offsets, tape.op("Mul", [constant(range(num_keys + 1)), num_bags])], {"axis": 0})
    begins = tape.op("Slice", [edges, constant([0]), all_of_it])
    ends = tape.op("Slice", [edges, one, constant([num_keys + 1])])
    lengths = tape.op("Cast", [tape.op("Sub", [ends, begins])], {"to": ir.DataType.INT64})
    starts = tape.op("Slice", [offsets, constant([0]), all_of_it])
    by_key = tape.op("Reshape", [starts, tape.op("Concat", [constant([num_keys]), num_bags], {"axis": 0})])
    own = tape.op("Sub", [by_key, tape.op("Unsqueeze", [begins, one])])
    own = tape.op("Reshape", [own, all_of_it])
    equal = tape.op("Expand", [num_bags, constant([num_keys])])

    def split(value: ir.Value, sizes: ir.Value) -> Sequence[ir.Value]:
        pieces = tape.op_multi_out("Split", [value, sizes], {"axis": 0}, num_outputs=num_keys)
        for piece in pieces:
            piece.type = value.type
        return pieces

    own.type = offsets.type
    columns = {"indices": split(indices, lengths), "offsets": split(own, equal)}
    if weights is not None:
        columns[_WEIGHTS] = split(weights, lengths)
    return [{name: columns[name][k] if name in columns else None for name in given} for k in range(num_keys)]
