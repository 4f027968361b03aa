"""Tables that are read together: TorchRec's EmbeddingBagCollection, float and quantized, and FBGEMM's tables.

Their ``forward`` splits the features, moves them about and calls operators that torch's exporter does not know. While a
module is exported, `batched_tables` gives such parts of it another ``forward``: a call of
`lucid_onnx::batched_bags` for all tables that are pooled alike, of which `lucid_onnx.torch.resolve` makes one
EmbeddingBagCollection, or a QuantizedEmbeddingBag for each feature.

Neither TorchRec nor FBGEMM is imported: modules are known by their class and read by their own attributes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lucid_onnx.ops.attributes import either

from .placeholders import MAX, MEAN, SUM, RejectedError

_LIBRARY = torch.library.Library("lucid_onnx", "FRAGMENT")
_LIBRARY.define(
    "batched_bags(Tensor[] tables, Tensor indices, Tensor offsets, Tensor? per_sample_weights, int num_keys, "
    "int[] keys, int[] table_of, int[] bits, str[] names, int mode) -> Tensor"
)
#: The bytes of a row's scale and bias, by the bits of its quantized values.
_TAIL = {8: 8, 4: 4}
#: FBGEMM's types of rows, by name: the bits of quantized values, or a dtype.
_BITS = {"int8": 8, "int4": 4}
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16}
#: FBGEMM's numbers of poolings and of types of results.
_POOLINGS = {0: SUM, 1: MEAN}
_RESULTS = {0: torch.float32, 1: torch.float16}
#: Where a module keeps which rows are left of pruned tables.
_REMAPPED = ("index_remapping_hash_table_cpu", "index_remapping_hash_table", "index_remappings_array")
_INFERENCE, _TRAINING = "IntNBitTableBatchedEmbeddingBagsCodegen", "SplitTableBatchedEmbeddingBagsCodegen"
_COLLECTION = "EmbeddingBagCollection"
_MODES = {"sum": SUM, "mean": MEAN, "max": MAX}


def width(rows: torch.Tensor, bits: int) -> int:
    """The embedding_dim of a table: of its columns, or of the values of ``bits`` bits in its packed rows."""
    return rows.shape[1] if not bits else (rows.shape[1] - _TAIL[bits]) * 8 // bits


@torch.library.register_fake("lucid_onnx::batched_bags", lib=_LIBRARY)
def _shape_of_bags(
    tables: Sequence[torch.Tensor],
    indices: torch.Tensor,
    offsets: torch.Tensor,
    per_sample_weights: torch.Tensor | None,
    num_keys: int,
    keys: Sequence[int],
    table_of: Sequence[int],
    bits: Sequence[int],
    names: Sequence[str],
    mode: int,
) -> torch.Tensor:
    del indices, per_sample_weights, keys, names, mode
    columns = sum(width(tables[t], bits[t]) for t in table_of)
    dtype = torch.float32 if any(bits) else tables[0].dtype
    return tables[0].new_empty(((offsets.shape[0] - 1) // num_keys, columns), dtype=dtype)


class Table(NamedTuple):
    """A table of a module."""

    rows: Callable[[], torch.Tensor]  #: float [V, D], or packed as torch packs quantized rows; as they are at the call
    bits: int = 0  #: of its quantized values; 0 of floats
    name: str = ""  #: of a table that is no parameter of the module


class Feature(NamedTuple):
    """What is looked up in a table: the bags of a key, and how they are pooled."""

    key: Hashable
    table: int
    mode: int


class Batched:
    """Bags of several features: what such modules compute.

    Attributes:
        tables, features: of the module; its output has the columns of each feature, in this order.
        weighted: whether its bags take per_sample_weights; None if that is the caller's choice.
        names: of the columns of each feature.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        features: Sequence[Feature],
        dtype: torch.dtype,
        *,
        weighted: bool | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.tables, self.features, self.weighted = list(tables), list(features), weighted
        self.names = list(names)
        self._dtype = dtype

    @property
    def keys(self) -> list[Hashable]:
        """The key of each feature, once."""
        return list(dict.fromkeys(feature.key for feature in self.features))

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of per_sample_weights: that of the tables, and float32 where they are quantized."""
        found = [table.rows().dtype for table in self.tables if not table.bits]
        return found[0] if found else torch.float32

    @property
    def dims(self) -> list[int]:
        """The columns of each feature."""
        return [width(self.tables[f.table].rows(), self.tables[f.table].bits) for f in self.features]

    def pool(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None,
        keys: Sequence[Hashable],
    ) -> torch.Tensor:
        """The bags of each feature beside each other, [B, D_0 + D_1 + ...].

        Args:
            indices, offsets, per_sample_weights: those of all keys, packed: offsets are [len(keys) * B + 1].
            keys: their order.

        Raises:
            RejectedError: there is no key for a feature.
        """
        place = {key: k for k, key in enumerate(keys)}
        absent = [feature.key for feature in self.features if feature.key not in place]
        if absent:
            raise RejectedError(f"the features have no key {absent[0]!r}; they have {', '.join(map(str, place))}")
        rows = [table.rows() for table in self.tables]
        if per_sample_weights is not None:
            types = {torch.float32 if t.bits else r.dtype for t, r in zip(self.tables, rows, strict=True)}
            if types != {per_sample_weights.dtype}:
                raise RejectedError(
                    f"per_sample_weights are {per_sample_weights.dtype}; expected {either(sorted(map(str, types)))} as "
                    "the tables are, or float32 of quantized ones"
                )
        alike: dict[Hashable, list[int]] = {}  # what one call pools
        for k, feature in enumerate(self.features):
            kind = "quantized" if self.tables[feature.table].bits else rows[feature.table].dtype
            alike.setdefault((feature.mode, kind), []).append(k)
        pooled = []
        for members in alike.values():
            found = [self.features[k] for k in members]
            used = list(dict.fromkeys(f.table for f in found))
            bags = torch.ops.lucid_onnx.batched_bags(
                [rows[t] for t in used],
                indices,
                offsets,
                per_sample_weights,
                len(keys),
                [place[f.key] for f in found],
                [used.index(f.table) for f in found],
                [self.tables[t].bits for t in used],
                [self.tables[t].name for t in used],
                found[0].mode,
            )
            pooled.append(bags.to(self._dtype))
        order = [k for members in alike.values() for k in members]
        if order != sorted(order):
            dims = self.dims
            columns = [
                c
                for bags, members in zip(pooled, alike.values(), strict=True)
                for c in bags.split([dims[k] for k in members], 1)
            ]
            pooled = [columns[order.index(k)] for k in range(len(order))]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)


@contextlib.contextmanager
def batched_tables(module: Any) -> Iterator[None]:
    """Make tables that are read together something that torch.export takes; the module is the same again after.

    Raises:
        RejectedError: a table of a type that no bag has, or one whose rows are not pooled.
    """
    replaced: list[Any] = []
    hidden: list[tuple[Any, str, Any]] = []
    inside: set[int] = set()  # FBGEMM's modules that a collection of TorchRec's has
    try:
        for part in {id(p): p for p in _parts(module)}.values():
            if type(part).__name__ in (_INFERENCE, _TRAINING):  # whose objects torch.export does not take
                for name, value in list(vars(part).items()):
                    if isinstance(value, torch.ScriptObject):
                        hidden.append((part, name, value))
                        part.__dict__[name] = None
            found = None if id(part) in inside or "forward" in vars(part) else batched(part)
            if found is None:
                continue
            inside.update(id(p) for p in getattr(part, "_emb_modules", ()))
            is_collection = _is_collection(part)
            part.__dict__["forward"] = _Keyed(part, found) if is_collection else _Packed(found)
            replaced.append(part)
        yield
    finally:
        for part in replaced:
            del part.__dict__["forward"]
        for part, name, value in hidden:
            part.__dict__[name] = value


def batched(part: Any) -> Batched | None:
    """What a module computes if it is one of those that are read here, or None.

    Raises:
        RejectedError: as `batched_tables`.
    """
    if type(part).__name__ == _INFERENCE:
        return _inference(part)
    if type(part).__name__ == _TRAINING:
        return _training(part)
    if not _is_collection(part):
        return None
    return _quantized(part) if hasattr(part, "_emb_modules") else _float(part)


def _is_collection(part: Any) -> bool:
    """Whether a module is TorchRec's EmbeddingBagCollection, float or quantized, or has its ``forward``."""
    forward = type(part).forward
    place = str(getattr(forward, "__module__", "")).partition(".")[0]
    return place == "torchrec" and getattr(forward, "__qualname__", "") == f"{_COLLECTION}.forward"


