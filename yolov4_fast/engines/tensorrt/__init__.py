"""NVIDIA TensorRT: plans built of our ONNX, and run."""
