"""The types that callers see: what mypy makes of calls, and what ``help`` shows."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lucid_onnx
import lucid_onnx.ops
from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec

ROOT = Path(__file__).resolve().parent.parent

CALLS = """
import numpy as np
import lucid_onnx

bag = ([[1.0]], [0], [[1.0]], [0])
flag = bool(input())
reveal_type(lucid_onnx.embedding_bag_grad(*bag))
reveal_type(lucid_onnx.embedding_bag_grad(*bag, sparse=True))
reveal_type(lucid_onnx.embedding_bag_grad(*bag, mode="sum", with_per_sample_weights=True))
reveal_type(lucid_onnx.embedding_bag_grad(*bag, sparse=flag))
lucid_onnx.embedding_bag([0], [[1.0]], [0], mode="max", provider="cuda", per_sample_weights=[0.5, 1])
lucid_onnx.quantize("m.onnx", dtype="uint4")
lucid_onnx.InferenceSession("m.onnx", None, ["CPUExecutionProvider"], table_memory="mmap")
lucid_onnx.embedding_bag([0], [[1.0]], [0], mode="avg")
lucid_onnx.embedding_bag_grad(*bag, mode="avg")
lucid_onnx.build_model([[1.0]], mode="avg")
lucid_onnx.embedding_bag([0], [[1.0]], [0], provider="gpu")
lucid_onnx.quantize("m.onnx", dtype="int2")
lucid_onnx.InferenceSession("m.onnx", table_memory="ram")
lucid_onnx.lower("m.onnx", ragged="dense")
"""
ARRAY = "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]"
REVEALED = [ARRAY, f"tuple[{ARRAY}, ...]", f"tuple[{ARRAY}, ...]", f"{ARRAY} | tuple[{ARRAY}, ...]"]


def test_what_mypy_makes_of_calls(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "lucid_onnx").mkdir()  # as it is installed: a checkout has ops/ elsewhere
    for path in Path(lucid_onnx.__file__).parent.iterdir():
        if path.name != "ops":
            (tmp_path / "lucid_onnx" / path.name).symlink_to(path)
    (tmp_path / "lucid_onnx" / "ops").symlink_to(Path(lucid_onnx.ops.__file__).parent)
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--cache-dir", "cache", "--no-error-summary", "calls.py"]
    done = subprocess.run(
        [*command, "--config-file", ROOT / "pyproject.toml"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("calls.py:")]
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    assert revealed == REVEALED, done.stdout + done.stderr
    wrong = CALLS.splitlines().index('lucid_onnx.embedding_bag([0], [[1.0]], [0], mode="avg")') + 1
    errors = {int(line.split(":")[1]) for line in lines if ": error: " in line}
    assert errors == set(range(wrong, len(CALLS.splitlines()) + 1)), done.stdout


@pytest.mark.parametrize("name", ["embedding_bag", "embedding_bag_grad", "build_model", "make_node"])
def test_help_shows_the_modes(name: str) -> None:
    pytest.importorskip("onnxruntime")
    signature = str(inspect.signature(getattr(lucid_onnx, name)))
    assert f"mode: Literal[{', '.join(map(repr, spec.MODES))}] = 'mean'" in signature.replace("typing.", "")


def test_the_dtypes_of_quantize_are_those_of_quantized_tables() -> None:
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    from lucid_onnx.rewrite import quantization

    assert (*quantized_embedding_bag.spec.CODES_TYPES, "float16", "bfloat16") == quantization.DTYPES
