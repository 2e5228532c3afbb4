"""What the double's objects do where a test scripts nothing: a small TensorRT without a GPU.

It parses the ONNX with onnx and makes a "plan" that is JSON of inputs, outputs and profiles, which
`trt_running` runs. It refuses what TensorRT refuses, such as an open side without a profile.
"""

from __future__ import annotations

import json
from typing import Any

import onnx
from trt_running import PLAN, RUNNING

TYPES = {
    1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16",
    17: "FP8",
}  # fmt: skip
LAYERS = {"Conv": "CONVOLUTION", "MaxPool": "POOLING", "Cast": "CAST", "Concat": "CONCATENATION",
          "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Resize": "RESIZE",
          "Softplus": "ACTIVATION", "Tanh": "ACTIVATION", "Sigmoid": "ACTIVATION",
          "LeakyRelu": "ACTIVATION"}  # fmt: skip


def initial(written: str, double: Any) -> Any:
    """What a method or property of this type gives where nothing else is known."""
    plain = {"bool": True, "int": 0, "float": 0.0, "str": "", "None": None, "object": None}
    if written in plain:
        return plain[written]
    if written.startswith("list["):
        return []
    cls = double.classes.get(written)
    if cls is None:
        return None
    if hasattr(cls, "__members__"):
        return next(iter(cls.__members__.values()), None)
    return double.make(written)


def _logger_init(double: Any, on: Any, logger: Any) -> None:
    on.state["logger"] = logger


def _create_network(double: Any, on: Any, flags: int) -> Any:
    state: dict[str, Any] = {"inputs": [], "outputs": [], "layers": []}
    return double.make("INetworkDefinition", flags=flags, **state)


def _create_config(double: Any, on: Any) -> Any:
    flags = {"TF32"}  # on by default, as in TensorRT
    return double.make("IBuilderConfig", set_flags=flags, profiles=[], cache=None, pools={})


def _set_flag(double: Any, on: Any, flag: Any) -> None:
    on.state["set_flags"].add(flag.name)


def _clear_flag(double: Any, on: Any, flag: Any) -> None:
    on.state["set_flags"].discard(flag.name)


def _set_pool(double: Any, on: Any, pool: Any, pool_size: int) -> None:
    on.state["pools"][pool.name] = pool_size


def _add_profile(double: Any, on: Any, profile: Any) -> int:
    on.state["profiles"].append(profile)
    return len(on.state["profiles"]) - 1


def _set_shape(double: Any, on: Any, input: str, min: Any, opt: Any, max: Any) -> None:
    shapes = [[int(side) for side in shape] for shape in (min, opt, max)]
    for least, usual, most in zip(*shapes, strict=True):
        if not least <= usual <= most:
            raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
    on.state.setdefault("shapes", {})[input] = shapes


def _create_timing_cache(double: Any, on: Any, serialized_timing_cache: Any) -> Any:
    content = bytes(serialized_timing_cache)
    if content and not content.startswith(b"timings:"):
        return None
    entries = set(filter(None, content.removeprefix(b"timings:").split(b",")))
    return double.make("ITimingCache", entries=entries)


def _set_timing_cache(double: Any, on: Any, cache: Any, ignore_mismatch: bool) -> bool:
    on.state["cache"] = cache
    return True


def _get_timing_cache(double: Any, on: Any) -> Any:
    return on.state["cache"]


def _combine(double: Any, on: Any, input_cache: Any, ignore_mismatch: bool) -> bool:
    on.state["entries"] |= input_cache.state["entries"]
    return True


def _serialize_cache(double: Any, on: Any) -> Any:
    return host_memory(double, b"timings:" + b",".join(sorted(on.state["entries"])))


def host_memory(double: Any, content: bytes) -> Any:
    """An IHostMemory of these bytes."""
    made = double.make("IHostMemory", nbytes=len(content))
    made.extend(content)
    return made


def _parser_init(double: Any, on: Any, network: Any, logger: Any) -> None:
    on.state.update(network=network, logger=logger, errors=[])


