"""Export from PyTorch: what a module says in eager mode, its file says on ONNX Runtime, in every form."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import cases, reference, spec
from lucid_onnx.ops.embedding_bag.cases import Case
from lucid_testing.graphs import nodes
from lucid_testing.kernels import library_path, needs_library
from lucid_testing.processes import run_script

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
nn, functional = torch.nn, torch.nn.functional

import lucid_onnx.torch as from_torch  # noqa: E402  # needs torch

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own, from its own code

DYNAMIC = torch.export.Dim.DYNAMIC
#: Form, and whether the library is registered.
WAYS = [("portable", True), ("portable", False), ("standard", False)]


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _translations_read_once(translations: None) -> None:
    """For every test of this file."""


# ---- From arrays to tensors and back, and from a case to a module.


def tensor(array: np.ndarray) -> Any:
    """A copy: max_norm writes into torch's tables."""
    if array.dtype == spec.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array(value: Any) -> np.ndarray:
    value = value.detach()
    return value.view(torch.int16).numpy().view(spec.BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()


#: What torch's bag has of our attributes.
TORCHS = ("mode", "padding_idx", "max_norm", "norm_type", "include_last_offset")


def module_of(case: Case) -> Any:
    keywords = {name: case.keywords[name] for name in TORCHS}
    return nn.EmbeddingBag(*case.weight.shape, _weight=tensor(case.weight), **keywords).eval()


def arguments(case: Case) -> tuple[Any, ...]:
    """The positional arguments of torch.nn.EmbeddingBag."""
    given = [case.indices, case.offsets, case.per_sample_weights]
    while given[-1] is None:
        given.pop()
    return tuple(None if a is None else tensor(a) for a in given)


def dynamic(args: Sequence[Any]) -> tuple[Any, ...]:
    """Every size of every argument is open."""
    return tuple(None if a is None else dict.fromkeys(range(a.dim()), DYNAMIC) for a in args)


def exported(case: Case, **options: Any) -> onnx.ModelProto:
    args = arguments(case)
    names = [name for name in case.op.inputs if name != "weight"]
    return from_torch.export(module_of(case), args, dynamic_shapes=dynamic(args), input_names=names, **options)


def bags(model: onnx.ModelProto) -> list[str]:
    """The operators of our domain in a model that has nothing of torch's bags."""
    found = [node.op_type for node in nodes(model.graph) if node.domain == spec.DOMAIN]
    assert {f.name for f in model.functions if f.domain == spec.DOMAIN} == set(found)
    assert not {"Loop", "Scan", "SequenceInsert"} & {node.op_type for node in nodes(model.graph)}
    onnx.checker.check_model(model, full_check=True)
    return found


def ways(model: onnx.ModelProto, forms: Sequence[str] = ("portable", "standard", "native")) -> list[Any]:
    """A session for each way to run a portable model."""
    return _sessions(model.SerializeToString(), tuple(forms))


@functools.lru_cache(maxsize=1)  # a test runs one model on many inputs
def _sessions(model: bytes, forms: tuple[str, ...]) -> list[Any]:
    proto = onnx.load_from_string(model)
    return [
        lucid_onnx.InferenceSession(lucid_onnx.to_form(proto, form), native=native)
        for form, native in WAYS
        if ("native" if native else form) in forms and (not native or library_path() is not None)
    ]


def check_model(model: onnx.ModelProto, case: Case) -> None:
    for session in ways(model):
        case.check(session.run(None, {n: a for n, a in case.inputs.items() if n != "weight"})[0])


def check_eager(module: Any, case: Case) -> None:
    """torch says what the reference says, as far as torch is exact."""
    two_d = case.indices.ndim == 2
    if (two_d and case.indices.size == 0) or (case.attributes.include_last_offset and len(case.offsets) == 1):
        return  # torch refuses these
    got = array(copy.deepcopy(module)(*arguments(case)))  # a copy: max_norm changes the module
    if case.weight.dtype.itemsize > 2:
        # torch adds row after row, each time off by up to half an ulp of what it has: 2^-24 of the magnitudes a row.
        longest = case.indices.shape[1] if two_d else max(np.diff(case.offsets, append=len(case.indices)), default=0)
        case.check(got, slack=max(1.0, longest * 2.0**-24 / 1e-6))
        return
    # In 16 bits torch rounds clipped rows, weighted rows, the sum and the mean, each by half an ulp of at most the
    # sum of the magnitudes.
    magnitude = reference.embedding_bag(
        case.indices,
        np.abs(case.weight.astype(np.float64)),
        case.offsets,
        per_sample_weights=None
        if case.per_sample_weights is None
        else np.abs(case.per_sample_weights.astype(np.float64)),
        **case.keywords,
    )
    allowed = 4 * 0.5 * float(ml_dtypes.finfo(case.weight.dtype).eps) * magnitude + case.tolerance
    assert (np.abs(got.astype(np.float64) - case.expected().astype(np.float64)) <= allowed).all()


# ---- torch.nn.EmbeddingBag.

#: What `cases.make` is told, by name. The layouts are offsets, offsets with their end, and [B, L].
MODULES: dict[str, dict[str, Any]] = {
    **{
        f"{m}_{layout}": {"mode": m, "layout": layout} for m in spec.ATEN_MODES for layout in ("ragged", "ends", "rows")
    },
    **{
        f"weights_{layout}": {"mode": "sum", "layout": layout, "weighted": True}
        for layout in ("ragged", "ends", "rows")
    },
    "padding_sum": {"mode": "sum", "padding_idx": 3},
    "padding_mean_negative": {"mode": "mean", "padding_idx": -1},
    "padding_max_ends": {"mode": "max", "layout": "ends", "padding_idx": 0},
    "padding_mean_rows_negative": {"mode": "mean", "layout": "rows", "padding_idx": -2},
    "max_norm": {"mode": "mean", "max_norm": 1.3},
    "max_norm_inf": {"mode": "max", "max_norm": 0.7, "norm_type": float("inf")},
    "max_norm_1_rows": {"mode": "sum", "layout": "rows", "max_norm": 2.0, "norm_type": 1.0},
    "everything_ends": {"mode": "sum", "layout": "ends", "weighted": True, "padding_idx": -2, "max_norm": 1.1},
    "everything_rows": {"mode": "sum", "layout": "rows", "weighted": True, "padding_idx": 1, "max_norm": 1.1},
    "float64_max_norm": {"mode": "sum", "dtype": "float64", "max_norm": 1.1, "norm_type": 3.0},
    "float64_mean_rows": {"mode": "mean", "dtype": "float64", "layout": "rows"},
    "float16_mean": {"mode": "mean", "dtype": "float16"},
    "float16_weights_rows": {"mode": "sum", "dtype": "float16", "layout": "rows", "weighted": True},
    "float16_max_norm": {"mode": "sum", "dtype": "float16", "max_norm": 1.1},
    "bfloat16_max": {"mode": "max", "dtype": "bfloat16"},
    "bfloat16_mean_rows": {"mode": "mean", "dtype": "bfloat16", "layout": "rows"},
    "bfloat16_weights": {"mode": "sum", "dtype": "bfloat16", "weighted": True},
    "int32": {"mode": "sum", "index_dtype": "int32", "offsets_dtype": "int32"},
    "int32_rows": {"mode": "sum", "index_dtype": "int32", "layout": "rows"},
    "int32_offsets_int64": {"mode": "mean", "index_dtype": "int32", "offsets_dtype": "int64"},
    "int64_offsets_int32": {"mode": "max", "index_dtype": "int64", "offsets_dtype": "int32"},
}
#: Lengths of bags, none of them those at export: the second starts and ends with empty ones, the third has none at all.
LENGTHS = [(3, 0, 5, 1), (0, 4, 0, 0, 9, 1, 0), (), (1,), (0,)]


class Many(nn.Module):
    """Several bags in one module, each with its own arguments: an export takes a second, whatever its size."""

    def __init__(self, examples: Sequence[Case]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(module_of(example) for example in examples)
        self.counts = [len(arguments(example)) for example in examples]

    def forward(self, *args: Any) -> Any:
        given = iter(args)
        return tuple(bag(*itertools.islice(given, n)) for bag, n in zip(self.bags, self.counts, strict=True))


def check_together(calls: Sequence[Sequence[Case]], forms: Sequence[str] = ("portable", "standard", "native")) -> None:
    """Export bags in one module by their first calls, and make all of their calls."""
    examples = [first for first, *_ in calls]
    module = Many(examples).eval()
    args = tuple(itertools.chain.from_iterable(map(arguments, examples)))
    inputs = [[name for name in example.op.inputs if name != "weight"] for example in examples]
    outputs = [f"bag{k}" for k in range(len(examples))]
    model = from_torch.export(
        module,
        args,
        dynamic_shapes=(dynamic(args),),
        input_names=[f"{bag}.{name}" for bag, names in zip(outputs, inputs, strict=True) for name in names],
        output_names=outputs,
    )
    bags(model)
    nodes = {node.output[0]: node for node in model.graph.node}
    for bag, example in zip(outputs, examples, strict=True):
        assert nodes[bag].op_type == example.op.name, example.name
        (table,) = [t for t in model.graph.initializer if t.name == nodes[bag].input[0]]
        assert table.data_type == onnx.helper.np_dtype_to_tensor_dtype(example.weight.dtype)
        assert numpy_helper.to_array(table).tobytes() == example.weight.tobytes()
    for together in zip(*calls, strict=True):
        feeds = {}
        for bag, names, eager, call in zip(outputs, inputs, module.bags, together, strict=True):
            feeds.update({f"{bag}.{name}": call.inputs[name] for name in names})
            check_eager(eager, call)
        for session in ways(model, forms):
            for call, got in zip(together, session.run(outputs, feeds), strict=True):
                call.check(got)


@pytest.mark.parametrize("start", range(0, len(MODULES), 8))
def test_embedding_bag(start: int) -> None:
    calls = []
    for name in list(MODULES)[start : start + 8]:
        example = cases.make(f"torch_{name}", lengths=(2, 1, 3), **MODULES[name])
        calls.append([example])
        for lengths in LENGTHS:
            again = f"torch_{name}_{lengths}"
            made = cases.make(again, lengths=lengths, length=None if lengths else 3, **MODULES[name])
            calls[-1].append(dataclasses.replace(made, weight=example.weight))
    # What nodes are lowered to has tests of its own, and a session of 8 bags takes seconds without the library.
    several = ["portable", "native"] if start % 16 == 0 or library_path() is None else ["native"]
    check_together(calls, [*several, "standard"] if start == 0 else several)


@st.composite
def modules(draw: st.DrawFn) -> tuple[Case, Case]:
    """Two calls of one module."""
    mode = draw(st.sampled_from(spec.ATEN_MODES))
    rows, dim = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    keywords = {
        "mode": mode,
        "rows": rows,
        "dim": dim,
        "dtype": draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"])),
        "layout": draw(st.sampled_from(["ragged", "ends", "rows"])),
        "weighted": mode == "sum" and draw(st.booleans()),
        "padding_idx": draw(st.one_of(st.none(), st.integers(-rows, rows - 1))),
        "max_norm": draw(st.one_of(st.none(), st.sampled_from([0.1, 1.0, 3.3]))),
        "norm_type": draw(st.sampled_from([2.0, 1.0, np.inf])),
        "index_dtype": draw(st.sampled_from(["int32", "int64"])),
        "offsets_dtype": draw(st.sampled_from(["int32", "int64"])),
    }
    seed = draw(st.integers(0, 2**32 - 1))
    example = cases.make(f"{seed}", lengths=draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)), **keywords)
    lengths = draw(st.lists(st.one_of(st.integers(0, 4), st.integers(0, 70)), max_size=12))
    other = cases.make(f"{seed} again", lengths=lengths, length=None if lengths else 2, **keywords)
    return example, dataclasses.replace(other, weight=example.weight)


