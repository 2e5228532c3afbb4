"""The members of a CUDA engine's file, read and checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from yolov4_fast.engines.cuda.choices import Choices
from yolov4_fast.engines.cuda.fp8 import Scales
from yolov4_fast.engines.cuda.plan import Plan
from yolov4_fast.engines.engine import EngineError, check_finite
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule

WEIGHTS = "weights.safetensors"  # the float32 state dict of the folded network
SCALES = "fp8.json"  # of precision fp8
TUNING = "tuning.json"  # the kernels that were chosen where the file was made

Payload = Mapping[str, bytes]


def read_state(network: Network, payload: Payload) -> dict[str, Tensor]:
    """The weights, checked against the network. Raises EngineError."""
    try:
        state = load(payload[WEIGHTS])
    except SafetensorError as error:
        raise EngineError(f"{WEIGHTS} is damaged ({error})") from None
    with torch.device("meta"):
        expected = NetworkModule(network).state_dict()
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            found = list(state[name].shape) if name in state else "missing"
            raise EngineError(
                f"{WEIGHTS} does not fit the network: {name} is {found}, not {list(tensor.shape)}"
            )
        check_finite(name, state[name])
    return state


def read_scales(precision: str, payload: Payload, plan: Plan) -> Scales | None:
    """For precision fp8. Raises EngineError."""
    if precision != "fp8":
        return None
    if SCALES not in payload:
        raise EngineError(f"its member {SCALES} is missing")
    return Scales.from_json(payload[SCALES], plan)


def read_tuning(payload: Payload) -> Choices | None:
    """Raises EngineError."""
    if TUNING not in payload:
        return None
    try:
        return Choices.from_json(payload[TUNING])
    except ValueError as error:
        raise EngineError(f"{TUNING} {error}") from None
