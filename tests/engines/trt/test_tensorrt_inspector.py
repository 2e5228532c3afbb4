"""The layers of a plan, from what TensorRT's inspector writes; `info --layers` shows them of an
engine file where there is no TensorRT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast.cli import main
from yolov4_fast.engines.bundle import write_bundle
from yolov4_fast.engines.engine import EngineError, Manifest
from yolov4_fast.engines.tensorrt.inspector import PlanLayer, read_layers
from yolov4_fast.network.fold import without_normalisation

DETAILED = {
    "Name": "layer_0.conv + layer_0.softplus",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "images", "Dimensions": [8, 3, 128, 160], "Format/Datatype": "Half"}],
    "Outputs": [
        {
            "Name": "layer_0",
            "Dimensions": [8, 16, 128, 160],
            "Format/Datatype": "Channel major FP16",
        }
    ],
    "TacticName": "sm90_xmma_fprop_implicit_gemm",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: layer_0.conv]\x1f[ONNX Layer: layer_0.tanh]\x1f[ONNX Layer: layer_1]",
}
FUSED = {
    "Name": "__myl_TanhMul",
    "LayerType": "kgen",
    "Outputs": [{"Name": "x", "Dimensions": [8, 16], "Datatype": "Half", "Format": "Linear"}],
}
ENGINE = json.dumps({"Layers": [DETAILED, FUSED], "Bindings": ["images", "map_8"]})


def test_detailed() -> None:
    assert read_layers(ENGINE) == [
        PlanLayer(
            "layer_0.conv + layer_0.softplus",
            "CaskConvolution",
            "8x16x128x160 Channel major FP16",
            "sm90_xmma_fprop_implicit_gemm",
            ("layer_0", "layer_1"),
        ),
        PlanLayer("__myl_TanhMul", "kgen", "8x16 Half Linear", "", ()),
    ]


def test_names_only() -> None:
    text = b'{"Layers": ["Reformatting CopyNode for images", "layer_0.conv"]}'
    assert [layer.name for layer in read_layers(text)] == [
        "Reformatting CopyNode for images", "layer_0.conv",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [4]}']
)
def test_what_is_something_else(text: str) -> None:
    with pytest.raises(EngineError, match=r"layers\.json is not what TensorRT's inspector writes"):
        read_layers(text)


def test_info_of_an_engine_file(
    mini: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest(
        kind="tensorrt", network=without_normalisation(mini.network),
        class_names=mini.class_names, resize="stretch", precision="fp16", max_batch=8,
        versions={"tensorrt": "10.16.1.11"}, gpu={"name": "NVIDIA H200", "sm": "90"},
    )  # fmt: skip
    path = tmp_path / "my.engine"
    write_bundle(
        path, manifest, {"model.plan": b"", "plan.json": b"", "layers.json": ENGINE.encode()}
    )
    assert main(["info", str(path), "--layers", "--json", str(tmp_path / "info.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["engine", "tensorrt"] for line in lines)
    assert lines[-2].split("|")[0].split()[-2:] == ["layer_0,", "layer_1"]
    assert "sm90_xmma" in lines[-2] and "CaskConvolution" in lines[-2]
    assert "__myl_TanhMul" in lines[-1]
    facts = json.loads((tmp_path / "info.json").read_text())
    assert [layer["kind"] for layer in facts["plan_layer_list"]] == ["CaskConvolution", "kgen"]
    assert len(facts["layer_list"]) == len(mini.network.layers)
