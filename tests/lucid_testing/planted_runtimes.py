"""Runtimes with a defect each, for `tests/test_parity.py`: what the comparison must find."""

from __future__ import annotations

import collections
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from lucid_onnx.parity.adapters.numpy_reference import RUNTIME
from lucid_onnx.parity.runtime import Program, UnsupportedError


class Good:
    """The NumPy reference itself."""

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def load(self, program: Program) -> Any:
        return RUNTIME.load(program)

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return RUNTIME.run(loaded, inputs)


class WrongNumber(Good):
    """One element of a large output is off by a little more than the tolerance."""

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        output = super().run(loaded, inputs)[0].copy()
        output[-1, -1] += np.float32(3e-6) * np.abs(inputs["weight"]).sum()
        return [output]


class Race(Good):
    """Every seventh run over inputs of a size ends in another bit, within the tolerance."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, ...], int] = collections.defaultdict(int)

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        shape = inputs["weight"].shape
        self.counts[shape] += 1
        output = super().run(loaded, inputs)[0].copy()
        if self.counts[shape] % 7 == 0:
            output[0, 0] = np.nextafter(output[0, 0], np.float32(np.inf))
        return [output]


class Crashing(Good):
    """Dies over a bad index, and over tables of one column."""

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        weight, indices = inputs["weight"], inputs["indices"]
        if weight.shape[1] == 1 or (indices < 0).any() or (indices >= len(weight)).any():
            print("about to write where I must not", file=sys.stderr, flush=True)
            os.abort()
        return super().run(loaded, inputs)


class Hanging(Good):
    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if inputs["weight"].shape[1] == 1:
            time.sleep(600)
        return super().run(loaded, inputs)


class Talking(Good):
    """Prints to stdout, where the frames are, from Python and from below it."""

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        print("hello", flush=True)
        os.write(1, b"LXP1 hello\n")
        return super().run(loaded, inputs)


class Wrapping(Good):
    """Takes a bad index for another row, whichever the table has."""

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        rows = max(len(inputs["weight"]), 1)
        return super().run(loaded, {**inputs, "indices": inputs["indices"] % rows})


class Refusing(Good):
    def load(self, program: Program) -> Any:
        if program.call is not None and program.call["mode"] == "max":
            raise UnsupportedError("no maxima")
        if program.call is not None and program.call["mode"] == "mean":
            raise RuntimeError("means are beyond me")
        return super().load(program)


class Poisoned(Good):
    """After an error it never works again."""

    broken = False

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.broken:
            raise RuntimeError("the session is gone")
        try:
            return super().run(loaded, inputs)
        except Exception:
            self.broken = True
            raise


class Spoilt(Good):
    """Rejects tables of one column, and does not answer after that."""

    spoilt = False

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.spoilt:
            time.sleep(600)
        if inputs["weight"].shape[1] == 1:
            self.spoilt = True
            raise RuntimeError("one column")
        return super().run(loaded, inputs)


class OtherDtype(Good):
    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [super().run(loaded, inputs)[0].astype(np.float64)]


class Absent(Good):
    def missing(self) -> str | None:
        return "nobody installed it"


GOOD, WRONG, RACE, CRASHING, HANGING = Good(), WrongNumber(), Race(), Crashing(), Hanging()
TALKING, WRAPPING, REFUSING, POISONED, OTHER_DTYPE = Talking(), Wrapping(), Refusing(), Poisoned(), OtherDtype()
ABSENT, SPOILT = Absent(), Spoilt()
