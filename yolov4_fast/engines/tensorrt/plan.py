"""A TensorRT plan in the memory of a GPU: what it reads and writes, and the contexts that run it.

Our plans have one input, the image [B, 3, height, width], and one output per head, the raw maps
[B, A * (5 + classes), h, w], all float32 and channels-last in memory (`channels_last`): that is how
our kernels write and read them, so nothing is copied or turned round before or after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yolov4_fast.engines.engine import DeviceError, EngineError
from yolov4_fast.engines.tensorrt.builder import NO_MEMORY
from yolov4_fast.engines.tensorrt.log import make_log
from yolov4_fast.engines.tensorrt.package import load_tensorrt
from yolov4_fast.network.layers import Network

ITEM = 4  # bytes of a float32


@dataclass(frozen=True)
class Port:
    """An input or output. shape: channels, height and width of one image."""

    name: str
    shape: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        """Of one image."""
        channels, height, width = self.shape
        return channels * height * width * ITEM


class Plan:
    """serialized: for the current GPU, which must stay current for all that is done here. outputs:
    names of the maps, in head order.

    TensorRT allocates and frees in all of this but `enqueue`, and may wait for the device: whoever
    calls it holds `CAPTURING`.

    image, maps: what it reads, and writes in head order. least, most: images of a run. scratch:
    bytes that a run needs beside them. Raises EngineError where it cannot be used, DeviceError
    where the memory does not suffice.
    """

    def __init__(
        self,
        serialized: bytes,
        network: Network,
        outputs: Sequence[str],
        *,
        host_code: bool = False,
    ) -> None:
        """host_code: whether the plan may bring a runtime of its own version that is executed."""
        trt = load_tensorrt()
        self._trt = trt
        self._log = make_log(trt)
        try:
            self._runtime: Any = trt.Runtime(self._log)
        except TypeError:  # how the bindings tell that there is none
            raise DeviceError(
                f"TensorRT {trt.__version__} cannot run here ({self._log.take()}): it needs an "
                "NVIDIA GPU and a driver that is new enough for it"
            ) from None
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            reason = self._log.take()
            if NO_MEMORY.search(reason):
                raise DeviceError(
                    f"memory did not suffice to load a plan of {len(serialized) / 1e6:,.1f} MB "
                    f"({reason}): close what else is using the GPU"
                )
            raise EngineError(
                f"TensorRT {trt.__version__} cannot use its plan ({reason}): it is damaged, or was "
                "made by another version or for another GPU"
            )
        self.image, self.maps = self._ports(network, outputs)
        least, _, most = self._engine.get_tensor_profile_shape(self.image.name, 0)
        self.least, self.most = int(least[0]), int(most[0])
        self.scratch = int(self._engine.device_memory_size_v2)

    def context(self, batch: int, addresses: Mapping[str, int], scratch: int) -> Any:
        """An IExecutionContext for runs of `batch` images over this memory of the device.

        addresses: by the names of ports. scratch: the address of `self.scratch` bytes, which all
        contexts may share that do not run at once; all have the one profile in common, which
        TensorRT allows from 10 on. Raises EngineError, DeviceError.
        """
        trt = self._trt
        made = self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if made is None:
            raise DeviceError(
                f"TensorRT could not make a context for its plan ({self._log.take()}): the device "
                "may have too little free memory; build the engine with a smaller max_batch"
            )
        if self.scratch:
            made.set_device_memory(scratch, self.scratch)
        if not made.set_input_shape(self.image.name, (batch, *self.image.shape)):
            raise EngineError(
                f"TensorRT refuses a batch of {batch} ({self._log.take()}): its plan takes "
                f"{self.least} to {self.most} images of "
                f"{self.image.shape[2]}x{self.image.shape[1]}"
            )
        for name, address in addresses.items():
            if not made.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the memory for {name} ({self._log.take()})")
        missing = made.infer_shapes()
        if missing:
            raise EngineError(f"its plan has inputs that are not ours: {', '.join(missing)}")
        return made

    def enqueue(self, context: Any, stream: int) -> None:
        """A run on the stream of this handle; returns before it is done. Raises EngineError."""
        if not context.execute_async_v3(stream):
            raise EngineError(f"TensorRT could not run its plan ({self._log.take()})")

    def layers(self) -> str:
        """JSON of TensorRT's inspector, shapes for the largest batch."""
        inspector = self._engine.create_engine_inspector()
        context = self._engine.create_execution_context(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is not None:  # without it sides that are open are told as -1
            context.set_input_shape(self.image.name, (self.most, *self.image.shape))
            inspector.execution_context = context
        return inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)

    def close(self) -> None:
        """Free it; its contexts must be gone."""
        self._engine = None
        self._runtime = None

    def _ports(self, network: Network, outputs: Sequence[str]) -> tuple[Port, tuple[Port, ...]]:
        """Input and outputs, held against what the network has. TensorRT promises no order."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        maps = tuple(
            (
                len(head.anchors) * (5 + head.num_classes),
                network.height // head.stride,
                network.width // head.stride,
            )
            for head in network.heads
        )
        wanted = ((3, network.height, network.width), *maps)
        if len(inputs) != 1 or {*names} != {*inputs, *outputs} or len(outputs) != len(maps):
            raise EngineError(
                f"its plan has the inputs and outputs {', '.join(names)}; of the network they are "
                f"an image and {len(maps)} maps: {', '.join(outputs)}"
            )
        ports = []
        for name, shape in zip((*inputs, *outputs), wanted, strict=True):
            found = tuple(engine.get_tensor_shape(name))
            kind, layout = engine.get_tensor_dtype(name), engine.get_tensor_format(name)
            fits = (kind, layout) == (trt.DataType.FLOAT, trt.TensorFormat.HWC)
            if found[1:] != shape or not fits:
                raise EngineError(
                    f"{name} of its plan is {list(found)} {kind} {layout}, and the network needs "
                    f"[B, {', '.join(map(str, shape))}] FLOAT HWC"
                )
            ports.append(Port(name, shape))
        return ports[0], tuple(ports[1:])


def channels_last(definition: Any) -> None:
    """Have input and outputs of an INetworkDefinition lie in memory as [B, height, width, C]."""
    trt = load_tensorrt()
    formats = 1 << int(trt.TensorFormat.HWC)
    for index in range(definition.num_inputs):
        definition.get_input(index).allowed_formats = formats
    for index in range(definition.num_outputs):
        definition.get_output(index).allowed_formats = formats
