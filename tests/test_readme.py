"""The README: its code runs as it stands, in an empty folder, and does what the text says."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_testing import pages

README = pages.ROOT / "README.md"


@pytest.fixture(scope="module")
def done(
    native: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The README, run once: its names, and the lines of what was left out. The folder is the current one."""
    if importlib.util.find_spec("torch"):
        request.getfixturevalue("translations")
    with pytest.MonkeyPatch.context() as patch:
        yield pages.run(README, tmp_path_factory.mktemp("readme"), patch)


def test_blocks_run(done: tuple[dict[str, Any], list[int]]) -> None:
    names, left_out = done
    assert [b.language for b in pages.blocks(README)].count("python") >= 4
    table = names["table"]
    assert isinstance(table, np.ndarray)
    means = [table[[3, 1]].mean(0), table[[4, 1, 5]].mean(0)]
    np.testing.assert_allclose(names["pooled"], means, rtol=1e-6)
    np.testing.assert_array_equal(names["same"], names["pooled"])
    assert [n.op_type for n in onnx.load("bag.onnx").graph.node] == ["EmbeddingBag"]
    if left_out:
        pytest.skip(f"torch is not installed: README.md has run but for its blocks at {left_out}")


def test_the_block_for_torch_runs(done: tuple[dict[str, Any], list[int]]) -> None:
    """The file that the reader has fused, and the one that was exported, against torch over other bags."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    names, left_out = done
    assert left_out == []
    words, offsets = np.array([7, 0, 999, 0]), np.array([0, 0, 3])  # one of the bags is empty
    expected = names["ranker"](torch.from_numpy(words), torch.from_numpy(offsets)).detach().numpy()
    for path in ("fast.onnx", "ranker.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert [n.op_type for n in model.graph.node if n.domain == "ai.lucid"] == ["EmbeddingBag"]
        assert not any(n.op_type == "Loop" for n in model.graph.node)
        for native in (True, False):
            session = lucid_onnx.InferenceSession(path, native=native)
            got = session.run(None, {"words": words, "offsets": offsets})[0]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_it_is_short_and_has_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "pip install '.[cpu]' && lucid-onnx demo" in text
    assert "pip install '.[cpu,test]' && pytest" in text
