"""A model repository for Triton Inference Server (no relation of the language Triton).

    DIR/NAME_network/config.pbtxt      the network: images [N, 3, height, width] float32 to raw maps
    DIR/NAME_network/1/model.onnx      or model.plan
    DIR/NAME/config.pbtxt              the detector: pictures to boxes, and it asks the network
    DIR/NAME/labels.txt                names of the classes, one a line
    DIR/NAME/1/model.py                yolov4_fast/triton_model.py
    DIR/NAME/1/network.cfg             anchors and so on

The detector is a model of the Python backend that calls the network ("business logic scripting")
and not an ensemble: an ensemble would batch only the network, and needs a picture's size to come
along through each of its steps. Both batch dynamically: the detector's batch is already what the
network is given, so that requests for the network alone are batched too and nothing waits twice.

Sources: the server's docs/user_guide/model_repository.md and model_configuration.md, the READMEs
of its python_backend, openvino_backend and tensorrt_backend.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

from yolov4_fast.darknet.cfg import write_cfg
from yolov4_fast.engines.engine import EngineError, Manifest
from yolov4_fast.engines.onnx_export import INPUT, output_names
from yolov4_fast.engines.tensorrt.plugins import OUTPUTS, DetectionOutputs

Backend = Literal["onnxruntime", "openvino", "tensorrt"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
MODEL_PY = Path(__file__).resolve().parents[1] / "triton_model.py"
FILES = {"onnxruntime": "model.onnx", "openvino": "model.onnx", "tensorrt": "model.plan"}
# A plan lives on a GPU; ONNX Runtime goes where there is one; the OpenVINO backend is for CPUs.
PLACES = {"onnxruntime": "KIND_AUTO", "openvino": "KIND_CPU", "tensorrt": "KIND_GPU"}
Tensors = dict[str, tuple[str, list[int]]]  # type and shape, without the batch
INSTANCES = 2  # of the detector: one reads pictures while the other waits for the network


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is to be served.

    name: of the detector; the network's is name_network. manifest: of the network, its thresholds
    among it. detect: what the plan reports where it ends with NMS, None where it gives raw maps.
    Raises EngineError.
    """

    name: str
    backend: Backend
    manifest: Manifest
    max_detections: int = 300
    detect: DetectionOutputs | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise EngineError(
                f"model name {self.name!r}: letters, digits, _, . and - make one, a letter or "
                "digit first"
            )
        if self.backend not in BACKENDS:
            raise EngineError(f"no backend {self.backend!r}; there are {', '.join(BACKENDS)}")
        if self.backend == "onnxruntime" and self.manifest.precision == "bf16":
            raise EngineError(
                "ONNX Runtime has no bfloat16 convolution: take the backend openvino, a plan, or "
                "precision fp16"
            )
        if self.detect and self.backend != "tensorrt":
            raise EngineError(f"the backend {self.backend} cannot run NMS: only a plan can")

    @property
    def network_name(self) -> str:
        return f"{self.name}_network"

    @property
    def outputs(self) -> Tensors:
        """Those of the network."""
        if self.detect:
            return _detections(self.detect.max_detections)
        network = self.manifest.network
        return {
            name: (
                "TYPE_FP32",
                [head.channels, network.height // head.stride, network.width // head.stride],
            )
            for name, head in zip(output_names(network), network.heads, strict=True)
        }


def write_repository(
    folder: Path, served: Served, write_network: Callable[[Path], object]
) -> tuple[Path, Path]:
    """Write the two models into a repository, there already or not; other models in it stay.

    write_network: writes the file of the network (model.onnx or model.plan) at the path given.
    Returns the folders of detector and network. Both come to be, whole, or nothing does. Raises
    EngineError where one of them is there already.
    """
    targets = tuple(folder / name for name in (served.network_name, served.name))
    for target in targets:
        if target.exists():
            raise EngineError(f"{target}: is there already; remove it or name the model otherwise")
    with _beginning(folder) as begun:
        network, detector = (begun / target.name for target in targets)
        (network / "1").mkdir(parents=True)
        write_network(network / "1" / FILES[served.backend])
        (network / "config.pbtxt").write_text(network_config(served), encoding="utf-8")
        _write_detector(detector, served)
        _to_disk(begun)
        network.rename(targets[0])
        try:
            detector.rename(targets[1])
        except OSError:
            shutil.rmtree(targets[0])
            raise
    return targets[1], targets[0]


def network_config(served: Served) -> str:
    """config.pbtxt of the network."""
    network = served.manifest.network
    image = _tensor(INPUT, "TYPE_FP32", [3, network.height, network.width])
    outputs = [_tensor(name, *output) for name, output in served.outputs.items()]
    text = _head(served.network_name, served.backend, FILES[served.backend], served)
    text += _list("input", [image]) + _list("output", outputs)
    text += _instances(PLACES[served.backend], 1)
    if served.backend == "openvino":
        # This backend fixes the batch at the largest: smaller ones are refused or filled up.
        text += _parameters({"ENABLE_BATCH_PADDING": "YES"})
    return text


def detector_config(served: Served) -> str:
    """config.pbtxt of the detector, whose thresholds are parameters that may be changed there."""
    inputs = [
        _tensor("image_bytes", "TYPE_STRING", [1], "optional: true"),
        # Ragged: requests with pictures of different sizes are handed over together.
        _tensor("image", "TYPE_UINT8", [-1, -1, 3], "optional: true allow_ragged_batch: true"),
    ]
    outputs = [_tensor(name, *output) for name, output in _detections(-1).items()]
    parameters = {
        "network_model": served.network_name,
        "network_outputs": " ".join(served.outputs),
        "network_has_nms": "yes" if served.detect else "no",
        "resize": served.manifest.resize,
    }
    if not served.detect:
        parameters |= {
            "confidence": str(served.manifest.confidence),
            "iou": str(served.manifest.iou),
            "max_detections": str(served.max_detections),
        }
    text = _head(served.name, "python", "model.py", served)
    text += _list("input", inputs) + _list("output", outputs)
    return text + _instances("KIND_CPU", INSTANCES) + _parameters(parameters)


def _detections(most: int) -> Tensors:
    """What NMS leaves, padded to so many of a picture; -1: any number."""
    types = ("TYPE_INT32", "TYPE_FP32", "TYPE_FP32", "TYPE_INT32")
    shapes = ([1], [most, 4], [most], [most])
    return dict(zip(OUTPUTS, zip(types, shapes, strict=True), strict=True))


def _write_detector(folder: Path, served: Served) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(detector_config(served), encoding="utf-8")
    names = "".join(f"{name}\n" for name in served.manifest.class_names)
    (folder / "labels.txt").write_text(names, encoding="utf-8")
    (version / "network.cfg").write_text(write_cfg(served.manifest.network), encoding="utf-8")
    shutil.copyfile(MODEL_PY, version / "model.py")


@contextmanager
def _beginning(folder: Path) -> Iterator[Path]:
    """A folder inside the repository to write in, gone afterwards; and a repository that was made
    for it and stays empty is gone too.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".begun.", dir=folder) as begun:
            yield Path(begun)
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _head(name: str, backend: str, file: str, served: Served) -> str:
    return (
        f'name: "{name}"\nbackend: "{backend}"\ndefault_model_filename: "{file}"\n'
        f"max_batch_size: {served.manifest.max_batch}\ndynamic_batching {{ }}\n"
    )


def _tensor(name: str, kind: str, dims: Sequence[int], more: str = "") -> str:
    words = f'{{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ] {more}'
    return f"{words.rstrip()} }}"


def _list(kind: str, items: Sequence[str]) -> str:
    return f"{kind} [\n  " + ",\n  ".join(items) + "\n]\n"


def _instances(place: str, count: int) -> str:
    return _list("instance_group", [f"{{ kind: {place} count: {count} }}"])


def _parameters(values: dict[str, str]) -> str:
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in values.items()
    )
