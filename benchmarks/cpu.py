"""One shape, run in every way: python benchmarks/cpu.py [--rows 1000000 --dim 64 --bags 2048 --length 20]

The native kernel against torch's eager call, and the portable file without the library against torch's own export of
the same module. Both sides read the same table memory where possible: torch's parameter is the array that sessions get
as an input; "constant" has it as an initializer, in onnxruntime's own memory. Every call has fresh indices, as on a
server.
"""

from __future__ import annotations

import platform
import sys

import numpy as np
import onnxruntime as ort

import lucid_onnx
from common import BATCHES, exported, options, quiet_torch, report, shape_parser


def main() -> int:
    parser = shape_parser(__doc__)
    parser.add_argument("--mode", choices=("sum", "mean", "max"), default="sum")
    parser.add_argument("--no-export", action="store_true", help="skip torch's exporter, which is slow")
    a = parser.parse_args()
    quiet_torch()
    import torch

    random = np.random.default_rng(0)
    table = random.standard_normal((a.rows, a.dim), dtype=np.float32)
    offsets = np.arange(a.bags) * a.length
    feeds = [{"indices": random.integers(0, a.rows, a.bags * a.length), "offsets": offsets} for _ in range(BATCHES)]
    module = torch.nn.EmbeddingBag(a.rows, a.dim, mode=a.mode, _weight=torch.from_numpy(table))
    tensors = [tuple(map(torch.from_numpy, feed.values())) for feed in feeds]
    constant = lucid_onnx.build_model(table, mode=a.mode)
    given = lucid_onnx.build_model(None, mode=a.mode)
    print(
        f"V={a.rows} D={a.dim} B={a.bags} L={a.length} float32 {a.mode}, {a.turns} turns; "
        f"{platform.processor() or platform.machine()}, onnxruntime {ort.__version__}, torch {torch.__version__}"
    )
    graph = None if a.no_export else exported(module, tensors[0])
    for threads in a.threads:
        torch.set_num_threads(threads)

        def eager(batch: int) -> np.ndarray:
            with torch.inference_mode():
                return module(*tensors[batch]).numpy()  # type: ignore[no-any-return]

        def running(model: object, native: bool, table_is_input: bool, threads: int = threads):  # type: ignore[no-untyped-def]
            session = lucid_onnx.InferenceSession(model, native=native, session_options=options(threads))  # type: ignore[arg-type]
            inputs = [{"weight": table, **feed} if table_is_input else feed for feed in feeds]
            return lambda batch: session.run(None, inputs[batch])[0]

        report(
            f"{threads} threads, native; ratio: torch's time over ours",
            {
                "torch eager": eager,
                "native, table given": running(given, True, True),
                "native, table constant": running(constant, True, False),
            },
            a.turns,
        )
        if graph is not None:
            session = ort.InferenceSession(graph, options(threads), providers=["CPUExecutionProvider"])
            names = [i.name for i in session.get_inputs()]
            theirs = [dict(zip(names, feed.values(), strict=True)) for feed in feeds]
            report(
                f"{threads} threads, onnxruntime without our library; ratio: the export's time over ours",
                {
                    "torch's dynamo export": lambda batch, s=session, f=theirs: s.run(None, f[batch])[0],  # type: ignore[misc]
                    "portable, no library": running(constant, False, False),
                },
                a.turns,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
