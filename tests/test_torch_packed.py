"""Export of tables that torch quantized: its modules, and what they call, become QuantizedEmbeddingBag."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable
from lucid_testing.models import results, ways_to_run

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import lucid_onnx.torch as from_torch  # noqa: E402  # needs torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # torch's own, from its own code
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
]

DYNAMIC = torch.export.Dim.DYNAMIC
V = 10
FLAT = (torch.tensor([1, 9, 3, 4, 4]), torch.tensor([0, 2, 2]))
ENDS = (torch.tensor([1, 9, 3, 4, 4], dtype=torch.int32), torch.tensor([0, 2, 2, 5], dtype=torch.int32))
ROWS = (torch.tensor([[1, 2, 3], [9, 0, 6]]),)
FACTORS = torch.tensor([0.5, -2.0, 1.0, 3.0, 0.25])


@pytest.fixture(scope="module", autouse=True)
def _translations_read_once(translations: None) -> None:
    """For every test of this file."""


def quantized(module: Any, bits: int) -> Any:
    """A module of torch as torch quantizes it."""
    import torch.ao.quantization as quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        four = quantization.float_qparams_weight_only_qconfig_4bit
        whole = torch.nn.Sequential(module)
        module.qconfig = four if bits == 4 else quantization.float_qparams_weight_only_qconfig
        return quantization.convert(quantization.prepare(whole))[0].eval()


class Call(torch.nn.Module):
    """An operator over a table that this module has, as a tensor or as torch's object."""

    def __init__(self, operator: Callable[..., Any], table: Any, **keywords: Any) -> None:
        super().__init__()
        self.operator, self.keywords = operator, keywords
        if isinstance(table, torch.Tensor):
            self.register_buffer("table", table)
        else:
            self.table = table

    def forward(self, *args: Any) -> Any:
        return self.operator(self.table, *args, **self.keywords)


def weight(dim: int = 6) -> Any:
    return torch.from_numpy(np.random.default_rng(5).standard_normal((V, dim)).astype(np.float32))


def ops(name: str) -> Any:
    return getattr(torch.ops.quantized, name)


