"""EmbeddingBagCollection: the bags of several tables, beside each other in one output. Start at :mod:`.spec`."""

from . import cases, lowering, reference, spec

__all__ = ["cases", "lowering", "reference", "spec"]