def _parts(module: Any) -> Iterator[torch.nn.Module]:
    """A module and those in it, also in lists that torch does not look into."""
    if not isinstance(module, torch.nn.Module):
        return
    for part in module.modules():
        yield part
        for value in vars(part).values():
            if isinstance(value, list | tuple):
                for inner in value:
                    yield from _parts(inner)


class _Packed:
    """The ``forward`` of FBGEMM's modules."""

    def __init__(self, bags: Batched) -> None:
        self._bags = bags

    def __call__(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        feature_requires_grad: Any = None,
        batch_size_per_feature_per_rank: Any = None,
    ) -> torch.Tensor:
        del feature_requires_grad
        if batch_size_per_feature_per_rank is not None:
            raise RejectedError("FBGEMM's tables are called with a batch size for each feature; expected one for all")
        return self._bags.pool(indices, offsets, per_sample_weights, self._bags.keys)


class _Keyed:
    """The ``forward`` of TorchRec's collections."""

    def __init__(self, module: Any, bags: Batched) -> None:
        self._forward, self._bags = module.forward, bags

    def __call__(self, features: Any) -> Any:
        if not is_keyed_jagged(features) or features.variable_stride_per_key() or features.inverse_indices_or_none():
            return self._forward(features)
        bags = self._bags
        weights = features.weights() if bags.weighted else None
        values = bags.pool(features.values(), features.offsets(), weights, features.keys())
        kind: Any = sys.modules[type(features).__module__]
        return kind.KeyedTensor(keys=bags.names, length_per_key=bags.dims, values=values)


