"""The NumPy reference of every operator, under its call's name."""

from .ops.embedding_bag.reference import embedding_bag

__all__ = ["embedding_bag"]
