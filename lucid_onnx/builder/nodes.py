"""Bags as nodes, for a graph that somebody else is building."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from lucid_onnx.ops.attributes import BaseAttributes, takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.embedding_bag_grad import spec as gradient
from lucid_onnx.ops.variants import BaseVariant

from .dtypes import TABLE_TYPES, as_dtype, onnx_type

if TYPE_CHECKING:
    from typing import Unpack

_WEIGHTS = "per_sample_weights"


@takes(spec.Attributes)
def make_node(
    weight: str,
    indices: str,
    offsets: str | None = None,
    output: str = "output",
    *,
    per_sample_weights: str | None = None,
    weight_dtype: npt.DTypeLike = "float32",
    name: str = "",
    **attributes: Unpack[spec.Keywords],
) -> onnx.NodeProto:
    """One bag as a node, for a graph that is built with onnx.helper.

    ``weight``, ``indices``, ``offsets``, ``per_sample_weights`` and ``output`` are names of values in that graph;
    without ``offsets`` the indices are [B, L]. The finished model goes through `to_form`, which gives the node its
    function (or expands it), for as many bags as there are. Example::

        graph = helper.make_graph([lucid_onnx.make_node("users", "ids", "starts", "user", mode="mean"), ...], ...)
        model = lucid_onnx.to_form(helper.make_model(graph), "portable")

    Args:
        **attributes: those of `lucid_onnx.embedding_bag`.
        weight_dtype: the dtype of the table.

    Raises:
        TypeError, ValueError: as `build_model`.
    """
    meaning = spec.Attributes(**attributes)
    meaning.check(weighted=per_sample_weights is not None, num_rows=None)
    double = _is_double(weight_dtype)
    op = spec.variant(two_d=offsets is None, weighted=per_sample_weights is not None)
    given = {"weight": weight, "indices": indices, "offsets": offsets, "per_sample_weights": per_sample_weights}
    inputs = tuple(str(given[i]) for i in op.inputs)
    return new_node(op, inputs, (output,), meaning, double=double, name=name)


@takes(gradient.Attributes)
def make_grad_node(
    grad_output: str,
    weight: str,
    indices: str,
    offsets: str | None = None,
    outputs: Iterable[str] | None = None,
    *,
    per_sample_weights: str | None = None,
    sparse: bool = False,
    weight_dtype: npt.DTypeLike = "float32",
    name: str = "",
    **attributes: Unpack[gradient.Keywords],
) -> onnx.NodeProto:
    """The gradient of one bag as a node; `make_node` tells how such a node becomes a model.

    ``outputs`` are the names of all its outputs: ("grad_weight",), or ("rows", "values") with ``sparse``, and behind
    them "grad_per_sample_weights" where there are per_sample_weights. These are the default too.

    Args:
        **attributes: those of `lucid_onnx.embedding_bag_grad`.
        weight_dtype: the dtype of the table.

    Raises:
        TypeError, ValueError: as `build_grad_model`.
    """
    meaning = gradient.Attributes(**attributes)
    meaning.check(weighted=per_sample_weights is not None, num_rows=None)
    double = _is_double(weight_dtype)
    op = gradient.variant(sparse=sparse, two_d=offsets is None, weighted=per_sample_weights is not None)
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
    return new_node(op, inputs, names, meaning, double=double, name=name)


@takes(collection.Attributes)
def make_collection_node(
    weights: Sequence[str],
    indices: Sequence[str] | str,
    offsets: Sequence[str] | str | None = None,
    output: str = "output",
    *,
    per_sample_weights: Sequence[str] | str | None = None,
    weight_dtype: npt.DTypeLike = "float32",
    name: str = "",
    **attributes: Unpack[spec.Keywords],
) -> onnx.NodeProto:
    """The bags of several tables as a node, for a graph that is built with onnx.helper; see `make_node`.

    ``indices`` (and ``offsets`` and ``per_sample_weights``, as far as there are any) are a name per table, or one name
    of what all have in the packed layout. Without ``offsets`` the indices are [B, L].

    Args:
        **attributes: those of `lucid_onnx.embedding_bag`, for all tables.
        weight_dtype: the dtype of the tables.

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
    meaning = collection.Attributes(**attributes)
    meaning.check(weighted=op.weighted, num_rows=None)
    if layout == "packed" and offsets is None:
        raise ValueError("offsets missing: packed indices need them")
    meaning.check_layout(op)
    double = _is_double(weight_dtype)
    return new_node(op, inputs, (output,), meaning, double=double, name=name)


def _is_double(weight_dtype: npt.DTypeLike) -> bool:
    """Whether a table is float64; a TypeError if it cannot have this dtype."""
    dtype = as_dtype("weight_dtype", weight_dtype)
    onnx_type("weight_dtype", dtype, TABLE_TYPES)
    return bool(dtype == np.float64)


def new_node(
    op: BaseVariant,
    inputs: Iterable[str],
    outputs: Iterable[str],
    attributes: BaseAttributes,
    *,
    double: bool,
    name: str = "",
) -> onnx.NodeProto:
    given: dict[str, Any] = attributes.to_onnx(op, double=double)  # type: ignore[assignment]
    return helper.make_node(op.name, list(inputs), list(outputs), name=name, domain=spec.DOMAIN, **given)
