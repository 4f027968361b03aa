"""Check and measure the CUDA kernels on a GPU within minutes: python tools/gpu_check.py --out gpu-check

It runs in parts, each a process of its own with a time limit, so that none ends the others: the machine; every test of
the kernels; CUDA graphs and streams; benchmarks against the ceilings of a copy and of a random gather; torch's kernel,
if torch with CUDA is here; compute-sanitizer, if it is here; sessions, if onnxruntime-gpu is here. results.json and
report.md in the folder are written again after every part. The exit code is 1 if a part failed or ran out of time.

It needs the driver, Python with NumPy, onnx, ml_dtypes and pytest, and a checkout whose lucid_onnx can be imported;
LUCID_CUDA_LIBRARY names a CUDA library other than the installed one. `--emulate` rehearses it without a GPU: with the
emulated kernels, a fake driver and small sizes. Then no figure means anything.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402

from lucid_testing import cuda as kernels  # noqa: E402
from lucid_testing import driver  # noqa: E402
from lucid_testing.kernels import Args, CollectionArgs, GradArgs  # noqa: E402

#: The name of each part and the seconds that it may take, in their order. Together they are less than ten minutes.
PARTS = {
    "machine": 30,
    "cases": 150,
    "graphs": 30,
    "bags": 120,
    "others": 60,
    "torch": 80,
    "memcheck": 60,
    "initcheck": 30,
    "sessions": 40,
}
_TESTS = ("tests/test_cuda.py", "tests/test_cuda_collection.py", "tests/test_cuda_gradient.py")
_SANITIZED = "gpu and (every_width or hostile or rows_of_indices or every_position)"
BATCHES = 4
#: Of rows in this share of the gather ceiling, and times torch: what is aimed at.
AIMS = {"of_gather": 0.85, "times_torch": 2.0}


class SkippedError(Exception):
    """Something that a part needs is not here."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all parts are told."""

    out: Path
    emulate: bool
    library: str
    table_bytes: int

    def device(self) -> driver.Driver:
        device = driver.Driver()
        device.native = kernels.load(self.library)  # type: ignore[attr-defined]
        if self.emulate:
            driver.connect(device.cuda, device.native)  # type: ignore[attr-defined]
        return device


# ---- The parts. Each yields results as it goes; what it has yielded is kept if it is stopped.


