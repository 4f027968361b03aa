"""Where the CUDA kernels run in tests: on a GPU, through the driver, or emulated on the CPU.

The emulation is cuda.cu compiled as plain C++ (cpp_ops/embedding_bag/test/cuda_emulation.h says how), so every test
of the kernels runs where there is no GPU too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_onnx.ops.embedding_bag_collection import cases as collection
from lucid_onnx.ops.embedding_bag_grad import cases as gradients
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized
from lucid_onnx.runtime.library import find_cuda_library
from lucid_testing.driver import Driver
from lucid_testing.kernels import Args, CollectionArgs, GradArgs, arguments, num_bags

ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, Any] = {**cases.all_cases(), **quantized.all_cases()}

_EMULATED_SOURCES = (
    "base/isa.cc",
    "base/pages.cc",
    "base/status.cc",
    "base/table_memory.cc",
    "c_api_cuda.cc",
    "embedding_bag/check.cc",
    "embedding_bag/cuda_plan.cc",
    "embedding_bag/ort_cuda_node.cc",
    "embedding_bag/ort_embedding_bag.cc",
    "embedding_bag/ort_embedding_bag_cuda.cc",
    "embedding_bag_collection/cuda_plan.cc",
    "embedding_bag_collection/ort_embedding_bag_collection.cc",
    "embedding_bag_collection/ort_embedding_bag_collection_cuda.cc",
    "embedding_bag_grad/check.cc",
    "embedding_bag_grad/cuda_plan.cc",
    "embedding_bag_grad/ort_embedding_bag_grad.cc",
    "embedding_bag_grad/ort_embedding_bag_grad_cuda.cc",
    "embedding_bag/test/no_cpu_kernels.cc",
    "ort/adapter.cc",
    "ort/constant_table.cc",
    "ort/session_entries.cc",
    "ort/register.cc",
    "embedding_bag/cuda.cu",
    "embedding_bag_collection/cuda.cu",
    "embedding_bag_grad/cuda.cu",
    "embedding_bag_grad/cuda_sort.cu",
)


def _of(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of one type."""
    return tuple((name, kind) for name in names.split())


class Plan(ctypes.Structure):
    """LucidCudaPlan of cpp_ops/embedding_bag/cuda.h."""

    _fields_ = (
        *_of(
            ctypes.c_int64,
            "size_bytes num_bags padding num_positions vectors chunks bag_chunks blocks column_blocks norm_blocks "
            "check_blocks zeroed_bytes counts_at piece_counts_at partials_at clips_at scratch_bytes",
        ),
        *_of(ctypes.c_int32, "vector_bytes vector_elements block_threads block_vectors block_chunks vector_output"),
    )


class CollectionPlan(ctypes.Structure):
    """LucidCudaCollectionPlan of cpp_ops/embedding_bag_collection/cuda.h."""

    _fields_ = _of(ctypes.c_int64, "size_bytes num_bags columns launches pool_launches zeroed_bytes scratch_bytes")


class GradPlan(ctypes.Structure):
    """LucidCudaGradPlan of cpp_ops/embedding_bag_grad/cuda.h."""

    _fields_ = _of(
        ctypes.c_int64,
        "size_bytes num_bags padding num_positions num_entries row_sort entry_sort row_bags zeroed_bytes scratch_bytes",
    )


ERROR_BYTES = 56  # sizeof(LucidBoundsError)


@functools.cache
def emulated_library() -> str | None:
    """The path of the emulated library; None without a C++ compiler.

    LUCID_EMULATED_LIBRARY names one that was made before; otherwise it is made now, with the compiler's flags in
    LUCID_EMULATION_FLAGS added.
    """
    if made := os.environ.get("LUCID_EMULATED_LIBRARY"):
        return made
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    folder = Path(_folder().name)
    path = folder / "liblucid_onnx_ops_cuda_emulated.so"
    command = [compiler, "-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-Wno-unknown-pragmas", "-DLUCID_EMULATE_CUDA", "-DLUCID_WITH_CUDA", "-DLUCID_CUDA_PROVIDER=nullptr"]
    command += [f"-I{ROOT / 'cpp_ops'}", "-x", "c++", *(str(ROOT / "cpp_ops" / s) for s in _EMULATED_SOURCES)]
    command += ["-o", str(path), "-pthread", *os.environ.get("LUCID_EMULATION_FLAGS", "").split()]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # of a sanitizer, for us alone
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return str(path)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lucid-onnx-cuda")


