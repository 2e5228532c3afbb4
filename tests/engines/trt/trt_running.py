"""What the double's runtime does where a test scripts nothing: it reads the plans of the double's
builder, and runs them by handing the context to the test.

It refuses what TensorRT refuses: a plan of another version, a shape outside of the profile, a run
without addresses.
"""

from __future__ import annotations

import json
from typing import Any

PLAN = b"double of a plan:"


def _runtime_init(double: Any, on: Any, logger: Any) -> None:
    on.state["logger"] = logger


def _deserialize(double: Any, on: Any, serialized_engine: Any = None, **others: Any) -> Any:
    content = bytes(serialized_engine)
    facts = json.loads(content.removeprefix(PLAN)) if content.startswith(PLAN) else {}
    if facts.get("version") != double.module.__version__:
        text = "The engine plan file is not compatible with this version of TensorRT"
        double.log(on.state["logger"], "ERROR", text)
        return None
    return double.make("ICudaEngine", logger=on.state["logger"], **_engine_state(facts))


def _engine_state(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "tensors": {tensor["name"]: tensor for tensor in facts["tensors"]},
        "profiles": facts["profiles"],
        "layers": facts["layers"],
        "num_io_tensors": len(facts["tensors"]),
        "num_optimization_profiles": max(len(facts["profiles"]), 1),
        "num_layers": len(facts["layers"]),
    }


def _open(dims: list[Any]) -> tuple[int, ...]:
    return tuple(side if isinstance(side, int) and side else -1 for side in dims)


def _engine_tensor(key: str, enum: str | None = None) -> Any:
    def answer(double: Any, on: Any, **named: Any) -> Any:
        value = on.state["tensors"][next(iter(named.values()))][key]
        return getattr(getattr(double.module, enum), value) if enum else _open(value)

    return answer


def _profile_shape(double: Any, on: Any, **named: Any) -> Any:
    name = next(value for value in named.values() if isinstance(value, str))
    number = next(value for value in named.values() if isinstance(value, int))
    shapes = on.state["profiles"][number].get(name) if on.state["profiles"] else None
    fixed = _open(on.state["tensors"][name]["dims"])
    return [tuple(shape) for shape in shapes] if shapes else [fixed] * 3


def _create_context(double: Any, on: Any, **named: Any) -> Any:
    return double.make("IExecutionContext", engine=on, shapes={}, addresses={})


def _set_input_shape(double: Any, on: Any, name: str, shape: Any) -> bool:
    engine = on.state["engine"]
    least, _, most = _profile_shape(double, engine, name=name, profile_index=0)
    shape = tuple(shape)
    fits = len(shape) == len(least) and all(
        low <= side <= high for low, side, high in zip(least, shape, most, strict=True)
    )
    if fits:
        on.state["shapes"][name] = shape
    else:
        text = f"setInputShape: {name} {shape} is not in the profile {least} to {most}"
        double.log(engine.state["logger"], "ERROR", text)
    return fits


def _tensor_shape(double: Any, on: Any, name: str) -> Any:
    """With the open sides that the inputs' shapes have settled; sides open by another name stay."""
    tensors = on.state["engine"].state["tensors"]
    if name in on.state["shapes"]:
        return on.state["shapes"][name]
    known = {
        key: side
        for input_name, shape in on.state["shapes"].items()
        for key, side in zip(tensors[input_name]["dims"], shape, strict=True)
        if isinstance(key, str)
    }
    return _open([known.get(side, side) for side in tensors[name]["dims"]])


def _set_address(double: Any, on: Any, name: str, memory: int) -> bool:
    if name not in on.state["engine"].state["tensors"]:
        return False
    on.state["addresses"][name] = memory
    return True


def _infer_shapes(double: Any, on: Any) -> list[str]:
    tensors = on.state["engine"].state["tensors"].values()
    return [
        tensor["name"]
        for tensor in tensors
        if tensor["mode"] == "INPUT"
        and -1 in _open(tensor["dims"])
        and tensor["name"] not in on.state["shapes"]
    ]


def _execute(double: Any, on: Any, stream_handle: int) -> bool:
    missing = [
        name for name in on.state["engine"].state["tensors"] if not on.state["addresses"].get(name)
    ]
    if missing or _infer_shapes(double, on):
        text = f"enqueueV3: no address or shape for {missing or _infer_shapes(double, on)}"
        double.log(on.state["engine"].state["logger"], "ERROR", text)
        return False
    if double.on_execute is not None:
        double.on_execute(on, stream_handle)
    return True


def _information(double: Any, on: Any, format: Any) -> str:
    layers = on.state["engine"].state["layers"]
    return json.dumps({"Layers": [{"Name": name} for name in layers], "Bindings": []})


RUNNING: dict[str, Any] = {
    "Runtime.__init__": _runtime_init,
    "Runtime.deserialize_cuda_engine": _deserialize,
    "ICudaEngine.get_tensor_name": lambda double, on, index: list(on.state["tensors"])[index],
    "ICudaEngine.get_tensor_mode": _engine_tensor("mode", "TensorIOMode"),
    "ICudaEngine.get_tensor_dtype": _engine_tensor("dtype", "DataType"),
    "ICudaEngine.get_tensor_format": _engine_tensor("format", "TensorFormat"),
    "ICudaEngine.get_tensor_shape": _engine_tensor("dims"),
    "ICudaEngine.get_tensor_profile_shape": _profile_shape,
    "ICudaEngine.create_execution_context": _create_context,
    "ICudaEngine.create_engine_inspector": lambda double, on: double.make(
        "EngineInspector", engine=on
    ),
    "IExecutionContext.set_input_shape": _set_input_shape,
    "IExecutionContext.get_tensor_shape": _tensor_shape,
    "IExecutionContext.set_tensor_address": _set_address,
    "IExecutionContext.infer_shapes": _infer_shapes,
    "IExecutionContext.execute_async_v3": _execute,
    "EngineInspector.get_engine_information": _information,
}
