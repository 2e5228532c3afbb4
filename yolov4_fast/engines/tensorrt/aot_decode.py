"""Decode as the last layers of a plan that needs no library: our Triton kernel, compiled ahead.

TensorRT takes a kernel as PTX with its launch (`tensorrt.plugin`, "quickly deployable plugins"),
puts both into the plan and starts it itself; Python and Triton are needed for the build alone. The
raw maps are replaced as outputs by

    boxes   [N, M, 4] float32 xyxy relative to the network's input; 0 where one is not finite
    scores  [N, M, classes] float32; 0 where one is not over the confidence

with a row for each anchor of each cell, head by head, anchor by anchor, row of cells by row of
cells: the numbers that `ops.decode` gives, for every box. Suppression is left to the program.

The attributes are arrays, although most are single numbers: TensorRT 10 turns those into int and
float in a way that numpy refuses from 2.4 on.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.package import load_tensorrt
from yolov4_fast.network.layers import Head, Network

NAMESPACE, NAME = "yolov4_fast", "decode"
OUTPUTS = ("boxes", "scores")
CELLS = 64  # of a program
MOST_CLASSES = 32  # that a program looks at in one step
THREADS = 128
# Least SM, and the first PTX that knows it (8.0 before), which its oldest driver reads; LLVM ends
# the process over one that does not. For GPUs that are newer than this list: what Triton takes.
PTX_VERSIONS = ((122, None), (121, 88), (120, 87), (110, 90), (103, 88), (100, 86), (0, 80))


@dataclass(frozen=True)
class DecodeHead:
    """What the kernel is compiled for."""

    anchors: tuple[float, ...]  # width and height of each in pixels
    scale_x_y: float
    confidence: float  # a float32
    new_coords: bool
    stride: int
    classes: int

    @classmethod
    def of(cls, head: Head, confidence: float) -> DecodeHead:
        sides = tuple(float(side) for size in head.anchors for side in size)
        return cls(
            sides,
            float(head.scale_x_y),
            float(np.float32(confidence)),
            head.new_coords,
            head.stride,
            head.num_classes,
        )

    @classmethod
    def from_attributes(
        cls, anchors: np.ndarray, numbers: np.ndarray, integers: np.ndarray
    ) -> DecodeHead:
        scale_x_y, confidence = numbers.tolist()
        new_coords, stride, classes, _ = integers.tolist()
        return cls(
            tuple(anchors.tolist()), scale_x_y, confidence, bool(new_coords), stride, classes
        )

    def attributes(self, sm: int) -> dict[str, np.ndarray]:
        return {
            "anchors": np.array(self.anchors, np.float64),
            "numbers": np.array([self.scale_x_y, self.confidence], np.float64),
            "integers": np.array([self.new_coords, self.stride, self.classes, sm], np.int32),
        }


@dataclass(frozen=True)
class Compiled:
    """A kernel and its launch; its arguments: the map, height, width, boxes, scores."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def compile_decode(head: DecodeHead, dtype: str, sm: int) -> Compiled:
    """The kernel for maps of `dtype` ("fp32", "fp16", "bf16") and GPUs of compute capability `sm`
    (90); no GPU is needed. Raises EngineError where Triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        raise EngineError(
            "decode inside of the plan is a Triton kernel, and triton is not installed: "
            "pip install triton"
        ) from None
    from yolov4_fast.engines.tensorrt.decode_kernel import dense_kernel

    source = ASTSource(
        dense_kernel,
        {
            "raw": f"*{dtype}",
            "height": "i32",
            "width": "i32",
            "boxes": "*fp32",
            "scores": "*fp32",
        },
        {
            "SCALE": (head.scale_x_y, (head.scale_x_y - 1) / 2),
            "ANCHORS": head.anchors,
            "ANCHOR_COUNT": len(head.anchors) // 2,
            "STRIDE": head.stride,
            "NEW_COORDS": head.new_coords,
            "CLASSES": head.classes,
            "CONFIDENCE": head.confidence,
            "BLOCK": CELLS,
            "BLOCK_C": min(MOST_CLASSES, triton.next_power_of_2(head.classes)),
        },
        {},
    )
    options = {
        "num_warps": THREADS // 32,
        "enable_fp_fusion": False,  # boxes are rounded as everywhere
        "ptx_version": next(version for least, version in PTX_VERSIONS if sm >= least),
    }
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it names folders of this machine
        made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return Compiled(
        made.metadata.name,
        without_hidden(made.asm["ptx"], made.metadata.name, 5),
        made.metadata.num_warps * 32,
        made.metadata.shared,
    )


def without_hidden(ptx: str, name: str, arguments: int) -> str:
    """The PTX without the parameters that Triton adds to a kernel's own for scratch memory.

    TensorRT passes what it was told of and nothing else. Raises EngineError where one is used.
    """
    start = ptx.index(f".entry {name}(")
    end = ptx.index(")", start)
    listed = ptx[start:end].split(",")
    kept, hidden = listed[:arguments], listed[arguments:]
    body = ptx[end:]
    for parameter in hidden:
        label = parameter.split()[-1]
        if re.search(rf"\b{label}\b", body):
            raise EngineError(
                f"the kernel {name} as this version of Triton compiles it needs scratch memory, "
                "which a plan cannot give it"
            )
    return ptx[:start] + ",".join(kept) + "\n" + body


def decode_layers(network: Network, confidence: float, sm: int) -> Callable[[Any], None]:
    """What changes a parsed network so that it ends in decode; for `build_plan`'s `alter`.

    The network's outputs are the raw maps of `engines.onnx_export.output_names`. sm: compute
    capability that the kernel is compiled for, 80 for all GPUs from Ampere on. Raises EngineError,
    also from what it returns, where this TensorRT has no such plugins.
    """
    if not 0 <= confidence <= 1:
        raise EngineError(f"confidence {confidence}: it must lie in 0..1")
    operation = _operation(load_tensorrt())

    def alter(definition: Any) -> None:
        from yolov4_fast.engines.onnx_export import output_names

        outputs = [definition.get_output(index) for index in range(definition.num_outputs)]
        maps = {tensor.name: tensor for tensor in outputs}
        parts: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
        for name, head in zip(output_names(network), network.heads, strict=True):
            if name not in maps:
                raise EngineError(f"the network has no output {name}: it has {', '.join(maps)}")
            raw = maps[name]
            attributes = DecodeHead.of(head, confidence).attributes(sm)
            definition.unmark_output(raw)
            layer = definition.add_plugin(operation(raw, **attributes), True)
            if layer is None:
                raise EngineError(f"TensorRT refuses decode for the map {name}")
            for index, tensors in enumerate(parts.values()):
                tensors.append(layer.get_output(index))
        for name, tensors in parts.items():
            _join(definition, name, tensors)

    return alter


def _join(definition: Any, name: str, tensors: list[Any]) -> None:
    """The heads' rows one after the other, as an output."""
    whole = tensors[0]
    if len(tensors) > 1:
        layer = definition.add_concatenation(tensors)
        layer.axis = 1
        whole = layer.get_output(0)
    whole.name = name
    definition.mark_output(whole)


