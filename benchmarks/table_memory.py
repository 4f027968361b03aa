"""What each table_memory costs: python benchmarks/table_memory.py [--rows 4000000 --dim 64 --bags 2048 --length 20]

A served int8 table in external data. Each way has a process of its own, once with the file in the page cache and once
without ("cold": the kernel is asked to drop it). Times of the session's start and of its first, second and later
requests, each with fresh random indices, and how many pages were mapped (minor faults) or read (major faults) for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import lucid_onnx

WAYS = ("auto", "hugepage_copy", "inplace", "mmap", "without our library")
LATER = 40  # requests behind the first two, of which the last half counts


def drop(path: Path) -> None:
    """Ask for the file's pages to leave the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: Path, way: str, cold: bool, rows: int, bags: int, length: int) -> dict[str, Any]:
    random = np.random.default_rng(1)
    if cold:
        drop(path.with_name(path.name + ".data"))
    start = time.perf_counter()
    options: dict[str, Any] = {"native": False} if way == WAYS[-1] else {"table_memory": way}
    session = lucid_onnx.InferenceSession(path, **options)
    found: dict[str, Any] = {"start": time.perf_counter() - start}
    times = []
    for k in range(2 + LATER):
        feed = {"indices": random.integers(0, rows, bags * length), "offsets": np.arange(bags) * length}
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        if k < 2:
            found[f"faults {k}"] = after.ru_minflt - before.ru_minflt, after.ru_majflt - before.ru_majflt
    found["requests"] = times[0], times[1], statistics.median(times[2 + LATER // 2 :])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4_000_000), ("dim", 64), ("bags", 2048), ("length", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "WAY", "COLD"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one is not None:
        model, way, cold = a.one
        print(json.dumps(measure(Path(model), way, cold == "True", a.rows, a.bags, a.length)))
        return 0
    shape = [f"--{name}={getattr(a, name)}" for name in ("rows", "dim", "bags", "length")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.onnx"
        weight = np.random.default_rng(0).standard_normal((a.rows, a.dim), dtype=np.float32)
        table = lucid_onnx.QuantizedTable.quantize(weight, "int8")
        del weight
        lucid_onnx.save(lucid_onnx.build_quantized_model(table, mode="sum"), path, external_data=True)
        print(f"int8 {a.rows} x {a.dim}, {table.nbytes >> 20} MiB; {a.bags} bags of {a.length}; times in ms")
        print(f"{'':<30}{'start':>8}{'first':>10}{'second':>10}{'later':>8}   pages mapped, read by the first; second")
        for cold in (False, True):
            for way in WAYS:
                command = [sys.executable, __file__, *shape, "--one", str(path), way, str(cold)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout)
                times = "{:10.1f}{:10.1f}{:8.2f}".format(*(1e3 * t for t in found["requests"]))
                faults = "; ".join(f"{mapped}, {read}" for mapped, read in (found["faults 0"], found["faults 1"]))
                name = f"{way}, {'cold' if cold else 'in the page cache'}"
                print(f"{name:<38}{1e3 * found['start']:8.0f}{times}   {faults}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
