"""A GPU through the driver's own interface: memory, streams, events and CUDA graphs, without torch.

LUCID_LIBCUDA names another library than libcuda.so.1, such as the one of `rehearsal`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_GLOBAL_MODE = 0  # of recording: what would disturb a recording is an error
_NON_BLOCKING = 1
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76


class Driver:
    """One device. Its primary context is the one that the CUDA runtime uses too.

    Raises:
        OSError: there is no driver.
        RuntimeError: a call failed, with the driver's text.
    """

    def __init__(self, device: int = 0) -> None:
        self.cuda = ctypes.CDLL(os.environ.get("LUCID_LIBCUDA") or "libcuda.so.1")
        self.call("cuInit", 0)
        number = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(number), device)
        self._device = number.value
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxSetCurrent", context)
        self.stream = self.new_stream()

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {code}, {(text.value or b'?').decode()}")

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, driver and memory."""
        name, number = ctypes.create_string_buffer(200), ctypes.c_int()
        self.call("cuDeviceGetName", name, len(name), self._device)
        compute = []
        for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR):
            self.call("cuDeviceGetAttribute", ctypes.byref(number), attribute, self._device)
            compute.append(number.value)
        self.call("cuDriverGetVersion", ctypes.byref(number))
        free, total = self.memory()
        return {
            "name": name.value.decode(),
            "compute": f"{compute[0]}.{compute[1]}",
            "driver_cuda": f"{number.value // 1000}.{number.value % 1000 // 10}",
            "free_bytes": free,
            "total_bytes": total,
        }

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # ---- Memory: each allocation is one of the driver's, so that memcheck sees its end.

    def allocate(self, size: int, shift: int = 0) -> Memory:
        """``size`` bytes, ``shift`` past a multiple of 256."""
        return Memory(self, size, shift)

    def address(self, memory: Memory) -> int:
        return memory.address

    def write(self, memory: Memory, data: np.ndarray | int) -> None:
        """Bytes, or one byte everywhere. Done when this returns."""
        if isinstance(data, int):
            if memory.size:
                self.call(
                    "cuMemsetD8Async", ctypes.c_uint64(memory.address), ctypes.c_ubyte(data),
                    ctypes.c_size_t(memory.size), self._stream(None),
                )  # fmt: skip
                self.wait()
            return
        data = np.ascontiguousarray(data)
        assert data.nbytes <= memory.size
        if data.nbytes:
            self.call(
                "cuMemcpyHtoD_v2", ctypes.c_uint64(memory.address), ctypes.c_void_p(data.ctypes.data),
                ctypes.c_size_t(data.nbytes),
            )  # fmt: skip

    def read(self, memory: Memory) -> np.ndarray:
        """The bytes, when all that was enqueued is done."""
        self.wait()
        data = np.empty(memory.size, np.uint8)
        if memory.size:
            self.call(
                "cuMemcpyDtoH_v2", ctypes.c_void_p(data.ctypes.data), ctypes.c_uint64(memory.address),
                ctypes.c_size_t(memory.size),
            )  # fmt: skip
        return data

    def copy(self, to: Memory, source: Memory, size: int) -> None:
        """Enqueued."""
        self.call(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to.address), ctypes.c_uint64(source.address), ctypes.c_size_t(size),
            self._stream(None),
        )  # fmt: skip

    # ---- Streams, CUDA graphs, time.

    def new_stream(self) -> int:
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def _stream(self, stream: int | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.stream if stream is None else stream)

    def wait(self, stream: int | None = None) -> None:
        self.call("cuStreamSynchronize", self._stream(stream))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Graph]:
        """Records what is launched on the stream; the graph is ready at the end."""
        found = Graph(self)
        self.call("cuStreamBeginCapture_v2", self._stream(None), _GLOBAL_MODE)
        graph = ctypes.c_void_p()
        try:
            yield found
        finally:
            self.call("cuStreamEndCapture", self._stream(None), ctypes.byref(graph))
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(found.executable), graph, ctypes.c_ulonglong(0))

    def seconds(self, run: Any, turns: int) -> float:
        """Of one run: of what it enqueues, between two events."""
        events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in events:
            self.call("cuEventCreate", ctypes.byref(event), 0)
        run()  # the first one is not measured
        self.call("cuEventRecord", events[0], self._stream(None))
        for _ in range(turns):
            run()
        self.call("cuEventRecord", events[1], self._stream(None))
        self.call("cuEventSynchronize", events[1])
        elapsed = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), *events)
        return max(elapsed.value, 1e-6) / 1e3 / turns

    def kernel(self, ptx: bytes, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ptx + b"\0")
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, function: ctypes.c_void_p, blocks: int, threads: int, *arguments: Any) -> None:
        """Enqueued; arguments of ctypes."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self.call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, self._stream(None), pointers, None)


class Memory:
    """Memory of a device, which is freed with this object."""

    def __init__(self, driver: Driver, size: int, shift: int) -> None:
        where = ctypes.c_uint64()
        driver.call("cuMemAlloc_v2", ctypes.byref(where), ctypes.c_size_t(max(size + shift, 1)))
        self.size, self.address = size, where.value + shift
        weakref.finalize(self, driver.cuda.cuMemFree_v2, where)


class Graph:
    """A recorded CUDA graph."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.executable = ctypes.c_void_p()

    def replay(self) -> None:
        """Enqueued."""
        self._driver.call("cuGraphLaunch", self.executable, ctypes.c_void_p(self._driver.stream))


def build_fake(folder: Path) -> Path | None:
    """The fake driver, compiled into a folder; None without a C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    path = folder / "libfakecuda.so"
    source = Path(__file__).with_name("fake_driver.cc")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(path)]
    subprocess.run(command, check=True, timeout=300)
    return path


def connect(fake: Any, native: ctypes.CDLL) -> None:
    """Let the fake driver record what the emulated kernels' library launches."""
    kinds = (ctypes.CFUNCTYPE(None), ctypes.CFUNCTYPE(ctypes.c_int), ctypes.CFUNCTYPE(None, ctypes.c_int))
    names = ("record", "stop", "replay")
    fake.fake_connect(
        *(ctypes.cast(getattr(native, f"lucid_emulation_{n}"), k) for n, k in zip(names, kinds, strict=True))
    )
