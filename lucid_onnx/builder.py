"""Put bags into ONNX models: one bag as a model, or nodes for a graph that somebody else is building."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from .ops import OPERATOR_OF, embedding_bag_grad, quantized_embedding_bag, variant
from .ops.embedding_bag import spec
from .ops.embedding_bag.lowering import BLOCKS, Ragged
from .ops.embedding_bag_collection import lowering as collection_lowering
from .ops.embedding_bag_collection import spec as collection
from .ops.emit import needed, reads
from .ops.quantized_embedding_bag.table import QuantizedTable

Form = Literal["portable", "standard", "native"]
FORMS: tuple[str, ...] = get_args(Form)

#: What protobuf can hold in one message, less room for the graph around the tables.
_LARGEST_MESSAGE = 2**31 - 2**24
#: External data begins on a page, so that a runtime can map it, and huge pages can back it.
_ALIGNMENT = 4096

_INDEX_TYPES = {np.dtype(np.int32): TensorProto.INT32, np.dtype(np.int64): TensorProto.INT64}
TABLE_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    spec.BFLOAT16: TensorProto.BFLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
}
CODES_TYPES = {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.uint8): TensorProto.UINT8}


def build_model(
    weight: npt.ArrayLike | None,
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    weight_dtype: npt.DTypeLike = "float32",
) -> onnx.ModelProto:
    """A model of one bag.

    Inputs ``indices`` ([num_indices], or [num_bags, bag_length] with ``two_d``), ``offsets`` ([num_bags], or
    [num_bags + 1] with ``include_last_offset``) and ``per_sample_weights`` (shaped like ``indices``), as far as
    they apply; output ``output`` [num_bags, D] of the table's dtype.

    Args:
        weight: the table [V, D], float32, float16, bfloat16 or float64. None makes it an input ``weight``.
        mode, max_norm, norm_type, padding_idx, include_last_offset: as in `lucid_onnx.embedding_bag`.
        two_d: indices are [B, L], a bag per row, and there are no offsets.
        per_sample_weights: the model takes weights; mode "sum" only.
        index_dtype: int32 or int64, for indices and offsets.
        form: "portable" is the node ``ai.lucid::EmbeddingBag`` with a function of standard operators under it,
            which runs everywhere and natively where `register` was called; "standard" has no custom domain at
            all; "native" is the node alone and needs the library.
        opset: version of the standard operators, 16 to 26.
        weight_dtype: the dtype of the input ``weight`` where ``weight`` is None.

    Raises:
        TypeError: a dtype that the operator does not have.
        ValueError: anything else that cannot be, named with its value.
    """
    attributes = spec.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    table = None if weight is None else np.asarray(weight)
    if table is not None:
        spec.check_table(table)
    attributes.check(weighted=per_sample_weights, num_rows=None if table is None else table.shape[0])
    return bag_model(
        spec.variant(two_d=two_d, weighted=per_sample_weights),
        attributes,
        table=table,
        table_dtype=_dtype("weight_dtype", weight_dtype) if table is None else table.dtype,
        index_dtype=_dtype("index_dtype", index_dtype),
        offsets_dtype=_dtype("index_dtype", index_dtype),
        form=form,
        opset=opset,
    )


def bag_model(
    op: spec.Variant | embedding_bag_grad.spec.Variant,
    attributes: spec.Attributes,
    *,
    table: np.ndarray | None,
    table_dtype: np.dtype,
    index_dtype: np.dtype,
    offsets_dtype: np.dtype,
    form: str,
    opset: int,
) -> onnx.ModelProto:
    """`build_model` or `build_grad_model` over checked arguments, where indices and offsets may differ in dtype."""
    table_type = _onnx_type("weight_dtype", table_dtype, TABLE_TYPES)
    return _bag_model(
        op,
        _node(op, op.inputs, op.outputs, attributes, double=table_dtype == np.float64),
        {"weight": (table_type, ["num_rows", "embedding_dim"])},
        {} if table is None else {"weight": table},
        "embedding_dim" if table is None else table.shape[1],
        table_type,
        attributes.include_last_offset,
        index_dtype,
        offsets_dtype,
        form,
        opset,
    )


def build_grad_model(
    weight: npt.ArrayLike | None = None,
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    two_d: bool = False,
    per_sample_weights: bool = False,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    weight_dtype: npt.DTypeLike = "float32",
) -> onnx.ModelProto:
    """A model of the gradient of one bag.

    Inputs ``grad_output`` [num_bags, D] and those of `build_model`. Outputs ``grad_weight`` [V, D], or with ``sparse``
    ``rows`` (int64 [num_entries]) and ``values`` [num_entries, D]; and with ``per_sample_weights`` the gradient of
    those, ``grad_per_sample_weights``. See ``lucid_onnx.ops.embedding_bag_grad.spec``.

    Args:
        weight: the table [V, D]; None, as what is trained changes, makes it an input ``weight``.
        scale_grad_by_freq: divide the gradient of a row by how often its index occurs in the bags.
        sparse: an entry for every position, not coalesced, in the place of a gradient of the whole table.
        mode, max_norm, norm_type, padding_idx, include_last_offset, two_d, per_sample_weights, index_dtype, form,
            opset, weight_dtype: as in `build_model`, of the bag.

    Raises:
        TypeError, ValueError: as `build_model`.
    """
    attributes = embedding_bag_grad.spec.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, scale_grad_by_freq
    )
    table = None if weight is None else np.asarray(weight)
    if table is not None:
        spec.check_table(table)
    attributes.check(weighted=per_sample_weights, num_rows=None if table is None else table.shape[0])
    return bag_model(
        embedding_bag_grad.spec.variant(sparse=sparse, two_d=two_d, weighted=per_sample_weights),
        attributes,
        table=table,
        table_dtype=_dtype("weight_dtype", weight_dtype) if table is None else table.dtype,
        index_dtype=_dtype("index_dtype", index_dtype),
        offsets_dtype=_dtype("index_dtype", index_dtype),
        form=form,
        opset=opset,
    )


def build_quantized_model(
    table: QuantizedTable,
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
) -> onnx.ModelProto:
    """A model of one bag over a table of codes; inputs and output as those of `build_model`.

    The node is ``ai.lucid::QuantizedEmbeddingBag`` (see ``lucid_onnx.ops.quantized_embedding_bag.spec``). The output
    and ``per_sample_weights`` have the dtype of ``table.scale``.

    Raises:
        TypeError, ValueError: as `build_model`.
    """
    attributes = quantized_embedding_bag.spec.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, table.codes_type, table.embedding_dim
    )
    attributes.check(weighted=per_sample_weights, num_rows=len(table.codes))
    return quantized_bag_model(
        quantized_embedding_bag.spec.variant(second=table.second, two_d=two_d, weighted=per_sample_weights),
        attributes,
        table=table.inputs,
        scale_dtype=table.scale.dtype,
        index_dtype=_dtype("index_dtype", index_dtype),
        offsets_dtype=_dtype("index_dtype", index_dtype),
        form=form,
        opset=opset,
    )


def quantized_bag_model(
    op: quantized_embedding_bag.spec.Variant,
    attributes: quantized_embedding_bag.spec.Attributes,
    *,
    table: Mapping[str, np.ndarray],
    scale_dtype: np.dtype,
    index_dtype: np.dtype,
    offsets_dtype: np.dtype,
    form: str,
    opset: int,
) -> onnx.ModelProto:
    """`build_quantized_model` over checked arguments. What ``table`` lacks of codes, scale and so on is an input."""
    scale_type = _onnx_type("scale_dtype", scale_dtype, TABLE_TYPES)
    codes = attributes.codes
    return _bag_model(
        op,
        _node(op, op.inputs, op.outputs, attributes, double=False),
        {
            "codes": (CODES_TYPES[codes.stored], ["num_rows", codes.stored_columns(attributes.embedding_dim)]),
            **{name: (scale_type, ["num_rows"]) for name in ("scale", "zero_point", "bias")},
        },
        table,
        attributes.embedding_dim,
        scale_type,
        attributes.include_last_offset,
        index_dtype,
        offsets_dtype,
        form,
        opset,
    )


def _bag_model(
    op: Any,
    node: onnx.NodeProto,
    table: Mapping[str, tuple[int, list[int | str]]],
    constants: Mapping[str, np.ndarray],
    dim: int | str,
    output_type: int,
    include_last_offset: bool,
    index_dtype: np.dtype,
    offsets_dtype: np.dtype,
    form: str,
    opset: int,
) -> onnx.ModelProto:
    """The model around a node.

    Args:
        table: type and shape of the inputs that make the table.
        constants: those of them that are initializers.
        dim: D, or its name.
        output_type: of the bags, and of everything in a gradient that is no row number.
    """
    index_type = _onnx_type("index_dtype", index_dtype, _INDEX_TYPES)
    offsets_type = _onnx_type("offsets_dtype", offsets_dtype, _INDEX_TYPES)
    positions: list[int | str] = ["num_bags", "bag_length"] if op.two_d else ["num_indices"]
    num_bags = "num_offsets" if include_last_offset and not op.two_d else "num_bags"
    values: dict[str, tuple[int, Any]] = {
        **table,
        "indices": (index_type, positions),
        "offsets": (offsets_type, [num_bags]),
        "per_sample_weights": (output_type, positions),
        "output": (output_type, ["num_bags", dim]),
        # of a gradient
        "grad_output": (output_type, ["num_bags", dim]),
        "grad_weight": (output_type, [len(constants["weight"]) if "weight" in constants else "num_rows", dim]),
        "rows": (TensorProto.INT64, ["num_entries"]),
        "values": (output_type, ["num_entries", dim]),
        "grad_per_sample_weights": (output_type, positions),
    }
    graph = helper.make_graph(
        [node],
        "embedding_bag_grad" if "grad_output" in op.inputs else "embedding_bag",
        [helper.make_tensor_value_info(name, *values[name]) for name in op.inputs if name not in constants],
        [helper.make_tensor_value_info(name, *values[name]) for name in op.outputs],
    )
    model = _model(graph, opset)
    for name, array in constants.items():
        # Filled where it stays: protobuf copies a message by serialising it, 2 GiB at most.
        _fill_table(model.graph.initializer.add(), name, array)
    convert(model, form)
    return model


def make_node(
    weight: str,
    indices: str,
    offsets: str | None = None,
    output: str = "output",
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    per_sample_weights: str | None = None,
    weight_dtype: npt.DTypeLike = "float32",
    name: str = "",
) -> onnx.NodeProto:
    """One bag as a node, for a graph that is built with onnx.helper.

    ``weight``, ``indices``, ``offsets``, ``per_sample_weights`` and ``output`` are names of values in that graph;
    without ``offsets`` the indices are [B, L]. The finished model goes through `to_form`, which gives the node its
    function (or expands it), for as many bags as there are. Example::

        graph = helper.make_graph([lucid_onnx.make_node("users", "ids", "starts", "user", mode="mean"), ...], ...)
        model = lucid_onnx.to_form(helper.make_model(graph), "portable")

    Raises:
        TypeError, ValueError: as `build_model`.
    """
    attributes = spec.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    attributes.check(weighted=per_sample_weights is not None, num_rows=None)
    dtype = _dtype("weight_dtype", weight_dtype)
    _onnx_type("weight_dtype", dtype, TABLE_TYPES)
    op = spec.variant(two_d=offsets is None, weighted=per_sample_weights is not None)
    given = {"weight": weight, "indices": indices, "offsets": offsets, "per_sample_weights": per_sample_weights}
    inputs = tuple(str(given[i]) for i in op.inputs)
    return _node(op, inputs, (output,), attributes, double=dtype == np.float64, name=name)


def make_grad_node(
    grad_output: str,
    weight: str,
    indices: str,
    offsets: str | None = None,
    outputs: Iterable[str] | None = None,
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    per_sample_weights: str | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    weight_dtype: npt.DTypeLike = "float32",
    name: str = "",
) -> onnx.NodeProto:
    """The gradient of one bag as a node; `make_node` tells how such a node becomes a model.

    ``outputs`` are the names of all its outputs: ("grad_weight",), or ("rows", "values") with ``sparse``, and behind
    them "grad_per_sample_weights" where there are per_sample_weights. These are the default too.

    Raises:
        TypeError, ValueError: as `build_grad_model`.
    """
    attributes = embedding_bag_grad.spec.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, scale_grad_by_freq
    )
    attributes.check(weighted=per_sample_weights is not None, num_rows=None)
    dtype = _dtype("weight_dtype", weight_dtype)
    _onnx_type("weight_dtype", dtype, TABLE_TYPES)
    op = embedding_bag_grad.spec.variant(sparse=sparse, two_d=offsets is None, weighted=per_sample_weights is not None)
    if isinstance(outputs, str):
        raise TypeError(f"outputs = {outputs!r} is a string, expected a sequence of names")
    names = op.outputs if outputs is None else tuple(outputs)
    if len(names) != len(op.outputs):
        raise ValueError(f"outputs = {names} must be names for {', '.join(op.outputs)}")
    given = {
        "grad_output": grad_output,
        "weight": weight,
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": per_sample_weights,
    }
    inputs = tuple(str(given[i]) for i in op.inputs)
    return _node(op, inputs, names, attributes, double=dtype == np.float64, name=name)


def build_collection_model(
    weights: Sequence[npt.ArrayLike],
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    layout: str = "ragged",
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
) -> onnx.ModelProto:
    """A model of the bags of several tables, whose results stand beside each other in one output.

    Inputs ``indices_0`` ([num_indices_0], or [num_bags, bag_length_0] with the layout "rows"), ``indices_1``, ..., then
    ``offsets_0``, ... and ``per_sample_weights_0``, ... as far as they apply. With the layout "packed" there is one of
    each, ``indices``, ``offsets`` ([len(weights) * num_bags + 1]) and ``per_sample_weights``, for all tables one after
    another. Output ``output`` [num_bags, sum of D] of the tables' dtype.

    Args:
        weights: the tables [V, D], all float32, float16, bfloat16 or float64; V and D may differ.
        layout: "ragged", "packed" or "rows"; "packed" needs include_last_offset.
        mode, max_norm, norm_type, padding_idx, include_last_offset, per_sample_weights: as in `build_model`, those of
            all tables. A negative padding_idx counts from the end of each.
        index_dtype: int32 or int64, for all indices and offsets.
        form, opset: as in `build_model`; the node is ``ai.lucid::EmbeddingBagCollection``.

    Raises:
        TypeError, ValueError: as `build_model`; what concerns one table says which.
    """
    tables = [np.asarray(weight) for weight in weights]
    collection.check_tables(tables)
    attributes = collection.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    op = collection.variant(num_tables=len(tables), layout=layout, weighted=per_sample_weights)
    attributes.check_layout(op)
    for t, table in enumerate(tables):
        with collection.in_table(t):
            attributes.check(weighted=per_sample_weights, num_rows=table.shape[0])
    dtype = _dtype("index_dtype", index_dtype)
    return collection_model(
        op,
        attributes,
        tables=tables,
        table_dtype=tables[0].dtype,
        index_dtypes={name: dtype for name in op.inputs if name.startswith(("indices", "offsets"))},
        form=form,
        opset=opset,
    )


def collection_model(
    op: collection.Variant,
    attributes: collection.Attributes,
    *,
    tables: Sequence[np.ndarray],
    table_dtype: np.dtype,
    index_dtypes: Mapping[str, np.dtype],
    form: str,
    opset: int,
) -> onnx.ModelProto:
    """`build_collection_model` over checked arguments. Without ``tables`` they are inputs.

    Args:
        index_dtypes: the dtype of each of the inputs of indices and offsets.
    """
    table_type = _onnx_type("weight_dtype", table_dtype, TABLE_TYPES)
    constants = dict(zip(op.inputs, tables, strict=False))
    num_offsets = "num_bags"
    if op.layout == "packed" or attributes.include_last_offset:
        num_offsets = "num_offsets"

    def value(name: str) -> onnx.ValueInfoProto:
        stem, number = re.fullmatch(r"(\w+?)(_\d+)?", name).groups(default="")  # type: ignore[union-attr]
        if stem == "weight":
            return helper.make_tensor_value_info(name, table_type, [f"num_rows{number}", f"embedding_dim{number}"])
        if stem == "offsets":
            kind = _onnx_type("offsets_dtype", index_dtypes[name], _INDEX_TYPES)
            return helper.make_tensor_value_info(name, kind, [num_offsets])
        positions = ["num_bags", f"bag_length{number}"] if op.layout == "rows" else [f"num_indices{number}"]
        kind = table_type if stem == _WEIGHTS else _onnx_type("index_dtype", index_dtypes[name], _INDEX_TYPES)
        return helper.make_tensor_value_info(name, kind, positions)

    columns = sum(table.shape[1] for table in tables) if tables else "embedding_dims"
    graph = helper.make_graph(
        [_node(op, op.inputs, op.outputs, attributes, double=table_dtype == np.float64)],
        "embedding_bag_collection",
        [value(name) for name in op.inputs if name not in constants],
        [helper.make_tensor_value_info("output", table_type, ["num_bags", columns])],
    )
    model = _model(graph, opset)
    for name, array in constants.items():
        _fill_table(model.graph.initializer.add(), name, array)
    convert(model, form)
    return model


_WEIGHTS = "per_sample_weights"


def make_collection_node(
    weights: Sequence[str],
    indices: Sequence[str] | str,
    offsets: Sequence[str] | str | None = None,
    output: str = "output",
    *,
    mode: str = "mean",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    per_sample_weights: Sequence[str] | str | None = None,
    weight_dtype: npt.DTypeLike = "float32",
    name: str = "",
) -> onnx.NodeProto:
    """The bags of several tables as a node, for a graph that is built with onnx.helper; see `make_node`.

    ``indices`` (and ``offsets`` and ``per_sample_weights``, as far as there are any) are a name per table, or one name
    of what all have in the packed layout. Without ``offsets`` the indices are [B, L].

    Raises:
        TypeError, ValueError: as `build_collection_model`.
    """
    given = {"indices": indices, "offsets": offsets, _WEIGHTS: per_sample_weights}
    layout = "packed" if isinstance(indices, str) else "rows" if offsets is None else "ragged"
    op = collection.variant(num_tables=len(weights), layout=layout, weighted=per_sample_weights is not None)
    inputs = list(weights)
    for key, names in given.items():
        if names is None:
            continue
        if isinstance(names, str) is not (layout == "packed"):
            raise TypeError(f"{key} = {names!r}, but indices = {indices!r}: a name for all, or a name per table")
        if layout != "packed" and len(names) != len(weights):
            raise ValueError(f"{key} has {len(names)} names for {len(weights)} tables")
        inputs += [names] if isinstance(names, str) else names
    attributes = collection.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    attributes.check(weighted=op.weighted, num_rows=None)
    if layout == "packed" and offsets is None:
        raise ValueError("offsets missing: packed indices need them")
    attributes.check_layout(op)
    dtype = _dtype("weight_dtype", weight_dtype)
    _onnx_type("weight_dtype", dtype, TABLE_TYPES)
    return _node(op, inputs, (output,), attributes, double=dtype == np.float64, name=name)


def to_form(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """A copy of ``model`` with every ``ai.lucid`` node in the given form, whatever form it is in now.

    Nodes may stand in the graph, in subgraphs (If, Loop, Scan) and in model-local functions, in any number. An
    attribute that a node lacks is written with its default; ``mode`` may also be a string, as onnxscript writes
    it. "portable" adds one function per operator name, "native" takes them away, and "standard" puts standard
    nodes in place of each node and leaves no trace of the domain.

    Raises:
        ValueError: an unknown form, an opset outside [16, 26], or a node that breaks the operator's contract, by name.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    convert(copy, form)
    return copy


