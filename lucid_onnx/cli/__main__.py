"""``python -m lucid_onnx.cli`` is ``lucid-onnx``, as ``python -m lucid_onnx`` is."""

import sys

from .app import main

if __name__ == "__main__":
    sys.exit(main())
