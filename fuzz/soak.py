"""Hours of requests in one process, whose memory and handles must stay as they are.

    python fuzz/soak.py --seconds 7200 --load 0.2

Several threads serve random requests: sessions that live as long as the process, in every form, for every operator and
for every ``table_memory``; sessions, files and rewritten models that are made and dropped; the functional calls; and
requests that have to be rejected. Every answer is compared with the reference.

Every ``--every`` seconds a line of JSON has what the process holds. It ends with exit code 1 if an answer was wrong, or
if memory, file descriptors, threads or copies of tables grew after the first quarter of the time (see `complaints`).
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import sessions as fuzz

import lucid_onnx
from lucid_onnx.runtime.session import TABLE_MEMORY

THREADS = 4  #: that serve
ALLOWED = 32 * 2**20  #: bytes of growth that may be the allocator's: in two hours 300 bytes a request or less
_BIG = (40_000, 64)  #: a float32 table of 10 MiB, above the 8 MiB from which on table_memory matters
#: How often each kind of request comes.
KINDS = {
    "serve": 600,
    "function": 120,
    "large": 120,
    "reject": 100,
    "limit": 20,
    "drop": 16,
    "file": 16,
    "rewrite": 8,
    "reload": 6,
}


class Soak:
    """What the process serves."""

    def __init__(self, seed: int, folder: Path, plans: int = 6 * len(fuzz.OPERATORS)) -> None:
        self.seed, self.folder = seed, folder
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        self._number = 0
        self.new = 1.0  #: how many functional calls have a plan of their own
        self._plans = [self._served(number) for number in range(plans)]
        path = self._big_file("big.onnx")
        self._big = [self._big_session(path, choice) for choice in TABLE_MEMORY]
        self._rows = self._table(0)
        options = ort.SessionOptions()
        options.add_session_config_entry("lucid.max_output_bytes", "4096")
        self._small = lucid_onnx.build_model(np.ones((10, 16), np.float32), mode="sum")
        self._limited = lucid_onnx.InferenceSession(self._small, options)

    def request(self, thread: int, number: int) -> None:
        """Serve one request; what is wrong with its answer goes to `wrong`."""
        r = np.random.RandomState([self.seed % 2**32, thread, number])
        weights = np.array(list(KINDS.values())) / sum(KINDS.values())
        kind = list(KINDS)[r.choice(len(KINDS), p=weights)]
        why = self.answer(kind, r)
        with self._lock:
            self.done[kind] += 1
            if why is not None:
                self.wrong.append(f"{kind}, thread {thread}, request {number}: {why}")
                print(self.wrong[-1], file=sys.stderr, flush=True)  # at once: the run may go on for hours

    def answer(self, kind: str, r: np.random.RandomState) -> str | None:
        """What is wrong with the answer to a request of a kind."""
        try:
            why: str | None = getattr(self, f"_{kind}")(r)
        except Exception:
            return traceback.format_exc()
        return why

    def next_plan(self) -> int:
        """The number of a plan that had no session yet."""
        with self._lock:
            self._number += 1
            return 1000 + self._number

    # ---- Sessions of random plans.

    def _served(self, number: int) -> tuple[Any, list[Any], list[Any]]:
        """A plan, its tables, and its sessions in every form."""
        plan = fuzz.plan_of(self.seed, number)
        r = np.random.RandomState([self.seed % 2**32, number, 2])
        tables = [fuzz.table_of(plan, r) for _ in plan.index_dtypes]
        # An arena would grow with each call that is the largest so far, for as long as there are such.
        return plan, tables, fuzz.sessions_of(plan, fuzz.call_of(plan, r, tables), arena=False)

    @staticmethod
    def _call(r: np.random.RandomState, plan: Any, tables: Sequence[Any], forms: Sequence[Any]) -> str | None:
        tables = tables if plan.constant else [fuzz.table_of(plan, r) for _ in tables]
        case = fuzz.call_of(plan, r, tables)
        try:
            expected = fuzz.expected_of(case)
        except fuzz.UndecidedError:
            return None
        why = fuzz.difference(case, expected, forms)
        return None if why is None else f"plan {plan.number}: {why}"

    def _serve(self, r: np.random.RandomState) -> str | None:
        plan, tables, forms = self._plans[r.randint(len(self._plans))]
        return self._call(r, plan, tables, [forms[r.randint(len(forms))]])

    def _drop(self, r: np.random.RandomState) -> str | None:
        plan, tables, forms = self._served(self.next_plan())
        return self._call(r, plan, tables, forms)

    def _reject(self, r: np.random.RandomState) -> str | None:
        """A call with an index out of range, of a session or as a function."""
        if r.random_sample() < 0.5:
            table = np.ones((7, 5), np.float32)
            try:
                lucid_onnx.embedding_bag([1, 7, 2], table, [0, 1], native=bool(r.randint(2)))
            except IndexError as error:
                return None if "= 7 is outside" in str(error) else str(error)
            return "an index out of range was taken"
        session = self._big[r.randint(len(self._big))]
        feeds = self._big_feeds(r)
        kind = r.randint(3)
        if kind == 0:
            feeds["indices"][-1] = _BIG[0] + r.randint(9)
        elif kind == 1:
            feeds["offsets"][-1] = len(feeds["indices"]) + 1
        else:
            feeds["offsets"] = feeds["offsets"][::-1].copy()
        try:
            session.run(None, feeds)
        except Exception as error:  # onnxruntime has an exception class per status code
            return None if ("indices[", "offsets[", "offsets[")[kind] in str(error) else str(error)
        return "a bad call was taken"

    def _limit(self, r: np.random.RandomState) -> str | None:
        """A call whose output is larger than the session allows, or just as large."""
        bags = 64 + int(r.randint(2))
        feeds = {"indices": np.zeros(1, np.int64), "offsets": np.zeros(bags, np.int64)}
        try:
            (got,) = self._limited.run(None, feeds)
        except Exception as error:  # as above
            return None if bags > 64 and "lucid.max_output_bytes" in str(error) else str(error)
        return None if bags == 64 and got.sum() == 16 else f"{bags} bags: got {got.shape}"

    # ---- Functional calls.

    def _function(self, r: np.random.RandomState) -> str | None:
        number = self.next_plan() if r.random_sample() < self.new else int(r.randint(20))
        # Their sessions have an arena, which is soon as large as it gets if bags are short.
        plan = dataclasses.replace(fuzz.plan_of(self.seed, number), ragged=fuzz.Ragged("padded", 40))
        case = fuzz.call_of(plan, r, [fuzz.table_of(plan, r) for _ in plan.index_dtypes], broken=0.0)
        try:
            expected = fuzz.expected_of(case)
        except fuzz.UndecidedError:
            return None
        got = call(case, form=("portable", "standard")[r.randint(2)], native=bool(r.randint(2)))
        with np.errstate(all="ignore"):
            found = fuzz.compare(got, expected)
        return None if found.kind == "equal" else f"plan {number}: {found.kind}, {found.where}"

    # ---- A large table, in every table_memory.

    @staticmethod
    def _table(number: int, rows: int = _BIG[0]) -> np.ndarray:
        """Whole numbers, so that float32 sums of few are exact."""
        return ((np.arange(rows * _BIG[1]) * 7919 + number) % 1009).astype(np.float32).reshape(rows, -1)

    def _big_file(self, name: str, number: int = 0) -> Path:
        model = lucid_onnx.build_model(self._table(number), mode="sum")
        lucid_onnx.save(model, self.folder / name, external_data=True)
        return self.folder / name

    @staticmethod
    def _big_session(path: Path, choice: str) -> Any:
        return lucid_onnx.InferenceSession(path, table_memory=choice)

    @staticmethod
    def _big_feeds(r: np.random.RandomState) -> dict[str, np.ndarray]:
        length = r.randint(1, 40)
        bags = r.randint(2, 60)
        indices = r.randint(0, _BIG[0], length * bags)
        return {"indices": indices, "offsets": np.arange(0, length * bags, length)}

    def _large(self, r: np.random.RandomState) -> str | None:
        return self._differs(self._big[r.randint(len(self._big))], self._big_feeds(r), self._rows)

    def _reload(self, r: np.random.RandomState) -> str | None:
        """A new session on the large file, or on another one that is written, read and removed."""
        choice = str(r.choice(TABLE_MEMORY))
        if r.random_sample() < 0.7:
            return self._differs(self._big_session(self.folder / "big.onnx", choice), self._big_feeds(r), self._rows)
        number = self.next_plan()
        path = self._big_file(f"{number}.onnx", number)
        why = self._differs(self._big_session(path, choice), self._big_feeds(r), self._table(number))
        for file in self.folder.glob(f"{number}.*"):
            file.unlink()
        return why

    @staticmethod
    def _differs(session: Any, feeds: dict[str, np.ndarray], rows: np.ndarray) -> str | None:
        (got,) = session.run(None, feeds)
        expected = np.add.reduceat(rows[feeds["indices"]], feeds["offsets"], axis=0)
        return None if np.array_equal(got, expected) else "a sum of rows is another one"

    # ---- Files and rewritten models.

    def _file(self, r: np.random.RandomState) -> str | None:
        """A model that is written, over an earlier one or not, and read again."""
        path = self.folder / f"file{r.randint(1000)}-{threading.get_ident()}.onnx"
        number = int(r.randint(100))
        for k in range(r.randint(1, 3)):
            table = self._table(number + k, 100)
            model = lucid_onnx.build_model(table, mode="sum", form=str(r.choice(["portable", "standard"])))
            lucid_onnx.save(model, path, external_data=bool(r.randint(2)))
        feeds = {"indices": r.randint(0, 100, 20), "offsets": np.arange(0, 20, 5)}
        why = self._differs(lucid_onnx.InferenceSession(path), feeds, table)
        lucid_onnx.InferenceSession(onnx.load(path))
        for file in self.folder.glob(f"{path.stem}.*"):
            file.unlink()
        return why

    def _rewrite(self, r: np.random.RandomState) -> str | None:
        """What fuse, lower and quantize make of a small model."""
        table = self._table(int(r.randint(100)), 100)
        model = lucid_onnx.build_model(table, mode="sum")
        lowered = lucid_onnx.lower(model, ragged=("pieces", "loop")[r.randint(2)])
        report = lucid_onnx.fuse(lowered)
        if len(report.fused) != 1:
            return f"fuse: {report}"
        feeds = {"indices": r.randint(0, 100, 20), "offsets": np.arange(0, 20, 5)}
        for one in (lowered, report.model):
            why = self._differs(lucid_onnx.InferenceSession(one), feeds, table)
            if why is not None:
                return why
        small = lucid_onnx.quantize(model, dtype=str(r.choice(["int8", "uint8", "int4", "uint4"]))).model
        (got,) = lucid_onnx.InferenceSession(small).run(None, feeds)
        expected = np.add.reduceat(table[feeds["indices"]], feeds["offsets"], axis=0)
        # Half a step for each of 5 rows: a row's largest number is below 1009, and int4 has 7 steps of it.
        return None if np.all(np.abs(got - expected) <= 5 * 0.51 * 1009 / 7) else "quantized: too far off"


def call(case: Any, *, form: Any, native: bool) -> list[np.ndarray]:
    """The outputs of the functional call of a case."""
    how: dict[str, Any] = {"form": form, "native": native}
    if isinstance(case, fuzz.collections_of_bags.Case):
        return [lucid_onnx.embedding_bag_collection(**case.call, **how)]
    how.update(case.keywords, per_sample_weights=case.per_sample_weights)
    if isinstance(case, fuzz.quantized.Case):
        a = case.attributes
        table = lucid_onnx.QuantizedTable(
            case.codes, a.codes_type, a.embedding_dim, case.scale, case.zero_point, case.bias
        )
        return [lucid_onnx.quantized_embedding_bag(case.indices, table, case.offsets, **how)]
    if isinstance(case, fuzz.bags.Case):
        return [lucid_onnx.embedding_bag(case.indices, case.weight, case.offsets, **how)]
    how["with_per_sample_weights"] = case.per_sample_weights is not None
    found = lucid_onnx.embedding_bag_grad(case.grad_output, case.indices, case.weight, case.offsets, **how)
    return list(found) if isinstance(found, tuple) else [found]


# ---- What the process holds.


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2(3) of glibc 2.33 and later returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *(
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ),
        )
    )


def live_bytes() -> int:
    """What is allocated and was not freed, in all arenas; 0 where the C library does not say.

    Memory that a process keeps but does not use, in the holes between allocations, is not in it.
    """
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _Mallinfo2
    found = ask()
    return int(found.uordblks + found.hblkhd)


def reading() -> dict[str, int]:
    """Bytes of memory and numbers of handles of this process."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss", "Anonymous"):
            found[name.lower()] = int(rest.split()[0]) * 1024
    found["live"] = live_bytes()
    found["fds"] = len(os.listdir("/proc/self/fd"))
    found["threads"] = len(os.listdir("/proc/self/task"))
    library = ctypes.CDLL(lucid_onnx.get_library_path())
    library.lucid_table_copies.restype = ctypes.c_int64
    found["copies"] = library.lucid_table_copies()
    return found


