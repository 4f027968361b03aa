"""Many shapes against torch, and against the memory bandwidth: python benchmarks/grid.py [--quick]

The sides take turns over the same fresh batches, and each is checked first. The sides:

    torch           torch.nn.functional.embedding_bag over a table in torch's own memory: the baseline of all ratios
    torch, pages    the same with the same huge pages as ours
    run, bound      ours, by session.run and by run_with_iobinding; the table is a constant in that memory
    bare loop       the ceiling: a C++ loop (gather.cc) that reads the same rows of the same memory, on as many threads
                    and at the best of several distances to prefetch
    and, in the group "others", OpenVINO's EmbeddingBagOffsets, torch's two exports and our portable file without
    the library, in onnxruntime

The baseline of quantized tables is torch.ops.quantized, over rows that hold their scale and bias: embedding_bag_byte
for uint8 and int8, embedding_bag_4bit for uint4 and int4.

Not the full product of dims, bags, lengths, distributions, dtypes, modes, tables and threads, but, see `spread`:

    grid      every dim at three of the (bags, length), and every (bags, length) at D = 64, per table, on 1 thread
    threads   the shapes of "grid" with at least 512 bags of 20, on 2 threads
    uneven    bags of skewed lengths, and Zipf's indices, and both, per table
    dtypes    every dtype in every mode that the baseline has, 256 MB
    others    the other runtimes at three shapes, 256 MB

A shape is one line of JSON in --output. A shape that is there already, from the same versions and the same machine, is
not run again, so that an interrupted run continues. --only takes words that a label must contain.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import lucid_onnx
from common import binding, exported, options, quiet_torch
from interleave import compare

DIMS = (8, 16, 32, 64, 100, 128, 256, 768)
BAGS = (1, 16, 512, 4096)
LENGTHS = (1, 5, 20, 100)
TABLES = (10, 256, 4096)  #: MiB
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
CODES = {"uint8": ("byte", 1.0), "int8": ("byte", 1.0), "uint4": ("4bit", 0.5), "int4": ("4bit", 0.5)}
#: One rounding of the result to the dtype, of sums of at most 100 normal numbers; float32 also sums in another order.
TOLERANCES = {"float32": 1e-4, "float64": 1e-9, "float16": 4e-3, "bfloat16": 3e-2}
#: Rows ahead that gather.cc fetches into the second and into the first cache.
AHEAD = ((4, 0), (8, 0), (16, 0), (32, 0), (64, 0), (128, 0), (16, 2), (32, 4), (64, 4), (128, 4))
#: Rows that are drawn for the batches of a shape: 64 MiB of indices, and of every row size more than the caches hold.
DRAWN = 8 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    group: str
    table_mib: int
    dim: int
    bags: int
    length: int
    threads: int = 1
    dtype: str = "float32"
    mode: str = "sum"
    skewed: bool = False
    zipf: bool = False

    @property
    def row_bytes(self) -> int:
        """Of what a lookup reads of the table itself."""
        if self.dtype in CODES:
            return math.ceil(self.dim * CODES[self.dtype][1])
        return self.dim * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        return (self.table_mib << 20) // self.row_bytes

    @property
    def label(self) -> str:
        marks = [m for m, on in (("skewed", self.skewed), ("zipf", self.zipf)) if on]
        words = [self.group, f"{self.table_mib}MiB", f"D{self.dim}", f"B{self.bags}", f"L{self.length}"]
        return " ".join([*words, self.dtype, self.mode, f"{self.threads}T", *marks])


def spread(quick: bool) -> Iterator[Shape]:
    """The shapes, those over one table together."""
    tables = TABLES[:2] if quick else TABLES
    dims = (16, 64, 256) if quick else DIMS
    corners = ((16, 20), (512, 20), (4096, 20))
    every = corners if quick else tuple(itertools.product(BAGS, LENGTHS))
    for mib in tables:
        for dim in dims:
            for bags, length in every if dim == 64 else corners:
                shape = Shape("grid", mib, dim, bags, length)
                yield shape
                if (bags >= 512 and length >= 20) and (not quick or bags == 512):
                    yield dataclasses.replace(shape, group="threads", threads=2)
        for skewed, zipf in ((True, False), (False, True), (True, True)):
            yield Shape("uneven", mib, 64, 512, 20, skewed=skewed, zipf=zipf)
    for dtype in DTYPES:
        modes = ("sum",) if quick else ("sum", "mean", "max")
        for mode in modes:
            if dtype != "float32" or mode != "sum":  # those are in "grid"
                yield Shape("dtypes", 256, 64, 512, 20, dtype=dtype, mode=mode)
    for dtype in CODES:
        yield Shape("dtypes", 256, 64, 512, 20, dtype=dtype)
    for dim, bags, length in ((64, 512, 20),) if quick else ((64, 512, 20), (64, 16, 5), (256, 512, 20)):
        yield Shape("others", 256, dim, bags, length)


# ---- The inputs of the sides.


class Memory:
    """Anonymous memory that asks for huge pages, filled with rows of normal numbers."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)

    def fill(self, shape: Shape) -> np.ndarray:
        """[V, D] of the shape's dtype; blocks repeat, at a distance in rows that is prime."""
        table = self.bytes[: shape.rows * shape.row_bytes].view(DTYPES[shape.dtype]).reshape(shape.rows, shape.dim)
        block = np.random.default_rng(0).standard_normal((min(10_007, shape.rows), shape.dim), dtype=np.float32)
        block = block.astype(table.dtype)
        for begin in range(0, shape.rows, len(block)):
            table[begin : begin + len(block)] = block[: shape.rows - begin]
        return table


