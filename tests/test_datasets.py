"""The three annotation formats, and what becomes of annotations that cannot be right."""

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov4_fast.datasets import DatasetError, DatasetWarning, open_dataset, open_datasets
from yolov4_fast.datasets.voc import VOC_NAMES


def write_image(path: Path, width: int = 100, height: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def voc_object(name: str, box: tuple, difficult: int = 0) -> str:
    corners = "".join(
        f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox></object>"
    )


def write_voc(root: Path, image_id: str, *objects: str, size: tuple = (100, 50)) -> None:
    write_image(root / "JPEGImages" / f"{image_id}.jpg")
    (root / "Annotations").mkdir(exist_ok=True)
    width, height = size
    text = f"<size><width>{width}</width><height>{height}</height></size>{''.join(objects)}"
    (root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{text}</annotation>")


def write_split(root: Path, split: str, *ids: str) -> None:
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text("\n".join(ids) + "\n")


class TestVoc:
    def test_one_based_inclusive_pixels_become_continuous(self, tmp_path):
        write_voc(
            tmp_path,
            "a",
            voc_object("dog", (1, 1, 100, 50)),
            voc_object("cat", (11, 21, 20, 30), 1),
        )
        dataset = open_dataset(tmp_path)
        annotation = dataset.annotation(0)
        np.testing.assert_array_equal(annotation.boxes, [[0, 0, 100, 50], [10, 20, 20, 30]])
        assert annotation.boxes.dtype == np.float32
        assert annotation.class_ids.tolist() == [VOC_NAMES.index("dog"), VOC_NAMES.index("cat")]
        assert annotation.difficult.tolist() == [False, True]
        assert annotation.areas.tolist() == [5000, 100]
        assert dataset.read_image(0).shape == (50, 100, 3)
        assert dataset.problems == ()

    def test_classes_are_sorted_over_all_splits_unless_listed_or_forced(self, tmp_path):
        write_voc(tmp_path, "a", voc_object("zebra", (1, 1, 9, 9)))
        write_voc(tmp_path, "b", voc_object("apple", (1, 1, 9, 9)))
        write_split(tmp_path, "train", "a")
        write_split(tmp_path, "val", "b")
        assert open_dataset(tmp_path, "train").class_names == ("apple", "zebra")
        (tmp_path / "my.names").write_text("zebra\napple\n\n")
        assert open_dataset(tmp_path, "train").class_names == ("zebra", "apple")
        forced = open_dataset(tmp_path, "train", class_names=["pear", "apple", "zebra"])
        assert forced.annotation(0).class_ids.tolist() == [2]

    def test_without_a_split_takes_the_one_to_evaluate_on(self, tmp_path):
        for name in ("a", "b"):
            write_voc(tmp_path, name, voc_object("dog", (1, 1, 9, 9)))
        write_split(tmp_path, "train", "a")
        write_split(tmp_path, "val", "b")
        write_split(tmp_path, "dog_val", "b 1")
        dataset = open_dataset(tmp_path)
        assert dataset.split == "val"
        assert [path.stem for path in dataset.image_paths] == ["b"]
        with pytest.raises(DatasetError, match=r"no split 'test'; it has: train, val$"):
            open_dataset(tmp_path, "test")

    def test_broken_annotations_are_dropped_or_clipped_and_named(self, tmp_path):
        write_voc(
            tmp_path,
            "a",
            voc_object("dog", (5, 5, 5, 20)),
            voc_object("dog", (200, 5, 300, 20)),
            voc_object("dog", (91, 41, 140, 80)),
            voc_object("unicorn", (1, 1, 9, 9)),
            voc_object("dog", ("left", 1, 9, 9)),
            voc_object("dog", ("nan", 1, 9, 9)),
            voc_object("cat", (1, 1, 9, 9)),
        )
        write_voc(tmp_path, "b")
        (tmp_path / "Annotations" / "b.xml").write_text("<annotation><object>")
        write_voc(tmp_path, "c")
        (tmp_path / "JPEGImages" / "c.jpg").unlink()
        write_voc(tmp_path, "d")
        (tmp_path / "Annotations" / "d.xml").write_text(
            '<!DOCTYPE a [<!ENTITY e "boom">]><annotation>&e;</annotation>'
        )
        write_split(tmp_path, "val", "a", "b", "c", "d", "e")
        with pytest.warns(DatasetWarning, match="10 problems") as caught:
            dataset = open_dataset(tmp_path, class_names=("cat", "dog"))
        assert len(caught) == 1
        assert len(dataset) == 1
        expected = [[90, 40, 100, 50], [0, 0, 9, 9]]
        np.testing.assert_array_equal(dataset.annotation(0).boxes, expected)
        reports = ["no area", "outside the image: dropped", "outside the image: clipped",
                   "unknown class", "no box of numbers", "not finite", "b.xml: is not XML",
                   "c: no such image", "d.xml: has a DOCTYPE", "e.xml: cannot be read"]  # fmt: skip
        for problem, words in zip(dataset.problems, reports, strict=True):
            assert words in problem

    @pytest.mark.parametrize("size", [("0", "0"), ("", "unknown")])
    def test_a_missing_size_is_taken_from_the_image(self, tmp_path, size):
        write_voc(tmp_path, "a", voc_object("dog", (50, 1, 100, 50)), size=size)
        assert open_dataset(tmp_path).annotation(0).boxes.tolist() == [[49, 0, 100, 50]]

    def test_a_folder_without_usable_images_raises(self, tmp_path):
        write_voc(tmp_path, "a", voc_object("dog", (50, 1, 100, 50)))
        (tmp_path / "JPEGImages" / "a.jpg").unlink()
        with pytest.raises(DatasetError, match="no usable image"):
            open_dataset(tmp_path)

    def test_an_image_that_is_listed_twice_is_taken_once(self, tmp_path):
        for name in ("a", "b"):
            write_voc(tmp_path, name, voc_object("dog", (1, 1, 9, 9)))
        write_split(tmp_path, "val", "a", "b", "a")
        with pytest.warns(DatasetWarning, match="a: is listed twice"):
            assert [path.stem for path in open_dataset(tmp_path).image_paths] == ["a", "b"]

    def test_lists_that_cannot_be_used_are_named(self, tmp_path):
        write_voc(tmp_path, "a", voc_object("dog", (1, 1, 9, 9)))
        write_split(tmp_path, "val")
        with pytest.raises(DatasetError, match="no usable image in split 'val': it lists none"):
            open_dataset(tmp_path, "val")
        (tmp_path / "ImageSets/Main/val.txt").write_bytes("é\n".encode("latin-1"))
        with pytest.raises(DatasetError, match=r"val\.txt is not UTF-8 text"):
            open_dataset(tmp_path, "val")
        write_split(tmp_path, "val", "a")
        (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
        with pytest.raises(ValueError, match=r"classes\.txt, line 2: is blank, which would shift"):
            open_dataset(tmp_path, "val")
        (tmp_path / "classes.txt").write_text("")
        with pytest.raises(ValueError, match=r"classes\.txt: holds no class names"):
            open_dataset(tmp_path, "val")

    def test_names_need_not_be_ascii(self, tmp_path):
        root = tmp_path / "œuvre 图"
        write_voc(root, "b", voc_object("dog", (1, 1, 9, 9)))
        for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            (root / folder / f"b{suffix}").rename(root / folder / f"猫{suffix}")
        write_split(root, "val", "猫")
        dataset = open_dataset(root)
        assert len(dataset) == 1 and dataset.read_image(0).shape == (50, 100, 3)

    @pytest.mark.filterwarnings("ignore::yolov4_fast.datasets.DatasetWarning")
    def test_bccd(self, bccd):
        whole, val = open_dataset(bccd, "trainval"), open_dataset(bccd, "val")
        assert whole.class_names == val.class_names == ("Platelets", "RBC", "WBC")
        assert (len(whole), len(val)) == (292, 87)
        degenerate = [problem for problem in whole.problems if "no area" in problem]
        assert [problem.split(".")[0] for problem in degenerate] == [
            "BloodImage_00338",
            "BloodImage_00343",
        ]
        boxes = np.concatenate([whole.annotation(i).boxes for i in range(len(whole))])
        assert len(boxes) + len(degenerate) == 3943
        assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()
        assert (boxes >= 0).all() and (boxes <= (640, 480, 640, 480)).all()


def coco_content() -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "x.png", "width": 100, "height": 50},
            {"id": 3, "file_name": "y.png", "width": 100, "height": 50},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [10, 20, 30, 10], "area": 123.0},
            {"id": 2, "image_id": 3, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        ],
    }


