"""The generated data set: deterministic, tight boxes, readable as VOC."""

import numpy as np
import pytest

from training.scene import CLASS_NAMES, MIN_BOX, scene
from training.shapes import main
from yolov4_fast.datasets import open_dataset


def draw(seed, height=160, width=200):
    return scene(height, width, np.random.default_rng(seed))


def test_a_scene_depends_on_the_generator_alone():
    for one, two in zip(vars(draw(5)).values(), vars(draw(5)).values(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (draw(5).image != draw(6).image).any()


def test_scenes_are_varied_and_boxes_lie_inside():
    scenes = [draw(seed) for seed in range(60)]
    for drawn in scenes:
        assert drawn.image.shape == (160, 200, 3) and drawn.image.dtype == np.uint8
        assert len(drawn.boxes) == len(drawn.class_ids)
        assert (drawn.boxes >= 0).all() and (drawn.boxes <= (200, 160, 200, 160)).all()
        assert (drawn.boxes[:, 2:] - drawn.boxes[:, :2] >= MIN_BOX).all()
    seen = np.bincount(np.concatenate([s.class_ids for s in scenes]), minlength=len(CLASS_NAMES))
    assert len(CLASS_NAMES) >= 6 and seen.min() >= 10
    counts = [len(s.boxes) for s in scenes]
    assert min(counts) <= 1 and max(counts) >= 8
    sides = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(axis=1) for s in scenes])
    assert sides.min() < 16 and sides.max() > 60


def test_boxes_are_tight(monkeypatch):
    """Painted white on black, with neither surface nor light nor noise, an object fills its box
    exactly.
    """
    from training import scene as module

    def paint_white(canvas, mask, place, rng):
        inside, part = module._overlap(place, mask.shape, canvas.shape)
        canvas[inside][mask[part] >= 0.5] = 255

    monkeypatch.setattr(module, "MAX_OBJECTS", 1)
    monkeypatch.setattr(module, "_background", lambda h, w, rng: np.zeros((h, w, 3), np.float32))
    monkeypatch.setattr(module, "_paint", paint_white)
    monkeypatch.setattr(module, "_photograph", lambda canvas, rng: canvas.astype(np.uint8))
    checked = 0
    for seed in range(40):
        drawn = draw(seed)
        for box in drawn.boxes:
            ys, xs = np.nonzero(drawn.image[..., 0])
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            checked += 1
    assert checked > 30


def test_the_command_writes_a_voc_data_set(tmp_path, capsys):
    command = ["--train", "3", "--val", "2", "--size", "96x64", "--seed", "4"]
    assert main(["--output", str(tmp_path / "one"), *command]) == 0
    assert main(["--output", str(tmp_path / "two"), *command]) == 0
    train, val = (open_dataset(tmp_path / "one", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    assert train.class_names == CLASS_NAMES and train.problems == ()
    assert train.read_image(0).shape == (64, 96, 3)
    drawn = scene(64, 96, np.random.default_rng((4, 0, 2)))
    np.testing.assert_array_equal(train.annotation(2).boxes, drawn.boxes)
    np.testing.assert_array_equal(train.annotation(2).class_ids, drawn.class_ids)
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 5 * 2 + 3
    for path in files:
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        )
    capsys.readouterr()


def test_a_folder_in_use_and_a_tiny_size_are_refused(tmp_path, capsys):
    (tmp_path / "Annotations").mkdir()
    assert main(["--output", str(tmp_path), "--train", "1", "--val", "1"]) == 2
    assert "already holds a data set" in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "new"), "--size", "16"]) == 2
    assert "at least 64x64, not 16x16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "new"), "--size", "big"])
