"""Scripts of the checkout, which are not installed, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path) -> ModuleType:
    """A script as a module; it stays in sys.modules, where dataclasses look their annotations up."""
    found = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module
