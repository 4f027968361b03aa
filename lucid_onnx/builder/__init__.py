"""Put bags into ONNX models: one bag as a model, or nodes for a graph that somebody else is building.

`models` builds whole models, `nodes` single nodes, `forms` turns a model into another form, `files` writes one, and
`loading` reads one, and `origins` knows where the data of those in memory lies.
"""

from __future__ import annotations

from .dtypes import CODES_TYPES, INDEX_TYPES, TABLE_TYPES, as_dtype, onnx_type
from .files import (
    LARGEST_MESSAGE,
    Replacing,
    Streamed,
    file_region,
    fill_tables,
    save,
    save_beside,
    save_temporarily,
    streamed,
    without_initializers,
)
from .forms import FORMS, Form, check_form, convert, other_function, to_form
from .functions import renamed, restore_names
from .loading import (
    TEXT_ENTRY,
    ExternalData,
    byte_count,
    check_structure,
    data_files,
    functions,
    is_external,
    is_plain_name,
    load,
    location,
    model_files,
    tensors,
    text_file,
)
from .models import (
    build_collection_model,
    build_grad_model,
    build_light_model,
    build_model,
    build_quantized_model,
    op_model,
)
from .nodes import make_collection_node, make_grad_node, make_node, new_node
from .origins import data_of, remember_data

__all__ = [
    "CODES_TYPES",
    "FORMS",
    "INDEX_TYPES",
    "LARGEST_MESSAGE",
    "TABLE_TYPES",
    "TEXT_ENTRY",
    "ExternalData",
    "Form",
    "Replacing",
    "Streamed",
    "as_dtype",
    "build_collection_model",
    "build_grad_model",
    "build_light_model",
    "build_model",
    "build_quantized_model",
    "byte_count",
    "check_form",
    "check_structure",
    "convert",
    "data_files",
    "data_of",
    "file_region",
    "fill_tables",
    "functions",
    "is_external",
    "is_plain_name",
    "load",
    "location",
    "make_collection_node",
    "make_grad_node",
    "make_node",
    "model_files",
    "new_node",
    "onnx_type",
    "op_model",
    "other_function",
    "remember_data",
    "renamed",
    "restore_names",
    "save",
    "save_beside",
    "save_temporarily",
    "streamed",
    "tensors",
    "text_file",
    "to_form",
    "without_initializers",
]
