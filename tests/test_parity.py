"""`lucid-onnx parity`: it finds every planted defect, and what it reports of the installed runtimes is true."""

from __future__ import annotations

import dataclasses
import fnmatch
import html.parser
import itertools
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.cli import main
from lucid_onnx.ops.embedding_bag import cases as bag_cases
from lucid_onnx.ops.embedding_bag_grad import cases as gradient_cases
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized_cases
from lucid_onnx.parity import explain, markdown, matrix, measure, oracle, probes, suite, work
from lucid_onnx.parity import html as as_html
from lucid_onnx.parity import inputs as made_inputs
from lucid_onnx.parity.adapters import ENTRIES, Entry, javascript, python
from lucid_onnx.parity.explain import KNOWN, Known
from lucid_onnx.parity.report import FAILURES, STATUSES
from lucid_testing import planted_runtimes
from lucid_testing.models import bags_of_a_user

TESTS = Path(__file__).resolve().parent
CASES = ("sum_ragged_float32", "mean_ragged_float32", "max_ragged_float32", "sum_dim_1", "sum_dim_7")


def entry(name: str, **changed: Any) -> Entry:
    return dataclasses.replace(
        Entry(name.lower(), name.title(), ("call",), python(f"{planted_runtimes.__name__}:{name}")), **changed
    )


def jobs(*names: str) -> list[work.Job]:
    return [job for name in names for job in work.conformance(name)]


