"""Decode inside of a plan: the kernel in Triton's interpreter against `ops.decode`, compiled ahead
without a GPU, and its registration with the real `tensorrt.plugin` of both versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from read_tensorrt_api import run_over_stand_ins
from torch import Tensor
from trt_double import VERSIONS, Double

from yolov4_fast import ops
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.aot_decode import (
    CELLS,
    MOST_CLASSES,
    DecodeHead,
    decode_layers,
    without_hidden,
)
from yolov4_fast.network.architectures import yolov4_csp, yolov4_tiny

ROOT = Path(__file__).resolve().parents[3]
ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.5, 58.0))


def dense(raw: Tensor, stride: int, scale: float, new: bool, confidence: float) -> list[Tensor]:
    """The kernel's boxes and scores."""
    from yolov4_fast.engines.tensorrt.decode_kernel import dense_kernel

    batch, channels, height, width = raw.shape
    classes, rows = channels // len(ANCHORS) - 5, len(ANCHORS) * height * width
    outputs = [torch.full((batch, rows, last), torch.nan) for last in (4, classes)]
    dense_kernel[(-(-height * width // CELLS), len(ANCHORS), batch)](
        raw, height, width, *outputs,
        SCALE=(scale, (scale - 1) / 2),
        ANCHORS=tuple(side for size in ANCHORS for side in size),
        ANCHOR_COUNT=len(ANCHORS),
        STRIDE=stride,
        NEW_COORDS=new,
        CLASSES=classes,
        CONFIDENCE=float(np.float32(confidence)),
        BLOCK=CELLS,
        BLOCK_C=min(MOST_CLASSES, 1 << (classes - 1).bit_length()),
    )  # fmt: skip
    return outputs


@pytest.mark.parametrize(
    ("shape", "classes", "dtype", "scale", "new", "confidence"),
    [
        ((2, 5, 7), 3, torch.float32, 1.2, False, 0.25),
        ((1, 9, 8), 40, torch.float16, 1.05, False, 0.1),
        ((1, 1, 3), 1, torch.float32, 2.0, True, 0.4),
        ((2, 8, 8), 33, torch.float16, 2.0, True, 0.0),
    ],
)
def test_the_kernel_gives_what_decode_gives(shape, classes, dtype, scale, new, confidence):
    batch, height, width = shape
    generator = torch.Generator().manual_seed(classes)
    raw = torch.randn(batch, len(ANCHORS) * (5 + classes), height, width, generator=generator) * 2
    raw[0, :, 0, 0] = torch.nan
    raw[-1, 2, -1, -1] = torch.inf
    raw = (raw.sigmoid() if new else raw).to(dtype)
    boxes, scores = dense(raw, 8, scale, new, confidence)
    expected = ops.decode(
        [raw.float()], [ANCHORS], [scale], [new], 8 * height, 8 * width, confidence
    )
    assert boxes.isfinite().all() and scores.isfinite().all()
    assert expected.counts.min() > 0
    for image, count in enumerate(expected.counts.tolist()):
        row, class_id = (scores[image] > confidence).nonzero().unbind(1)
        assert class_id.tolist() == expected.class_ids[image, :count].tolist()
        assert torch.equal(scores[image, row, class_id], expected.scores[image, :count])
        assert torch.equal(boxes[image, row], expected.boxes[image, :count])
    assert ((scores > confidence) | (scores == 0)).all()


def test_nothing_passes():
    boxes, scores = dense(torch.full((1, 24, 4, 4), -20.0), 8, 1.1, False, 0.25)
    assert not scores.any() and boxes.isfinite().all()


PROBE = """
import json, re, sys
from yolov4_fast.engines.tensorrt.aot_decode import DecodeHead, compile_decode

head = DecodeHead((12.0, 16.0, 19.0, 36.0), 1.2, 0.25, False, 8, 80)
for sm, dtype in json.loads(sys.argv[1]):
    made = compile_decode(head, dtype, sm)
    entry = made.ptx[made.ptx.index(".entry"):]
    print(json.dumps({
        "sm": sm,
        "name": made.name,
        "entry": re.match(r"\\.entry (\\w+)\\(", entry)[1],
        "parameters": re.findall(r"\\.param \\.(\\w+)", entry[:entry.index(")")]),
        "target": re.search(r"\\.target (\\w+)", made.ptx)[1],
        "version": re.search(r"\\.version ([\\d.]+)", made.ptx)[1],
        "threads": made.threads,
        "required": re.search(r"\\.(?:reqntid|maxntid) (\\d+)", made.ptx)[1],
        "shared": made.shared_bytes,
        "paths": re.findall(r"decode_kernel\\.py", made.ptx),
    }))
"""


@pytest.mark.slow
def test_compiles_without_a_gpu():
    wanted = [
        (75, "fp32"),
        (90, "fp16"),
        (103, "fp32"),
        (110, "fp32"),
        (120, "bf16"),
        (121, "fp32"),
    ]
    run = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(wanted)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for (sm, _), one in zip(wanted, found, strict=True):
        # As TensorRT passes them: inputs, scalars, outputs.
        assert one["parameters"] == ["u64", "u32", "u32", "u64", "u64"]
        assert one["name"] == one["entry"] and one["target"].startswith(f"sm_{sm}")
        assert int(one["required"]) == one["threads"] and one["shared"] <= 48 * 1024
        assert one["paths"] == []
        versions = {103: "8.8", 110: "9.0", 120: "8.7", 121: "8.8"}
        assert one["version"] == versions.get(sm, "8.0")


PTX = """.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u64 .ptr .global .align 1 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 128
{ ld.param.b64 %rd1, [kernel_param_0]; }
"""


def test_parameters_for_scratch_memory_are_left_out():
    shorter = without_hidden(PTX, "kernel", 1)
    assert "kernel_param_0\n)\n.reqntid" in shorter and "kernel_param_1" not in shorter
    assert without_hidden(PTX, "kernel", 3).split() == PTX.split()
    with pytest.raises(EngineError, match="needs scratch memory"):
        without_hidden(PTX.replace("[kernel_param_0]", "[kernel_param_2]"), "kernel", 1)


REGISTER = """
import json, sys
from types import SimpleNamespace
import numpy as np
import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt
import tensorrt.plugin as trtp
from tensorrt.plugin import _lib, _tensor

from yolov4_fast.engines.tensorrt import aot_decode


class Expression:
    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value


class Builder:
    def constant(self, value):
        return Expression(value)

    def operation(self, kind, first, second):
        a, b = first.value, second.value
        return Expression({"PROD": a * b, "CEIL_DIV": -(-a // b)}[kind.name])


trt.IDimensionExpr = Expression
head = aot_decode.DecodeHead((12.0, 16.0, 19.0, 36.0), 1.2, 0.25, True, 8, 80)
compiled = []

def compile_decode(*asked):
    compiled.append(asked)
    return aot_decode.Compiled("kernel", "the ptx", 128, 4096)

aot_decode.compile_decode = compile_decode
aot_decode.register(trt, trtp)
attributes = head.attributes(90)
types = {"float64": trt.PluginFieldType.FLOAT64, "int32": trt.PluginFieldType.INT32}
kinds = {name: (False, value.dtype) for name, value in attributes.items()}
creator = _lib._TemplatePluginCreator("decode", "yolov4_fast", kinds)
fields = [
    trt.PluginField(name, value, types[value.dtype.name]) for name, value in attributes.items()
]
plugin = creator.create_plugin(
    "decode", "yolov4_fast", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
    trt.QuickPluginCreationRequest.STRICT_AOT,
)
assert type(plugin).__name__ == "_TemplateAOTPlugin"
assert plugin.get_output_data_types([trt.float16], [4]) == [trt.float32, trt.float32]

_tensor.SymIntExpr._exprBuilder = Builder()
raw = trtp.TensorDesc()
raw.dtype = trt.float16
raw.shape_expr = trtp.ShapeExprs(4)
for index, side in enumerate((3, 170, 13, 26)):
    raw.shape_expr[index] = trtp.ShapeExpr(Expression(side))
outputs = plugin.register_function(raw, **plugin.attrs)
shapes = [[side._expr.value for side in output.shape_expr] for output in outputs]
name, ptx, launch, scalars = plugin.aot_impl_function(raw, *plugin.attrs.values(), outputs, 0)
assert isinstance(launch, trtp.KernelLaunchParams) and isinstance(scalars, trtp.SymExprs)
assert all(isinstance(scalar, trtp.SymInt32) for scalar in scalars)
sides = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
print(json.dumps({
    "shapes": shapes,
    "kernel": [name, ptx],
    "launch": [getattr(launch, side)._expr.value for side in sides],
    "scalars": [scalar._expr.value for scalar in scalars],
    "compiled": [compiled[0][0] == head, *compiled[0][1:]],
}))
"""


@pytest.mark.parametrize("major", VERSIONS)
def test_tensorrt_takes_the_registration(major):
    """The real `tensorrt.plugin` checks our functions' signatures, makes the plugin of its fields
    and gets shapes, kernel, launch and scalars of it; all over libraries that do nothing.
    """
    folder = os.environ.get("TENSORRT_BINDINGS") or ROOT / ".venv" / "tensorrt"
    path = Path(folder) / major
    if not (path / "tensorrt_bindings").is_dir():
        pytest.skip(f"needs the bindings of TensorRT {VERSIONS[major]} in {path}")
    told = run_over_stand_ins(path, int(major), ["-c", REGISTER], cwd=ROOT)
    assert json.loads(told[told.index('{"shapes"') :]) == {
        "shapes": [[3, 2 * 13 * 26, 4], [3, 2 * 13 * 26, 80]],
        "kernel": ["kernel", "the ptx"],
        "launch": [-(-13 * 26 // CELLS), 2, 3, 128, 1, 1, 4096],
        "scalars": [13, 26],
        "compiled": [True, "fp16", 90],
    }


def test_settings_survive_as_attributes():
    head = DecodeHead.of(yolov4_csp(7).heads[1], 0.3)
    attributes = head.attributes(86)
    assert DecodeHead.from_attributes(**attributes) == head
    assert head.new_coords and head.scale_x_y == 2.0 and attributes["integers"][-1] == 86
    assert head.confidence == float(np.float32(0.3))


@pytest.fixture
def operation(trt_double: Double, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plugin, registered already; what it was asked for."""
    asked: list[Any] = []

    def decode(raw: Any, **attributes: np.ndarray) -> Any:
        asked.append((raw.name, DecodeHead.from_attributes(**attributes)))
        return lambda: None

    plugin = ModuleType("tensorrt.plugin")
    vars(plugin)["op"] = SimpleNamespace(yolov4_fast=SimpleNamespace(decode=decode))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    return asked


def parsed(double: Double, names: list[str]) -> Any:
    """A network with these outputs, whose new layers give tensors named after them."""
    definition = double.make("INetworkDefinition")
    tensors = [double.make("ITensor", name=name) for name in names]

    def output_of(double: Double, on: Any, index: int) -> Any:
        return on.state.setdefault("made", {}).setdefault(
            index, double.make("ITensor", name=f"new {index}")
        )

    double.script |= {
        "INetworkDefinition.num_outputs": len(names),
        "INetworkDefinition.get_output": lambda double, on, index: tensors[index],
        "INetworkDefinition.add_plugin": lambda double, on, func, aot: double.make(
            "IPluginV3Layer"
        ),
        "INetworkDefinition.add_concatenation": lambda double, on, inputs: double.make(
            "IConcatenationLayer"
        ),
        "ILayer.get_output": output_of,
    }
    return definition


def test_maps_are_replaced_by_boxes_and_scores(trt_double, operation):
    network = yolov4_tiny(5)
    definition = parsed(trt_double, ["map_32", "map_16"])  # heads: strides 32 and 16
    decode_layers(network, 0.3, 90)(definition)
    assert operation == [(f"map_{head.stride}", DecodeHead.of(head, 0.3)) for head in network.heads]
    unmarked = trt_double.arguments("INetworkDefinition.unmark_output")
    assert [call["tensor"].name for call in unmarked] == ["map_32", "map_16"]
    assert all(call["aot"] for call in trt_double.arguments("INetworkDefinition.add_plugin"))
    joined = trt_double.arguments("INetworkDefinition.add_concatenation")
    assert [[tensor.name for tensor in call["inputs"]] for call in joined] == [
        ["new 0"] * 2,
        ["new 1"] * 2,
    ]
    assert trt_double.arguments("IConcatenationLayer.axis=") == [{"value": 1}] * 2
    marked = trt_double.arguments("INetworkDefinition.mark_output")
    assert [call["tensor"].name for call in marked] == ["boxes", "scores"]


def test_failures_are_told(trt_double, operation):
    network = yolov4_tiny(5)
    alter = decode_layers(network, 0.3, 90)
    with pytest.raises(EngineError, match="no output map_16: it has map_32, other"):
        alter(parsed(trt_double, ["map_32", "other"]))
    definition = parsed(trt_double, ["map_32", "map_16"])
    trt_double.script["INetworkDefinition.add_plugin"] = None
    with pytest.raises(EngineError, match="TensorRT refuses decode for the map map_32"):
        alter(definition)
    with pytest.raises(EngineError, match=r"confidence 1\.5"):
        decode_layers(network, 1.5, 90)
    del trt_double.module.QuickPluginCreationRequest
    with pytest.raises(EngineError, match=r"cannot take a kernel into a plan: .*--with-nms"):
        decode_layers(network, 0.3, 90)


def test_without_triton(monkeypatch):
    from yolov4_fast.engines.tensorrt.aot_decode import compile_decode

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EngineError, match="pip install triton"):
        compile_decode(DecodeHead.of(yolov4_tiny(5).heads[0], 0.3), "fp32", 90)