def convert(model: onnx.ModelProto, form: str, ragged: Ragged = BLOCKS) -> None:
    """`to_form` in place; standard operators have bags in the given way.

    Raises:
        ValueError: as `to_form`, and if flat bags are to be padded to no length.
    """
    if form not in FORMS:
        raise ValueError(f"form = {form!r} is not one of 'portable', 'standard', 'native'")
    opset = _opset(model)
    ours = [f for f in model.functions if f.domain == spec.DOMAIN]
    for function in ours:
        model.functions.remove(function)
    tables = _table_types(model)
    used: dict[str, Any] = {}  # name -> the operator name with its inputs
    signatures: dict[tuple[int, str, bool], str] = {}
    prefixes = _free_prefixes(model)
    # A function's names are its own: what the graph knows of the same ones says nothing of them.
    lists = [(nodes, tables) for nodes in _within(model.graph.node)]
    lists += [(nodes, {}) for function in model.functions for nodes in _within(function.node)]
    read = {output.name for output in model.graph.output}
    for node in itertools.chain(model.graph.node, *(function.node for function in model.functions)):
        read.update(reads(node))
    read.update(*(function.output for function in model.functions))
    for nodes, known in lists:
        expanded: list[onnx.NodeProto] = []
        for node in nodes:
            if node.domain != spec.DOMAIN:
                expanded.append(node)
                continue
            op, attributes = _normalise(node, known)
            if form == "standard":
                names = tuple(node.input), tuple(node.output)
                write = OPERATOR_OF[op.name].lowering.nodes
                with _named(_where(node)):
                    written = write(op, *names, attributes, opset, next(prefixes), ragged)
                # Of a gradient, not every output may be.
                expanded += needed(written, read.intersection(node.output) or node.output)
            else:
                if isinstance(op, collection.Variant):  # of which a model has a name per signature
                    node.op_type = collection.name_of(op.signature, signatures)
                    op = dataclasses.replace(op, name=node.op_type)
                used[op.name] = op
                expanded.append(node)
        if form == "standard":
            expanded = [_copy(node) for node in expanded]
            del nodes[:]
            nodes.extend(expanded)
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        _set_import(imports, set(used))
    if form == "portable":
        for op in list(used.values()):
            if isinstance(op, collection.Variant):
                used |= {name: variant(name, {}) for name in collection_lowering.functions_used(op)}
        # What a function calls stands before it: onnx.reference reads them in order.
        for name in sorted(used, key=lambda n: (isinstance(used[n], collection.Variant), n)):
            with _named(name):
                model.functions.append(OPERATOR_OF[name].lowering.function(used[name], opset, ragged))