@pytest.fixture(scope="module")
def planted() -> matrix.Report:
    """All planted runtimes over a few cases, in one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS), prepend=":" if sys.platform != "win32" else ";")
        names = ("GOOD", "WRONG", "RACE", "CRASHING", "TALKING", "WRAPPING", "REFUSING", "POISONED", "OTHER_DTYPE")
        entries = [entry(name) for name in (*names, "ABSENT")]
        entries += [entry("HANGING", run_timeout=5.0), entry("SPOILT", run_timeout=5.0)]
        return matrix.run(entries, jobs(*CASES))


def cell(report: matrix.Report, runtime: str, job: str) -> matrix.Cell:
    (found,) = (c for c in report.cells if (c.runtime, c.job) == (runtime, job))
    return found


def outcomes(report: matrix.Report, runtime: str) -> dict[str, str]:
    return {o.probe: o.outcome for o in report.outcomes if o.runtime == runtime}


def test_a_good_runtime_is_equal_everywhere(planted: matrix.Report) -> None:
    for name in CASES:
        found = cell(planted, "good", name)
        assert found.status == "equal"
        assert found.runs == 20
        assert found.difference is not None
        assert found.difference.same_bits
        assert found.difference.max_ulp == 0
    assert set(outcomes(planted, "good").values()) == {"refuses"}
    assert len(outcomes(planted, "good")) == len(probes.all_probes())


def test_a_wrong_number_is_found(planted: matrix.Report) -> None:
    found = cell(planted, "wrong", "sum_dim_7")
    assert found.status == "differs"
    assert found.failed
    assert found.difference is not None
    assert found.difference.wrong == 1
    assert re.match(r"output\[2, 6\] = \S+, expected \S+ within \S+", found.note)


def test_a_race_within_the_tolerance_is_found(planted: matrix.Report) -> None:
    found = cell(planted, "race", "sum_dim_7")
    assert found.status == "unsteady"
    assert found.failed
    assert found.differing == 2  # every seventh of 20
    assert found.difference is not None
    assert found.difference.kind == "equal"
    assert found.difference.max_ulp is not None
    assert found.difference.max_ulp >= 1


def test_a_crash_is_a_result_and_not_an_end(planted: matrix.Report) -> None:
    found = cell(planted, "crashing", "sum_dim_1")
    assert found.status == "crashed"
    assert found.failed
    assert "about to write where I must not" in found.note
    assert "SIGABRT" in found.note or sys.platform == "win32"
    assert cell(planted, "crashing", "sum_dim_7").status == "equal"
    assert outcomes(planted, "crashing")["index_V"] == "crash"
    assert outcomes(planted, "crashing")["offsets_start"] == "refuses"
    (column,) = (c for c in planted.columns if c.runtime == "crashing")
    assert column.restarts >= 5


def test_a_hang_is_a_result_and_not_an_end(planted: matrix.Report) -> None:
    found = cell(planted, "hanging", "sum_dim_1")
    assert found.status == "hung"
    assert found.failed
    assert found.note == "no answer within 5 s"
    assert cell(planted, "hanging", "sum_dim_7").status == "equal"


def test_a_refusal_that_spoils_the_process_is_told_from_a_hang(planted: matrix.Report) -> None:
    found = {name: cell(planted, "spoilt", name) for name in CASES}
    assert found["sum_dim_1"].status == "refused"
    assert found["sum_dim_1"].note == "RuntimeError: one column After this error the next call did not return."
    assert {found[name].status for name in CASES if name != "sum_dim_1"} == {"equal"}


def test_what_a_runtime_prints_is_no_answer(planted: matrix.Report) -> None:
    assert {cell(planted, "talking", name).status for name in CASES} == {"equal"}


def test_bad_input_is_named_by_what_becomes_of_it(planted: matrix.Report) -> None:
    found = outcomes(planted, "wrapping")
    assert {found[n] for n in ("index_minus_1", "index_minus_V_1", "index_V")} == {"wraps"}
    assert found["index_far"] == "wraps"
    assert found["index_2_32"] == "garbage"  # (2^32 + 1) % 10 = 7: neither the low bits nor a neighbour
    assert found["offsets_decrease"] == "refuses"
    # What breaks over its first bad call says so once; after it, not even the good call runs.
    assert list(outcomes(planted, "poisoned").values()) == ["refuses, then fails"] + ["not run"] * 11


def test_refusals_are_no_failures(planted: matrix.Report) -> None:
    maximum, mean = (cell(planted, "refusing", f"{m}_ragged_float32") for m in ("max", "mean"))
    assert (maximum.status, maximum.note) == ("unsupported", "no maxima")
    assert (mean.status, mean.note) == ("refused", "RuntimeError: means are beyond me")
    assert not maximum.failed
    assert not mean.failed
    assert cell(planted, "refusing", "sum_dim_7").status == "equal"


def test_another_dtype_is_a_difference(planted: matrix.Report) -> None:
    found = cell(planted, "other_dtype", "sum_dim_7")
    assert (found.status, found.note) == ("differs", "output has dtype float64, expected float32")


def test_who_is_not_here_says_why(planted: matrix.Report) -> None:
    assert cell(planted, "absent", "sum_dim_7").status == "absent"
    (column,) = (c for c in planted.columns if c.runtime == "absent")
    assert (column.missing, column.version) == ("nobody installed it", None)


def test_a_worker_that_cannot_start_is_absent() -> None:
    broken = Entry("broken", "Broken", ("call",), python("no_such_module:RUNTIME"))
    report = matrix.run([broken], jobs("sum_dim_7"), bad_input=False)
    assert [c.status for c in report.cells] == ["absent"]
    assert "No module named 'no_such_module'" in str(report.columns[0].missing)


def test_time_that_is_up_and_cases_that_are_left_out_are_said() -> None:
    few = dataclasses.replace(ENTRIES["numpy"], sample_size=2, sample_reason="it is only an example")
    report = matrix.run([few], jobs(*CASES), limits=matrix.Limits(budget=0))
    up = ("not run", "Not run: its budget of 0 s is used up.")
    out = ("left out", "It runs 2 of 5 cases, evenly spread: it is only an example.")
    assert {c.job: (c.status, c.why) for c in report.cells} == dict(zip(CASES, (up, out, up, out, out), strict=True))
    assert {o.outcome for o in report.outcomes} == {"not run"}
    assert report.failures == []
    everything = matrix.run([few], jobs(*CASES), bad_input=False, limits=matrix.Limits(runs=1, every_case=True))
    assert {c.status for c in everything.cells} == {"equal"}


def test_a_form_that_is_never_taken_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":" if sys.platform != "win32" else ";")
    known = Known("refusing", "*", "refused", "It takes no means.", note="means are beyond me", whole_form=True)
    monkeypatch.setattr(explain, "KNOWN", (known,))
    report = matrix.run(
        [entry("REFUSING")],
        jobs("max_ragged_float32", "mean_r*s_float32", "mean_ragged_float32", "sum_dim_7"),
        bad_input=False,
    )
    maximum = cell(report, "refusing", "max_ragged_float32")
    assert (maximum.status, maximum.why) == ("unsupported", "no maxima.")
    first, second = (c for c in report.cells if c.job.startswith("mean"))
    assert first.note == "RuntimeError: means are beyond me"
    assert second.note == f"Not tried, as {first.job} was refused: {first.note}"
    # Nor is any other, from then on.
    later = report.cells[report.cells.index(second) :]
    assert any(c.job == "sum_dim_7" for c in later)
    assert {(c.status, c.why) for c in later} == {("refused", "It takes no means.")}


def test_all_outputs_of_a_case_are_compared() -> None:
    exact = (np.array([1.0, 2.0]), np.array([[3, 4]]), np.array([5.0]))
    case = types.SimpleNamespace(
        expected=lambda: tuple(e.astype(np.float32) if e.dtype == np.float64 else e for e in exact),
        exact=exact,
        tolerance=(np.float64(0.5), np.zeros((1, 2)), np.zeros(1)),
    )
    expected = work.case_expected(case)  # type: ignore[arg-type]
    right = [e.rounded for e in expected]
    assert measure.compare(right, expected).kind == "equal"
    assert measure.compare([right[0] + np.float32(0.4), *right[1:]], expected).kind == "equal"
    assert measure.compare([right[0], right[1] + 1, right[2]], expected).where == "output 1[0, 0] = 4, expected 3"
    assert measure.compare([*right[:2], right[2] * 2], expected).where.startswith("output 2[0] = 10, expected 5")
    assert measure.compare(right[:2], expected).kind == "count"


# ---- The runtimes that are here.


@pytest.fixture(scope="module")
def here(native: None) -> matrix.Report:
    """Those that a few seconds are enough for, over what they are known to differ in."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    names = ("numpy", "onnxruntime-native", "onnxruntime", "onnxruntime-cuda", "onnx-reference", "torch")
    found = jobs("*nan_inf", "mean_ragged_float16", "*slack_after*", "max_ragged_*", "int*_*", "sum_one_bag*", "grad_*")
    found += work.scale("scale_sum_one_bag*") + work.operators("function_*")
    return matrix.run([ENTRIES[n] for n in names], found, limits=matrix.Limits(runs=20, seconds=0.05))


