"""Small models of other libraries, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: The tokens of `tokenizer`, each at its id.
WORDS = ("[UNK]", "the", "cat", "sat", "on", "a", "mat", "dog")
_NAMES = {"float32": "F32", "float16": "F16", "float64": "F64", "bfloat16": "BF16", "int8": "I8", "int64": "I64"}
_NAMES["int32"] = "I32"


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        begin = len(data)
        data += array.tobytes()
        offsets = [begin, len(data)]
        header[name] = {"dtype": _NAMES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tokenizer(words: Sequence[str] = WORDS, **changes: Any) -> dict[str, Any]:
    """A tokenizer.json of whole words."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "[UNK]"},
        **changes,
    }


def table(rows: int = len(WORDS), dim: int = 5, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype) == np.int8:
        return rng.integers(-128, 128, (rows, dim), np.int8)
    return rng.standard_normal((rows, dim)).astype(dtype)


def model2vec(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """A folder as model2vec writes it."""
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def static_embedding(
    folder: Path, tensors: Mapping[str, np.ndarray], *others: str, prompts: Mapping[str, Any] | None = None
) -> Path:
    """A folder as sentence-transformers writes it, with ``others`` behind the StaticEmbedding."""
    inner = folder / "0_StaticEmbedding"
    inner.mkdir(parents=True)
    write_safetensors(inner / "model.safetensors", tensors)
    (inner / "tokenizer.json").write_text(json.dumps(tokenizer()))
    kinds = [("StaticEmbedding", "0_StaticEmbedding"), *((kind, f"{k}_{kind}") for k, kind in enumerate(others, 1))]
    modules = [{"idx": k, "name": str(k), "path": p, "type": f"a.b.{t}"} for k, (t, p) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


def wordllama(folder: Path, weight: np.ndarray, name: str = "tiny") -> Path:
    """Weights as wordllama has them; their file."""
    (folder / "weights").mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    path = folder / "weights" / f"{name}_{weight.shape[1]}.safetensors"
    write_safetensors(path, {"embedding.weight": weight})
    (folder / "tokenizers" / f"{name}_tokenizer_config.json").write_text(json.dumps(tokenizer()))
    return path


def means(
    rows: np.ndarray,
    bags: Sequence[Sequence[int]],
    *,
    mapping: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    skipped: int | None = None,
    normalized: bool = False,
) -> np.ndarray:
    """What a static text model computes, one text after another in float64."""
    result = np.zeros((len(bags), rows.shape[1]))
    for i, ids in enumerate(bags):
        kept = [t for t in ids if t != skipped]
        if kept:
            picked = rows[kept if mapping is None else mapping[kept]].astype(np.float64)
            result[i] = (picked * (1 if weights is None else weights[kept, None].astype(np.float64))).mean(axis=0)
    if normalized:
        result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
    return result