def _parse(double: Any, on: Any, model: Any, path: str | None) -> bool:
    try:
        graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(bytes(model))).graph
    except Exception:
        add_parser_error(double, on, desc="Failed to parse the ONNX model.", node=-1)
        return False
    initializers = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types = {
        info.name: info.type.tensor_type.elem_type
        for info in (*graph.value_info, *graph.output, *graph.input)
    } | initializers
    state = on.state["network"].state
    for node in graph.node:
        outputs = [_tensor(double, name, types.get(name, 1)) for name in node.output]
        kind = getattr(double.module.LayerType, LAYERS.get(node.op_type, "ELEMENTWISE"))
        layer = double.make("ILayer", name=node.name, type=kind, num_outputs=len(outputs))
        layer.state["outputs"] = outputs
        state["layers"].append(layer)
    for key, infos in (("inputs", graph.input), ("outputs", graph.output)):
        for info in infos:
            if info.name in initializers:
                continue
            dims = [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
            tensor = _tensor(double, info.name, info.type.tensor_type.elem_type, dims)
            state[key].append(tensor)
    return True


def _tensor(double: Any, name: str, kind: int, dims: list[Any] | None = None) -> Any:
    """dims: whole numbers, or names of open ones."""
    dtype = getattr(double.module.DataType, TYPES.get(kind, "FLOAT"))
    shape = tuple(side if isinstance(side, int) and side else -1 for side in dims or [])
    return double.make("ITensor", name=name, dtype=dtype, shape=shape, dims=dims or [])


def add_parser_error(double: Any, parser: Any, **what: Any) -> None:
    """what: desc, node, node_name, node_operator, code (its name) of the error."""
    code = getattr(double.module.ErrorCode, what.pop("code", "INVALID_NODE"))
    error = double.make("ParserError", answers={"code": code, "node": 0, **what})
    parser.state["errors"].append(error)


def _error_answer(name: str, absent: Any) -> Any:
    return lambda double, on: on.state["answers"].get(name, absent)


def _build(double: Any, on: Any, network: Any, config: Any, kernel_text: Any = None) -> Any:
    logger, profiles = on.state["logger"], config.state["profiles"]
    for tensor in network.state["inputs"]:
        if -1 in tensor.shape and not any(tensor.name in p.state["shapes"] for p in profiles):
            text = f"Network has dynamic input {tensor.name} but no optimization profile"
            double.log(logger, "ERROR", text)
            return None
    monitor = config.state.get("progress_monitor")
    if monitor is not None and not run_phases(monitor):
        double.log(logger, "ERROR", "Build was cancelled by the progress monitor")
        return None
    if config.state["cache"] is not None:
        config.state["cache"].state["entries"].add(b"conv")
    return host_memory(double, plan_of(double, network, config))


def run_phases(monitor: Any) -> bool:
    """As TensorRT reports a build: phases in phases. False where it was told to stop."""
    monitor.phase_start("Building", None, 2)
    go_on = True
    for step in range(2):
        monitor.phase_start("Timing", "Building", 3)
        for inner in range(3):
            go_on = go_on and monitor.step_complete("Timing", inner)
        monitor.phase_finish("Timing")
        go_on = go_on and monitor.step_complete("Building", step)
    monitor.phase_finish("Building")
    return go_on


def plan_of(double: Any, network: Any, config: Any) -> bytes:
    """What the double's runtime can read."""
    tensors = [
        {
            "name": t.name,
            "dtype": t.dtype.name,
            "dims": t.state["dims"],
            "mode": mode,
            "format": _format(double, t),
        }
        for mode, key in (("INPUT", "inputs"), ("OUTPUT", "outputs"))
        for t in network.state[key]
    ]
    profiles = [profile.state.get("shapes", {}) for profile in config.state["profiles"]]
    layers = [layer.name for layer in network.state["layers"]]
    facts = {
        "version": double.module.__version__, "tensors": tensors, "profiles": profiles,
        "layers": layers,
    }  # fmt: skip
    return PLAN + json.dumps(facts).encode()


def _format(double: Any, tensor: Any) -> str:
    """The one that a program asked for, as a mask of bits; else that of a plain array."""
    asked = tensor.state.get("allowed_formats", 1)
    formats = double.module.TensorFormat.__members__
    return next(name for name, value in formats.items() if asked >> int(value) & 1)


BEHAVIOUR: dict[str, Any] = {
    "Builder.__init__": _logger_init,
    "Builder.create_network": _create_network,
    "Builder.create_builder_config": _create_config,
    "Builder.build_serialized_network": _build,
    "Builder.num_DLA_cores": lambda double, on: 0,
    "IBuilderConfig.set_flag": _set_flag,
    "IBuilderConfig.clear_flag": _clear_flag,
    "IBuilderConfig.set_memory_pool_limit": _set_pool,
    "IBuilderConfig.add_optimization_profile": _add_profile,
    "IBuilderConfig.create_timing_cache": _create_timing_cache,
    "IBuilderConfig.set_timing_cache": _set_timing_cache,
    "IBuilderConfig.get_timing_cache": _get_timing_cache,
    "IOptimizationProfile.set_shape": _set_shape,
    "ITimingCache.combine": _combine,
    "ITimingCache.serialize": _serialize_cache,
    "OnnxParser.__init__": _parser_init,
    "OnnxParser.parse": _parse,
    "OnnxParser.num_errors": lambda double, on: len(on.state["errors"]),
    "OnnxParser.get_error": lambda double, on, index: on.state["errors"][index],
    "ParserError.code": _error_answer("code", None),
    "ParserError.desc": _error_answer("desc", ""),
    "ParserError.node": _error_answer("node", 0),
    "ParserError.node_name": _error_answer("node_name", ""),
    "ParserError.node_operator": _error_answer("node_operator", ""),
    "INetworkDefinition.num_inputs": lambda double, on: len(on.state["inputs"]),
    "INetworkDefinition.num_outputs": lambda double, on: len(on.state["outputs"]),
    "INetworkDefinition.num_layers": lambda double, on: len(on.state["layers"]),
    "INetworkDefinition.get_input": lambda double, on, index: on.state["inputs"][index],
    "INetworkDefinition.get_output": lambda double, on, index: on.state["outputs"][index],
    "INetworkDefinition.get_layer": lambda double, on, index: on.state["layers"][index],
    "ILayer.get_output": lambda double, on, index: on.state["outputs"][index],
    **RUNNING,
}
