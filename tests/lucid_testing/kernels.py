"""The native library through its C interface, past ONNX Runtime: its structs, and calls that watch their output."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_onnx.ops.embedding_bag_grad import cases as gradients

BagCase = cases.Case | gradients.Case


def library_path() -> str | None:
    """The native library's file, or None where lucid_onnx is installed without it."""
    try:
        return lucid_onnx.get_library_path()
    except FileNotFoundError:
        return None


needs_library = pytest.mark.skipif(library_path() is None, reason="lucid_onnx is installed without its native library")


class Args(ctypes.Structure):
    """EmbeddingBagArgs of cpp_ops/embedding_bag/args.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("per_sample_weights", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("weight_shape", ctypes.c_int64 * 2),
        ("indices_shape", ctypes.c_int64 * 2),
        ("num_offsets", ctypes.c_int64),
        ("max_norm", ctypes.c_double),
        ("norm_type", ctypes.c_double),
        ("padding_idx", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("index_type", ctypes.c_int32),
        ("offset_type", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("indices_rank", ctypes.c_int32),
        ("include_last_offset", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("scale_stride", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("row_stride", ctypes.c_int32),
        ("negative", ctypes.c_int32),
        ("divisor", ctypes.c_int32),
    )


class CollectionArgs(ctypes.Structure):
    """EmbeddingBagCollectionArgs of cpp_ops/embedding_bag/args.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        ("tables", ctypes.POINTER(Args)),
        ("num_tables", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("packed", ctypes.c_int64),
    )


class GradArgs(ctypes.Structure):
    """EmbeddingBagGradArgs of cpp_ops/embedding_bag_grad/args.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        ("forward", Args),
        ("grad_output", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("grad_per_sample_weights", ctypes.c_void_p),
        ("grad_output_shape", ctypes.c_int64 * 2),
        ("num_entries", ctypes.c_int64),
        ("sparse", ctypes.c_int32),
        ("scale_grad_by_freq", ctypes.c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The native library, loaded once."""
    path = library_path()
    assert path is not None, "a test without the mark needs_library asked for the library"
    native = ctypes.CDLL(path)
    for name in ("lucid_onnx_version", "lucid_isa_name", "lucid_isa_active"):
        getattr(native, name).restype = ctypes.c_char_p
    native.lucid_isa_runs.restype = ctypes.c_int64
    native.lucid_embedding_bag.argtypes = (
        ctypes.POINTER(Args),
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    )
    return native


def all_isas() -> list[str]:
    """The instruction sets that the library was compiled for."""
    return [library().lucid_isa_name(i).decode() for i in range(library().lucid_isa_count())]


def isas() -> list[str]:
    """The instruction sets that this machine runs, the best one last."""
    return [name for i, name in enumerate(all_isas()) if library().lucid_isa_supported(i)]


#: What parametrized tests name; `need` skips one that this machine lacks.
KNOWN_ISAS = ("baseline", "avx2", "avx512", "neon")


def need(isa: str) -> None:
    """Skip where this machine does not run an instruction set."""
    if isa not in isas():
        pytest.skip(f"no {isa} here; there are: {', '.join(isas())}")


def num_bags(case: BagCase) -> int:
    """The number of rows of the output."""
    if case.offsets is None:
        return len(case.indices)
    return len(case.offsets) - case.attributes.include_last_offset


def arguments(case: BagCase, output: np.ndarray | None = None, **overrides: Any) -> Args:
    """The struct of a case. It points into the case's arrays, which must be contiguous and outlive it."""
    a = case.attributes
    given = (case.weight, case.indices, case.offsets, case.per_sample_weights, output)
    pointers = [None if array is None else array.ctypes.data for array in given]
    fields: dict[str, Any] = {
        "size_bytes": ctypes.sizeof(Args),
        **dict(zip(("weight", "indices", "offsets", "per_sample_weights", "output"), pointers, strict=True)),
        "weight_shape": (ctypes.c_int64 * 2)(*case.weight.shape),
        "indices_shape": (ctypes.c_int64 * 2)(*case.indices.shape),
        "num_offsets": 0 if case.offsets is None else len(case.offsets),
        "max_norm": np.inf if a.max_norm is None else a.max_norm,
        "norm_type": a.norm_type,
        "padding_idx": spec.NO_PADDING if a.padding_idx is None else a.padding_idx,
        "dtype": ["float32", "float16", "bfloat16", "float64"].index(case.weight.dtype.name),
        "index_type": int(case.indices.dtype == np.int64),
        "offset_type": int(case.offsets is not None and case.offsets.dtype == np.int64),
        "mode": spec.MODES.index(a.mode),
        "negative": int(a.negative == "skip"),
        "divisor": (None, "count", "weights").index(a.divisor),
        "indices_rank": case.indices.ndim,
        "include_last_offset": int(a.include_last_offset),
        "output_type": ["float32", "float16", "bfloat16", "float64"].index(case.weight.dtype.name),
    }
    return Args(**{**fields, **overrides})


def call(args: Args, isa: str | None = None, threads: int = 1) -> tuple[int, str]:
    """The status code and the message."""
    message = ctypes.create_string_buffer(256)
    name = None if isa is None else isa.encode()
    code = library().lucid_embedding_bag(ctypes.byref(args), name, threads, message, len(message))
    return code, message.value.decode()


#: What the output and the memory around it hold before a call.
_FENCE = 0xA5


