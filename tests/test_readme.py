"""The README's Python is run, block after block, in one namespace and an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_blocks_run(native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    table = names["table"]
    assert isinstance(table, np.ndarray)
    means = [table[[3, 1]].mean(0), table[[4, 1, 5]].mean(0)]
    np.testing.assert_allclose(names["pooled"], means, rtol=1e-6)
    # Half a step of 4 bits over [0, 1), and a float's rounding.
    np.testing.assert_allclose(names["pooled_codes"], means, atol=0.5 / 15 + 1e-6)
    assert (tmp_path / "bag.onnx").is_file()
