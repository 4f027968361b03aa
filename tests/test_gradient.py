"""EmbeddingBagGrad against torch's autograd, against differences of the reference, and each form against the others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import reference as bags
from lucid_onnx.ops.embedding_bag import spec as bag_spec
from lucid_onnx.ops.embedding_bag_grad import cases, spec
from lucid_testing.graphs import unread
from lucid_testing.models import torch_keywords

ort = pytest.importorskip("onnxruntime")

CASES = cases.all_cases()
#: Those that run where a run is dear: one a mode, an input and an attribute that writes other nodes.
FEW = [
    *(f"grad_{mode}_{kind}" for mode in bag_spec.ATEN_MODES for kind in ("ragged_float16", "sparse_rows_float32")),
    *(f"grad_{mode}_{kind}everything_float32" for mode in bag_spec.ATEN_MODES for kind in ("ends_", "sparse_ends_")),
    *(f"grad_weights_{kind}_{dtype}" for kind in ("dense", "sparse") for dtype in ("bfloat16", "float64")),
    *(f"grad_{mode}_dense_{kind}" for mode in ("mean", "max") for kind in ("no_bags_ends", "no_rows", "no_columns")),
    *("grad_max_norm_pinf_dense_max", "grad_max_norm_p3_0_sparse_weights", "grad_max_nan_inf", "grad_max_ties"),
    *("grad_sum_sparse_no_indices", "grad_max_sparse_rows_0x3", "grad_max_norm_p2_0_sparse_repeated_rows_9"),
    "grad_max_norm_p1_0_equal_rows_9",
]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


def call(case: cases.Case, **how: Any) -> tuple[np.ndarray, ...]:
    """All outputs of the call."""
    given = case.grad_output, case.indices, case.weight, case.offsets
    weights = {"per_sample_weights": case.per_sample_weights, "with_per_sample_weights": case.op.weighted}
    got = lucid_onnx.embedding_bag_grad(*given, **case.keywords, **weights, **how)
    return got if isinstance(got, tuple) else (got,)


def bits(outputs: Any) -> list[bytes]:
    return [np.asarray(output).tobytes() for output in outputs]


def session(model: onnx.ModelProto, *, native: bool, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return lucid_onnx.InferenceSession(model, native=native, session_options=options)


# ---- The cases, in every form.


@every_case
def test_reference_agrees_with_itself(case: cases.Case) -> None:
    case.check(*case.expected())


@every_case
def test_standard_form(case: cases.Case) -> None:
    case.check(*call(case, form="standard", native=False))


@few_cases
def test_native_form(case: cases.Case, native: None) -> None:
    case.check(*call(case, form="native"))


@few_cases
def test_portable_form_has_the_standard_forms_bits(case: cases.Case) -> None:
    got = session(case_model(case, "portable"), native=False).run(None, case.inputs)
    assert bits(got) == bits(call(case, form="standard", native=False))


@few_cases
@pytest.mark.parametrize("form", ["portable", "standard"])
def test_later_runs_have_the_bits_of_the_first(case: cases.Case, form: str) -> None:
    """They have their memory laid out by what the first one used."""
    one = session(case_model(case, form), native=False)
    first, *others = (bits(one.run(None, case.inputs)) for _ in range(3))
    assert others == [first, first]


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_is_written_for_an_output_that_nobody_reads(sparse: bool) -> None:
    model = lucid_onnx.build_grad_model(mode="sum", per_sample_weights=True, sparse=sparse, form="native")
    whole = len(lucid_onnx.to_form(model, "standard").graph.node)
    assert model.graph.output[-1].name == "grad_per_sample_weights"
    del model.graph.output[-1]
    part = lucid_onnx.to_form(model, "standard")
    assert len(part.graph.node) < whole
    assert unread(part) == []
    onnx.checker.check_model(part, full_check=True)


def test_an_output_that_one_of_many_subgraphs_reads_is_written() -> None:
    """No standard operator has an attribute of several graphs; other domains' may."""
    model = lucid_onnx.build_grad_model(mode="sum", per_sample_weights=True, form="native")
    name = model.graph.output.pop().name
    graph = helper.make_graph([helper.make_node("Neg", [name], ["y"])], "inner", [], [onnx.ValueInfoProto(name="y")])
    model.graph.node.append(helper.make_node("Choose", [], ["chosen"], domain="test", graphs=[graph]))
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [None]))
    model.opset_import.append(helper.make_opsetid("test", 1))
    part = lucid_onnx.to_form(model, "standard")
    assert any(name in node.output for node in part.graph.node)