@settings(max_examples=2)  # an export takes seconds; tests/test_sweep.py has more of them
@given(st.lists(modules(), min_size=2, max_size=5))
def test_any_modules(calls: list[tuple[Case, Case]]) -> None:
    check_together(calls)


@pytest.mark.parametrize("opset", [18, 21, 26])
def test_opsets(opset: int) -> None:
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"onnx {onnx.__version__} knows no opset {opset}")
    case = cases.make("torch_opset", layout="rows", mode="mean", padding_idx=1)
    try:
        model = exported(case, opset=opset)
    except ValueError as error:
        assert opset > 18
        pytest.skip(str(error))
    assert [i.version for i in model.opset_import if i.domain == ""] == [opset]
    assert model.ir_version == min(10, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))
    assert bags(model) == ["EmbeddingBag2D"]
    check_model(model, case)


@pytest.mark.parametrize("form", ["portable", "standard", "native"])
def test_forms_and_files(form: Any, tmp_path: Path) -> None:
    if form == "native" and library_path() is None:
        pytest.skip("lucid_onnx is installed without its native library")
    case = cases.make("torch_files", rows=3000, mode="sum", layout="ends", weighted=True)
    feeds = {n: a for n, a in case.inputs.items() if n != "weight"}
    for external in (None, False, True) if form == "portable" else (None,):
        path = tmp_path / f"{external}.onnx"
        assert exported(case, path=path, form=form, external_data=external) is None
        assert (tmp_path / f"{path.name}.data").exists() == (external is True)
        light = onnx.load(path, load_external_data=False)
        assert [n.op_type for n in light.graph.node if n.domain] == ([] if form == "standard" else [case.op.name])
        assert bool(light.functions) == (form == "portable")
        assert path.stat().st_size < (60_000 if external else 60_000 + case.weight.nbytes)
        case.check(lucid_onnx.InferenceSession(path, native=form == "native").run(None, feeds)[0])
    assert not list(tmp_path.glob(".*"))
    if form == "portable":
        returned = exported(case, form=form)
        assert returned.SerializeToString() == (tmp_path / "None.onnx").read_bytes()


