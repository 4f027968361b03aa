"""What is known about cells that are not equal: one sentence each."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
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
        margin: the largest difference that it explains, in tolerances.
        whole_form: where one cell of a form ends so, all do, and the others are not tried.
    """

    runtimes: str
    jobs: str
    status: str
    sentence: str
    kinds: tuple[str, ...] = ()
    note: str = ""
    forms: tuple[str, ...] = ()
    margin: float = math.inf
    whole_form: bool = False


_FLOAT64_OPENVINO = "OpenVINO computes float64 in float32: every number of the result is one."

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
        margin=5,
    ),
    Known(
        "torch",
        "max_norm_*16",
        "differs",
        "torch writes the clipped rows back into the 16-bit table before it pools them.",
        ("value",),
        margin=20,
    ),
    Known(
        "torch",
        "everything_*16",
        "differs",
        "torch writes the clipped rows back into the 16-bit table before it pools them.",
        ("value",),
        margin=20,
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
        margin=10,
    ),
    Known(
        "torch",
        "*_long_among_short",
        "differs",
        "torch adds one row after another in float32: the error grows with the length of the bag.",
        ("value",),
        margin=10,
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
    Known(
        "onnxruntime*",
        "operator_scatter_nd_add_float16",
        "refused",
        "ONNX Runtime's ScatterND adds no float16 on the CPU.",
        note="ScatterND",
    ),
    Known(
        "web-wasm-*",
        "operator_scatter_nd_add_float16",
        "refused",
        "ONNX Runtime's ScatterND adds no float16 on the CPU.",
        note="ScatterND",
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
        "onnxruntime-web has no Cast to float64 for WebGPU, and the function's body has one for max_norm.",
        forms=("portable",),
        note="Provider type for Cast node",
        whole_form=True,
    ),
    Known(
        "web-webgpu",
        "*bfloat16",
        "refused",
        "onnxruntime-web has no Cast to or from bfloat16 for WebGPU.",
        note="Provider type for Cast node",
    ),
    Known(
        "web-webgpu",
        "*",
        "refused",
        "onnxruntime-web has no Cast to float64 for WebGPU, which max_norm and float64 tables need.",
        note="Provider type for Cast node",
    ),
    Known(
        "web-webgpu",
        "*",
        "refused",
        "This GPU, or what stands in for one, has no shader-f16.",
        note="requires f16 but the device does not support it",
    ),
    Known(
        "web-webgpu",
        "*",
        "refused",
        "onnxruntime-web's ScatterND for WebGPU fails over updates without elements.",
        note="createBindGroup",
    ),
    Known(
        "web-webgpu",
        "operator_scatter_nd_add_float16",
        "refused",
        "onnxruntime-web's ScatterND for WebGPU adds no float16.",
        note="Reduction is not supported",
    ),
    Known(
        "web-webgpu",
        "max_*",
        "refused",
        "onnxruntime-web's ReduceMax for WebGPU refuses a tensor without elements.",
        note="reduction_ops.h",
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
            whole_form=True,
        )
        for runtime, note in (
            ("openvino", "ai.lucid."),
            ("tinygrad", "'ai.lucid' is not a valid Domain"),
            ("iree", "onnx.EmbeddingBag"),
            ("iree", "onnx.Quantized"),
        )
    ),
    Known("openvino", "weights_nan_at_padding", "differs", _FLOAT64_OPENVINO, ("value",), margin=1e6),
    Known("openvino", "*float64", "differs", _FLOAT64_OPENVINO, ("value",), margin=1e6),
    Known(
        "openvino", "max_nan_inf", "differs", "OpenVINO's ReduceMax gives -FLT_MAX where all is -inf.", ("infinity",)
    ),
    Known(
        "openvino",
        "*bfloat16",
        "differs",
        "OpenVINO computes in bfloat16 where the CPU can: products are rounded before they are added, sums before "
        "they are divided.",
        ("value",),
        margin=1000,
    ),
    Known(
        "tinygrad",
        "*",
        "refused",
        "tinygrad's Range gives int32 for int64, which its ScatterElements then refuses.",
        note="expect self.dtype=dtypes.long to be equal to src.dtype=dtypes.int",
    ),
    *(
        Known(
            "tinygrad",
            jobs,
            "hung",
            "tinygrad's ScatterND compares every index with every position, which takes it minutes to simplify here.",
        )
        for jobs in ("*_long_among_short", "*_three_rounds", "scale_*", "operator_scatter_nd_add")
    ),
    *(
        Known(
            "iree",
            "*",
            "differs",
            "IREE finds wrong positions where a graph asks NonZero of flags and of their opposites, as a lowered bag "
            "does over its blocks.",
            (kind,),
            forms=("standard",),
        )
        for kind in ("value", "NaN", "infinity")
    ),
    Known(
        "iree",
        "operator_non_zero_and_not",
        "differs",
        "IREE finds wrong positions where a graph asks NonZero of flags and of their opposites.",
        ("value",),
    ),
    Known(
        "iree",
        "*",
        "refused",
        "IREE makes float32 of float64 unless it is told not to, and then finds half of the bytes.",
        note="exceeds backing buffer byte length",
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
            and (cell.difference is None or cell.difference.margin <= known.margin)
        ):
            return known
    return None