def complaints(readings: Sequence[dict[str, Any]]) -> list[str]:
    """What grew after the first quarter of the readings.

    Memory grew if a line through it rises by more than `ALLOWED` and four times that rise's standard error, or if its
    median rises so from one third to the last. Handles come and go with sessions: they grew if the fewest of the last
    third are more than the most that were seen in the first.
    """
    later = readings[len(readings) // 4 :]
    third = len(later) // 3
    if third < 2:
        return ["too few readings to see anything grow"]
    found = []
    seconds = np.array([reading["seconds"] for reading in later])
    for name in ("live", "anonymous", "pss"):
        values = np.array([reading[name] for reading in later], np.float64)
        slope, start = np.polyfit(seconds, values, 1)
        noise = float(np.std(values - (slope * seconds + start)))
        bound = ALLOWED + 4 * noise * np.sqrt(12 / len(later))
        rise = max(slope * (seconds[-1] - seconds[0]), np.median(values[-third:]) - np.median(values[:third]))
        if rise > bound:
            found.append(f"{name} grew by {rise / 2**20:.1f} MiB, allowed are {bound / 2**20:.1f}")
    for name in ("fds", "threads", "copies"):
        before = max(reading[name] for reading in later[:third])
        after = min(reading[name] for reading in later[-third:])
        if after > before:
            found.append(f"{name} grew from at most {before} to at least {after}")
    return found


# ---- The run.


def run(
    seed: int = 0,
    *,
    seconds: float = 60,
    load: float = 1.0,
    every: float = 10,
    threads: int = THREADS,
    plans: int = 6 * len(fuzz.OPERATORS),
    warm: int = 150,
    report: Callable[[dict[str, Any]], None] = lambda found: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Serve for so long: the readings, and what is wrong, which is nothing if all is well.

    Args:
        load: how much of a core the process may take, of all its threads together.
        plans: how many have sessions in every form that live as long as the process.
        warm: functional calls before the first reading; 128 of their sessions are kept.
        every: seconds from one reading to the next.
        report: is called with each reading.
    """
    ort.set_default_logger_severity(4)  # it would tell of every call that is rejected
    with tempfile.TemporaryDirectory(prefix="soak") as folder, fuzz._fast_powers():
        soak = Soak(seed, Path(folder), plans)
        r = np.random.RandomState(seed % 2**32)
        for kind in (*KINDS, *["function"] * warm):
            why = soak.answer(kind, r)
            if why is not None:
                return [], [f"{kind}, before the first reading: {why}"]
        soak.new = 0.05
        begin, cpu = time.monotonic(), time.process_time()
        stop = threading.Event()
        if load >= 1:
            load = float("inf")

        def serve(thread: int) -> None:
            number = 0
            while not stop.is_set() and len(soak.wrong) < 10:
                soak.request(thread, number)
                number += 1
                ahead = (time.process_time() - cpu) / load - (time.monotonic() - begin)
                stop.wait(max(0.0, min(ahead, 10.0)))

        servers = [threading.Thread(target=serve, args=(t,)) for t in range(threads)]
        for server in servers:
            server.start()
        readings = []
        try:
            while time.monotonic() - begin < seconds and len(soak.wrong) < 10:
                time.sleep(max(0.0, begin + (len(readings) + 1) * every - time.monotonic()))
                now = {
                    "seconds": round(time.monotonic() - begin, 1),
                    "requests": soak.done.total(),
                    "wrong": len(soak.wrong),
                    "cpu": round(time.process_time() - cpu, 1),
                    **reading(),
                }
                readings.append(now)
                report(now)
        finally:
            stop.set()
            for server in servers:
                server.join()
    return readings, soak.wrong + complaints(readings)


def draw(readings: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw memory and handles over the time."""
    from matplotlib import pyplot

    figure, (memory, handles) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    minutes = [reading["seconds"] / 60 for reading in readings]
    for name in ("rss", "pss", "anonymous"):
        memory.plot(minutes, [reading[name] / 2**20 for reading in readings], label=name)
    for name in ("threads", "fds", "copies"):
        handles.plot(minutes, [reading[name] for reading in readings], label=name)
    memory.set_ylabel("MiB")
    handles.set_xlabel("minutes")
    for axes in (memory, handles):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--load", type=float, default=1.0, help="of a core; 1 and more do not wait")
    parser.add_argument("--every", type=float, default=10, help="seconds from one reading to the next")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw the readings, with matplotlib")
    given = parser.parse_args(argv)
    readings, wrong = run(
        given.seed,
        seconds=given.seconds,
        load=given.load,
        every=given.every,
        threads=given.threads,
        report=lambda found: print(json.dumps(found), flush=True),
    )
    for why in wrong:
        print(why)
    if given.plot is not None:
        draw(readings, given.plot)
    print("all is well" if not wrong else f"{len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