def save(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    tables: Mapping[str, memoryview] | None = None,
) -> None:
    """Write a model, with its tables in ``<path>.data`` beside it where one file cannot hold them.

    Both files appear whole or not at all.

    Args:
        model: the model; its initializers hold their data, but for those in ``tables``.
        path: the .onnx file.
        external_data: False and True force the tables into the file and out of it (all but those under 4 KiB); None
            puts them outside only where the model would pass the 2 GiB that a protobuf message can have.
        progress: called with the bytes written and the bytes to write while tables go out.
        tables: the little-endian bytes, by name, of initializers that have a dtype and dims but no data. They are
            written from where they are; a model that held them would be a second copy.

    Raises:
        ValueError: external_data=False for a model that is too large, or an initializer without its data.
        OSError: the files cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    tables = tables or {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in tables:
            raise ValueError(f"initializer {tensor.name!r} is external data that was not loaded: use onnx.load first")
    sizes = [tables[t.name].nbytes if t.name in tables else _size(t) for t in model.graph.initializer]
    too_large = sum(sizes) > _LARGEST_MESSAGE
    if external_data is None:
        external_data = too_large
    elif too_large and not external_data:
        raise ValueError(f"external_data = False, but {sum(sizes)} bytes of tables do not fit one protobuf file")
    with Replacing(path) as files:
        if external_data and max(sizes, default=0) >= _ALIGNMENT:
            model = _externalise(model, sizes, path.name + ".data", files.open(path.name + ".data"), progress, tables)
        elif tables:
            light, model = model, onnx.ModelProto()
            model.CopyFrom(light)
            fill_tables(model, tables)
        files.open(path.name).write(model.SerializeToString())


def fill_tables(model: onnx.ModelProto, tables: Mapping[str, memoryview]) -> None:
    """Give the initializers named in ``tables`` their data, where they are (see `save`)."""
    for tensor in model.graph.initializer:
        if tensor.name in tables:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = tables[tensor.name].tobytes()


class Replacing:
    """Temporary files beside ``path`` that take their places together when the block ends well."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self._open: dict[str, Any] = {}

    def open(self, name: str) -> Any:
        self._open[name] = tempfile.NamedTemporaryFile(  # noqa: SIM115  # closed in __exit__
            dir=self._folder, prefix=f".{name}.", delete=False
        )
        return self._open[name]

    def __enter__(self) -> Replacing:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            for file in self._open.values():
                file.close()
            if error is None:
                self._take_places()
        finally:
            for file in self._open.values():
                file.close()
                Path(file.name).unlink(missing_ok=True)

    def _take_places(self) -> None:
        """Put the files where they belong. One is replaced atomically; of several, all are or none."""
        mask = _umask()
        moved: list[tuple[Path, Path | None]] = []
        try:
            for name, file in self._open.items():
                os.chmod(file.name, 0o666 & ~mask)
                target, aside = self._folder / name, None
                if len(self._open) > 1 and target.is_file():
                    aside = self._folder / f".old{Path(file.name).name}"
                    os.replace(target, aside)
                moved.append((target, aside))
                os.replace(file.name, target)
        except BaseException:
            for target, aside in reversed(moved):
                if aside is not None:
                    os.replace(aside, target)
                elif len(moved) > 1 and target.is_file():
                    target.unlink()
            raise
        for _, aside in moved:
            if aside is not None:
                aside.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _externalise(
    model: onnx.ModelProto,
    sizes: list[int],
    location: str,
    file: Any,
    progress: Callable[[int, int], None] | None,
    tables: Mapping[str, memoryview],
) -> onnx.ModelProto:
    """A copy of the model that refers to its tables in ``file``, where they are written."""
    light = without_initializers(model)
    written = 0
    for tensor, size in zip(model.graph.initializer, sizes, strict=True):
        if size < _ALIGNMENT:
            light.graph.initializer.append(tensor)
            continue
        offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
        file.seek(offset)
        data = tables[tensor.name] if tensor.name in tables else memoryview(tensor.raw_data)
        for begin in range(0, size, 2**26):
            written += file.write(data[begin : begin + 2**26])
            if progress is not None:
                progress(written, sum(sizes))
        light.graph.initializer.append(
            TensorProto(
                name=tensor.name,
                data_type=tensor.data_type,
                dims=tensor.dims,
                data_location=TensorProto.EXTERNAL,
                external_data=[
                    onnx.StringStringEntryProto(key=key, value=str(value))
                    for key, value in (("location", location), ("offset", offset), ("length", size))
                ],
            )
        )
    fill_tables(light, {name: data for name, data in tables.items() if data.nbytes < _ALIGNMENT})
    return light


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of all but the graph's initializers, which are not looked at."""
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _assign(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _assign(light.graph, field.name, value)
    return light


def _assign(message: Any, name: str, value: Any) -> None:
    if isinstance(value, (str, bytes, int, float)):
        setattr(message, name, value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        getattr(message, name).extend(value)


def _size(tensor: onnx.TensorProto) -> int:
    """The bytes of an initializer's raw data; 0 for the small ones that are written element by element."""
    return len(tensor.raw_data) if tensor.HasField("raw_data") else 0


def _node(
    op: Any, inputs: Iterable[str], outputs: Iterable[str], attributes: spec.Attributes, *, double: bool, name: str = ""
) -> onnx.NodeProto:
    given: dict[str, Any] = attributes.to_onnx(op, double=double)  # type: ignore[assignment]
    return helper.make_node(op.name, list(inputs), list(outputs), name=name, domain=spec.DOMAIN, **given)


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset = {opset!r} must be an integer")
    if not spec.MIN_OPSET <= opset <= spec.MAX_OPSET:
        raise ValueError(f"opset = {opset} is outside [{spec.MIN_OPSET}, {spec.MAX_OPSET}]")
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="lucid-onnx",
    )


def _fill_table(tensor: onnx.TensorProto, name: str, table: np.ndarray) -> None:
    """Make ``tensor`` the table, bit by bit."""
    tensor.name, tensor.data_type = name, {**TABLE_TYPES, **CODES_TYPES}[table.dtype]
    tensor.dims.extend(table.shape)
    tensor.raw_data = table.tobytes()


def _dtype(name: str, dtype: npt.DTypeLike) -> np.dtype:
    try:
        return spec.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} = {dtype!r} is no dtype") from error


