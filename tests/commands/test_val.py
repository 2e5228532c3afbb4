"""`yolov4-fast val` on every format of annotations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast import Detector
from yolov4_fast.cli import main


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


@pytest.fixture
def data(files: Any, tmp_path: Path) -> Path:
    """What the engine finds at 0.35, as annotations in three formats, with one box of no area."""
    images = ["square.png", "tall.png", "wide.png"]
    names = ("alpha", "beta", "gamma")
    for folder in ("voc/Annotations", "voc/ImageSets/Main", "coco/annotations", "dark/labels"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("voc/JPEGImages", "coco/images", "dark/images"):
        (tmp_path / folder).mkdir()
        for image in images:
            shutil.copy(image, tmp_path / folder)
    stems = "".join(f"{Path(image).stem}\n" for image in images)
    for split in ("train", "val"):
        (tmp_path / f"voc/ImageSets/Main/{split}.txt").write_text(stems)
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)],
    }
    found = Detector("torch.engine", confidence=0.35).detect(images)
    for number, (image, detections) in enumerate(zip(images, found, strict=True)):
        height, width = detections.image_size
        objects, labels = "", ""
        for box, _, class_id, name in detections:
            x1, y1, x2, y2 = box.tolist()
            tags = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True)
            bounds = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value in tags)
            objects += f"<object><name>{name}</name><bndbox>{bounds}</bndbox></object>"
            cx, cy = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
            labels += f"{class_id} {cx} {cy} {(x2 - x1) / width} {(y2 - y1) / height}\n"
        if number == 0:
            objects += (
                "<object><name>beta</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>8</xmax>"
                "<ymax>8</ymax></bndbox></object>"
            )
        (tmp_path / "voc/Annotations" / f"{Path(image).stem}.xml").write_text(
            f"<annotation><filename>{image}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
        (tmp_path / "dark/labels" / f"{Path(image).stem}.txt").write_text(labels)
        coco["images"].append(
            {"id": number, "file_name": image, "width": width, "height": height}
        )  # fmt: skip
        for entry in detections.to_coco(number, (10, 11, 12)):
            area = entry["bbox"][2] * entry["bbox"][3]
            entry |= {"id": len(coco["annotations"]) + 1, "area": area, "iscrowd": 0}
            coco["annotations"].append(entry)
    (tmp_path / "coco/annotations/instances_val.json").write_text(json.dumps(coco))
    (tmp_path / "dark/val.txt").write_text("".join(f"images/{image}\n" for image in images))
    shutil.copy("mini.names", tmp_path / "dark/my.names")
    (tmp_path / "dark/my.data").write_text("classes=3\nvalid=val.txt\nnames=my.names\n")
    return tmp_path


@pytest.mark.parametrize("source", ["voc", "coco", "dark/my.data"])
@pytest.mark.parametrize("metric", ["voc", "coco"])
def test_val(
    data: Path, source: str, metric: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if metric == "coco":
        pytest.importorskip("faster_coco_eval")
    output = tmp_path / "ap.json"
    words = ["val", "torch.engine", "--data", str(data / source), "--metric", metric]
    assert main([*words, "--json", str(output)]) == 0
    out, err = capsys.readouterr()
    result = read(output)
    assert result["mAP50"] == pytest.approx(1) and result["metric"] == metric
    assert [entry["name"] for entry in result["classes"]] == ["alpha", "beta", "gamma"]
    assert ("AP" in result) == (metric == "coco")
    if metric == "coco":
        assert result["AP"] > 0.9
    assert "mAP50 1.0000 on 3 images" in out and "gamma" in out
    if source == "voc":
        assert err.startswith("warning: 1 problem in the annotations of ")
        assert "has no area" in err and ".py" not in err and err.count("\n") == 1
    else:
        assert not err


def test_val_of_other_classes_or_splits(data: Path, refused: Callable[..., str]) -> None:
    error = refused("val", "mini.engine", "--data", str(data / "coco"), "--split", "test")
    assert "no split 'test'" in error and "instances_val" not in error and "val" in error
    assert "mini.engine" in refused("val", "mini.engine", "--data", "mini.engine")
    assert "no data set at nowhere" in refused("val", "mini.engine", "--data", "nowhere")
    (data / "dark/my.names").write_text("alpha\nbeta\ndelta\n")
    error = refused("val", "mini.engine", "--data", str(data / "dark/my.data"))
    assert "only the detector has [gamma], only the data set has [delta]" in error
