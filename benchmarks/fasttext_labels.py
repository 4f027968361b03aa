"""fastText's models beside fastText: python benchmarks/fasttext_labels.py lid.176.ftz [--texts 10000 --turns 5]

Predicts the labels of lines of Python's documentation: the words' hashing alone, cold and warm, the model alone, and
both together, beside fastText's own calls for a list of texts and for one. A quantized table is measured as it is and
as float32. All run on one thread, and times are of the CPU. Needs ``pip install fasttext-wheel``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lucid_onnx
from common import options
from lucid_onnx.sources.encoder import TextEncoder


def seconds(call: Callable[[], object], turns: int) -> float:
    """The median of some calls, of CPU time."""
    taken = []
    for _ in range(turns):
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    a = parser.parse_args()
    from pydoc_data.topics import topics

    import fasttext

    fasttext.FastText.eprint = lambda *_: None
    lines = [line for text in topics.values() for line in text.split("\n") if line.strip()]
    texts = (lines * (a.texts // len(lines) + 1))[: a.texts]
    words = sum(len(text.split()) for text in texts)
    theirs = fasttext.load_model(a.model)
    print(f"{len(texts):,} texts, {words:,} words, {len({w for t in texts for w in t.split()}):,} different ones")

    def show(name: str, taken: float) -> None:
        print(f"  {name:44s} {taken * 1e3:8.1f} ms  {words / taken:12,.0f} words/s")

    ended = [text + "\n" for text in texts]
    show("fastText, a list", seconds(lambda: theirs.f.multilinePredict(ended, 1, 0.0, "strict"), a.turns))
    one = seconds(lambda: [theirs.f.predict(text, 1, 0.0, "strict") for text in ended], a.turns)
    show("fastText, one by one", one)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (None, "float32"):
            path = Path(folder, f"{dtype}.onnx")
            lucid_onnx.import_model(a.model, dtype=dtype).save(path)
            print(f"{dtype or 'as it is'}: {path.stat().st_size:,} bytes")
            for native in (True, False):
                encoder = TextEncoder(path, native=native, session_options=options(1))
                begin = time.process_time()
                feeds = encoder.feeds(texts)
                cold = time.process_time() - begin
                kind = "our kernels" if native else "ONNX Runtime alone"
                if native and dtype is None:
                    show("hashing, nothing remembered", cold)
                    show("hashing", seconds(lambda encoder=encoder: encoder.feeds(texts), a.turns))
                outputs = (["labels", "probabilities"], feeds)
                run = seconds(lambda encoder=encoder, outputs=outputs: encoder.session.run(*outputs), a.turns)
                show(f"model, {kind}", run)
                show(f"both, {kind}", seconds(lambda encoder=encoder: encoder.predict(texts), a.turns))
                single = seconds(lambda encoder=encoder: [encoder.predict([t]) for t in texts[:1000]], a.turns)
                show(f"both, one by one, {kind}", single * len(texts) / 1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