@pytest.mark.parametrize("runtime", ["numpy", "onnxruntime-native", "onnxruntime", "onnx-reference"])
def test_what_we_promise_is_equal(here: matrix.Report, runtime: str) -> None:
    cells = [c for c in here.cells if c.runtime == runtime and c.form != "given"]
    assert len(cells) >= 17
    assert [c for c in cells if c.status != "equal"] == []


def test_native_kernels_refuse_all_bad_input(here: matrix.Report) -> None:
    found = [o for o in here.outcomes if o.runtime == "onnxruntime-native"]
    assert {(o.form, o.outcome) for o in found} == {("native", "refuses"), ("portable", "refuses")}


def test_standard_operators_refuse_what_the_readme_says(here: matrix.Report) -> None:
    for form in ("portable", "standard"):
        found = {o.probe: o.outcome for o in here.outcomes if (o.runtime, o.form) == ("onnxruntime", form)}
        assert {p for p, outcome in found.items() if outcome != "refuses"} == {"no_rows", "padding_outside"}
        assert (found["no_rows"], found["padding_outside"]) == ("zeros", "ignores")


def test_torchs_differences_are_found(here: matrix.Report) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    found = {c.job: c for c in here.cells if c.runtime == "torch"}
    assert found["max_ragged_float32"].status == "equal"
    maximum, mean = found["max_nan_inf"], found["mean_ragged_float16"]
    assert maximum.difference is not None
    assert (maximum.status, maximum.difference.kind) == ("differs", "NaN")
    assert mean.difference is not None
    assert mean.status == "differs"
    assert 1 < mean.difference.margin < 4  # a second rounding, and no more
    assert found["mean_slack_after_last_offset"].status == "differs"
    gradient, quantized = found["grad_weights_dense_float32"], found["int8_zero_point_mean_rows_float16"]
    assert (gradient.status, quantized.status) == ("differs", "differs")
    for status in ("differs", "refused"):
        assert all(c.why for c in found.values() if c.status == status)


