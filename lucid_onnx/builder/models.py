"""One bag, or one collection of bags, as a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from lucid_onnx.ops.attributes import BaseAttributes, takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.embedding_bag_grad import spec as gradient
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable
from lucid_onnx.ops.variants import BaseVariant, Value

from .dtypes import CODES_TYPES, INDEX_TYPES, TABLE_TYPES, as_dtype, onnx_type
from .forms import Form, convert
from .nodes import new_node

if TYPE_CHECKING:
    from typing import Unpack


@takes(spec.Attributes)
def build_model(
    weight: npt.ArrayLike | None,
    *,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    weight_dtype: npt.DTypeLike = "float32",
    **attributes: Unpack[spec.Keywords],
) -> onnx.ModelProto:
    """A model of one bag.

    Inputs ``indices`` ([num_indices], or [num_bags, bag_length] with ``two_d``), ``offsets`` ([num_bags], or
    [num_bags + 1] with ``include_last_offset``) and ``per_sample_weights`` (shaped like ``indices``), as far as
    they apply; output ``output`` [num_bags, D] of the table's dtype.

    Args:
        weight: the table [V, D], of a dtype that `lucid_onnx.embedding_bag` takes. None makes it an input ``weight``.
        **attributes: those of `lucid_onnx.embedding_bag`.
        two_d: indices are [B, L], a bag per row, and there are no offsets.
        per_sample_weights: the model takes weights; mode "sum", or mean and sqrtn with a divisor.
        index_dtype: int32 or int64, for indices and offsets.
        form: "portable" is the node ``ai.lucid::EmbeddingBag`` with a function of standard operators under it,
            which runs everywhere and natively where `register` was called; "standard" has no custom domain at
            all; "native" is the node alone and needs the library.
        opset: version of the standard operators, 16 to 26.
        weight_dtype: the dtype of the input ``weight`` where ``weight`` is None.

    Raises:
        TypeError: a dtype that the operator does not have.
        ValueError: any other invalid argument, named with its value.
    """
    meaning = spec.Attributes(**attributes)
    op = spec.variant(two_d=two_d, weighted=per_sample_weights)
    return _bag_model(op, meaning, weight, weight_dtype, index_dtype, form, opset)


@takes(spec.Attributes)
def build_light_model(
    shape: tuple[int, int],
    weight_dtype: np.dtype,
    *,
    two_d: bool,
    per_sample_weights: bool,
    index_dtype: npt.DTypeLike,
    form: Form,
    opset: int,
    **attributes: Unpack[spec.Keywords],
) -> onnx.ModelProto:
    """As `build_model`, of a table [V, D] whose initializer ``weight`` has no data yet: `save` takes it.

    Args:
        **attributes: those of `lucid_onnx.embedding_bag`.
        two_d, per_sample_weights, index_dtype, form, opset, weight_dtype: as in `build_model`.
    """
    meaning = spec.Attributes(**attributes)
    meaning.check(weighted=per_sample_weights, num_rows=shape[0])
    op = spec.variant(two_d=two_d, weighted=per_sample_weights)
    index = as_dtype("index_dtype", index_dtype)
    dtypes = {"weight": weight_dtype, "indices": index, "offsets": index}
    constants = {"weight": np.broadcast_to(np.zeros((), weight_dtype), shape)}
    return op_model(op, meaning, dtypes, constants=constants, form=form, opset=opset, fill=False)


@takes(gradient.Attributes)
def build_grad_model(
    weight: npt.ArrayLike | None = None,
    *,
    two_d: bool = False,
    per_sample_weights: bool = False,
    sparse: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    weight_dtype: npt.DTypeLike = "float32",
    **attributes: Unpack[gradient.Keywords],
) -> onnx.ModelProto:
    """A model of the gradient of one bag.

    Inputs ``grad_output`` [num_bags, D] and those of `build_model`. Outputs ``grad_weight`` [V, D], or with ``sparse``
    ``rows`` (int64 [num_entries]) and ``values`` [num_entries, D]; and with ``per_sample_weights`` the gradient of
    those, ``grad_per_sample_weights``. See ``lucid_onnx.ops.embedding_bag_grad.spec``.

    Args:
        weight: the table [V, D]; None, as what is trained changes, makes it an input ``weight``.
        **attributes: those of `lucid_onnx.embedding_bag_grad`.
        sparse: an entry for every position, not coalesced, instead of a gradient of the whole table.
        two_d, per_sample_weights, index_dtype, form, opset, weight_dtype: as in `build_model`, of the bag.

    Raises:
        TypeError, ValueError: as `build_model`.
    """
    meaning = gradient.Attributes(**attributes)
    op = gradient.variant(sparse=sparse, two_d=two_d, weighted=per_sample_weights)
    return _bag_model(op, meaning, weight, weight_dtype, index_dtype, form, opset)


def _bag_model(
    op: spec.Variant | gradient.Variant,
    attributes: spec.Attributes,
    weight: npt.ArrayLike | None,
    weight_dtype: npt.DTypeLike,
    index_dtype: npt.DTypeLike,
    form: Form,
    opset: int,
) -> onnx.ModelProto:
    """The model of a bag or its gradient; without ``weight`` the table is an input of ``weight_dtype``."""
    table = None if weight is None else np.asarray(weight)
    if table is not None:
        spec.check_table(table)
    attributes.check(weighted=op.weighted, num_rows=None if table is None else table.shape[0])
    dtype = as_dtype("weight_dtype", weight_dtype) if table is None else table.dtype
    index = as_dtype("index_dtype", index_dtype)
    constants = {} if table is None else {"weight": table}
    dtypes = {"weight": dtype, "indices": index, "offsets": index}
    return op_model(op, attributes, dtypes, constants=constants, form=form, opset=opset)


@takes(spec.Attributes)
def build_quantized_model(
    table: QuantizedTable,
    *,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    **attributes: Unpack[spec.Keywords],
) -> onnx.ModelProto:
    """A model of one bag over a table of quantized values; inputs and output as those of `build_model`.

    The node is ``ai.lucid::QuantizedEmbeddingBag`` (see ``lucid_onnx.ops.quantized_embedding_bag.spec``). The output
    and ``per_sample_weights`` have the dtype of ``table.scale``.

    Args:
        table: the quantized table.
        **attributes: those of `lucid_onnx.quantized_embedding_bag`.
        two_d, per_sample_weights, index_dtype, form, opset: as in `build_model`.

    Raises:
        TypeError, ValueError: as `build_model`.
    """
    meaning = quantized.Attributes(**attributes, codes_type=table.codes_type, embedding_dim=table.embedding_dim)
    meaning.check(weighted=per_sample_weights, num_rows=len(table.codes))
    op = quantized.variant(second=table.second, two_d=two_d, weighted=per_sample_weights)
    index = as_dtype("index_dtype", index_dtype)
    dtypes = {"scale": table.scale.dtype, "indices": index, "offsets": index}
    return op_model(op, meaning, dtypes, constants=table.inputs, form=form, opset=opset)


@takes(collection.Attributes)
def build_collection_model(
    weights: Sequence[npt.ArrayLike],
    *,
    layout: str = "ragged",
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    **attributes: Unpack[spec.Keywords],
) -> onnx.ModelProto:
    """A model of the bags of several tables, whose results are concatenated in one output.

    Inputs ``indices_0`` ([num_indices_0], or [num_bags, bag_length_0] with the layout "rows"), ``indices_1``, ..., then
    ``offsets_0``, ... and ``per_sample_weights_0``, ... as far as they apply. With the layout "packed" there is one of
    each, ``indices``, ``offsets`` ([len(weights) * num_bags + 1]) and ``per_sample_weights``, for all tables one after
    another. Output ``output`` [num_bags, sum of D] of the tables' dtype.

    Args:
        weights: the tables [V, D], all of one dtype; V and D may differ. All have the same attributes, and a negative
            padding_idx counts from the end of each.
        layout: "ragged", "packed" or "rows"; "packed" needs include_last_offset.
        **attributes: those of `lucid_onnx.embedding_bag`.
        per_sample_weights: the model takes weights; mode "sum", or mean and sqrtn with a divisor.
        index_dtype: int32 or int64, for all indices and offsets.
        form, opset: as in `build_model`; the node is ``ai.lucid::EmbeddingBagCollection``.

    Raises:
        TypeError, ValueError: as `build_model`; what concerns one table says which.
    """
    tables = [np.asarray(weight) for weight in weights]
    collection.check_tables(tables)
    meaning = collection.Attributes(**attributes)
    op = collection.variant(num_tables=len(tables), layout=layout, weighted=per_sample_weights)
    meaning.check_layout(op)
    for t, table in enumerate(tables):
        with collection.in_table(t):
            meaning.check(weighted=per_sample_weights, num_rows=table.shape[0])
    constants = {bag.table: table for bag, table in zip(op.bags, tables, strict=True)}
    index = as_dtype("index_dtype", index_dtype)
    dtypes = {**dict.fromkeys(op.inputs, index), op.typed_by: tables[0].dtype}
    return op_model(op, meaning, dtypes, constants=constants, form=form, opset=opset)


def op_model(
    op: BaseVariant,
    attributes: BaseAttributes,
    dtypes: Mapping[str, np.dtype],
    *,
    constants: Mapping[str, np.ndarray] | None = None,
    form: str,
    opset: int,
    fill: bool = True,
) -> onnx.ModelProto:
    """A model of one node of any operator, over checked arguments.

    Args:
        dtypes: of ``op.typed_by``, and of the inputs of indices and offsets.
        constants: the parts of the tables that are initializers; all other inputs of the operator are the model's.
        fill: give the initializers their data; else they have a type and a shape, and ``constants`` is not read.

    Raises:
        TypeError, ValueError: a dtype that the operator does not have, an unknown form, or an opset out of range.
    """
    constants = constants or {}
    rows_dtype = dtypes[op.typed_by]
    rows_type = onnx_type(f"{op.typed_by.removesuffix('_0')}_dtype", rows_dtype, TABLE_TYPES)
    values = op.values(attributes, {name: array.shape for name, array in constants.items()})

    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, _type_of(values[name], name, rows_type, dtypes), values[name].dims)

    graph = helper.make_graph(
        [new_node(op, op.inputs, op.outputs, attributes, double=rows_dtype == np.float64)],
        op.graph,
        [info(name) for name in op.inputs if name not in constants],
        [info(name) for name in op.outputs],
    )
    spec.check_opset(opset)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="lucid-onnx",
    )
    for name, array in constants.items():
        # Filled where it stays: protobuf copies a message by serialising it, 2 GiB at most.
        _fill_table(model.graph.initializer.add(), name, array, fill)
    convert(model, form)
    return model


def _type_of(value: Value, name: str, rows_type: int, dtypes: Mapping[str, np.dtype]) -> int:
    """The ONNX type of an input or output."""
    if value.role in ("indices", "offsets"):
        label = "index_dtype" if value.role == "indices" else "offsets_dtype"
        return onnx_type(label, dtypes[name], INDEX_TYPES)
    return rows_type if value.dtype is None else helper.np_dtype_to_tensor_dtype(value.dtype)


def _fill_table(tensor: onnx.TensorProto, name: str, table: np.ndarray, fill: bool) -> None:
    """Make ``tensor`` the table, bit by bit."""
    tensor.name, tensor.data_type = name, {**TABLE_TYPES, **CODES_TYPES}[table.dtype]
    tensor.dims.extend(table.shape)
    if fill:
        tensor.raw_data = table.tobytes()
