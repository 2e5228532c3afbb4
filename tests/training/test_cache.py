"""Pictures kept in memory and on disk: right, reused, and rebuilt when a source has changed."""

import os
import pickle
import resource
import signal

import numpy as np
import pytest

from training.cache import MAGIC, MappedPictures, Picture, in_memory, on_disk


class Source:
    """Files on disk, "decoded" to a picture of as many levels; counts how often."""

    def __init__(self, folder, count=5):
        self.paths = [folder / f"{number}.png" for number in range(count)]
        for number, path in enumerate(self.paths):
            path.write_bytes(bytes(number + 1))
        self.decoded: list[int] = []

    def load(self, index: int) -> Picture:
        self.decoded.append(index)
        level = self.paths[index].stat().st_size
        image = np.full((3 + index, 4, 3), level, np.uint8)
        image[0, 0] = (1, 2, 3)
        return Picture(image, 30 + index, 40)

    def taken(self) -> list[int]:
        decoded, self.decoded = sorted(self.decoded), []
        return decoded


@pytest.fixture
def source(tmp_path) -> Source:
    return Source(tmp_path)


def assert_right(pictures, source) -> None:
    assert len(pictures) == len(source.paths)
    for index, path in enumerate(source.paths):
        image, height, width = pictures[index]
        assert image.dtype == np.uint8 and image.shape == (3 + index, 4, 3)
        assert (height, width) == (30 + index, 40)
        assert image[0, 0].tolist() == [1, 2, 3] and (image[1:] == path.stat().st_size).all()


def test_memory_takes_the_first_that_fit(source):
    assert_right(in_memory(5, source.load, 10_000), source)
    first = in_memory(5, source.load, (3 + 4 + 5) * 12)
    assert list(first) == [0, 1, 2]
    assert in_memory(5, source.load, 35) == {}
    assert in_memory(0, source.load, 35) == {}


def test_a_file_is_written_once_and_used_again(source, tmp_path):
    file = tmp_path / "cache" / "pictures"
    assert_right(on_disk(file, source.paths, (8, 8), source.load), source)
    assert source.taken() == [0, 1, 2, 3, 4]
    written = file.stat()
    assert_right(on_disk(file, source.paths, (8, 8), source.load), source)
    assert source.taken() == []
    again = file.stat()
    assert (again.st_mtime_ns, again.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert os.listdir(file.parent) == ["pictures"]


def test_some_of_the_pictures_in_another_order(source, tmp_path):
    file = tmp_path / "pictures"
    on_disk(file, source.paths, (8, 8), source.load)
    source.taken()
    pictures = on_disk(file, [source.paths[3], source.paths[1]], (8, 8), source.load)
    assert source.taken() == []
    assert [pictures[i].height for i in range(2)] == [33, 31]


@pytest.mark.parametrize("change", ["content", "time", "path"])
def test_only_what_has_changed_is_decoded_again(source, tmp_path, change):
    file = tmp_path / "pictures"
    before = on_disk(file, source.paths, (8, 8), source.load)
    source.taken()
    changed = source.paths[2]
    status = changed.stat()
    if change == "content":
        changed.write_bytes(bytes(99))
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        source.paths[2] = changed.rename(tmp_path / "renamed.png")
    pictures = on_disk(file, source.paths, (8, 8), source.load)
    assert source.taken() == [2]
    assert_right(pictures, source)
    assert before[2].image[1, 0, 0] == 3  # who maps the old file goes on with it
    on_disk(file, source.paths, (8, 8), source.load)
    assert source.taken() == []


def test_another_size_decodes_all_again(source, tmp_path):
    file = tmp_path / "pictures"
    on_disk(file, source.paths, (8, 8), source.load)
    source.taken()
    on_disk(file, source.paths, (8, 9), source.load)
    assert source.taken() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "index", "offset"])
def test_a_damaged_file_is_written_anew(source, tmp_path, damage):
    file = tmp_path / "pictures"
    on_disk(file, source.paths, (8, 8), source.load)
    source.taken()
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut": content[:-20],
            "empty": b"",
            "other": b"something else entirely, and longer than a head",
            "index": content.replace(b'"pictures"', b'"pixels"  '),
            "offset": content[: len(MAGIC)] + (40).to_bytes(8, "little") + content[-300:],
        }[damage]
    )
    assert_right(on_disk(file, source.paths, (8, 8), source.load), source)
    assert source.taken() == [0, 1, 2, 3, 4]


def test_a_picture_without_pixels_is_kept_too(tmp_path):
    """It can stand for a file that cannot be decoded."""
    source = tmp_path / "broken.png"
    source.write_bytes(b"nothing")
    nothing = Picture(np.empty((0, 0, 3), np.uint8), 0, 0)
    for load in (lambda _: nothing, lambda _: pytest.fail("decoded again")):
        image, height, width = on_disk(tmp_path / "pictures", [source], (8, 8), load)[0]
        assert image.shape == (0, 0, 3) and (height, width) == (0, 0)


def test_an_error_while_decoding_leaves_nothing_behind(source, tmp_path):
    file = tmp_path / "cache" / "pictures"

    def load(index):
        if index == 3:
            raise ValueError("3.png is not a readable image")
        return source.load(index)

    with pytest.raises(ValueError, match=r"3\.png is not"):
        on_disk(file, source.paths, (8, 8), load)
    assert os.listdir(file.parent) == []
    source.paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        on_disk(file, source.paths, (8, 8), source.load)


def test_a_full_disk_is_one_clear_error(source, tmp_path):
    """A limit on the size of files stands for the disk."""
    file = tmp_path / "cache" / "pictures"

    def load(index):
        return Picture(np.zeros((1000, 1000, 3), np.uint8), 1000, 1000)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"5 pictures take about 0\.0 GB .* not on disk"
        ) as caught:
            on_disk(file, source.paths, (8, 8), load)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(file)
    assert os.listdir(file.parent) == []


def test_a_copy_in_another_process_maps_the_same_file(source, tmp_path):
    pictures = on_disk(tmp_path / "pictures", source.paths, (8, 8), source.load)
    packed = pickle.dumps(pictures)
    assert len(packed) < 2000
    copy = pickle.loads(packed)
    assert isinstance(copy, MappedPictures)
    assert_right(copy, source)
    assert list(copy) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        copy[0].image[0, 0] = 0