@few_cases
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the infinities that the cases hold
def test_onnx_reference(case: cases.Case) -> None:
    for form in ("portable", "standard"):
        got = onnx.reference.ReferenceEvaluator(case_model(case, form)).run(None, case.inputs)
        case.check(*(np.asarray(array) for array in got))


@pytest.mark.parametrize("newest", [False, True], ids=["oldest", "newest"])
@pytest.mark.parametrize("name", ["grad_max_ends_everything_float32", "grad_weights_sparse_float16"])
def test_other_opsets(name: str, newest: bool, newest_opset: int) -> None:
    case = CASES[name]
    opset = newest_opset if newest else bag_spec.MIN_OPSET
    for form in ("portable", "standard"):
        model = case_model(case, form, opset)
        onnx.checker.check_model(model, full_check=True)
        case.check(*session(model, native=False).run(None, case.inputs))


def test_a_wrong_result_is_caught() -> None:
    """The oracle's own test: one element off by ten tolerances fails, with its output and place in the message."""
    case = CASES["grad_weights_dense_float32"]
    table, weights = case.expected()
    row = int(case.indices[1])
    table[row, 3] += np.float32(20 * case.tolerance[0][row, 3])
    with pytest.raises(AssertionError, match=rf"grad_weight\[{row}, 3\]"):
        case.check(table, weights)
    with pytest.raises(AssertionError, match="1 outputs, expected grad_weight, grad_per_sample_weights"):
        case.check(table)
    sparse = CASES["grad_sum_sparse_rows_float32"]
    rows, values = sparse.expected()
    with pytest.raises(AssertionError, match=r"rows\[2\] = 3, expected 8"):
        sparse.check(rows[::-1].copy(), values)


# ---- Against torch, and against the forward reference.