def load(path: str) -> ctypes.CDLL:
    """A library that has the entry points of c_api_cuda.h."""
    native = ctypes.CDLL(path)
    text = (ctypes.c_char_p, ctypes.c_size_t)
    native.lucid_cuda_device_count.argtypes = text
    native.lucid_cuda_check_device.argtypes = (ctypes.c_int, *text)
    native.lucid_cuda_plan.argtypes = (ctypes.POINTER(Args), ctypes.POINTER(Plan), *text)
    pointer = ctypes.c_void_p
    native.lucid_cuda_embedding_bag.argtypes = (
        ctypes.POINTER(Args), pointer, ctypes.c_int64, pointer, pointer, *text
    )  # fmt: skip
    native.lucid_cuda_plan_collection.argtypes = (
        ctypes.POINTER(CollectionArgs), ctypes.POINTER(CollectionPlan), *text
    )  # fmt: skip
    native.lucid_cuda_embedding_bag_collection.argtypes = (
        ctypes.POINTER(CollectionArgs), pointer, ctypes.c_int64, pointer, pointer, *text
    )  # fmt: skip
    gradient = ctypes.POINTER(GradArgs)
    native.lucid_cuda_plan_grad.argtypes = (gradient, ctypes.POINTER(GradPlan), *text)
    native.lucid_cuda_embedding_bag_grad_entries.argtypes = (gradient, pointer, pointer, pointer, *text)
    native.lucid_cuda_embedding_bag_grad.argtypes = (gradient, pointer, ctypes.c_int64, pointer, pointer, *text)
    native.lucid_cuda_refusal.argtypes = (pointer, *text)
    return native


def leave(device: Any, memory: Any, fill: int) -> None:
    """Fill scratch memory, which a kernel must not read before it writes it.

    With LUCID_CUDA_UNFILLED set it is left as it was allocated: compute-sanitizer's initcheck sees reads of it then.
    """
    if not os.environ.get("LUCID_CUDA_UNFILLED"):
        device.write(memory, fill)


class Emulated:
    """The kernels on the host."""

    name = "emulated"

    def __init__(self, path: str) -> None:
        self.native = load(path)
        self._libc = ctypes.CDLL(None)
        self._libc.posix_memalign.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)

    def allocate(self, size: int, shift: int = 0) -> Any:
        """Memory at a multiple of 256, and `shift` bytes on. It ends where it ends, for AddressSanitizer to see."""
        where = ctypes.c_void_p()
        assert self._libc.posix_memalign(ctypes.byref(where), 256, max(size + shift, 1)) == 0
        memory = np.frombuffer((ctypes.c_uint8 * max(size + shift, 1)).from_address(where.value or 0), np.uint8)
        weakref.finalize(memory, self._libc.free, where)
        return memory[shift : shift + size]

    def address(self, memory: Any) -> int:
        return int(memory.ctypes.data)

    def write(self, memory: Any, data: np.ndarray | int) -> None:
        memory[:] = data

    def read(self, memory: Any) -> np.ndarray:
        return np.array(memory)

    stream = None


