"""Where a model gives the same numbers, where it differs and by how much: every runtime beside each other.

`lucid_onnx.parity.matrix.run` over the runtimes of `lucid_onnx.parity.adapters` and the jobs of
`lucid_onnx.parity.work`; on the command line ``lucid-onnx parity``.
"""
