"""Quantized tables that FBGEMM reads in one call: those of torchrec.quant's EmbeddingBagCollection.

One operator of FBGEMM's reads every table of a module (`IntNBitTableBatchedEmbeddingBagsCodegen`) from one buffer of
bytes, and torch's exporter knows none of that. While a module is exported, `batched_tables` gives such modules another
``forward``, which calls `lucid_onnx::packed_embedding_bag` for each feature.

FBGEMM is not imported: what it reads is told by the module's own methods.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .placeholders import RejectedError

#: The modules that are read here, by the name of their class.
_CLASSES = frozenset(("IntNBitTableBatchedEmbeddingBagsCodegen",))
_BITS = {"int8": 8, "int4": 4}
_SUM, _MEAN = 0, 1
#: Where a module keeps which rows are left of pruned tables.
_REMAPPED = ("index_remapping_hash_table_cpu", "index_remapping_hash_table", "index_remappings_array")
#: FBGEMM's numbers of types of results.
_RESULTS = {0: torch.float32, 1: torch.float16}


@contextlib.contextmanager
def batched_tables(module: Any) -> Iterator[None]:
    """Make FBGEMM's quantized tables in a module something that torch.export takes; the module is the same again after.

    Raises:
        RejectedError: a table of another type than int8 and int4, or one whose rows are not pooled.
    """
    found = {id(part): part for part in _parts(module) if type(part).__name__ in _CLASSES}
    replaced: list[Any] = []
    try:
        for part in found.values():
            part.__dict__["forward"] = _Lookup(part)
            replaced.append(part)
        yield
    finally:
        for part in replaced:
            del part.__dict__["forward"]


def _parts(module: Any) -> Iterator[torch.nn.Module]:
    """A module and those in it, also in lists that torch does not look into."""
    if not isinstance(module, torch.nn.Module):
        return
    for part in module.modules():
        yield part
        for value in vars(part).values():
            if isinstance(value, list | tuple):
                for inner in value:
                    yield from _parts(inner)


class _Lookup:
    """What such a module computes, by a bag for each feature."""

    def __init__(self, module: Any) -> None:
        name = type(module).__name__
        types = [kind.value for _, _, _, kind, _ in module.embedding_specs]
        unknown = next((kind for kind in types if kind not in _BITS), None)
        if unknown is not None:
            raise RejectedError(f"FBGEMM's {name} has a table of {unknown}; expected int8 or int4")
        self._mode, result = int(module.pooling_mode), int(module.output_dtype)
        if self._mode not in (_SUM, _MEAN):
            raise RejectedError(f"FBGEMM's {name} does not pool its rows; expected a sum or a mean")
        if result not in _RESULTS:
            raise RejectedError(f"FBGEMM's {name} gives results of another type than float32 and float16")
        self._dtype = _RESULTS[result]
        remapped = [getattr(module, name, None) for name in _REMAPPED]
        if any(r is not None and not (isinstance(r, torch.Tensor) and not r.numel()) for r in remapped):
            raise RejectedError(f"FBGEMM's {name} reads other rows than the indices say, since some were pruned")
        self._bits = [_BITS[kind] for kind in types]
        with _disable_current_modes():
            whole = module.split_embedding_weights_with_scale_bias(split_scale_bias_mode=2)
            self._rows = [
                _packed(values, scale, bias, bits)
                for (values, scale, bias), bits in zip(whole, self._bits, strict=True)
            ]
        self._tables = [int(table) for table in module.feature_table_map]

    def __call__(
        self, indices: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        count = len(self._tables)
        num_bags = (offsets.shape[0] - 1) // count
        pooled = []
        for feature, table in enumerate(self._tables):
            mine = offsets[feature * num_bags : (feature + 1) * num_bags + 1]
            its, weights = indices, per_sample_weights
            if count > 1:
                begin, end = mine[0].item(), mine[-1].item()
                torch._check(begin >= 0)
                torch._check(end >= begin)
                torch._check(end <= indices.shape[0])
                its = indices[begin:end]
                weights = None if weights is None else weights[begin:end]
            starts = mine - mine[0]
            rows = torch.ops.lucid_onnx.packed_embedding_bag(
                self._rows[table], its, starts, weights, self._bits[table], True
            )
            if self._mode == _MEAN:
                rows = rows / (mine[1:] - mine[:-1]).clamp(min=1).unsqueeze(1)
            pooled.append(rows)
        return torch.cat(pooled, 1).to(self._dtype)


def _packed(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows as torch's own operators have them: values, then scale and bias, in float32 behind 8 bits."""
    tail = torch.stack([scale.reshape(-1), bias.reshape(-1)], 1)
    tail = tail.float() if bits == 8 else tail.half()
    return torch.cat([values, tail.view(torch.uint8)], 1).contiguous()
