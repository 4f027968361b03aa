"""The backward of one shape: python benchmarks/gradient.py [--rows 1000000 --dim 64 --bags 2048 --length 20]

The native kernels, through a session, against torch's backward alone: torch.autograd.grad over the kept graph of
F.embedding_bag, with sparse=False (a gradient of the whole table) and sparse=True. Both sides read the same table
memory. "bound" writes into one gradient that the caller keeps, by io-binding. The others allocate a gradient in every
call and free the last one, as a training step does. Every call has fresh indices.
"""

from __future__ import annotations

import platform
import sys

import numpy as np
import onnxruntime as ort

import lucid_onnx
from common import BATCHES, options, quiet_torch, report, shape_parser


def main() -> int:
    parser = shape_parser(__doc__)
    parser.add_argument("--mode", choices=("sum", "mean", "max"), default="sum")
    a = parser.parse_args()
    quiet_torch()
    import torch

    random = np.random.default_rng(0)
    table = random.standard_normal((a.rows, a.dim), dtype=np.float32)
    gradient = random.standard_normal((a.bags, a.dim), dtype=np.float32)
    offsets = np.arange(a.bags) * a.length
    given = {"grad_output": gradient, "weight": table, "offsets": offsets}
    feeds = [{**given, "indices": random.integers(0, a.rows, a.bags * a.length)} for _ in range(BATCHES)]
    weight, output = torch.from_numpy(table).requires_grad_(), torch.from_numpy(gradient)
    print(
        f"V={a.rows} D={a.dim} B={a.bags} L={a.length} float32 {a.mode}, {a.turns} turns; "
        f"{platform.processor() or platform.machine()}, onnxruntime {ort.__version__}, torch {torch.__version__}"
    )
    for sparse in (False, True):
        if sparse and a.mode == "max":
            continue  # torch has none
        pooled = [
            torch.nn.functional.embedding_bag(
                *(torch.from_numpy(feed["indices"]), weight, torch.from_numpy(offsets)), mode=a.mode, sparse=sparse
            )
            for feed in feeds
        ]

        def backward(batch: int, pooled: list[torch.Tensor] = pooled) -> torch.Tensor:
            return torch.autograd.grad(pooled[batch], weight, output, retain_graph=True)[0]

        def eager(batch: int, backward=backward, sparse: bool = sparse) -> np.ndarray:  # type: ignore[no-untyped-def]
            found = backward(batch)
            return (found._values() if sparse else found).numpy()  # type: ignore[no-any-return]

        for threads in a.threads:
            torch.set_num_threads(threads)
            model = lucid_onnx.build_grad_model(mode=a.mode, sparse=sparse, form="native")
            session = lucid_onnx.InferenceSession(model, session_options=options(threads))
            binding = session.io_binding()
            count = a.bags * a.length
            kept = {"rows": np.zeros(count, np.int64), "values": np.zeros((count, a.dim), np.float32)}
            if not sparse:
                kept = {"grad_weight": np.zeros((a.rows, a.dim), np.float32)}
            for name, array in kept.items():
                binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
            result = kept["values" if sparse else "grad_weight"]

            def bound(batch: int, session=session, binding=binding, result=result) -> np.ndarray:  # type: ignore[no-untyped-def]
                for name, array in feeds[batch].items():
                    binding.bind_cpu_input(name, array)
                session.run_with_iobinding(binding)
                return result  # type: ignore[no-any-return]

            def run(batch: int, session=session) -> np.ndarray:  # type: ignore[no-untyped-def]
                return session.run(None, feeds[batch])[-1]  # type: ignore[no-any-return]

            if sparse:
                np.testing.assert_array_equal(session.run(None, feeds[0])[0], backward(0)._indices()[0].numpy())
            kind = "sparse" if sparse else "dense"
            report(
                f"{threads} threads, {kind}; ratio: torch's time over ours",
                {"torch backward": eager, "native": run, "native, bound": bound},
                a.turns,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
