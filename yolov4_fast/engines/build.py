"""Building an engine from a network and its weights, and loading one from its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from yolov4_fast.engines.bundle import EngineFileError, read_bundle, write_bundle
from yolov4_fast.engines.engine import DeviceError, Engine, EngineError, Manifest, check_finite
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.resize import Mode

ENGINES = ("openvino", "torch")


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
    path: str | Path | None = None,
) -> Engine:
    """An engine ready to run; where `path` is given it is also written there as an engine file.

    state: of NetworkModule(network), folded or not. engine: "openvino" or "torch"; the fastest here
    by default. precision: "f32" or "bf16"; the engine's best here by default. size: of the input in
    px, one number or (width, height); the network's own by default. resize: "stretch" or
    "letterbox"; what the network was made for by default. confidence, iou: thresholds where a
    Detector is given none. device: where it runs now; not part of the file. Raises EngineError and
    NetworkError.
    """
    maker = engine_class(engine or default_engine())
    if size is not None:
        network = _resized(network, size)
    _check_state(network, state)
    network, state = fold(network, state)
    manifest = Manifest(
        kind=maker.kind,
        network=network,
        class_names=tuple(class_names),
        resize=resize or ("letterbox" if network.letter_box else "stretch"),
        precision=_precision(maker, precision),
        max_batch=max_batch,
        confidence=confidence,
        iou=iou,
        versions=_versions(maker.kind),
    )
    for name, values in state.items():  # folding divides by the variance: looked at once more
        check_finite(name, values)
    payload = maker.payload(network, state)
    built = maker(manifest, payload, device)
    if path is not None:
        write_bundle(path, manifest, payload)
    return built


def load_engine(
    path: str | Path,
    device: str | None = None,
    *,
    size: int | tuple[int, int] | None = None,
) -> Engine:
    """The engine of a file, ready to run.

    device: a torch device such as "cpu", for engines that have the choice. size: of the input in
    px, one number or (width, height), where another than it was built for is wanted. Raises
    FileNotFoundError, EngineFileError (which says what to rebuild), DeviceError and NetworkError.
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
    raise EngineError(f"no engine is called {kind!r}; there are {', '.join(ENGINES)}")


def _resized(network: Network, size: int | tuple[int, int]) -> Network:
    return network.resized(*((size, size) if isinstance(size, int) else size))


def _precision(maker: type[Engine], precision: str | None) -> str:
    precision = precision or maker.default_precision()
    if precision not in maker.precisions:
        raise EngineError(
            f"the {maker.kind} engine has no precision {precision!r}; "
            f"it has {', '.join(maker.precisions)}"
        )
    return precision


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
    packages = {"torch": ("torch",), "openvino": ("openvino", "onnx")}[kind]
    return {name: _version(name) for name in ("yolov4_fast", *packages)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
