"""From Lucid: a module by its attributes, or a table of a checkpoint by its key. See `lucid_onnx.sources.lucid`."""

from .sources.lucid import from_checkpoint, from_module

__all__ = ["from_checkpoint", "from_module"]
