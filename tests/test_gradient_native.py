"""The kernels of EmbeddingBagGrad: right on every instruction set, the same bits on all and at any number of threads,
by themselves (through the C interface) and in sessions."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import spec as bags
from lucid_onnx.ops.embedding_bag_grad import cases
from lucid_testing.hostile import check_attribute_types
from lucid_testing.kernels import (
    GradArgs,
    arguments,
    as_a_model_says_it,
    bits,
    gradient,
    isas,
    library,
    needs_library,
)

ort = pytest.importorskip("onnxruntime")
pytestmark = needs_library

CASES = cases.all_cases()


def session(model: onnx.ModelProto, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return lucid_onnx.InferenceSession(model, session_options=options)


def large_cases() -> Iterable[cases.Case]:
    """Enough work for threads: rows that are looked up by no, one and thousands of positions."""
    random = np.random.RandomState(31)
    lengths = np.array([0, 1023, 4000, 0, 9000] + [11] * 600)
    random.shuffle(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    count = int(lengths.sum())
    indices = random.randint(0, 5000, count)
    indices[random.randint(0, count, 3000)] = 17
    indices[random.randint(0, count, 1500)] = 4000
    for dtype, mode, sparse in (
        ("float32", "sum", False),
        ("float16", "sum", True),
        ("bfloat16", "mean", False),
        ("float64", "max", False),
        ("float32", "max", True),
        ("float64", "mean", True),
    ):
        weight = random.standard_normal((5000, 35)).astype(dtype)
        weights = random.standard_normal(count).astype(dtype)
        attributes = cases.spec.Attributes(
            mode, padding_idx=4000, max_norm=6.0 if mode != "mean" else None, scale_grad_by_freq=mode != "max"
        )
        yield cases.Case(
            f"large {mode} {dtype} {sparse}",
            random.standard_normal((len(lengths), 35)).astype(dtype),
            weight,
            indices,
            starts,
            weights if mode == "sum" else None,
            attributes,
            sparse=sparse,
        )


# ---- By itself.


def test_every_case_is_right_and_has_the_same_bits_everywhere() -> None:
    for case in CASES.values():
        expected = gradient(case, "baseline")
        case.check(*expected)
        for isa in isas():
            for threads in (1, 3):
                assert bits(gradient(case, isa, threads)) == bits(expected), f"{case.name} on {isa}, {threads} threads"


def test_bits_of_large_cases_do_not_depend_on_isa_or_threads() -> None:
    for case in large_cases():
        expected = gradient(case, "baseline")
        case.check(*expected)
        for isa in isas():
            for threads in (1, 2, 8):
                assert bits(gradient(case, isa, threads)) == bits(expected), f"{case.name} on {isa}, {threads} threads"


def test_a_struct_of_another_size_is_refused() -> None:
    case = CASES["grad_sum_ragged_float32"]
    args = GradArgs(size_bytes=8, forward=arguments(case))
    message = ctypes.create_string_buffer(256)
    code = library().lucid_embedding_bag_grad(ctypes.byref(args), None, 1, message, ctypes.c_size_t(256))
    assert (code, message.value.decode()) == (1, "size_bytes = 8 is not 264")


# ---- In sessions.


def test_sessions_run_the_kernel_with_its_bits() -> None:
    active = next(i for i in range(library().lucid_isa_count()) if library().lucid_isa_name(i).decode() == isas()[-1])
    for case in CASES.values():
        runner = session(case_model(case, "native"))
        before = library().lucid_isa_runs(active)
        got = runner.run(None, case.inputs)
        assert library().lucid_isa_runs(active) == before + 1
        assert bits(map(np.asarray, got)) == bits(gradient(as_a_model_says_it(case))), case.name


def test_sessions_with_threads_have_the_same_bits() -> None:
    for case in list(large_cases())[:4]:
        expected = bits(gradient(as_a_model_says_it(case)))
        for threads in (1, 2, 4):
            runner = session(case_model(case, "native"), threads)
            for _ in range(2):  # the second run gets memory that the first one wrote
                got = runner.run(None, case.inputs)
                assert bits(map(np.asarray, got)) == expected, f"{case.name} with {threads} threads"


@pytest.mark.parametrize("sparse", [False, True])
def test_portable_models_run_the_kernel_where_it_is(sparse: bool) -> None:
    case = dataclasses.replace(CASES["grad_weights_dense_float32"], sparse=sparse)
    active = next(i for i in range(library().lucid_isa_count()) if library().lucid_isa_name(i).decode() == isas()[-1])
    runner = session(case_model(case, "portable"))
    before = library().lucid_isa_runs(active)
    case.check(*runner.run(None, case.inputs))
    assert library().lucid_isa_runs(active) == before + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": [0, 5, 1, -1]}, "indices[3] = -1 is outside [0, 6)"),
        ({"indices": [0, 6, 1, -1]}, "indices[1] = 6 is outside [0, 6)"),
        ({"indices": [-(2**63), 6, 1, 2]}, "indices[0] = -9223372036854775808 is outside [0, 6)"),
        ({"offsets": [1, 2]}, "offsets[0] = 1 must be 0"),
        ({"offsets": [0, 5]}, "offsets[1] = 5 is past the number of indices, 4"),
        ({"offsets": [0, -1]}, "offsets[1] = -1 is below offsets[0] = 0: offsets must not decrease"),
        ({"offsets": np.zeros(0, np.int64)}, "offsets is empty, shape [0], but indices has 4 entries"),
        ({"grad_output": np.ones((3, 5), np.float32)}, "grad_output has shape [3, 5], expected [2, 5]"),
        ({"grad_output": np.ones((2, 4), np.float32)}, "grad_output has shape [2, 4], expected [2, 5]"),
        ({"grad_output": np.ones(10, np.float32)}, "grad_output has shape [10], expected [2, 5]"),
        ({"grad_output": np.ones((1, 2, 5), np.float32)}, "grad_output has shape [1, 2, 5], expected [2, 5]"),
        ({"weight": np.ones((4, 5), np.float32)}, "indices[1] = 5 is outside [0, 4)"),
        (
            {"per_sample_weights": np.ones(3, np.float32)},
            "per_sample_weights has shape [3], indices has shape [4]: they must be equal",
        ),
    ],
)
def test_refusals_leave_the_session_usable(change: dict[str, Any], message: str) -> None:
    feed = {
        "grad_output": np.ones((2, 5), np.float32),
        "weight": np.ones((6, 5), np.float32),
        "indices": np.array([0, 5, 1, 0]),
        "offsets": np.array([0, 2]),
        "per_sample_weights": np.ones(4, np.float32),
    }
    for sparse in (False, True):
        model = lucid_onnx.build_grad_model(mode="sum", per_sample_weights=True, sparse=sparse, form="native")
        for value_info in [*model.graph.input, *model.graph.output]:  # of shapes that refuse nothing beforehand
            value_info.type.tensor_type.ClearField("shape")
        runner = session(model)
        expected = bits(map(np.asarray, runner.run(None, feed)))
        with pytest.raises(Exception) as caught:  # onnxruntime's own class
            runner.run(None, {**feed, **{name: np.asarray(value) for name, value in change.items()}})
        assert message in str(caught.value)
        assert bits(map(np.asarray, runner.run(None, feed))) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale_grad_by_freq", 2, "scale_grad_by_freq = 2 is not 0 or 1"),
        ("scale_grad_by_freq", 1.0, "scale_grad_by_freq must be an INT attribute"),
        ("mode", 4, "mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
        ("max_norm", -1.0, "max_norm = -1 must be >= 0"),
        ("stash_type", 11, "stash_type = 11 must be 1 for this type of weight"),
    ],
)
def test_attributes_are_refused_when_the_session_starts(name: str, value: float, message: str) -> None:
    model = lucid_onnx.build_grad_model(form="native")
    node = model.graph.node[0]
    (old,) = (a for a in node.attribute if a.name == name)
    old.CopyFrom(onnx.helper.make_attribute(name, value))
    with pytest.raises(Exception) as caught:
        session(model)
    assert message in str(caught.value)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_attribute_of_another_type_is_not_absent(sparse: bool) -> None:
    model = lucid_onnx.build_grad_model(sparse=sparse, form="native")
    check_attribute_types(model, model.graph.node[0].op_type)


def test_shapes_are_inferred(infers_shapes: None) -> None:
    for sparse in (False, True):
        model = lucid_onnx.build_grad_model(mode="sum", per_sample_weights=True, sparse=sparse, form="native")
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        shapes = {output.name: output.shape for output in session(model).get_outputs()}
        weight = next(i for i in session(model).get_inputs() if i.name == "weight").shape
        indices = next(i for i in session(model).get_inputs() if i.name == "indices").shape
        if not sparse:
            assert shapes["grad_weight"] == weight
        assert shapes["grad_per_sample_weights"] == indices


def test_no_index_reads_or_writes_outside() -> None:
    """Random calls, half of them hostile: rejected with the reference's message, or right."""
    random = np.random.RandomState(5)
    refused = 0
    runners = {
        s: session(lucid_onnx.build_grad_model(mode="max", padding_idx=1, sparse=s, form="native"))
        for s in (False, True)
    }
    for turn in range(200):
        rows, count, num = (int(random.randint(2, 9)) for _ in range(3))
        weight = random.standard_normal((rows, 3)).astype(np.float32)
        indices = random.randint(0, rows, count)
        starts = np.sort(np.concatenate([[0], random.randint(0, count + 1, num - 1)]))
        if turn % 2:
            (indices if turn % 4 == 1 else starts)[random.randint(0, 2)] = random.choice([-1, rows, 2**62, -(2**63), 9])
        gradient_of = random.standard_normal((num, 3)).astype(np.float32)
        attributes = cases.spec.Attributes("max", padding_idx=1)
        case = cases.Case("random", gradient_of, weight, indices, starts, None, attributes, sparse=bool(turn % 3 == 0))
        message = ""
        try:
            bags.check_inputs(weight, indices, starts, None, attributes)
        except (ValueError, IndexError) as error:
            message = str(error)
        if not message:
            case.check(*runners[case.sparse].run(None, case.inputs))
            continue
        refused += 1
        with pytest.raises(Exception) as caught:
            runners[case.sparse].run(None, case.inputs)
        assert message in str(caught.value)
    assert refused > 50