def test_differences_of_functions_are_found(here: matrix.Report) -> None:
    """onnx.reference has both; ONNX Runtime has neither (any more), and the report says so."""
    found = {(c.runtime, c.job): c for c in here.cells if c.form == "given"}
    default, overload = (found["onnx-reference", f"function_{name}"] for name in ("default", "overload"))
    assert (default.status, overload.status) == ("refused", "differs")
    assert "onnx.reference ignores" in default.why
    assert "onnx.reference ignores" in overload.why
    assert found["onnxruntime", "function_default"].status == "equal"
    cell = found["onnxruntime", "function_overload"]
    release = tuple(map(int, here.columns[2].version.split(".")[:2]))  # type: ignore[union-attr]
    assert cell.status == ("equal" if release >= (1, 27) else "differs" if release >= (1, 18) else "refused")
    gone = [u for u in here.unseen if (u.runtime, u.witness) == ("onnxruntime", cell.job)]
    assert len(gone) == (2 if cell.status == "equal" else 0)  # what was before 1.27, and before 1.18
    assert all(u.gone for u in gone)


def in_torch(case: Any, **changed: Any) -> np.ndarray:
    pytest.importorskip("torch", reason="torch is not installed")
    from lucid_onnx.parity.adapters.torch_eager import RUNTIME

    program = work.case_job(case, "conformance").program("call")
    assert program is not None
    assert program.call is not None
    loaded = RUNTIME.load(dataclasses.replace(program, call={**program.call, **changed}))
    return np.asarray(RUNTIME.run(loaded, case.inputs)[0])


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_torchs_quantized_bags_sum_whatever_their_mode(mode: str) -> None:
    case = quantized_cases.make("sums", "int8", "bias", mode="sum")
    case.check(in_torch(case))
    case.check(in_torch(case, mode=mode))


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_torch_reads_a_column_more_than_an_odd_number_of_4_bits() -> None:
    case = quantized_cases.make("rows", "uint4", None, rows=4, mode="sum", lengths=(1, 1, 1))
    table = (np.arange(20).reshape(4, 5) % 16).astype(case.table.dtype)
    case = dataclasses.replace(case, table=table, scale=np.ones(4, np.float32), indices=np.arange(3))
    np.testing.assert_array_equal(in_torch(case), np.arange(18).reshape(3, 6) % 16)