@pytest.mark.large
def test_a_table_over_2_gib(tmp_path: Path) -> None:
    rows = 2**31 // 64 // 4 + 1000
    module = nn.EmbeddingBag(rows, 64, mode="sum", _weight=torch.zeros(rows, 64)).eval()
    with torch.no_grad():
        module.weight[-1] = 2.0
    args = (torch.tensor([0, rows - 1]), torch.tensor([0]))
    from_torch.export(module, args, tmp_path / "large.onnx", dynamic_shapes=dynamic(args), input_names=["x", "offsets"])
    assert (tmp_path / "large.onnx.data").stat().st_size > 2**31
    session = lucid_onnx.InferenceSession(tmp_path / "large.onnx", native=False)
    feed = {"x": np.array([rows - 1, 0, rows - 1]), "offsets": np.array([0, 2])}
    np.testing.assert_array_equal(session.run(None, feed)[0], np.full((2, 64), 2.0, np.float32))


# ---- What a module may have around its bags.


def check_module(model: onnx.ModelProto, module: Any, *args: Any, magnitude: float = 16.0) -> None:
    """Every output, within 1e-6 of the magnitudes that were summed: here a handful of numbers of 1 to 4 each."""
    expected = [array(value) for value in copy.deepcopy(module)(*args)]
    names = [value.name for value in model.graph.input]
    for session in ways(model):
        got = session.run(None, dict(zip(names, map(array, args), strict=True)))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * magnitude)


class Shared(nn.Module):
    """One table under a Parameter, under another over the same memory, and under an nn.Embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.EmbeddingBag(5000, 16, mode="sum")
        self.second = nn.EmbeddingBag(5000, 16, mode="max", include_last_offset=True)
        self.second.weight = self.first.weight
        self.third = nn.EmbeddingBag.from_pretrained(self.first.weight)
        self.fourth = nn.Embedding(5000, 16)
        self.fourth.weight = self.first.weight
        self.linear = nn.Linear(16, 2)

    def forward(self, x: Any, offsets: Any, rows: Any) -> Any:
        ends = torch.cat([offsets, torch.full((1,), x.shape[0])])
        pooled = self.first(x, offsets) + self.second(x, ends)
        return self.linear(pooled), self.third(rows), self.fourth(rows).sum(1), self.fourth(rows[:, 0])


def test_a_shared_table_is_in_the_file_once(tmp_path: Path) -> None:
    module = Shared().eval()
    args = (torch.arange(7) * 700, torch.tensor([0, 0, 5]), torch.tensor([[1, 4999], [0, 0], [8, 9]]))
    from_torch.export(module, args, tmp_path / "shared.onnx", dynamic_shapes=dynamic(args))
    model = onnx.load(tmp_path / "shared.onnx")
    assert sorted(bags(model)) == ["EmbeddingBag", "EmbeddingBag", "EmbeddingBag2D", "EmbeddingBag2D"]
    assert [list(t.dims) for t in model.graph.initializer if t.dims[:1] == [5000]] == [[5000, 16]]
    assert (tmp_path / "shared.onnx").stat().st_size < 1.25 * 5000 * 16 * 4  # and the functions
    check_module(model, module, *args)
    check_module(model, module, torch.tensor([4]), torch.tensor([0]), torch.tensor([[3, 3, 3, 4]]))


class Several(nn.Module):
    """Bags of other tables, other dtypes and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.EmbeddingBag(30, 4, mode="mean", padding_idx=0)
        self.b = nn.EmbeddingBag(20, 6, mode="max", max_norm=0.5, sparse=False, scale_grad_by_freq=False)
        self.c = nn.EmbeddingBag(20, 6, mode="sum", sparse=True, scale_grad_by_freq=True, dtype=torch.float64)

    def forward(self, x: Any, offsets: Any, weights: Any) -> Any:
        computed = functional.embedding_bag(
            x, self.a.weight * 2.0, offsets, mode="sum", per_sample_weights=weights, padding_idx=-30
        )
        return self.a(x, offsets), self.b(x, offsets).relu(), self.c(x, offsets), computed


def test_several_bags_and_a_computed_table() -> None:
    module = Several().eval()
    args = (torch.tensor([0, 1, 19, 4, 0]), torch.tensor([0, 3]), torch.rand(5))
    model = from_torch.export(module, args, dynamic_shapes=dynamic(args))
    assert sorted(bags(model)) == ["EmbeddingBag", "EmbeddingBag", "EmbeddingBag", "EmbeddingBagWeighted"]
    check_module(model, module, *args)
    check_module(model, module, torch.tensor([0, 2]), torch.tensor([0, 1, 1, 2]), torch.rand(2))


def test_no_run_and_no_export_changes_the_table() -> None:
    case = cases.make("torch_max_norm_stays", mode="sum", max_norm=0.5)
    module, args = module_of(case), arguments(case)
    model = from_torch.export(module, args)
    np.testing.assert_array_equal(array(module.weight), case.weight)
    (table,) = [t for t in model.graph.initializer if list(t.dims) == list(case.weight.shape)]
    np.testing.assert_array_equal(numpy_helper.to_array(table), case.weight)
    assert len(model.graph.output) == 1
    feeds = dict(zip([v.name for v in model.graph.input], (case.indices, case.offsets), strict=True))
    for session in ways(model):
        once, twice = (session.run(None, feeds)[0] for _ in range(2))
        np.testing.assert_array_equal(once, twice)


