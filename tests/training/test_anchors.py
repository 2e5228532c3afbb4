"""Anchors: found in clusters that are known, measured by brute force, written and read."""

import itertools
import json
import sys

import cv2
import numpy as np
import pytest

from training.anchor_shapes import find_anchors, measure, object_shapes, shape_iou
from training.anchors import as_text, main, read_anchors
from yolov4_fast.datasets import Annotation, Dataset, open_dataset
from yolov4_fast.network.architectures import YOLOV4_ANCHORS

CENTRES = ((10, 14), (24, 20), (30, 60), (70, 66), (60, 150), (150, 120), (220, 230))


def clusters(count=60, spread=0.05, seed=0) -> np.ndarray:
    """Shapes scattered about `CENTRES` by some share of their size."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(np.array(CENTRES, float), count, axis=0)
    return rng.permutation(centres * np.exp(rng.normal(0, spread, centres.shape)))


def iou_by_painting(one, two) -> float:
    """IoU of two shapes of even sides, by counting pixels."""
    masks = np.zeros((2, 64, 64), bool)
    for mask, (width, height) in zip(masks, (one, two), strict=True):
        mask[32 - height // 2 : 32 + height // 2, 32 - width // 2 : 32 + width // 2] = True
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


class TestShapes:
    def test_iou_by_counting_pixels(self):
        sides = np.random.default_rng(0).integers(1, 30, (2, 12, 2)) * 2
        got = shape_iou(sides[0].astype(float), sides[1].astype(float))
        expected = [[iou_by_painting(one, two) for two in sides[1]] for one in sides[0]]
        np.testing.assert_allclose(got, expected)

    def test_measures(self):
        shapes = np.array([[10, 10], [10, 20], [100, 10], [1, 1]], float)
        fit = measure(shapes, ((10, 10), (20, 20)))
        best = [1, 0.5, 200 / 1200, 1 / 100]
        assert fit.average_iou == pytest.approx(np.mean(best))
        assert fit.recalls == (0.5, 0.25)  # above 0.213; strictly above 0.5

    def test_as_training_sees_them(self, tmp_path):
        """An image of 200 x 100 in an input of 64 x 96 (width x height), stretched or not."""
        assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 200, 3), np.uint8))
        boxes = np.array([[0, 0, 50, 50], [0, 0, 5, 50], [0, 0, 20, 20], [1, 1, 9, 9]], np.float32)
        flags = np.zeros((2, 4), bool)
        flags[0, 2] = flags[1, 3] = True  # difficult, crowd
        pixels = Annotation(boxes, np.zeros(4, int), *flags, np.ones(4), size=(100, 200))
        shares = Annotation(
            boxes / (200, 100, 200, 100), np.zeros(4, int), *flags, np.ones(4), normalized=True
        )
        for annotation in (pixels, shares):
            dataset = Dataset(tmp_path, None, ("x",), (tmp_path / "a.png",), (annotation,))
            stretched = object_shapes(dataset, 96, 64, "stretch")
            np.testing.assert_allclose(stretched, [[16, 48]], rtol=1e-5)  # the second is 1.6 wide
            boxed = object_shapes(dataset, 96, 64, "letterbox")
            np.testing.assert_allclose(boxed, [[16, 16]], rtol=1e-5)

    def test_sizes_of_normalised_boxes_are_not_needed_when_stretched(self, tmp_path):
        box, flag = np.array([[0.25, 0.25, 0.5, 0.75]], np.float32), np.zeros(1, bool)
        shares = Annotation(box, np.zeros(1, int), flag, flag, np.ones(1), normalized=True)
        dataset = Dataset(tmp_path, None, ("x",), (tmp_path / "gone.png",), (shares,))
        assert object_shapes(dataset, 100, 200, "stretch").tolist() == [[50, 50]]
        with pytest.raises(FileNotFoundError):
            object_shapes(dataset, 100, 200, "letterbox")


class TestFinding:
    @pytest.mark.parametrize("seed", range(5))
    def test_known_centres_are_found(self, seed):
        found = find_anchors(clusters(seed=seed), len(CENTRES), seed=seed)
        assert found == tuple(sorted(found, key=lambda shape: shape[0] * shape[1]))
        np.testing.assert_allclose(found, CENTRES, rtol=0.03, atol=0.51)

    def test_a_rare_cluster_is_found(self):
        shapes = np.concatenate([clusters(400)[:1500], np.full((15, 2), [300.0, 8.0])])
        found = find_anchors(shapes, len(CENTRES) + 1)
        assert any(abs(width - 300) < 1 and height == 8 for width, height in found)

    @pytest.mark.parametrize("seed", range(6))
    def test_as_good_as_the_best_split_of_few_shapes(self, seed):
        """All ways to part eight shapes into two groups, each around its median."""
        rng = np.random.default_rng(seed)
        shapes = np.rint(rng.uniform(100, 900, (8, 2)))
        best = 0.0
        for members in itertools.product((False, True), repeat=7):
            group = np.array((False, *members))
            if group.any():
                centres = [np.median(shapes[side], axis=0) for side in (group, ~group)]
                best = max(best, shape_iou(shapes, np.array(centres)).max(axis=1).mean())
        found = measure(shapes, find_anchors(shapes, 2, restarts=30)).average_iou
        assert found >= best - 0.015  # whole pixels, and a local optimum of another start
        assert found <= 1

    def test_a_cluster_is_centred_on_its_median(self):
        """Which fits skewed shapes better than their mean does."""
        shapes = np.exp(np.random.default_rng(5).normal(5, 1, (300, 2)))
        middles = [tuple(middle(shapes, axis=0).tolist()) for middle in (np.median, np.mean)]
        median, mean = (measure(shapes, (anchor,)).average_iou for anchor in middles)
        found = measure(shapes, find_anchors(shapes, 1)).average_iou
        assert found > median - 0.002 > mean

    def test_one_anchor_for_each_shape_is_exact(self):
        shapes = np.repeat(np.array(CENTRES, float), 3, axis=0)
        found = find_anchors(shapes, len(CENTRES))
        assert set(found) == set(CENTRES)
        assert measure(shapes, found).average_iou == 1

    def test_it_follows_from_the_seed(self):
        shapes = np.exp(np.random.default_rng(1).normal(4, 1, (500, 2)))
        one, same, other = (find_anchors(shapes, 9, seed=s, restarts=1) for s in (3, 3, 4))
        assert one == same != other

    def test_restarts_are_worth_it(self):
        shapes = np.exp(np.random.default_rng(2).normal(4, 1, (400, 2)))
        once, often = (measure(shapes, find_anchors(shapes, 9, restarts=r)) for r in (1, 12))
        assert often.average_iou > once.average_iou

    def test_anchors_that_would_be_the_same_keep_a_decimal(self):
        found = find_anchors(np.array([[2.1, 3.2], [2.4, 2.9], [8, 8]]), 3)
        assert found == ((2.1, 3.2), (2.4, 2.9), (8, 8))

    def test_many_boxes_are_sampled_and_all_measured(self, monkeypatch):
        monkeypatch.setattr("training.anchor_shapes.SAMPLE", 100)
        shapes = clusters(100)
        found = find_anchors(shapes, len(CENTRES))
        np.testing.assert_allclose(found, CENTRES, rtol=0.06, atol=0.51)
        fit = measure(shapes, found)
        assert fit.average_iou == pytest.approx(shape_iou(shapes, np.array(found)).max(1).mean())

    @pytest.mark.parametrize("shapes", [np.zeros((0, 2)), np.full((50, 2), 7.0), np.eye(2) + 2])
    def test_too_few_boxes(self, shapes):
        different = len(np.unique(shapes, axis=0))
        words = f"{len(shapes)} boxes of {different} different shapes are too few for 3 anchors"
        with pytest.raises(ValueError, match=words):
            find_anchors(shapes, 3)


class TestReading:
    @pytest.mark.parametrize(
        "text", ["12,16, 19,36", "12,16,19,36", " 12 16\n19 36\n", "anchors = 12,16, 19,36"]
    )
    def test_pairs(self, text, tmp_path):
        assert read_anchors(text) == ((12, 16), (19, 36))
        (tmp_path / "a.txt").write_text(text)
        assert read_anchors(tmp_path / "a.txt") == ((12, 16), (19, 36))

    def test_what_is_written_can_be_read(self):
        assert read_anchors(as_text(YOLOV4_ANCHORS)) == YOLOV4_ANCHORS
        assert as_text(((2.5, 3.0), (4, 5))) == "2.5,3, 4,5"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "anchors: 0 numbers are no pairs"),
            ("1,2,3", "3 numbers are no pairs of width and height"),
            ("a,b", "'a,b' is not a list of numbers"),
            ("1,-2", "must be positive"),
            ("1,nan", "must be positive"),
            ("0,1", "must be positive"),
        ],
    )
    def test_mistakes(self, text, words):
        with pytest.raises(ValueError, match=words):
            read_anchors(text)

    def test_files_that_are_no_anchors(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_anchors(tmp_path / "none.json")
        for content in ("[]", "{", '{"anchors": [[1]], "width": 1, "height": 1}', "[[1, 2]]"):
            (tmp_path / "a.json").write_text(content)
            with pytest.raises(ValueError, match=r"a\.json: is not what .*training\.anchors"):
                read_anchors(tmp_path / "a.json")


class TestCommand:
    @pytest.fixture
    def data(self, tmp_path):
        """A Darknet set of one image with the shapes of `clusters` at 256 x 128."""
        folder = tmp_path / "data"
        folder.mkdir()
        assert cv2.imwrite(str(folder / "a.png"), np.zeros((64, 64, 3), np.uint8))
        sides = clusters(30) / (256, 256)
        lines = [f"0 0.5 0.5 {width:.6f} {height:.6f}" for width, height in sides]
        (folder / "a.txt").write_text("\n".join(lines))
        (folder / "train.txt").write_text("a.png\n")
        (folder / "x.names").write_text("x\n")
        (folder / "x.data").write_text("train = train.txt\nnames = x.names\n")
        return str(folder / "x.data")

    def test_prints_and_writes(self, data, tmp_path, capsys):
        outputs = [tmp_path / "out" / f"a{suffix}" for suffix in (".json", ".txt", ".png")]
        arguments = ["--data", data, "--size", "256x256", "--count", str(len(CENTRES)), "--output"]
        assert main([*arguments, *map(str, outputs)]) == 0
        printed = capsys.readouterr().out
        found = read_anchors(outputs[0], (256, 256))
        np.testing.assert_allclose(found, CENTRES, rtol=0.03, atol=0.51)
        assert read_anchors(outputs[1]) == found
        assert f'--anchors "{as_text(found)}"' in printed
        assert f"anchors = {as_text(found)}\n" in printed
        shapes = object_shapes(open_dataset(data, "train"), 256, 256, "stretch")
        for anchors, name in ((found, "7 anchors found"), (YOLOV4_ANCHORS, "9 of yolov4-nano")):
            fit = measure(shapes, anchors)
            (row,) = (line for line in printed.splitlines() if line.startswith(name))
            assert row.split()[-3:] == [f"{v:.4f}" for v in (fit.average_iou, *fit.recalls)]
        record = json.loads(outputs[0].read_text())
        assert record["boxes"] == 30 * len(CENTRES) and record["split"] == "train"
        picture = cv2.imread(str(outputs[2]))
        assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
        with pytest.raises(ValueError, match=r"holds anchors for 256x256, not 416x416; run .*--si"):
            read_anchors(outputs[0], (416, 416))

    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            (["--count", "500"], "are too few for 500 anchors"),
            (["--output", "a.jpg"], "a.jpg: an output ends in one of .json, .txt, .png"),
            (["--model", "yolov9"], "no architecture is called 'yolov9'"),
            (["--split", "val"], "has no split 'val'"),
            (["--data", "nowhere"], "there is no data set at nowhere"),
        ],
    )
    def test_mistakes_are_one_line(self, data, capsys, extra, words):
        assert main(["--data", data, *extra]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1

    def test_without_matplotlib(self, data, tmp_path, monkeypatch, capsys):
        for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
            monkeypatch.setitem(sys.modules, name, None)
        assert main(["--data", data, "--output", str(tmp_path / "a.png")]) == 2
        assert "pip install 'yolov4_fast[train]'" in capsys.readouterr().err
        assert not (tmp_path / "a.png").exists()
