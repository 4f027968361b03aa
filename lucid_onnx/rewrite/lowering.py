"""Turn the ``ai.lucid`` nodes of a model, or of a file, into another form."""

from __future__ import annotations

import os
from typing import Literal

import onnx

from lucid_onnx.builder import Form, convert
from lucid_onnx.ops.embedding_bag.lowering import PIECES, Ragged

from . import files

RaggedWay = Literal["pieces", "blocks", "loop", "padded"]


def lower(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    form: Form = "standard",
    ragged: RaggedWay = "pieces",
    longest_bag: int | None = None,
    single_file: bool = False,
) -> onnx.ModelProto:
    """A model with every ``ai.lucid`` node in another form: `lucid_onnx.to_form`, for files as well.

    "standard" leaves no trace of the domain, neither in the graph nor in functions nor among the opsets. External
    data is neither loaded nor changed, and is copied only if ``output`` is in another folder.

    ``ragged`` is how standard operators pool bags. Gradients are always in pieces.

    - "pieces": indices [B, L] as a matrix, in the standard form; flat ones, and functions, in blocks.
    - "blocks": a few operators over all bags, with memory in proportion to the indices and the output.
    - "loop": an iteration per bag; a graph of a quarter to a third of the nodes, and slow where there are many bags.
    - "padded": a matrix of all bags, each as long as the longest, with as much memory. ONNX Runtime on the CPU rejects
      a bag of more than ``longest_bag`` positions; where nothing is rejected, its row is NaN.

    Args:
        model: a path, or a model; it is not changed.
        output: where to write the result; it appears whole or not at all, and may be the input's path.
        form: "standard", "portable" or "native".
        ragged: "pieces", "blocks", "loop" or "padded".
        longest_bag: for "padded", the most positions of a bag that will come, padded ones too, in [1, 4096]. Indices
            [B, L] need none: their L is it.
        single_file: put all external data into ``output``, and into the result.

    Raises:
        OSError: a file cannot be read or written.
        TypeError: longest_bag is not an integer.
        ValueError: an unknown form or way; not an ONNX model, an opset outside [16, 26], or one that onnx.checker
            rejects; longest_bag is out of range, missing, or not for this way; another way in the "native" form; a
            single file over 2 GiB.
    """
    way = Ragged(ragged, longest_bag)
    if form == "native" and way != PIECES:
        raise ValueError(f"ragged = {ragged!r}, but form = 'native': it has no standard operators")
    proto, data = files.read(model)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    convert(result, form, way)
    complaint = files.check(result)
    if complaint is not None:
        raise ValueError(f"the model in {form} form does not pass onnx.checker: {complaint}")
    return files.finish(result, data, output, single_file=single_file)[0]
