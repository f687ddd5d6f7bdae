"""Graph passes, one class a file; the pipelines that use them are listed in `onnx_export.pipeline`."""
