"""Every combination of what a call can say agrees with the reference, in every form.

CI runs arrays of strength 3: any three settings of an operator meet in some case. LUCID_COMBINATIONS=all runs the whole
product of EmbeddingBag's settings, and strength 4 of the others'.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnxruntime as ort
import pytest

import lucid_onnx
from lucid_onnx.builder import convert
from lucid_onnx.builder.conformance import AnyCase, case_model
from lucid_onnx.ops import OPERATORS
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import Ragged
from lucid_onnx.ops.embedding_bag_collection import spec as collections
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized
from lucid_testing.kernels import needs_library
from lucid_testing.models import attributes

ALL = os.environ.get("LUCID_COMBINATIONS") == "all"
Settings = dict[str, Any]

#: The kernels; the function's body; and nodes alone, written in each way: the last four without our library.
FORMS = ("native", "portable", "blocks", "padded", "loop")
BAGS: dict[str, Sequence[Any]] = {
    "mode": spec.MODES,
    "weighted": (False, True),
    "divisor": (None, "count", "weights"),
    "negative": ("refuse", "skip"),
    "padding_idx": (None, 2),
    "max_norm": (None, 1.2),
    "layout": ("ragged", "ends", "rows"),
    "dtype": ("float32", "float16", "bfloat16", "float64"),
}
PARAMETERS: dict[str, dict[str, Sequence[Any]]] = {
    "embedding_bag": {**BAGS, "index_dtype": ("int32", "int64"), "form": FORMS},
    "quantized_embedding_bag": {
        **BAGS,
        "dtype": ("float32", "float16"),
        "kind": tuple(quantized.CODES_TYPES),
        "second": (None, *quantized.SECOND_NUMBERS),
        "form": FORMS,
    },
    "embedding_bag_collection": {**BAGS, "layout": collections.LAYOUTS, "form": FORMS},
    "embedding_bag_grad": {**BAGS, "sparse": (False, True), "freq": (False, True), "form": FORMS[:3]},
}


def valid(settings: Settings) -> bool:
    """Whether the mode takes the weights."""
    mode = settings["mode"]
    return not settings["weighted"] or mode == "sum" or (mode != "max" and settings["divisor"] is not None)


def product(parameters: dict[str, Sequence[Any]]) -> Iterator[Settings]:
    for values in itertools.product(*parameters.values()):
        settings = dict(zip(parameters, values, strict=True))
        if valid(settings):
            yield settings


def covering(parameters: dict[str, Sequence[Any]], strength: int) -> list[Settings]:
    """Settings in which every valid choice of values for any ``strength`` parameters is found: greedily, a few drawn
    for each choice that is not there yet, and the one that has most others."""
    draws = random.Random(0)
    groups = list(itertools.combinations(parameters, strength))
    # The rule is about three parameters: what it leaves of each group, with them.
    ruled = {n: parameters[n] for n in ("mode", "weighted", "divisor")}
    missing: set[tuple[tuple[str, Any], ...]] = set()
    for group in groups:
        wanted = {**ruled, **{n: parameters[n] for n in group}}
        missing |= {tuple((n, s[n]) for n in group) for s in product(wanted)}
    ordered, found = sorted(missing, key=repr), []
    while missing:
        first = next(choice for choice in ordered if choice in missing)
        best: tuple[set[Any], Settings] = (set(), {})
        for _ in range(20):
            settings = {n: draws.choice(v) for n, v in parameters.items()} | dict(first)
            while not valid(settings):
                settings = {n: draws.choice(v) if n in ruled else settings[n] for n, v in parameters.items()}
                settings |= dict(first)
            new = {c for group in groups if (c := tuple((n, settings[n]) for n in group)) in missing}
            best = max(best, (new, settings), key=lambda entry: len(entry[0]))
        missing -= best[0]
        found.append(best[1])
        ordered = [choice for choice in ordered if choice in missing]
    return found


def test_a_covering_array_covers() -> None:
    parameters = PARAMETERS["embedding_bag_grad"]
    found = covering(parameters, 3)
    assert all(map(valid, found))
    for names in (("mode", "divisor", "form"), ("weighted", "dtype", "sparse"), ("layout", "max_norm", "freq")):
        expected = {tuple(s[n] for n in names) for s in product(parameters)}
        assert {tuple(s[n] for n in names) for s in found} == expected
    assert len(found) < 0.02 * sum(1 for _ in product(parameters))


MAKERS: dict[str, Callable[..., AnyCase]] = {
    "embedding_bag": lambda name, s: OPERATORS["embedding_bag"].cases.make(name, **s),
    "quantized_embedding_bag": lambda name, s: OPERATORS["quantized_embedding_bag"].cases.make(
        name, s.pop("kind"), s.pop("second"), **s
    ),
    "embedding_bag_collection": lambda name, s: OPERATORS["embedding_bag_collection"].cases.make(
        name, s.pop("layout"), dims=(4, 9), **s
    ),
    "embedding_bag_grad": lambda name, s: OPERATORS["embedding_bag_grad"].cases.make(name, **s),
}
#: Bags of no position, one, and more than a block has; with "rows" all are of the first length.
LENGTHS = (6, 0, 1, 70, 3)


def run(operator: str, settings: Settings) -> None:
    """A case in a form, beside the reference."""
    given = dict(settings)
    form = given.pop("form")
    if given["dtype"] == "bfloat16" and operator == "embedding_bag" and form == "native":
        given["lengths"] = (1030, *LENGTHS)  # longer than a piece, once in a while
    case = MAKERS[operator](repr(sorted(settings.items(), key=repr)), {"lengths": LENGTHS, **given})
    model = case_model(case, form if form in ("native", "portable") else "native")
    if form not in ("native", "portable"):
        longest = max(LENGTHS) if form == "padded" else None
        convert(model, "standard", *([] if operator == "embedding_bag_grad" else [Ragged(form, longest)]))
    session = lucid_onnx.InferenceSession(model, native=form == "native", session_options=_options())
    case.check(*session.run(None, case.inputs))


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


@needs_library
@pytest.mark.timeout(7200 if ALL else 300)
@pytest.mark.parametrize("operator", list(PARAMETERS))
def test_every_combination_agrees_with_the_reference(operator: str) -> None:
    parameters = PARAMETERS[operator]
    whole = ALL and operator == "embedding_bag"
    count = 0
    for settings in product(parameters) if whole else covering(parameters, 4 if ALL else 3):
        try:
            run(operator, settings)
        except Exception as error:
            raise AssertionError(f"{operator}: {settings}") from error
        count += 1
    print(f"{operator}: {count} combinations")


def test_what_was_lowered_comes_back() -> None:
    """Any two settings of a bag, from nodes in each way; a divisor, where it is one."""
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    for settings in covering({**BAGS, "form": FORMS[2:]}, 2):
        given = dict(settings)
        form = given.pop("form")
        case = OPERATORS["embedding_bag"].cases.make("back", **given)
        model, native = case_model(case, "native"), case_model(case, "native")
        convert(model, "standard", Ragged(form, 8 if form == "padded" else None))
        report = lucid_onnx.fuse(model, form="native")
        (found,), (wanted,) = report.model.graph.node, native.graph.node
        expected = attributes(wanted)
        if not (given["weighted"] and given["mode"] in ("mean", "sqrtn")):
            expected["divisor"] = 0  # no node has a trace of it
        assert (found.op_type, attributes(found)) == (wanted.op_type, expected), settings
