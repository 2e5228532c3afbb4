"""The torch engine: the folded NetworkModule itself, on any torch device. The reference that the
others answer to.

channels_last throughout: on CPUs oneDNN then runs without reordering, and on GPUs it is what tensor
cores want.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from yolov4_fast.engines.engine import DeviceError, Engine, EngineError, Manifest, check_finite
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.full_precision import full_precision

WEIGHTS = "weights.safetensors"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine(Engine):
    """payload: `weights.safetensors`, the float32 state dict.

    device: any that torch has; the CPU by default.
    """

    kind = "torch"
    precisions = tuple(DTYPES)
    members = (WEIGHTS,)

    def __init__(
        self, manifest: Manifest, payload: Mapping[str, bytes], device: str | None = None
    ) -> None:
        self.manifest = manifest
        self.device = _device(device)
        with torch.device("meta"):  # no memory and no random weights for what is replaced at once
            module = NetworkModule(manifest.network)
        try:
            state = load(payload[WEIGHTS])
            module.load_state_dict(state, assign=True)
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise EngineError(f"{WEIGHTS} does not fit the network ({reason})") from None
        for name, values in state.items():
            check_finite(name, values)
        self._dtype = DTYPES[manifest.precision]
        self._module: NetworkModule | None = (
            module.eval()
            .requires_grad_(False)
            .to(self.device, self._dtype)
            .to(memory_format=torch.channels_last)
        )

    @staticmethod
    def default_precision() -> str:
        return "f32"

    @staticmethod
    def payload(network: Network, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        return {WEIGHTS: save(dict(state))}

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        module = self._module
        if module is None:
            raise EngineError("the engine is closed")
        with torch.inference_mode(), full_precision():
            images = images.to(self.device, self._dtype, memory_format=torch.channels_last)
            return tuple(raw.float() for raw in module(images))

    def close(self) -> None:
        self._module = None


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both for a missing backend
        raise DeviceError(f"torch has no device {name!r} here: {error}") from None
    return device
