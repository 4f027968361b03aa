"""`lucid_onnx.torch.embedding_bag` under torch's own tests of its function, as far as its wheel brings them.

Those are the samples of the operator (`op_db` of torch.testing._internal.common_methods_invocations) and the tests of
the module (`get_new_module_tests` of common_nn). test/nn/test_embedding.py is in no wheel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript", reason="lucid_onnx.torch needs onnxscript, which is not installed")

import lucid_onnx  # noqa: E402
import lucid_onnx.torch  # noqa: E402

F = torch.nn.functional
TORCHS = F.embedding_bag
try:
    lucid_onnx.get_library_path()
    NATIVE = True
except FileNotFoundError:
    NATIVE = False
OURS = functools.partial(lucid_onnx.torch.embedding_bag, native=NATIVE)


@pytest.fixture
def in_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Our function where torch's is, and what it was called with in numbers of positions."""
    calls: list[int] = []

    def counted(input: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(input.numel())
        return OURS(input, *arguments, **keywords)

    monkeypatch.setattr(F, "embedding_bag", counted)
    return calls


@functools.cache
def operator() -> Any:
    pytest.importorskip("expecttest", reason="torch's own tests need expecttest, which is not installed")
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = (op for op in op_db if op.name == "nn.functional.embedding_bag")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)  # float64 is below
def test_torchs_samples(dtype: torch.dtype) -> None:
    """Output and gradients; of 16 bits against torch's in float64, as torch's own gradients are summed in 16 bits."""
    torch.manual_seed(0)
    samples = list(operator().sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 20
    for sample in samples:
        weight, (indices,), keywords = sample.input, sample.args, dict(sample.kwargs)
        leaves = [weight, *([keywords["per_sample_weights"]] if keywords.get("per_sample_weights") is not None else [])]
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        got = OURS(indices, weight, **keywords)
        if len(wide) == 2:
            keywords["per_sample_weights"] = wide[1]
        expected = TORCHS(indices, wide[0], **keywords)
        gradient = torch.randn_like(got)
        torch.testing.assert_close(got, expected.to(dtype))
        ours = torch.autograd.grad(got, leaves, gradient)
        for one, other in zip(ours, torch.autograd.grad(expected, wide, gradient.double()), strict=True):
            torch.testing.assert_close(one, other.to(dtype))


def test_gradcheck_of_torchs_samples() -> None:
    """With batched gradients, as torch checks its own."""
    torch.manual_seed(1)
    for sample in operator().sample_inputs("cpu", torch.float64, requires_grad=True):
        keywords = dict(sample.kwargs)
        weights = keywords.pop("per_sample_weights", None)
        leaves = (sample.input, *(() if weights is None else (weights,)))
        (indices,) = sample.args

        def call(
            weight: Any, weights: Any = None, indices: Any = indices, keywords: dict[str, Any] = keywords
        ) -> torch.Tensor:
            return OURS(indices, weight, per_sample_weights=weights, **keywords)

        assert torch.autograd.gradcheck(call, leaves, check_batched_grad=True, fast_mode=True)


def test_torchs_tests_of_the_module(in_place_of_torchs: list[int]) -> None:
    operator()  # skips where torch's tests cannot be imported
    from torch.testing._internal import common_nn

    class Case(common_nn.NNTestCase):  # type: ignore[misc]
        """What torch's test of a module asks its test case for."""

        def _forward(self, module: Any, input: Any) -> Any:
            return module(*input) if isinstance(input, tuple) else module(input)

        def _backward(self, module: Any, input: Any, output: Any, grad_output: Any, create_graph: bool = False) -> Any:
            output.backward(grad_output, retain_graph=True, create_graph=create_graph)
            return None

        def _get_parameters(self, module: Any) -> Any:
            parameters = list(module.parameters())
            return parameters, [parameter.grad for parameter in parameters]

        def _zero_grad_parameters(self, module: Any) -> None:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    tests = [
        t for t in common_nn.get_new_module_tests() if "EmbeddingBag" in t.get("fullname", t.get("module_name", ""))
    ]
    assert len(tests) >= 8
    before = torch.get_default_dtype()
    for given in tests:
        test = dict(given)
        if "constructor" not in test:
            test["constructor"] = getattr(torch.nn, test.pop("module_name"))
        torch.set_default_dtype(test.pop("default_dtype", before))
        in_place_of_torchs.clear()
        try:
            common_nn.NewModuleTest(**test)(Case("run"))
        finally:
            torch.set_default_dtype(before)
        assert len(in_place_of_torchs) > 2, given


def _calls() -> Iterator[tuple[str, dict[str, Any]]]:
    for mode in ("sum", "mean", "max"):
        yield f"{mode}_clipped", {"mode": mode, "max_norm": 1.2, "norm_type": 1.0, "padding_idx": 1}
        yield f"{mode}_rows", {"mode": mode, "two_d": True, "padding_idx": -2}
        yield f"{mode}_frequency", {"mode": mode, "scale_grad_by_freq": True, "include_last_offset": True}
    yield "weights", {"mode": "sum", "weighted": True, "max_norm": 0.9}
    yield "weights_rows", {"mode": "sum", "weighted": True, "two_d": True, "padding_idx": 4}


CALLS = dict(_calls())


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_torchs_dense_and_sparse(name: str) -> None:
    keywords = dict(CALLS[name])
    two_d, weighted = keywords.pop("two_d", False), keywords.pop("weighted", False)
    generator = torch.Generator().manual_seed(len(name))
    table = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    indices = torch.randint(0, 7, (4, 3) if two_d else (12,), generator=generator)
    offsets = None if two_d else torch.tensor([0, 5, 5, 9], dtype=torch.int32)  # another type than that of indices
    if keywords.get("include_last_offset"):
        offsets = torch.tensor([0, 5, 5, 9, 12])
    weights = torch.randn(indices.shape, dtype=torch.float64, generator=generator) if weighted else None
    gradient = torch.randn(4, 3, dtype=torch.float64, generator=generator).T.contiguous().T  # no C order

    def gradients(call: Callable[..., torch.Tensor], **more: Any) -> list[torch.Tensor]:
        leaf = table.clone().requires_grad_()
        by = None if weights is None else weights.clone().requires_grad_()
        # torch clips in the table, which no leaf may be that needs a gradient, but a result of one may.
        output = call(indices, leaf * 1.0, offsets, per_sample_weights=by, **{**keywords, **more})
        found = torch.autograd.grad(output, [leaf, *([] if by is None else [by])], gradient)
        return [output.detach(), *found]

    more = {}
    if keywords.get("scale_grad_by_freq"):  # torch 2.13 divides by another row's count
        more["scale_grad_by_freq"] = False
    expected = gradients(TORCHS, **more)
    if more:
        expected[1] /= torch.bincount(indices.flatten(), minlength=7).clamp(min=1)[:, None]
    for found, exact in zip(gradients(OURS), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)

    leaf = table.clone().requires_grad_()
    OURS(indices, leaf, offsets, per_sample_weights=weights, sparse=True, **keywords).backward(gradient)
    assert leaf.grad is not None
    assert leaf.grad.is_sparse
    assert not leaf.grad.is_coalesced()
    padding = keywords.get("padding_idx")
    kept = indices.flatten()[indices.flatten() != (padding % 7 if padding is not None else -1)]
    torch.testing.assert_close(leaf.grad._indices()[0], kept)
    torch.testing.assert_close(leaf.grad.to_dense(), expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.detach(), table, rtol=0, atol=0)  # max_norm wrote nothing


def test_both_ways_to_run_are_one(native: None) -> None:
    """With the library and without it; and an optimizer of torch takes the sparse gradients."""
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    words, starts = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), torch.tensor([0, 3, 3])
    leaves = {way: table.clone().requires_grad_() for way in (True, False)}
    for way, leaf in leaves.items():
        output = lucid_onnx.torch.embedding_bag(words, leaf, starts, sparse=True, native=way)
        output.square().sum().backward()
        torch.optim.SparseAdam([leaf], lr=0.1).step()
    touched = torch.zeros(50, dtype=torch.bool).index_fill_(0, words, True)
    assert ((leaves[True].detach() != table).any(1) == touched).all()
    torch.testing.assert_close(leaves[True].grad.coalesce(), leaves[False].grad.coalesce())


