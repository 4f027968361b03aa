"""The workers of ``javascript/``: onnxruntime-node, and onnxruntime-web in headless Chromium.

The workers are JavaScript programs. This file finds Node, the folder with its packages, and a browser.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

#: Environment variable with the folder. Without it, the folder is searched upwards from the current one, and beside
#: the package's sources.
FOLDER = "LUCID_ONNX_JAVASCRIPT"
BROWSER = "LUCID_ONNX_CHROMIUM"
_NAME = "lucid-onnx-javascript"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class NotHereError(Exception):
    """Something that a worker needs is missing."""


def command(kind: str) -> Sequence[str]:
    """How to start a worker: "node", "wasm-1", "wasm-4" or "webgpu".

    Raises:
        NotHereError: with the reason.
    """
    node = shutil.which("node")
    if node is None:
        raise NotHereError("node is not installed")
    folder = _folder()
    if not (folder / "node_modules" / "onnxruntime-web").is_dir():
        raise NotHereError(f"the packages of {folder} are not installed: npm ci --ignore-scripts")
    if kind == "node":
        return [node, str(folder / "worker.mjs"), "node"]
    return [node, str(folder / "worker.mjs"), kind, _browser()]


def _folder() -> Path:
    given = os.environ.get(FOLDER)
    places = [Path(given)] if given else [p / "javascript" for p in (Path.cwd(), *Path.cwd().parents)]
    if not given:
        places.append(Path(__file__).resolve().parents[3] / "javascript")
    for place in places:
        try:
            if json.loads((place / "package.json").read_text()).get("name") == _NAME:
                return place.resolve()
        except (OSError, ValueError, AttributeError):
            continue
    raise NotHereError(f"the folder javascript/ of lucid-onnx's sources was not found; set {FOLDER}")


def _browser() -> str:
    given = os.environ.get(BROWSER)
    if given:
        if not os.access(given, os.X_OK):
            raise NotHereError(f"{BROWSER} = {given} cannot be run")
        return given
    for name in _BROWSERS:
        found = shutil.which(name)
        if found is not None:
            return found
    mac = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    if sys.platform == "darwin" and os.access(mac, os.X_OK):
        return mac
    raise NotHereError(f"no Chromium or Chrome was found; set {BROWSER}")