class TestCoco:
    def write(self, root: Path, content: dict, name: str = "instances_val2017.json") -> Path:
        for image in ("x.png", "y.png"):
            write_image(root / name.removesuffix(".json").split("_")[1] / image)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / name).write_text(json.dumps(content))
        return root / "annotations" / name

    @pytest.mark.parametrize("split", [None, "val", "val2017", "file"])
    def test_sparse_categories_become_contiguous(self, tmp_path, split):
        file = self.write(tmp_path, coco_content())
        dataset = open_dataset(file) if split == "file" else open_dataset(tmp_path, split)
        assert dataset.class_names == ("person", "toothbrush")
        assert dataset.category_ids == (1, 90)
        assert dataset.image_ids == (7, 3)
        assert len(dataset.annotation(0).boxes) == 0
        annotation = dataset.annotation(1)
        assert annotation.boxes.tolist() == [[10, 20, 40, 30], [0, 0, 5, 5]]
        assert annotation.class_ids.tolist() == [1, 0]
        assert annotation.crowd.tolist() == [False, True]
        assert annotation.areas.tolist() == [123, 25]

    def test_train_is_not_trainval(self, tmp_path):
        self.write(tmp_path, coco_content(), "instances_train2017.json")
        self.write(tmp_path, coco_content() | {"images": []}, "instances_trainval2017.json")
        self.write(tmp_path, coco_content() | {"images": []}, "captions_train2017.json")
        assert len(open_dataset(tmp_path, "train")) == 2
        with pytest.raises(DatasetError, match="no split 'val'; it has: train, train2017, tr"):
            open_dataset(tmp_path, "val")

    def test_broken_annotations_are_dropped_and_named(self, tmp_path):
        content = coco_content()
        content["annotations"] += [
            {"id": 3, "image_id": 99, "category_id": 1, "bbox": [0, 0, 5, 5]},
            {"id": 4, "image_id": 3, "category_id": 2, "bbox": [0, 0, 5, 5]},
            {"id": 5, "image_id": 3, "category_id": 1, "bbox": [0, 0, 5]},
            {"id": 6, "image_id": 3, "category_id": 1, "bbox": [0, 0, 5, 0]},
        ]
        content["images"].append({"id": 9, "file_name": "z.png", "width": 9, "height": 9})
        self.write(tmp_path, content)
        with pytest.warns(DatasetWarning, match="5 problems"):
            dataset = open_dataset(tmp_path)
        assert len(dataset) == 2
        assert len(dataset.annotation(1).boxes) == 2

    @pytest.mark.parametrize(
        ("key", "change", "words"),
        [
            ("images", {"width": None}, "'width' cannot be None in images"),
            ("images", {"id": "7"}, "'id' cannot be '7' in images"),
            ("images", {"file_name": 5}, "'file_name' cannot be 5 in images"),
            ("annotations", {"image_id": [3]}, r"'image_id' cannot be \[3\] in annotations"),
            ("categories", {"id": 1}, "2 entries of categories have the id 1"),
            ("images", {"id": 3}, "2 entries of images have the id 3"),
        ],
    )
    def test_entries_of_the_wrong_kind_raise(self, tmp_path, key, change, words):
        content = coco_content()
        content[key][0] |= change
        with pytest.raises(DatasetError, match=words):
            open_dataset(self.write(tmp_path, content))
        content[key][0] = 5
        with pytest.raises(DatasetError, match=f"an entry of {key} is 5, not an object"):
            open_dataset(self.write(tmp_path, content))

    @pytest.mark.parametrize("area", [float("nan"), -3.0])
    def test_an_area_that_cannot_be_is_that_of_the_box(self, tmp_path, area):
        content = coco_content()
        content["annotations"][0]["area"] = area
        assert open_dataset(self.write(tmp_path, content)).annotation(1).areas.tolist() == [300, 25]

    def test_images_that_are_nowhere_raise(self, tmp_path):
        file = self.write(tmp_path, coco_content())
        for image in (tmp_path / "val2017").iterdir():
            image.unlink()
        with pytest.raises(
            DatasetError, match=r"none of the images of .* is there; looked in .*val"
        ):
            open_dataset(file)

    @pytest.mark.parametrize(
        ("text", "words"),
        [("{", "is not JSON"), ("[]", "no list of images"), ('{"images": [{}]}', "has no 'id'")],
    )
    def test_a_file_that_is_not_coco_raises(self, tmp_path, text, words):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DatasetError, match=words):
            open_dataset(tmp_path / "a.json")