def test_torch_divides_by_the_frequency_of_another_row() -> None:
    """Of the row at the place, among the sorted positions, that is this row's number among the rows that occur."""
    case = gradient_cases.all_cases()["grad_weights_dense_float32"]
    assert case.attributes.scale_grad_by_freq
    plain = dataclasses.replace(case, attributes=dataclasses.replace(case.attributes, scale_grad_by_freq=False))
    order = np.sort(case.indices)
    rows, counts = np.unique(order, return_counts=True)
    expected = plain.expected()[0]
    for number, row in enumerate(rows):
        expected[row] /= counts[rows == order[number]]
    np.testing.assert_allclose(in_torch(case), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["max_norm_p2_0_sum_float16", "max_norm_p2_0_mean_bfloat16", "everything_rows_bfloat16"]
)
def test_torch_writes_clipped_rows_back(name: str) -> None:
    """Its result has the bits of its result over a table that was clipped before."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from lucid_onnx.parity.adapters import torch_eager

    case = bag_cases.suite()[name]
    a = case.attributes
    table = torch_eager._tensor(case.weight)
    torch.embedding_renorm_(table, torch.from_numpy(np.unique(case.indices)), a.max_norm, a.norm_type)
    clipped = dataclasses.replace(
        case, weight=torch_eager._array(table), attributes=dataclasses.replace(a, max_norm=None)
    )
    assert in_torch(case).tobytes() == in_torch(clipped).tobytes()


def in_bfloat16(case: bag_cases.Case) -> np.ndarray:
    """A lowered bag whose every step is rounded to bfloat16, [B, D] float32."""

    def rounded(values: Any) -> np.ndarray:
        return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

    a, table, one = case.attributes, case.weight.astype(np.float32), np.float32(1)
    factors = np.ones((len(table), 1), np.float32)
    if a.max_norm is not None:
        squares = rounded(rounded(table * table).sum(1, dtype=np.float32, keepdims=True))
        norms, limit = rounded(np.sqrt(squares)), np.float32(a.max_norm)
        factors = np.where(norms > limit, rounded(limit * (one / (norms + np.float32(1e-7)))), one)
    indices, offsets = case.indices.ravel(), case.offsets
    if offsets is None:
        offsets = np.arange(case.indices.shape[0]) * case.indices.shape[1]
    bounds = [*offsets] if a.include_last_offset else [*offsets, len(indices)]
    weights = np.ones(len(indices), np.float32)
    if case.per_sample_weights is not None:
        weights = case.per_sample_weights.astype(np.float32).ravel()
    kept = np.ones(len(indices), bool) if a.padding_idx is None else indices != a.padding_idx % len(table)
    result = np.zeros((len(bounds) - 1, table.shape[1]), np.float32)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        at = np.arange(begin, end)[kept[begin:end]]
        if len(at):
            rows = rounded(table[indices[at]] * factors[indices[at]] * weights[at, None])
            result[i] = rows.max(0) if a.mode == "max" else rounded(rows.sum(0, dtype=np.float32))
        if a.mode == "mean":
            result[i] = rounded(result[i] * rounded(one / np.float32(max(1, len(at)))))
    return result


@pytest.mark.parametrize("name", fnmatch.filter(bag_cases.suite(), "*bfloat16"))
def test_what_openvino_computes_in_bfloat16(name: str) -> None:
    """Its numbers to the bit, which is what the sentence about them rests on."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    from lucid_onnx.parity.adapters.openvino import RUNTIME

    case = bag_cases.suite()[name]
    program = work.case_job(case, "conformance").program("standard")
    assert program is not None
    loaded = RUNTIME.load(program)
    if loaded.get_compiled_model().get_property("INFERENCE_PRECISION_HINT") != openvino.Type.bf16:
        pytest.skip("this CPU has no arithmetic in bfloat16")
    np.testing.assert_array_equal(RUNTIME.run(loaded, case.inputs)[0].astype(np.float32), in_bfloat16(case))


@pytest.fixture(scope="module")
def bags() -> list[str]:
    """The names of all cases."""
    return [*suite.names(), *work._large()]


def test_every_known_difference_names_somebody(bags: list[str]) -> None:
    cases = [*bags, *(job.name for job in work.operators())]
    for known in KNOWN:
        assert known.status in STATUSES
        assert any(fnmatch.fnmatchcase(name, known.runtimes) for name in ENTRIES)
        assert fnmatch.filter(cases, known.jobs)
        assert known.sentence.endswith(".")


