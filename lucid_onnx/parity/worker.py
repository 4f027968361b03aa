"""The process of one runtime, which its first argument names as MODULE:ATTRIBUTE: frames in and frames out.

Requests are ``{"do": "hello"}``, ``{"do": "load", "form", "call"}`` with the model as a blob, and ``{"do": "run",
"inputs", "runs", "seconds"}``. An answer with "error" is an error of the runtime; with "unsupported" as well,
the runtime does not claim to support the request.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from . import wire
from .runtime import Program, Runtime, UnsupportedError


def serve(runtime: Runtime, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    loaded: Any = None
    while (message := wire.receive(requests)) is not None:
        request, blobs = message
        header: dict[str, Any]
        results: list[bytes] = []
        try:
            if request["do"] == "hello":
                header = _hello(runtime)
            elif request["do"] == "load":
                loaded = None  # frees the memory of the one before, which must not be run if this load fails
                begin = time.perf_counter()
                loaded = runtime.load(Program(request["form"], blobs[0], request["call"]))
                header = {"seconds": time.perf_counter() - begin}
            else:
                inputs = wire.arrays(request["inputs"], blobs)
                header, results = _run(runtime, loaded, inputs, request["runs"], request["seconds"])
        except UnsupportedError as error:
            header = {"error": str(error), "unsupported": True}
        except Exception as error:  # a runtime may raise anything, which is reported
            header = {"error": f"{type(error).__name__}: {error}"}
        wire.send(answers, header, results)


def _hello(runtime: Runtime) -> dict[str, Any]:
    missing = runtime.missing()
    version = None if missing else runtime.version()
    return {"missing": missing, "version": version}


def _run(
    runtime: Runtime, loaded: Any, inputs: Mapping[str, np.ndarray], runs: int, seconds: float
) -> tuple[dict[str, Any], list[bytes]]:
    """Run up to ``runs`` times within ``seconds``, but at least twice if ``runs`` allows it.

    Returns the outputs of the first run and, if any other run had other bits, of the first such run.
    """
    first: dict[str, np.ndarray] = {}
    other: dict[str, np.ndarray] | None = None
    times: list[float] = []
    differing = 0
    start = time.perf_counter()
    while len(times) < runs and (len(times) < 2 or time.perf_counter() - start < seconds):
        begin = time.perf_counter()
        outputs = runtime.run(loaded, inputs)
        times.append(time.perf_counter() - begin)
        found = {str(k): np.asarray(output) for k, output in enumerate(outputs)}
        if len(times) == 1:
            first = {name: array.copy() for name, array in found.items()}
        elif not _same_bits(first, found):
            differing += 1
            if other is None:
                other = {name: array.copy() for name, array in found.items()}
    described, blobs = wire.describe(first)
    header = {"runs": len(times), "differing": differing, "seconds": statistics.median(times), "outputs": described}
    if other is not None:
        header["other"], more = wire.describe(other)
        blobs += more
    return header, blobs


def _same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def main() -> None:
    """Serve the runtime that the command line names, over stdin and stdout."""
    # What a library prints goes to stderr, not between the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, _, attribute = sys.argv[1].partition(":")
    serve(getattr(importlib.import_module(module), attribute), sys.stdin.buffer, answers)
