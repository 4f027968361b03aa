"""The dtypes of tables, quantized values and indices, as NumPy has them and as ONNX does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized


def _onnx_types(dtypes: Iterable[np.dtype]) -> dict[np.dtype, int]:
    return {dtype: helper.np_dtype_to_tensor_dtype(dtype) for dtype in dtypes}


INDEX_TYPES = _onnx_types(spec.INDEX_DTYPES)
TABLE_TYPES = _onnx_types(spec.TABLE_DTYPES)
#: What quantized values are stored as; those of 4 bits two in a uint8.
CODES_TYPES = _onnx_types(t.stored for t in quantized.CODES_TYPES.values())


def as_dtype(name: str, dtype: npt.DTypeLike) -> np.dtype:
    try:
        return spec.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} = {dtype!r} is not a dtype") from error


def onnx_type(name: str, dtype: np.dtype, types: Mapping[Any, int]) -> int:
    if dtype not in types:
        raise TypeError(f"{name} = {dtype} is not one of {', '.join(str(t) for t in types)}")
    return types[dtype]
