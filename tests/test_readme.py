"""The README's Python is run, block after block, in one namespace and an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import lucid_onnx

README = Path(__file__).resolve().parent.parent / "README.md"


def test_blocks_run(native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    # What an exporter would have left: torch is not needed for a graph of standard operators.
    exported = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", form="standard")
    onnx.save(exported, "exported.onnx")
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    table = names["table"]
    assert isinstance(table, np.ndarray)
    np.testing.assert_allclose(names["pooled"], [table[[3, 1]].mean(0), table[[4, 1, 5]].mean(0)], rtol=1e-6)
    assert (tmp_path / "bag.onnx").is_file()
    assert [n.op_type for n in onnx.load("fast.onnx").graph.node] == ["EmbeddingBag"]
    assert b"ai.lucid" not in (tmp_path / "anywhere.onnx").read_bytes()
