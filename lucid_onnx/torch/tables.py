"""`from_module`: tables that are read together as a model, without an example call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import numpy as np
import numpy.typing as npt
import onnx
import torch

from lucid_onnx.builder import Form, as_dtype
from lucid_onnx.ops.attributes import either
from lucid_onnx.ops.embedding_bag import spec

from .batched import Batched, batched
from .export import check_arguments, write
from .jagged import OUTPUT, Flat, describe
from .placeholders import RejectedError

Bounds = Literal["lengths", "offsets"]


@overload
def from_module(
    module: torch.nn.Module,
    path: None = ...,
    *,
    keys: Sequence[str] | None = ...,
    bounds: Bounds = ...,
    per_sample_weights: bool | None = ...,
    index_dtype: npt.DTypeLike = ...,
    form: Form = ...,
    opset: int = ...,
    external_data: bool | None = ...,
) -> onnx.ModelProto: ...
@overload
def from_module(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    keys: Sequence[str] | None = ...,
    bounds: Bounds = ...,
    per_sample_weights: bool | None = ...,
    index_dtype: npt.DTypeLike = ...,
    form: Form = ...,
    opset: int = ...,
    external_data: bool | None = ...,
) -> None: ...
def from_module(
    module: torch.nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    keys: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    per_sample_weights: bool | None = None,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    external_data: bool | None = None,
) -> onnx.ModelProto | None:
    """A model of a module that reads several tables together; no example call is needed.

    Of TorchRec, ``EmbeddingBagCollection`` and that of ``torchrec.quant``: the inputs are those of a KeyedJaggedTensor,
    ``values`` [N], ``lengths`` [T * B] or ``offsets`` [T * B + 1], and ``weights`` [N] of a weighted one. Of FBGEMM,
    ``SplitTableBatchedEmbeddingBagsCodegen`` and ``IntNBitTableBatchedEmbeddingBagsCodegen``: ``indices``,
    ``offsets`` or ``lengths``, and ``per_sample_weights``. The output, ``output`` [B, D_0 + D_1 + ...], has the columns
    of each feature. N and B may be 0. Keys, and the columns of each, are in the model's metadata.

    Args:
        module: the module, on the CPU.
        path: the .onnx file to write, whole or not at all.
        keys: of TorchRec, the keys of the KeyedJaggedTensor in their order; others than the module's are skipped. By
            default the module's own, in the order of its tables.
        bounds: "lengths" or "offsets"; by default lengths of TorchRec, and offsets of FBGEMM.
        per_sample_weights: of FBGEMM, whether the model takes them.
        index_dtype: int32 or int64.
        form, opset, external_data: as in `export`.

    Returns:
        The model if ``path`` is None, else nothing.

    Raises:
        TypeError: a module that is none of these, or an ``index_dtype`` that is not one of the two.
        ValueError: another argument that is not valid; tables of a type that no bag has, rows that are not pooled, and
            bags of a collection that are not as TorchRec makes them.
    """
    check_arguments(form, opset)
    try:
        bags = batched(module)
    except RejectedError as error:
        raise ValueError(str(error)) from error
    if bags is None:
        raise TypeError(
            f"the module is {type(module).__module__}.{type(module).__name__}; expected TorchRec's "
            "EmbeddingBagCollection with bags as it makes them, or FBGEMM's batched tables"
        )
    own, is_keyed = bags.keys, bags.weighted is not None
    order = own if keys is None or not is_keyed else list(keys)
    if keys is not None and not is_keyed:
        raise ValueError("keys are given, and FBGEMM's tables have none")
    if len(set(order)) < len(order) or not set(own) <= set(order):
        raise ValueError(f"keys = {order}; expected each of {', '.join(map(str, own))}, once")
    if bounds not in (None, *get_args(Bounds)):
        raise ValueError(f"bounds = {bounds!r} is not one of {', '.join(get_args(Bounds))}")
    if is_keyed and per_sample_weights not in (None, bags.weighted):
        raise ValueError(
            f"per_sample_weights = {per_sample_weights}, but the collection's is_weighted = {bags.weighted}"
        )
    dtype = as_dtype("index_dtype", index_dtype)
    if dtype not in spec.INDEX_DTYPES:
        raise TypeError(f"index_dtype = {dtype} is not {either(spec.INDEX_DTYPES)}")
    by_lengths = is_keyed if bounds is None else bounds == "lengths"
    weighted = bool(bags.weighted if is_keyed else per_sample_weights)
    flat = _call(_Tables(module, bags, order, by_lengths=by_lengths), weighted=weighted, dtype=dtype)
    return write(
        flat.module,
        flat.args,
        path,
        flat=flat,
        form=form,
        opset=opset,
        embedding_as_bag=False,
        external_data=external_data,
        dynamic_shapes=flat.dynamic_shapes,
        input_names=flat.input_names,
        output_names=None,
    )


class _Tables(torch.nn.Module):
    """What the model computes: the bags of a module, of tensors."""

    def __init__(self, module: torch.nn.Module, bags: Batched, keys: Sequence[Any], *, by_lengths: bool) -> None:
        super().__init__()
        self.module = module
        self.bags, self.keys, self.by_lengths = bags, list(keys), by_lengths
        self.output_names = [OUTPUT]
        self.eval()

    def forward(
        self, values: torch.Tensor, bounds: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        offsets = bounds
        if self.by_lengths:
            offsets = torch.nn.functional.pad(bounds.cumsum(0, dtype=bounds.dtype), (1, 0))
        return self.bags.pool(values, offsets, per_sample_weights, self.keys)

    def describe(self, model: onnx.ModelProto) -> None:
        """Write the keys of a collection of TorchRec's into a model's metadata."""
        if self.bags.weighted is not None:
            describe(model, {"values": self.keys}, {OUTPUT: (self.bags.names, self.bags.dims)})


def _call(tables: _Tables, *, weighted: bool, dtype: np.dtype) -> Flat:
    """A call of two bags of each key, of one index each."""
    count = 2 * len(tables.keys)
    kind = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}[dtype]
    bounds = torch.ones(count, dtype=kind) if tables.by_lengths else torch.arange(count + 1, dtype=kind)
    args = [torch.zeros(count, dtype=kind), bounds]
    names = ["values", "lengths" if tables.by_lengths else "offsets", "weights"]
    if tables.bags.weighted is None:
        names[0], names[2] = "indices", "per_sample_weights"
    size, batch = torch.export.Dim("num_values"), torch.export.Dim("batch")
    bags = batch if len(tables.keys) == 1 else len(tables.keys) * batch
    shapes: list[Any] = [{0: size}, {0: bags if tables.by_lengths else bags + 1}]
    if weighted:
        args.append(torch.ones(count, dtype=tables.bags.weights_dtype))
        shapes.append({0: size})
    return Flat(tables, tuple(args), tuple(shapes), names[: len(args)])