def pool(case: cases.Case, isa: str | None = None, threads: int = 1) -> np.ndarray:
    """The case's result; asserts that every byte of it was written, and none outside of it."""
    case = dataclasses.replace(
        case,
        **{name: np.ascontiguousarray(array) for name, array in case.inputs.items()},
    )
    shape = (num_bags(case), case.weight.shape[1])
    size = int(np.prod(shape)) * case.weight.itemsize
    results = []
    for fill in (_FENCE, _FENCE ^ 0xFF):  # a byte that nobody writes differs between the two
        memory = np.full(size + 128, fill, np.uint8)
        inside = memory[64 : 64 + size]
        code, message = call(arguments(case, inside), isa, threads)
        assert (code, message) == (0, ""), f"{case.name} on {isa} with {threads} threads"
        assert (memory[:64] == fill).all(), f"{case.name}: {isa} wrote before the output"
        assert (memory[64 + size :] == fill).all(), f"{case.name}: {isa} wrote behind the output"
        results.append(inside.view(case.weight.dtype).reshape(shape))
    assert results[0].tobytes() == results[1].tobytes(), f"{case.name}: {isa} left bytes of the output as they were"
    return results[0]


def _ragged(random: np.random.RandomState, lengths: Iterable[int]) -> np.ndarray:
    """Offsets of bags of these lengths, shuffled."""
    lengths = np.fromiter(lengths, np.int64)
    random.shuffle(lengths)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]])


def large_cases() -> Iterable[cases.Case]:
    """Enough work for threads, with bags of one, two and many pieces among short and empty ones."""
    random = np.random.RandomState(20)
    offsets = _ragged(random, [0, 1023, 1024, 1025, 2048, 2049, 20000] + [3] * 400 + [0] * 50)
    count = 1023 + 1024 + 1025 + 2048 + 2049 + 20000 + 1200
    for dtype in spec.TABLE_DTYPES:
        for dim in (1, 64, 67):
            weight = random.standard_normal((300, dim)).astype(dtype)
            indices = random.randint(0, 300, count)
            weights = random.standard_normal(count).astype(dtype)
            for mode in spec.MODES:
                yield cases.Case(
                    f"large {mode} {dtype} {dim}",
                    weight,
                    indices,
                    offsets,
                    weights if mode == "sum" else None,
                    spec.Attributes(mode, padding_idx=7, max_norm=np.sqrt(dim) if dim > 1 else None),
                )


def gradient(case: gradients.Case, isa: str | None = None, threads: int = 1) -> list[np.ndarray]:
    """The case's outputs; asserts that every byte of them was written, and none outside of them."""
    case = dataclasses.replace(case, **{name: np.ascontiguousarray(array) for name, array in case.inputs.items()})
    results = [_gradient(case, isa, threads, fill) for fill in (_FENCE, _FENCE ^ 0xFF)]
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes(), f"{case.name}: {isa} left bytes as they were"
    return results[0]


def _gradient(case: gradients.Case, isa: str | None, threads: int, fill: int) -> list[np.ndarray]:
    native = library()
    args = GradArgs(
        size_bytes=ctypes.sizeof(GradArgs),
        forward=arguments(case),
        grad_output=case.grad_output.ctypes.data,
        grad_output_shape=(ctypes.c_int64 * 2)(num_bags(case), case.weight.shape[1]),
        sparse=case.sparse,
        scale_grad_by_freq=case.attributes.scale_grad_by_freq,
    )
    message = ctypes.create_string_buffer(256)
    entries = ctypes.c_int64(-1)
    code = native.lucid_embedding_bag_grad_entries(
        ctypes.byref(args), ctypes.byref(entries), message, ctypes.c_size_t(len(message))
    )
    assert (code, message.value) == (0, b""), case.name
    args.num_entries = entries.value
    memories, outputs = [], []
    for name in case.op.outputs:
        dtype = np.dtype(np.int64) if name == "rows" else case.weight.dtype
        rows, columns = (len(case.weight) if name == "grad_weight" else entries.value), case.weight.shape[1]
        shape: tuple[int, ...] = (rows,) if name == "rows" else (rows, columns)
        if name == "grad_per_sample_weights":
            shape = case.indices.shape
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + 128, fill, np.uint8)
        setattr(args, name, memory.ctypes.data + 64)
        memories.append((memory, size))
        outputs.append(memory[64 : 64 + size].view(dtype).reshape(shape))
    code = native.lucid_embedding_bag_grad(
        ctypes.byref(args),
        None if isa is None else isa.encode(),
        threads,
        message,
        ctypes.c_size_t(len(message)),
    )
    assert (code, message.value) == (0, b""), f"{case.name} on {isa} with {threads} threads"
    for memory, size in memories:
        assert (memory[:64] == fill).all(), f"{case.name}: {isa} wrote before an output"
        assert (memory[64 + size :] == fill).all(), f"{case.name}: {isa} wrote behind an output"
    return outputs


def bits(outputs: Iterable[np.ndarray]) -> list[bytes]:
    """The bytes of each output, which compare as bits do: NaN equals NaN, and -0 is not 0."""
    return [array.tobytes() for array in outputs]


def as_a_model_says_it(case: gradients.Case) -> gradients.Case:
    """With max_norm and norm_type as they are in a node, where a float64 has 48 bits."""
    a = case.attributes
    max_norm = None if a.max_norm is None else sum(spec.split_double(a.max_norm))
    return dataclasses.replace(
        case, attributes=dataclasses.replace(a, max_norm=max_norm, norm_type=sum(spec.split_double(a.norm_type)))
    )
