"""Lucid's bags as models, by stand-ins: Lucid itself runs on Apple Silicon only."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lucid_onnx
import lucid_onnx.lucid as from_lucid
from lucid_onnx.ops.embedding_bag import reference
from lucid_onnx.ops.quantized_embedding_bag import reference as quantized

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Tensor:
    """What a framework's tensor has: numbers, by ``.numpy()``."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


class Arrayed:
    """Another one's: numbers, by ``__array__``."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array if dtype is None else self._array.astype(dtype)


RNG = np.random.default_rng(3)
TABLE = RNG.standard_normal((30, 7)).astype(np.float32)
CODES = RNG.integers(-127, 128, (30, 7), np.int8)
SCALE = (RNG.random(30) / 100 + 1e-3).astype(np.float32)
INDICES, OFFSETS = np.array([3, 0, 29, 29, 2, 4]), np.array([0, 0, 3])
DEFAULTS = {
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "mode": "mean",
    "sparse": False,
    "include_last_offset": False,
    "padding_idx": None,
}


def module(**attributes: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{**DEFAULTS, "weight": Tensor(TABLE), **attributes})


def quantized_module(**attributes: Any) -> types.SimpleNamespace:
    held = {"weight_int8": Tensor(CODES), "weight_scale": Tensor(SCALE)}
    found = types.SimpleNamespace(**{**DEFAULTS, **held, "weight_zero_point": Tensor(np.zeros(30, np.int8))})
    vars(found).update(attributes)
    return found


def ran(model: Any, **feed: np.ndarray) -> np.ndarray:
    return lucid_onnx.InferenceSession(model, native=False).run(None, feed)[0]


@pytest.mark.parametrize("wrapped", [Tensor, Arrayed, np.asarray])
@pytest.mark.parametrize(
    "keywords",
    [
        {"mode": "max"},
        {"mode": "sum", "padding_idx": -1, "max_norm": 1.5, "norm_type": 1.0, "sparse": True},
        {"mode": "mean", "include_last_offset": True, "scale_grad_by_freq": True},
    ],
)
def test_a_bag(keywords: dict[str, Any], wrapped: Any) -> None:
    model = from_lucid.from_module(module(weight=wrapped(TABLE), **keywords))
    offsets = np.array([0, 0, 3, 5]) if keywords.get("include_last_offset") else OFFSETS
    arguments = {k: v for k, v in keywords.items() if k not in ("sparse", "scale_grad_by_freq")}
    expected = reference.embedding_bag(INDICES, TABLE, offsets, **arguments)
    np.testing.assert_allclose(ran(model, indices=INDICES, offsets=offsets), expected, rtol=1e-6, atol=1e-6)


def test_how_it_is_called_and_written() -> None:
    model = from_lucid.from_module(
        module(mode="sum"), two_d=True, per_sample_weights=True, index_dtype="int32", form="standard", opset=20
    )
    assert [i.version for i in model.opset_import] == [20]
    x, w = INDICES.reshape(2, 3).astype(np.int32), np.ones((2, 3), np.float32) / 2
    expected = reference.embedding_bag(x, TABLE, mode="sum", per_sample_weights=w)
    np.testing.assert_allclose(ran(model, indices=x, per_sample_weights=w), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zero_point", [np.zeros(30, np.int8), np.array(0), np.array([3]), np.arange(30.0)[:, None]])
@pytest.mark.parametrize("scale", [SCALE, SCALE.astype(np.float16)[:, None]])
def test_a_quantised_bag(zero_point: np.ndarray, scale: np.ndarray) -> None:
    held = {"weight_scale": Tensor(scale), "weight_zero_point": Tensor(zero_point)}
    model = from_lucid.from_module(quantized_module(mode="sum", padding_idx=2, **held))
    assert ("ZeroPoint" in model.graph.node[0].op_type) == bool((zero_point != 0).any())
    zeros = np.broadcast_to(zero_point.reshape(-1), 30).astype(scale.dtype)
    expected = quantized.quantized_embedding_bag(
        INDICES, CODES, scale.reshape(-1), OFFSETS, zero_point=zeros, mode="sum", padding_idx=2
    )
    tolerance = 1e-6 if scale.dtype == np.float32 else 2.0**-10
    found = ran(model, indices=INDICES, offsets=OFFSETS)
    assert found.dtype == scale.dtype
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", from_lucid.ATTRIBUTES)
def test_a_missing_attribute_is_named(name: str) -> None:
    for one in (module(), quantized_module()):
        expected = from_lucid.from_module(one)
        delattr(one, name)
        message = rf"^the module, SimpleNamespace, has no attribute '{name}'; attributes=\{{'{name}': \.\.\.\}} gives"
        with pytest.raises(AttributeError, match=message):
            from_lucid.from_module(one)
        assert from_lucid.from_module(one, attributes={name: DEFAULTS[name]}) == expected


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point"])
def test_a_missing_number_of_rows_is_named(name: str) -> None:
    one = quantized_module()
    delattr(one, name)
    with pytest.raises(AttributeError, match=f"^the module, SimpleNamespace, has no attribute '{name}'$"):
        from_lucid.from_module(one)


@pytest.mark.parametrize(
    ("one", "error", "message"),
    [
        (types.SimpleNamespace(**DEFAULTS), AttributeError, "has no attribute 'weight'"),
        (module(weight=[[1.0]]), TypeError, "weight is a list, which has neither .numpy() nor __array__"),
        (module(weight=TABLE[0]), ValueError, "weight has shape [7], expected [V, D]"),
        (module(mode="median"), ValueError, "mode = 'median' is not one of"),
        (module(padding_idx=30), ValueError, "padding_idx = 30 is outside [-30, 30)"),
        (quantized_module(weight_int8=TABLE), ValueError, "weight_int8 is float32 [30, 7], expected int8 [V, D]"),
        (quantized_module(weight_scale=SCALE[:9]), ValueError, "weight_scale has shape [9], expected [30]"),
        (quantized_module(weight_scale=SCALE.astype(float)), TypeError, "weight_scale has dtype float64"),
        (quantized_module(weight_zero_point=np.ones(9)), ValueError, "weight_zero_point has shape [9], expected [30]"),
        (
            quantized_module(weight_zero_point=np.full(30, 2**24 + 1)),
            ValueError,
            "weight_zero_point[0] = 16777217 is not exact in float32",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(one: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        from_lucid.from_module(one)


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match="attributes has 'weight', which is not one of max_norm, norm_type, mode"):
        from_lucid.from_module(module(), attributes={"weight": TABLE})


# ---- Checkpoints.

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "int64": "I64"}


def write(path: Path, tensors: dict[str, np.ndarray], hole: int = 0) -> None:
    """A .safetensors file; ``hole``: bytes of another tensor in front, which the file system need not store."""
    header: dict[str, Any] = {}
    at = hole
    if hole:
        header["huge"] = {"dtype": "F32", "shape": [hole // 4], "data_offsets": [0, hole]}
    for name, array in tensors.items():
        span = [at, at + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        at += array.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + hole)
        for array in tensors.values():
            file.write(array.tobytes())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_table_of_a_checkpoint(tmp_path: Path, dtype: str) -> None:
    table = TABLE.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    write(tmp_path / "c.safetensors", {"odd": np.zeros(3, np.int8), "ranker.bag.weight": table})
    keywords: dict[str, Any] = {"mode": "sum", "padding_idx": 1, "max_norm": 0.5}
    model = from_lucid.from_checkpoint(tmp_path / "c.safetensors", "ranker.bag.weight", **keywords)
    assert model == lucid_onnx.build_model(table, **keywords)


def test_codes_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    tensors = {"weight_int8": CODES, "weight_scale": SCALE, "weight_zero_point": np.arange(30)}
    for stem in ("", "ranker.bag."):
        write(path, {stem + name: array for name, array in tensors.items()})
        table = lucid_onnx.QuantizedTable.of(CODES, SCALE, zero_point=np.arange(30, dtype=np.float32))
        found = from_lucid.from_checkpoint(path, f"{stem}weight_int8", mode="max")
        assert found == lucid_onnx.build_quantized_model(table, mode="max")
    write(path, {"a.weight_int8": CODES, "weight_scale": SCALE})
    with pytest.raises(ValueError, match=r"no tensor 'a\.weight_scale'; it has: a\.weight_int8, weight_scale"):
        from_lucid.from_checkpoint(path, "a.weight_int8")
    write(path, {"a.weight_int8": CODES, "a.weight_scale": SCALE[:3], "a.weight_zero_point": np.zeros(30, np.int8)})
    with pytest.raises(ValueError, match=r"c\.safetensors: a\.weight_scale has shape \[3\], expected \[30\]"):
        from_lucid.from_checkpoint(path, "a.weight_int8")
    with pytest.raises(ValueError, match=r"tensor 'a\.weight_zero_point' has dtype I8, expected one of F32, F16"):
        from_lucid.from_checkpoint(path, "a.weight_zero_point")
    with pytest.raises(FileNotFoundError):
        from_lucid.from_checkpoint(tmp_path / "none.safetensors", "weight")


def test_no_more_than_the_tensor_is_read(tmp_path: Path) -> None:
    """The rest of the file is 64 GiB, more than memory holds or a test has time for."""
    write(tmp_path / "c.safetensors", {"bag.weight": TABLE}, hole=2**36)
    assert (tmp_path / "c.safetensors").stat().st_blocks * 512 < 2**20
    assert from_lucid.from_checkpoint(tmp_path / "c.safetensors", "bag.weight") == lucid_onnx.build_model(TABLE)
