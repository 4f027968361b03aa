"""A large constant table is put on huge pages when a session starts, and holds what it held."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import lucid_onnx

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages:\s*(\d+) kB", text)[1])  # type: ignore[index]


@pytest.mark.skipif(
    not _THP.is_file() or "[never]" in _THP.read_text(), reason="this system has no transparent huge pages"
)
def test_a_constant_table_lies_on_huge_pages(native: None) -> None:
    random = np.random.RandomState(0)
    table = random.standard_normal((1 << 18, 64)).astype(np.float32)  # 64 MiB
    model = lucid_onnx.build_model(table, mode="sum").SerializeToString()
    before = huge_kib()
    session = lucid_onnx.InferenceSession(model)
    gained = huge_kib() - before
    if gained == 0:
        pytest.skip("the kernel has no MADV_COLLAPSE (Linux 6.1), or no memory for huge pages")
    assert gained >= table.nbytes // 1024 * 9 // 10
    indices = random.randint(0, len(table), 4000)
    offsets = np.arange(0, 4000, 20)
    got = session.run(None, {"indices": indices, "offsets": offsets})[0]
    assert np.array_equal(got, lucid_onnx.embedding_bag(indices, table, offsets, mode="sum"))


def test_a_mapped_table_stays_where_it_is(native: None, tmp_path: Path) -> None:
    """External data is a mapping of a file, which is not to be had in place."""
    table = np.random.RandomState(1).standard_normal((1 << 16, 64)).astype(np.float32)  # 16 MiB
    lucid_onnx.save(lucid_onnx.build_model(table, mode="sum"), tmp_path / "m.onnx", external_data=True)
    before = huge_kib() if _THP.is_file() else 0
    session = lucid_onnx.InferenceSession(tmp_path / "m.onnx", table_memory="inplace")
    if _THP.is_file():
        assert huge_kib() - before < table.nbytes // 1024 // 2
    got = session.run(None, {"indices": np.arange(100), "offsets": np.zeros(1, np.int64)})[0]
    np.testing.assert_allclose(got[0], table[:100].astype(np.float64).sum(0), rtol=1e-4, atol=1e-4)
