"""Bags over tables that torch quantized: torch.ao.nn.quantized.EmbeddingBag, and the operators that it calls.

torch packs each row's quantized values with their scale and bias. It keeps the rows in an object that torch.export does
not take, or in a uint8 tensor that operators take whose results torch.export does not know. While a module is exported,
`packed_tables` gives it the tensor in the place of the object, and one operator in the place of all of these:
`translate_packed` makes a placeholder of that, and `lucid_onnx.torch.resolve` a QuantizedEmbeddingBag.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .placeholders import RejectedError

_LIBRARY = torch.library.Library("lucid_onnx", "FRAGMENT")
_LIBRARY.define(
    "packed_embedding_bag(Tensor rows, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int bits, "
    "bool include_last_offset) -> Tensor"
)
#: The bytes of a row's scale and bias, by the bits of its quantized values.
_TAIL = {8: 8, 4: 4}


@torch.library.register_fake("lucid_onnx::packed_embedding_bag", lib=_LIBRARY)
def _shape_of_bags(
    rows: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    bits: int,
    include_last_offset: bool,
) -> torch.Tensor:
    del per_sample_weights
    num_bags = indices.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
    return rows.new_empty((num_bags, (rows.shape[1] - _TAIL[bits]) * 8 // bits), dtype=torch.float32)


#: torch's operators, by name: the bits of what they read. Those of 2 bits have no operator here.
_BAGS = {
    "embedding_bag_byte": 8,
    "embedding_bag_4bit": 4,
    "embedding_bag_2bit": 2,
    "embedding_bag_byte_rowwise_offsets": 8,
    "embedding_bag_4bit_rowwise_offsets": 4,
    "embedding_bag_2bit_rowwise_offsets": 2,
}
_LOOKUPS = {"embedding_byte": 8, "embedding_4bit": 4}


def _bag_of(begins: torch.Tensor, count: int) -> torch.Tensor:
    """The bag of each of ``count`` values, where bags begin at ``begins``."""
    found = begins.new_zeros(count + 1).scatter_add(0, begins.long(), torch.ones_like(begins))
    return found.cumsum(0)[:count] - 1  # the last one that begins here or before


def _positions(offsets: torch.Tensor, range_size: int) -> torch.Tensor:
    """How far each of ``range_size`` values is from the beginning of its bag."""
    return torch.arange(range_size, dtype=offsets.dtype) - offsets[_bag_of(offsets, range_size)]


def _permuted(
    permute: torch.Tensor,
    lengths: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor | None = None,
    permuted_lengths_sum: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The bags of keys in another order: their lengths [T, B], values and weights."""
    count = values.shape[0] if permuted_lengths_sum is None else permuted_lengths_sum
    order, exclusive = permute.long(), _OF_BAGS["asynchronous_exclusive_cumsum"]
    moved = lengths[order]
    begins = exclusive(moved.reshape(-1))
    starts = exclusive(lengths.reshape(-1)).reshape(lengths.shape)[order].reshape(-1)
    source = (starts - begins)[_bag_of(begins, count)].long() + torch.arange(count)
    return moved, values[source], None if weights is None else weights[source]


#: What FBGEMM computes of lengths and offsets, by name.
_OF_BAGS: dict[str, Callable[..., Any]] = {
    "offsets_range": _positions,
    "permute_2D_sparse_data": _permuted,
    "asynchronous_complete_cumsum": lambda t_in: torch.nn.functional.pad(t_in.cumsum(-1, dtype=t_in.dtype), (1, 0)),
    "asynchronous_inclusive_cumsum": lambda t_in: t_in.cumsum(-1, dtype=t_in.dtype),
    "asynchronous_exclusive_cumsum": lambda t_in: t_in.cumsum(-1, dtype=t_in.dtype) - t_in,
}
_PACKED_TYPE = "__torch__.torch.classes.quantized.EmbeddingPackedParamsBase"


@contextlib.contextmanager
def packed_tables(module: Any) -> Iterator[_Operators]:
    """Make torch's quantized bags in a module something that torch.export takes; the module is the same again after."""
    replaced: list[tuple[Any, str, Any]] = []
    stand_ins: dict[int, _Rows] = {}
    operators = _Operators()
    try:
        for part in list(module.modules()) if isinstance(module, torch.nn.Module) else ():
            for name, value in (*vars(part).items(), *part._modules.items()):
                packed = getattr(value, "_packed_weight", value) if isinstance(value, torch.nn.Module) else value
                if is_packed(packed):
                    replaced.append((part, name, value))
                    stand_in = stand_ins.setdefault(id(packed), _Rows(packed))
                    stand_in.dtype = getattr(value, "dtype", None)
                    delattr(part, name)
                    setattr(part, name, stand_in)
        with operators:
            yield operators
    finally:
        for part, name, value in replaced:
            delattr(part, name)
            setattr(part, name, value)