@pytest.mark.parametrize("known", [k for k in KNOWN if k.witness], ids=lambda k: f"{k.runtimes} {k.witness} {k.status}")
def test_what_is_known_shows_or_is_unseen(known: Known) -> None:
    """A runtime that still does it is explained; of one that behaves, the report says so."""
    runtime = next(name for name in ENTRIES if fnmatch.fnmatchcase(name, known.runtimes))
    difference = measure.Difference(known.kinds[0], margin=1.5) if known.kinds else None
    form = known.forms[0] if known.forms else "call" if runtime == "torch" else "given"
    cell = matrix.Cell(known.witness, runtime, form, known.status, known.note, difference)
    cell = dataclasses.replace(cell, why=explain.why(cell))
    assert cell.why == known.sentence
    assert known.sentence not in [u.sentence for u in explain.unseen([cell])]
    behaves = dataclasses.replace(cell, status="equal", note="", difference=measure.Difference(), why="")
    gone = explain.Unseen(runtime, known.sentence, known.witness, not known.chance)
    assert gone in explain.unseen([behaves])
    for status in {"absent", "left out", "not run", "hung"} - {known.status}:  # which say nothing of it
        assert explain.unseen([dataclasses.replace(behaves, status=status)]) == []


def test_what_did_not_show_is_in_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":" if sys.platform != "win32" else ";")
    patterns = ("sum_dim_7", "differs", "It is wrong in seven columns.", ("value",))
    monkeypatch.setattr(
        explain,
        "KNOWN",
        (Known("good", *patterns, witness="sum_dim_7"), Known("wrong", *patterns, witness="sum_dim_7")),
    )
    report = matrix.run([entry("GOOD"), entry("WRONG")], jobs("sum_dim_7"), bad_input=False)
    assert report.unseen == (explain.Unseen("good", "It is wrong in seven columns.", "sum_dim_7", True),)
    assert report.failures == []
    assert "| Good | gone | `sum_dim_7` | It is wrong in seven columns. |" in markdown.page(report)
    assert "gone, by sum_dim_7" in Page(as_html.page(report)).text
    assert json.loads(json.dumps(report.as_dict()))["unseen"][0]["runtime"] == "good"


def test_what_is_known_explains_no_more() -> None:
    """torch rounds a 16-bit mean twice; a larger error than that is not explained by it."""
    for margin, known in ((2.0, True), (6.0, False)):
        difference = measure.Difference("value", same_bits=False, margin=margin, wrong=1, size=20)
        found = matrix.Cell("mean_ragged_float16", "torch", "call", "differs", difference=difference)
        assert bool(explain.why(found)) is known


@pytest.mark.parametrize(
    "runtime",
    ["numpy", "onnxruntime-native", "onnxruntime", "onnxruntime-node", "web-wasm-1", "web-wasm-4", "onnx-reference"],
)
def test_what_we_promise_has_no_excuse(runtime: str, bags: list[str]) -> None:
    """A bag that differs there fails: nothing that is known explains it away."""
    for known in KNOWN:
        if known.status in FAILURES and fnmatch.fnmatchcase(runtime, known.runtimes):
            assert not fnmatch.filter(bags, known.jobs), known


# ---- A user's model.


def test_inputs_are_made_for_what_reads_them() -> None:
    for seed in range(5):
        arrays = made_inputs.random_inputs(bags_of_a_user(), {}, seed)
        assert list(arrays) == ["ids", "starts", "bought", "dense"]
        assert {a.shape[0] for name, a in arrays.items() if name != "ids"} == {len(arrays["starts"])}
        assert arrays["ids"].min() >= 0
        assert arrays["ids"].max() < 30
        assert (arrays["ids"] == 3).any()  # padded positions too
        assert arrays["bought"].dtype == np.int32
        assert arrays["bought"].max() < 7
        lengths = np.diff(arrays["starts"], append=len(arrays["ids"]))
        assert arrays["starts"][0] == 0
        assert (lengths >= 0).all()
        assert lengths.max() >= 3 * np.median(lengths)