def test_bags_that_share_a_table_and_its_norm() -> None:
    """torch clips the table for the first, then for the second; that is one clipping."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.EmbeddingBag(12, 4, mode="sum", max_norm=0.8)
            self.b = nn.EmbeddingBag(12, 4, mode="mean", max_norm=0.8)
            self.c = nn.Embedding(12, 4, max_norm=0.8)
            self.b.weight = self.c.weight = self.a.weight
            self.count = 4

        def forward(self, x: Any, y: Any, offsets: Any) -> Any:
            pooled = self.a(x, offsets), self.b(y), self.c(y).amax(1)
            if self.count == 3:
                return pooled
            return *pooled, functional.embedding_bag(y, self.a.weight, mode="max")

    module = Twice().eval()
    args = (torch.tensor([0, 3, 3]), torch.tensor([[3, 11], [5, 6]]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"the table 'p_\w*weight' is read by a bag without a max_norm of its own"):
        from_torch.export(module, args)  # y flattened once more is other indices than those that were clipped
    module.count = 3
    model = from_torch.export(module, args, dynamic_shapes=({0: "n"}, {0: "rows", 1: "length"}, {0: DYNAMIC}))
    assert sorted(bags(model)) == ["EmbeddingBag", "EmbeddingBag2D", "EmbeddingBag2D"]
    assert [d.dim_param for d in model.graph.input[1].type.tensor_type.shape.dim] == ["rows", "length"]
    assert len([t for t in model.graph.initializer if list(t.dims) == [12, 4]]) == 1
    check_module(model, module, *args)
    check_module(model, module, torch.tensor([7]), torch.tensor([[1], [7], [7]]), torch.tensor([0]))


def test_parameters_over_one_memory_and_a_norm() -> None:
    class Views(nn.Module):
        def __init__(self, max_norm: float | None) -> None:
            super().__init__()
            self.a = nn.EmbeddingBag(12, 4, mode="sum", max_norm=0.8)
            self.b = nn.EmbeddingBag.from_pretrained(self.a.weight, mode="max", max_norm=max_norm)

        def forward(self, x: Any, offsets: Any) -> Any:
            return self.a(x, offsets), self.b(x.flip(0), offsets)

    args = (torch.tensor([0, 3, 3]), torch.tensor([0, 2]))
    module = Views(0.8).eval()
    model = from_torch.export(module, args, dynamic_shapes=dynamic(args))
    assert bags(model) == ["EmbeddingBag"] * 2
    assert len([t for t in model.graph.initializer if list(t.dims) == [12, 4]]) == 1
    check_module(model, module, *args)
    with pytest.raises(ValueError, match="is read by a bag without a max_norm of its own"):
        from_torch.export(Views(None).eval(), args)
    with pytest.raises(ValueError, match="share, which torch fails to decompose: give the module itself"):
        from_torch.export(torch.export.export(module, args))
    module.forward = lambda x, offsets: (module.a(x, offsets), module.b.weight.sum(0))
    with pytest.raises(ValueError, match=r"is shared by modules, clipped by max_norm and read by 'sum_1' \(aten\.sum"):
        from_torch.export(module, args)


def test_names_keywords_and_fixed_sizes() -> None:
    case = cases.make("torch_names", mode="sum", weighted=True)
    x, offsets, weights = arguments(case)
    model = from_torch.export(
        module_of(case),
        (x,),
        kwargs={"offsets": offsets, "per_sample_weights": weights},
        input_names=["words", "starts", "tfidf"],
        output_names=["documents"],
        dynamic_shapes={"input": {0: "words"}, "offsets": None, "per_sample_weights": {0: "words"}},
    )
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["words", "starts", "tfidf", "documents"]
    sizes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert sizes == [["words"], [len(case.offsets)], ["words"]]
    feeds = {"words": case.indices, "starts": case.offsets, "tfidf": case.per_sample_weights}
    for session in ways(model):
        case.check(session.run(["documents"], feeds)[0])


@pytest.mark.parametrize(
    ("layout", "lengths"), [("rows", (1,)), ("rows", (3, 3, 3)), ("ragged", (1, 1, 1)), ("ends", (1,))]
)
def test_equal_sizes_and_ones_at_export_stay_open(layout: str, lengths: tuple[int, ...]) -> None:
    example = cases.make("torch_sizes", mode="mean", layout=layout, lengths=lengths)
    model = exported(example)
    assert bags(model) == [example.op.name]
    made = cases.make("torch_sizes_more", mode="mean", layout=layout, lengths=(4, 4))
    check_model(model, dataclasses.replace(made, weight=example.weight))


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (1, 1)])
def test_rows_of_fixed_size(shape: tuple[int, int]) -> None:
    case = cases.make("torch_fixed", mode="sum", layout="rows", lengths=(shape[1],) * shape[0], weighted=True)
    model = from_torch.export(module_of(case), arguments(case), input_names=["indices", "per_sample_weights"])
    assert bags(model) == ["EmbeddingBag2DWeighted"]
    assert len(model.graph.node) == 1
    check_model(model, case)


def test_exported_programs() -> None:
    """As torch.export leaves them, and decomposed, which is where aten._embedding_bag comes from."""
    example = cases.make("torch_program", mode="mean", padding_idx=-1, max_norm=1.0, lengths=(2, 3))
    case = dataclasses.replace(
        cases.make("torch_program_more", mode="mean", padding_idx=-1, max_norm=1.0), weight=example.weight
    )
    args = arguments(example)
    program = torch.export.export(module_of(example), args, dynamic_shapes=dynamic(args))
    with torch.no_grad():
        decomposed = torch.export.export(module_of(example), args, dynamic_shapes=dynamic(args)).run_decompositions()
    assert torch.ops.aten._embedding_bag.default in {node.target for node in decomposed.graph.nodes}
    for one in (program, decomposed):
        model = from_torch.export(one, input_names=["indices", "offsets"])
        assert bags(model) == ["EmbeddingBag"]
        check_model(model, case)


@pytest.mark.parametrize("overload", ["embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"])
def test_overloads_called_by_name(overload: str) -> None:
    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 3))

        def forward(self, x: Any, offsets: Any) -> Any:
            return (getattr(torch.ops.aten, overload)(self.weight, x, offsets, False, 1)[0],)

    module = Call().eval()
    args = (torch.tensor([8, 1, 2, 2]), torch.tensor([0, 3]))
    with torch.no_grad():  # what "forward only" means
        model = from_torch.export(module, args, dynamic_shapes=dynamic(args))
        assert bags(model) == ["EmbeddingBag"]
        check_module(model, module, *args)
        check_module(model, module, torch.tensor([0]), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("name", ["max_norm", "everything_rows", "weights_ends"])
def test_the_table_alone(name: str) -> None:
    """torch.onnx.export with our translations, then to_form."""
    example = cases.make(f"torch_{name}", lengths=(2, 1, 3), **MODULES[name])
    args = arguments(example)
    program = torch.onnx.export(
        module_of(example),
        args,
        dynamic_shapes=dynamic(args),
        input_names=[n for n in example.op.inputs if n != "weight"],
        dynamo=True,
        opset_version=18,
        custom_translation_table=from_torch.translation_table(),
        verbose=False,
    )
    model = lucid_onnx.to_form(program.model_proto, "portable")
    assert bags(model) == [example.op.name]
    made = cases.make(f"torch_{name}_table", lengths=(3, 0, 4), **MODULES[name])
    check_model(model, dataclasses.replace(made, weight=example.weight))


def test_a_bag_in_a_branch() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 3, mode="sum")
            self.other = nn.Embedding(9, 3)

        def forward(self, x: Any, flag: Any) -> Any:
            return (torch.cond(flag.sum() > 0, lambda y: self.bag(y), lambda y: self.other(y).sum(1), (x,)),)

    module = Branch().eval()
    args = (torch.tensor([[8, 1, 2], [2, 2, 0]]), torch.tensor([1]))
    model = from_torch.export(module, args, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC}, None))
    assert bags(model) == ["EmbeddingBag2D", "EmbeddingBag2D"]
    for flag in (0, 1):
        check_module(model, module, args[0], torch.tensor([flag]))


# ---- torch.nn.Embedding that is pooled.


class Pools(nn.Module):
    """Each function over rows of its own table."""

    def __init__(self, *functions: Callable[..., Any], dtype: Any = None, **keywords: Any) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(11, 3, dtype=dtype, **keywords) for _ in functions)
        for table in self.tables:
            nn.init.normal_(table.weight)  # the padding row too: it counts in the forward pass
        self.functions = functions

    def forward(self, x: Any) -> Any:
        return tuple(f(table(x)) for f, table in zip(self.functions, self.tables, strict=True))


POOLINGS: list[Callable[..., Any]] = [
    lambda e: e.sum(1),
    lambda e: torch.sum(e, dim=-2),
    lambda e: e.sum((1,), keepdim=True),
    lambda e: e.mean(1),
    lambda e: e.mean(dim=[-2], keepdim=True),
    lambda e: e.amax(1),
    lambda e: e.amax(dim=-2, keepdim=True),
    lambda e: e.max(1).values,
    lambda e: torch.max(e, 1, keepdim=True)[0],
]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_pooled_embedding_is_a_bag(index: Any) -> None:
    functions = POOLINGS if index == torch.int64 else POOLINGS[:1]
    module = Pools(*functions, padding_idx=2).eval()
    x = torch.tensor([[0, 2, 2, 10], [2, 2, 2, 2]], dtype=index)
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert bags(model) == ["EmbeddingBag2D"] * len(functions)
    assert not {"Gather", "ReduceSum", "ReduceMean", "ReduceMax"} & {n.op_type for n in model.graph.node}
    check_module(model, module, x)
    for shape in ((3, 1), (1, 70), (0, 5)):
        check_module(model, module, torch.randint(0, 11, shape, dtype=index), magnitude=max(16, 4 * shape[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_pooled_embeddings_of_other_dtypes(dtype: Any) -> None:
    # Twice the rows, for a 16-bit reduction that is an output itself leaves torch's exporter as float32.
    functions = [lambda e, f=f: torch.cat([f(e)] * 2) for f in POOLINGS[::3]]
    module = Pools(*functions, dtype=dtype).eval()
    x = torch.tensor([[0, 2, 2, 10], [2, 1, 2, 3]])
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert bags(model) == ["EmbeddingBag2D"] * 3
    for mode, table, k in zip(("sum", "mean", "max"), module.tables, range(3), strict=True):
        case = Case(f"{dtype} {mode}", array(table.weight), x.numpy(), None, None, spec.Attributes(mode))
        for session in ways(model):
            got = session.run(None, {"x": x.numpy()})[k]
            case.check(got[:2].reshape(case.expected().shape))


def test_a_sequence_of_length_0() -> None:
    """As in torch: a sum is 0, a mean NaN, a maximum an error. A bag without rows would be 0 in all of them."""
    empty = np.zeros((2, 0), np.int64)
    x = torch.tensor([[0, 2, 2], [2, 2, 2]])
    for dtype, functions in ((torch.float32, POOLINGS[:5]), (torch.bfloat16, POOLINGS[3:4])):
        module = Pools(*functions, dtype=dtype).eval()
        model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
        assert bags(model) == ["EmbeddingBag2D"] * len(functions)
        expected = [array(value) for value in module(torch.from_numpy(empty))]
        assert any(np.isnan(e.astype(np.float32)).all() for e in expected)
        for session in ways(model):
            for one, other in zip(session.run(None, {"x": empty}), expected, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))
    module = Pools(POOLINGS[5]).eval()
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    with pytest.raises(IndexError, match="non-zero size"):
        module(torch.from_numpy(empty))
    for session in ways(model):
        with pytest.raises(Exception, match="cannot be reshaped"):
            session.run(None, {"x": empty})
        assert session.run(None, {"x": np.zeros((2, 1), np.int64)})[0].shape == (2, 3)  # and goes on


def test_a_sequence_of_fixed_length() -> None:
    module = Pools(*POOLINGS).eval()
    x = torch.tensor([[0, 2, 2], [2, 1, 2]])
    model = from_torch.export(module, (x,), dynamic_shapes=({0: DYNAMIC},))
    assert bags(model) == ["EmbeddingBag2D"] * len(POOLINGS)
    assert {n.op_type for n in model.graph.node if not n.domain} <= {"Unsqueeze"}  # nothing for lengths of 0
    check_module(model, module, x)
    mean = Pools(POOLINGS[3], POOLINGS[0]).eval()
    model = from_torch.export(mean, (x[:, :0],))
    assert bags(model) == ["EmbeddingBag2D"]  # the sum


def test_max_norm_of_a_pooled_embedding() -> None:
    module = Pools(POOLINGS[0], POOLINGS[6], max_norm=0.7, norm_type=1.0).eval()
    x = torch.tensor([[0, 2, 2, 10], [2, 2, 1, 3]])
    before = [table.weight.detach().clone() for table in module.tables]
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert bags(model) == ["EmbeddingBag2D"] * 2
    assert all(torch.equal(a, b.weight) for a, b in zip(before, module.tables, strict=True))
    check_module(model, module, x)


class Masked(nn.Module):
    """Rows of a table, ids and a mask [B, L, 1], pooled by a function."""

    def __init__(self, function: Callable[..., Any], **keywords: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 3, **keywords)
        self.function = function

    def forward(self, x: Any, mask: Any) -> Any:
        return (self.function(self.table(x), mask.unsqueeze(-1).to(torch.float32)),)


def masked_mean(rows: Any, mask: Any) -> Any:
    return (rows * mask).sum(1) / mask.sum(1).clamp(min=1)


MASKED = torch.tensor([[0, 2, 2, 10], [2, 1, 7, 3]]), torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_what_fuse_finds_export_finds(max_norm: float | None) -> None:
    module = Masked(masked_mean, max_norm=max_norm).eval()
    model = from_torch.export(module, MASKED, dynamic_shapes=dynamic(MASKED))
    assert len(bags(model)) == 1
    assert not {"Gather", "Mul"} & {n.op_type for n in model.graph.node}
    assert lucid_onnx.fuse(model).fused == ()
    check_module(model, module, *MASKED)
    check_module(model, module, MASKED[0][:1, :2], MASKED[1][:1, :2])


def test_a_masked_pooling_in_a_branch() -> None:
    class Branch(Masked):
        def forward(self, x: Any, mask: Any) -> Any:
            pooled = torch.cond(
                mask.sum() > 2,
                lambda x, mask: (self.table(x) * mask.unsqueeze(-1)).sum(1),
                lambda x, mask: self.table(x).sum(1),
                (x, mask.to(torch.float32)),
            )
            return (pooled,)

    module = Branch(len).eval()
    model = from_torch.export(module, MASKED, dynamic_shapes=dynamic(MASKED))
    assert len(bags(model)) == 2
    check_module(model, module, *MASKED)
    check_module(model, module, MASKED[0], 1 - MASKED[1])


def test_what_is_left_is_said(tmp_path: Path) -> None:
    """With the node and the reason; the file is written all the same."""
    module = Masked(lambda rows, mask: (rows * mask).amax(1)).eval()
    with pytest.warns(from_torch.UnfusedWarning, match=r"'\w+' \(ReduceMax\): ReduceMax over rows that a Mul") as found:
        from_torch.export(module, MASKED, tmp_path / "left.onnx", dynamic_shapes=dynamic(MASKED))
    (warning,) = [w for w in found if w.category is from_torch.UnfusedWarning]
    assert warning.filename == __file__
    check_module(onnx.load(tmp_path / "left.onnx"), module, *MASKED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", from_torch.UnfusedWarning)
        from_torch.export(module, MASKED, embedding_as_bag=False)  # nobody asked


def test_rows_that_are_read_elsewhere_too_are_said() -> None:
    module = Masked(lambda rows, mask: torch.cat([(rows * mask).sum(1), rows[:, 0]], 1)).eval()
    with pytest.warns(from_torch.UnfusedWarning, match=r"'\w+' \(Gather\): its rows are read by node '\w+' \(Gather\)"):
        model = from_torch.export(module, MASKED, dynamic_shapes=dynamic(MASKED))
    assert bags(model) == []
    check_module(model, module, *MASKED)


def test_rows_that_several_poolings_read() -> None:
    module = Masked(lambda rows, mask: torch.cat([(rows * mask).sum(1), rows.sum(1) + rows.amax(1)], 1)).eval()
    model = from_torch.export(module, MASKED, dynamic_shapes=dynamic(MASKED))
    assert len(bags(model)) == 3
    assert "Gather" not in {n.op_type for n in model.graph.node}
    check_module(model, module, *MASKED)


LOOK_ALIKES: dict[str, Callable[..., Any]] = {
    "another axis": lambda e: e.sum(2),
    "two axes": lambda e: e.sum((1, 2)),
    "all axes": lambda e: e.sum(),
    "another dtype": lambda e: e.sum(1, dtype=torch.float64),
    "converted": lambda e: e.double().mean(1),
    "masked": lambda e: (e * (e > 0)).sum(1),
    "indices too": lambda e: torch.add(*e.max(1)),
    "another reduction": lambda e: e.prod(1),
    "log-sum-exp": lambda e: e.logsumexp(1),
    "minimum": lambda e: e.amin(1),
    "used elsewhere": lambda e: e.mean(1) + e[:, 0],
    "transposed": lambda e: e.transpose(1, 2).sum(1),
}


def test_look_alikes_are_no_bags() -> None:
    module = Pools(*LOOK_ALIKES.values()).eval()
    x = torch.tensor([[0, 2, 2], [9, 1, 2]])
    with pytest.warns(from_torch.UnfusedWarning, match="poolings of an embedding are exported as torch writes them"):
        model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert bags(model) == []
    assert len([n for n in model.graph.node if n.op_type == "Gather"]) >= len(LOOK_ALIKES)
    assert spec.DOMAIN not in {i.domain for i in model.opset_import}
    check_module(model, module, x)


def test_an_embedding_that_is_an_output_is_no_bag() -> None:
    class Both(Pools):
        def forward(self, x: Any) -> Any:
            rows = self.tables[0](x)
            return rows, rows.sum(1)

    module = Both(len).eval()
    x = torch.tensor([[0, 2, 2], [9, 1, 2]])
    model = from_torch.export(module, (x,))
    assert bags(model) == []
    check_module(model, module, x)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)])
def test_any_axis_of_the_indices_and_any_part(shape: tuple[int, ...]) -> None:
    functions: list[Callable[..., Any]] = [lambda e: e.sum(0), lambda e: e.mean(-2), lambda e: e[1:].sum(0)]
    functions += [lambda e: e.amax(1), lambda e: e.sum(0, keepdim=True)] if len(shape) > 1 else []
    module = Pools(*functions).eval()
    x = torch.randint(0, 11, shape)
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert len(bags(model)) == len(functions)
    check_module(model, module, x)
    check_module(model, module, torch.randint(0, 11, (4, 5, 2)[: len(shape)]))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_of_an_indexed_tensor(index: Any) -> None:
    """Indexing takes -1 for the last row, which a bag rejects: the indices are counted from the end before it."""

    class Indexed(Pools):
        def forward(self, x: Any) -> Any:
            table = self.tables[0].weight
            return table[x].sum(1), (table[x] * (x > 0).unsqueeze(-1)).sum(1), table[x]

    module = Indexed(len).eval()
    module.forward = lambda x: Indexed.forward(module, x)[:2]
    x = torch.tensor([[0, -2, 2], [9, 1, -1]], dtype=index)
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert len(bags(model)) == 2
    check_module(model, module, x)
    module.forward = lambda x: Indexed.forward(module, x)[2:]
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert [n.op_type for n in model.graph.node if n.op_type != "Cast"] == ["Gather"]
    check_module(model, module, x)


def test_rows_of_integers_are_no_bag() -> None:
    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-9, 9, (11, 3)))
            self.register_buffer("flags", torch.randint(0, 2, (11, 3)).bool())

        def forward(self, x: Any) -> Any:
            return functional.embedding(x, self.codes).sum(1), functional.embedding(x, self.flags)

    module = Integers().eval()
    x = torch.tensor([[0, 2, 2], [9, 1, 10]])
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)))
    assert bags(model) == []
    check_module(model, module, x)


def test_embedding_as_bag_can_be_off() -> None:
    module = Pools(*POOLINGS[:4]).eval()
    x = torch.tensor([[0, 2, 2], [9, 1, 2]])
    model = from_torch.export(module, (x,), dynamic_shapes=dynamic((x,)), embedding_as_bag=False)
    assert bags(model) == []
    check_module(model, module, x)


# ---- What is refused.


@pytest.mark.parametrize(
    ("output", "name", "returned"),
    [(1, "offset2bag", True), (2, "bag_size", False), (3, "max_indices", True), (3, "max_indices", False)],
)
def test_the_other_outputs_of_a_bag(output: int, name: str, returned: bool) -> None:
    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 3))

        def forward(self, x: Any, offsets: Any) -> Any:
            outputs = torch.embedding_bag(self.weight, x, offsets, False, 2)
            return (outputs[output],) if returned else outputs[0].sum() + outputs[output].sum()

    args = (torch.tensor([8, 1, 2, 2]), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=rf"^the module uses {name}, output {output} of torch\.embedding_bag"):
        from_torch.export(Call().eval(), args)


def test_indices_of_two_dimensions_with_offsets() -> None:
    """torch.embedding_bag reads them wrong itself, and may read past their end."""

    class Call(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.weight, self.name = nn.Parameter(torch.randn(9, 3)), name

        def forward(self, x: Any, offsets: Any) -> Any:
            return getattr(torch.ops.aten, self.name)(self.weight, x, offsets)[0]

    rows, offsets = torch.tensor([[8, 1], [2, 2]]), torch.tensor([0, 1])
    for name in ("embedding_bag", "_embedding_bag"):
        with pytest.raises(ValueError, match=r"with offsets and indices of shape \[2, 2\]: flatten these"):
            from_torch.export(Call(name).eval(), (rows, offsets))


def test_tables_that_max_norm_changed() -> None:
    class Changed(nn.Module):
        def __init__(self, use: Callable[..., Any]) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(12, 4, mode="sum", max_norm=0.8)
            self.use = use

        def forward(self, x: Any, offsets: Any) -> Any:
            return self.bag(x, offsets), self.use(self.bag.weight, x)

    args = (torch.tensor([0, 3, 3]), torch.tensor([0, 2]))
    uses: dict[str, Callable[..., Any]] = {
        r"the table 'bag\.weight' is read by 'node_\w+' after max_norm = 0\.8 changed it": lambda w, x: w.sum(),
        r"'p_bag_weight' is read by a bag without a max_norm of its own .*max_norm = 0\.8": lambda w, x: (
            functional.embedding_bag(x.flip(0), w, torch.tensor([0]))
        ),
        r"shared by lookups of max_norm = 0\.8 \(norm_type = 2\.0\) and 0\.5 \(norm_type = 1\.0\)": lambda w, x: (
            functional.embedding_bag(x, w, torch.tensor([0]), max_norm=0.5, norm_type=1.0)
        ),
    }
    for message, use in uses.items():
        with pytest.raises(ValueError, match=message):
            from_torch.export(Changed(use).eval(), args)
    # Read before it is changed, or a copy of it: nothing of the change is seen.
    module = Changed(lambda w, x: w).eval()
    module.forward = lambda x, offsets: (module.bag.weight.sum(0), module.bag(x, offsets))
    check_module(from_torch.export(module, args), module, *args)


def test_max_norm_without_pooling() -> None:
    x = torch.tensor([[0, 2, 2], [9, 1, 2]])
    for as_bag, function in ((True, lambda e: e.relu()), (False, lambda e: e.sum(1))):
        with pytest.raises(ValueError, match=r"the table 'tables\.0\.weight' is read by .* after max_norm = 0\.7"):
            from_torch.export(Pools(function, max_norm=0.7).eval(), (x,), embedding_as_bag=as_bag)


def test_bad_arguments() -> None:
    case = cases.make("torch_refused", mode="sum")
    module, args = module_of(case), arguments(case)
    for opset in (17, 27, 0):
        with pytest.raises(ValueError, match=rf"opset = {opset} is outside \[18, 26\]"):
            from_torch.export(module, args, opset=opset)
    with pytest.raises(TypeError, match=r"opset = '18' must be an integer"):
        from_torch.export(module, args, opset="18")
    with pytest.raises(ValueError, match=r"form = 'fast' is not one of 'portable', 'standard', 'native'"):
        from_torch.export(module, args, form="fast")
    with pytest.raises(ValueError, match=r"max_norm = -1\.0 must be >= 0"):
        from_torch.export(nn.EmbeddingBag(4, 2, max_norm=-1.0).eval(), args)


def test_parameters_without_data(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        module = nn.EmbeddingBag(4, 2, mode="sum").eval()
        args = (torch.tensor([0, 3]), torch.tensor([0]))
    assert mode is not None
    with pytest.raises(ValueError, match="parameter 'weight' has no data"):
        from_torch.export(module, args, tmp_path / "fake.onnx")
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_export_stays_its_own_error() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.eig(x)

    with pytest.raises(torch.onnx.OnnxExporterError):
        from_torch.export(Unknown().eval(), (torch.eye(3),))


# ---- Constants, and the passes over the exported graph.

#: Constants near 0, and what is added to 1 for one near 1.
NEAR = [1e-8, -1e-8, 1e-9, 1e-16, 1e-45, 1e-5, -1e-5, 9e-6, 2.0**-7, 2.0**-10, 2.0**-23, 2.0**-52]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Arithmetic(nn.Module):
    """Each of NEAR in every operation, rounded to the dtype, as torch's exporter does it before it adds."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        # Not -0.0, which torch's exporter takes for the 0.0 before it.
        self.small = [float(torch.tensor(c, dtype=torch.float64).to(dtype)) + 0.0 for c in NEAR]
        self.ones = [float(torch.tensor(1 + c, dtype=torch.float64).to(dtype)) for c in NEAR]

    def forward(self, x: Any) -> Any:
        exact = [y for c in self.small for y in (x + c, c + x, x - c, c - x, x * c)]
        exact += [y for c in self.ones for y in (x * c, c * x, x / c, x - c)]
        return tuple(exact), tuple(x**c for c in self.ones)


