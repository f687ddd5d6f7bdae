"""From a trained model to an ONNX graph with integer weights, and the proof that both say the same."""
