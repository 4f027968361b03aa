"""The runtimes that can be compared, by name. A new one is a file here and a line in `ENTRIES`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence

from . import javascript

NotHereError = javascript.NotHereError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A runtime as the comparison knows it.

    Attributes:
        name: for ``--runtimes``.
        title: for people.
        forms: which of `lucid_onnx.parity.runtime.FORMS` it is asked to run.
        command: how to start its worker; raises `NotHereError`.
        slow: it starts first, so that the others run at the same time.
        load_timeout, run_timeout: seconds after which it counts as hung.
        sample_size: how many cases of the suite it runs by default, for a runtime that needs hours for all; None: all.
        sample_programs: ``sample_size`` counts programs, each with all of its cases, for one that compiles slowly.
        sample_reason: a clause that says why it is slow.
    """

    name: str
    title: str
    forms: tuple[str, ...]
    command: Callable[[], Sequence[str]]
    slow: bool = False
    load_timeout: float = 120.0
    run_timeout: float = 60.0
    sample_size: int | None = None
    sample_programs: bool = False
    sample_reason: str = ""


#: With "-m" the current folder would come first on the path of modules.
_WORKER = "import sys; sys.path = sys.path[not sys.path[0] :]; import lucid_onnx.parity.worker as w; w.main()"


def python(target: str) -> Callable[[], Sequence[str]]:
    """A worker over an adapter in Python, ``module:attribute``; a module that begins with a dot is one of these."""
    if target.startswith("."):
        target = __name__ + target
    return lambda: [sys.executable, "-c", _WORKER, target]


def _node(kind: str) -> Callable[[], Sequence[str]]:
    return lambda: javascript.command(kind)


# "given" comes first: it is the few single operators. The longest comes last, as a runtime's time may be up before.
_MODELS = ("given", "portable", "standard")
_ALL = (
    Entry("numpy", "NumPy reference", ("call",), python(".numpy_reference:RUNTIME")),
    Entry("onnxruntime-native", "ONNX Runtime, our library", ("native", "portable"), python(".ort:NATIVE")),
    Entry("onnxruntime", "ONNX Runtime", _MODELS, python(".ort:STANDARD")),
    Entry("onnxruntime-cuda-native", "ONNX Runtime CUDA, our library", ("native",), python(".ort:CUDA_NATIVE")),
    Entry("onnxruntime-cuda", "ONNX Runtime CUDA", _MODELS, python(".ort:CUDA")),
    Entry("onnxruntime-node", "ONNX Runtime, Node", _MODELS, _node("node")),
    Entry("web-wasm-1", "ONNX Runtime Web, 1 thread", _MODELS, _node("wasm-1")),
    Entry("web-wasm-4", "ONNX Runtime Web, 4 threads", _MODELS, _node("wasm-4")),
    Entry(
        "web-webgpu",
        "ONNX Runtime Web, WebGPU",
        _MODELS,
        _node("webgpu"),
        run_timeout=45.0,
        slow=True,
        sample_size=100,
        sample_reason="WebGPU without a GPU takes seconds for a run",
    ),
    Entry("onnx-reference", "onnx.reference", _MODELS, python(".onnx_reference:RUNTIME")),
    Entry("torch", "PyTorch, eager", ("call",), python(".torch_eager:RUNTIME")),
    Entry("openvino", "OpenVINO", _MODELS, python(".openvino:RUNTIME"), slow=True),
    Entry(
        "tinygrad",
        "tinygrad",
        _MODELS,
        python(".tinygrad:RUNTIME"),
        slow=True,
        run_timeout=40.0,
        sample_size=12,
        sample_reason="it compiles for seconds for every new size",
    ),
    Entry(
        "iree",
        "IREE",
        _MODELS,
        python(".iree:RUNTIME"),
        slow=True,
        sample_size=12,
        sample_programs=True,
        sample_reason="it compiles each for many seconds",
    ),
)
ENTRIES: Mapping[str, Entry] = {entry.name: entry for entry in _ALL}
