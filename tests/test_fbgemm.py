"""FBGEMM's weighted means, where it is installed: `nox -s fbgemm`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_testing.kernels import needs_library

torch: Any = pytest.importorskip("torch")
training: Any = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")


@needs_library
@pytest.mark.parametrize("form", ["native", "standard"])
@pytest.mark.parametrize("dim", [8, 64])
def test_a_weighted_mean_divides_by_the_count(form: Any, dim: int) -> None:
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    random = np.random.RandomState(dim)
    lengths = [3, 0, 1, 70, 5, 20]
    bounds = np.cumsum([0, *lengths])
    indices = random.randint(0, 50, bounds[-1])
    weights = random.standard_normal(len(indices)).astype(np.float32)
    bags = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(50, dim, EmbeddingLocation.HOST, training.ComputeDevice.CPU)], pooling_mode=PoolingMode.MEAN
    )
    table = random.standard_normal((50, dim)).astype(np.float32)
    bags.split_embedding_weights()[0].data.copy_(torch.from_numpy(table))
    with torch.no_grad():
        theirs = bags(torch.from_numpy(indices), torch.from_numpy(bounds), torch.from_numpy(weights)).numpy()
    ours = lucid_onnx.embedding_bag(
        *(indices, table, bounds),
        mode="mean",
        divisor="count",
        per_sample_weights=weights,
        include_last_offset=True,
        form=form,
        native=form == "native",
    )
    size = [
        np.abs(table[indices[a:b]] * weights[a:b, None]).sum(axis=0) / max(1, b - a)
        for a, b in itertools.pairwise(bounds)
    ]
    assert (np.abs(ours - theirs) <= 2e-6 * np.array(size)).all()
