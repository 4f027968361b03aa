"""Many tables at once: python benchmarks/collection.py [--tables 26 --rows 50000 --dim 64 --bags 128 --length 10]

One EmbeddingBagCollection against a node per table and a Concat, and against torch.nn.functional.embedding_bag of each
table and a cat; indices and offsets are given per table, and packed as in FBGEMM. Then a DLRM as torch exports it
(models/networks.py, whose tables are small), fused, and fused with its tables merged, against torch. Every call has
fresh indices.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

import lucid_onnx
from common import BATCHES, options, quiet_torch, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))


def node_per_table(tables: list[np.ndarray]) -> object:
    """The model of a node per table, and a Concat."""
    count = range(len(tables))
    nodes = [lucid_onnx.make_node(f"weight_{t}", f"indices_{t}", f"offsets_{t}", f"o{t}", mode="sum") for t in count]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Concat", [f"o{t}" for t in count], ["output"], axis=1)],
        "nodes",
        [
            helper.make_tensor_value_info(f"{name}_{t}", TensorProto.INT64, [None])
            for name in ("indices", "offsets")
            for t in count
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None, None])],
        [
            helper.make_tensor(f"weight_{t}", TensorProto.FLOAT, w.shape, w.tobytes(), raw=True)
            for t, w in enumerate(tables)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)])
    model.ir_version = 8
    return lucid_onnx.to_form(model, "native")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("tables", 26), ("rows", 50_000), ("dim", 64), ("bags", 128), ("length", 10), ("turns", 200))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    a = parser.parse_args()
    quiet_torch()
    import torch

    random = np.random.default_rng(0)
    tables = [random.standard_normal((a.rows, a.dim), dtype=np.float32) for _ in range(a.tables)]
    weights = [torch.from_numpy(table) for table in tables]
    count = a.bags * a.length
    batches = [random.integers(0, a.rows, (a.tables, count)) for _ in range(BATCHES)]
    starts = np.arange(a.bags) * a.length
    feeds = [
        {**{f"indices_{t}": ids[t] for t in range(a.tables)}, **{f"offsets_{t}": starts for t in range(a.tables)}}
        for ids in batches
    ]
    packed = [{"indices": ids.reshape(-1), "offsets": np.arange(a.tables * a.bags + 1) * a.length} for ids in batches]
    tensors = [[torch.from_numpy(i) for i in ids] for ids in batches]
    offsets = torch.from_numpy(starts)
    print(
        f"T={a.tables} V={a.rows} D={a.dim} B={a.bags} L={a.length} float32 sum, {a.turns} turns; "
        f"onnxruntime {ort.__version__}, torch {torch.__version__}"
    )
    models = {
        "a node per table, Concat": (node_per_table(tables), feeds),
        "collection": (lucid_onnx.build_collection_model(tables, mode="sum", form="native"), feeds),
        "collection, packed": (
            lucid_onnx.build_collection_model(
                tables, mode="sum", layout="packed", include_last_offset=True, form="native"
            ),
            packed,
        ),
    }
    for threads in a.threads:
        torch.set_num_threads(threads)

        def eager(batch: int) -> np.ndarray:
            with torch.inference_mode():
                bags = [
                    torch.nn.functional.embedding_bag(i, w, offsets, mode="sum")
                    for i, w in zip(tensors[batch], weights, strict=True)
                ]
                return torch.cat(bags, dim=1).numpy()

        sides: dict[str, Callable[[int], np.ndarray]] = {"torch, a call per table": eager}
        for name, (model, inputs) in models.items():
            session = lucid_onnx.InferenceSession(model, session_options=options(threads))  # type: ignore[arg-type]
            sides[name] = lambda batch, s=session, f=inputs: s.run(None, f[batch])[0]  # type: ignore[misc]
        report(f"{threads} threads; ratio: torch's time over ours", sides, a.turns)
        del sides["torch, a call per table"]
        report(f"{threads} threads; ratio: the nodes' time over the collection's", sides, a.turns)
    ranker(a.bags, a.length, a.threads, a.turns)
    return 0


def ranker(bags: int, length: int, thread_counts: list[int], turns: int) -> None:
    """A whole DLRM."""
    import networks
    import torch

    network, module = networks.made("dlrm")
    calls = []
    for seed in range(BATCHES):  # fresh indices, as the network's arguments are seeded by the batch size alone
        random = np.random.default_rng(seed)
        made = list(network.arguments(module, [length] * bags, ()))
        for k, table in enumerate(module.tables):
            made[2 + k] = torch.from_numpy(random.integers(0, table.num_embeddings, bags * length))
        calls.append(made)
    feeds = [{n: t.numpy() for n, t in zip(network.inputs, call, strict=True)} for call in calls]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dlrm.onnx"
        networks.export("dlrm", module, "legacy", path)
        fused = lucid_onnx.fuse(path).model
        merged = lucid_onnx.fuse(path, merge_tables=True).model
    for threads in thread_counts:
        torch.set_num_threads(threads)

        def eager(batch: int) -> np.ndarray:
            with torch.inference_mode():
                return module(*calls[batch]).numpy()  # type: ignore[no-any-return]

        sides: dict[str, Callable[[int], np.ndarray]] = {"torch eager": eager}
        for name, model in (("fused", fused), ("fused and merged", merged)):
            session = lucid_onnx.InferenceSession(model, session_options=options(threads))
            sides[name] = lambda batch, s=session: s.run(None, feeds[batch])[0]  # type: ignore[misc]
        report(f"DLRM, {threads} threads; ratio: torch's time over ours", sides, turns)


if __name__ == "__main__":
    sys.exit(main())
