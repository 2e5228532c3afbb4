"""INT8 as explicit Q/DQ in ONNX, for OpenVINO, TensorRT and ONNX Runtime alike; see docs/int8.md.

calibrate.py finds thresholds of activations, emulate.py rounds in torch, distance.py tells what
that moves, sensitivity.py which convolutions suffer most by it, regions.py which tensors become
INT8, insert.py writes the graph with ONNX Runtime's quantiser.
"""

from yolov4_fast.engines.quantize.calibrate import METHODS
from yolov4_fast.engines.quantize.quantize import Quantised, quantize

__all__ = ["METHODS", "Quantised", "quantize"]