class TestDarknet:
    def write(self, root: Path, labels: str, beside: bool = False) -> Path:
        write_image(root / "images" / "a.png", 200, 100)
        write_image(root / "images" / "b.png", 200, 100)
        folder = root / ("images" if beside else "labels")
        folder.mkdir(exist_ok=True)
        (folder / "a.txt").write_text(labels)
        (folder / "b.txt").write_text("")
        (root / "val.txt").write_text("images/a.png\nimages/b.png\n")
        (root / "x.names").write_text("one\ntwo\n")
        (root / "x.data").write_text("classes=2\nvalid = val.txt\nnames=x.names\nbackup = b/\n")
        return root / "x.data"

    @pytest.mark.parametrize("split", [None, "val", "valid"])
    @pytest.mark.parametrize("beside", [False, True])
    def test_normalised_centres_become_pixels(self, tmp_path, split, beside):
        dataset = open_dataset(self.write(tmp_path, "1 0.5 0.5 0.25 0.5\n", beside), split)
        assert dataset.class_names == ("one", "two")
        annotation = dataset.annotation(0)
        np.testing.assert_allclose(annotation.boxes, [[75, 25, 125, 75]])
        assert annotation.class_ids.tolist() == [1]
        assert annotation.areas.tolist() == [2500]
        assert dataset.annotation(1).boxes.shape == (0, 4)

    def test_broken_labels_are_dropped_or_clipped_and_named(self, tmp_path):
        data = self.write(tmp_path, "0 0.9 0.5 0.4 1\n2 .5 .5 .1 .1\n0 .5 .5\n1 .5 .5 0 .1\nx y\n")
        (tmp_path / "val.txt").write_text("images/a.png\nimages/b.png\nimages/none.png\n")
        (tmp_path / "labels" / "b.txt").unlink()
        with pytest.warns(DatasetWarning, match="7 problems"):
            dataset = open_dataset(data)
        np.testing.assert_allclose(dataset.annotation(0).boxes, [[140, 0, 200, 100]], rtol=1e-6)
        assert len(dataset) == 2

    def test_what_is_not_there_is_one_error(self, tmp_path):
        data = self.write(tmp_path, "")
        with pytest.raises(DatasetError, match="no split 'train'; it has: valid"):
            open_dataset(data, "train")
        data.write_text(data.read_text().replace("classes=2", "classes=80"))
        with pytest.raises(DatasetError, match=r"says classes=80, but x\.names has 2 names"):
            open_dataset(data)
        data.write_text(data.read_text().replace("classes=80", "classes=2"))
        (tmp_path / "x.names").unlink()
        with pytest.raises(DatasetError, match=r"names x\.names, which is not there"):
            open_dataset(data)

    def test_files_beside_the_data_file_go_before_those_of_the_working_directory(
        self, tmp_path, monkeypatch
    ):
        data = self.write(tmp_path, "1 0.5 0.5 0.25 0.5\n")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "x.names").write_text("three\nfour\n")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert open_dataset(data).class_names == ("one", "two")
        monkeypatch.chdir(tmp_path)  # where Darknet would be started
        (tmp_path / "cfg").mkdir()
        data.rename(tmp_path / "cfg" / "x.data")
        assert len(open_dataset("cfg/x.data")) == 2