class Machine:
    """The numbers of the emulated machine (Machine in cpp_ops/embedding_bag/test/cuda_emulation.h)."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self._native = native
        native.lucid_emulation_get.argtypes = (ctypes.c_char_p,)
        native.lucid_emulation_get.restype = ctypes.c_int64
        native.lucid_emulation_set.argtypes = (ctypes.c_char_p, ctypes.c_int64)

    def __getitem__(self, name: str) -> int:
        number = int(self._native.lucid_emulation_get(name.encode()))
        assert number >= 0, name
        return number

    def __setitem__(self, name: str, value: int) -> None:
        self._native.lucid_emulation_set(name.encode(), value)
        assert self[name] == value

    def choose_device(self, device: int) -> int:
        """Make a device the current one of this thread; the one before."""
        return int(self._native.lucid_emulation_device(device))


class Changing(Emulated):
    """The kernels on the host, whose input arrays another thread writes to while they run."""

    def __init__(self, path: str, contents: Sequence[Sequence[np.ndarray]]) -> None:
        """Of each array the contents that it has in turn, the first of which tells it from other arrays."""
        super().__init__(path)
        self._contents = [[np.frombuffer(c.tobytes(), np.uint8) for c in one] for one in contents]
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def write(self, memory: Any, data: np.ndarray | int) -> None:
        super().write(memory, data)
        for one in self._contents:
            if isinstance(data, np.ndarray) and np.array_equal(data, one[0]):
                self._threads.append(threading.Thread(target=self._change, args=(memory, one)))
                self._threads[-1].start()

    def _change(self, memory: np.ndarray, contents: list[np.ndarray]) -> None:
        for content in itertools.cycle(contents):
            if self._stop.is_set():
                return
            memory[:] = content
            time.sleep(0)  # lets the thread of the test go on

    def __enter__(self) -> Changing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._threads, "no array was one of those to be changed"


class Gpu(Driver):
    """The kernels on a GPU, in memory of the driver's and on a stream of their own."""

    name = "gpu"

    def __init__(self, path: str) -> None:
        super().__init__()
        self.native = load(path)


def emulated() -> Emulated:
    """The emulated kernels; skips without a C++ compiler."""
    path = emulated_library()
    if path is None:
        pytest.skip("there is no C++ compiler to build the emulated kernels with")
    return Emulated(path)


def devices() -> list[str]:
    """Where the kernels run here."""
    return ["emulated", "gpu"] if why_no_gpu() is None else ["emulated"]


def gpu_library() -> str | None:
    """The CUDA library: LUCID_CUDA_LIBRARY's, or the installed one."""
    return os.environ.get("LUCID_CUDA_LIBRARY") or find_cuda_library()


def why_no_gpu() -> str | None:
    """What is missing here to run on a GPU, or None."""
    path = gpu_library()
    if path is None:
        return "lucid_onnx was built without its CUDA library"
    message = ctypes.create_string_buffer(256)
    try:
        native = load(path)
    except AttributeError as error:
        return f"the CUDA library is not the one of these sources: {error}"
    if native.lucid_cuda_check_device(0, message, len(message)):
        return f"no GPU: {message.value.decode()}"
    return None


def host_arguments(case: Any, output: np.ndarray | None = None, **overrides: Any) -> Args:
    """The struct of a case, quantized or not, pointing into the case's arrays."""
    if isinstance(case, cases.Case):
        return arguments(case, output, **overrides)
    second = case.bias if case.bias is not None else case.zero_point
    view = cases.Case(
        case.name,
        np.zeros(case.table.shape, case.scale.dtype),
        case.indices,
        case.offsets,
        case.per_sample_weights,
        spec.Attributes(**case.keywords),
    )
    dtypes = {"int8": 4, "uint8": 5, "int4": 6, "uint4": 7}
    fields = {
        "weight": case.codes.ctypes.data,
        "scale": case.scale.ctypes.data,
        "zero_point": None if case.zero_point is None else second.ctypes.data,
        "bias": None if case.bias is None else second.ctypes.data,
        "dtype": dtypes[case.table.dtype.name],
        "scale_type": int(case.scale.dtype == np.float16),
        "scale_stride": case.scale.itemsize,
    }
    return arguments(view, output, **{**fields, **overrides})


def result_dtype(case: Any) -> np.dtype:
    """The dtype of a case's output: the table's, or of a quantized one its scales'."""
    return case.weight.dtype if isinstance(case, cases.Case) else case.scale.dtype