def numbers(dtype: Any) -> Any:
    return torch.tensor([0.0, -0.0, 1.0, 3.0, 1e-7, 1e-8, -2.0, 60000.0, 1e-45, torch.inf, torch.nan], dtype=dtype)


def bits(value: Any) -> list[Any]:
    """The bits of a tensor, with one NaN for all."""
    value = value.detach().double()
    return torch.where(value.isnan(), torch.full_like(value, torch.nan), value).view(torch.int64).tolist()


def evaluated(model: onnx.ModelProto, x: Any) -> list[Any]:
    """The outputs of a model of torch's arithmetic; by torch, node for node, where onnxruntime has no bfloat16."""
    if x.dtype != torch.bfloat16:
        session = lucid_onnx.InferenceSession(model, native=False)
        return [torch.from_numpy(a) for a in session.run(None, {"x": x.numpy()})]
    functions = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow}
    values = {t.name: tensor(numpy_helper.to_array(t)) for t in model.graph.initializer} | {"x": x}
    for node in model.graph.node:
        a, *b = (values[name] for name in node.input)
        values[node.output[0]] = a if node.op_type == "Identity" else functions[node.op_type](a, *b)
    return [values[o.name] for o in model.graph.output]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_constants_near_0_and_1(dtype: Any) -> None:
    """onnxscript's optimizer takes 1e-8 for 0 and 1.000009 for 1, and torch's exporter has float64 ones in float32."""
    module, x = Arithmetic(dtype).eval(), numbers(dtype)
    model = from_torch.export(module, (x,), dynamic_shapes=({0: DYNAMIC},), input_names=["x"])
    found = evaluated(model, x)
    exact, powers = module(x)
    for k, (got, want) in enumerate(zip(found, exact, strict=False)):
        assert bits(got) == bits(want), (k, got, want)
    for got, want in zip(found[len(exact) :], powers, strict=True):  # nobody's power is exact
        torch.testing.assert_close(got, want, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert len([n for n in model.graph.node if n.op_type == "Pow"]) >= len(set(module.ones)) - 1  # x ** 1 may go


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constants_with_the_translation_table_alone(dtype: Any) -> None:
    """As the docstring says: optimize=False, since torch's own optimizer is the tolerant one."""
    module, x = Arithmetic(dtype).eval(), numbers(dtype)
    program = torch.onnx.export(
        module,
        (x,),
        dynamo=True,
        dynamic_shapes=({0: DYNAMIC},),
        input_names=["x"],
        custom_translation_table=from_torch.translation_table(),
        optimize=False,
        verbose=False,
    )
    assert "optimize=False" in from_torch.translation_table.__doc__
    for got, want in zip(evaluated(lucid_onnx.to_form(program.model_proto, "portable"), x), module(x)[0], strict=False):
        assert bits(got) == bits(want)


def test_a_mean_over_a_bag_of_padding_alone() -> None:
    class History(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(50, 8)

        def forward(self, ids: Any) -> Any:
            kept = (ids != 0).float()
            return (self.items(ids) * kept.unsqueeze(-1)).sum(1) / (kept.sum(1, keepdim=True) + 1e-8)

    module, ids = History().eval(), torch.tensor([[3, 4, 0], [0, 0, 0]])
    model = from_torch.export(module, (ids,), input_names=["ids"], dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    got = lucid_onnx.InferenceSession(model, native=False).run(None, {"ids": ids.numpy()})[0]
    np.testing.assert_allclose(got, array(module(ids)), rtol=0, atol=1e-6)
    assert not got[1].any()


def test_passes_that_would_change_values() -> None:
    """Each line is one of onnxscript's rules that is not exact, and was applied."""

    class Lines(nn.Module):
        def forward(self, x: Any, wide: Any) -> Any:
            return (
                x[:, :2],  # two slices of an odd size as a Split in two, which are 3 and 2
                x[:, 2:5],
                wide.float().half(),  # one Cast for two, which rounds once
                torch.maximum(torch.minimum(x, torch.tensor(1.0)), torch.tensor(0.5)),
                torch.relu(torch.clamp(x, -1.0, 1.0)),
                x + 0.0,  # which makes -0.0 0.0
                x * torch.tensor(1.000009),
            )

    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -3.0], [1e-9, 0.7, 1.0, 2.0, -torch.inf]])
    wide = torch.tensor([1 + 2.0**-11 + 2.0**-30, 1 + 3 * 2.0**-11 - 2.0**-30], dtype=torch.float64)
    module = Lines().eval()
    model = from_torch.export(module, (x, wide), input_names=["x", "wide"], dynamic_shapes=({0: DYNAMIC}, {0: DYNAMIC}))
    got = lucid_onnx.InferenceSession(model, native=False).run(None, {"x": x.numpy(), "wide": wide.numpy()})
    for k, (a, b) in enumerate(zip(got, module(x, wide), strict=True)):
        assert bits(torch.from_numpy(a)) == bits(b), (k, a, b)


