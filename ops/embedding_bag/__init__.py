"""EmbeddingBag: pool rows of a table, bag by bag. Start at :mod:`.spec`."""

from . import cases, lowering, reference, spec

__all__ = ["cases", "lowering", "reference", "spec"]
