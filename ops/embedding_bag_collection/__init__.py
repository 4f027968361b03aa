"""EmbeddingBagCollection: the bags of several tables, concatenated in one output. Start at :mod:`.spec`."""

from . import cases, lowering, reference, spec

__all__ = ["cases", "lowering", "reference", "spec"]