def test_what_is_refused() -> None:
    table = torch.ones(4, 2, requires_grad=True)
    words, starts = torch.tensor([0, 3]), torch.tensor([0])
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (IndexError, r"indices\[1\] = 4 is outside \[0, 4\)", lambda: OURS(torch.tensor([0, 4]), table, starts)),
        (ValueError, "offsets missing", lambda: OURS(words, table)),
        (TypeError, "input is a list, expected a torch.Tensor", lambda: OURS([0, 3], table, starts)),
        (TypeError, "weight is a ndarray", lambda: OURS(words, np.ones((4, 2)), starts)),
        (ValueError, "weight is a torch.strided tensor on meta", lambda: OURS(words, table.to("meta"), starts)),
        (ValueError, "weight is a torch.sparse_coo tensor", lambda: OURS(words, table.detach().to_sparse(), starts)),
        (ValueError, "padding_idx = 7", lambda: OURS(words, table, starts, padding_idx=7)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    (first,) = torch.autograd.grad(OURS(words, table, starts).square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_table_may_change_before_a_gradient_that_does_not_read_it() -> None:
    table = torch.randn(4, 2, requires_grad=True)
    words, starts = torch.tensor([0, 3]), torch.tensor([0])
    for mode, reads in (("sum", False), ("mean", False), ("max", True)):
        output = OURS(words, table, starts, mode=mode)
        with torch.no_grad():
            table += 1
        if reads:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        else:
            output.sum().backward()
