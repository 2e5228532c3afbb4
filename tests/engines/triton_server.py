"""A stand-in for Triton Inference Server: the schema of its configurations, and what it gives to a
model.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from yolov4_fast.engines.engine import Manifest
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.triton_repository import Backend, Served, write_repository


def served(mini: Any, backend: Backend = "onnxruntime", **changes: Any) -> Served:
    settings = {
        "precision": "f32", "max_batch": 4, "resize": "letterbox", "confidence": 0.3, "iou": 0.5,
    }  # fmt: skip
    settings |= {key: changes.pop(key) for key in settings if key in changes}
    manifest = Manifest(
        kind=backend, network=mini.network, class_names=mini.class_names, **settings
    )
    return Served(**{"name": "mini", "backend": backend, "manifest": manifest} | changes)


def write(mini: Any, folder: Path, model: Served) -> tuple[Path, Path]:
    """The repository of a model, with its ONNX, also where the server would have a plan of it."""
    return write_repository(
        folder,
        model,
        lambda path: export_onnx(
            mini.network, mini.state, path, precision=model.manifest.precision, detect=model.detect
        ),
    )


@cache
def schema() -> ModuleType:
    """The server's ModelConfig, from its client; without the rest of that, which needs gRPC."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("needs tritonclient, for the schema of config.pbtxt")
    (place,) = found.submodule_search_locations
    path = Path(place) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(folder: Path) -> Any:
    """The ModelConfig of a model's folder."""
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), schema().ModelConfig())


@dataclass
class Value:
    """A pb_utils.Tensor in host memory."""

    tensor_name: str
    array: np.ndarray

    def __post_init__(self) -> None:
        assert isinstance(self.array, np.ndarray) and self.array.flags.c_contiguous

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class Response:
    output_tensors: list[Value]
    problem: Any = None

    def has_error(self) -> bool:
        return self.problem is not None

    def error(self) -> Any:
        return self.problem


@dataclass
class Server:
    """What model.py sees of the server: `triton_python_backend_utils`, and the network behind."""

    network: onnxruntime.InferenceSession
    after: Callable[[list[np.ndarray]], list[np.ndarray]] = lambda outputs: outputs
    batches: list[int] = field(default_factory=list)
    fails: bool = False

    def module(self) -> ModuleType:
        utils: Any = ModuleType("triton_python_backend_utils")
        utils.Tensor = Value
        utils.TritonError = lambda message: SimpleNamespace(message=lambda: message)
        utils.TritonModelException = type("TritonModelException", (Exception,), {})
        utils.TRITONSERVER_MEMORY_CPU = 0
        utils.PreferredMemory = lambda kind, device: (kind, device)
        utils.InferenceResponse = lambda output_tensors, error=None: Response(output_tensors, error)
        utils.InferenceRequest = lambda **words: SimpleNamespace(exec=lambda: self.run(**words))
        utils.get_input_tensor_by_name = lambda request, name: request.get(name)
        utils.get_output_tensor_by_name = lambda response, name: next(
            (value for value in response.output_tensors if value.name() == name), None
        )
        self.utils = utils
        return utils

    def run(
        self,
        *,
        model_name: str,
        requested_output_names: list[str],
        inputs: list[Value],
        preferred_memory: tuple[int, int],
    ) -> Response:
        assert (model_name, preferred_memory) == ("mini_network", (0, 0))
        (images,) = inputs
        assert images.name() == "images" and images.array.dtype == np.float32
        self.batches.append(len(images.array))
        if self.fails:
            return Response([], self.utils.TritonError("out of memory"))
        outputs = self.after(self.network.run(None, {"images": images.array}))
        assert len(outputs) == len(requested_output_names)
        for array in outputs:
            array.flags.writeable = False  # the server's own memory
        names = zip(requested_output_names, outputs, strict=True)
        return Response([Value(name, array) for name, array in names])


def start(folder: Path, server: Server) -> Any:
    """The model.py of a detector's folder as the server begins with it."""
    from google.protobuf.json_format import MessageToDict

    config = MessageToDict(parse(folder), preserving_proto_field_name=True)
    spec = importlib.util.spec_from_file_location("served_model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_python_backend_utils"] = server.module()
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton_python_backend_utils"]
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(config), "model_instance_kind": "CPU",
            "model_instance_device_id": "0", "model_repository": str(folder),
            "model_version": "1", "model_name": folder.name,
        }
    )  # fmt: skip
    return model