def _onnx_type(name: str, dtype: np.dtype, types: Mapping[Any, int]) -> int:
    if dtype not in types:
        raise TypeError(f"{name} = {dtype} is not one of {', '.join(str(t) for t in types)}")
    return types[dtype]


def _opset(model: onnx.ModelProto) -> int:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            if not spec.MIN_OPSET <= entry.version <= spec.MAX_OPSET:
                raise ValueError(
                    f"the model imports opset {entry.version}, which is outside [{spec.MIN_OPSET}, {spec.MAX_OPSET}]"
                )
            return int(entry.version)
    raise ValueError("the model imports no standard opset")


def _set_import(imports: Any, used: set[str]) -> None:
    """Import our domain once where a node of it is used, else not at all."""
    for entry in [i for i in imports if i.domain == spec.DOMAIN]:
        imports.remove(entry)
    if used:
        imports.append(helper.make_opsetid(spec.DOMAIN, spec.VERSION))


def _node_lists(model: onnx.ModelProto) -> Iterator[Any]:
    """Every list of nodes in a model: graph, subgraphs and functions; inner ones first."""
    yield from _within(model.graph.node)
    for function in model.functions:
        yield from _within(function.node)


def _within(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in itertools.chain([attribute.g] if attribute.HasField("g") else [], attribute.graphs):
                yield from _within(graph.node)
    yield nodes


def _free_prefixes(model: onnx.ModelProto) -> Iterator[str]:
    """Short prefixes that no value's name in the model begins with."""
    names = {name for nodes in _node_lists(model) for node in nodes for name in (*node.input, *node.output)}
    names.update(v.name for v in itertools.chain(model.graph.input, model.graph.initializer, model.graph.value_info))
    taken = {name.split("_")[0] for name in names}
    return (f"b{k}_" for k in itertools.count() if f"b{k}" not in taken)


def _table_types(model: onnx.ModelProto) -> dict[str, tuple[int, int | None]]:
    """What is known of values that may be tables: element type, and the number of rows where it is fixed."""
    known: dict[str, tuple[int, int | None]] = {}
    for value in itertools.chain(model.graph.value_info, model.graph.input):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        rows = dims[0].dim_value if len(dims) == 2 and dims[0].HasField("dim_value") else None
        known[value.name] = (tensor.elem_type, rows)
    for tensor in model.graph.initializer:
        known[tensor.name] = (tensor.data_type, tensor.dims[0] if len(tensor.dims) == 2 else None)
    return known


def _normalise(node: onnx.NodeProto, tables: dict[str, tuple[int, int | None]]) -> tuple[Any, dict[str, int | float]]:
    """Check a node against the contract and write all of its attributes on it; returns them, and its operator name."""
    where = _where(node)
    if node.op_type not in OPERATOR_OF:
        raise ValueError(f"{where}: {spec.DOMAIN}::{node.op_type} is not one of {', '.join(OPERATOR_OF)}")
    meaning = OPERATOR_OF[node.op_type].spec
    integers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT and not a.ref_attr_name}
    try:
        op = variant(node.op_type, integers)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(node.input) != len(op.inputs) or not all(node.input):
        raise ValueError(f"{where}: {op.name} takes {', '.join(op.inputs)}; it was given {list(node.input)}")
    if len(op.outputs) == 1 and len(node.output) != 1:
        raise ValueError(f"{where}: {op.name} has one output, not {len(node.output)}")
    if len(node.output) != len(op.outputs) or not all(node.output):
        raise ValueError(f"{where}: {op.name} gives {', '.join(op.outputs)}; it was given {list(node.output)}")
    given: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.name not in meaning.attribute_names(op):
            raise ValueError(f"{where}: {op.name} has no attribute {attribute.name!r}")
        if attribute.ref_attr_name:
            raise ValueError(f"{where}: {attribute.name} refers to an attribute of the function around it")
        given[attribute.name] = _attribute_value(attribute, where)
    mode = given.get("mode")
    if isinstance(mode, bytes):
        text = mode.decode(errors="replace")
        if text not in spec.MODES:
            raise ValueError(f"{where}: mode = {text!r} is not one of 'sum', 'mean', 'max'")
        given["mode"] = spec.MODES.index(text)
    element_type, num_rows = tables.get(node.input[op.inputs.index(op.table)], (None, None))
    double = given.get("stash_type") == TensorProto.DOUBLE if not element_type else element_type == TensorProto.DOUBLE
    try:
        attributes = meaning.Attributes.from_onnx(given)
        attributes.check(weighted=op.weighted, num_rows=num_rows)
        if isinstance(op, collection.Variant):
            _check_collection(op, attributes, [tables.get(name, (0, None)) for name in node.input[: op.num_tables]])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    complete = attributes.to_onnx(op, double=double)
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in complete.items())
    return op, complete


