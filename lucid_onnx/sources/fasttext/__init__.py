"""fastText's models: `reader` reads the file, `words` turns text into rows, and `graph` is the arithmetic in ONNX."""
