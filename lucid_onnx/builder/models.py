"""One bag, or one collection of bags, as a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from lucid_onnx.ops import embedding_bag_grad, quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable

from .dtypes import CODES_TYPES, INDEX_TYPES, TABLE_TYPES, as_dtype, onnx_type
from .forms import Form, convert
from .nodes import new_node


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
        table_dtype=as_dtype("weight_dtype", weight_dtype) if table is None else table.dtype,
        index_dtype=as_dtype("index_dtype", index_dtype),
        offsets_dtype=as_dtype("index_dtype", index_dtype),
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
    table_type = onnx_type("weight_dtype", table_dtype, TABLE_TYPES)
    return _bag_model(
        op,
        new_node(op, op.inputs, op.outputs, attributes, double=table_dtype == np.float64),
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
        table_dtype=as_dtype("weight_dtype", weight_dtype) if table is None else table.dtype,
        index_dtype=as_dtype("index_dtype", index_dtype),
        offsets_dtype=as_dtype("index_dtype", index_dtype),
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
        index_dtype=as_dtype("index_dtype", index_dtype),
        offsets_dtype=as_dtype("index_dtype", index_dtype),
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
    scale_type = onnx_type("scale_dtype", scale_dtype, TABLE_TYPES)
    codes = attributes.codes
    return _bag_model(
        op,
        new_node(op, op.inputs, op.outputs, attributes, double=False),
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
    index_type = onnx_type("index_dtype", index_dtype, INDEX_TYPES)
    offsets_type = onnx_type("offsets_dtype", offsets_dtype, INDEX_TYPES)
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
    dtype = as_dtype("index_dtype", index_dtype)
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
    table_type = onnx_type("weight_dtype", table_dtype, TABLE_TYPES)
    constants = dict(zip(op.inputs, tables, strict=False))
    num_offsets = "num_bags"
    if op.layout == "packed" or attributes.include_last_offset:
        num_offsets = "num_offsets"

    def value(name: str) -> onnx.ValueInfoProto:
        stem, number = re.fullmatch(r"(\w+?)(_\d+)?", name).groups(default="")  # type: ignore[union-attr]
        if stem == "weight":
            return helper.make_tensor_value_info(name, table_type, [f"num_rows{number}", f"embedding_dim{number}"])
        if stem == "offsets":
            kind = onnx_type("offsets_dtype", index_dtypes[name], INDEX_TYPES)
            return helper.make_tensor_value_info(name, kind, [num_offsets])
        positions = ["num_bags", f"bag_length{number}"] if op.layout == "rows" else [f"num_indices{number}"]
        kind = table_type if stem == _WEIGHTS else onnx_type("index_dtype", index_dtypes[name], INDEX_TYPES)
        return helper.make_tensor_value_info(name, kind, positions)

    columns = sum(table.shape[1] for table in tables) if tables else "embedding_dims"
    graph = helper.make_graph(
        [new_node(op, op.inputs, op.outputs, attributes, double=table_dtype == np.float64)],
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
