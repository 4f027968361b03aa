"""Random modules that pool an embedding, as people write them, and near misses, which pool something else.

`Pooling.random` draws a table, a mask, a divisor, weights, arithmetic over indices, a rank and a dtype from what was
seen in public code; `Pooling.near_miss` turns one thing in it into another. Eager torch says what each means.
Several are exported together: that takes hardly longer than one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from lucid_onnx.ops.embedding_bag import spec

EXPORTERS = ("dynamo static", "dynamo dynamic", "legacy", "lucid")
ROWS, FIELDS = 23, 3

#: How the table is kept. "tied" is an output projection too.
TABLES = ("module", "module", "module", "parameter", "buffer", "transposed", "cast", "tied")
#: How indices are computed from the input ``ids``.
INDICES = ("plain", "plain", "plain", "plain", "mod", "div", "where", "remap", "and", "minimum", "clamp", "int32")
INDICES += ("wrap",)
#: Where the mask comes from: the ids, an input of some dtype, or lengths.
MASKS = ("none", "none", "ids", "ids > 0", "ids int64", "bool", "int64", "int32", "float", "half", "lengths")
#: How the mask is laid on the rows.
APPLIED = ("unsqueeze(-1)", "unsqueeze(2)", "None", "expand(size)", "expand_as", "masked_fill", "where", "where scalar")
APPLIED += ("bmm", "einsum", "matmul", "repeat", "left", "permuted")
SELECTS = ("masked_fill", "where", "where scalar")
#: How a mask is laid on rows whose maximum is taken.
OF_MAXIMA = ("where -inf", "where -1e9", "added")
DIVISORS = ("none", "none", "count", "clamp 1", "clamp 1e-9", "+ 1e-16", "+ 1e-8", "maximum", "length", "where")
DIVISORS += ("sqrt", "weights", "root of squares", "no nan")
BY_WEIGHTS = ("weights", "root of squares", "no nan")
#: How the mask is counted.
COUNTS = ("keepdim", "unsqueezed", "of column", "expanded", "integers")
WEIGHTS = ("none", "none", "none", "ones_like", "ones", "by row", "input", "times mask")
RANKS = ("BL", "BL", "BL", "BL", "BFL", "BLF", "keepdim", "concat", "flattened")
MANY = ("BFL", "BLF", "concat", "flattened")
REDUCTIONS = ("sum", "sum", "mean", "max")
DTYPES = ("float32", "float32", "float32", "float32", "float64", "float16", "bfloat16")
SHORT = ("float16", "bfloat16")
#: What a near miss does: each is another number than the pooling without it, for some call.
TWISTS = (
    "over columns",  # sums over D, not over L
    "over bags",  # sums over B
    "filled with one",  # masked rows are ones
    "filled with small",  # or -1e9
    "inverted count",  # counts the rows that the mask takes away
    "other count",  # counts another mask than the one that is laid on
    "clamp 2",
    "+ 1",
    "+ 0.001",
    "mask by column",  # [B, 1, D] in the place of [B, L, 1]
    "mask by bag",  # [B, 1, 1]
    "shifted",  # the mask of the next position
    "doubled",  # 2 where the mask is 1
    "squared",  # rows times rows
    "maximum of products",
    "mean of products",
    "biased",  # rows plus a number
    "dropped",  # the first position is left out
    "other rows",  # times rows of other ids
    "cumulated",
    "subtracted",  # count - 1
    "of ids",  # a mask of ids that are not what is looked up
    "halved",  # mask of 0.5 and 1
    "summed squares",  # of weights, without the root
    "root of sum",  # of weights, which are not squared
    "clamped weights",
    "other weights",
    "maximum of some",  # masked rows are -0.5
    "added little",  # 1 is taken from masked rows
)
OF_WEIGHTS = ("summed squares", "root of sum", "clamped weights", "other weights")


@dataclasses.dataclass(frozen=True)
class Pooling:
    """A pooled embedding: what was drawn, and the module and the calls that this makes."""

    seed: int
    exporter: str
    table: str = "module"
    indices: str = "plain"
    mask: str = "int64"
    applied: str = "unsqueeze(-1)"
    divisor: str = "clamp 1"
    count: str = "keepdim"
    weights: str = "none"
    rank: str = "BL"
    reduction: str = "sum"
    dtype: str = "float32"
    dim: int = 4
    twist: str = "none"
    #: Whether the result goes on, here into a Concat: torch's dynamo exporter leaves a 16-bit sum that is an output in
    #: float32, which no bag of 16 bits is.
    goes_on: bool = False

    @classmethod
    def random(cls, seed: int, exporter: str) -> Pooling:
        """One of many, always the same for a seed."""
        rng = np.random.default_rng([seed, 20])

        def one(choices: tuple[str, ...]) -> str:
            return choices[int(rng.integers(len(choices)))]

        return cls(
            seed=seed,
            exporter=exporter,
            table=one(TABLES),
            indices=one(INDICES),
            mask=one(MASKS),
            applied=one(APPLIED),
            divisor=one(DIVISORS),
            count=one(COUNTS),
            weights=one(WEIGHTS),
            rank=one(RANKS),
            reduction=one(REDUCTIONS),
            dtype=one(DTYPES),
            dim=int(rng.choice([1, 3, 4, 8, 16])),
        )._consistent()

    @classmethod
    def near_miss(cls, seed: int, exporter: str) -> Pooling:
        """One of many, with something wrong in it."""
        rng = np.random.default_rng([seed, 21])

        def one(*choices: str) -> str:
            return str(rng.choice(choices))

        twist = TWISTS[seed % len(TWISTS)]
        masks, applied = [m for m in MASKS if m != "none"], ["unsqueeze(-1)", "expand_as", "bmm", "einsum", "repeat"]
        divisors = ["clamp 1", "maximum", "where"]
        if twist == "of ids":
            masks = [m for m in MASKS if m.startswith("ids")]
        if twist.startswith("filled"):
            applied = list(SELECTS)
        elif twist not in ("shifted", "doubled", "halved", "mask by column"):
            applied += SELECTS
        if twist not in ("+ 1", "+ 0.001", "inverted count", "other count", "clamp 2", "subtracted"):
            divisors.append("none")
        drawn = cls.random(seed, exporter)
        if twist in ("maximum of some", "added little"):
            masks = [m for m in MASKS if m.startswith(("ids", "bool"))]
        return dataclasses.replace(
            drawn,
            table="module" if drawn.table == "tied" else drawn.table,
            mask=one(*masks),
            reduction="max" if twist in ("maximum of some", "added little") else "sum",
            rank=one("BL", "keepdim"),
            dtype="float32",
            weights="input" if twist in OF_WEIGHTS else "none" if twist.startswith("filled") else drawn.weights,
            applied={"maximum of some": "where -1e9", "added little": "added"}.get(twist) or one(*applied),
            divisor="weights" if twist in OF_WEIGHTS else one(*divisors),
            count=one("keepdim", "of column", "expanded"),
            dim=int(rng.choice([1, 3, 4])),  # 4 is L in the first call
            twist=twist,
        )._consistent()

    def _consistent(self) -> Pooling:
        """What is drawn, without the parts that do not go together."""
        new, drawn = dataclasses.replace, self
        if drawn.table == "tied" and drawn.rank in ("concat", "flattened"):
            drawn = new(drawn, rank="BL")  # a projection of one pooled row
        if drawn.exporter == "legacy":  # which knows no `&` of integers, and writes bfloat16 as no checker takes it
            drawn = new(drawn, indices="mod" if drawn.indices == "and" else drawn.indices)
            drawn = new(drawn, dtype="float16" if drawn.dtype == "bfloat16" else drawn.dtype)
        if drawn.reduction == "max" and drawn.mask != "none":
            drawn = new(drawn, weights="none", divisor="none", count="none", goes_on=drawn.dtype in SHORT)
            ways = OF_MAXIMA if drawn.mask.startswith(("ids", "bool", "lengths")) else OF_MAXIMA[:2]
            ways = OF_MAXIMA[:1] if drawn.dtype in SHORT else ways  # which have no 1e9
            ways = OF_MAXIMA[:2] if drawn.dtype == "float64" else ways  # where a row is not lost beside 1e9
            return drawn if drawn.applied in ways else new(drawn, applied=ways[drawn.seed % len(ways)])
        if drawn.mask == "none" and drawn.weights == "none":
            plain = drawn.rank not in ("BL", "keepdim") or drawn.reduction != "sum"
            drawn = new(drawn, divisor="none" if plain or drawn.divisor == "none" else "length", applied="plain")
        else:
            drawn = new(drawn, reduction="sum")
        if drawn.mask == "none":
            drawn = new(drawn, divisor=drawn.divisor if drawn.divisor in ("length", *BY_WEIGHTS) else "none")
            drawn = new(drawn, weights="input" if drawn.weights == "times mask" else drawn.weights)
        if drawn.weights == "none" and drawn.mask == "none" and drawn.divisor in BY_WEIGHTS:
            drawn = new(drawn, divisor="none")
        if drawn.divisor in BY_WEIGHTS and drawn.applied in SELECTS:
            drawn = new(drawn, applied="unsqueeze(-1)")
        if drawn.weights != "none" and drawn.applied in (*SELECTS, "repeat"):
            drawn = new(drawn, applied="unsqueeze(-1)")
        if drawn.rank not in ("BL", "keepdim") and drawn.applied in ("bmm", "matmul", "einsum", "permuted"):
            drawn = new(drawn, applied="unsqueeze(-1)")
        if drawn.rank in MANY and drawn.applied == "unsqueeze(2)":
            drawn = new(drawn, applied="None")
        if drawn.dtype in SHORT and drawn.divisor in ("+ 1e-16", "+ 1e-8", "clamp 1e-9"):
            drawn = new(drawn, divisor="clamp 1")  # the small number is 0 in 16 bits
        if (drawn.exporter, drawn.count, drawn.divisor) == ("legacy", "integers", "clamp 1e-9"):
            drawn = new(drawn, divisor="clamp 1")  # the small number is written as the integer 0
        drawn = new(drawn, goes_on=drawn.dtype in SHORT)
        if drawn.divisor in ("none", "length", *BY_WEIGHTS):
            return new(drawn, count="none")
        return new(drawn, count="keepdim") if drawn.mask in ("float", "half") and drawn.count == "integers" else drawn

    # ---- What it is called with.

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def has_empty_bags(self) -> bool:
        """Whether a bag may be masked altogether. torch's dynamo exporter drops ``+ 1e-8``, so that 0 / 0 is left."""
        return not (self.exporter.startswith("dynamo") and self.divisor.startswith("+"))

    @property
    def tolerance(self) -> float:
        """How far a result may be off, in parts of the magnitude that is summed.

        float32 and float64: a rounding of half an ulp for each of up to 9 rows, and for weights, divisor and quotient.
        16 bits: torch rounds the rows, weights, products, sum, divisor and quotient, six times half an ulp, and a bag
        sums in float32.
        """
        return (6 if self.dtype in SHORT else 12) * 0.5 * torch.finfo(self.torch_dtype).eps

    def call(self, batch: int, length: int, seed: int) -> dict[str, torch.Tensor]:
        """Inputs by name, in order. The second bag, if there is one, is masked altogether."""
        rng = np.random.default_rng([self.seed, seed])
        lengths = rng.integers(1, length + 1, (batch, FIELDS if self.rank in MANY else 1))
        if batch > 1 and self.has_empty_bags:
            lengths[1] = 0
        kept = np.arange(length) < lengths[..., None]  # [B, F, L]
        high = 4 * ROWS if self.indices in ("mod", "div", "where", "minimum", "clamp", "and") else ROWS
        ids = np.where(kept, rng.integers(1, high, kept.shape), 0)
        if self.indices == "wrap":
            ids = np.where(kept & (rng.random(kept.shape) < 0.3), ids - ROWS, ids)
        found = {"ids": torch.from_numpy(ids)}
        if self.mask in ("bool", "int64", "int32", "float", "half"):
            found["mask"] = torch.from_numpy(kept).to(getattr(torch, self.mask))
        if self.mask == "lengths":
            found["lengths"] = torch.from_numpy(lengths)
        if self.weights in ("input", "times mask"):
            low = 0.1 if self.divisor in BY_WEIGHTS else -2  # a sum of weights about 0 would have no digits
            found["weights"] = torch.from_numpy(rng.uniform(low, 2, kept.shape)).to(self.torch_dtype)
        if self.twist == "other weights":
            found["others"] = torch.from_numpy(rng.uniform(0.1, 2, kept.shape)).to(self.torch_dtype)
        if self.twist in ("other count", "of ids", "other rows"):
            found["others"] = torch.from_numpy(rng.integers(0, ROWS, kept.shape) * (rng.random(kept.shape) < 0.7))
        return {name: self._laid_out(name, value) for name, value in found.items()}

    def _laid_out(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """[B, F, L] (lengths [B, F]) as this rank has it."""
        if self.rank == "BLF":
            return value if name == "lengths" else value.transpose(1, 2).contiguous()
        return value if self.rank in MANY else value[:, 0].contiguous()

    def open_axes(self) -> dict[str, dict[int, str]]:
        """The axes of the inputs that vary, with their names."""
        axis = 2 if self.rank in MANY and self.rank != "BLF" else 1
        whole = {0: f"batch{self.seed}", axis: f"length{self.seed}"}
        return {n: {0: whole[0]} if n == "lengths" else whole for n in self.call(1, 1, 0)}

    def build(self) -> PooledEmbedding:
        return PooledEmbedding(self).eval()

    def __str__(self) -> str:
        return " ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self).items() if v not in ("none", False))


class PooledEmbedding(torch.nn.Module):
    """What a `Pooling` describes."""

    def __init__(self, drawn: Pooling) -> None:
        super().__init__()
        self.drawn = drawn
        self.little = 1.0  # what "added little" takes from rows
        rng = np.random.default_rng([drawn.seed, 1])

        def numbers(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape)).to(drawn.torch_dtype)

        rows = numbers(ROWS, drawn.dim)
        if drawn.table == "module":
            self.table: Any = torch.nn.Embedding(ROWS, drawn.dim, padding_idx=0, _weight=rows)
        elif drawn.table == "buffer":
            self.register_buffer("weight", rows)
        else:
            kept = {"transposed": rows.t().contiguous(), "cast": rows.half()}.get(drawn.table, rows)
            self.weight: Any = torch.nn.Parameter(kept)
        if drawn.weights == "by row":
            by_row = numbers(ROWS, 1)
            by_row = by_row.abs() + 0.1 if drawn.divisor in BY_WEIGHTS else by_row
            self.row_weights = torch.nn.Embedding(ROWS, 1, _weight=by_row)
        if drawn.indices == "remap":
            self.register_buffer("remap", torch.from_numpy(rng.integers(0, ROWS, ROWS)))

    def exact(self, *, absolute: bool = False) -> PooledEmbedding:
        """The same in float64; or over magnitudes, which is what a sum is computed from, without its signs."""
        other = dataclasses.replace(self.drawn, dtype="float64").build()
        for mine, its in zip(self._numbers(), other._numbers(), strict=True):
            its.data = mine.detach().double().abs() if absolute else mine.detach().double()
        other.little = -1.0 if absolute else 1.0
        return other

    def _numbers(self) -> list[torch.Tensor]:
        found = [self.table.weight if self.drawn.table == "module" else self.weight]
        return found + ([self.row_weights.weight] if self.drawn.weights == "by row" else [])

    def forward(self, *inputs: torch.Tensor) -> Any:
        drawn = self.drawn
        given = dict(zip(drawn.call(1, 1, 0), inputs, strict=True))
        if drawn.rank == "concat":
            fields = [{name: value[:, f] for name, value in given.items()} for f in range(FIELDS)]
            pooled = torch.cat([self._pooled(field, 1) for field in fields], dim=-1)
        else:
            pooled = self._pooled(given, 2 if drawn.rank in ("BFL", "flattened") else 1)
        if drawn.rank == "flattened":
            pooled = pooled.reshape(inputs[0].shape[0], FIELDS * drawn.dim)
        if drawn.goes_on:
            pooled = torch.cat([pooled, pooled])
        return (pooled, pooled @ self.weight.t()) if drawn.table == "tied" else pooled

    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        if self.drawn.table == "module":
            return self.table(ids)  # type: ignore[no-any-return]
        weight = self.weight.t() if self.drawn.table == "transposed" else self.weight
        if self.drawn.table == "cast":
            weight = weight.to(self.drawn.torch_dtype)
        return torch.nn.functional.embedding(ids, weight)

    def _indices(self, ids: torch.Tensor) -> torch.Tensor:
        match self.drawn.indices:
            case "mod":
                return ids % ROWS
            case "div":
                return ids // 4
            case "where":
                return torch.where(ids < ROWS, ids, 0)
            case "remap":
                return self.remap[ids]  # type: ignore[index,no-any-return,operator]
            case "and":
                return ids & 15
            case "minimum":
                return torch.minimum(ids, torch.tensor(ROWS - 1))
            case "clamp":
                return ids.clamp(0, ROWS - 1)
            case "int32":
                return ids.to(torch.int32)
            case "wrap":
                return torch.where(ids < 0, ids + ROWS, ids)
        return ids

    def _pooled(self, given: dict[str, torch.Tensor], axis: int) -> torch.Tensor:
        drawn, twist = self.drawn, self.drawn.twist
        indices = self._indices(given["ids"])
        rows = self._lookup(indices)
        mask = self._mask(given, indices)
        if twist == "squared":
            rows = rows * rows
        elif twist == "biased":
            rows = rows + 0.5
        elif twist == "other rows":
            rows = rows * self._lookup(given["others"])
        elif twist == "cumulated":
            rows = rows.cumsum(axis)
        elif twist == "dropped":
            rows = rows[:, 1:]
            mask = None if mask is None else mask[:, 1:]
            given = {n: v if v.dim() < 2 or n == "lengths" else v[:, 1:] for n, v in given.items()}
            indices = indices[:, 1:]
        over = {"over columns": 2, "over bags": 0}.get(twist, axis)
        keepdim = drawn.rank == "keepdim"
        if drawn.applied == "plain":
            name = "amax" if drawn.reduction == "max" else drawn.reduction
            pooled: torch.Tensor = getattr(rows, name)(over, keepdim=keepdim)
        elif drawn.applied in OF_MAXIMA:
            assert mask is not None
            return self._without_masked(rows, mask.unsqueeze(-1)).amax(over, keepdim=keepdim)
        elif drawn.applied in SELECTS:
            assert mask is not None
            pooled = self._reduced(self._selected(rows, mask.bool().unsqueeze(-1)), over, keepdim)
        else:
            pooled = self._weighted(rows, self._factors(given, indices, mask), over, keepdim)
        if twist in ("over columns", "over bags"):
            return pooled.sum()[None, None]  # what there is of columns and bags is no shape of a bag
        return self._divided(pooled, given, mask, axis, rows, indices)

    def _selected(self, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        filler = {"filled with one": 1.0, "filled with small": -1e9}.get(self.drawn.twist, 0.0)
        if self.drawn.twist == "mask by bag":
            column = column[:, :1]
        if self.drawn.applied == "masked_fill":
            return rows.masked_fill(~column, filler)
        return torch.where(column, rows, torch.full_like(rows, filler) if self.drawn.applied == "where" else filler)

    def _without_masked(self, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        if self.drawn.applied == "added":
            far = self.little if self.drawn.twist == "added little" else 1e9
            return rows - (1 - column.to(rows.dtype)) * far
        filler = {"where -inf": -torch.inf, "where -1e9": -1e9}[self.drawn.applied]
        return rows.masked_fill(~column.bool(), -0.5 if self.drawn.twist == "maximum of some" else filler)

    def _reduced(self, rows: torch.Tensor, axis: int, keepdim: bool) -> torch.Tensor:
        if self.drawn.twist == "maximum of products":
            return rows.amax(axis, keepdim=keepdim)
        if self.drawn.twist == "mean of products":
            return rows.mean(axis, keepdim=keepdim)
        return rows.sum(axis, keepdim=keepdim)

    def _mask(self, given: dict[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor | None:
        ids = given["others" if self.drawn.twist == "of ids" else "ids"]
        match self.drawn.mask:
            case "none":
                return None
            case "ids":
                return ids != 0
            case "ids > 0":
                return ids > 0
            case "ids int64":
                return (ids if self.drawn.twist == "of ids" else indices).to(torch.int64) != 0
            case "lengths":
                positions = torch.arange(ids.shape[1 if self.drawn.rank == "BLF" else -1])
                if self.drawn.rank == "BLF":
                    return positions[None, :, None] < given["lengths"].unsqueeze(1)
                return positions < given["lengths"].unsqueeze(-1)
        return given["mask"]

    def _factors(
        self, given: dict[str, torch.Tensor], indices: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        dtype = self.drawn.torch_dtype
        match self.drawn.weights:
            case "none":
                weights = None
            case "ones_like":
                weights = torch.ones_like(given["ids"], dtype=dtype)
            case "ones":
                weights = torch.ones(given["ids"].shape, dtype=dtype)
            case "by row":
                weights = self.row_weights(indices).squeeze(-1)
            case _:
                weights = given["weights"]
        factors = weights if mask is None else mask.to(dtype) if weights is None else weights * mask.to(dtype)
        assert factors is not None
        match self.drawn.twist:
            case "shifted":
                return factors.roll(1, 1)
            case "doubled":
                return factors * 2
            case "halved":
                return factors * 0.5 + 0.5
        return factors

    def _weighted(self, rows: torch.Tensor, factors: torch.Tensor, axis: int, keepdim: bool) -> torch.Tensor:
        column = factors.unsqueeze(-1)
        if self.drawn.twist == "mask by column":
            column = factors.sum(1, keepdim=True).unsqueeze(-1).expand(-1, -1, rows.shape[-1]) * rows[:, :1]
        elif self.drawn.twist == "mask by bag":
            column = column[:, :1]
        elif self.drawn.applied in ("bmm", "matmul", "einsum", "permuted") and axis == 1 and not self._is_changed():
            if self.drawn.applied == "einsum":
                pooled = torch.einsum("bl,bld->bd", factors, rows)
            elif self.drawn.applied == "permuted":
                pooled = (rows.permute(0, 2, 1) * factors.unsqueeze(1)).sum(-1)
            elif self.drawn.applied == "matmul":
                pooled = (factors.unsqueeze(1) @ rows).squeeze(1)
            else:
                pooled = torch.bmm(factors.unsqueeze(1), rows).squeeze(1)
            return pooled.unsqueeze(1) if keepdim else pooled
        match self.drawn.applied:
            case "expand(size)":
                return self._reduced(rows * column.expand(rows.size()), axis, keepdim)
            case "expand_as":
                return self._reduced(rows * column.expand_as(rows), axis, keepdim)
            case "repeat" if column.shape[-1] == 1:
                return self._reduced(rows * column.repeat(*[1] * factors.dim(), self.drawn.dim), axis, keepdim)
            case "left":
                return self._reduced(column * rows, axis, keepdim)
            case "unsqueeze(2)" if column.shape[-1] == 1 and self.drawn.twist == "none":
                return self._reduced(rows * factors.unsqueeze(2), axis, keepdim)
            case "None" if self.drawn.twist == "none":
                return self._reduced(rows * factors[..., None], axis, keepdim)
        return self._reduced(rows * column, axis, keepdim)

    def _is_changed(self) -> bool:
        return self.drawn.twist in ("maximum of products", "mean of products")

    def _divided(
        self,
        pooled: torch.Tensor,
        given: dict[str, torch.Tensor],
        mask: torch.Tensor | None,
        axis: int,
        rows: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        divisor, twist, dtype = self.drawn.divisor, self.drawn.twist, self.drawn.torch_dtype
        if divisor == "none":
            return pooled
        if divisor in BY_WEIGHTS:
            factors = given["others"] if twist == "other weights" else self._factors(given, indices, mask)
            return self._divided_by_weights(pooled, factors, axis)
        if divisor == "length":
            return pooled / rows.shape[axis]
        assert mask is not None
        if twist == "inverted count":
            mask = ~mask.bool()
        elif twist == "other count":
            mask = given["others"] != 0
        count = self._counted(mask, axis, rows)
        if twist == "subtracted":
            count = count - 1
        match divisor:
            case "clamp 1":
                count = count.clamp(min=2 if twist == "clamp 2" else 1)
            case "sqrt":
                count = count.clamp(min=1).sqrt()
            case "clamp 1e-9":
                count = count.clamp(min=1e-9)
            case "+ 1e-16":
                count = count + 1e-16
            case "+ 1e-8":
                count = count + 1e-8
            case "maximum":
                count = torch.maximum(count, torch.full_like(count, 2 if twist == "clamp 2" else 1))
            case "where":
                count = torch.where(count == 0, torch.ones_like(count), count)
        return pooled / (count.to(dtype) + {"+ 1": 1.0, "+ 0.001": 0.001}.get(twist, 0.0))

    def _divided_by_weights(self, pooled: torch.Tensor, factors: torch.Tensor, axis: int) -> torch.Tensor:
        divisor, twist = self.drawn.divisor, self.drawn.twist
        squared = divisor == "root of squares" or twist == "summed squares"
        total = (factors * factors if squared else factors).sum(axis, keepdim=True)
        total = total.unsqueeze(-1) if self.drawn.rank == "keepdim" else total.squeeze(axis).unsqueeze(-1)
        if divisor == "root of squares" or twist == "root of sum":
            total = total.sqrt()
        if twist == "clamped weights":
            total = total.clamp(min=3)
        if divisor == "no nan":
            safe = torch.where(total == 0, torch.ones_like(total), total)
            return torch.where(total == 0, 0, pooled / safe)
        return pooled / total

    def _counted(self, mask: torch.Tensor, axis: int, rows: torch.Tensor) -> torch.Tensor:
        keepdim, dtype = self.drawn.rank == "keepdim", self.drawn.torch_dtype
        match self.drawn.count:
            case "of column":
                return mask.to(dtype).unsqueeze(-1).sum(axis, keepdim=keepdim)
            case "expanded":
                return mask.to(dtype).unsqueeze(-1).expand(rows.size()).sum(axis, keepdim=keepdim)
            case "unsqueezed":
                count = mask.to(dtype).sum(axis).unsqueeze(-1)
                return count.unsqueeze(axis) if keepdim else count
        count = mask.to(torch.int64 if self.drawn.count == "integers" else dtype).sum(axis, keepdim=True)
        return count.unsqueeze(-1) if keepdim else count.squeeze(axis).unsqueeze(-1)


# ---- Several of them in one module.


class Together(torch.nn.Module):
    """Modules side by side, each with its own inputs; each has one output here."""

    def __init__(self, parts: Sequence[PooledEmbedding]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.counts = [len(part.drawn.call(1, 1, 0)) for part in parts]

    def forward(self, *inputs: torch.Tensor) -> Any:
        given, outputs = list(inputs), []
        for part, count in zip(self.parts, self.counts, strict=True):
            found = part(*given[:count])
            outputs += found if isinstance(found, tuple) else [found]
            del given[:count]
        return tuple(outputs)


@dataclasses.dataclass(frozen=True)
class Exported:
    """Modules, the file that one exporter wrote of them, and the names of their inputs and (first) outputs."""

    path: Path
    modules: list[PooledEmbedding]
    inputs: list[list[str]]
    outputs: list[str]

    def feed(self, batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
        calls = [module.drawn.call(batch, length, seed) for module in self.modules]
        values = [array(value) for call in calls for value in call.values()]
        return dict(zip([name for names in self.inputs for name in names], values, strict=True))


def export(drawn: Sequence[Pooling], path: Path) -> Exported:
    """Write poolings, all of one exporter, as that one does."""
    (exporter,) = {one.exporter for one in drawn}
    modules = [one.build() for one in drawn]
    module = Together(modules).eval()
    calls = [one.call(3, 4, 0) for one in drawn]
    args = tuple(value for call in calls for value in call.values())
    inputs = [[f"{name}{k}" for name in call] for k, call in enumerate(calls)]
    names = [name for part in inputs for name in part]
    outputs = [[f"pooled{k}", *([f"tied{k}"] if one.table == "tied" else [])] for k, one in enumerate(drawn)]
    axes = [axes for one in drawn for axes in one.open_axes().values()]
    kwargs: dict[str, Any] = {"input_names": names, "output_names": [name for part in outputs for name in part]}
    if exporter == "legacy":
        dynamic = dict(zip(names, axes, strict=True))
        torch.onnx.export(module, args, str(path), dynamo=False, opset_version=17, dynamic_axes=dynamic, **kwargs)
    elif exporter == "lucid":
        from lucid_onnx.torch import export as ours

        ours(module, args, path, dynamic_shapes=(tuple(axes),), **kwargs)
    else:
        shapes = {} if exporter == "dynamo static" else {"dynamic_shapes": (tuple(axes),)}
        torch.onnx.export(module, args, path, dynamo=True, verbose=False, external_data=False, **shapes, **kwargs)
    return Exported(path, modules, inputs, [part[0] for part in outputs])


def behind(model: onnx.ModelProto, output: str) -> list[onnx.NodeProto]:
    """The nodes that an output is computed from, the last one first."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, onnx.NodeProto] = {}
    waiting = [output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.output[0] not in found:
            found[node.output[0]] = node
            waiting += node.input
    return list(found.values())


def array(value: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor; bfloat16 as ml_dtypes has it."""
    value = value.detach()
    return value.view(torch.int16).numpy().view(spec.BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()
