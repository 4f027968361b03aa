"""Common parts of the benchmarks: the command line, sessions whose threads do not spin, and the report."""

from __future__ import annotations

import argparse
import io
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto

from interleave import compare

BATCHES = 31  #: 325 MB of rows at the default size: more than the caches hold, and coprime to the number of sides


def shape_parser(description: str | None) -> argparse.ArgumentParser:
    """--rows, --dim, --bags, --length, --turns and --threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("dim", 64), ("bags", 2048), ("length", 20), ("turns", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    return parser


def quiet_torch() -> None:
    """Turn off torch's warnings and the spinning of its threads. Call it before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.disable(logging.WARNING)


def options(threads: int) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    # Threads that spin while they wait would occupy the cores during the other side's turn.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 4
    return settings


def binding(
    session: Any, feeds: list[dict[str, np.ndarray]], shape: tuple[int, int], dtype: npt.DTypeLike = np.float32
) -> Callable[[int], np.ndarray]:
    """A call that runs with inputs and an output, of this shape and dtype, that are bound beforehand."""
    output = np.empty(shape, dtype)
    if output.dtype.name == "bfloat16":
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(output.view(np.uint16), TensorProto.BFLOAT16)
    else:
        value = ort.OrtValue.ortvalue_from_numpy(output)
    bound = []
    for feed in feeds:
        io_binding = session.io_binding()
        for name, array in feed.items():
            io_binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        io_binding.bind_ortvalue_output("output", value)
        bound.append(io_binding)

    def call(batch: int) -> np.ndarray:
        session.run_with_iobinding(bound[batch])
        return output

    return call


def exported(module: object, arguments: tuple[object, ...], *, dynamo: bool = True) -> bytes:
    """torch.onnx.export of the module, with its loop over bags."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(module, arguments, dynamo=True, verbose=False).save(buffer)  # type: ignore[arg-type,union-attr]
        else:
            torch.onnx.export(module, arguments, buffer, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    return buffer.getvalue()


def report(title: str, sides: dict[str, Callable[[int], np.ndarray]], turns: int) -> None:
    print(title)
    for name, timing in compare(sides, batches=BATCHES, turns=turns).items():
        print(f"  {name:24s} {timing}")
