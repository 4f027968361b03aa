"""Bad input, and how a runtime handles it.

A probe is a good call with one thing wrong. The contract makes each of them an error. A graph of standard operators
cannot detect all of them, and other runtimes need not. An outcome is named by the result that the output equals: that
with the bad row read from the end of the table, as zeros, and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lucid_onnx.ops.embedding_bag import cases
from lucid_onnx.ops.embedding_bag.spec import Attributes

from . import work

#: The outcomes, and what they mean.
OUTCOMES = {
    "refuses": "an error, and the next call works",
    "refuses, then fails": "an error, after which a good call fails too",
    "wraps": "counts from the end of the table, as Python does",
    "zeros": "a row of zeros in its place",
    "clamps": "the nearest row of the table, or the nearest legal offset",
    "truncates": "the low 32 bits of the index",
    "ignores": "as if it were not there",
    "empty bags": "a bag that would end before it begins is empty",
    "garbage": "an output that none of these explains",
    "crash": "the process died",
    "hang": "no answer",
    "not run": "the good call did not run either",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """One bad call.

    Attributes:
        title: what is wrong.
        inputs: with the wrong thing in them.
        readings: possible outputs, by the outcome that each means.
        good: the call without the wrong thing, over the same model.
    """

    name: str
    title: str
    inputs: Mapping[str, np.ndarray]
    readings: Mapping[str, np.ndarray]
    good: work.Job


_ROWS, _DIM = 10, 5
_LENGTHS = (3, 0, 5, 1)


def all_probes() -> list[Probe]:
    """Every bad call, those over the same model in a row."""
    plain = cases.make("probe", mode="sum", rows=_ROWS, dim=_DIM, lengths=_LENGTHS)
    weighted = cases.make("probe_weights", mode="sum", rows=_ROWS, dim=_DIM, lengths=_LENGTHS, weighted=True)
    good = work.case_job(plain, "probe")
    found = [_index(plain, good, *probe) for probe in _INDICES]
    found += [_offsets(plain, good, *probe) for probe in _OFFSETS]
    table = dict(plain.inputs, weight=plain.weight[:0])
    found.append(
        Probe("no_rows", "a table without rows", table, {"zeros": np.zeros((len(_LENGTHS), _DIM), np.float32)}, good)
    )
    weights = weighted.per_sample_weights
    assert weights is not None
    found.append(
        Probe(
            "weights_short",
            "per_sample_weights one short",
            dict(weighted.inputs, per_sample_weights=weights[:-1]),
            {
                "zeros": _sum(weighted, weights=np.append(weights[:-1], np.float32(0))),
                "clamps": _sum(weighted, weights=np.append(weights[:-1], weights[-2])),
            },
            work.case_job(weighted, "probe"),
        )
    )
    padded = dataclasses.replace(plain, name="probe_padding", attributes=Attributes("sum", padding_idx=_ROWS))
    # Its good call is the same model over a table in which that padding is legal.
    larger = cases.make("probe_padding", mode="sum", rows=_ROWS + 1, dim=_DIM, lengths=_LENGTHS, padding_idx=_ROWS)
    found.append(
        Probe(
            "padding_outside",
            "padding_idx outside the table",
            padded.inputs,
            {"ignores": _sum(plain)},
            work.case_job(larger, "probe"),
        )
    )
    return found


#: name, title, the index, and the row that each reading has in its place (None: zeros).
_INDICES: tuple[tuple[str, str, int, dict[str, int | None]], ...] = (
    ("index_minus_1", "an index of -1", -1, {"wraps": _ROWS - 1, "zeros": None, "clamps": 0}),
    ("index_minus_V_1", "an index of -V - 1", -_ROWS - 1, {"wraps": _ROWS - 1, "zeros": None, "clamps": 0}),
    ("index_V", "an index of V", _ROWS, {"wraps": 0, "zeros": None, "clamps": _ROWS - 1}),
    (
        "index_far",
        "an index of 2^31 - 1",
        2**31 - 1,
        {"zeros": None, "clamps": _ROWS - 1, "wraps": (2**31 - 1) % _ROWS},
    ),
    ("index_2_32", "an index of 2^32 + 1", 2**32 + 1, {"truncates": 1, "zeros": None, "clamps": _ROWS - 1}),
)
_OFFSETS = (
    ("offsets_start", "offsets that start at 1", [1, 3, 3, 8]),
    ("offsets_decrease", "offsets that decrease", [0, 5, 3, 8]),
    ("offsets_past", "an offset past the indices", [0, 3, 3, 12]),
    ("offsets_negative", "a negative offset", [0, -2, 3, 8]),
)
_BAD_POSITION = 1


def _index(
    case: cases.Case, good: work.Job, name: str, title: str, index: int, readings: Mapping[str, int | None]
) -> Probe:
    indices = case.indices.copy()
    indices[_BAD_POSITION] = index
    outputs = {}
    for outcome, row in readings.items():
        weight = np.concatenate([case.weight, np.zeros((1, _DIM), np.float32)])
        replaced = indices.copy()
        replaced[_BAD_POSITION] = _ROWS if row is None else row
        outputs[outcome] = _sum(case, indices=replaced, weight=weight)
    return Probe(name, title, dict(case.inputs, indices=indices), outputs, good)


def _offsets(case: cases.Case, good: work.Job, name: str, title: str, values: list[int]) -> Probe:
    offsets = np.array(values, np.int64)
    count = len(case.indices)

    def pooled(starts: np.ndarray) -> np.ndarray:
        ends = np.append(starts[1:], count)
        rows = [case.weight[case.indices[a:b]].astype(np.float64).sum(0) for a, b in zip(starts, ends, strict=True)]
        return np.stack(rows).astype(np.float32)

    readings = {}
    clipped = np.clip(offsets, 0, count)
    if name == "offsets_start":  # its first position belongs to no bag
        readings["ignores"] = pooled(offsets)
    elif name == "offsets_decrease":
        readings["empty bags"] = pooled(offsets)
    else:
        readings["clamps"] = pooled(clipped)
    return Probe(name, title, dict(case.inputs, offsets=offsets), readings, good)


def _sum(case: cases.Case, **changed: Any) -> np.ndarray:
    """The reference's sum with some of the case's arrays replaced."""
    arrays = {**case.inputs, **{k: v for k, v in changed.items() if k != "weights"}}
    weights = changed.get("weights", case.per_sample_weights)
    fresh = dataclasses.replace(
        case,
        weight=arrays["weight"],
        indices=arrays["indices"],
        per_sample_weights=weights,
        attributes=Attributes("sum"),
    )
    return fresh.expected()


def read(probe: Probe, output: np.ndarray) -> str:
    """The outcome that an output means."""
    for outcome, expected in probe.readings.items():
        # float32 sums of few normal numbers in any order; readings differ by whole rows.
        if output.shape == expected.shape and np.allclose(output, expected, rtol=0, atol=1e-5):
            return outcome
    return "garbage"