def machine(setting: Setting) -> Iterator[dict[str, Any]]:
    device = setting.device()
    yield device.facts()
    native = device.native  # type: ignore[attr-defined]
    message = ctypes.create_string_buffer(256)
    if native.lucid_cuda_check_device(0, message, len(message)):
        raise RuntimeError(message.value.decode())
    number = native.lucid_cuda_toolkit_version()
    yield {
        "library": setting.library,
        "toolkit": f"{number // 1000}.{number % 1000 // 10}",
        "least_driver": native.lucid_cuda_least_driver(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER,ECC"], capture_output=True, text=True, timeout=20)
        (setting.out / "nvidia-smi.txt").write_text(done.stdout)
        yield {"nvidia_smi": "nvidia-smi.txt"}


def _pytest(setting: Setting, name: str, before: list[str], select: str, **environment: str) -> dict[str, Any]:
    """Run tests of the kernels; what they counted. Their output is a file."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=10"]
    command += [*_TESTS, "-k", select]
    log = setting.out / f"{name}.txt"
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    text = log.read_text()
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", text)}
    found = {"exit": done.returncode, **counts, "log": log.name}
    if done.returncode or not counts.get("passed"):
        raise RuntimeError(f"{found}: {text[-600:]}")
    return found


def cases(setting: Setting) -> Iterator[dict[str, Any]]:
    """The shorter tests first."""
    device, rest = ("emulated", "(counts_once or every_width)") if setting.emulate else ("gpu", "not hostile")
    if not setting.emulate:
        yield {"tests": "hostile", **_pytest(setting, "hostile", [], f"{device} and hostile")}
    yield {"tests": "all", **_pytest(setting, "cases", [], f"{device} and {rest}")}


class Call:
    """A call of the library, planned, with its memory on the device."""

    def __init__(self, device: driver.Driver, kind: str, args: Args | CollectionArgs | GradArgs) -> None:
        """kind: "", "_collection" or "_grad"."""
        self.device, self.args = device, args
        native = device.native  # type: ignore[attr-defined]
        self._message = ctypes.create_string_buffer(256)
        plan = {"": kernels.Plan, "_collection": kernels.CollectionPlan, "_grad": kernels.GradPlan}[kind]()
        planned = getattr(native, f"lucid_cuda_plan{kind}")
        self._check(planned(ctypes.byref(args), ctypes.byref(plan), self._message, 256))
        self._launch = getattr(native, f"lucid_cuda_embedding_bag{kind}")
        self._size = plan.scratch_bytes
        self._scratch = device.allocate(plan.scratch_bytes)
        device.write(self._scratch, 0xA5)
        self.error = device.allocate(kernels.ERROR_BYTES)
        device.write(self.error, 0)

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(self._message.value.decode())

    def __call__(self, stream: int | None = None) -> None:
        """Enqueue it."""
        self._check(
            self._launch(
                ctypes.byref(self.args), self._scratch.address, self._size, self.error.address,
                self.device.stream if stream is None else stream, self._message, 256,
            )
        )  # fmt: skip

    def refusal(self) -> str:
        """The bad offset or index that was found since the last time; "" for none."""
        found = self.device.read(self.error).tobytes()
        self.device.native.lucid_cuda_refusal(found, self._message, 256)  # type: ignore[attr-defined]
        self.device.write(self.error, 0)
        return self._message.value.decode()


_DTYPES = {"float32": (0, 4), "float16": (1, 2), "bfloat16": (2, 2), "int8": (4, 1), "int4": (6, 0.5)}


def bag_args(dtype: str, rows: int, dim: int, arrays: dict[str, driver.Memory], count: int, offsets: int) -> Args:
    """Of bags whose arrays are on the device; a quantized table has a float32 scale and no bias."""
    number = _DTYPES[dtype][0]
    return Args(
        size_bytes=ctypes.sizeof(Args),
        **{name: memory.address for name, memory in arrays.items()},
        weight_shape=(ctypes.c_int64 * 2)(rows, dim),
        indices_shape=(ctypes.c_int64 * 2)(count, 0),
        num_offsets=offsets,
        max_norm=math.inf,
        norm_type=2.0,
        padding_idx=-(2**63),
        dtype=number,
        output_type=0 if number >= 4 else number,
        scale_stride=4 if number >= 4 else 0,
        index_type=1,
        offset_type=1,
        indices_rank=1,
        include_last_offset=1,
    )


def placed(device: driver.Driver, array: np.ndarray) -> driver.Memory:
    memory = device.allocate(array.nbytes)
    device.write(memory, array)
    return memory


def graphs(setting: Setting) -> Iterator[dict[str, Any]]:
    """Calls are recorded once and replayed with other indices; several streams run at once."""
    device = setting.device()
    random = np.random.default_rng(1)
    rows, dim, lengths = 1000, 64, np.array([3, 0, 70, 1, 1500, 20] * 20)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    count, bags = int(offsets[-1]), len(lengths)
    weight = random.integers(-8, 8, (rows, dim)).astype(np.float32)  # whose sums are exact
    fixed = {"weight": placed(device, weight), "offsets": placed(device, offsets)}

    def expected(indices: np.ndarray) -> np.ndarray:
        sums = np.concatenate([np.zeros((1, dim)), np.cumsum(weight[indices], axis=0, dtype=np.float64)])
        return (sums[offsets[1:]] - sums[offsets[:-1]]).astype(np.float32)

    def new_call() -> tuple[Call, driver.Memory, driver.Memory]:
        indices = placed(device, random.integers(0, rows, count))
        output = device.allocate(bags * dim * 4)
        arrays = {**fixed, "indices": indices, "output": output}
        return Call(device, "", bag_args("float32", rows, dim, arrays, count, bags + 1)), indices, output

    def compare(output: driver.Memory, indices: np.ndarray, what: str) -> None:
        got = device.read(output).view(np.float32).reshape(bags, dim)
        if not np.array_equal(got, expected(indices)):
            raise RuntimeError(f"{what}: other numbers, in {int((got != expected(indices)).sum())} places")

    call, indices, output = new_call()
    call()  # loads the kernels
    with device.recording() as graph:
        call()
    for turn in range(5):
        fresh = random.integers(0, rows, count)
        device.write(indices, fresh)
        device.write(output, 0)
        graph.replay()
        compare(output, fresh, f"replay {turn}")
        if call.refusal():
            raise RuntimeError(f"replay {turn}: a bad index is reported, and there is none")
    yield {"replays": 5, "bad": ""}
    fresh[900] = rows
    device.write(indices, fresh)
    graph.replay()
    text = call.refusal()
    if text != f"indices[900] = {rows} is outside [0, {rows})":
        raise RuntimeError(f"a replay with a bad index reports {text!r}")
    fresh[900] = 0
    device.write(indices, fresh)
    graph.replay()
    compare(output, fresh, "the replay after a bad one")
    yield {"replays": 2, "bad": text}

    made = [new_call() for _ in range(4)]
    held = [device.read(i).view(np.int64) for _, i, _ in made]
    streams = [device.new_stream() for _ in made]
    for _ in range(20):
        for (one, _, _), stream in zip(made, streams, strict=True):
            one(stream)
    for stream in streams:
        device.wait(stream)
    for (one, _, result), at in zip(made, held, strict=True):
        compare(result, at, "streams at once")
        if one.refusal():
            raise RuntimeError("streams at once: a bad index is reported, and there is none")
    yield {"streams": len(streams), "launches": 20 * len(streams)}


@dataclasses.dataclass(frozen=True)
class Shape:
    dim: int
    length: int
    dtype: str = "float32"
    indices: str = "uniform"
    weighted: bool = False
    table_bytes: int = 4 << 30
    work: int = 256 << 20  # bytes of rows in a call

    @property
    def row_bytes(self) -> int:
        return int(self.dim * _DTYPES[self.dtype][1])


def shapes() -> list[Shape]:
    """What tells most first: the widths and lengths, then types, skew, odd widths, and the largest table."""
    found = [Shape(dim, length) for dim in (64, 128, 256) for length in (20, 100)]
    found += [Shape(dim, length) for dim in (16, 32, 512, 1024) for length in (20,)]
    found += [Shape(64, 1), Shape(64, 5), Shape(64, 1000), Shape(1024, 1), Shape(128, 1000)]
    found += [Shape(128, 20, dtype) for dtype in ("float16", "bfloat16", "int8", "int4")]
    found += [Shape(dim, 20) for dim in (50, 100, 67)]
    found += [Shape(64, 20, indices="zipf"), Shape(64, 20, weighted=True), Shape(256, 20, "int8")]
    found += [Shape(64, 20, work=4 << 20), Shape(64, 1, work=1 << 20), Shape(64, 20, table_bytes=10 << 20)]
    found += [Shape(128, 20, table_bytes=20 << 30)]
    return found


def drawn(random: np.random.Generator, shape: Shape, rows: int, count: int) -> np.ndarray:
    if shape.indices == "uniform":
        return random.integers(0, rows, count)
    return random.zipf(1.2, count) * 2654435761 % rows  # the rows that are often asked for lie anywhere


def bags(setting: Setting) -> Iterator[dict[str, Any]]:
    """Seconds of a call in a CUDA graph of several with indices of their own, and of the two ceilings."""
    device = setting.device()
    random = np.random.default_rng(0)
    gather = device.kernel((ROOT / "tools" / "gather.ptx").read_bytes(), "gather")
    most = min(setting.table_bytes, int(device.memory()[0] * 0.6))
    table = device.allocate(most)
    device.write(table, 0x3C)  # a small number in every type
    half = min(most // 2, 2 << 30)
    copied = device.allocate(half)
    copy = 2 * half / statistics.median(device.seconds(lambda: device.copy(copied, table, half), 3) for _ in range(3))
    yield {"copy_gb_per_s": copy / 1e9}
    copied = device.allocate(1)
    for shape in shapes():
        size = min(shape.table_bytes, most)
        rows = size // shape.row_bytes
        work = shape.work >> 12 if setting.emulate else shape.work
        num_bags = max(work // (shape.row_bytes * shape.length), 1)
        count = num_bags * shape.length
        offsets = placed(device, np.arange(0, count + 1, shape.length, dtype=np.int64))
        out = device.allocate(num_bags * shape.dim * (2 if "16" in shape.dtype else 4))
        extra = {}
        if shape.weighted:
            extra["per_sample_weights"] = placed(device, np.ones(count, np.float32))
        if "int" in shape.dtype:
            extra["scale"] = device.allocate(rows * 4)
            device.write(extra["scale"], 0x3C)
        calls, ids = [], []
        for _ in range(BATCHES):
            ids.append(placed(device, drawn(random, shape, rows, count)))
            arrays = {"weight": table, "indices": ids[-1], "offsets": offsets, "output": out, **extra}
            calls.append(Call(device, "", bag_args(shape.dtype, rows, shape.dim, arrays, count, num_bags + 1)))
        calls[0]()
        with device.recording() as graph:
            for call in calls:
                call()
        us = _median(device, graph.replay, 3 if setting.emulate else 20) / BATCHES * 1e6
        for call in calls:
            if text := call.refusal():
                raise RuntimeError(f"{shape}: {text}")
        found = {**dataclasses.asdict(shape), "rows": rows, "bags": num_bags, "us": us}
        moved = count * (shape.row_bytes + 8 + 4 * shape.weighted + 4 * ("int" in shape.dtype)) + out.size
        found["gb_per_s"] = moved / us / 1e3
        if shape.row_bytes % 16 == 0 and count >= 8:
            found["gather_gb_per_s"] = _gather(device, gather, table, ids, count, shape.row_bytes, setting.emulate)
            found["of_gather"] = found["gb_per_s"] / found["gather_gb_per_s"]
        yield found


def _median(device: driver.Driver, run: Callable[[], None], turns: int) -> float:
    return statistics.median(device.seconds(run, turns) for _ in range(3))


def _gather(
    device: driver.Driver,
    kernel: ctypes.c_void_p,
    table: driver.Memory,
    ids: list[driver.Memory],
    count: int,
    row_bytes: int,
    emulate: bool,
) -> float:
    """GB/s of reading the same rows alone."""
    groups, vectors = count // 8, row_bytes // 16
    out = device.allocate(groups * row_bytes)
    arguments = [
        (
            ctypes.c_uint64(table.address), ctypes.c_uint64(i.address), ctypes.c_longlong(groups),
            ctypes.c_uint32(vectors), ctypes.c_uint64(out.address),
        )
        for i in ids
    ]  # fmt: skip
    blocks = -(-groups * vectors // 256)

    def run() -> None:
        for given in arguments:
            device.launch(kernel, blocks, 256, *given)

    seconds = _median(device, run, 2 if emulate else 20) / len(ids)
    return (groups * 8 * (row_bytes + 8) + out.size) / seconds / 1e9


def others(setting: Setting) -> Iterator[dict[str, Any]]:
    """Collections and gradients."""
    device = setting.device()
    random = np.random.default_rng(0)
    small = 64 if setting.emulate else 1
    turns = 2 if setting.emulate else 20
    for tables, rows, dim, num_bags, length in ((26, 50_000, 64, 128, 10), (26, 50_000, 64, 8192, 10)):
        num_bags //= small
        rows //= small
        count = num_bags * length
        out = device.allocate(num_bags * dim * tables * 4)
        offsets = placed(device, np.arange(0, count + 1, length, dtype=np.int64))
        kept, array = [], (Args * tables)()
        for t in range(tables):
            weight, indices = device.allocate(rows * dim * 4), placed(device, random.integers(0, rows, count))
            device.write(weight, 0x3C)
            kept.append((weight, indices))
            arrays = {"weight": weight, "indices": indices, "offsets": offsets}
            array[t] = bag_args("float32", rows, dim, arrays, count, num_bags + 1)
        call = Call(device, "_collection", CollectionArgs(ctypes.sizeof(CollectionArgs), array, tables, out.address, 0))
        us = _recorded(device, call, turns)
        moved = tables * count * (dim * 4 + 8) + out.size
        yield {"what": "collection", "tables": tables, "dim": dim, "bags": num_bags, "length": length, "us": us,
               "gb_per_s": moved / us / 1e3}  # fmt: skip
    for rows, dim, num_bags, length in ((50_000, 64, 2048, 20), (1_000_000, 64, 8192, 20), (10_000_000, 64, 2048, 20)):
        rows, num_bags = rows // small, num_bags // small
        count = num_bags * length
        arrays = {
            "weight": device.allocate(rows * dim * 4),
            "indices": placed(device, random.integers(0, rows, count)),
            "offsets": placed(device, np.arange(0, count + 1, length, dtype=np.int64)),
        }
        forward = bag_args("float32", rows, dim, arrays, count, num_bags + 1)
        grads = device.allocate(num_bags * dim * 4)
        device.write(grads, 0x3C)
        dense = device.allocate(rows * dim * 4)
        args = GradArgs(
            size_bytes=ctypes.sizeof(GradArgs),
            forward=forward,
            grad_output=grads.address,
            grad_weight=dense.address,
            grad_output_shape=(ctypes.c_int64 * 2)(num_bags, dim),
            num_entries=-1,
        )
        us = _recorded(device, Call(device, "_grad", args), turns)
        yield {"what": "dense gradient", "rows": rows, "dim": dim, "positions": count, "us": us,
               "gb_per_s": (count * (dim * 4 + 8) + rows * dim * 4) / us / 1e3}  # fmt: skip


def _recorded(device: driver.Driver, call: Call, turns: int) -> float:
    """Microseconds of a call in a CUDA graph."""
    call()
    with device.recording() as graph:
        call()
    us = _median(device, graph.replay, turns) * 1e6
    if text := call.refusal():
        raise RuntimeError(text)
    return us


def torchs(setting: Setting) -> Iterator[dict[str, Any]]:
    """benchmarks/cuda.py, which compares with torch's kernels."""
    try:
        import torch
    except ImportError:
        raise SkippedError("torch is not installed") from None
    if not torch.cuda.is_available():
        raise SkippedError("this torch sees no GPU")
    path = setting.out / "torch.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "cuda.py"), setting.library, "--quick", "--json", str(path)]
    seconds = PARTS["torch"] - 10
    try:
        subprocess.run(command, check=True, timeout=seconds, stdout=subprocess.DEVNULL)
        complete = True
    except subprocess.TimeoutExpired:
        complete = False
    yield from json.loads(path.read_text())["shapes"]
    yield {"complete": complete}


def _sanitizer(setting: Setting, tool: str, **environment: str) -> Iterator[dict[str, Any]]:
    path = shutil.which("compute-sanitizer")
    if path is None:
        raise SkippedError("compute-sanitizer is not installed")
    yield _pytest(setting, tool, [path, "--tool", tool, "--error-exitcode", "99"], _SANITIZED, **environment)


def memcheck(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _sanitizer(setting, "memcheck")


def initcheck(setting: Setting) -> Iterator[dict[str, Any]]:
    """With scratch memory as it was allocated."""
    yield from _sanitizer(setting, "initcheck", LUCID_CUDA_UNFILLED="1")


def sessions(setting: Setting) -> Iterator[dict[str, Any]]:
    """onnxruntime-gpu: which nodes run on it, every form, a bad index, DLPack, and a CUDA graph."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise SkippedError("onnxruntime is not installed") from None
    import lucid_onnx
    from lucid_onnx.builder.conformance import case_model
    from lucid_onnx.ops.embedding_bag import cases as bag_cases

    provider = "CPUExecutionProvider" if setting.emulate else "CUDAExecutionProvider"
    if provider not in ort.get_available_providers():
        raise SkippedError(f"this onnxruntime has no {provider}")
    case = bag_cases.make("check", mode="sum", lengths=[3, 70, 0, 1], dim=8)
    for form in ("native", "portable", "standard"):
        session = lucid_onnx.InferenceSession(case_model(case, form), providers=[provider], native=form != "standard")
        for _ in range(3):
            case.check(session.run(None, case.inputs)[0])
        yield {"form": form, "providers": session.get_providers(), "native_nodes": len(session.native_nodes)}
    session = lucid_onnx.InferenceSession(case_model(case, "native"), providers=[provider])
    bad = dict(case.inputs, indices=np.where(np.arange(74) == 40, 99, case.indices))
    try:
        session.run(None, bad)
    except Exception as error:
        if "indices[40] = 99 is outside" not in str(error):
            raise
        yield {"bad_index": str(error)}
    else:
        raise RuntimeError("a bad index was not reported by its run")
    case.check(session.run(None, case.inputs)[0])
    session.check_bounds()
    if hasattr(ort.OrtValue, "from_dlpack"):
        (value,) = session.run_dlpack(None, case.inputs)
        case.check(value.numpy())
        yield {"dlpack": value.device_name()}
    if setting.emulate:
        return
    session = lucid_onnx.InferenceSession(
        case_model(case, "native"), providers=[(provider, {"enable_cuda_graph": "1"})]
    )
    binding = session.io_binding()
    inputs = {n: ort.OrtValue.ortvalue_from_numpy(a, "cuda", 0) for n, a in case.inputs.items()}
    shape = [len(case.offsets), case.weight.shape[1]]
    out = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, out)
    for _ in range(4):  # the first ones record
        session.run_with_iobinding(binding)
        case.check(out.numpy())
    inputs["indices"].update_inplace(bad["indices"])
    reported = ""
    try:
        session.run_with_iobinding(binding)
        session.check_bounds()
    except Exception as error:
        reported = str(error)
    if "indices[40] = 99 is outside" not in reported:
        raise RuntimeError(f"a replay with a bad index: {reported!r}")
    yield {"cuda_graph": reported}


_RUN: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "machine": machine, "cases": cases, "graphs": graphs, "bags": bags, "others": others, "torch": torchs,
    "memcheck": memcheck, "initcheck": initcheck, "sessions": sessions,
}  # fmt: skip


# ---- Running them.


def run_part(name: str, setting: Setting) -> int:
    """A part, in this process: results line by line into its file. 0, or 3 if it was skipped, or 1."""
    with (setting.out / f"{name}.jsonl").open("w") as file:

        def write(found: dict[str, Any]) -> None:
            file.write(json.dumps(found, default=str) + "\n")
            file.flush()

        try:
            for found in _RUN[name](setting):
                write(found)
        except SkippedError as why:
            write({"skipped": str(why)})
            return 3
        except Exception as error:
            write({"error": f"{type(error).__name__}: {error}"[-2000:]})
            return 1
    return 0


def run_all(parts: list[str], setting: Setting, seconds: float, limits: dict[str, float]) -> dict[str, Any]:
    """All parts, each a process, within so many seconds. Writes results.json and report.md after each."""
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"emulated": setting.emulate, "parts": {}}
    for name in parts:
        begin = time.monotonic()
        limit = min(limits[name], end - begin)
        told = _run_process(name, setting, limit) if limit >= 1 else "not run: no time was left"
        file = setting.out / f"{name}.jsonl"
        found = [_parsed(line) for line in file.read_text().splitlines()] if file.exists() else []
        seconds_taken = round(time.monotonic() - begin, 1)
        results["parts"][name] = {"state": told, "seconds": seconds_taken, "results": found}
        results["summary"] = summary(results["parts"])
        (setting.out / "results.json").write_text(json.dumps(results, indent=1))
        (setting.out / "report.md").write_text(report(results))
        print(f"{name:<10} {told:<26} {seconds_taken:6.1f} s", flush=True)
    return results


def _run_process(name: str, setting: Setting, limit: float) -> str:
    """A part as a process; how it ended. It starts with no results of an earlier run."""
    (setting.out / f"{name}.jsonl").unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(setting.out)]
    command += ["--library", setting.library, "--table-bytes", str(setting.table_bytes)]
    command += ["--emulate"] * setting.emulate
    with (setting.out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return {0: "done", 3: "skipped"}.get(process.wait(limit), "failed")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
            return f"stopped after {limit:.0f} s"


def _parsed(line: str) -> dict[str, Any]:
    """A line of a part's file, the last of which may be cut off."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {"cut_off": line[:200]}


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """Geometric means of what is aimed at."""
    found: dict[str, Any] = {}
    measured = parts.get("bags", {}).get("results", [])
    shares = [r["of_gather"] for r in measured if "of_gather" in r and r["length"] >= 20 and _row_bytes(r) >= 256]
    times = [r["times_torch"] for r in parts.get("torch", {}).get("results", []) if "times_torch" in r]
    for name, values in (("of_gather", shares), ("times_torch", times)):
        if values:
            found[name] = {"geometric_mean": statistics.geometric_mean(values), "least": min(values),
                           "of": len(values), "aim": AIMS[name]}  # fmt: skip
    return found


def _row_bytes(found: dict[str, Any]) -> float:
    return float(found["dim"] * _DTYPES[found["dtype"]][1])


def report(results: dict[str, Any]) -> str:
    """The page."""
    lines = ["# CUDA kernels on a GPU", ""]
    if results["emulated"]:
        lines += ["**A rehearsal in emulation: no GPU, and no figure means anything.**", ""]
    lines += ["| part | | seconds |", "|---|---|---:|"]
    lines += [f"| {name} | {part['state']} | {part['seconds']} |" for name, part in results["parts"].items()]
    for name, one in results.get("summary", {}).items():
        mean, least = one["geometric_mean"], one["least"]
        lines += ["", f"{name}: {mean:.2f} in geometric mean, {least:.2f} at least, of {one['of']} (aim {one['aim']})"]
    for name, part in results["parts"].items():
        if not part["results"]:
            continue
        lines += ["", f"## {name}", ""]
        columns = list(dict.fromkeys(key for found in part["results"] for key in found))
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(found.get(c)) for c in columns) + " |" for found in part["results"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--limit", type=float, help="seconds for a part, in the place of its own limit")
    parser.add_argument("--table-bytes", type=int, default=20 << 30, help="of the largest table")
    parser.add_argument("--library", help="the CUDA library, by default LUCID_CUDA_LIBRARY or the installed one")
    parser.add_argument("--emulate", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    parts = a.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}")
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lucid-gpu-check") as folder:
        library = a.library or (kernels.emulated_library() if a.emulate else kernels.gpu_library())
        if library is None:
            parser.error("there is no CUDA library" if not a.emulate else "there is no C++ compiler")
        setting = Setting(a.out.resolve(), a.emulate, str(library), a.table_bytes)
        if a.part:
            return run_part(a.part, setting)
        if a.emulate:
            os.environ["LUCID_LIBCUDA"] = str(driver.build_fake(Path(folder)))
            os.environ["LUCID_EMULATED_LIBRARY"] = setting.library
        elif a.library:
            os.environ["LUCID_CUDA_LIBRARY"] = a.library
        limits = {name: a.limit or seconds for name, seconds in PARTS.items()}
        results = run_all(parts, setting, a.minutes * 60, limits)
    return int(any(part["state"] not in ("done", "skipped") for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
