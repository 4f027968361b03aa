"""The README's Python is run, block after block, in one namespace and an empty folder."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 15
    return blocks


def test_blocks_run(native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    blocks = [block for block in python_blocks() if "import torch" not in block]
    assert len(blocks) == 12
    monkeypatch.chdir(tmp_path)
    # What an exporter would have left: torch is not needed for a graph of standard operators.
    exported = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", form="standard")
    onnx.save(exported, "exported.onnx")
    pooled = [lucid_onnx.make_node("table", f"ids_{k}", f"starts_{k}", f"bag_{k}", mode="sum") for k in range(2)]
    graph = helper.make_graph(
        [*pooled, helper.make_node("Concat", ["bag_0", "bag_1"], ["bags"], axis=1)],
        "ranker",
        [helper.make_tensor_value_info(i, TensorProto.INT64, [i]) for node in pooled for i in node.input[1:]],
        [helper.make_tensor_value_info("bags", TensorProto.FLOAT, [None, 6])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "table")],
    )
    ranker = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(lucid_onnx.to_form(ranker, "standard"), "ranker.onnx")
    rows = np.eye(4, 3, dtype=np.float32)
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, rows.nbytes]}
    header = json.dumps({"bag.weight": entry}).encode()
    (tmp_path / "ranker.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + rows.tobytes())
    # Lucid runs on Apple Silicon only: what its bag has, by attributes.
    settings = {"mode": "sum", "padding_idx": None, "max_norm": None, "norm_type": 2.0, "include_last_offset": False}
    trained = types.SimpleNamespace(weight=rows, scale_grad_by_freq=False, sparse=False, **settings)
    names: dict[str, Any] = {"trained": trained}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["loss"] < 0.2
    assert set(np.flatnonzero(names["trained"].any(1))) == {1, 3, 4, 5}
    table = names["table"]
    assert isinstance(table, np.ndarray)
    means = [table[[3, 1]].mean(0), table[[4, 1, 5]].mean(0)]
    np.testing.assert_allclose(names["pooled"], means, rtol=1e-6)
    # Half a step of 4 bits over [0, 1), and a float's rounding.
    np.testing.assert_allclose(names["pooled_codes"], means, atol=0.5 / 15 + 1e-6)
    sums = np.concatenate([[table[[3, 1]].sum(0), table[4]], table[[1, 5], :32]], axis=1)
    np.testing.assert_allclose(names["beside"], sums, rtol=1e-6)
    assert [n.op_type for n in names["many"].graph.node] == ["EmbeddingBagCollection"]
    spread = np.zeros_like(names["table_grad"])
    np.add.at(spread, names["rows"], names["values"])
    np.testing.assert_allclose(spread, names["table_grad"], rtol=1e-6)
    assert spread[[1, 3, 4, 5]].sum() == pytest.approx(128)  # two bags of 64 ones, shared out and none lost
    assert (tmp_path / "bag.onnx").is_file()
    assert onnx.load("small.onnx").graph.node[0].op_type == "QuantizedEmbeddingBagBias"
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "large.onnx").stat().st_size / 4
    assert names["bag_model"] == onnx.load("checkpoint.onnx") == lucid_onnx.build_model(rows, padding_idx=0)
    assert names["module_model"] == onnx.load("trained.onnx") == lucid_onnx.build_model(rows, mode="sum")
    assert [n.op_type for n in onnx.load("fast.onnx").graph.node] == ["EmbeddingBag"]
    for lowered in ("anywhere.onnx", "padded.onnx"):
        assert b"ai.lucid" not in (tmp_path / lowered).read_bytes()
        sums = lucid_onnx.InferenceSession(lowered, native=False).run(
            None, {"indices": np.array([2, 0, 2]), "offsets": np.array([0, 3])}
        )[0]
        np.testing.assert_array_equal(sums, [[1, 0, 2], [0, 0, 0]])
    assert [n.op_type for n in onnx.load("merged.onnx").graph.node] == ["EmbeddingBagCollection"]


def test_the_block_for_torch_runs(native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    block, translated, training = [block for block in python_blocks() if "import torch" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    model = onnx.load(tmp_path / "module.onnx")
    assert [node.op_type for node in model.graph.node] == ["EmbeddingBag"]
    words, starts = np.array([7, 0, 999, 0]), np.array([0, 0, 3])  # an empty text, and one of padding alone
    got = lucid_onnx.InferenceSession("module.onnx").run(None, {"input": words, "offsets": starts})[0]
    expected = names["module"](torch.from_numpy(words), torch.from_numpy(starts)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    exec(compile(translated, str(README), "exec"), names)
    model = onnx.load(tmp_path / "translated.onnx")
    assert [node.op_type for node in model.graph.node] == ["EmbeddingBag"]
    example = {"input": np.array([3, 1, 4, 1, 5]), "offsets": np.array([0, 2])}
    got = lucid_onnx.InferenceSession("translated.onnx").run(None, example)[0]
    expected = names["module"](names["words"], names["starts"]).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    exec(compile(training, str(README), "exec"), names)
    rows = names["rows"].detach()
    mean = rows[[3, 1]].mean(0)
    torch.testing.assert_close(names["rows"].grad.to_dense()[[3, 1, 4]], torch.stack([mean, mean, 2 * rows[4]]))
