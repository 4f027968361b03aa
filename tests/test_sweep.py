"""Random modules: eager torch, its two exporters with `fuse` behind, and our export in every form say the same.

A few of them run by default. ``LUCID_SWEEP_MODULES=200 pytest tests/test_sweep.py`` runs as many as are asked for;
the first ones are always the same ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import reference, spec
from lucid_testing.kernels import library_path

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import lucid_onnx.torch as from_torch  # noqa: E402  # needs torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # torch's own, from its own code
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
]

MODULES = int(os.environ.get("LUCID_SWEEP_MODULES", "6"))
EXPORTERS = ("legacy", "dynamo", "lucid")


@dataclasses.dataclass(frozen=True)
class Module:
    """A bag, and what it is called with."""

    seed: int
    rows: int
    dim: int
    dtype: str
    mode: str
    two_d: bool
    weighted: bool
    include_last_offset: bool
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    index_dtype: str

    @classmethod
    def random(cls, seed: int) -> Module:
        rng = np.random.default_rng(seed)
        mode = str(rng.choice(spec.ATEN_MODES))
        rows = int(rng.integers(1, 40))
        two_d = bool(rng.random() < 0.3)
        # A quarter of all has max_norm, which no other exporter takes but ours and, for p of 1 and 2, dynamo.
        return cls(
            seed=seed,
            rows=rows,
            dim=int(rng.choice([1, 2, 3, 4, 7, 8, 16, 31, 33, 64])),
            dtype=str(rng.choice(["float32", "float32", "float32", "float64", "float16", "bfloat16"])),
            mode=mode,
            two_d=two_d,
            weighted=mode == "sum" and bool(rng.random() < 0.5),
            include_last_offset=not two_d and bool(rng.random() < 0.4),
            padding_idx=int(rng.integers(-rows, rows)) if rng.random() < 0.35 else None,
            max_norm=float(rng.choice([0.3, 1.0, 4.0])) if rng.random() < 0.25 else None,
            norm_type=float(rng.choice([2.0, 1.0])),
            index_dtype=str(rng.choice(["int64", "int64", "int32"])),
        )

    @property
    def numpy_dtype(self) -> np.dtype:
        return spec.BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def table(self) -> np.ndarray:
        return np.random.default_rng(self.seed + 10**6).standard_normal((self.rows, self.dim)).astype(self.numpy_dtype)

    @property
    def attributes(self) -> dict[str, Any]:
        names = ("mode", "padding_idx", "max_norm", "norm_type", "include_last_offset")
        return {name: getattr(self, name) for name in names}

    def build(self) -> Any:
        return torch.nn.EmbeddingBag(self.rows, self.dim, _weight=tensor(self.table), **self.attributes).eval()

    def call(self, lengths: list[int], seed: int) -> dict[str, np.ndarray]:
        """The inputs for bags of these lengths; indices [B, L] are as long as the first one."""
        rng = np.random.default_rng(seed)
        shape: tuple[int, ...] = (len(lengths), lengths[0]) if self.two_d else (sum(lengths),)
        feed = {"indices": rng.integers(0, self.rows, shape).astype(self.index_dtype)}
        if not self.two_d:
            ends = np.cumsum([0, *lengths])
            feed["offsets"] = (ends if self.include_last_offset else ends[:-1]).astype(self.index_dtype)
        if self.weighted:
            feed["per_sample_weights"] = rng.standard_normal(shape).astype(self.numpy_dtype)
        return feed


def tensor(array: np.ndarray) -> Any:
    if array.dtype == spec.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def arguments(feed: dict[str, np.ndarray]) -> tuple[Any, ...]:
    given = [feed.get(name) for name in ("indices", "offsets", "per_sample_weights")]
    while given[-1] is None:
        given.pop()
    return tuple(None if a is None else tensor(a) for a in given)


def eager(module: Module, feed: dict[str, np.ndarray]) -> np.ndarray:
    found = module.build()(*arguments(feed)).detach()
    return found.view(torch.int16).numpy().view(spec.BFLOAT16) if found.dtype == torch.bfloat16 else found.numpy()


def exported(module: Module, way: str, path: Path) -> str | None:
    """Write the module as one exporter does; why that one cannot, where it is known not to."""
    feed = module.call([3, 3], module.seed)
    args, names = arguments(feed), list(feed)
    kwargs: dict[str, Any] = {"input_names": names, "output_names": ["pooled"]}
    dims = tuple(None if a is None else dict.fromkeys(range(a.dim()), torch.export.Dim.DYNAMIC) for a in args)
    if way == "lucid":
        from_torch.export(module.build(), args, path, dynamic_shapes=dims, **kwargs)
        return None
    if way == "dynamo":
        torch.onnx.export(
            module.build(), args, path, dynamo=True, dynamic_shapes=dims, verbose=False, external_data=False, **kwargs
        )
        return None
    if module.padding_idx is not None:
        return "it refuses padding_idx"
    if module.max_norm is not None:
        return "it writes the table as max_norm left it, and no clipping"
    axes = {n: {k: f"{n}{k}" for k in range(a.ndim)} for n, a in feed.items()}
    torch.onnx.export(
        module.build(),
        args,
        str(path),
        dynamo=False,
        opset_version=17,
        dynamic_axes={**axes, "pooled": {0: "b"}},
        **kwargs,
    )
    return None


def allowed(module: Module, feed: dict[str, np.ndarray], result: np.ndarray) -> np.ndarray:
    """How far a result may be from the exact one: 1e-6 of the magnitudes, and roundings of 16 bits.

    A bag rounds once. torch rounds clipped rows, weighted rows, the sum and the mean: four times.
    """
    weights = feed.get("per_sample_weights")
    size = reference.embedding_bag(
        feed["indices"],
        np.abs(module.table.astype(np.float64)),
        feed.get("offsets"),
        per_sample_weights=None if weights is None else np.abs(weights.astype(np.float64)),
        **module.attributes,
    )
    if module.numpy_dtype.itemsize == 2:
        return 4 * 0.5 * float(ml_dtypes.finfo(module.numpy_dtype).eps) * size + 2.0**-20
    return 1e-6 * size if module.dtype == "float32" else 1e-13 * size


def exact(module: Module, feed: dict[str, np.ndarray]) -> np.ndarray:
    weights = feed.get("per_sample_weights")
    return reference.embedding_bag(
        feed["indices"],
        module.table.astype(np.float64),
        feed.get("offsets"),
        per_sample_weights=None if weights is None else weights.astype(np.float64),
        **module.attributes,
    )


def sessions(model: onnx.ModelProto, *, standard: bool) -> dict[str, Any]:
    found = {"portable": lucid_onnx.InferenceSession(model, native=False)}
    if library_path() is not None:
        found["native"] = lucid_onnx.InferenceSession(model)
    if standard:
        found["standard"] = lucid_onnx.InferenceSession(lucid_onnx.lower(model), native=False)
    return found


#: As many bags as at export and others, empty ones among them, and (but for [B, 0], which torch refuses) none at all.
LENGTHS = [[3, 3], [2, 0, 5, 1, 0], [0, 0], [70], [4, 4, 4, 4], []]


@pytest.mark.parametrize("seed", range(MODULES))
def test_a_random_module(seed: int, tmp_path: Path, translations: None, record_property: Callable[..., None]) -> None:
    module = Module.random(seed)
    calls = [module.call(lengths, seed + k) for k, lengths in enumerate(LENGTHS) if lengths or not module.two_d]
    calls = [feed for feed in calls if feed["indices"].size or not module.two_d]
    for feed in calls:
        if module.include_last_offset and len(feed["offsets"]) == 1:
            continue  # torch refuses it
        expected = exact(module, feed)
        got = eager(module, feed)
        assert (np.abs(got.astype(np.float64) - expected) <= allowed(module, feed, got)).all(), (module, "eager")
    for way in EXPORTERS:
        path = tmp_path / f"{way}.onnx"
        reason = exported(module, way, path)
        record_property(way, reason or "exported")
        if reason is not None:
            continue
        model, meant = onnx.load(path), module
        if way == "dynamo" and module.max_norm is not None:  # which it writes as float32, and casts to the table's type
            written = np.asarray(module.max_norm, np.float32).astype(module.numpy_dtype)
            meant = dataclasses.replace(module, max_norm=float(written))
        if way != "lucid":
            report = lucid_onnx.fuse(path)
            if not report.fused and way == "dynamo" and module.index_dtype == "int32":
                # It puts int32 offsets and int64 sizes into one Concat: no runtime takes such a file. (ONNX Runtime has
                # no ReduceL2 of bfloat16 either, and may say that first.)
                with pytest.raises(Exception, match=r"Type Error|Type parameter|ReduceL2"):
                    lucid_onnx.InferenceSession(path, native=False)
                record_property(way, "its types do not fit together")
                continue
            assert (len(report.fused), report.unfused) == (1, ()), (module, way, report)
            model = report.model
            left = {n.op_type for n in model.graph.node}  # of int32 indices [B, L], where it computes their offsets
            assert not {"Loop", "SequenceInsert", "Unique", "ScatterND"} & left, (module, way)
            assert report.fused[0].max_norm == meant.max_norm
        for form, session in sessions(model, standard=way == "lucid").items():
            for feed in calls:
                names = {v.name for v in model.graph.input}
                (got,) = session.run(None, {n: a for n, a in feed.items() if n in names})
                expected = exact(meant, feed)
                assert (got.dtype, got.shape) == (module.numpy_dtype, expected.shape), (module, way, form)
                wrong = np.abs(got.astype(np.float64) - expected) > allowed(module, feed, got)
                assert not wrong.any(), (module, way, form, feed)