def _copied(device: Any, array: np.ndarray, shift: int = 0) -> Any:
    """Memory of a device with an array in it, ``shift`` bytes past a multiple of 256."""
    memory = device.allocate(array.nbytes, shift)
    device.write(memory, np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8))
    return memory


def _fenced(device: Any, size: int, shift: int, fill: int) -> Any:
    """Memory for an output of ``size`` bytes with 256 more on either side, all of it ``fill``."""
    memory = device.allocate(size + 512, shift)
    device.write(memory, fill)
    return memory


def _inside(device: Any, memory: Any, fill: int, what: str) -> np.ndarray:
    """The bytes between the fences; asserts that nothing was written outside of them."""
    written = device.read(memory)
    assert (written[:256] == fill).all(), f"{what}: written before the output"
    assert (written[-256:] == fill).all(), f"{what}: written behind the output"
    return written[256:-256]


#: Fields of the struct that point to arrays, and the arrays' names in a case.
_POINTERS = ("weight", "indices", "offsets", "per_sample_weights", "scale", "zero_point", "bias")


def run(
    device: Any, case: Any, *, fill: int = 0xA5, shift: dict[str, int] | None = None, **overrides: Any
) -> tuple[int, str, np.ndarray]:
    """Launch a case: the code and message of the launch or of what the kernel rejected, and the output.

    Asserts that nothing outside of the output was written.

    Args:
        shift: bytes that an array (or "output") lies past a multiple of 256.
    """
    shift = shift or {}
    given = dict(case.inputs)
    if "codes" in given:
        given["weight"] = given.pop("codes")
    kept, addresses = [], {}
    for name, array in given.items():
        kept.append(_copied(device, array, shift.get(name, 0)))
        addresses[name] = device.address(kept[-1]) if array.nbytes else None
    bags = len(case.indices) if case.offsets is None else len(case.offsets) - case.attributes.include_last_offset
    dim = case.weight.shape[1] if isinstance(case, cases.Case) else case.table.shape[1]
    dtype = result_dtype(case)
    size = max(bags, 0) * dim * dtype.itemsize
    memory = _fenced(device, size, shift.get("output", 0), fill)
    addresses["output"] = device.address(memory) + 256
    args = host_arguments(case)
    for name, value in {**dict.fromkeys(_POINTERS), **addresses, **overrides}.items():
        setattr(args, name, value)
    message = ctypes.create_string_buffer(256)
    plan = Plan()
    code = device.native.lucid_cuda_plan(ctypes.byref(args), ctypes.byref(plan), message, len(message))
    nothing = np.empty((0, dim), dtype)
    if code:
        return code, message.value.decode(), nothing
    scratch = device.allocate(plan.scratch_bytes)
    leave(device, scratch, fill)
    error = device.allocate(ERROR_BYTES)
    device.write(error, 0)
    code = device.native.lucid_cuda_embedding_bag(
        ctypes.byref(args), device.address(scratch), plan.scratch_bytes, device.address(error), device.stream,
        message, len(message),
    )  # fmt: skip
    if code:
        return code, message.value.decode(), nothing
    found = device.read(error).tobytes()
    written = _inside(device, memory, fill, case.name)
    code = device.native.lucid_cuda_refusal(found, message, len(message))
    return code, message.value.decode(), written.view(dtype).reshape(max(bags, 0), dim)


def collection_args(tables: Sequence[Args], packed: bool, output: int | None) -> CollectionArgs:
    """The struct of a collection. Keeps its array of tables alive."""
    array = (Args * len(tables))(*tables)
    return CollectionArgs(ctypes.sizeof(CollectionArgs), array, len(tables), output, packed)


