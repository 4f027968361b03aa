"""What is known about cells that are not equal: one sentence each."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .matrix import Cell


@dataclasses.dataclass(frozen=True)
class Known:
    """A sentence and the cells that it explains.

    Attributes:
        runtimes, jobs: patterns of `fnmatch`.
        status: of the cell.
        kinds: of its difference; empty for any.
        note: what its note contains.
        forms: empty for any.
        whole_form: where one cell of a form ends so, all do, and the others are not tried.
    """

    runtimes: str
    jobs: str
    status: str
    sentence: str
    kinds: tuple[str, ...] = ()
    note: str = ""
    forms: tuple[str, ...] = ()
    whole_form: bool = False


KNOWN: tuple[Known, ...] = (
    # PyTorch.
    Known(
        "torch",
        "max_nan_inf",
        "differs",
        "torch's maximum keeps a NaN only in a bag's first row: one further on loses against every number.",
        ("NaN",),
    ),
    Known(
        "torch",
        "*mean*16",
        "differs",
        "torch rounds the sum to 16 bits, divides, and rounds again.",
        ("value",),
    ),
    Known(
        "torch",
        "max_norm_*16",
        "differs",
        "torch writes the clipped rows back into the 16-bit table before it pools them.",
        ("value",),
    ),
    Known(
        "torch",
        "everything_*16",
        "differs",
        "torch writes the clipped rows back into the 16-bit table before it pools them.",
        ("value",),
    ),
    Known(
        "torch",
        "*_slack_after_last_offset",
        "differs",
        "torch counts the positions after the last offset when it divides the last bag (pytorch#191965).",
        ("value",),
    ),
    Known(
        "torch",
        "*_slack_after_last_offset",
        "refused",
        "torch's maximum reads the positions after the last offset (pytorch#191965).",
    ),
    Known(
        "torch",
        "*_one_bag_of_*",
        "differs",
        "torch adds one row after another in float32: the error grows with the length of the bag.",
        ("value",),
    ),
    Known(
        "torch",
        "*_long_among_short",
        "differs",
        "torch adds one row after another in float32: the error grows with the length of the bag.",
        ("value",),
    ),
    Known(
        "torch",
        "*",
        "refused",
        "torch cannot make the offsets of bags [B, 0]: it asks arange for steps of 0.",
        note="step must be nonzero",
    ),
    Known("torch", "*no_columns", "refused", "torch has no largest magnitude of a row without columns."),
    # ONNX Runtime.
    Known(
        "onnxruntime*",
        "operator_scatter_nd_add",
        "unsteady",
        "ONNX Runtime's ScatterND adds to one target from several threads without a lock (onnxruntime#18048).",
    ),
    Known(
        "onnxruntime*",
        "operator_scatter_nd_add",
        "differs",
        "ONNX Runtime's ScatterND adds to one target from several threads without a lock (onnxruntime#18048).",
    ),
    Known(
        "web-wasm-4",
        "operator_scatter_nd_add",
        "unsteady",
        "ONNX Runtime's ScatterND adds to one target from several threads without a lock (onnxruntime#18048).",
    ),
    Known(
        "web-wasm-4",
        "operator_scatter_nd_add",
        "differs",
        "ONNX Runtime's ScatterND adds to one target from several threads without a lock (onnxruntime#18048).",
    ),
    *(
        Known(
            runtime,
            "operator_reduce_max_nan",
            "differs",
            "Its ReduceMax passes over NaN; the lowering of bags looks for NaN itself.",
            ("NaN",),
        )
        for runtime in ("onnxruntime*", "web-*", "openvino", "tinygrad")
    ),
    *(
        Known(
            runtime,
            "*bfloat16",
            "refused",
            "ONNX Runtime's tensors of JavaScript have no bfloat16.",
            note="data type: 16",
        )
        for runtime in ("onnxruntime-node", "web-*")
    ),
    Known(
        "web-webgpu",
        "*",
        "refused",
        "ONNX Runtime Web makes no WebGPU session of this form: it leaves a Cast without a provider.",
        forms=("portable",),
        note="transformer_memcpy",
    ),
    Known(
        "web-webgpu",
        "*_no_columns",
        "refused",
        "onnxruntime-web's createBindGroup has no buffer for a tensor without elements here.",
        note="createBindGroup",
    ),
    # Others.
    *(
        Known(
            runtime,
            "*",
            "refused",
            "It knows no model-local functions: give it the standard form.",
            forms=("portable",),
            note=note,
        )
        for runtime, note in (
            ("openvino", "ai.lucid.EmbeddingBag"),
            ("openvino", "ai.lucid.Quantized"),
            ("tinygrad", "'ai.lucid' is not a valid Domain"),
            ("iree", "onnx.EmbeddingBag"),
            ("iree", "onnx.Quantized"),
        )
    ),
    Known("openvino", "weights_nan_at_padding", "differs", "OpenVINO computes float64 in float32.", ("value",)),
    Known("openvino", "*float64", "differs", "OpenVINO computes float64 in float32.", ("value",)),
    Known("openvino", "max_nan_inf", "differs", "OpenVINO gives -FLT_MAX where the maximum is -inf.", ("infinity",)),
    Known(
        "tinygrad",
        "*",
        "refused",
        "tinygrad's Range gives int32 for int64, which its ScatterElements then refuses.",
        note="expect self.dtype=dtypes.long to be equal to src.dtype=dtypes.int",
    ),
)


def why(cell: Cell) -> str:
    """The sentence that explains a cell; empty if there is none, or nothing to explain."""
    known = find(cell)
    return "" if known is None else known.sentence


def find(cell: Cell) -> Known | None:
    """What is known of a cell; None if that is nothing."""
    for known in KNOWN:
        if (
            cell.status == known.status
            and fnmatch.fnmatchcase(cell.runtime, known.runtimes)
            and fnmatch.fnmatchcase(cell.job, known.jobs)
            and (not known.forms or cell.form in known.forms)
            and (not known.kinds or (cell.difference is not None and cell.difference.kind in known.kinds))
            and known.note in cell.note
        ):
            return known
    return None
