"""Turn the ``ai.lucid`` nodes of a model, or of a file, into another form."""

from __future__ import annotations

import os

import onnx

from lucid_onnx.builder import Form, to_form

from . import files


def lower(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    form: Form = "standard",
) -> onnx.ModelProto:
    """A model with every ``ai.lucid`` node in another form: `lucid_onnx.to_form`, for files as well.

    "standard" leaves no trace of the domain, neither in the graph nor in functions nor among the opsets. External
    data is neither loaded nor changed, and is copied only if ``output`` is in another folder.

    Args:
        model: a path, or a model; it is not changed.
        output: where to write the result; it appears whole or not at all, and may be the input's path.
        form: "standard", "portable" or "native".

    Raises:
        OSError: a file cannot be read or written.
        ValueError: an unknown form, no ONNX model, an opset outside [16, 26], or one that onnx.checker refuses.
    """
    proto, folder = files.read(model)
    result = to_form(proto, form)
    complaint = files.check(result)
    if complaint is not None:
        raise ValueError(f"the model in {form} form does not pass onnx.checker: {complaint}")
    if output is not None:
        files.write(result, output, folder)
    return result
