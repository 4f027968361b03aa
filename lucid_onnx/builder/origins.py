"""Where the external data of a model in memory lies, for models that were read from a file here.

An onnx.ModelProto has the names of its data files, relative to a folder that it does not name. `fuse`, `lower` and
`quantize` know that folder, and the session that somebody opens on their result has to find it. Nothing in the model
says where it is: a file from elsewhere could say it too, and so choose what is read.
"""

from __future__ import annotations

import sys
import threading
from typing import NamedTuple

import onnx

from .loading import ExternalData, is_external, tensors


class _Origin(NamedTuple):
    model: onnx.ModelProto
    data: ExternalData


#: By the id of the model. A ModelProto has no hash and takes no weak reference, so this table holds it, and lets go of
#: those that nobody else holds whenever it is used. They are small: their tables are in files.
_origins: dict[int, _Origin] = {}
_lock = threading.Lock()


def _references(origin: _Origin) -> int:
    return sys.getrefcount(origin.model)


#: What `_references` finds for a model that the table alone holds.
_ALONE = _references(_Origin(onnx.ModelProto(), ExternalData("")))


def remember_data(model: onnx.ModelProto, data: ExternalData | None) -> None:
    """Keep for `data_of` where the external data of a model lies, as long as this very object lives."""
    with _lock:
        _forget()
        if data is not None and any(is_external(tensor) for tensor in tensors(model)):
            _origins[id(model)] = _Origin(model, data.anchored())


def data_of(model: onnx.ModelProto) -> ExternalData | None:
    """Where the external data of a model lies that was given to `remember_data`; None for any other, and for copies."""
    with _lock:
        _forget()
        origin = _origins.get(id(model))
        return None if origin is None else origin.data


def _forget() -> None:
    for key in [key for key, origin in _origins.items() if _references(origin) <= _ALONE]:
        del _origins[key]
