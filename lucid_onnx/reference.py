"""The NumPy reference of every operator, under its call's name."""

from .ops.embedding_bag.reference import embedding_bag
from .ops.embedding_bag_grad.reference import embedding_bag_grad

__all__ = ["embedding_bag", "embedding_bag_grad"]
