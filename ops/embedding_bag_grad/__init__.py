"""EmbeddingBagGrad: the gradient of `embedding_bag`. Start at :mod:`.spec`."""

from . import cases, lowering, reference, spec

__all__ = ["cases", "lowering", "reference", "spec"]
