"""The facts behind ``lucid-onnx info``: what is installed, what a model holds, and where its tables would lie."""

from __future__ import annotations

from .installation import FORCE_ISA, CudaLibrary, Installation, Isa, Library, installation, library, version
from .model_info import DataFile, Model, Node, Value, inputs, model, opset, outputs
from .table_memory import TableMemory, TablePlace, table_memory

__all__ = [
    "FORCE_ISA",
    "CudaLibrary",
    "DataFile",
    "Installation",
    "Isa",
    "Library",
    "Model",
    "Node",
    "TableMemory",
    "TablePlace",
    "Value",
    "inputs",
    "installation",
    "library",
    "model",
    "opset",
    "outputs",
    "table_memory",
    "version",
]