def tables_of(case: collection.Case, place: Callable[[np.ndarray], int | None]) -> list[Args]:
    """The structs of a collection's tables; ``place`` puts an array somewhere and says where."""
    call, packed = case.call, case.layout == "packed"
    shared: dict[str, int | None] = {}
    found = []
    for t, table in enumerate(case.tables):
        fields: dict[str, Any] = {"weight": place(table.weight)}
        for name, given in (("indices", "x"), ("offsets", "offsets"), ("per_sample_weights", "per_sample_weights")):
            if call[given] is None:
                continue
            array = call[given] if packed else call[given][t]
            if packed and name not in shared:
                shared[name] = place(array)
            fields[name] = shared[name] if packed else place(array)
            if packed and name == "indices":
                fields["indices_shape"] = (ctypes.c_int64 * 2)(len(array), 0)
            if packed and name == "offsets":
                fields |= {"num_offsets": len(array), "include_last_offset": 1}
        found.append(arguments(table, **fields))
    return found


def collection_shape(case: collection.Case) -> tuple[int, int]:
    """Of the output."""
    return num_bags(case.tables[0]), sum(t.weight.shape[1] for t in case.tables)


def run_collection(
    device: Any,
    case: collection.Case,
    *,
    fill: int = 0xA5,
    shift: int = 0,
    change: Callable[[list[Args]], None] | None = None,
) -> tuple[int, str, np.ndarray]:
    """`run` for a collection.

    Args:
        shift: bytes that every array lies past a multiple of 256, and the output twice as many.
        change: what is done to the tables' structs before.
    """
    kept = []

    def place(array: np.ndarray) -> int | None:
        kept.append(_copied(device, array, shift))
        return device.address(kept[-1]) if array.nbytes else None

    tables = tables_of(case, place)
    if change is not None:
        change(tables)
    dtype, shape = case.tables[0].weight.dtype, collection_shape(case)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = _fenced(device, size, 2 * shift, fill)
    args = collection_args(tables, case.layout == "packed", device.address(memory) + 256)
    message = ctypes.create_string_buffer(256)
    plan, nothing = CollectionPlan(), np.empty((0, shape[1]), dtype)
    text = (message, len(message))
    code = device.native.lucid_cuda_plan_collection(ctypes.byref(args), ctypes.byref(plan), *text)
    if code:
        return code, message.value.decode(), nothing
    scratch, error = device.allocate(plan.scratch_bytes), device.allocate(ERROR_BYTES)
    leave(device, scratch, fill)
    device.write(error, 0)
    code = device.native.lucid_cuda_embedding_bag_collection(
        ctypes.byref(args), device.address(scratch), plan.scratch_bytes, device.address(error), device.stream, *text
    )
    if code:
        return code, message.value.decode(), nothing
    found = device.read(error).tobytes()
    written = _inside(device, memory, fill, case.name)
    code = device.native.lucid_cuda_refusal(found, *text)
    return code, message.value.decode(), written.view(dtype).reshape(shape)


def grad_args(case: gradients.Case, addresses: dict[str, int | None], **overrides: Any) -> GradArgs:
    """The struct of a gradient, whose arrays are at ``addresses``; ``overrides`` of it or of the forward call."""
    forward: dict[str, Any] = {"size_bytes": ctypes.sizeof(Args), "output": None}
    forward |= {n: a for n, a in addresses.items() if n not in ("grad_output", *case.op.outputs)}
    own = {f[0] for f in GradArgs._fields_}
    forward |= {n: v for n, v in overrides.items() if n not in own}
    fields: dict[str, Any] = {
        "size_bytes": ctypes.sizeof(GradArgs),
        "grad_output_shape": (ctypes.c_int64 * 2)(*case.grad_output.shape),
        "sparse": case.sparse,
        "scale_grad_by_freq": case.attributes.scale_grad_by_freq,
        "num_entries": -1,
        **{n: a for n, a in addresses.items() if n in own},
        **{n: v for n, v in overrides.items() if n in own},
    }
    return GradArgs(forward=arguments(case, **forward), **fields)  # type: ignore[arg-type]


