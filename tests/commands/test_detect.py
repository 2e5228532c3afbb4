"""`yolov4-fast detect`: the table, JSON, pictures, videos, what is skipped, interruption."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from yolov4_fast import Detections, Detector
from yolov4_fast.cli import main
from yolov4_fast.commands import detect
from yolov4_fast.sources import Frame


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def test_detect_tells_what_the_detector_finds(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["wide.png", "square.png", "tall.png"]  # more than the engine takes at once
    output = tmp_path / "new" / "found.json"
    assert main(["detect", "torch.engine", *images, "--json", str(output)]) == 0
    expected = Detector("torch.engine").detect(images)
    found = read(output)
    assert found == [
        {
            "image": name,
            "width": detections.image_size[1],
            "height": detections.image_size[0],
            "detections": [
                {
                    "class_id": class_id,
                    "class_name": ("alpha", "beta", "gamma")[class_id],
                    "score": score,
                    "box": box,
                }
                for class_id, score, box in zip(
                    detections.class_ids.tolist(),
                    detections.scores.tolist(),
                    detections.boxes.tolist(),
                    strict=True,
                )
            ],
        }
        for name, detections in zip(images, expected, strict=True)
    ]
    out, err = capsys.readouterr()
    total = sum(map(len, expected))
    assert total > 50 and f"3 images, {total} detections" in out and not err
    assert "torch engine, f32 on cpu, input 160x128 (stretch)" in out
    first = next(line for line in out.splitlines() if line.startswith("wide.png")).split()
    assert first[1] == expected[0].class_names[expected[0].class_ids[0]]
    assert float(first[2]) == pytest.approx(expected[0].scores[0], abs=6e-4)
    assert list(map(float, first[3:])) == pytest.approx(expected[0].boxes[0].tolist(), abs=0.06)


def test_detect_options(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def count(*options: str) -> int:
        output = str(tmp_path / "found.json")
        assert main(["detect", "torch.engine", "*.png", "--quiet", "--json", output, *options]) == 0
        assert "wide.png" not in capsys.readouterr().out
        return sum(len(entry["detections"]) for entry in read(output))

    usual = count()
    assert usual == count("--confidence", "0.25", "--iou", "0.45", "--resize", "stretch")
    assert 0 < count("--confidence", "0.4") < usual < count("--confidence", "0.2")
    assert 0 < count("--iou", "0.05") < usual
    assert count("--resize", "letterbox") != usual
    assert count("--confidence", "1") == 0


def test_detect_skips_what_it_cannot_read(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy("wide.png", folder / "1.png")
    (folder / "2.png").touch()
    (folder / "3.jpg").write_text("not a picture")
    shutil.copy("tall.png", folder / "4.png")
    output = tmp_path / "found.json"
    assert main(["detect", "torch.engine", str(folder), "--json", str(output)]) == 1
    out, err = capsys.readouterr()
    zero, broken = err.splitlines()
    assert zero.startswith("warning: skipped: ") and "2.png" in zero and "zero bytes" in zero
    assert broken.startswith("warning: skipped: ") and "3.jpg" in broken
    assert "2 images, " in out and "2 skipped" in out
    assert [Path(entry["image"]).name for entry in read(output)] == ["1.png", "4.png"]


def test_detect_saves_pictures_and_videos(files: Any, tmp_path: Path) -> None:
    for name, image in (("a", "wide.png"), ("b", "tall.png")):
        (tmp_path / name).mkdir()
        shutil.copy(image, tmp_path / name / "same.png")
    clip = str(tmp_path / "clip.avi")
    still = cv2.imread("square.png")
    writer = cv2.VideoWriter(clip, cv2.VideoWriter.fourcc(*"MJPG"), 12, (320, 320))
    for _ in range(5):
        writer.write(still)
    writer.release()
    saved, output = tmp_path / "out" / "pictures", tmp_path / "found.json"
    words = ["detect", "torch.engine", str(tmp_path / "a"), clip, str(tmp_path / "b")]
    assert main([*words, "--quiet", "--save", str(saved), "--json", str(output)]) == 0
    assert sorted(path.name for path in saved.iterdir()) == ["clip.mp4", "same-2.png", "same.png"]
    for name, original in (("same.png", "wide.png"), ("same-2.png", "tall.png")):
        drawn, plain = cv2.imread(str(saved / name)), cv2.imread(original)
        assert drawn.shape == plain.shape and (drawn != plain).any()
    video = cv2.VideoCapture(str(saved / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    names = [Path(entry["image"]).name for entry in read(output)]
    assert names == ["same.png", *(f"clip.avi#{i}" for i in range(5)), "same.png"]


def test_detect_interrupted_keeps_what_it_found(
    files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chunks = detect.chunks

    def one_then_interrupt(*arguments: Any) -> Iterator[Any]:
        yield next(chunks(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(detect, "chunks", one_then_interrupt)
    output, saved = tmp_path / "found.json", tmp_path / "saved"
    words = ["detect", "torch.engine", "square.png", "tall.png", "wide.png", "--quiet"]
    assert main([*words, "--json", str(output), "--save", str(saved)]) == 130
    assert [entry["image"] for entry in read(output)] == ["square.png", "tall.png"]
    assert sorted(path.name for path in saved.iterdir()) == ["square.png", "tall.png"]
    assert "interrupted" in capsys.readouterr().out


def test_interrupted_elsewhere(
    files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("yolov4_fast.model.open_model", interrupt)
    output = tmp_path / "x.engine"
    assert main(["build", "mini.safetensors", "-o", str(output)]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not output.exists()


@pytest.mark.parametrize("overlapped", [False, True])
def test_reading_counts_where_it_overlaps(overlapped: bool) -> None:
    """Else a fast engine that waits for slow pictures would seem faster than it is."""

    def stream(images: Iterator[np.ndarray]) -> Iterator[Detections]:
        return (Detections(np.empty((0, 4)), [], [], (), image.shape[:2]) for image in images)

    def slow() -> Iterator[Frame]:
        for number in range(4):
            time.sleep(0.02)
            yield Frame(str(number), np.zeros((4, 4, 3), np.uint8), str(number))

    detector = SimpleNamespace(
        engine=SimpleNamespace(max_batch=2),
        stream=stream,
        pipeline=object() if overlapped else None,
    )
    session = detect.Session(detector, None)
    session.run(slow(), None)
    assert len(session.records) == 4
    assert (session.seconds >= 0.03) == overlapped  # all but the first two