def is_keyed_jagged(value: Any) -> bool:
    """Whether this is a KeyedJaggedTensor of TorchRec's."""
    return type(value).__name__ == "KeyedJaggedTensor"


# ---- What the modules say of themselves.


def _float(module: Any) -> Batched | None:
    """TorchRec's collection, if its bags are as it makes them."""
    bags = module.embedding_bags
    weighted = bool(module._is_weighted)
    tables, features = [], []
    for t, ((name, bag), keys) in enumerate(zip(bags.items(), module._feature_names, strict=True)):
        is_plain = type(bag) is torch.nn.EmbeddingBag and bag.padding_idx is None and bag.max_norm is None
        if not is_plain or not bag.include_last_offset or (weighted and bag.mode != "sum") or _has_hooks(bag):
            return None
        tables.append(Table(lambda name=name: bags[name].weight))  # type: ignore[misc]
        features += [Feature(key, t, _MODES[bag.mode]) for key in keys]
    return Batched(tables, features, torch.float32, weighted=weighted, names=module._embedding_names)


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _quantized(module: Any) -> Batched | None:
    """torchrec.quant's collection, whose tables are in one module of FBGEMM's for each pooling."""
    tables: list[Table] = []
    features: list[Feature] = []
    keys = iter(module._feature_names)
    dtypes = set()
    for part in module._emb_modules:
        if type(part).__name__ != _INFERENCE:
            return None
        found = _inference(part)
        features += [Feature(next(keys), len(tables) + f.table, f.mode) for f in found.features]
        tables += found.tables
        dtypes.add(found._dtype)
    if len(dtypes) != 1:
        return None
    return Batched(tables, features, dtypes.pop(), weighted=bool(module._is_weighted), names=module._embedding_names)


def _inference(module: Any) -> Batched:
    """FBGEMM's tables for inference."""
    name = type(module).__name__
    kinds = [kind.value for _, _, _, kind, _ in module.embedding_specs]
    mode, dtype = _pooling(module)
    unknown = next((kind for kind in kinds if kind not in {**_BITS, **_FLOATS}), None)
    if unknown is not None:
        raise RejectedError(f"FBGEMM's {name} has a table of {unknown}; expected fp32, fp16, int8 or int4")
    remapped = [getattr(module, name, None) for name in _REMAPPED]
    if any(r is not None and not (isinstance(r, torch.Tensor) and not r.numel()) for r in remapped):
        raise RejectedError(f"FBGEMM's {name} reads other rows than the indices say, since some were pruned")
    tables = []
    with _disable_current_modes():
        whole = module.split_embedding_weights_with_scale_bias(split_scale_bias_mode=2)
        for spec, kind, (values, scale, bias) in zip(module.embedding_specs, kinds, whole, strict=True):
            bits = _BITS.get(kind, 0)
            # What a table of float16 gives is added up and returned in float32.
            rows = _packed(values, scale, bias, bits) if bits else values.contiguous().view(_FLOATS[kind]).float()
            tables.append(Table(lambda rows=rows: rows, bits, str(spec[0])))  # type: ignore[misc]
    return Batched(tables, _numbered(module, mode), dtype)


def _training(module: Any) -> Batched:
    """FBGEMM's tables for training."""
    mode, dtype = _pooling(module)
    kind = module.weights_precision.value
    if kind not in _FLOATS:
        raise RejectedError(f"FBGEMM's {type(module).__name__} has tables of {kind}; expected fp32 or fp16")
    names = getattr(module, "table_names", None) or [f"table_{t}" for t in range(len(module.embedding_specs))]
    with _disable_current_modes():
        whole = [rows.float().contiguous() for rows in module.split_embedding_weights()]
    tables = [
        Table(lambda rows=rows: rows, 0, str(name))  # type: ignore[misc]
        for name, rows in zip(names, whole, strict=True)
    ]
    return Batched(tables, _numbered(module, mode), dtype)


def _pooling(module: Any) -> tuple[int, torch.dtype]:
    """How a module of FBGEMM's pools, and the dtype of what comes out."""
    name, mode, result = type(module).__name__, int(module.pooling_mode), int(module.output_dtype)
    if mode not in _POOLINGS:
        raise RejectedError(f"FBGEMM's {name} does not pool its rows; expected a sum or a mean")
    if result not in _RESULTS:
        raise RejectedError(f"FBGEMM's {name} gives results of another type than float32 and float16")
    return _POOLINGS[mode], _RESULTS[result]


def _numbered(module: Any, mode: int) -> list[Feature]:
    """The features of a module of FBGEMM's, whose keys are their numbers."""
    return [Feature(k, int(table), mode) for k, table in enumerate(module.feature_table_map)]


def _packed(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows as torch's own operators have them: values, then scale and bias, in float32 behind 8 bits."""
    tail = torch.stack([scale.reshape(-1), bias.reshape(-1)], 1)
    tail = tail.float() if bits == 8 else tail.half()
    return torch.cat([values, tail.view(torch.uint8)], 1).contiguous()