def run_gradient(
    device: Any,
    case: gradients.Case,
    *,
    fill: int = 0xA5,
    shift: dict[str, int] | None = None,
    entries: int | None = None,
    **overrides: Any,
) -> tuple[int, str, list[np.ndarray]]:
    """`run` for a gradient; all its outputs.

    Args:
        entries: what num_entries says, in the place of what the plan or the device does.
    """
    shift, message, kept = shift or {}, ctypes.create_string_buffer(256), []
    text = (message, len(message))
    addresses: dict[str, int | None] = {}
    for name, array in case.inputs.items():
        kept.append(_copied(device, array, shift.get(name, 0)))
        addresses[name] = device.address(kept[-1]) if array.nbytes else None
    error = device.allocate(ERROR_BYTES)
    device.write(error, 0)
    where = device.address(error)

    def rejected() -> tuple[int, str]:
        code = device.native.lucid_cuda_refusal(device.read(error).tobytes(), *text)
        return code, message.value.decode()

    args, plan = grad_args(case, addresses, **overrides), GradPlan()
    if device.native.lucid_cuda_plan_grad(ctypes.byref(args), ctypes.byref(plan), *text):
        return 1, message.value.decode(), []
    if entries is None:
        entries = plan.num_entries
        if entries < 0:
            count = device.allocate(8)
            device.write(count, fill)
            code = device.native.lucid_cuda_embedding_bag_grad_entries(
                ctypes.byref(args), device.address(count), where, device.stream, *text
            )
            if code == 0:
                entries = int(device.read(count).view(np.int64)[0])
                code = rejected()[0]
            if code:
                return code, message.value.decode(), []
    overrides.setdefault("num_entries", entries)

    outputs = []
    for name in case.op.outputs:
        dtype = np.dtype(np.int64) if name == "rows" else case.weight.dtype
        rows, columns = len(case.weight) if name == "grad_weight" else entries, case.weight.shape[1]
        shape = (rows,) if name == "rows" else (rows, columns)
        if name == "grad_per_sample_weights":
            shape = case.indices.shape
        size = int(np.prod(shape)) * dtype.itemsize
        memory = _fenced(device, size, shift.get(name, 0), fill)
        addresses[name] = device.address(memory) + 256
        outputs.append((name, memory, dtype, shape))
    args = grad_args(case, addresses, **overrides)
    assert device.native.lucid_cuda_plan_grad(ctypes.byref(args), ctypes.byref(plan), *text) == 0, message.value
    scratch = device.allocate(plan.scratch_bytes)
    leave(device, scratch, fill)
    code = device.native.lucid_cuda_embedding_bag_grad(
        ctypes.byref(args), device.address(scratch), plan.scratch_bytes, where, device.stream, *text
    )
    if code:
        return code, message.value.decode(), []
    code, said = rejected()
    found = []
    for name, memory, dtype, shape in outputs:
        found.append(_inside(device, memory, fill, f"{case.name}, {name}").view(dtype).reshape(shape))
    return code, said, found


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """lucid_onnx with the emulated library as its CUDA library, on the CPU's provider; the emulated machine."""
    from lucid_onnx.runtime import library, session

    path = emulated_library()
    if path is None:
        pytest.skip("there is no C++ compiler to build the emulated kernels with")
    caches = (library._cuda_library, library.why_no_cuda)
    try:
        for module in (library, session):
            monkeypatch.setattr(module, "find_cuda_library", lambda: path)
        monkeypatch.setattr(session, "_provider", lambda *_: "cuda")
        for cache in caches:
            cache.cache_clear()
        machine = Machine(library._cuda_library())
        before = {name: machine[name] for name in ("devices", "kernel_images", "driver", "toolkit")}
        yield machine
        for name, value in before.items():
            machine[name] = value
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


def session_with(case: Any, library: str, bounds_check: str | None = None) -> Any:
    """A session of a case in native form, with a library's kernels registered."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if bounds_check is not None:
        options.add_session_config_entry("lucid.bounds_check", bounds_check)
    options.register_custom_ops_library(library)
    return lucid_onnx.InferenceSession(case_model(case, "native"), native=False, session_options=options)
