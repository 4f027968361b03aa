"""Our CUDA kernels against torch's: python benchmarks/cuda.py LIBRARY [--what bags] [--quick] [--json FILE]

LIBRARY is liblucid_onnx_ops_cuda.so. Needs torch with CUDA and NumPy; the package need not be installed. On a machine
with a GPU, run in this order (none of it has been run yet):

    pip install '.[gpu,test]'                        # where nvcc is; torch with CUDA beside it
    pytest tests/test_cuda.py tests/test_cuda_collection.py tests/test_cuda_gradient.py -k gpu
    nox -s cuda                                      # the same, and under compute-sanitizer
    library=$(python -c 'import lucid_onnx.runtime.library as l; print(l.find_cuda_library())')
    python benchmarks/cuda.py "$library" --what bags --quick --json bags.json
    python benchmarks/cuda.py "$library" --what collections --json collections.json
    python benchmarks/cuda.py "$library" --what gradients --json gradients.json

The results of every shape are compared first. Then ours, torch.nn.functional.embedding_bag on the GPU, and a
copy take turns, timed by CUDA events over back-to-back calls (torch's calls are recorded in a CUDA graph, so that
Python's time is in neither). Every call has fresh indices. GB/s counts the bytes that must move: the rows that are
read, indices, offsets and results; for the copy, both ways.

A collection (--what collections) is one call of ours, ragged or packed, against torch's embedding_bag a table and a
cat, as CUDA graphs. A gradient (--what gradients) is ours against torch's backward alone, timed by events around
back-to-back calls (autograd is not recorded, so torch's time has the host's part where that is longer than the GPU's).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

BATCHES = 8
ERROR_BYTES = 56  # sizeof(LucidBoundsError)
DTYPES = {"float32": (0, torch.float32), "float16": (1, torch.float16), "bfloat16": (2, torch.bfloat16)}
#: Bytes of a copy, far beyond what the L2 cache holds.
COPY_BYTES = 2 << 30

_POINTERS = ("weight", "indices", "offsets", "per_sample_weights", "output", "scale", "zero_point", "bias")
_INTS = (
    "dtype", "index_type", "offset_type", "mode", "indices_rank", "include_last_offset",
    "scale_type", "scale_stride", "output_type", "row_stride", "negative", "divisor",
)  # fmt: skip


class Args(ctypes.Structure):
    """EmbeddingBagArgs, see cpp_ops/c_api.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("weight_shape", ctypes.c_int64 * 2),
        ("indices_shape", ctypes.c_int64 * 2),
        ("num_offsets", ctypes.c_int64),
        ("max_norm", ctypes.c_double),
        ("norm_type", ctypes.c_double),
        ("padding_idx", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _INTS),
    )


class CollectionArgs(ctypes.Structure):
    """EmbeddingBagCollectionArgs, see cpp_ops/c_api.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        ("tables", ctypes.POINTER(Args)),
        ("num_tables", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("packed", ctypes.c_int64),
    )


class GradArgs(ctypes.Structure):
    """EmbeddingBagGradArgs, see cpp_ops/c_api.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        ("forward", Args),
        *((n, ctypes.c_void_p) for n in ("grad_output", "grad_weight", "rows", "values", "grad_per_sample_weights")),
        ("grad_output_shape", ctypes.c_int64 * 2),
        ("num_entries", ctypes.c_int64),
        ("sparse", ctypes.c_int32),
        ("scale_grad_by_freq", ctypes.c_int32),
    )


class Words(ctypes.Structure):
    """LucidCudaCollectionPlan and LucidCudaGradPlan: words, of which the last one is scratch_bytes."""

    _fields_ = (("word", ctypes.c_int64 * 10),)