def draw(random: np.random.Generator, shape: Shape, size: int) -> np.ndarray:
    """Row numbers, by Zipf's law or uniform."""
    if not shape.zipf:
        return random.integers(0, shape.rows, size)
    return random.zipf(1.2, size) * 2_654_435_761 % shape.rows  # frequent rows do not lie beside each other


def batches_of(shape: Shape, calls: int) -> list[dict[str, np.ndarray]]:
    """Fresh indices for every call, or as many as there is room for."""
    random = np.random.default_rng(1)
    size = shape.bags * shape.length
    count = max(31, min(calls, DRAWN // size))
    result = []
    for _ in range(count):
        if shape.skewed:  # a few bags take most of the rows; as many rows as if all were equal
            share = random.pareto(1.0, shape.bags) + 0.1
            ends = np.floor(np.cumsum(share) / share.sum() * size + 0.5).astype(np.int64)
            offsets = np.concatenate([[0], ends[:-1]])
        else:
            offsets = np.arange(shape.bags, dtype=np.int64) * shape.length
        result.append({"indices": draw(random, shape, size), "offsets": offsets})
    return result


Side = Callable[[int], np.ndarray]


def sessions_over(table: np.ndarray, mode: str, threads: int, folder: Path) -> Any:
    """Our session with the table as a constant, in its memory."""
    model = lucid_onnx.build_model(np.zeros((4, table.shape[1]), table.dtype), mode=mode)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.dims[0] = len(table)
    tensor.data_location = TensorProto.EXTERNAL
    # onnxruntime wants the file to be there before it takes the memory in its place: it has no contents.
    for key, value in {"location": "table", "offset": "0", "length": str(table.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    with open(folder / "table", "wb") as file:
        file.truncate(table.nbytes)
    onnx.save(model, folder / "model.onnx")
    settings = options(threads)
    if table.dtype == DTYPES["bfloat16"]:
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(table.view(np.uint16), TensorProto.BFLOAT16)
    else:
        value = ort.OrtValue.ortvalue_from_numpy(table)
    if value.data_ptr() != table.ctypes.data:
        raise RuntimeError("onnxruntime has copied the table: the sides would not read the same memory")
    settings.add_initializer(tensor.name, value)
    session = lucid_onnx.InferenceSession(folder / "model.onnx", session_options=settings)
    session.kept = value
    return session


def running(session: Any, feeds: list[dict[str, np.ndarray]]) -> Side:
    return lambda batch: session.run(None, feeds[batch])[0]


def eager(table: Any, feeds: list[Any], mode: str) -> Side:
    import torch

    def call(batch: int) -> np.ndarray:
        indices, offsets = feeds[batch]
        with torch.inference_mode():
            result = torch.nn.functional.embedding_bag(indices, table, offsets, mode=mode)
        return (
            result.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if table.dtype == torch.bfloat16
            else result.numpy()
        )

    return call


class Ceiling:
    """Bytes a second of gather.cc."""

    def __init__(self, folder: Path) -> None:
        library = folder / "gather.so"
        compiler = os.environ.get("CXX", "c++")
        source = Path(__file__).with_name("gather.cc")
        command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        self._gather = ctypes.CDLL(str(library)).gather
        self._gather.restype = ctypes.c_uint64
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        self._gather.argtypes = (pointer, size, pointer, size, size, size, ctypes.c_int)

        self._known: dict[tuple[int, int, int, bool], tuple[int, int]] = {}

    def side(self, shape: Shape, table: np.ndarray, feeds: list[dict[str, np.ndarray]]) -> Side:
        """Reads the rows of a batch, which are whole words of 8 bytes, and has shown that it does."""
        distances = self._distances(shape, table)
        rows = [feed["indices"] for feed in feeds]
        got, expected = self._read(shape, table, rows[0], distances), _words_of(table, rows[0])
        if got != expected:
            raise RuntimeError(f"gather.cc has not read the rows of {shape.label}: {got}, not {expected}")

        def call(batch: int) -> np.ndarray:
            self._read(shape, table, rows[batch], distances)
            return _NOTHING

        return call

    def _read(self, shape: Shape, table: np.ndarray, rows: np.ndarray, distances: tuple[int, int]) -> int:
        where, row_bytes = table.ctypes.data, shape.row_bytes
        return int(self._gather(where, row_bytes, rows.ctypes.data, len(rows), *distances, shape.threads))

    def _distances(self, shape: Shape, table: np.ndarray) -> tuple[int, int]:
        """Those of AHEAD with the best median over pieces of 128 MiB of rows."""
        key = (shape.table_mib, shape.row_bytes, shape.threads, shape.zipf)
        if key not in self._known:
            pieces = np.array_split(draw(np.random.default_rng(2), shape, (128 << 20) // shape.row_bytes), 64)
            medians = {}
            for distances in AHEAD:
                seconds = []
                for piece in pieces:
                    begin = time.perf_counter()
                    self._read(shape, table, piece, distances)
                    seconds.append(time.perf_counter() - begin)
                medians[distances] = statistics.median(seconds)
            self._known[key] = min(medians, key=medians.__getitem__)
        return self._known[key]


_NOTHING = np.empty(0)


def _words_of(table: np.ndarray, rows: np.ndarray) -> int:
    """The sum of the rows' 8-byte words, modulo 2 ** 64."""
    words = table.view(np.uint8).reshape(len(table), -1).view(np.uint64)
    return int(words[rows].sum(dtype=np.uint64))


# ---- One shape.


@dataclasses.dataclass
class Bench:
    """What stays between shapes: the memory, and torch's own copy of the table that is in it."""

    folder: Path
    ceiling: Ceiling
    memory: Memory | None = None
    key: tuple[int, int, str] | None = None
    table: Any = None
    copy: Any = None

    def tables(self, shape: Shape) -> tuple[np.ndarray, Any]:
        import torch

        key = (shape.table_mib, shape.dim, shape.dtype)
        if self.key != key:
            self.table = self.copy = self.key = None  # before new ones take their memory
            if self.memory is None or len(self.memory.bytes) != shape.table_mib << 20:
                self.memory = None
                self.memory = Memory(shape.table_mib << 20)
            self.table = self.memory.fill(shape)
            self.copy = torch.empty(self.table.shape, dtype=getattr(torch, shape.dtype))
            self.copy.copy_(self.shared())
            self.key = key
        return self.table, self.copy

    def shared(self) -> Any:
        """The memory as torch's tensor."""
        import torch

        if self.table.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(self.table.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.table)

    def measure(self, shape: Shape, turns: int | None) -> dict[str, Any]:
        import torch

        torch.set_num_threads(shape.threads)
        # So many turns that a side takes about half a second, at 5 GB/s and 10 us a call.
        guess = 1e-5 + shape.bags * shape.length * shape.row_bytes / 5e9
        turns = turns or int(min(301, max(15, 0.5 / guess)))
        feeds = batches_of(shape, (turns + 4) * 4)
        tensors = [tuple(map(torch.from_numpy, feed.values())) for feed in feeds]
        # torch adds one row after another, and its error grows with the longest bag.
        ends = np.append(feeds[0]["offsets"], shape.bags * shape.length)
        tolerance = TOLERANCES.get(shape.dtype, 1e-4) * max(1.0, float(np.diff(ends).max()) / 20)
        reads = shape.row_bytes
        if shape.dtype in CODES:
            sides = self.codes(shape, feeds, tensors)
        elif shape.group == "others":
            sides = self.others(shape, feeds, tensors)
        else:
            table, copy = self.tables(shape)
            session = sessions_over(table, shape.mode, shape.threads, self.folder)
            sides = {
                "torch": eager(copy, tensors, shape.mode),
                "torch, pages": eager(self.shared(), tensors, shape.mode),
                "run": running(session, feeds),
                "bound": binding(session, feeds, (shape.bags, shape.dim), table.dtype),
            }
            if reads % 8 == 0:
                sides["bare loop"] = self.ceiling.side(shape, table, feeds)
        # The number of batches must not share a factor with the number of sides, or a side would keep its batches.
        count = len(feeds)
        while math.gcd(count, len(sides)) > 1:
            count -= 1
        timings = compare(sides, batches=count, turns=turns, tolerance=tolerance, unchecked=["bare loop"])
        return {
            "label": shape.label,
            **dataclasses.asdict(shape),
            "turns": turns,
            "sides": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
            "gb_per_s": {n: shape.bags * shape.length * reads / t.median / 1e9 for n, t in timings.items()},
        }

    def codes(self, shape: Shape, feeds: list[Any], tensors: list[Any]) -> dict[str, Side]:
        """torch's packed rows, and ours of the same quantized values, scales and biases."""
        import torch

        bits = CODES[shape.dtype][0]
        weight = np.random.default_rng(0).standard_normal((10_007, shape.dim), dtype=np.float32)
        small = lucid_onnx.QuantizedTable.quantize(weight, "int8" if bits == "byte" else "int4")
        # FBGEMM's values are unsigned, and the scale and bias of 4-bit values are float16.
        numbers = np.float32 if bits == "byte" else np.float16
        scale = small.scale.astype(numbers)
        sign = 128 if bits == "byte" else 8
        unsigned = small.codes.view(np.uint8) ^ np.uint8(0x80 if bits == "byte" else 0x88)
        behind = np.stack([scale, -sign * scale], axis=1).astype(numbers).view(np.uint8)
        repeat = np.arange(shape.rows) % len(weight)
        packed = torch.from_numpy(np.concatenate([unsigned, behind], axis=1)[repeat])
        scale = scale.astype(np.float32)[repeat]
        if shape.dtype.startswith("u"):
            table = lucid_onnx.QuantizedTable(unsigned[repeat], shape.dtype, shape.dim, scale, bias=-sign * scale)
        else:
            table = lucid_onnx.QuantizedTable(small.codes[repeat], shape.dtype, shape.dim, scale)
        model = lucid_onnx.build_quantized_model(table, mode=shape.mode)
        session = lucid_onnx.InferenceSession(model, session_options=options(shape.threads))
        pool = getattr(torch.ops.quantized, f"embedding_bag_{bits}_rowwise_offsets")
        return {
            "torch": lambda batch: pool(packed, *tensors[batch], mode=0).numpy(),
            "run": running(session, feeds),
            "bound": binding(session, feeds, (shape.bags, shape.dim)),
        }

    def others(self, shape: Shape, feeds: list[Any], tensors: list[Any]) -> dict[str, Side]:
        import torch

        table, copy = self.tables(shape)
        module = torch.nn.EmbeddingBag(*table.shape, mode=shape.mode, _weight=copy)
        session = sessions_over(table, shape.mode, shape.threads, self.folder)
        portable = lucid_onnx.build_model(table, mode=shape.mode)
        without = lucid_onnx.InferenceSession(portable, native=False, session_options=options(shape.threads))
        sides = {
            "torch": eager(copy, tensors, shape.mode),
            "run": running(session, feeds),
            "portable, no library": running(without, feeds),
        }
        for name, dynamo in (("dynamo export", True), ("legacy export", False)):
            graph = exported(module, tensors[0], dynamo=dynamo)
            theirs = ort.InferenceSession(graph, options(shape.threads), providers=["CPUExecutionProvider"])
            names = [i.name for i in theirs.get_inputs()]
            sides[name] = running(theirs, [dict(zip(names, feed.values(), strict=True)) for feed in feeds])
        if importlib.util.find_spec("openvino") is not None:
            sides["OpenVINO"] = openvino_side(table, feeds, shape.threads)
        return sides


def openvino_side(table: np.ndarray, feeds: list[dict[str, np.ndarray]], threads: int) -> Side:
    import openvino
    from openvino import opset3

    indices = opset3.parameter([-1], np.int64, "indices")
    offsets = opset3.parameter([-1], np.int64, "offsets")
    weight = openvino.op.Constant(openvino.Tensor(table, shared_memory=True))
    node = opset3.embedding_bag_offsets_sum(weight, indices, offsets)
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(openvino.Model([node], [indices, offsets]), "CPU", settings)
    request = compiled.create_infer_request()

    def call(batch: int) -> np.ndarray:
        feed = feeds[batch]
        return request.infer([feed["indices"], feed["offsets"]], share_inputs=True)[0]  # type: ignore[no-any-return]

    return call


# ---- The whole run.


def machine() -> dict[str, Any]:
    """What a figure depends on besides its shape."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu
        )
    library = hashlib.sha256(Path(lucid_onnx.get_library_path()).read_bytes()).hexdigest()[:12]
    versions = {"onnxruntime": ort.__version__, "torch": torch.__version__, "lucid_onnx": lucid_onnx.__version__}
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        versions["openvino"] = openvino.__version__
    return {"cpu": cpu, "cores": os.cpu_count(), "library": library, **versions}


def read(path: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished shapes of this machine and these versions, by label. A last line that was cut off is taken away."""
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}:{number}: not JSON: {error}") from error
        if row.get("machine") == about:
            found[row["label"]] = row
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summarise(rows: list[dict[str, Any]], console: Console) -> None:
    """Geometric means per table size, and the single shapes of quantized tables, dtypes and other runtimes."""
    table = Table("table", "threads", "shapes", "run / torch", "bound / torch", "run / torch, pages",
                  "bound / torch, pages", "ceiling reached, B >= 512", title="geometric means")  # fmt: skip
    even = [r for r in rows if r["group"] in ("grid", "threads", "uneven")]
    for mib, threads in sorted({(r["table_mib"], r["threads"]) for r in even}):
        mine = [r for r in even if (r["table_mib"], r["threads"]) == (mib, threads)]
        times = [{n: s["median"] for n, s in r["sides"].items()} for r in mine]
        cells = [
            f"{geometric_mean(t[base] / t[side] for t in times):.2f}x"
            for base in ("torch", "torch, pages")
            for side in ("run", "bound")
        ]
        large = [r for r in mine if r["bags"] >= 512 and r["length"] >= 20 and "bare loop" in r["sides"]]
        share = geometric_mean(r["gb_per_s"]["bound"] / r["gb_per_s"]["bare loop"] for r in large)
        table.add_row(f"{mib} MiB", str(threads), str(len(mine)), *cells, "-" if math.isnan(share) else f"{share:.2f}")
    if even:
        console.print(table)
    single = Table("shape", "side", "median ms", "torch's time over it", title="single shapes")
    for row in rows:
        if row["group"] in ("dtypes", "others"):
            for name, side in row["sides"].items():
                ratio = f"{side['ratio']:.2f} ({side['low']:.2f} to {side['high']:.2f})"
                single.add_row(row["label"], name, f"{side['median'] * 1e3:.3f}", ratio)
    if single.row_count:
        console.print(single)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: torch's time over ours, by shape. Right: GB/s by row size, with the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    grid = [r for r in rows if r["group"] == "grid"]
    labels = sorted({(r["bags"] * r["length"], r["bags"], r["length"]) for r in grid})
    place = {(bags, length): i for i, (_, bags, length) in enumerate(labels)}
    colours = dict(zip(TABLES, ("tab:green", "tab:blue", "tab:red"), strict=True))
    for mib in sorted({r["table_mib"] for r in grid}):
        mine = [r for r in grid if r["table_mib"] == mib]
        shift = (TABLES.index(mib) - 1) * 0.2
        x = [place[r["bags"], r["length"]] + shift for r in mine]
        y = [r["sides"]["bound"]["ratio"] for r in mine]
        left.scatter(x, y, s=[8 + r["dim"] / 8 for r in mine], color=colours[mib], alpha=0.6, label=f"{mib} MiB table")
        big = sorted((r for r in mine if (r["bags"], r["length"]) == (512, 20)), key=lambda r: r["row_bytes"])
        sizes = [r["row_bytes"] for r in big]
        right.plot(sizes, [r["gb_per_s"]["bound"] for r in big], "o-", color=colours[mib], label=f"ours, {mib} MiB")
        right.plot(
            sizes,
            [r["gb_per_s"]["torch"] for r in big],
            "x--",
            color=colours[mib],
            alpha=0.6,
            label=f"torch, {mib} MiB",
        )
        right.plot(
            sizes, [r["gb_per_s"]["bare loop"] for r in big], ":", color=colours[mib], label=f"bare loop, {mib} MiB"
        )
    left.axhline(1, color="black", linewidth=0.8)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_locator(ticker.LogLocator(base=2, subs=(1, 1.25, 1.5, 1.75)))
    left.set_xlim(-0.5, len(labels) - 0.5)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    left.set_xticks(range(len(labels)), [f"{bags} x {length}" for _, bags, length in labels], rotation=45, ha="right")
    left.set_xlabel("bags x length; larger dots are wider rows")
    left.set_title("torch's time over ours (io-binding), float32 sum, 1 thread")
    left.legend()
    right.set_xscale("log", base=2)
    right.set_xlabel("bytes a row")
    right.set_ylabel("GB/s")
    right.set_title("rows read, 512 bags of 20, 1 thread")
    right.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller spread, without the 4 GB table")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="shapes whose label has all these words")
    parser.add_argument("--list", action="store_true", help="print the labels and exit")
    parser.add_argument("--turns", type=int, help="of every side; by default so many that a side takes half a second")
    parser.add_argument("--output", type=Path, default=Path("grid.jsonl"))
    parser.add_argument("--plot", type=Path, help="by default OUTPUT with .png for its ending")
    a = parser.parse_args()
    if a.turns is not None and a.turns < 1:
        parser.error(f"--turns {a.turns}: must be 1 or more")
    shapes = [s for s in spread(a.quick) if set(a.only) <= set(s.label.split())]
    if not shapes:
        parser.error(f"--only {' '.join(a.only)}: no such shape; see --list")
    if a.list:
        print("\n".join(shape.label for shape in shapes))
        return 0
    quiet_torch()
    console = Console()
    about = machine()
    done = read(a.output, about)
    waiting = [shape for shape in shapes if shape.label not in done]
    console.print(f"{len(shapes)} shapes, {len(shapes) - len(waiting)} of them in {a.output} already; {about['cpu']}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory(prefix="lucid_grid") as folder,
        open(a.output, "a") as file,
        Progress(*columns, console=console) as progress,
    ):
        bench = Bench(Path(folder), Ceiling(Path(folder)))
        task = progress.add_task("", total=len(waiting))
        for shape in waiting:
            progress.update(task, description=shape.label)
            row = {**bench.measure(shape, a.turns), "row_bytes": shape.row_bytes, "machine": about}
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[shape.label] = row
            progress.advance(task)
    rows = [done[shape.label] for shape in shapes]
    summarise(rows, console)
    if any(row["group"] == "grid" for row in rows):
        if importlib.util.find_spec("matplotlib") is None:
            console.print("matplotlib is not installed: no plot")
        else:
            target = a.plot or a.output.with_suffix(".png")
            plot(rows, target)
            console.print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
