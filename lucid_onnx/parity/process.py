"""A runtime in a process of its own: its answers, or how it died."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import wire


class CrashError(Exception):
    """The process ended, or sent something that is not an answer."""


class HangError(Exception):
    """The process did not answer in time, and was killed."""


class RefusalError(Exception):
    """The runtime raised an error; ``unsupported``: it does not claim to support this."""

    def __init__(self, message: str, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


class Worker:
    """Starts the process when it is needed, and again after a crash or a hang.

    Args:
        command: starts a process with the protocol of `lucid_onnx.parity.worker`.
        environment: variables, in addition to those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[Any] = queue.Queue()
        self._log: Any = None
        self.starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def hello(self, timeout: float) -> dict[str, Any]:
        """The runtime's "missing" and "version"."""
        return self._ask({"do": "hello"}, (), timeout)[0]

    def load(self, form: str, model: bytes, call: Mapping[str, Any] | None, timeout: float) -> float:
        """Load a program; returns the seconds it took."""
        header, _ = self._ask({"do": "load", "form": form, "call": call}, [model], timeout)
        return float(header["seconds"])

    def run(
        self, inputs: Mapping[str, np.ndarray], *, runs: int, seconds: float, timeout: float
    ) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
        """Returns the answer's header, and the outputs of the first run and of one that differed, if any did."""
        described, blobs = wire.describe(inputs)
        request = {"do": "run", "inputs": described, "runs": runs, "seconds": seconds}
        header, results = self._ask(request, blobs, timeout)
        try:
            count = len(header["outputs"])
            found = [list(wire.arrays(header["outputs"], results[:count]).values())]
            if "other" in header:
                found.append(list(wire.arrays(header["other"], results[count:]).values()))
        except (wire.BrokenFrameError, KeyError, TypeError) as error:
            raise CrashError(f"an invalid answer: {error}") from error
        return header, found

    def _ask(
        self, request: Mapping[str, Any], blobs: Sequence[bytes], timeout: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        # Written from a thread: a process that hangs does not read either.
        writer = threading.Thread(target=self._send, args=(process.stdin, request, blobs), daemon=True)
        writer.start()
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.stop(kill=True)
            raise HangError(f"no answer within {timeout:.0f} s") from None
        writer.join(timeout)
        if isinstance(answer, wire.BrokenFrameError) or answer is None:
            raise CrashError(self._died(answer))
        header, results = answer
        if "error" in header:
            raise RefusalError(str(header["error"]), bool(header.get("unsupported")))
        return header, results

    @staticmethod
    def _send(stream: Any, request: Mapping[str, Any], blobs: Sequence[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # it died; the missing answer tells
            wire.send(stream, request, blobs)

    def _start(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # `stop` closes it
        answers: queue.Queue[Any] = queue.Queue()
        self._answers = answers
        self._process = process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            start_new_session=os.name == "posix",
        )
        self.starts += 1

        def read() -> None:
            try:
                while (frame := wire.receive(process.stdout)) is not None:  # type: ignore[arg-type]
                    answers.put(frame)
                answers.put(None)
            except wire.BrokenFrameError as error:
                answers.put(error)
            except OSError:
                answers.put(None)
            finally:
                process.stdout.close()  # type: ignore[union-attr]

        threading.Thread(target=read, daemon=True).start()

    def _died(self, broken: wire.BrokenFrameError | None) -> str:
        process, self._process = self._process, None
        assert process is not None
        if broken is not None:
            _end(process, kill=True)
            return f"an invalid answer: {broken}"
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:
            _end(process, kill=True)
            return "closed its output but kept running"
        how = f"exit code {code}" if code >= 0 else _signal(-code)
        last = self._last_line()
        return f"{how}: {last}" if last else how

    def _last_line(self) -> str:
        """The last line on stderr that has a letter in it."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if any(c.isalpha() for c in line)), "")

    def stop(self, *, kill: bool = False) -> None:
        """End the process, if there is one. With ``kill``, kill it at once."""
        process, self._process = self._process, None
        if process is not None:
            _end(process, kill=kill)
        if self._log is not None:
            self._log.close()
            self._log = None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(process: subprocess.Popen[bytes], *, kill: bool) -> None:
    """End a process and whatever it started in its group; its output is closed by the thread that reads it."""
    if not kill:
        with contextlib.suppress(OSError, ValueError):
            assert process.stdin is not None
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    # Also after a normal end: a browser may be left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.kill()
    process.wait()
