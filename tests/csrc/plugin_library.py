"""The plugin YoloV4Detect for tests: compiled with a stand-in for TensorRT's header, and called as
TensorRT would.

`compile_on_cpu` makes a library whose kernels run on host memory, `compile_for_gpu` one of the real
kernels. Both are called through plugin_driver.cpp.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor

from yolov4_fast import ops

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "tensorrt"
HEADERS = HERE / "tensorrt_headers"
# _FORTIFY_SOURCE takes a jump between the stacks of two fibers for an attack.
FLAGS = "-std=c++17 -O2 -fPIC -shared -U_FORTIFY_SOURCE -ffp-contract=off -fno-math-errno"
FLOAT, HALF, INT8, INT32, BF16 = 0, 1, 2, 3, 7  # nvinfer1::DataType
LINEAR, HWC8 = 0, 2  # nvinfer1::TensorFormat
TYPES = {torch.float32: FLOAT, torch.float16: HALF, torch.bfloat16: BF16}
GOOD = {
    "anchors": [10.0, 14.0, 23.0, 27.0, 37.5, 58.0],
    "anchor_counts": [2, 1],
    "scale_x_y": [1.2, 1.05],
    "new_coords": [0, 1],
    "strides": [8, 16],
    "num_classes": 3,
    "confidence": 0.25,
    "iou": 0.45,
    "beta": 0.6,
    "max_detections": 50,
}
SHAPES = [(2, 16, 6, 8), (2, 8, 3, 4)]
FIELD_TYPES = {"float32": 1, "float64": 2, "int32": 5}  # PluginFieldType


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def compile_driver(folder: Path) -> Path:
    output = folder / "driver.so"
    command = [compiler(), *FLAGS.split(), f"-I{HEADERS}", "-o", output]
    subprocess.run([*command, HERE / "plugin_driver.cpp", "-ldl"], check=True)
    return output


def compile_on_cpu(folder: Path) -> Path:
    output = folder / "plugin_on_cpu.so"
    sources = [SOURCES / "plugin.cpp", SOURCES / "settings.cpp", HERE / "detect_on_cpu.cpp"]
    command = [compiler(), *FLAGS.split(), "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"]
    subprocess.run([*command, "-o", output, *sources, "-ldl"], check=True)
    return output


class Library:
    """A loaded plugin library."""

    def __init__(self, driver: Path, path: Path) -> None:
        self.c = ctypes.CDLL(str(driver))
        for name in ("library_open", "plugin_create", "plugin_clone", "plugin_attach"):
            getattr(self.c, name).restype = ctypes.c_void_p
        self.c.plugin_reload.restype = ctypes.c_void_p
        self.c.plugin_workspace.restype = ctypes.c_uint64
        for name in ("library_messages", "library_describe", "library_problem", "plugin_name"):
            getattr(self.c, name).restype = ctypes.c_char_p
        handle = self.c.library_open(str(path).encode())
        assert handle, self.c.library_problem()
        self.handle = ctypes.c_void_p(handle)

    def messages(self) -> str:
        return self.c.library_messages(self.handle).decode()

    def describe(self) -> list[str]:
        return self.c.library_describe(self.handle).decode().split()

    def create(self, attributes: Mapping[str, object], phase: int = 0) -> "Plugin | None":
        """None where the plugin refuses. Floats become float32 fields, integers int32; arrays keep
        their type.
        """
        kinds = {"f": np.float32, "i": np.int32}
        arrays = {
            name: value
            if isinstance(value, np.ndarray)
            else np.atleast_1d(value).astype(kinds[np.asarray(value).dtype.kind])
            for name, value in attributes.items()
        }
        count = len(arrays)
        made = self.c.plugin_create(
            self.handle,
            count,
            (ctypes.c_char_p * count)(*[name.encode() for name in arrays]),
            (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays.values()]),
            (ctypes.c_int32 * count)(*[FIELD_TYPES[one.dtype.name] for one in arrays.values()]),
            (ctypes.c_int32 * count)(*[array.size for array in arrays.values()]),
            phase,
        )
        return Plugin(self, made) if made else None


class Plugin:
    def __init__(self, library: Library, pointer: int | None) -> None:
        self.library, self.c, self.pointer = library, library.c, ctypes.c_void_p(pointer)

    def destroy(self) -> None:
        self.c.plugin_destroy(self.pointer)

    def clone(self) -> "Plugin":
        return Plugin(self.library, self.c.plugin_clone(self.pointer))

    def attach(self) -> "Plugin":
        return Plugin(self.library, self.c.plugin_attach(self.pointer))

    def reload(self) -> "Plugin":
        """Serialized and made again; this one is gone."""
        return Plugin(self.library, self.c.plugin_reload(self.library.handle, self.pointer))

    def output_shapes(self, shapes: Sequence[Sequence[int]]) -> list[list[int]] | None:
        out = (ctypes.c_int64 * 20)()
        rank = len(shapes[0])
        flat = [side for shape in shapes for side in shape]
        maps = (ctypes.c_int64 * len(flat))(*flat)
        if self.c.plugin_output_shapes(self.pointer, maps, rank, len(shapes), out, 4):
            return None
        return [list(out[5 * i + 1 : 5 * i + 1 + out[5 * i]]) for i in range(4)]

    def output_types(self, inputs: Sequence[int]) -> list[int]:
        out = (ctypes.c_int32 * 4)()
        types = (ctypes.c_int32 * len(inputs))(*inputs)
        assert not self.c.plugin_output_types(self.pointer, types, len(inputs), out, 4)
        return list(out)

    def supports(self, types: Sequence[int], formats: Sequence[int]) -> bool:
        """Every position in turn, as TensorRT asks; the last four are the outputs."""
        arrays = [(ctypes.c_int32 * len(types))(*values) for values in (types, formats)]
        inputs = len(types) - 4
        return all(
            self.c.plugin_supports(self.pointer, position, *arrays, inputs, 4)
            for position in range(len(types))
        )

    def configure(self, shapes: Sequence[Sequence[int]], type_: int = FLOAT) -> bool:
        return not self.c.plugin_configure(
            self.pointer, _shapes(shapes), ctypes.c_int32(len(shapes)), type_, 4
        )

    def workspace(self, shapes: Sequence[Sequence[int]], type_: int = FLOAT) -> int:
        return self.c.plugin_workspace(self.pointer, _shapes(shapes), len(shapes), type_)

    def change_shape(self, shapes: Sequence[Sequence[int]], type_: int = FLOAT) -> bool:
        return not self.c.plugin_shape_change(self.pointer, _shapes(shapes), len(shapes), type_)

    def enqueue(
        self, maps: Sequence[Tensor], workspace: Tensor, outputs: Sequence[Tensor], stream: int
    ) -> bool:
        pointers = [
            (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
            for tensors in (maps, outputs)
        ]
        shapes = [tuple(raw.shape) for raw in maps]
        return not self.c.plugin_enqueue(
            self.pointer,
            _shapes(shapes),
            len(shapes),
            TYPES[maps[0].dtype],
            *pointers,
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_void_p(stream),
        )

    def detect(self, maps: Sequence[Tensor], detections: int, stream: int = 0) -> list[Tensor]:
        """The four outputs; nothing around them and the workspace may be written."""
        shapes, type_ = [tuple(raw.shape) for raw in maps], TYPES[maps[0].dtype]
        batch, device, margin = len(maps[0]), maps[0].device, 256
        size = self.workspace(shapes, type_)
        assert size > 0, self.library.messages()
        guarded = torch.randint(0, 256, (size + 2 * margin,), device=device, dtype=torch.uint8)
        before = guarded.clone()
        outputs = [
            torch.full((batch, 1), 77, dtype=torch.int32, device=device),
            torch.full((batch, detections, 4), torch.nan, device=device),
            torch.full((batch, detections), torch.nan, device=device),
            torch.full((batch, detections), 77, dtype=torch.int32, device=device),
        ]
        assert self.change_shape(shapes, type_), self.library.messages()
        done = self.enqueue(maps, guarded[margin:-margin], outputs, stream)
        assert done, self.library.messages()
        for part in (slice(margin), slice(-margin, None)):
            assert torch.equal(guarded[part], before[part]), "written outside of the workspace"
        return outputs


def _shapes(shapes: Sequence[Sequence[int]]) -> ctypes.Array[ctypes.c_int64]:
    flat = [side for shape in shapes for side in shape]
    return (ctypes.c_int64 * len(flat))(*flat)


def nvcc() -> Path:
    found = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    if not found.is_file():
        pytest.skip("needs nvcc")
    return found


def compile_for_gpu(folder: Path, architecture: str) -> Path:
    """The library as setup.py builds it, for one architecture ("sm_90", "native")."""
    output = folder / "plugin.so"
    host = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off")]
    sources = [SOURCES / name for name in ("plugin.cpp", "settings.cpp", "launch.cu")]
    options = "-shared -std=c++17 -O3 -fmad=false --cudart=static".split()
    command = [nvcc(), *options, *host, f"-arch={architecture}", f"-I{HEADERS}", "-o", output]
    subprocess.run([*command, *sources, "-ldl"], check=True)
    return output


def attributes_of(node):
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def maps_for(network, batch, dtype=torch.float32, seed=0, objects=40):
    """Raw maps in which few anchors hold an object, some of them nearly alike."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for head in network.heads:
        height, width = network.height // head.stride, network.width // head.stride
        entries = 5 + head.num_classes
        raw = torch.randn(batch, len(head.anchors), entries, height, width, generator=generator)
        raw[:, :, 4] -= 9
        for _ in range(objects):
            y, x = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
            raw[:, :, 4, y : y + 2, x : x + 2] = torch.randn((), generator=generator) + 2
            kind = int(torch.randint(head.num_classes, (), generator=generator))
            raw[:, :, 5 + kind, y : y + 2, x : x + 2] = 2
        if head.new_coords:
            raw = raw.sigmoid()
        maps.append(raw.flatten(1, 2).to(dtype))
    return maps


def expected_of(network, maps, outputs):
    """What ops finds, in the form of the plugin's outputs."""
    candidates = ops.decode(
        [raw.float() for raw in maps],
        [head.anchors for head in network.heads],
        [head.scale_x_y for head in network.heads],
        [head.new_coords for head in network.heads],
        network.height,
        network.width,
        outputs.confidence,
    )
    keep, kept = ops.diou_nms(*candidates, outputs.iou, outputs.beta, outputs.max_detections)
    batch, rows = keep.shape
    boxes, scores = torch.zeros(batch, rows, 4), torch.zeros(batch, rows)
    classes = torch.full((batch, rows), -1, dtype=torch.int32)
    for image, count in enumerate(kept.tolist()):
        chosen = keep[image, :count]
        boxes[image, :count] = candidates.boxes[image, chosen]
        scores[image, :count] = candidates.scores[image, chosen]
        classes[image, :count] = candidates.class_ids[image, chosen]
    return [kept[:, None], boxes, scores, classes]


def small(network, width=64, height=96):
    return replace(network, width=width, height=height)