def test_without_torch_the_import_says_what_to_install(tmp_path: Path) -> None:
    """Each package that it needs is missing in turn, in the order in which they are imported."""
    script = (
        "import sys, lucid_onnx\n"
        "lucid_onnx.build_model([[1.0]])\n"
        "for missing in ('onnx_ir', 'onnxscript', 'torch'):\n"
        "    sys.modules[missing] = None\n"
        "    try:\n        import lucid_onnx.torch\n"
        "    except ImportError as error:\n        print(error)\n"
        "    del sys.modules[missing]"
    )
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"lucid_onnx.torch needs {missing}, which is not installed: pip install 'lucid-onnx[torch]'"
        for missing in ("onnx_ir", "onnxscript", "torch")
    ]


@pytest.mark.parametrize("package", ["onnx_ir", "onnxscript", "torch"])
def test_a_package_that_does_not_load_is_not_called_missing(tmp_path: Path, package: str) -> None:
    for source, message in (
        ("raise ImportError('GLIBCXX_3.4.29 not found')", "ImportError: GLIBCXX_3.4.29 not found"),
        (f"import {package}.gone", f"No module named '{package}.gone'"),
    ):
        (tmp_path / f"{package}.py").write_text(source)
        done = run_script("import sys; sys.path.insert(0, ''); import lucid_onnx.torch", tmp_path)
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]


