"""QuantizedEmbeddingBag: `embedding_bag` over a quantized table. Start at :mod:`.spec`."""

from . import cases, lowering, reference, spec

__all__ = ["cases", "lowering", "reference", "spec"]