def is_packed(value: Any) -> bool:
    """Whether this is an object of torch's with a quantized table in it."""
    return isinstance(value, torch.ScriptObject) and str(value._type()) == _PACKED_TYPE


class _Rows(torch.nn.Module):
    """What a module has in the place of a packed table, or of the module that torch keeps that in."""

    def __init__(self, packed: torch.ScriptObject) -> None:
        super().__init__()
        with _disable_current_modes():
            self.register_buffer("rows", unpacked(packed))
        self.bits = 4 if _table(packed).dtype == torch.quint4x2 else 8
        self.dtype: torch.dtype | None = None  #: of the quantized values, which torch's modules print, as the table
        self._weight = functools.partial(_table, packed)

    @property
    def _packed_weight(self) -> _Rows:
        return self


def unpacked(packed: torch.ScriptObject) -> torch.Tensor:
    """The rows of a packed table as torch's operators on tensors take them, uint8 [V, bytes], to the bit."""
    table = _table(packed)
    num_rows, dim = table.shape
    values = table.int_repr()
    dtype = torch.float32
    if table.dtype == torch.quint4x2:  # two in a byte, without a gap between rows of an odd length
        values = torch.stack([values & 15, values >> 4], 1).reshape(-1)[: num_rows * dim].reshape(num_rows, dim)
        values = torch.nn.functional.pad(values, (0, dim % 2))
        values = values[:, ::2] | values[:, 1::2] << 4
        dtype = torch.float16
    scale = table.q_per_channel_scales().float()
    bias = -(table.q_per_channel_zero_points().float() * scale)  # as torch rounds it
    return torch.cat([values, torch.stack([scale, bias], 1).to(dtype).view(torch.uint8)], 1)


def _table(packed: torch.ScriptObject) -> torch.Tensor:
    """The quantized tensor that was packed."""
    with _disable_current_modes():
        return torch.ops.quantized.embedding_bag_unpack(packed)  # type: ignore[no-any-return]


class _Operators(TorchFunctionMode):
    """Calls our operator for torch's.

    Attributes:
        rejected: why one of the calls cannot be exported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rejected: RejectedError | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = str(func).partition(".")
        name = name.split(".")[0]
        if namespace == "fbgemm" and name in _OF_BAGS:  # as for the offsets of a KeyedJaggedTensor
            return _OF_BAGS[name](*args, **kwargs)
        is_bag = namespace == "quantized" and name in {**_BAGS, **_LOOKUPS}
        reads_all = namespace == "fbgemm" and "codegen_lookup" in name
        if not is_bag and not reads_all:
            return func(*args, **kwargs)
        try:
            if reads_all:
                raise RejectedError(
                    f"torch.ops.fbgemm.{name} reads the tables of a whole module in one call, which is not translated: "
                    "give the module itself, not what torch.export made of it"
                )
            schema = getattr(torch.ops.quantized, name).default._schema
            given = {a.name: a.default_value for a in schema.arguments}
            given |= dict(zip(given, args, strict=False)) | dict(kwargs)
            return _bag(name, **given)
        except RejectedError as error:
            self.rejected = error
            raise


def _bag(
    name: str,
    weight: Any,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    compressed_indices_mapping: torch.Tensor | None = None,
    include_last_offset: bool = False,
) -> torch.Tensor:
    """The call of one of torch's operators, by our operator. torch's sum, whatever ``mode`` says."""
    del scale_grad_by_freq, mode
    bits = {**_BAGS, **_LOOKUPS}[name]
    if bits not in _TAIL:
        raise RejectedError(f"torch.ops.quantized.{name} reads values of {bits} bits; expected 8 or 4")
    if pruned_weights or compressed_indices_mapping is not None:
        raise RejectedError(
            f"torch.ops.quantized.{name} is called with pruned_weights, which reads other rows than the indices say"
        )
    if not isinstance(weight, torch.Tensor):
        rows = weight if isinstance(weight, _Rows) else _Rows(weight)
        if rows.bits != bits:
            raise RejectedError(
                f"torch.ops.quantized.{name} reads values of {bits} bits, and the table has {rows.bits}"
            )
        weight = rows.rows
    call = torch.ops.lucid_onnx.packed_embedding_bag
    if name in _LOOKUPS:  # each index is a bag
        rows = call(weight, indices.reshape(-1, 1), None, None, bits, False)
        return rows.reshape(*indices.shape, rows.shape[-1])  # type: ignore[no-any-return]
    if offsets is None and indices.dim() != 2:
        raise RejectedError(f"torch.ops.quantized.{name} takes offsets with indices of {indices.dim()} dimensions")
    if indices.dim() == 2:  # torch counts offsets of its own, whatever is given
        offsets = None
    return call(weight, indices, offsets, per_sample_weights, bits, include_last_offset and offsets is not None)  # type: ignore[no-any-return]