@needs_library
def test_the_library_refuses_a_bad_index_of_an_exported_model() -> None:
    case = cases.make("torch_bad_index", mode="sum", layout="rows")
    session = lucid_onnx.InferenceSession(exported(case))
    with pytest.raises(Exception, match=r"indices\[0, 1\] = 10 is outside \[0, 10\)"):
        session.run(None, {"indices": np.array([[1, 10]])})


class _Pooled(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(10, 8).to(dtype)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = self.words(ids)
        return rows.sum(1), rows.amax(1), rows.sum(2), rows


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_have_the_modules_type(dtype: torch.dtype, named: bool, tmp_path: Path) -> None:
    """torch's exporter leaves sums and maxima of 16 bits in float32, if they are outputs."""
    module, ids = _Pooled(dtype).eval(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    names = ["sum", "max", "by position", "rows"] if named else None
    path = tmp_path / "pooled.onnx"
    with torch.no_grad(), pytest.warns(lucid_onnx.torch.UnfusedWarning):  # of the sum over columns
        lucid_onnx.torch.export(module, (ids,), path, output_names=names)
    model = onnx.load(path)
    short = onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.BFLOAT16
    onnx.checker.check_model(model, full_check=True)
    assert [v.type.tensor_type.elem_type for v in model.graph.output] == [short] * 4
    assert names is None or [v.name for v in model.graph.output] == names
    assert [n.op_type for n in model.graph.node if n.domain == spec.DOMAIN] == ["EmbeddingBag2D"] * 2
    if dtype == torch.float16:  # of bfloat16 ONNX Runtime has few operators
        found = lucid_onnx.InferenceSession(path).run(None, {model.graph.input[0].name: ids.numpy()})
        for a, b in zip(found, module(ids), strict=True):
            assert a.dtype == np.float16
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=2**-9, atol=2**-9)  # two roundings of 16 bits