def check(module: Any, args: tuple[Any, ...], op: str, *, dynamic: bool = True, forms: int = 1) -> onnx.ModelProto:
    """Exported, the module is one such node, and says what it says in torch; in the first so many ways to run it."""
    shapes: Any = tuple(dict.fromkeys(range(a.dim()), DYNAMIC) for a in args) if dynamic else None
    if shapes is not None and isinstance(module, Call):  # which takes any number
        shapes = (shapes,)
    names = ["indices", "offsets"][: len(args)]
    model = from_torch.export(module, args, dynamic_shapes=shapes, input_names=names)
    assert [n.op_type for n in model.graph.node if n.domain == spec.DOMAIN] == [op]
    onnx.checker.check_model(model, full_check=True)
    expected = module(*args).detach().numpy()
    for form, (made, native) in list(reversed(ways_to_run(model).items()))[:forms]:
        (got,) = results(made, dict(zip(names, (a.numpy() for a in args), strict=True)), native=native)
        # Two roundings of numbers up to 4 for each of up to 5 rows.
        np.testing.assert_allclose(got, expected, rtol=0, atol=5 * 2 * 4 * 2.0**-24, err_msg=form)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_quantized_embedding_bag(bits: int, mode: Any) -> None:
    """torch's quantized module sums, whatever its mode says."""
    module = quantized(torch.nn.EmbeddingBag(V, 6, mode=mode, _weight=weight()), bits)
    before = vars(module._packed_params)["_packed_weight"]
    model = check(module, FLAT, "QuantizedEmbeddingBagBias", forms=3)
    check(module, ROWS, "QuantizedEmbeddingBagBias2D", dynamic=False)
    assert vars(module._packed_params)["_packed_weight"] is before  # and the module is what it was
    table = {t.name.rsplit(".")[-1]: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    packed = ops("embedding_bag_byte_prepack" if bits == 8 else "embedding_bag_4bit_prepack")(weight())
    size = QuantizedTable.from_torch_prepacked(packed.numpy(), f"uint{bits}").nbytes
    assert sum(a.nbytes for a in table.values()) == size
    assert "table" not in " ".join(table)


@pytest.mark.parametrize(("dim", "bits"), [(5, 8), (5, 4), (1, 8), (2, 4)])
def test_rows_are_unpacked_to_the_bit(dim: int, bits: int) -> None:
    """What is read from torch's object is what torch's operator on tensors reads. (A fifth value of 4 bits has a hole
    beside it, which torch takes for a sixth.)"""
    from lucid_onnx.torch.packed import unpacked

    module = quantized(torch.nn.EmbeddingBag(V, dim, mode="sum", _weight=weight(dim)), bits)
    rows = unpacked(module._packed_params._packed_weight)
    name = {8: "embedding_bag_byte_rowwise_offsets", 4: "embedding_bag_4bit_rowwise_offsets"}[bits]
    assert torch.equal(ops(name)(rows, *FLAT), module(*FLAT))
    check(module, FLAT, "QuantizedEmbeddingBagBias")


@pytest.mark.parametrize("name", ["byte", "4bit"])
def test_operators(name: str) -> None:
    rows = ops(f"embedding_bag_{name}_prepack")(weight())
    packed = ops("embedding_bag_prepack")(quantized(torch.nn.EmbeddingBag(V, 6, _weight=weight()), 8).weight())
    operator = ops(f"embedding_bag_{name}_rowwise_offsets")
    check(Call(operator, rows, include_last_offset=True), ENDS, "QuantizedEmbeddingBagBias")
    weighted = Call(operator, rows, per_sample_weights=FACTORS)
    check(weighted, FLAT, "QuantizedEmbeddingBagBiasWeighted", dynamic=False)
    check(Call(ops("embedding_bag_byte"), packed, mode=2), FLAT, "QuantizedEmbeddingBagBias")


def test_a_quantized_embedding() -> None:
    """Each index is a bag."""
    module = quantized(torch.nn.Embedding(V, 6, _weight=weight()), 8)
    for indices in (*ROWS, FLAT[0]):
        check(module, (indices,), "QuantizedEmbeddingBagBias2D")


def test_a_table_that_is_no_attribute() -> None:
    packed = quantized(torch.nn.EmbeddingBag(V, 6, _weight=weight()), 8)._packed_params._packed_weight

    class Global(torch.nn.Module):
        def forward(self, indices: Any, offsets: Any) -> Any:
            return ops("embedding_bag_byte")(packed, indices, offsets)

    check(Global().eval(), FLAT, "QuantizedEmbeddingBagBias")


def test_tables_that_are_shared() -> None:
    """By two modules: in the file once."""
    first = quantized(torch.nn.EmbeddingBag(V, 6, mode="sum", _weight=weight()), 8)

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.packed = first, first._packed_params._packed_weight

        def forward(self, indices: Any, offsets: Any) -> Any:
            return self.first(indices, offsets) + ops("embedding_bag_byte")(self.packed, indices.flip(0), offsets)

    model = from_torch.export(Twice().eval(), FLAT)
    assert [n.op_type for n in model.graph.node if n.domain] == ["QuantizedEmbeddingBagBias"] * 2
    assert len(model.graph.initializer) - len([t for t in model.graph.initializer if t.data_type == 7]) == 3


def test_what_is_rejected() -> None:
    """By the operator, which torch's exporter calls; and by the export."""
    from lucid_onnx.torch.packed import packed_tables
    from lucid_onnx.torch.placeholders import RejectedError

    two = ops("embedding_bag_2bit_prepack")(weight(8))
    eight = ops("embedding_bag_byte_prepack")(weight())
    four = quantized(torch.nn.EmbeddingBag(V, 6, _weight=weight()), 4)._packed_params._packed_weight
    cases = [
        (Call(ops("embedding_bag_2bit_rowwise_offsets"), two), r"embedding_bag_2bit_rowwise_offsets reads .* 2 bits"),
        (Call(ops("embedding_bag_byte_rowwise_offsets"), eight, pruned_weights=True), "called with pruned_weights"),
        (Call(ops("embedding_bag_byte"), four), "embedding_bag_byte reads values of 8 bits, and the table has 4"),
    ]
    for module, message in cases:
        with packed_tables(module), pytest.raises(RejectedError, match=message):
            module(*FLAT)
    flat = Call(ops("embedding_bag_byte_rowwise_offsets"), eight).eval()
    with pytest.raises(ValueError, match="takes offsets with indices of 1 dimensions"):
        from_torch.export(flat, FLAT[:1])
    operator = ops("embedding_bag_byte_rowwise_offsets")
    computed = Call(lambda table, i, o: operator(table + i[0].to(torch.uint8), i, o), eight).eval()
    with pytest.raises(ValueError, match=r"the packed rows .* are computed"):
        from_torch.export(computed, FLAT)


def test_a_session_of_the_file_is_fast_as_ever() -> None:
    """Nothing but the node is in the file."""
    module = quantized(torch.nn.EmbeddingBag(V, 6, mode="sum", _weight=weight()), 8)
    model = from_torch.export(module, FLAT, dynamic_shapes=({0: DYNAMIC}, {0: DYNAMIC}))
    assert len(model.graph.node) == 1
    assert lucid_onnx.fuse(model).fused == ()
