"""What came after the first edition: its files still mean the same, and its library rejects what it does not know.

LUCID_FIRST_EDITION names that library, built from the commit before `negative` was added.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops import OPERATORS
from lucid_testing.kernels import arguments, call, needs_library

#: The attributes that the first edition had not.
LATER = ("negative", "divisor")
#: A file of the first edition: the portable form of the case of this name.
FILE, CASE = Path(__file__).parent / "first_edition.onnx", "weights_padding_ends_float32"
BAGS = OPERATORS["embedding_bag"].cases.all_cases()

first_edition = pytest.mark.skipif(
    "LUCID_FIRST_EDITION" not in os.environ, reason="LUCID_FIRST_EDITION names no library of the first edition"
)


def bits(model: onnx.ModelProto, inputs: dict[str, np.ndarray], *, native: bool) -> list[bytes]:
    session = lucid_onnx.InferenceSession(model, native=native)
    return [np.asarray(output).tobytes() for output in session.run(None, inputs)]


@needs_library
@pytest.mark.parametrize("native", [True, False])
def test_a_file_of_the_first_edition_means_the_same(native: bool) -> None:
    model, case = onnx.load(FILE), BAGS[CASE]
    assert not {a.name for node in model.graph.node for a in node.attribute}.intersection(LATER)
    assert not set(LATER).intersection(model.functions[0].attribute)
    expected = bits(case_model(case, "portable"), case.inputs, native=native)
    assert bits(model, case.inputs, native=native) == expected
    assert bits(lucid_onnx.to_form(model, "portable"), case.inputs, native=native) == expected


@needs_library
@pytest.mark.parametrize("name", ["sum_ragged_float32", "mean_rows_int32", "max_ends_float32"])
def test_a_node_of_the_first_edition_means_the_same(name: str) -> None:
    case = BAGS[name]
    model = case_model(case, "native")
    expected = bits(model, case.inputs, native=True)
    (node,) = model.graph.node
    kept = [a for a in node.attribute if a.name not in LATER]
    assert len(kept) == len(node.attribute) - len(LATER)
    del node.attribute[:]
    node.attribute.extend(kept)
    assert bits(model, case.inputs, native=True) == expected
    assert bits(lucid_onnx.to_form(model, "native"), case.inputs, native=True) == expected


@needs_library
def test_a_caller_that_was_compiled_for_the_first_edition_is_rejected() -> None:
    case = BAGS["sum_ragged_float32"]
    output = np.zeros(case.expected().shape, np.float32)
    assert call(arguments(case, output, size_bytes=176)) == (1, "size_bytes = 176 is not 184")
    assert call(arguments(case, output)) == (0, "")


#: A case of each addition to each operator, and what the first library says of it.
UNKNOWN = {
    "embedding_bag": {
        "skip_sum_ragged_float32": r"indices\[0\] = -1 is outside",
        "skip_max_rows_float32": r"indices\[0, 0\] = -1 is outside",
        "skip_mean_padding_ends_float16": "is outside",
        "sqrtn_ragged_float32": "mode = 3 is not 0",
        "mean_count_ragged_float32": "per_sample_weights needs mode 'sum'",
        "mean_weights_rows_float64": "per_sample_weights needs mode 'sum'",
        "sqrtn_weights_ragged_float32": "mode = 3 is not 0",
    },
    "quantized_embedding_bag": {
        "int8_skip_mean": "is outside",
        "uint4_skip_sqrtn": "mode = 3 is not 0",
        "int8_mean_weights": "per_sample_weights needs mode 'sum'",
    },
    "embedding_bag_collection": {
        "collection_packed_skip_sum": "is outside",
        "collection_ragged_skip_sqrtn": "mode = 3 is not 0",
        "collection_rows_mean_count": "per_sample_weights needs mode 'sum'",
    },
    "embedding_bag_grad": {
        "grad_sum_skip_sparse_ragged": "is outside",
        "grad_mean_skip_dense_rows": "is outside",
        "grad_sqrtn_ragged_float32": "mode = 3 is not 0",
        "grad_mean_weights_ragged_float32": "per_sample_weights needs mode 'sum'",
    },
}


@first_edition
@pytest.mark.parametrize("form", ["portable", "native"])
def test_the_first_library_rejects_what_it_does_not_know(form: Any) -> None:
    for operator, names in UNKNOWN.items():
        for name, message in names.items():
            case = OPERATORS[operator].cases.all_cases()[name]
            options = ort.SessionOptions()
            options.register_custom_ops_library(os.environ["LUCID_FIRST_EDITION"])
            model = case_model(case, form).SerializeToString()
            with pytest.raises(Exception, match=message):
                ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, case.inputs)
