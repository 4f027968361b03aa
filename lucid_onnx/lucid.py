"""From Lucid: a module by its attributes, or a table of a checkpoint by its key. See `lucid_onnx.sources.lucid`."""

from .sources.lucid import ATTRIBUTES, from_checkpoint, from_module

__all__ = ["ATTRIBUTES", "from_checkpoint", "from_module"]
