"""`export --format tensorrt`: a model as a TensorRT plan, for programs that run plans themselves:
trtexec, DeepStream, Triton Inference Server.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands.tensorrt_options import FLAGS, add_tensorrt, tensorrt_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from yolov4_fast.engines.tensorrt.options import TensorRtOptions
    from yolov4_fast.engines.tensorrt.plugins import DetectionOutputs
    from yolov4_fast.model import Model

FORMAT = "tensorrt"
SUFFIX = ".plan"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with-decode", action="store_true",
        help="with --format tensorrt: end with decode, a kernel that lies in the plan and needs no "
        "library: boxes [N, M, 4] and scores [N, M, classes], 0 up to --confidence; no NMS",
    )  # fmt: skip
    parser.add_argument(
        "--device",
        help="the GPU that a plan is built on and for, such as cuda:1 (default: the current one)",
    )
    add_tensorrt(parser, sizes=True)


def is_given(arguments: argparse.Namespace, flag: str) -> bool:
    """Not by its truth: 0 is given."""
    value = getattr(arguments, flag)
    return value is not None and value is not False


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    if arguments.format != FORMAT:
        flags = ("with_decode", "device", *FLAGS)
        given = [flag for flag in flags if is_given(arguments, flag)]
        if given:
            flag = given[0].replace("_", "-")
            raise ValueError(f"--{flag} goes with --format {FORMAT}")
        return
    if arguments.with_decode and arguments.with_nms:
        raise ValueError("--with-decode and --with-nms: give one of the two")
    sizes = [flag for flag in ("min_size", "opt_size", "max_size") if getattr(arguments, flag)]
    if bool(sizes) != arguments.dynamic_size:
        raise ValueError("--dynamic-size and --min-size, --opt-size, --max-size go together")


def write_plan(
    model: Model, path: Path, arguments: argparse.Namespace, detect: DetectionOutputs | None
) -> dict[str, Any]:
    """Build the plan on the GPU and write it, whole or not at all; returns facts for programs.

    detect: what it ends with, for --with-nms. Raises EngineError, DeviceError, NetworkError.
    """
    from yolov4_fast.engines.cuda.device import open_device
    from yolov4_fast.engines.onnx_export import export_onnx
    from yolov4_fast.engines.tensorrt.builder import Gpu, build_plan
    from yolov4_fast.engines.tensorrt.package import load_tensorrt, version_of
    from yolov4_fast.engines.tensorrt.plugins import plugin_library
    from yolov4_fast.files import replacing

    options = tensorrt_options(arguments)
    assert options is not None  # they are for tensorrt
    for size in options.sizes or ():
        model.network.resized(*size)  # refuses what no map's side divides
    trt = load_tensorrt()
    device = open_device(arguments.device, FORMAT)
    found = device.properties
    plugins = [] if detect is None else [plugin_library(version_of(trt)[0])]
    alter = _alteration(model, arguments, options, found.sm)
    onnx = export_onnx(
        model.network,
        model.state,
        precision=arguments.precision,
        dynamic_size=arguments.dynamic_size,
        uint8_input=arguments.uint8,
        detect=detect,
    )
    with device.active():
        built = build_plan(
            onnx.SerializeToString(),
            options,
            max_batch=arguments.max_batch,
            gpu=Gpu(found.name, found.sm),
            alter=alter,
            plugins=plugins,
        )
    with replacing(path) as partial:
        partial.write_bytes(built.plan)
    return {
        "precision": arguments.precision,
        "outputs": list(_outputs(model, detect, arguments.with_decode)),
        "plugins": [str(library) for library in plugins],
        "plan": dict(built.facts),
    }


def _alteration(
    model: Model, arguments: argparse.Namespace, options: TensorRtOptions, sm: int
) -> Callable[[Any], None] | None:
    """What --with-decode changes in the network."""
    from yolov4_fast.engines.tensorrt.aot_decode import decode_layers
    from yolov4_fast.engines.tensorrt.facts import AMPERE

    if not arguments.with_decode:
        return None
    least = AMPERE if options.hardware_compatible == "ampere-plus" else sm
    return decode_layers(model.network, arguments.confidence, least)


def _outputs(model: Model, detect: DetectionOutputs | None, decoded: bool) -> tuple[str, ...]:
    from yolov4_fast.engines.onnx_export import output_names
    from yolov4_fast.engines.tensorrt import aot_decode, plugins

    if detect is not None:
        return plugins.OUTPUTS
    return aot_decode.OUTPUTS if decoded else output_names(model.network)
