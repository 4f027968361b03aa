"""Tables of 8 and 4 bits: python benchmarks/quantized.py [--rows 1000000 --dim 64 --bags 2048 --length 20]

The native kernel, by session.run and by run_with_iobinding, against torch.ops.quantized.embedding_bag_byte and _4bit,
which read FBGEMM's rows with their scale and bias behind them. Ours has the same quantized values, scales and biases.
Every call has fresh indices.
"""

from __future__ import annotations

import sys

import numpy as np

import lucid_onnx
from common import BATCHES, binding, options, quiet_torch, report, shape_parser

#: Our codes_type, and its name in torch's operators.
TORCH = {"uint8": "byte", "uint4": "4bit"}


def main() -> int:
    a = shape_parser(__doc__).parse_args()
    quiet_torch()
    import torch

    random = np.random.default_rng(0)
    weight = random.standard_normal((a.rows, a.dim), dtype=np.float32)
    offsets = np.arange(a.bags) * a.length
    feeds = [{"indices": random.integers(0, a.rows, a.bags * a.length), "offsets": offsets} for _ in range(BATCHES)]
    tensors = [tuple(map(torch.from_numpy, feed.values())) for feed in feeds]
    print(f"V={a.rows} D={a.dim} B={a.bags} L={a.length} sum, {a.turns} turns; torch {torch.__version__}")
    for kind, bits in TORCH.items():
        pack = getattr(torch.ops.quantized, f"embedding_bag_{bits}_prepack")
        pool = getattr(torch.ops.quantized, f"embedding_bag_{bits}_rowwise_offsets")
        rows = pack(torch.from_numpy(weight))
        width = a.dim if bits == "byte" else (a.dim + 1) // 2
        numbers = rows.numpy()[:, width:].copy().view(np.float32 if bits == "byte" else np.float16)
        scale, bias = np.ascontiguousarray(numbers.T.astype(np.float32))
        codes = np.ascontiguousarray(rows.numpy()[:, :width])
        table = lucid_onnx.QuantizedTable(codes, kind, a.dim, scale, bias=bias)
        model = lucid_onnx.build_quantized_model(table, mode="sum")
        for threads in a.threads:
            torch.set_num_threads(threads)
            session = lucid_onnx.InferenceSession(model, session_options=options(threads))

            def theirs(batch: int, pool: object = pool, rows: object = rows) -> np.ndarray:
                return pool(rows, *tensors[batch], mode=0).numpy()  # type: ignore[operator,no-any-return]

            def ours(batch: int, session: object = session) -> np.ndarray:
                return session.run(None, feeds[batch])[0]  # type: ignore[attr-defined,no-any-return]

            title = f"{kind}, {threads} threads; ratio: torch's time over ours"
            bound = binding(session, feeds, (a.bags, a.dim))
            report(title, {f"torch embedding_bag_{bits}": theirs, "native": ours, "native, bound": bound}, a.turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