def _where(node: onnx.NodeProto) -> str:
    return f"node {node.name or ', '.join(node.output)!r}"


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A refusal within says where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_collection(
    op: collection.Variant, attributes: collection.Attributes, tables: Sequence[tuple[int, int | None]]
) -> None:
    """Refuse what is known to be wrong of the tables of a collection, of a type and a number of rows each."""
    attributes.check_layout(op)
    for t, (element_type, num_rows) in enumerate(tables):
        with collection.in_table(t):
            attributes.check(weighted=op.weighted, num_rows=num_rows)
            if element_type and tables[0][0] and element_type != tables[0][0]:
                names = [TensorProto.DataType.Name(e) for e in (element_type, tables[0][0])]
                raise TypeError(f"weight is {names[0]}, that of table 0 is {names[1]}: they must be equal")


def _attribute_value(attribute: onnx.AttributeProto, where: str) -> Any:
    """Its value, if it is of the type that the operator gives it; where a FLOAT belongs an INT will do."""
    allowed = {onnx.AttributeProto.INT: "an INT"}
    if attribute.name.startswith(("max_norm", "norm_type")):
        allowed = {onnx.AttributeProto.FLOAT: "a FLOAT", onnx.AttributeProto.INT: "an INT"}
    elif attribute.name == "mode":
        allowed = {onnx.AttributeProto.INT: "an INT", onnx.AttributeProto.STRING: "a STRING"}
    value = helper.get_attribute_value(attribute)
    if attribute.type not in allowed:
        if attribute.name == "mode":
            raise ValueError(f"{where}: mode = {value} is not 0 (sum), 1 (mean) or 2 (max)")
        raise ValueError(f"{where}: {attribute.name} = {value!r} must be {' or '.join(allowed.values())} attribute")
    return value


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
