"""Known differences: the cells that each explains, and those that did not occur."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable

from .report import Cell, Unseen


@dataclasses.dataclass(frozen=True)
class Known:
    """A known difference: a sentence, and the cells that it explains.

    Attributes:
        runtimes, jobs: patterns of `fnmatch`.
        status: of the cell.
        kinds: of its difference; empty for any.
        note: what its note contains.
        forms: empty for any.
        margin: the largest difference that it explains, in tolerances.
        whole_form: if one cell of a form ends so, all do, and the others are not tried.
        witness: a job in which it always occurs. If that job is equal, the difference is gone. Empty if there is none.
        chance: even the witness is equal in some runs or on some CPUs, so that it may be unseen and not gone.
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
    witness: str = ""
    chance: bool = False


_FLOAT64_OPENVINO = "OpenVINO computes float64 in float32: every value of the result is a float32."

KNOWN: tuple[Known, ...] = (
    # PyTorch.
    Known(
        "torch",
        "max_nan_inf",
        "differs",
        "torch's maximum keeps a NaN only in a bag's first row: a later one loses against every number.",
        ("NaN",),
        witness="max_nan_inf",
    ),
    Known(
        "torch",
        "int8_*mean*",
        "differs",
        "torch's quantised EmbeddingBag sums, whatever its mode is.",
        ("value",),
        witness="int8_zero_point_mean_rows_float16",
    ),
    Known(
        "torch",
        "max_norm_*mean*16",
        "differs",
        "torch writes the clipped rows back into the 16-bit table before it pools them, and rounds a mean twice.",
        ("value",),
        margin=20,
        witness="max_norm_p2_0_mean_float16",
    ),
    Known(
        "torch",
        "*mean*16",
        "differs",
        "torch rounds the sum to 16 bits, divides, and rounds again.",
        ("value",),
        margin=5,
        witness="mean_ragged_float16",
    ),
    Known(
        "torch",
        "max_norm_*16",
        "differs",
        "torch writes the clipped rows back into the 16-bit table before it pools them.",
        ("value",),
        margin=20,
        witness="max_norm_p2_0_sum_float16",
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
        witness="mean_slack_after_last_offset",
    ),
    Known(
        "torch",
        "*_slack_after_last_offset",
        "refused",
        "torch's maximum reads the positions after the last offset (pytorch#191965).",
        witness="max_slack_after_last_offset",
    ),
    Known(
        "torch",
        "*_one_bag_of_*",
        "differs",
        "torch adds one row after another in float32: the error grows with the length of the bag.",
        ("value",),
        margin=10,
        witness="sum_one_bag_of_1000",
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
        witness="sum_rows_3x0",
    ),
    Known(
        "torch",
        "*no_columns",
        "refused",
        "torch cannot compute the infinity norm of a row without columns.",
        witness="max_norm_inf_no_columns",
    ),
    Known(
        "torch",
        "grad_weights_dense_*",
        "differs",
        "torch divides by the frequency of another row under scale_grad_by_freq (pytorch#190063).",
        ("value",),
        witness="grad_weights_dense_float32",
    ),
    Known(
        "torch",
        "grad_max_*",
        "refused",
        "torch has no scale_grad_by_freq for maxima.",
        note="max mode does not support scaling the gradient by the frequency",
        witness="grad_max_sparse_ends_everything_float32",
    ),
    *(
        Known(
            "torch",
            "int4_*",
            status,
            "torch's quantised EmbeddingBag of 4 bits reads rows of an odd number of columns as if they had one more, "
            "past the end of the table.",
            ("shape",),
            witness="int4_bias_max_ragged_float32",
        )
        for status in ("differs", "unsteady")
    ),
    Known(
        "torch",
        "uint4_*_ends_*",
        "refused",
        "torch's quantised EmbeddingBag of 4 bits takes no positions after the last offset.",
        note="the last offset value should be the size of the indices",
        witness="uint4_zero_point_weights_ends_float32",
    ),
    # ONNX Runtime.
    *(
        Known(
            runtime,
            job,
            status,
            "ONNX Runtime's ScatterND adds to one target, or takes the maximum there, from several threads without a "
            "lock (onnxruntime#18048).",
            ("value",),
            witness=job,
            chance=True,
        )
        for runtime in ("onnxruntime", "onnxruntime-node", "web-wasm-4")
        for job in ("operator_scatter_nd_add", "operator_scatter_nd_max")
        for status in ("unsteady", "differs")
    ),
    *(
        Known(
            runtime,
            "operator_reduce_max_nan",
            "differs",
            "Its ReduceMax ignores NaN; the lowering of bags looks for NaN itself.",
            ("NaN",),
            witness="operator_reduce_max_nan",
        )
        for runtime in ("onnxruntime*", "web-*", "openvino", "tinygrad")
    ),
    *(
        Known(
            runtime,
            f"operator_scatter_nd_add_{dtype}",
            "refused",
            f"ONNX Runtime's ScatterND does not add {dtype} on the CPU.",
            note="ScatterND",
            witness=f"operator_scatter_nd_add_{dtype}",
        )
        for runtime in ("onnxruntime", "onnxruntime-node", "web-wasm-*")
        for dtype in ("float16", "bfloat16")
    ),
    *(
        Known(
            runtime,
            "function_overload",
            "differs",
            "ONNX Runtime before 1.27 ignores overloads: of functions of one name the last wins.",
            ("value",),
            witness="function_overload",
        )
        for runtime in ("onnxruntime", "onnxruntime-node", "web-wasm-*", "web-webgpu")
    ),
    *(
        Known(
            runtime,
            "function_fewer_outputs",
            status,
            sentence,
            note=note,
            witness="function_fewer_outputs",
        )
        for runtime in ("onnxruntime", "onnxruntime-node", "web-wasm-*", "web-webgpu")
        for status, sentence, note in (
            ("crashed", "ONNX Runtime before 1.30 crashes over a function with more outputs than its node.", ""),
            ("refused", "ONNX Runtime needs all of a function's outputs on its node.", "node has 1 outputs"),
        )
    ),
    Known(
        "onnxruntime",
        "function_overload",
        "refused",
        "ONNX Runtime before 1.18 cannot read models of IR version 10, which has overloads.",
        note="IR version",
        witness="function_overload",
    ),
    *(
        Known(
            runtime,
            "*bfloat16",
            "refused",
            "ONNX Runtime's tensors in JavaScript have no bfloat16.",
            note="data type: 16",
            witness="operator_scatter_nd_add_bfloat16",
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
        "operator_scatter_nd_add_bfloat16",
        "refused",
        "onnxruntime-web has no ScatterND of bfloat16 for WebGPU.",
        note="Provider type for ScatterND node",
        witness="operator_scatter_nd_add_bfloat16",
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
        "This GPU, or its emulation, has no shader-f16.",
        note="requires f16 but the device does not support it",
    ),
    Known(
        "web-webgpu",
        "*",
        "refused",
        "onnxruntime-web's ScatterND for WebGPU fails over updates without columns.",
        note="createBindGroup",
    ),
    Known(
        "web-webgpu",
        "operator_scatter_nd_add_float16",
        "refused",
        "onnxruntime-web's ScatterND for WebGPU does not add float16.",
        note="Reduction is not supported",
        witness="operator_scatter_nd_add_float16",
    ),
    Known(
        "web-webgpu",
        "max_*",
        "refused",
        "onnxruntime-web's ReduceMax for WebGPU rejects an empty tensor.",
        note="reduction_ops.h",
    ),
    # Others.
    *(
        Known(
            runtime,
            "*",
            "refused",
            "It does not support model-local functions: use the standard form.",
            forms=("portable",),
            note=note,
            whole_form=True,
            witness="sum_ragged_float32",
        )
        for runtime, note in (
            ("openvino", "ai.lucid."),
            ("tinygrad", "'ai.lucid' is not a valid Domain"),
            ("iree", "onnx.EmbeddingBag"),
            ("iree", "onnx.Quantized"),
        )
    ),
    *(
        Known(
            runtime,
            "function_*",
            "refused",
            "It does not support model-local functions: use the standard form.",
            forms=("given",),
            note=note,
            witness="function_default",
        )
        for runtime, note in (
            ("openvino", "local."),
            ("tinygrad", "'local' is not a valid Domain"),
            ("iree", "onnx."),
            ("iree", "(op_type:Both)"),
        )
    ),
    Known(
        "onnx-reference",
        "function_default",
        "refused",
        "onnx.reference ignores the defaults of a function's attributes.",
        note="has linked attributes but None are given",
        witness="function_default",
    ),
    Known(
        "onnx-reference",
        "function_overload",
        "differs",
        "onnx.reference ignores overloads: of functions of one name the last wins.",
        ("value",),
        witness="function_overload",
    ),
    Known("openvino", "weights_nan_at_padding", "differs", _FLOAT64_OPENVINO, ("value",), margin=1e6),
    Known(
        "openvino",
        "*float64",
        "differs",
        _FLOAT64_OPENVINO,
        ("value",),
        margin=1e6,
        witness="sum_ragged_float64",
    ),
    Known(
        "openvino",
        "max_nan_inf",
        "differs",
        "OpenVINO's ReduceMax returns -FLT_MAX where all values are -inf.",
        ("infinity",),
        witness="max_nan_inf",
    ),
    Known(
        "openvino",
        "*bfloat16",
        "differs",
        "OpenVINO computes in bfloat16 where the CPU can: squares, norms, the factors of clipped rows, the rows that "
        "are added, sums and 1 / count are each rounded.",
        ("value",),
        margin=300,
        witness="mean_ragged_bfloat16",
        chance=True,
    ),
    Known(
        "tinygrad",
        "*",
        "refused",
        "tinygrad's ScatterND fails over no updates at all, which a lowered bag has in its later iterations.",
        note="size mismatch, can't reshape ((0, ",
        witness="operator_scatter_nd_nothing",
    ),
    Known(
        "tinygrad",
        "operator_scatter_nd_[am]??",
        "hung",
        "tinygrad's ScatterND updates the whole tensor for each index, one after another: 100 take it half a minute.",
        witness="operator_scatter_nd_add",
    ),
    Known(
        "tinygrad",
        "*bfloat16",
        "refused",
        "tinygrad writes C with __bf16 in it, which the installed clang does not compile.",
        note="'clang'",
    ),
    Known(
        "iree",
        "operator_non_zero_and_not",
        "differs",
        "IREE returns wrong positions where a graph has NonZero of flags and of their opposites.",
        ("value",),
        witness="operator_non_zero_and_not",
    ),
    Known(
        "iree",
        "*",
        "refused",
        "IREE turns float64 into float32 by default, and then finds half of the bytes.",
        note="exceeds backing buffer byte length",
    ),
)


def why(cell: Cell) -> str:
    """The sentence that explains a cell; empty if there is none."""
    known = find(cell)
    return "" if known is None else known.sentence


def find(cell: Cell) -> Known | None:
    """The known difference that a cell shows; None if there is none."""
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


def unseen(cells: Iterable[Cell]) -> list[Unseen]:
    """The known differences of the available runtimes that did not occur: the witness is equal, and no cell has it."""
    cells = list(cells)
    shown = {(cell.runtime, cell.why) for cell in cells}
    found: dict[tuple[str, str], Unseen] = {}
    for known in KNOWN:
        for cell in cells:
            key = cell.runtime, known.sentence
            if (
                cell.status == "equal"
                and cell.job == known.witness
                and fnmatch.fnmatchcase(cell.runtime, known.runtimes)
                and (not known.forms or cell.form in known.forms)
                and key not in shown
            ):
                found[key] = Unseen(cell.runtime, known.sentence, cell.job, not known.chance)
    return list(found.values())
