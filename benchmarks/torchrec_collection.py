"""TorchRec's collections and FBGEMM's tables: python benchmarks/torchrec_collection.py [--tables 26 --rows 50000 ...]

Each against the model that `lucid_onnx.torch` makes of it, in one process and from the same KeyedJaggedTensors: the
float collection, features in another order, weighted, quantized to 8 and 4 bits; FBGEMM's tables for training and for
inference; a DLRM. Results are checked first, the sides take turns, every call has fresh indices. torch's float tables
are put on huge pages, as ours are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from grid import Memory

import lucid_onnx
from common import BATCHES, options, quiet_torch
from interleave import compare


def huge(array: np.ndarray) -> np.ndarray:
    """A copy on huge pages."""
    copy = Memory(array.nbytes).bytes.view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


class Work:
    """The modules, and calls of them."""

    def __init__(self, a: argparse.Namespace) -> None:
        import torch
        import torchrec

        self.a, self.torch, self.torchrec = a, torch, torchrec
        self.keys = [f"f{t}" for t in range(a.tables)]

    def collection(self, *, weighted: bool = False) -> Any:
        configs = [
            self.torchrec.EmbeddingBagConfig(
                name=f"t{t}", embedding_dim=self.a.dim, num_embeddings=self.a.rows, feature_names=[key]
            )
            for t, key in enumerate(self.keys)
        ]
        made = self.torchrec.EmbeddingBagCollection(tables=configs, is_weighted=weighted).eval()
        for bag in made.embedding_bags.values():
            bag.weight.data = self.torch.from_numpy(huge(bag.weight.detach().numpy()))
        return made

    def quantized(self, bits: int) -> Any:
        from torch.ao.quantization import PlaceholderObserver, QConfig
        from torchrec.quant import EmbeddingBagCollection

        made, torch = self.collection(), self.torch
        made.qconfig = QConfig(
            activation=PlaceholderObserver.with_args(dtype=torch.float32),
            weight=PlaceholderObserver.with_args(dtype=torch.qint8 if bits == 8 else torch.quint4x2),
        )
        return EmbeddingBagCollection.from_float(made).eval()

    def features(self, *, weighted: bool = False) -> list[dict[str, Any]]:
        """The parts of a KeyedJaggedTensor, of each batch."""
        random, count = np.random.default_rng(0), self.a.tables * self.a.bags
        made = []
        for _ in range(BATCHES):
            lengths = random.integers(0, 2 * self.a.length + 1, count)
            size = int(lengths.sum())
            parts = {"values": random.integers(0, self.a.rows, size), "lengths": lengths}
            if weighted:
                parts["weights"] = random.random(size, dtype=np.float32)
            made.append({name: self.torch.from_numpy(part) for name, part in parts.items()})
        return made

    def keyed(self, keys: Sequence[str], parts: dict[str, Any]) -> Any:
        """Made anew for each call, since it keeps what it has computed."""
        return self.torchrec.KeyedJaggedTensor(keys=list(keys), **parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("tables", 26), ("rows", 50_000), ("dim", 64), ("bags", 128), ("length", 10), ("turns", 100))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--process-time", action="store_true", help="what the process has worked, on a machine that does other things"
    )
    a = parser.parse_args()
    quiet_torch()
    import torch

    work = Work(a)
    print(
        f"T={a.tables} V={a.rows} D={a.dim} B={a.bags} L=0..{2 * a.length}, {a.turns} turns; onnxruntime "
        f"{ort.__version__}, torch {torch.__version__}; ratio: TorchRec's time over ours"
    )
    turned = work.keys[::-1]
    for title, made, keys, weighted in (
        ("float32", work.collection, work.keys, False),
        ("float32, another order", work.collection, turned, False),
        ("float32, weighted", lambda: work.collection(weighted=True), work.keys, True),
        ("8 bits", lambda: work.quantized(8), work.keys, False),
        ("4 bits", lambda: work.quantized(4), work.keys, False),
    ):
        measure(work, title, made(), keys, weighted=weighted)
    batched(work)
    dlrm(work)
    return 0


def measure(work: Work, title: str, module: Any, keys: Sequence[str], *, weighted: bool) -> None:
    import lucid_onnx.torch as lucid_torch

    parts = work.features(weighted=weighted)
    model = lucid_torch.export(module, work.keyed(keys, parts[0]), form="native")
    show(work, title, model, lambda k: module(work.keyed(keys, parts[k])).values(), parts)


def batched(work: Work) -> None:
    """FBGEMM's own call for tables, without a KeyedJaggedTensor."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as fbgemm

    import lucid_onnx.torch as lucid_torch

    place = (fbgemm.EmbeddingLocation.HOST, fbgemm.ComputeDevice.CPU)
    shapes = [(work.a.rows, work.a.dim, *place)] * work.a.tables
    module = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(shapes, device="cpu").eval()
    module.init_embedding_weights_uniform(-1, 1)
    torch = work.torch
    calls = [
        {
            "indices": parts["values"],
            "offsets": torch.nn.functional.pad(parts["lengths"].cumsum(0), (1, 0)),
        }
        for parts in work.features()
    ]
    model = lucid_torch.from_module(module, form="native")
    show(work, "FBGEMM's tables, float32", model, lambda k: module(**calls[k]), calls)


def dlrm(work: Work) -> None:
    from torchrec.models.dlrm import DLRM

    import lucid_onnx.torch as lucid_torch

    torch, dim = work.torch, work.a.dim
    module = DLRM(work.collection(), 13, [512, 256, dim], [512, 256, 1]).eval()
    parts = [{"dense_features": torch.rand(work.a.bags, 13), **found} for found in work.features()]

    def call(k: int) -> Any:
        given = dict(parts[k])
        return module(given.pop("dense_features"), work.keyed(work.keys, given))

    example = dict(parts[0])
    model = lucid_torch.export(module, (example.pop("dense_features"), work.keyed(work.keys, example)), form="native")
    show(work, "DLRM", model, call, parts)


def show(work: Work, title: str, model: Any, call: Callable[[int], Any], parts: Sequence[dict[str, Any]]) -> None:
    """Measure a model and a module; ``call`` is the module's of a batch, and ``parts`` are the inputs of each."""
    torch = work.torch
    feeds = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in parts]
    for threads in work.a.threads:
        torch.set_num_threads(threads)

        def eager(batch: int) -> np.ndarray:
            with torch.no_grad():  # FBGEMM has no kernel for inference_mode
                return call(batch).numpy()  # type: ignore[no-any-return]

        session = lucid_onnx.InferenceSession(model, session_options=options(threads))
        sides = {"TorchRec": eager, "ours": lambda batch, s=session: s.run(None, feeds[batch])[0]}
        clock = time.process_time if work.a.process_time else time.perf_counter
        found = compare(sides, batches=BATCHES, turns=work.a.turns, clock=clock)
        print(f"  {title:26s} {threads} threads: {found['TorchRec'].median * 1e3:7.3f} ms; {found['ours']}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
