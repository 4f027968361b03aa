"""``python -m lucid_onnx`` is ``lucid-onnx``."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main())
