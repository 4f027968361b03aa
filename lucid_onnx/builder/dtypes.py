"""The dtypes of tables, quantized values and indices, as NumPy has them and as ONNX does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from lucid_onnx.ops.embedding_bag import spec

INDEX_TYPES = {np.dtype(np.int32): TensorProto.INT32, np.dtype(np.int64): TensorProto.INT64}


TABLE_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    spec.BFLOAT16: TensorProto.BFLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
}


CODES_TYPES = {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.uint8): TensorProto.UINT8}


def as_dtype(name: str, dtype: npt.DTypeLike) -> np.dtype:
    try:
        return spec.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} = {dtype!r} is no dtype") from error


def onnx_type(name: str, dtype: np.dtype, types: Mapping[Any, int]) -> int:
    if dtype not in types:
        raise TypeError(f"{name} = {dtype} is not one of {', '.join(str(t) for t in types)}")
    return types[dtype]
