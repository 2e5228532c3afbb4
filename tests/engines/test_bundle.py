"""The engine file: what it holds, and one clear error for each way in which it can be wrong."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load, save

from yolov4_fast.engines import EngineFileError, build_engine, load_engine
from yolov4_fast.engines.bundle import read_bundle, read_manifest, write_bundle

Members = dict[str, bytes]


@pytest.fixture(params=["torch", "openvino"])
def path(request: pytest.FixtureRequest, mini, tmp_path: Path) -> Path:
    path = tmp_path / "mini.engine"
    build_engine(*mini, engine=request.param, precision="f32", path=path)
    return path


def rewrite(path: Path, change: Callable[[Members], None], compression: int = 0) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def set_manifest(**values: object) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        manifest = json.loads(members["manifest.json"]) | values
        members["manifest.json"] = json.dumps(
            {key: value for key, value in manifest.items() if value is not ...}
        ).encode()

    return change


def assert_refused(path: Path, *says: str) -> None:
    with pytest.raises(EngineFileError) as caught:
        load_engine(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for words in (*says, "yolov4-fast build"):
        assert words in message


def test_is_an_uncompressed_zip_without_pickle(path: Path, mini) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        manifest = json.loads(archive.read("manifest.json"))
    assert all(info.compress_type == zipfile.ZIP_STORED for info in infos)
    payload = {"torch": "weights.safetensors", "openvino": "model.onnx"}[manifest["engine"]]
    assert [info.filename for info in infos] == ["manifest.json", payload]
    assert manifest["format"] == "yolov4_fast.engine"
    assert manifest["format_version"] == 1
    assert manifest["network"].startswith("[net]")
    assert manifest["class_names"] == list(mini.class_names)
    assert (manifest["width"], manifest["height"]) == (160, 128)
    assert manifest["thresholds"] == {"confidence": 0.25, "iou": 0.45}
    assert set(manifest["sha256"]) == {payload}
    assert manifest["gpu"] is None
    assert manifest["versions"][manifest["engine"]]


def test_manifest_can_be_read_alone(path: Path, mini) -> None:
    manifest = read_manifest(path)
    assert manifest == read_bundle(path).manifest
    assert manifest.class_names == mini.class_names
    assert manifest.network.heads == mini.network.heads
    assert not any(conv.batch_normalize for _, conv in manifest.network.convolutions())


def test_same_engine_same_bytes(path: Path) -> None:
    bundle = read_bundle(path)
    again = path.with_name("again.engine")
    write_bundle(again, bundle.manifest, bundle.payload)
    assert again.read_bytes() == path.read_bytes()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such engine file: .*none\.engine"):
        load_engine(tmp_path / "none.engine")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match="is not a file"):
        load_engine(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PNG and not a zip", b"P"])
def test_not_a_zip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(content)
    assert_refused(path, "is not an engine file")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.9999])
def test_cut_short(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(path, "cut short")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_flipped_bit(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)
    assert_refused(path, "damaged", "sha256")


def test_every_bit_of_the_manifest_flipped_is_refused_or_harmless(path: Path) -> None:
    """Never a traceback of another kind, wherever the damage is."""
    content = path.read_bytes()
    end = content.index(b"[net]")
    for position in range(0, end, 7):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            read_manifest(path)
        except EngineFileError as error:
            assert str(path) in str(error)


def test_another_zip(path: Path) -> None:
    rewrite(path, lambda members: members.pop("manifest.json"))
    assert_refused(path, "has no manifest.json")


def test_missing_member(path: Path) -> None:
    name = next(iter(read_bundle(path).payload))
    rewrite(path, lambda members: members.pop(name))
    assert_refused(path, f"its member {name} is missing")


def test_manifest_that_knows_no_payload(path: Path) -> None:
    name = next(iter(read_bundle(path).payload))
    rewrite(path, set_manifest(sha256={}))
    assert_refused(path, f"its member {name} is missing")


def test_compressed_member(path: Path) -> None:
    rewrite(path, lambda members: None, zipfile.ZIP_DEFLATED)
    assert_refused(path, "is compressed")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"format_version": 2}, "is of engine format 2, and this version reads up to 1; update"),
        ({"format": "other"}, "is not that of an engine file"),
        ({"engine": "abacus"}, "no engine is called 'abacus'"),
        ({"precision": "f8"}, "no precision 'f8'"),
        ({"class_names": ["one"]}, "1 class names for a network of 3 classes"),
        ({"class_names": ...}, "lacks 'class_names'"),
        ({"width": 100}, "100x128 does not fit"),
        ({"width": "wide"}, "is wrong"),
        ({"resize": "crop"}, "resize 'crop'"),
        ({"max_batch": "many"}, "is wrong"),
        ({"network": "[net]\nwidth=160\nheight=128\nchannels=3\n[warp]\n"}, "warp"),
        ({"sha256": []}, "sha256 is not a table"),
        ({"thresholds": {"iou": 0.4}}, "lacks 'confidence'"),
    ],
)
def test_wrong_manifest(path: Path, values: dict, says: str) -> None:
    rewrite(path, set_manifest(**values))
    assert_refused(path, says)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[]", b"7"])
def test_manifest_that_is_not_json(path: Path, text: bytes) -> None:
    rewrite(path, lambda members: members.update({"manifest.json": text}))
    assert_refused(path, "manifest.json")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_the_weights(path: Path, value: float) -> None:
    bundle = read_bundle(path)
    ((name, content),) = bundle.payload.items()
    if name == "weights.safetensors":
        state = load(content)
        state["layers.4.conv.weight"][0, 0, 0, 0] = value
        content, layer = save(state), "layers.4.conv.weight"
    else:
        model = onnx.load_from_string(content)
        initializer = next(t for t in model.graph.initializer if t.name == "layer_4.weight")
        values = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        values.view(-1)[0] = value
        initializer.raw_data = values.numpy().tobytes()
        content, layer = model.SerializeToString(), "layer_4.weight"
    write_bundle(path, bundle.manifest, {name: content})
    assert_refused(path, f"NaN or infinity: {layer}, 1 of")


def test_payload_of_another_network(path: Path, mini) -> None:
    bundle = read_bundle(path)
    ((name, content),) = bundle.payload.items()
    if name == "weights.safetensors":
        state = load(content)
        del state["layers.4.conv.bias"]
        write_bundle(path, bundle.manifest, {name: save(state)})
        assert_refused(path, "does not fit the network")
    else:
        write_bundle(path, bundle.manifest, {name: content[: len(content) // 2]})
        assert_refused(path, "OpenVINO cannot read model.onnx")


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bundle(path, bundle.manifest, bundle.payload)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