def test_a_path_that_is_no_data_set_raises(tmp_path):
    with pytest.raises(DatasetError, match="no data set at"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DatasetError, match="is no data set: a VOC folder has"):
        open_dataset(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DatasetError, match=r"neither a COCO \.json nor a Darknet \.data"):
        open_dataset(tmp_path / "a.csv")


def test_sound_annotations_warn_of_nothing(tmp_path):
    write_voc(tmp_path, "a", voc_object("dog", (0, 0, 100, 50)))  # 0-based, as some tools write
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset(tmp_path).annotation(0).boxes.tolist() == [[0, 0, 100, 50]]


class TestSizes:
    def test_as_annotated_until_the_image_is_read(self, tmp_path):
        write_voc(tmp_path, "a", voc_object("dog", (1, 1, 9, 9)), size=(101, 51))  # it is 100 x 50
        dataset = open_dataset(tmp_path)
        assert dataset.size(0) == (51, 101)
        dataset.read_image(0)
        assert dataset.size(0) == (50, 100)

    def test_of_coco_and_darknet(self, tmp_path, monkeypatch):
        coco = TestCoco().write(tmp_path / "coco", coco_content())
        assert open_dataset(coco).size(1) == (50, 100)
        darknet = open_dataset(TestDarknet().write(tmp_path, "1 0.5 0.5 0.25 0.5\n"))
        assert darknet.size(0) == (100, 200)  # read, as nothing notes it
        other = open_dataset(tmp_path / "x.data")
        monkeypatch.setattr(type(other), "read_image", lambda *_: pytest.fail("was read"))
        annotation = other.annotation(0, (10, 20))
        assert annotation.boxes.tolist() == [[7.5, 2.5, 12.5, 7.5]]
        assert annotation.areas.tolist() == [25] and not annotation.normalized