def test_given_inputs_are_kept_and_their_sizes_hold() -> None:
    given = {"starts": np.array([0, 1, 1]), "ids": np.array([5, 6])}
    arrays = made_inputs.random_inputs(bags_of_a_user(), given)
    assert arrays["starts"] is given["starts"]
    assert len(arrays["dense"]) == len(arrays["bought"]) == 3
    with pytest.raises(made_inputs.NoInputsError, match="input word: the model has no such input"):
        made_inputs.random_inputs(bags_of_a_user(), {"word": np.zeros(1)})


def test_the_oracle_is_the_reference() -> None:
    model = bags_of_a_user()
    arrays = made_inputs.random_inputs(model, {})
    tables = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    user = lucid_onnx.reference.embedding_bag(arrays["ids"], tables["users"], arrays["starts"], padding_idx=3)
    item = lucid_onnx.reference.embedding_bag(arrays["bought"], tables["items"], mode="max")
    expected = np.concatenate([user, item, arrays["dense"]], 1) @ tables["w"]
    np.testing.assert_allclose(oracle.outputs(model, arrays)[0], expected, rtol=1e-6)


def run(*arguments: object) -> int:
    return main(["parity", *map(str, arguments)])


def test_the_command_over_a_model(native: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx.save(bags_of_a_user(), tmp_path / "two.onnx")
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    runtimes = "onnxruntime-native,onnxruntime"
    code = run(tmp_path / "two.onnx", "--runtimes", runtimes, "--json", report, "--html", page)
    assert code == 0, capsys.readouterr()
    found = json.loads(report.read_text())
    assert {(c["runtime"], c["form"]) for c in found["cells"]} == {
        ("onnxruntime-native", "native"),
        ("onnxruntime-native", "portable"),
        ("onnxruntime", "portable"),
        ("onnxruntime", "standard"),
    }
    assert {c["status"] for c in found["cells"]} == {"equal"}
    assert len(found["rows"]) == suite.SETS
    assert "two, inputs 2" in page.read_text()


def test_the_command_fails_where_a_runtime_differs(
    native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":" if sys.platform != "win32" else ";")
    for name in ("WRONG", "GOOD", "CRASHING"):
        monkeypatch.setitem(ENTRIES, name.lower(), entry(name))  # type: ignore[arg-type]
    common = ("--no-bad-input", "--cases", "sum_dim_*", "--runtimes")
    assert run(*common, "good") == 0
    assert run(*common, "good,wrong") == 1
    assert "wrong, call, sum_dim_7: differs: output[2, 6]" in capsys.readouterr().out
    assert run(*common, "crashing") == 1
    assert "crashing, call, sum_dim_1: crashed: SIGABRT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runtimes", "numpi"), "--runtimes numpi: is not one of numpy, "),
        (("--cases", "no_such"), "--cases no_such: no case matches"),
        (("--tolerance", "1"), "--input and --tolerance need a MODEL"),
        (("--runs", "0"), "--runs 0: must be at least 1"),
        (("--html", "no/such/folder.html"), "--html no/such/folder.html: there is no directory no/such"),
        (("no.onnx",), "no.onnx: no such file"),
        (("text.onnx",), "text.onnx: not an ONNX model"),
        (("bag.onnx", "--cases", "sum*"), "--cases sum*: needs the conformance suite, but MODEL bag.onnx is given"),
        (("bag.onnx", "--input", "word=one.npy"), "bag.onnx: input word: the model has no such input"),
    ],
)
def test_what_the_command_refuses(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.onnx").write_text("hello")
    onnx.save(lucid_onnx.build_model(np.eye(3, dtype=np.float32)), "bag.onnx")
    np.save("one.npy", np.zeros(1))
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


# ---- The report.


class Page(html.parser.HTMLParser):
    """Tags that are left open, what is loaded from elsewhere, and the text."""

    VOID = ("meta", "input", "br", "line", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_whole_file(planted: matrix.Report) -> None:
    text = as_html.page(planted)
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(", text)
    for title in ("Good", "Crashing", "nobody installed it", "an index of -V - 1", "refuses, then fails"):
        assert title in page.text
    assert f"{len(planted.failures)} of these have no explanation" in page.text
    numbers = json.loads(re.findall(r"<script type=application/json id=data>(.*?)</script>", text, re.DOTALL)[0])
    assert len(numbers["cells"]) == len(planted.cells)


def test_the_page_shows_text_as_text(planted: matrix.Report) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    cells = tuple(dataclasses.replace(c, note=evil, why=evil if c.failed else "") for c in planted.cells)
    columns = tuple(dataclasses.replace(c, title=evil) for c in planted.columns)
    page = Page(as_html.page(dataclasses.replace(planted, cells=cells, columns=columns)))
    assert page.links == []
    assert page.open == []


def test_json_and_markdown_say_the_same(planted: matrix.Report) -> None:
    text = json.dumps(planted.as_dict(), allow_nan=False)
    assert len(json.loads(text)["cells"]) == len(planted.cells)
    lines = markdown.page(planted).splitlines()
    (crashing,) = (line for line in lines if line.startswith("| Crashing | 1 |"))
    assert [c.strip() for c in crashing.split("|")[4:12]] == ["4", "", "", "", "", "1", "", ""]
    (bad,) = (line for line in lines if line.startswith("| an index of V |"))
    assert "Good (call)" in bad
    assert "Crashing (call): crash" in bad


# ---- JavaScript.


def test_who_lacks_javascript_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(javascript.FOLDER, str(tmp_path))
    monkeypatch.setattr(javascript.shutil, "which", lambda name: "/bin/" + name)
    with pytest.raises(javascript.NotHereError, match="the folder javascript/ of lucid-onnx's sources was not found"):
        javascript.command("node")
    (tmp_path / "package.json").write_text('{"name": "lucid-onnx-javascript"}')
    with pytest.raises(javascript.NotHereError, match="npm ci --ignore-scripts"):
        javascript.command("node")
    (tmp_path / "node_modules" / "onnxruntime-web").mkdir(parents=True)
    assert javascript.command("node")[-1] == "node"
    monkeypatch.setenv(javascript.BROWSER, str(tmp_path / "none"))
    with pytest.raises(javascript.NotHereError, match="cannot be run"):
        javascript.command("wasm-1")
    monkeypatch.setattr(javascript.shutil, "which", lambda name: None)
    with pytest.raises(javascript.NotHereError, match="node is not installed"):
        javascript.command("node")


@pytest.mark.parametrize(("runtime", "form"), [("onnxruntime-node", "portable"), ("web-wasm-4", "standard")])
def test_javascript_gives_the_same_numbers(runtime: str, form: str) -> None:
    try:
        ENTRIES[runtime].command()
    except javascript.NotHereError as error:
        pytest.skip(str(error))
    one = dataclasses.replace(ENTRIES[runtime], forms=(form,))
    found = [*jobs("sum_ragged_float*", "max_nan_inf", "int4_bias*", "mean_rows_bfloat16"), *work.scale("*one_bag*")]
    report = matrix.run([one], found)
    if report.columns[0].missing:
        pytest.skip(f"{runtime}: {report.columns[0].missing}")
    statuses = {c.job: c.status for c in report.cells}
    assert statuses.pop("mean_rows_bfloat16") in ("refused", "unsupported")
    assert set(statuses.values()) == {"equal"}
    outcome = {o.probe: o.outcome for o in report.outcomes}
    assert (outcome["index_V"], outcome["offsets_past"]) == ("refuses", "refuses")
