"""Tables that FBGEMM reads in one call, exported; a module like FBGEMM's stands for it, as FBGEMM is not installed.

`tests/real_torchrec.py` exports FBGEMM's own modules: `nox -s modules`.
"""

from __future__ import annotations

import enum
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lucid_onnx

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import lucid_onnx.torch as lucid_torch  # noqa: E402  # needs torch
from lucid_testing.models import bags  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("translations"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ROWS, DIM = 10, 8
SUM, MEAN, NONE = 0, 1, 2


class SparseType(enum.Enum):
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"


class IntNBitTableBatchedEmbeddingBagsCodegen(torch.nn.Module):
    """FBGEMM's name, and the attributes and the method by which it tells of its tables."""

    def __init__(self, kinds: list[SparseType], features: list[int], mode: int = SUM, result: int = 0) -> None:
        super().__init__()
        self.embedding_specs = [(f"t{k}", ROWS, DIM, kind, None) for k, kind in enumerate(kinds)]
        self.feature_table_map = features
        self.pooling_mode, self.output_dtype = mode, result
        rng = torch.Generator().manual_seed(0)
        self.values = [
            torch.randint(0, 256, (ROWS, DIM if kind is SparseType.INT8 else DIM // 2), generator=rng).to(torch.uint8)
            for kind in kinds
        ]
        # Numbers that float16 has, as 4-bit rows keep theirs in it.
        self.scales = [torch.randint(1, 9, (ROWS, 1), generator=rng) / 64 for _ in kinds]
        self.biases = [torch.randint(-8, 9, (ROWS, 1), generator=rng) / 8 for _ in kinds]

    def split_embedding_weights_with_scale_bias(self, split_scale_bias_mode: int) -> list[Any]:
        assert split_scale_bias_mode == 2
        return list(zip(self.values, self.scales, self.biases, strict=True))

    def table(self, k: int) -> torch.Tensor:
        values = self.values[k]
        if self.embedding_specs[k][3] is SparseType.INT4:
            values = torch.stack([values & 15, values >> 4], 2).reshape(ROWS, DIM)
        return values * self.scales[k] + self.biases[k]

    def forward(self, indices: Any, offsets: Any, per_sample_weights: Any = None) -> torch.Tensor:
        num_bags = (len(offsets) - 1) // len(self.feature_table_map)
        pooled = []
        for feature, k in enumerate(self.feature_table_map):
            rows = self.table(k)[indices]
            rows = rows if per_sample_weights is None else rows * per_sample_weights[:, None]
            edges = offsets[feature * num_bags : (feature + 1) * num_bags + 1].tolist()
            sums = [rows[a:b].sum(0) for a, b in itertools.pairwise(edges)]
            lengths = [max(b - a, 1) if self.pooling_mode == MEAN else 1 for a, b in itertools.pairwise(edges)]
            pooled.append(torch.stack([s / n for s, n in zip(sums, lengths, strict=True)]))
        return torch.cat(pooled, 1).to(torch.float16 if self.output_dtype else torch.float32)


class Model(torch.nn.Module):
    """The tables in a list that torch does not look into, as torchrec has them."""

    def __init__(self, tables: IntNBitTableBatchedEmbeddingBagsCodegen) -> None:
        super().__init__()
        self.lookups = [SimpleNamespace(), tables]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.lookups[1](*inputs) * 2


def call(features: int, lengths: list[int], *, weighted: bool, seed: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum(lengths * features)])
    indices = torch.randint(0, ROWS, (int(offsets[-1]),), generator=rng)
    weights = (torch.rand(len(indices), generator=rng),) if weighted else ()
    return indices, offsets, *weights


@pytest.mark.parametrize(
    ("kinds", "features", "mode", "weighted", "result"),
    [
        ([SparseType.INT8], [0], SUM, False, 0),
        ([SparseType.INT8, SparseType.INT4], [0, 1, 0], SUM, True, 1),
        ([SparseType.INT4, SparseType.INT4], [1, 0], MEAN, False, 0),
    ],
    ids=["int8", "shared", "mean"],
)
def test_batched_tables_are_exported(
    tmp_path: Path, kinds: list[SparseType], features: list[int], mode: int, weighted: bool, result: int
) -> None:
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(kinds, features, mode, result)
    model = Model(tables).eval()
    example = call(len(features), [2, 3, 1], weighted=weighted, seed=0)
    names = ["indices", "offsets", "weights"][: len(example)]
    n, edges = torch.export.Dim("n"), torch.export.Dim("edges")
    shapes = tuple({0: d} for d in (n, edges, n)[: len(example)])
    if len(features) > 1:  # of which each has as many bags as any other
        shapes = (shapes[0], None, *shapes[2:])
    path = tmp_path / "tables.onnx"
    lucid_torch.export(model, example, path, input_names=names, dynamic_shapes=(shapes,))
    assert "forward" not in vars(tables)
    exported = lucid_onnx.fuse(path).model
    found = bags(exported)
    assert len(found) == len(features)
    assert all(node.op_type.startswith("QuantizedEmbeddingBag") for node in found)
    session = lucid_onnx.InferenceSession(path)
    for seed, lengths in enumerate(([2, 3, 1], [0, 4, 0], [0, 0, 0])):
        given = call(len(features), lengths, weighted=weighted, seed=seed)
        (got,) = session.run(None, {k: v.numpy() for k, v in zip(names, given, strict=True)})
        expected = model(*given).numpy()
        assert got.dtype == expected.dtype
        tolerance = 2**-9 if result else 1e-5  # of sums of float32, and of float16 at the end
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": [SparseType.INT2]}, "has a table of int2; expected fp32, fp16, int8 or int4"),
        ({"mode": NONE}, "does not pool its rows; expected a sum or a mean"),
        ({"result": 5}, "gives results of another type than float32 and float16"),
        ({"pruned": True}, "reads other rows than the indices say, since some were pruned"),
    ],
    ids=["type", "mode", "result", "pruned"],
)
def test_what_is_not_a_bag_is_rejected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings = {"kinds": [SparseType.INT8], "features": [0], **change}
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(**{k: v for k, v in settings.items() if k != "pruned"})
    if "pruned" in change:
        tables.index_remappings_array = torch.tensor([3, -1])
    path = tmp_path / "tables.onnx"
    with pytest.raises(Exception, match=message):
        lucid_torch.export(Model(tables), call(1, [2, 3], weighted=False, seed=0), path)
    assert "forward" not in vars(tables)
    assert not path.exists()