class TestSeveral:
    def voc(self, root: Path, split: str, *objects: tuple[str, str]) -> Path:
        """A VOC folder with images named after the first of each pair, with an object of the
        second.
        """
        for number, (image_id, name) in enumerate(objects):
            write_voc(root, image_id, voc_object(name, (1, 1, 10 + number, 9)))
        write_split(root, split, *(image_id for image_id, _ in objects))
        return root

    def test_voc_0712_in_the_layout_of_the_kit(self, tmp_path):
        kit = tmp_path / "VOCdevkit"
        first = self.voc(kit / "VOC2007", "trainval", ("000005", "dog"), ("000007", "cat"))
        second = self.voc(kit / "VOC2012", "trainval", ("2008_000001", "tvmonitor"))
        both = open_datasets([first, str(second)], "trainval")
        assert len(both) == 3 and both.class_names == VOC_NAMES
        assert [path.stem for path in both.image_paths] == ["000005", "000007", "2008_000001"]
        expected = [VOC_NAMES.index(name) for name in ("dog", "cat", "tvmonitor")]
        assert [both.annotation(i).class_ids.item() for i in range(3)] == expected
        assert both.split == "trainval" and both.path == first
        assert both.read_image(2).shape == (50, 100, 3) and both.size(2) == (50, 100)
        with pytest.raises(DatasetError, match="holds some: name VOC2007, VOC2012 in it"):
            open_dataset(kit)

    def test_one_is_the_set_itself(self, tmp_path):
        root = self.voc(tmp_path, "train", ("a", "zebra"))
        alone, listed = open_dataset(root, "train"), open_datasets([root], "train")
        assert listed.image_paths == alone.image_paths and listed.problems == alone.problems
        assert listed.class_names == ("zebra",)

    def test_each_may_have_its_own_split(self, tmp_path):
        root = self.voc(tmp_path, "train", ("a", "dog"))
        write_voc(root, "b", voc_object("cat", (1, 1, 9, 9)))
        write_split(root, "val", "b")
        both = open_datasets([root, root], ["train", "val"])
        assert [path.stem for path in both.image_paths] == ["a", "b"]
        assert both.split == "train, val"
        with pytest.raises(DatasetError, match="split 'val', is given twice"):
            open_datasets([root, root / "." / "JPEGImages" / ".."], "val")
        with pytest.raises(DatasetError, match=r"1 split\(s\) were given for 2 data set"):
            open_datasets([root, root], ["val"])
        with pytest.raises(DatasetError, match=r"0 split\(s\) were given for 0 data set"):
            open_datasets([], "val")
        with pytest.raises(TypeError, match="must be a sequence of paths"):
            open_datasets(str(root), "val")

    def test_images_of_one_name_are_kept_apart(self, tmp_path):
        first = self.voc(tmp_path / "one", "train", ("a", "dog"))
        second = self.voc(tmp_path / "two", "train", ("b", "dog"), ("a", "cat"))
        both = open_datasets([first, second], "train")
        assert len(set(both.image_paths)) == 3
        assert both.annotation(0).class_ids.item() == VOC_NAMES.index("dog")
        assert both.annotation(2).class_ids.item() == VOC_NAMES.index("cat")
        assert both.annotation(2).boxes.tolist() == [[0, 0, 11, 9]]

    def test_classes_found_in_annotations_are_joined_in_the_order_seen(self, tmp_path):
        first = self.voc(tmp_path / "one", "train", ("a", "zebra"), ("b", "apple"))
        second = self.voc(tmp_path / "two", "train", ("c", "zebra"), ("d", "aardvark"))
        both = open_datasets([first, second], "train")
        assert both.class_names == ("apple", "zebra", "aardvark")
        assert [both.annotation(i).class_ids.item() for i in range(4)] == [1, 0, 1, 2]
        (first / "classes.txt").write_text("zebra\napple\n")
        for paths, order in (([first, second], [0, 1, 0, 2]), ([second, first], [0, 2, 0, 1])):
            both = open_datasets(paths, "train")
            assert both.class_names == ("zebra", "apple", "aardvark")
            assert [both.annotation(i).class_ids.item() for i in range(4)] == order

    def test_written_lists_must_agree_but_for_their_order(self, tmp_path):
        first = self.voc(tmp_path / "one", "train", ("a", "dog"))
        second = self.voc(tmp_path / "two", "train", ("b", "dog"))
        (first / "classes.txt").write_text("cat\ndog\n")
        (second / "my.names").write_text("dog\ncat\n")
        both = open_datasets([first, second], "train")
        assert both.class_names == ("cat", "dog")
        assert [both.annotation(i).class_ids.item() for i in range(2)] == [1, 1]
        (second / "my.names").write_text("dog\ncat\ncow\n")
        with pytest.raises(DatasetError, match=r"one and .*two have different classes: .* 'cow'"):
            open_datasets([first, second], "train")
        forced = open_datasets([first, second], "train", ["dog", "pig"])
        assert forced.class_names == ("dog", "pig")
        assert [forced.annotation(i).class_ids.item() for i in range(2)] == [0, 0]

    def test_formats_and_their_problems_side_by_side(self, tmp_path):
        """Each set warns of its own problems, and each problem names its set."""
        voc = self.voc(tmp_path / "voc", "val", ("a", "two"), ("b", "unicorn"))
        write_voc(voc, "c", voc_object("one", (5, 5, 5, 20)))
        write_split(voc, "val", "a", "b", "c", "d")
        (voc / "classes.txt").write_text("two\none\n")
        data = TestDarknet().write(tmp_path / "darknet", "1 0.5 0.5 0.25 0.5\n7 0.5 0.5 1 1\n")
        content = coco_content()
        content["categories"] = [{"id": 90, "name": "one"}, {"id": 1, "name": "two"}]
        content["annotations"][0]["bbox"] = [0, 0, 0, 9]
        coco = TestCoco().write(tmp_path / "coco", content)
        with pytest.warns(DatasetWarning) as caught:
            mixed = open_datasets([voc, data, coco], "val")
        assert [str(w.message).split(":")[0] for w in caught] == [
            f"3 problems in the annotations of {voc}",
            f"1 problem in the annotations of {data}",
            f"1 problem in the annotations of {coco}",
        ]
        assert len(mixed.problems) == 5
        for problem, source in zip(mixed.problems, [voc] * 3 + [data, coco], strict=True):
            assert problem.startswith(f"{source}: ")
        assert mixed.class_names == ("two", "one") and len(mixed) == 3 + 2 + 2
        found = [mixed.annotation(i) for i in range(7)]
        assert [a.class_ids.tolist() for a in found] == [[0], [], [], [0], [], [], [0]]
        np.testing.assert_allclose(found[3].boxes, [[75, 25, 125, 75]])  # normalised, in the file
        assert found[6].boxes.tolist() == [[0, 0, 5, 5]]
        assert mixed.image_ids == () and mixed.category_ids == ()

    def test_several_of_coco_keep_ids_that_stay_unique(self, tmp_path):
        first = TestCoco().write(tmp_path / "one", coco_content())
        content = coco_content()
        for image in content["images"]:
            image["id"] += 100
        for annotation in content["annotations"]:
            annotation["image_id"] += 100
        second = TestCoco().write(tmp_path / "two", content)
        both = open_datasets([first, second])
        assert both.image_ids == (7, 3, 107, 103) and both.category_ids == (1, 90)
        assert both.annotation(3).boxes.tolist() == both.annotation(1).boxes.tolist()
        same_ids = TestCoco().write(tmp_path / "three", coco_content())
        assert open_datasets([first, same_ids]).image_ids == ()

    @pytest.mark.filterwarnings("ignore::yolov4_fast.datasets.DatasetWarning")
    def test_bccd_in_halves_is_bccd(self, bccd):
        whole, halves = open_dataset(bccd, "trainval"), open_datasets([bccd] * 2, ["train", "val"])
        assert sorted(whole.image_paths) == sorted(halves.image_paths)
        assert len(whole.problems) == len(halves.problems)
        assert halves.class_names == whole.class_names
