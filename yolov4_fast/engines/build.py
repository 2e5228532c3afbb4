"""Building an engine from a network and its weights, and loading one from its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from yolov4_fast.engines.bundle import EngineFileError, read_bundle, write_bundle
from yolov4_fast.engines.cuda.device import is_usable
from yolov4_fast.engines.engine import (
    DeviceError,
    Engine,
    EngineError,
    Manifest,
    Request,
    check_finite,
)
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.resize import Mode
from yolov4_fast.ops.resize import resize as resize_images

if TYPE_CHECKING:
    from yolov4_fast.engines.tensorrt.options import TensorRtOptions

ENGINES = ("openvino", "torch", "cuda", "tensorrt")
ALIASES = {"fp32": "f32"}
CALIBRATED = ("fp8", "int8")  # precisions that need calibration images


def build_engine(
    network: Network,
    state: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    engine: str | None = None,
    precision: str | None = None,
    max_batch: int = 8,
    size: int | tuple[int, int] | None = None,
    resize: Mode | None = None,
    confidence: float = 0.25,
    iou: float = 0.45,
    device: str | None = None,
    calibration: Iterable[Tensor] | None = None,
    calibration_method: str | None = None,
    tensorrt: TensorRtOptions | None = None,
    progress: bool = False,
    path: str | Path | None = None,
) -> Engine:
    """An engine ready to run; where `path` is given it is also written there as an engine file.

    state: of NetworkModule(network), folded or not. engine: "cuda", "openvino", "tensorrt" or
    "torch"; the fastest of the others here by default. precision: "f32" ("fp32" is the same),
    "bf16", "fp16", "fp8" or "int8"; the engine's best here by default. size: of the input in px,
    one number or (width, height); the network's own by default. resize: "stretch" or "letterbox";
    what the network was made for by default. confidence, iou: thresholds where a Detector is given
    none. device: where it runs now, such as "cuda:1"; not part of the file. calibration: pictures
    like those that it will see, a few dozen, [H, W, 3] uint8 or float32 in 0..1 of any sizes; only
    and always for fp8 and int8. calibration_method: for int8: "entropy", "percentile" or "minmax".
    tensorrt: how its plan is built; only for that engine. progress: show on stderr how far a long
    build has come. Raises EngineError and NetworkError.
    """
    maker = engine_class(engine or default_engine())
    maker.check_device(device)
    precision = _precision(maker, precision)
    if (calibration is not None) != (precision in CALIBRATED):
        raise EngineError(
            f"precision {precision} is built from calibration images: give some"
            if calibration is None
            else f"precision {precision} needs no calibration images: only "
            f"{' and '.join(CALIBRATED)} do"
        )
    if calibration_method is not None and precision != "int8":
        raise EngineError(f"calibration_method is for precision int8, not for {precision}")
    if tensorrt is not None and maker.kind != "tensorrt":
        raise EngineError(f"the {maker.kind} engine takes no options of TensorRT")
    if size is not None:
        network = _resized(network, size)
    _check_state(network, state)
    network, state = fold(network, state)
    manifest = Manifest(
        kind=maker.kind,
        network=network,
        class_names=tuple(class_names),
        resize=resize or ("letterbox" if network.letter_box else "stretch"),
        precision=precision,
        max_batch=max_batch,
        confidence=confidence,
        iou=iou,
        versions=_versions(maker.kind),
    )
    for name, values in state.items():  # folding divides by the variance: looked at once more
        check_finite(name, values)
    request = Request(
        images=None if calibration is None else _batches(calibration, manifest),
        calibration_method=calibration_method,
        device=device,
        tensorrt=tensorrt,
        progress=progress,
    )
    payload = maker.make(manifest, state, request)
    built = maker(manifest, payload, device)
    if path is not None:
        write_bundle(path, built.manifest, payload | built.learnt())
    return built


def load_engine(
    path: str | Path,
    device: str | None = None,
    *,
    size: int | tuple[int, int] | None = None,
) -> Engine:
    """The engine of a file, ready to run.

    device: a torch device such as "cpu" or "cuda:1", for engines that have the choice. size: of the
    input in px, one number or (width, height), where another than it was built for is wanted.
    Raises FileNotFoundError, EngineFileError (which says what to rebuild), DeviceError and
    NetworkError.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    if size is not None:
        manifest = replace(manifest, network=_resized(manifest.network, size))
    try:
        maker = engine_class(manifest.kind)
        _precision(maker, manifest.precision)
        for name in maker.members:
            if name not in bundle.payload:
                raise EngineError(f"its member {name} is missing")
        return maker(manifest, bundle.payload, device)
    except DeviceError:
        raise  # no fault of the file
    except EngineError as error:
        raise EngineFileError(bundle.path, str(error)) from None


def default_engine() -> str:
    """The fastest kind of engine on this machine."""
    if is_usable():
        return "cuda"
    return "openvino" if find_spec("openvino") else "torch"


def engine_class(kind: str) -> type[Engine]:
    """The class of a kind of engine; only then is its runtime imported."""
    match kind:
        case "torch":
            from yolov4_fast.engines.torch_engine import TorchEngine

            return TorchEngine
        case "openvino":
            if not find_spec("openvino"):
                raise EngineError("the openvino engine needs OpenVINO: pip install openvino")
            from yolov4_fast.engines.openvino_engine import OpenVinoEngine

            return OpenVinoEngine
        case "cuda":
            if not find_spec("triton"):
                raise EngineError("the cuda engine needs Triton: pip install triton")
            from yolov4_fast.engines.cuda.engine import CudaEngine

            return CudaEngine
        case "tensorrt":
            from yolov4_fast.engines.tensorrt.engine import TensorRtEngine

            return TensorRtEngine
    raise EngineError(f"no engine is called {kind!r}; there are {', '.join(ENGINES)}")


def _resized(network: Network, size: int | tuple[int, int]) -> Network:
    return network.resized(*((size, size) if isinstance(size, int) else size))


def _precision(maker: type[Engine], precision: str | None) -> str:
    precision = ALIASES.get(precision or "", precision) or maker.default_precision()
    if precision not in maker.precisions:
        raise EngineError(
            f"the {maker.kind} engine has no precision {precision!r}; "
            f"it has {', '.join(maker.precisions)}"
        )
    return precision


def _batches(images: Iterable[Tensor], manifest: Manifest) -> Iterator[Tensor]:
    """Pictures fitted to the input, one by one: [1, 3, height, width] float32."""
    network = manifest.network
    for image in images:
        yield resize_images([image], network.height, network.width, manifest.resize)


def _check_state(network: Network, state: Mapping[str, Tensor]) -> None:
    """Every weight that the network needs is there, of the right shape, and finite."""
    with torch.device("meta"):
        expected = NetworkModule(network).state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            raise EngineError(f"the weights lack {name}: they belong to another network")
        if state[name].shape != tensor.shape:
            raise EngineError(
                f"{name} has shape {list(state[name].shape)} and the network needs "
                f"{list(tensor.shape)}: the weights belong to another network"
            )
        check_finite(name, state[name])


def _versions(kind: str) -> dict[str, str]:
    packages = {
        "torch": ("torch",),
        "openvino": ("openvino", "onnx"),
        "cuda": ("torch", "triton", "nvidia-cudnn-frontend"),
        "tensorrt": ("torch", "onnx", "tensorrt", "pycuda"),
    }[kind]
    return {name: _version(name) for name in ("yolov4_fast", *packages)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
