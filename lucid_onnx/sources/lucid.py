"""Lucid's ``nn.EmbeddingBag`` and ``nn.quantized.EmbeddingBag``, and its checkpoints, as models.

Lucid is not imported: only attributes of a module are read, so any object that has them works. Lucid runs on Apple
Silicon only. This code was written for, and is tested with, objects that have exactly the attributes named here, on
machines that Lucid does not run on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from lucid_onnx.builder import Form, build_model, build_quantized_model
from lucid_onnx.ops.attributes import takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable

from . import checkpoint

if TYPE_CHECKING:
    from typing import Unpack

#: The attributes of a module's bags, in the order of the call. ``scale_grad_by_freq`` and ``sparse`` concern the
#: gradient.
ATTRIBUTES = ("max_norm", "norm_type", "mode", "include_last_offset", "padding_idx")
_CODES, _SCALE, _ZERO_POINT = "weight_int8", "weight_scale", "weight_zero_point"


def from_module(
    module: Any,
    *,
    attributes: Mapping[str, Any] | None = None,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
) -> onnx.ModelProto:
    """A model of one of Lucid's bags; its inputs and output are those of `lucid_onnx.build_model`.

    Reads `ATTRIBUTES`, and ``weight`` [V, D] of ``nn.EmbeddingBag``, or ``weight_int8`` [V, D], ``weight_scale`` (one
    number a row: [V] or [V, 1]) and ``weight_zero_point`` (likewise, or one number for all) of
    ``nn.quantized.EmbeddingBag``. A table is anything with ``.numpy()`` or ``__array__``. A zero point that is 0 in
    every row is dropped.

    Args:
        module: the module. It is not changed; the model has a copy of its table.
        attributes: values by name, in place of the module's own, or of those that it lacks.
        two_d, per_sample_weights, index_dtype, form, opset: as in `lucid_onnx.build_model`.

    Raises:
        AttributeError: the module lacks an attribute, which the message names.
        TypeError: a table that is not an array, or of a dtype that the operator does not take.
        ValueError: an unknown name in ``attributes``, or a value or shape outside the operator's contract.
    """
    given = dict(attributes or {})
    known = list(dict.fromkeys((*ATTRIBUTES, *(a.name for a in spec.Attributes.keyword_table()))))
    for name in given:
        if name not in known:
            raise ValueError(f"attributes has {name!r}, which is not one of {', '.join(known)}")

    def value(name: str) -> Any:
        return given[name] if name in given else _attribute(module, name)

    def array(name: str) -> np.ndarray:
        return _array(name, _attribute(module, name))

    keywords: dict[str, Any] = {**given, **{name: value(name) for name in ATTRIBUTES}}
    keywords.update(two_d=two_d, per_sample_weights=per_sample_weights, index_dtype=index_dtype, form=form, opset=opset)
    if hasattr(module, _CODES):
        table = _quantized(array(_CODES), array(_SCALE), array(_ZERO_POINT), ("", ""))
        return build_quantized_model(table, **keywords)
    return build_model(array("weight"), **keywords)


@takes(spec.Attributes)
def from_checkpoint(
    path: str | os.PathLike[str],
    key: str,
    *,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    **attributes: Unpack[spec.Keywords],
) -> onnx.ModelProto:
    """A model of one bag whose table is a tensor of a .safetensors checkpoint. Reads only that tensor.

    Args:
        path: the checkpoint.
        key: the tensor: a table of floats ("ranker.bag.weight"), or the quantized values of a quantized
            module ("ranker.bag.weight_int8"), whose ``weight_scale`` and ``weight_zero_point`` have the same prefix.
        **attributes: those of `lucid_onnx.build_model`, which a checkpoint does not hold.
        two_d, per_sample_weights, index_dtype, form, opset: as in `lucid_onnx.build_model`.

    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: it is not a checkpoint, it lacks a tensor, or as `lucid_onnx.build_model`.
    """
    keywords: dict[str, Any] = {
        **attributes,
        "two_d": two_d,
        "per_sample_weights": per_sample_weights,
        "index_dtype": index_dtype,
        "form": form,
        "opset": opset,
    }
    prefix, found, last = key.rpartition(".")
    if last != _CODES:
        return build_model(checkpoint.read(path, key), **keywords)
    stem = prefix + found
    floats: dict[str, np.dtype] = {name: dtype for name, dtype in checkpoint.FLOATS.items() if name in ("F32", "F16")}
    codes = checkpoint.read(path, key, {"I8": checkpoint.INTEGERS["I8"]})
    scale = checkpoint.read(path, stem + _SCALE, floats)
    zero_point = checkpoint.read(path, stem + _ZERO_POINT, {**floats, **checkpoint.INTEGERS})
    return build_quantized_model(_quantized(codes, scale, zero_point, (f"{os.fspath(path)}: ", stem)), **keywords)


def _quantized(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, called: tuple[str, str]) -> QuantizedTable:
    """The table. ``called`` has the prefix of an error message, and that of the names in it."""
    message, stem = called
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(f"{message}{stem}{_CODES} is {codes.dtype} {list(codes.shape)}, expected int8 [V, D]")
    if scale.dtype not in (np.float32, np.float16):
        raise TypeError(f"{message}{stem}{_SCALE} has dtype {scale.dtype}, expected float32 or float16")
    rows = len(codes)
    if scale.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{message}{stem}{_SCALE} has shape {list(scale.shape)}, expected [{rows}], one number a row")
    if zero_point.shape not in ((rows,), (rows, 1)) and zero_point.size != 1:
        raise ValueError(
            f"{message}{stem}{_ZERO_POINT} has shape {list(zero_point.shape)}, expected [{rows}] or one number"
        )
    zeros = np.broadcast_to(zero_point.reshape(-1), (rows,))
    if (zeros == 0).all():
        return QuantizedTable.of(codes, scale.reshape(-1))
    rounded = zeros.astype(scale.dtype)
    wrong = np.flatnonzero(rounded != zeros)
    if len(wrong):
        r = int(wrong[0])
        raise ValueError(
            f"{message}{stem}{_ZERO_POINT}[{r}] = {zeros[r]} is not exact in {scale.dtype}, the dtype of the scale"
        )
    return QuantizedTable.of(codes, scale.reshape(-1), zero_point=rounded)


def _attribute(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        hint = f"; attributes={{{name!r}: ...}} gives it a value" if name in ATTRIBUTES else ""
        raise AttributeError(f"the module, {type(module).__name__}, has no attribute {name!r}{hint}")
    return getattr(module, name)


def _array(name: str, value: Any) -> np.ndarray:
    """A tensor as an array."""
    if callable(getattr(value, "numpy", None)):
        value = value.numpy()
    if not hasattr(value, "__array__"):
        raise TypeError(f"{name} is a {type(value).__name__}, which has neither .numpy() nor __array__")
    return np.asarray(value)
