"""Builds a TensorRT plan of an ONNX model, with TensorRT 10 and 11 alike.

The network is strongly typed: the types in the ONNX are those that run, and 8 bits are where it
says quantize and dequantize. Version 10 has to be told so; 11 knows nothing else, and has none of
the flags, calibrators and layer precisions that did it before, so none of them is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov4_fast.engines.engine import DeviceError, EngineError
from yolov4_fast.engines.tensorrt.log import make_log
from yolov4_fast.engines.tensorrt.options import TensorRtOptions
from yolov4_fast.engines.tensorrt.package import load_tensorrt
from yolov4_fast.engines.tensorrt.profile import profile_shapes
from yolov4_fast.engines.tensorrt.progress import Progress, make_monitor
from yolov4_fast.engines.tensorrt.timing_cache import TimingCache, cache_path

MOST_ERRORS = 5  # of a parser that are shown
COMPATIBILITY = {"ampere-plus": "AMPERE_PLUS", "same-sm": "SAME_COMPUTE_CAPABILITY"}
NO_MEMORY = re.compile(
    r"out ?of ?memory|memory is insufficient|insufficient (?:workspace|memory)"
    r"|not be enough free memory|bad_alloc",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Gpu:
    """The current device: its name, such as "NVIDIA H200", and compute capability x 10."""

    name: str
    sm: int


@dataclass(frozen=True)
class Built:
    """A serialized plan, and what is known of it, ready for JSON: the versions and the GPU that it
    is bound to, the options, the shapes of each open input, and how many layers' outputs are of
    each type.
    """

    plan: bytes
    facts: Mapping[str, Any]


def build_plan(
    model: bytes,
    options: TensorRtOptions,
    *,
    max_batch: int,
    gpu: Gpu,
    progress: bool = True,
    alter: Callable[[Any], None] | None = None,
    plugins: Sequence[Path] = (),
) -> Built:
    """A plan for the current device, whose context must be current in this thread.

    model: a serialized, strongly typed ONNX. gpu: what the device is; the timing cache and the
    facts are named by it. alter: is given the parsed INetworkDefinition and may change it.
    plugins: libraries of the operations that are the model's own; where the plan is to run with
    other versions of TensorRT it carries them. Raises EngineError; KeyboardInterrupt for Ctrl-C.
    """
    trt = load_tensorrt()
    log = make_log(trt)
    builder = _make_builder(trt, log)
    for library in plugins:
        _load_plugin(builder, library, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise EngineError(_parser_errors(parser, trt.__version__, log))
    if alter is not None:
        alter(network)
    config = builder.create_builder_config()
    _configure(trt, builder, config, options)
    if options.version_compatible:
        needed = parser.get_used_vc_plugin_libraries()
        config.plugins_to_serialize = [*needed, *map(str, plugins)]
    shapes = _add_profile(builder, config, network, options, max_batch)
    path = cache_path(options, trt.__version__, gpu.name, gpu.sm)
    cache = None if path is None else TimingCache(path, config)
    watched = Progress(show=progress)
    monitor = make_monitor(trt, watched)  # named, as it must outlive what reports to it
    config.progress_monitor = monitor
    plan = _build(builder, network, config, cache, watched, log)
    facts = {
        "tensorrt": trt.__version__,
        "gpu": gpu.name,
        "sm": gpu.sm,
        "options": options.to_json(),
        "max_batch": max_batch,
        "shapes": shapes,
        "types": _types(network),
    }
    return Built(plan, facts)


def _make_builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except TypeError:  # how the bindings tell that there is none
        raise DeviceError(
            f"TensorRT {trt.__version__} cannot build here ({log.take()}): it needs an NVIDIA GPU "
            "and a driver that is new enough for it"
        ) from None


def _load_plugin(builder: Any, library: Path, log: Any) -> None:
    if not library.is_file():
        raise EngineError(f"{library}: there is no such plugin library")
    if builder.get_plugin_registry().load_library(str(library)) is None:
        raise EngineError(f"{library}: TensorRT cannot load it as a plugin ({log.take()})")


def _parser_errors(parser: Any, version: str, log: Any) -> str:
    """What the parser refuses, by the names of the nodes."""
    told = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node_name() or (f"node {error.node()}" if error.node() >= 0 else "the model")
        kind = f" ({error.node_operator()})" if error.node_operator() else ""
        told.append(f"{node}{kind}: {' '.join(error.desc().split())} [{error.code().name}]")
    told = list(dict.fromkeys(told))
    more = len(told) - MOST_ERRORS
    text = "; ".join(told[:MOST_ERRORS]) or log.take()
    return f"TensorRT {version} cannot read the ONNX: {text}" + (
        f"; and {more} more" if more > 0 else ""
    )


def _configure(trt: Any, builder: Any, config: Any, options: TensorRtOptions) -> None:
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not options.tf32:  # which is on by default
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible is not None:
        name = COMPATIBILITY[options.hardware_compatible]
        level = getattr(trt.HardwareCompatibilityLevel, name, None)
        if level is None:
            raise EngineError(
                f"TensorRT {trt.__version__} has no hardware compatibility "
                f"{options.hardware_compatible!r}: use a newer one, or build without"
            )
        config.hardware_compatibility_level = level
    if options.dla is not None:
        if options.dla >= builder.num_DLA_cores:
            raise DeviceError(
                f"there is no DLA core {options.dla}: TensorRT {trt.__version__} finds "
                f"{builder.num_DLA_cores} here, numbered from 0"
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _add_profile(
    builder: Any, config: Any, network: Any, options: TensorRtOptions, max_batch: int
) -> dict[str, list[list[int]]]:
    """One for all open inputs; returns their least, usual and largest shapes by name."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        found = profile_shapes(tensor.name, tuple(tensor.shape), options, max_batch)
        if found is not None:
            shapes[tensor.name] = [list(shape) for shape in found]
    if not shapes:
        return {}
    profile = builder.create_optimization_profile()
    for name, (least, usual, largest) in shapes.items():
        if options.dla is not None and least != largest:
            raise EngineError(
                f"a DLA runs one shape, and {name} is open from {least} to {largest}: give "
                f"min_batch {max_batch} as the largest, and no sizes"
            )
        profile.set_shape(name, tuple(least), tuple(usual), tuple(largest))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses the shapes {shapes}")
    return shapes


def _build(
    builder: Any,
    network: Any,
    config: Any,
    cache: TimingCache | None,
    progress: Progress,
    log: Any,
) -> bytes:
    """The serialized plan. What was timed is kept, also where the build ends early."""
    if cache is not None:
        cache.attach()
    log.take()  # of what came before and was dealt with
    try:
        with progress.running():
            plan = builder.build_serialized_network(network, config)
    except (RuntimeError, MemoryError) as error:
        raise EngineError(_failure(f"{log.take()}; {error or type(error).__name__}")) from error
    finally:
        if cache is not None:
            cache.store()
    if plan is None:
        raise EngineError(_failure(log.take()))
    return bytes(plan)


def _failure(reason: str) -> str:
    if NO_MEMORY.search(reason):
        return (
            f"memory did not suffice for TensorRT ({reason}): build for a smaller max_batch, with "
            "another workspace_mb, or free the GPU of what else runs there"
        )
    return f"TensorRT built no plan: {reason}"


def _types(network: Any) -> dict[str, int]:
    """How many layers' first outputs are of each type, such as {"HALF": 290, "FLOAT": 6}."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    count = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return dict(sorted(count.items()))