class Plan(ctypes.Structure):
    """LucidCudaPlan, see cpp_ops/embedding_bag/cuda.h."""

    _fields_ = (
        *((f"word{i}", ctypes.c_int64) for i in range(16)),
        ("scratch_bytes", ctypes.c_int64),
        *((f"half{i}", ctypes.c_int32) for i in range(6)),
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    rows: int
    dim: int
    bags: int
    length: int
    dtype: str = "float32"
    mode: str = "sum"
    lengths: str = "even"  # or "zipf"
    indices: str = "uniform"  # or "zipf"
    weighted: bool = False

    @property
    def row_bytes(self) -> int:
        return self.dim * (4 if self.dtype == "float32" else 2)

    def __str__(self) -> str:
        extra = "".join(f" {x}" for x in (self.mode, self.dtype) if x not in ("sum", "float32"))
        extra += f" lengths:{self.lengths}" * (self.lengths != "even") + f" indices:{self.indices}" * (
            self.indices != "uniform"
        )
        table = self.rows * self.row_bytes
        size = f"{table / 2**30:.1f}G" if table >= 2**30 else f"{table / 2**20:.0f}M"
        return f"{size:>6} D={self.dim:<5} B={self.bags:<8} L={self.length:<6}{extra}{' weighted' * self.weighted}"


def bag_args(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    mode: str,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    ends: bool = False,
) -> Args:
    """A call's struct; ``ends``: offsets have the last one."""
    dtype = next(number for number, kind in DTYPES.values() if kind == weight.dtype)
    return Args(
        size_bytes=ctypes.sizeof(Args),
        weight=weight.data_ptr(),
        indices=indices.data_ptr(),
        offsets=offsets.data_ptr(),
        per_sample_weights=None if weights is None else weights.data_ptr(),
        output=None if out is None else out.data_ptr(),
        weight_shape=(ctypes.c_int64 * 2)(*weight.shape),
        indices_shape=(ctypes.c_int64 * 2)(len(indices), 0),
        num_offsets=len(offsets),
        max_norm=math.inf,
        norm_type=2.0,
        padding_idx=-(2**63),
        dtype=dtype,
        output_type=dtype,
        index_type=1,
        offset_type=1,
        mode=("sum", "mean", "max").index(mode),
        indices_rank=1,
        include_last_offset=ends,
    )


class Ours:
    """The library, called through its C interface."""

    def __init__(self, path: str) -> None:
        self.native = ctypes.CDLL(path)
        text = (ctypes.c_char_p, ctypes.c_size_t)
        pointer = ctypes.c_void_p
        self.native.lucid_cuda_plan.argtypes = (ctypes.POINTER(Args), ctypes.POINTER(Plan), *text)
        self.native.lucid_cuda_embedding_bag.argtypes = (
            ctypes.POINTER(Args), pointer, ctypes.c_int64, pointer, pointer, *text
        )  # fmt: skip
        self.native.lucid_cuda_refusal.argtypes = (pointer, *text)
        for name, args in (("collection", CollectionArgs), ("grad", GradArgs)):
            planned = getattr(self.native, f"lucid_cuda_plan_{name}")
            planned.argtypes = (ctypes.POINTER(args), ctypes.POINTER(Words), *text)
            launch = getattr(self.native, f"lucid_cuda_embedding_bag_{name}")
            launch.argtypes = (ctypes.POINTER(args), pointer, ctypes.c_int64, pointer, pointer, *text)
        self.error = torch.zeros(ERROR_BYTES, dtype=torch.uint8, device="cuda")
        self.message = ctypes.create_string_buffer(256)

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self.native, name)(*arguments, self.message, len(self.message)):
            raise RuntimeError(f"{name}: {self.message.value.decode()}")

    def prepare(
        self,
        shape: Shape,
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        out: torch.Tensor,
    ) -> Callable[[], None]:
        """A call without arguments that launches one batch on torch's current stream."""
        args = bag_args(weight, indices, offsets, shape.mode, weights, out)
        plan = Plan()
        self._call("lucid_cuda_plan", ctypes.byref(args), ctypes.byref(plan))
        scratch = torch.empty(max(plan.scratch_bytes, 1), dtype=torch.uint8, device="cuda")

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            self._call(
                "lucid_cuda_embedding_bag",
                ctypes.byref(args), scratch.data_ptr(), plan.scratch_bytes, self.error.data_ptr(), stream,
            )  # fmt: skip

        return launch

    def prepare_other(self, kind: str, args: CollectionArgs | GradArgs, scratch_word: int) -> Callable[[], None]:
        """The same for a "collection" or a "grad"."""
        plan = Words()
        self._call(f"lucid_cuda_plan_{kind}", ctypes.byref(args), ctypes.byref(plan))
        size = plan.word[scratch_word]
        scratch = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            self._call(
                f"lucid_cuda_embedding_bag_{kind}",
                ctypes.byref(args), scratch.data_ptr(), size, self.error.data_ptr(), stream,
            )  # fmt: skip

        return launch

    def check(self) -> None:
        self._call("lucid_cuda_refusal", self.error.cpu().numpy().tobytes())