def _operation(trt: Any) -> Any:
    """The plugin's operation, registered with TensorRT once in a process."""
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise EngineError(
            f"TensorRT {trt.__version__} cannot take a kernel into a plan: use 10.13 or later, or "
            "--with-nms, which needs a library where the plan runs"
        )
    trtp = importlib.import_module("tensorrt.plugin")
    known = getattr(trtp.op, NAMESPACE, None)
    if not hasattr(known, NAME):
        register(trt, trtp)
    return getattr(getattr(trtp.op, NAMESPACE), NAME)


def register(trt: Any, trtp: Any) -> None:
    """Tell `tensorrt.plugin` (trtp) of the plugin: its outputs' shapes, its kernel, its launch.

    TensorRT checks the functions by their names and annotations, which are therefore set at last.
    """
    types = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}

    def describe(raw: Any, anchors: Any, numbers: Any, integers: Any) -> Any:
        head = DecodeHead.from_attributes(anchors, numbers, integers)
        batch, _, height, width = raw.shape_expr
        rows = height * width * (len(head.anchors) // 2)
        return (
            trtp.from_shape_expr((batch, rows, 4), trt.float32),
            trtp.from_shape_expr((batch, rows, head.classes), trt.float32),
        )

    def implement(
        raw: Any, anchors: Any, numbers: Any, integers: Any, outputs: Any, tactic: Any
    ) -> Any:
        head = DecodeHead.from_attributes(anchors, numbers, integers)
        if raw.dtype not in types:
            raise EngineError(f"decode takes float32, float16 and bfloat16 maps, not {raw.dtype}")
        compiled = compile_decode(head, types[raw.dtype], int(integers[-1]))
        batch, _, height, width = raw.shape_expr
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(height * width, CELLS)
        launch.grid_y = len(head.anchors) // 2
        launch.grid_z = batch
        launch.block_x = compiled.threads
        launch.shared_mem = compiled.shared_bytes
        scalars = trtp.SymIntExprs(2)
        scalars[0], scalars[1] = trtp.SymInt32(height), trtp.SymInt32(width)
        return compiled.name, compiled.ptx, launch, scalars

    tensors = tuple[trtp.TensorDesc, trtp.TensorDesc]  # type: ignore[name-defined]
    inputs = {
        "raw": trtp.TensorDesc,
        "anchors": NDArray[np.float64],
        "numbers": NDArray[np.float64],
        "integers": NDArray[np.int32],
    }
    describe.__annotations__ = {**inputs, "return": tensors}
    implement.__annotations__ = {
        **inputs,
        "outputs": tensors,
        "tactic": int,
        "return": tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],  # type: ignore[name-defined]
    }
    trtp.register(f"{NAMESPACE}::{NAME}", lazy_register=True)(describe)
    trtp.aot_impl(f"{NAMESPACE}::{NAME}")(implement)