def float64_calls(seed: int, count: int) -> Iterator[cases.Case]:
    """Random calls in float64 over everything that torch and the contract share."""
    random = np.random.RandomState(seed)
    for k in range(count):
        mode = bag_spec.ATEN_MODES[k % 3]
        layout = ("ragged", "ends", "rows")[k // 3 % 3]
        padded, clipped, freq, weighted = (random.random_sample() < 0.5 for _ in range(4))
        lengths = (4,) * 3 if layout == "rows" else tuple(random.choice([0, 1, 2, 5, 9], 6))
        yield cases.make(
            f"torch {seed} {k}",
            dtype="float64",
            mode=mode,
            layout=layout,
            lengths=lengths,
            rows=int(random.choice([2, 7, 30])),
            dim=int(random.choice([1, 4, 9])),
            weighted=mode == "sum" and weighted,
            padding_idx=-1 if padded else None,
            max_norm=1.4 if clipped else None,
            norm_type=float(random.choice([1.0, 2.0, 3.5, np.inf])),
            freq=freq,
        )


def torch_gradients(case: cases.Case) -> list[np.ndarray]:
    """What torch's autograd gives: of the table, and of per_sample_weights if there are any."""
    import torch
    from torch.nn.functional import embedding, embedding_bag

    def tensor(array: np.ndarray | None, grad: bool = False) -> Any:
        return None if array is None else torch.from_numpy(array.copy()).requires_grad_(grad)

    a = case.attributes
    weight, weights = tensor(case.weight, True), tensor(case.per_sample_weights, True)
    indices, offsets = tensor(case.indices), tensor(case.offsets)
    output = embedding_bag(indices, weight, offsets, per_sample_weights=weights, **torch_keywords(a))
    output.backward(tensor(case.grad_output))
    table = weight.grad.numpy()
    if a.scale_grad_by_freq:
        # embedding_bag's own division takes another row's count; embedding's does not.
        leaf = tensor(case.weight, True)
        padding = None if a.padding_idx is None else a.padding_idx % len(case.weight)
        flat = indices.reshape(-1)
        lookup = embedding(flat, leaf, padding_idx=padding, scale_grad_by_freq=True)
        if a.mode == "max":  # there is no max over segments that tells its winners apart: divide afterwards
            return [table / np.maximum(1, np.bincount(case.indices.reshape(-1), minlength=len(table)))[:, None]]
        bag = np.repeat(np.arange(len(case.grad_output)), _lengths(case))
        kept = np.ones(len(bag)) if padding is None else (case.indices.reshape(-1) != padding).astype(np.float64)
        factor = kept if case.per_sample_weights is None else kept * case.per_sample_weights.reshape(-1)
        if a.mode == "mean":
            factor = factor / np.maximum(1, np.bincount(bag, kept, len(case.grad_output)))[bag]
        parts = lookup * torch.from_numpy(factor)[:, None]
        pooled = torch.zeros(case.grad_output.shape, dtype=torch.float64).index_add(0, torch.from_numpy(bag), parts)
        pooled.backward(tensor(case.grad_output))
        table = leaf.grad.numpy()
    return [table] if weights is None else [table, weights.grad.numpy()]


def _lengths(case: cases.Case) -> np.ndarray:
    if case.offsets is None:
        return np.full(len(case.indices), case.indices.shape[1])
    bounds = case.offsets if case.attributes.include_last_offset else [*case.offsets, len(case.indices)]
    return np.diff(bounds)


def test_torch_agrees() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    seen = set()
    for case in float64_calls(1, 180):
        for got, expected in zip(case.expected(), torch_gradients(case), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10, err_msg=f"{case.name} {case.keywords}")
        seen.add((case.attributes.mode, case.attributes.scale_grad_by_freq, case.attributes.max_norm, case.op.name))
    assert len(seen) > 20, "the draws cover next to nothing"


@pytest.mark.parametrize("number", range(0, 18, 5))
def test_torch_agrees_with_the_graph(number: int) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    case = list(float64_calls(2, 18))[number]
    for got, expected in zip(call(case, form="standard", native=False), torch_gradients(case), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


def forward(case: cases.Case, weight: np.ndarray, weights: np.ndarray | None) -> float:
    """grad_output . embedding_bag(...)"""
    keywords = {name: value for name, value in case.keywords.items() if name not in ("scale_grad_by_freq", "sparse")}
    pooled = bags.embedding_bag(case.indices, weight, case.offsets, per_sample_weights=weights, **keywords)
    return float((pooled * case.grad_output).sum())


def slopes(function: Any, array: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central differences, element by element."""
    result = np.empty(array.shape)
    for k in np.ndindex(*array.shape):
        up, down = array.copy(), array.copy()
        up[k] += step
        down[k] -= step
        result[k] = (function(up) - function(down)) / (2 * step)
    return result


@pytest.mark.parametrize(
    ("mode", "layout", "weighted", "padding"),
    [
        ("sum", "ragged", True, None),
        ("sum", "rows", True, 1),
        ("mean", "ends", False, -2),
        ("mean", "rows", False, None),
    ],
)
def test_differences_agree(mode: str, layout: str, weighted: bool, padding: int | None) -> None:
    """The bag is linear in its table and in its weights, so that a difference is a slope but for its rounding."""
    arguments: dict[str, Any] = {"dtype": "float64", "mode": mode, "layout": layout, "weighted": weighted}
    case = cases.make("differences", rows=5, dim=3, padding_idx=padding, **arguments)
    table, *rest = case.expected()
    weights = case.per_sample_weights
    np.testing.assert_allclose(table, slopes(lambda w: forward(case, w, weights), case.weight), atol=1e-9)
    if weights is not None:
        expected = slopes(lambda w: forward(case, case.weight, w), weights)
        np.testing.assert_allclose(rest[0], expected, atol=1e-9)


def test_differences_of_clipped_rows() -> None:
    """The clip of a row stays out of its gradient, but the gradient of the weights is that of clipped rows."""
    case = cases.make("clipped", dtype="float64", mode="sum", weighted=True, max_norm=0.9, rows=4, dim=3)
    expected = slopes(lambda w: forward(case, case.weight, w), case.per_sample_weights)  # type: ignore[arg-type]
    table, of_weights = case.expected()
    np.testing.assert_allclose(of_weights, expected, atol=1e-9)
    free = dataclasses.replace(case, attributes=dataclasses.replace(case.attributes, max_norm=None))
    assert table.tobytes() == free.expected()[0].tobytes()
    assert not np.allclose(of_weights, free.expected()[1])


# ---- Generated calls.

#: Few, so that their sessions are shared.
ATTRIBUTES = [
    {},
    {"mode": "sum"},
    {"mode": "max", "freq": True},
    {"mode": "mean", "padding_idx": -1, "freq": True},
    {"mode": "max", "padding_idx": 0, "max_norm": 1.2},
    {"mode": "sum", "weighted": True, "padding_idx": 0, "max_norm": 0.8, "freq": True},
]


@st.composite
def calls(draw: st.DrawFn) -> cases.Case:
    layout = draw(st.sampled_from(["ragged", "ends", "rows"]))
    length = draw(st.integers(0, 9))
    lengths = draw(st.lists(st.one_of(st.integers(0, 5), st.sampled_from([0, 33, 700])), max_size=12))
    if layout == "rows":
        lengths = [length] * len(lengths)
    seed = draw(st.integers(0, 2**32 - 1))
    case = cases.make(
        f"seed {seed}",
        layout=layout,
        lengths=tuple(lengths),
        length=length,
        rows=draw(st.sampled_from([1, 2, 5, 40])),
        dim=draw(st.sampled_from([0, 1, 3, 17])),
        slack=draw(st.sampled_from([0, 3])) if layout == "ends" else 0,
        sparse=draw(st.booleans()),
        **draw(st.sampled_from(ATTRIBUTES)),
    )
    if draw(st.booleans()):  # towards few rows, so that rows repeat
        used = case.indices < len(case.weight)
        case = dataclasses.replace(case, indices=np.where(used, case.indices // 3, case.indices))
    if case.attributes.padding_idx is not None and draw(st.booleans()):  # bags of padding alone
        row = case.attributes.padding_idx % len(case.weight)
        case = dataclasses.replace(case, indices=np.full_like(case.indices, row))
    return case


@given(calls())
def test_native_is_the_reference(native: None, case: cases.Case) -> None:
    case.check(*call(case))


@given(calls())
def test_standard_is_the_reference(case: cases.Case) -> None:
    got = call(case, form="standard", native=False)
    case.check(*got)
    if case.sparse:  # added up, it is the dense one
        table = np.zeros(case.weight.shape)
        np.add.at(table, got[0], got[1].astype(np.float64))
        dense = dataclasses.replace(case, sparse=False)
        # Each entry has a rounding of its own, which the dense form has not.
        assert (np.abs(table - dense.exact[0]) <= 2 * dense.tolerance[0]).all()


# ---- Whole numbers, threads, and one row that everybody hits.


@pytest.fixture(scope="module")
def giant() -> cases.Case:
    """200,000 positions of one row, and a few of others; whole numbers, so that a lost addition cannot hide."""
    random = np.random.RandomState(5)
    lengths = [2 ** int(n) for n in random.randint(0, 14, 60)]
    lengths.append(200_000 - sum(lengths))
    indices = np.full(200_000, 3)
    indices[::9_973] = 1
    gradient = random.randint(-8, 9, (len(lengths), 3)).astype(np.float32)
    weight = random.randint(-3, 4, (5, 3)).astype(np.float32)
    weights = random.randint(-2, 3, len(indices)).astype(np.float32)
    offsets = np.cumsum([0, *lengths[:-1]])
    return cases.Case("giant", gradient, weight, indices, offsets, weights, spec.Attributes("sum"))


@pytest.mark.parametrize("mode", ["weights", "mean", "max"])
@pytest.mark.parametrize("form", ["native", "portable", "standard"])
def test_a_row_that_everybody_hits_is_exact(giant: cases.Case, mode: str, form: str, native: None) -> None:
    case = giant
    if mode != "weights":
        case = dataclasses.replace(case, per_sample_weights=None, attributes=spec.Attributes(mode))
        if mode == "mean":  # powers of two, so that the divisions are exact
            end = int(case.offsets[-1])  # type: ignore[index]
            case = dataclasses.replace(
                case,
                indices=case.indices[:end],
                offsets=case.offsets[:-1],
                grad_output=case.grad_output[:-1],  # type: ignore[index]
            )
    expected = bits(case.expected())
    assert np.abs(case.exact[0]).max() < 2**24
    for threads in (2,) if form == "portable" else (1, 2, 8):
        runner = session(case_model(case, form), native=form == "native", threads=threads)
        for k in range(3):
            assert bits(runner.run(None, case.inputs)) == expected, f"{threads} threads, run {k}"


@pytest.mark.parametrize("name", ["weights", "max", "mean, sparse"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    random = np.random.RandomState(6)
    lengths = tuple(int(n) for n in [*random.randint(0, 40, 300), 5000, *random.randint(0, 4, 500)])
    mode = {"weights": "sum", "max": "max"}.get(name, "mean")
    case = cases.make(
        "threads",
        mode=mode,
        weighted=mode == "sum",
        sparse="sparse" in name,
        rows=400,
        dim=24,
        lengths=lengths,
        freq=True,
    )
    skewed = (len(case.weight) * random.random_sample(len(case.indices)) ** 4).astype(np.int64)
    case = dataclasses.replace(case, indices=skewed)
    model = case_model(case, "portable")
    runners = [session(model, native=False, threads=threads) for threads in (1, 2, 8)]
    results = [bits(runner.run(None, case.inputs)) for runner in runners for _ in range(3)]
    assert all(result == results[0] for result in results)
    case.check(*runners[0].run(None, case.inputs))


# ---- What is refused.

GOOD: dict[str, Any] = {
    "grad_output": np.ones((2, 3), np.float32),
    "x": np.array([1, 0, 4, 1]),
    "weight": np.ones((5, 3), np.float32),
    "offsets": np.array([0, 2]),
}
WEIGHTS = np.ones(4, np.float32)
REFUSED = [
    ({"grad_output": np.ones((3, 3), np.float32)}, ValueError, "grad_output has shape [3, 3], expected [2, 3]"),
    ({"grad_output": np.ones((2, 4), np.float32)}, ValueError, "grad_output has shape [2, 4], expected [2, 3]"),
    ({"grad_output": np.ones(6, np.float32)}, ValueError, "grad_output has shape [6], expected [2, 3]"),
    (
        {"grad_output": np.ones((2, 3))},
        TypeError,
        "grad_output has dtype float64, weight has float32: they must be equal",
    ),
    (
        {"include_last_offset": True},
        ValueError,
        "grad_output has shape [2, 3], expected [1, 3]",
    ),
    ({"x": np.ones((4, 2), np.int64), "offsets": None}, ValueError, "grad_output has shape [2, 3], expected [4, 3]"),
    ({"x": np.array([1, 0, 5, 1])}, IndexError, "indices[2] = 5 is outside [0, 5)"),
    ({"x": np.array([1, 0, -1, 9])}, IndexError, "indices[2] = -1 is outside [0, 5)"),
    ({"offsets": np.array([1, 2])}, ValueError, "offsets[0] = 1 must be 0"),
    ({"offsets": np.array([0, 9])}, ValueError, "offsets[1] = 9 is past the number of indices, 4"),
    ({"offsets": None}, ValueError, "offsets missing: indices has shape [4], and [N] needs them"),
    (
        {"per_sample_weights": WEIGHTS},
        ValueError,
        "per_sample_weights needs mode 'sum', got mode = 'mean'",
    ),
    (
        {"per_sample_weights": WEIGHTS[:3], "mode": "sum"},
        ValueError,
        "per_sample_weights has shape [3], indices has shape [4]: they must be equal",
    ),
    ({"scale_grad_by_freq": 1}, TypeError, "scale_grad_by_freq = 1 must be a bool"),
    ({"sparse": 1}, TypeError, "sparse = 1 must be a bool"),
    ({"mode": "prod"}, ValueError, "mode = 'prod' is not one of 'sum', 'mean', 'max', 'sqrtn'"),
    ({"padding_idx": 5}, ValueError, "padding_idx = 5 is outside [-5, 5), the rows of weight"),
    (
        {"with_per_sample_weights": True},
        ValueError,
        "with_per_sample_weights = True, but per_sample_weights is None",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), REFUSED, ids=[str(k) for k in range(len(REFUSED))])
@pytest.mark.parametrize("how", [{"form": "native"}, {"form": "standard", "native": False}], ids=["native", "standard"])
def test_refusals(
    how: dict[str, Any], wrong: dict[str, Any], kind: type[Exception], message: str, native: None
) -> None:
    with pytest.raises(kind) as caught:
        lucid_onnx.embedding_bag_grad(**{**GOOD, **wrong}, **how)
    assert type(caught.value) is kind
    assert str(caught.value) == message


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("sparse", [False, True])
def test_what_the_graph_itself_refuses(mode: str, sparse: bool) -> None:
    """Without the library and without the call's checks, on ONNX Runtime's CPU; the session goes on."""
    runner = session(lucid_onnx.build_grad_model(mode=mode, sparse=sparse, form="standard"), native=False)
    feed = {"indices" if name == "x" else name: array for name, array in GOOD.items()}
    for wrong in (
        {"indices": np.array([1, 0, 5, 1])},
        {"indices": np.array([1, 0, -1, 1])},
        {"offsets": np.array([0, 9])},
        {"offsets": np.array([1, 2])},
        {"grad_output": np.ones((3, 3), np.float32)},
        {"grad_output": np.ones((2, 4), np.float32)},
    ):
        with pytest.raises(Exception, match="out of data bounds"):
            runner.run(None, {**feed, **wrong})
    assert len(runner.run(None, feed)) == 1 + sparse


# ---- Models, nodes, files, and who else reads them.


def test_a_node_in_a_graph_of_ones_own(tmp_path: Path) -> None:
    """A bag and its gradient in one model, in every form and through files."""
    nodes = [
        lucid_onnx.make_node("w", "i", "o", "pooled", mode="sum", per_sample_weights="p"),
        lucid_onnx.make_grad_node("pooled", "w", "i", "o", ("dw", "dp"), mode="sum", per_sample_weights="p"),
    ]
    kinds = {"w": (TensorProto.FLOAT, [5, 3]), "p": (TensorProto.FLOAT, ["N"])}
    kinds |= {"i": (TensorProto.INT64, ["N"]), "o": (TensorProto.INT64, ["B"])}
    outputs = {"dw": (TensorProto.FLOAT, [5, 3]), "dp": (TensorProto.FLOAT, ["N"])}
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(bag_spec.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    random = np.random.RandomState(8)
    feed = {
        "w": random.standard_normal((5, 3)).astype(np.float32),
        "p": random.standard_normal(4).astype(np.float32),
        "i": np.array([1, 0, 4, 1]),
        "o": np.array([0, 2]),
    }
    pooled = lucid_onnx.reference.embedding_bag(
        feed["i"], feed["w"], feed["o"], mode="sum", per_sample_weights=feed["p"]
    )
    expected = lucid_onnx.reference.embedding_bag_grad(
        pooled, feed["i"], feed["w"], feed["o"], mode="sum", per_sample_weights=feed["p"]
    )
    lucid_onnx.save(lucid_onnx.to_form(model, "portable"), tmp_path / "step.onnx")
    lucid_onnx.lower(tmp_path / "step.onnx", tmp_path / "lowered.onnx")
    lowered = onnx.load(tmp_path / "lowered.onnx")
    assert {entry.domain for entry in lowered.opset_import} == {""}
    onnx.checker.check_model(lowered, full_check=True)
    for path in (tmp_path / "step.onnx", tmp_path / "lowered.onnx"):
        got = lucid_onnx.InferenceSession(path, native=False).run(["dw", "dp"], feed)
        for array, exact in zip(got, expected, strict=True):
            np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-6)  # pooled was rounded to float32 in both


def test_forms_of_a_model() -> None:
    model = lucid_onnx.build_grad_model(mode="sum", sparse=True, per_sample_weights=True, two_d=True)
    assert [value.name for value in model.graph.input] == ["grad_output", "weight", "indices", "per_sample_weights"]
    assert [value.name for value in model.graph.output] == ["rows", "values", "grad_per_sample_weights"]
    assert [f.name for f in model.functions] == ["EmbeddingBagSparseGrad2DWeighted"]
    onnx.checker.check_model(model, full_check=True)
    standard = lucid_onnx.to_form(model, "standard")
    onnx.checker.check_model(standard, full_check=True)
    assert not standard.functions
    assert [entry.domain for entry in standard.opset_import] == [""]
    native = lucid_onnx.to_form(model, "native")
    assert [node.op_type for node in native.graph.node] == ["EmbeddingBagSparseGrad2DWeighted"]
    assert lucid_onnx.to_form(native, "portable") == model


def test_a_table_in_the_model() -> None:
    table = np.arange(15, dtype=np.float64).reshape(5, 3)
    model = lucid_onnx.build_grad_model(table, mode="max", padding_idx=-1)
    (output,) = model.graph.output
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [5, 3]
    feed = {"grad_output": np.ones((1, 3)), "indices": np.array([1, 4, 2]), "offsets": np.array([0])}
    (got,) = lucid_onnx.InferenceSession(model, native=False).run(None, feed)
    assert got.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lucid_onnx.build_grad_model(scale_grad_by_freq=2), "scale_grad_by_freq = 2 must be a bool"),
        (lambda: lucid_onnx.build_grad_model(sparse="no"), "sparse = 'no' must be a bool"),
        (lambda: lucid_onnx.build_grad_model(per_sample_weights=True), "per_sample_weights needs mode 'sum', got"),
        (lambda: lucid_onnx.build_grad_model(np.ones((2, 2)), padding_idx=2), "padding_idx = 2 is outside [-2, 2)"),
        (
            lambda: lucid_onnx.make_grad_node("g", "w", "i", "o", ("a", "b")),
            "outputs = ('a', 'b') must be names for grad_weight",
        ),
        (
            lambda: lucid_onnx.make_grad_node("g", "w", "i", "o", "dw"),
            "outputs = 'dw' is a string, expected a sequence of names",
        ),
    ],
)
def test_refusals_of_builders(build: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        build()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.output.pop(), "EmbeddingBagSparseGrad gives rows, values; it was given ['rows']"),
        (
            lambda n: n.output.__setitem__(0, ""),
            "EmbeddingBagSparseGrad gives rows, values; it was given ['', 'values']",
        ),
        (lambda n: n.input.pop(), "EmbeddingBagSparseGrad takes grad_output, weight, indices, offsets; it was given"),
        (
            lambda n: n.attribute.append(helper.make_attribute("scale_grad_by_freq", 2)),
            "scale_grad_by_freq = 2 is not 0 or 1",
        ),
        (
            lambda n: n.attribute.append(helper.make_attribute("scale_grad_by_freq", 1.0)),
            "scale_grad_by_freq = 1.0 must be an INT attribute",
        ),
    ],
)
def test_refusals_of_nodes(change: Any, message: str) -> None:
    model = lucid_onnx.build_grad_model(sparse=True, form="native")
    node = model.graph.node[0]
    for k, attribute in enumerate(node.attribute):
        if attribute.name == "scale_grad_by_freq":
            del node.attribute[k]
            break
    change(node)
    with pytest.raises(ValueError) as caught:
        lucid_onnx.to_form(model, "standard")
    assert message in str(caught.value)


def test_the_tools_know_gradients(tmp_path: Path) -> None:
    """What looks at models: info, quantize (which must leave a table that is trained), and the comparison."""
    from lucid_onnx.parity import work
    from lucid_onnx.runtime import info

    model = lucid_onnx.build_grad_model(np.ones((50, 8), np.float32), mode="max", include_last_offset=True)
    path = tmp_path / "gradient.onnx"
    lucid_onnx.save(model, path)
    (bag,) = info.model(str(path)).nodes
    assert (bag.op, bag.mode, bag.table.shape, bag.table_bytes) == ("EmbeddingBagGrad", "max", (50, 8), 1600)
    for job in work.model(path, {}, sets=2):
        program = job.program("standard")
        assert program is not None
        got = lucid_onnx.InferenceSession(program.model, native=False).run(None, dict(job.inputs))
        np.testing.assert_allclose(got[0], job.expected[0].exact, rtol=1e-5, atol=1e-6)
    graph = helper.make_graph(
        [
            lucid_onnx.make_node("w", "i", "o", "pooled"),
            lucid_onnx.make_grad_node("pooled", "w", "i", "o", name="back"),
        ],
        "step",
        [helper.make_tensor_value_info(name, TensorProto.INT64, [name.upper()]) for name in ("i", "o")],
        [helper.make_tensor_value_info("grad_weight", TensorProto.FLOAT, [50, 8])],
        [onnx.numpy_helper.from_array(np.ones((50, 8), np.float32), "w")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(bag_spec.DOMAIN, 1)]
    report = lucid_onnx.quantize(helper.make_model(graph, opset_imports=imports, ir_version=8))
    assert not report.quantized
    assert "(EmbeddingBagGrad) reads it as well" in report.unquantized[0].reason


def test_names_and_attributes_are_closed() -> None:
    assert list(spec.VARIANTS) == [
        f"EmbeddingBag{kind}Grad{shape}{weighted}"
        for kind, shape, weighted in itertools.product(("", "Sparse"), ("", "2D"), ("", "Weighted"))
    ]
    for op in spec.VARIANTS.values():
        attributes = spec.Attributes("sum", 2, 0.1, np.inf, not op.two_d, True)
        assert spec.Attributes.from_onnx(attributes.to_onnx(op, double=True)).scale_grad_by_freq
        assert set(spec.Attributes.onnx_names(op)) == set(attributes.to_onnx(op, double=True))