def batches(shape: Shape, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices and offsets of each batch."""
    made = []
    for _ in range(BATCHES):
        if shape.lengths == "even":
            lengths = np.full(shape.bags, shape.length)
        else:
            lengths = random.zipf(1.5, shape.bags).clip(0, shape.bags * shape.length // 4)
            lengths = np.maximum(lengths * shape.bags * shape.length // max(int(lengths.sum()), 1), 1)
        count = int(lengths.sum())
        if shape.indices == "uniform":
            indices = random.integers(0, shape.rows, count)
        else:  # the rows that are often asked for lie anywhere
            indices = random.zipf(1.2, count) * 2654435761 % shape.rows
        made.append((indices.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)))
    return made


def seconds(run: Callable[[], object], turns: int) -> float:
    """Of one run, in the middle of a queue that never runs dry."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # while the host fills the queue
    begin.record()
    for _ in range(turns):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / turns


def graph_of(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """The calls, one after another, as a CUDA graph: the GPU does not wait for Python between them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def measure(ours: Ours, shape: Shape, table: torch.Tensor, rounds: int) -> dict[str, object]:
    """One shape: seconds of ours, torch and the copy, in turns, and what follows from them."""
    random = np.random.default_rng(0)
    weight = table[: shape.rows * shape.row_bytes].view(DTYPES[shape.dtype][1]).view(shape.rows, shape.dim)
    made = [tuple(torch.from_numpy(a).cuda() for a in batch) for batch in batches(shape, random)]
    count = statistics.mean(len(indices) for indices, _ in made)
    weights = [torch.rand(len(i), device="cuda").to(weight.dtype) if shape.weighted else None for i, _ in made]
    outputs = [torch.empty(shape.bags, shape.dim, dtype=weight.dtype, device="cuda") for _ in made]
    launches = [
        ours.prepare(shape, weight, i, o, w, out) for (i, o), w, out in zip(made, weights, outputs, strict=True)
    ]

    def theirs(batch: int) -> torch.Tensor:
        indices, offsets = made[batch]
        return torch.nn.functional.embedding_bag(
            indices, weight, offsets, mode=shape.mode, per_sample_weights=weights[batch]
        )

    for batch in (0, BATCHES - 1):
        launches[batch]()
        expected, got = theirs(batch).double(), outputs[batch].double()
        magnitude = shape.length if shape.lengths == "even" else count
        # Sums of numbers up to 1 in float32, in two orders; 16-bit results are rounded besides.
        bound = 1e-6 * magnitude + (0 if shape.dtype == "float32" else 2**-7) * expected.abs().clamp(min=1)
        worst = (got - expected).abs() - bound
        if bool((worst > 0).any()):
            raise AssertionError(f"{shape}: off by {float((got - expected).abs().max())}")
    ours.check()

    # As graphs of all batches, both: neither side's host is measured.
    run_ours = graph_of(launches)
    run_torch = graph_of([functools.partial(theirs, batch) for batch in range(BATCHES)])
    source = table[:COPY_BYTES]
    copy = functools.partial(torch.empty_like(source).copy_, source)
    turns = int(min(max(0.02 / max(seconds(run_ours, 1), 1e-6), 1), 50))
    torch_turns = int(min(max(0.05 / max(seconds(run_torch, 1), 1e-6), 1), 50))
    times: dict[str, list[float]] = {"ours": [], "torch": [], "copy": []}
    for _ in range(rounds):
        times["ours"].append(seconds(run_ours, turns) / BATCHES)
        times["torch"].append(seconds(run_torch, torch_turns) / BATCHES)
        times["copy"].append(seconds(copy, 4))
    median = {name: statistics.median(values) for name, values in times.items()}
    moved = count * (shape.row_bytes + 8 + (shape.row_bytes // shape.dim) * shape.weighted)
    moved += shape.bags * (8 + shape.row_bytes)
    ceiling = 2 * len(source) / median["copy"]
    return {
        **dataclasses.asdict(shape),
        "us": median["ours"] * 1e6,
        "torch_us": median["torch"] * 1e6,
        "times_torch": median["torch"] / median["ours"],
        "gb_per_s": moved / median["ours"] / 1e9,
        "copy_gb_per_s": ceiling / 1e9,
        "of_copy": moved / median["ours"] / ceiling,
    }


def summary(what: str, shape: Collection | Gradient, median: dict[str, float], moved: float) -> dict[str, object]:
    """What is told of a collection or a gradient."""
    return {
        **dataclasses.asdict(shape),
        "what": what,
        "us": median["ours"] * 1e6,
        "torch_us": median["torch"] * 1e6,
        "times_torch": median["torch"] / median["ours"],
        "gb_per_s": moved / median["ours"] / 1e9,
    }


# ---- Collections.


@dataclasses.dataclass(frozen=True)
class Collection:
    tables: int
    rows: int
    dims: tuple[int, ...]  # one after another, again and again
    bags: int
    length: int
    packed: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = "packed" if self.packed else "ragged"
        dims = "/".join(map(str, self.dims))
        return f"{self.tables} x [{self.rows}, {dims}] B={self.bags} L={self.length} {kind} {self.dtype}"


def measure_collection(ours: Ours, shape: Collection, rounds: int) -> dict[str, object]:
    """Seconds of one call of ours, and of torch's call a table and a cat."""
    random = torch.Generator("cuda").manual_seed(0)
    kind = DTYPES[shape.dtype][1]
    dims = [shape.dims[t % len(shape.dims)] for t in range(shape.tables)]
    weights = [torch.empty(shape.rows, d, dtype=kind, device="cuda").uniform_(-1, 1, generator=random) for d in dims]
    count = shape.bags * shape.length
    out = torch.empty(shape.bags, sum(dims), dtype=kind, device="cuda")
    starts = torch.arange(0, count, shape.length, device="cuda")
    calls, theirs, kept = [], [], []
    for _ in range(BATCHES):
        ids = torch.randint(0, shape.rows, (shape.tables, count), device="cuda", generator=random)
        ends = torch.arange(0, shape.tables * count + 1, shape.length, device="cuda")
        kept.append((ids, ends))
        if shape.packed:
            tables = [bag_args(w, ids.view(-1), ends, "sum", ends=True) for w in weights]
        else:
            tables = [bag_args(w, i, starts, "sum") for w, i in zip(weights, ids, strict=True)]
        array = (Args * len(tables))(*tables)
        args = CollectionArgs(ctypes.sizeof(CollectionArgs), array, len(tables), out.data_ptr(), shape.packed)
        calls.append(ours.prepare_other("collection", args, 6))

        def torchs(ids: torch.Tensor = ids) -> torch.Tensor:
            bag = torch.nn.functional.embedding_bag
            return torch.cat([bag(i, w, starts, mode="sum") for i, w in zip(ids, weights, strict=True)], dim=1)

        theirs.append(torchs)
    calls[0]()
    off = (out.double() - theirs[0]().double()).abs().max()
    ours.check()
    if float(off) > 1e-6 * shape.length + (0 if shape.dtype == "float32" else 2**-7 * shape.length):
        raise AssertionError(f"{shape}: off by {float(off)}")
    run_ours, run_torch = graph_of(calls), graph_of(theirs)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(rounds):
        times["ours"].append(seconds(run_ours, 10) / BATCHES)
        times["torch"].append(seconds(run_torch, 10) / BATCHES)
    median = {name: statistics.median(values) for name, values in times.items()}
    moved = count * sum(d * kind.itemsize + 8 for d in dims) + out.numel() * kind.itemsize
    return summary("collection", shape, median, moved)


def collections(quick: bool) -> list[Collection]:
    """What a recommender has: 26 tables of 64, and others around it."""
    found = [Collection(26, 50_000, (64,), bags, 10, packed) for bags in (128, 8192) for packed in (False, True)]
    if not quick:
        found += [Collection(26, 1_000_000, (64,), 8192, 20, packed) for packed in (False, True)]
        found += [Collection(100, 100_000, (16, 32, 64, 128), 2048, 10, packed) for packed in (False, True)]
        found += [Collection(8, 100_000, (64,), 2048, 10), Collection(26, 50_000, (64,), 8192, 10, dtype="float16")]
        found += [Collection(26, 50_000, (60, 64, 50), 8192, 10), Collection(1000, 1000, (16,), 256, 5, packed=True)]
    return found


# ---- Gradients.


@dataclasses.dataclass(frozen=True)
class Gradient:
    rows: int
    dim: int
    bags: int
    length: int
    mode: str = "sum"
    sparse: bool = False
    indices: str = "uniform"  # or "zipf"

    def __str__(self) -> str:
        kind = "sparse" if self.sparse else "dense"
        return f"[{self.rows}, {self.dim}] B={self.bags} L={self.length} {self.mode} {kind} {self.indices}"


def measure_gradient(ours: Ours, shape: Gradient, rounds: int) -> dict[str, object]:
    """Seconds of our gradient and of torch's backward."""
    random = np.random.default_rng(0)
    count = shape.bags * shape.length
    weight = torch.empty(shape.rows, shape.dim, device="cuda").uniform_(-1, 1).requires_grad_()
    grad = torch.empty(shape.bags, shape.dim, device="cuda").uniform_(-1, 1)
    starts = torch.arange(0, count, shape.length, device="cuda")
    dense = None if shape.sparse else torch.empty_like(weight, requires_grad=False)
    rows = torch.empty(count, dtype=torch.int64, device="cuda")
    values = torch.empty(count, shape.dim, device="cuda")
    calls, outputs, kept = [], [], []
    for _ in range(BATCHES):
        made = random.integers(0, shape.rows, count)
        if shape.indices == "zipf":
            made = random.zipf(1.2, count) * 2654435761 % shape.rows
        ids = torch.from_numpy(made.astype(np.int64)).cuda()
        kept.append(ids)
        args = GradArgs(
            size_bytes=ctypes.sizeof(GradArgs),
            forward=bag_args(weight, ids, starts, shape.mode),
            grad_output=grad.data_ptr(),
            grad_weight=None if dense is None else dense.data_ptr(),
            rows=rows.data_ptr(),
            values=values.data_ptr(),
            grad_output_shape=(ctypes.c_int64 * 2)(*grad.shape),
            num_entries=count,
            sparse=shape.sparse,
        )
        calls.append(ours.prepare_other("grad", args, 9))
        outputs.append(torch.nn.functional.embedding_bag(ids, weight, starts, mode=shape.mode, sparse=shape.sparse))

    def theirs(batch: int) -> torch.Tensor:
        return torch.autograd.grad(outputs[batch], weight, grad, retain_graph=True)[0]

    calls[0]()
    got = torch.sparse_coo_tensor(rows[None], values, weight.shape).to_dense() if dense is None else dense
    expected = theirs(0)
    expected = expected.to_dense() if expected.is_sparse else expected
    ours.check()
    # Sums of numbers up to 1 in float32, in two orders.
    most = int(torch.bincount(kept[0], minlength=1).max())
    off = float((got.double() - expected.double()).abs().max())
    if off > 1e-6 * most:
        raise AssertionError(f"{shape}: off by {off}")

    def all_of(run: Callable[[int], object]) -> Callable[[], None]:
        def one_after_another() -> None:
            for batch in range(BATCHES):
                run(batch)

        return one_after_another

    run_ours, run_torch = graph_of(calls), all_of(theirs)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(rounds):
        times["ours"].append(seconds(run_ours, 5) / BATCHES)
        times["torch"].append(seconds(run_torch, 5) / BATCHES)
    median = {name: statistics.median(values) for name, values in times.items()}
    written = count * (shape.dim * 4 + 8) if shape.sparse else shape.rows * shape.dim * 4
    moved = count * (shape.dim * 4 + 8) + written
    return summary("gradient", shape, median, moved)


def gradients(quick: bool) -> list[Gradient]:
    """Tables that are dense in positions and tables that are not, rows that all look up, and each mode."""
    found = [Gradient(50_000, 64, 2048, 20, sparse=sparse) for sparse in (False, True)]
    found += [Gradient(50_000, 64, 2048, 20, mode=mode) for mode in ("mean", "max")]
    if not quick:
        found += [Gradient(1_000_000, 64, 8192, 20, sparse=sparse, indices=i)
                  for sparse in (False, True) for i in ("uniform", "zipf")]  # fmt: skip
        found += [Gradient(1_000_000, 128, 65536, 20), Gradient(10_000_000, 64, 2048, 20), Gradient(100, 64, 8192, 20)]
    return found


def report(shape: object, found: dict[str, object]) -> None:
    print(
        f"{shape!s:<70} {found['us']:10.1f} us {found['torch_us']:10.1f} us {found['times_torch']:6.2f}x torch "
        f"{found['gb_per_s']:7.0f} GB/s",
        flush=True,
    )


def shapes(quick: bool, most_bytes: int) -> list[Shape]:
    """Dimensions 16 to 1024, lengths 1 to 1000, tables from what the L2 holds to 20 GB, even and skewed."""
    dims = (16, 64, 128, 1024) if quick else (16, 32, 64, 128, 256, 512, 1024)
    lengths = (1, 20, 1000) if quick else (1, 5, 20, 100, 1000)
    tables = (10 << 20, 4 << 30) if quick else (10 << 20, 1 << 30, 20 << 30)
    found = []
    for size in tables:
        for dim in dims:
            for length in lengths:
                # 256 MiB of rows, or a call of a few microseconds.
                for work in (256 << 20,) if quick else (256 << 20, 4 << 20):
                    bags = max(work // (dim * 4 * length), 1)
                    found.append(Shape(min(size, most_bytes) // (dim * 4), dim, bags, length))
    big = min(4 << 30, most_bytes)
    for dtype in ("float16", "bfloat16"):
        found += [Shape(big // (d * 2), d, (256 << 20) // (d * 40), 20, dtype) for d in (64, 128, 256)]
    found += [Shape(big // 256, 64, 50000, 20, mode=mode) for mode in ("mean", "max")]
    found += [Shape(big // 256, 64, 50000, 20, weighted=True)]
    found += [
        Shape(big // 256, 64, 50000, 20, lengths=a, indices=b) for a, b in (("zipf", "uniform"), ("even", "zipf"))
    ]
    found += [Shape(big // 400, 100, 30000, 20), Shape(big // 1200, 300, 10000, 20), Shape(big // 256, 64, 1, 100000)]
    found += [Shape(big // 256, 64, bags, length) for bags, length in ((1, 1), (1, 50), (64, 20), (2048, 20))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--what", choices=("all", "bags", "collections", "gradients"), default="all")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, under three minutes")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each side; 0: 5, or 3 with --quick")
    parser.add_argument("--rows-gb", type=float, default=20, help="the largest table, in GiB")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    ours = Ours(a.library)
    rounds = a.rounds or (3 if a.quick else 5)
    results: list[dict[str, object]] = []

    def keep(found: dict[str, object]) -> None:
        results.append(found)
        torch.cuda.empty_cache()
        if a.json:  # what there is, should time run out
            a.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "shapes": results}, indent=1))

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if a.what in ("all", "collections"):
        for collection in collections(a.quick):
            found = measure_collection(ours, collection, rounds)
            report(collection, found)
            keep(found)
    if a.what in ("all", "gradients"):
        for gradient in gradients(a.quick):
            found = measure_gradient(ours, gradient, rounds)
            report(gradient, found)
            keep(found)
    if a.what in ("all", "bags"):
        measure_bags(ours, shapes(a.quick, int(a.rows_gb * 2**30)), rounds, keep)
    return 0


def measure_bags(ours: Ours, todo: list[Shape], rounds: int, keep: Callable[[dict[str, object]], None]) -> None:
    """All shapes of bags, and what they say together."""
    most = max([COPY_BYTES, *(s.rows * s.row_bytes for s in todo)])
    # One memory for all tables: float32 in (-1, 1), whose bytes are 16-bit numbers too, but wild ones.
    table = torch.empty(most, dtype=torch.uint8, device="cuda")
    filled = ""
    results = []
    for shape in sorted(todo, key=lambda s: s.dtype):
        if filled != shape.dtype:
            numbers = table.view(DTYPES[shape.dtype][1])
            for part in numbers.split(1 << 28):
                part.uniform_(-1, 1)
            filled = shape.dtype
        found = measure(ours, shape, table, rounds)
        results.append(found)
        keep(found)
        print(
            f"{shape!s:<58} {found['us']:10.1f} us {found['torch_us']:10.1f} us {found['times_torch']:6.2f}x torch "
            f"{found['gb_per_s']:7.0f} GB/s {found['of_copy']:6.1%} of copy",
            flush=True,
        )
    ratios = [float(r["times_torch"]) for r in results]  # type: ignore[arg-type]
    bound = [r for r in results if int(r["rows"]) * int(r["dim"]) * 2 > 256 << 20]  # type: ignore[call-overload]
    bound = [r for r in bound if int(r["dim"]) >= 64 and int(r["length"]) >= 20 and float(r["us"]) > 50]  # type: ignore[call-overload,arg-type]
    print(f"times torch: {statistics.geometric_mean(ratios):.2f} in geometric mean, {min(ratios):.2f} at least")
    if bound:
        least = min(float(r["of_copy"]) for r in bound)  # type: ignore[arg-type]
        print(f"tables beyond the L2, rows of 256 bytes and more, 20 and more a bag: {least:.1%} of the copy at least")


if __name__ == "__main__":
    sys.exit(main())
