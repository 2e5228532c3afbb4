"""Sources: everything that can be pointed at, and what is said about what cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from yolov4_fast.sources import frames, read_image, to_batch, to_image, to_pixels

RNG = np.random.default_rng(0)


@pytest.fixture
def picture() -> np.ndarray:
    return RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> Path:
    """Three pictures, one zero-byte, one text called .jpg, and a file that is none."""
    for name in ("b.png", "a.PNG", "c.bmp"):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def write_video(path: Path, count: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    for number in range(count):
        writer.write(np.full((48, 64, 3), number * 40, np.uint8))
    writer.release()


# read_image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_read_image(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"ünïcode picture.{suffix}"
    Image.fromarray(picture).save(path, lossless=True)
    image = read_image(path)
    np.testing.assert_array_equal(image, picture)
    assert image.flags.c_contiguous and image.flags.writeable


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [
        ("L", 70, (70, 70, 70)),
        ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
        ("1", 1, (255, 255, 255)),
        ("P", 3, None),
        ("LA", (50, 200), (50, 50, 50)),
        ("I;16", 0x4000, (0x40, 0x40, 0x40)),
    ],
)
def test_read_image_of_other_modes(tmp_path: Path, mode: str, value: Any, rgb: Any) -> None:
    image = Image.new(mode, (5, 4), value)
    image.save(tmp_path / "x.png")
    expected = rgb or image.convert("RGB").getpixel((0, 0))
    read = read_image(tmp_path / "x.png")
    assert read.shape == (4, 5, 3)
    assert read.dtype == np.uint8
    assert tuple(read[0, 0]) == tuple(expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    gradient = np.linspace(0, 255, 32 * 48).reshape(32, 48).astype(np.uint8)
    image = Image.fromarray(gradient)
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as opened:
        from_pil = to_image(opened)
    assert read.shape[:2] == ((32, 48) if orientation < 5 else (48, 32))
    assert np.abs(read.astype(int) - from_pil.numpy()).max() <= 3  # two JPEG decoders


def test_read_image_errors(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such image file: .*none\.jpg"):
        read_image(folder / "none.jpg")
    with pytest.raises(ValueError, match=r"empty\.jpg is not a readable image: .*zero bytes"):
        read_image(folder / "empty.jpg")
    with pytest.raises(ValueError, match=r"text\.jpg is not a readable image: .*decoded"):
        read_image(folder / "text.jpg")
    with pytest.raises(ValueError, match="is a folder, not an image file"):
        read_image(folder)


# frames


def test_folder_is_read_in_order_and_what_is_bad_is_skipped(
    folder: Path, picture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    source = frames(folder)
    assert len(source) == 5
    found = list(source)
    assert [Path(frame.name).name for frame in found] == ["a.PNG", "b.png", "c.bmp"]
    for frame in found:
        np.testing.assert_array_equal(frame.image, picture)
        assert frame.fps is None
    assert len(source.skipped) == 2
    assert "empty.jpg is not a readable image" in source.skipped[0]
    assert "text.jpg is not a readable image" in source.skipped[1]
    assert "skipped: " in caplog.text


def test_pictures_are_read_ahead_and_given_in_order(folder: Path, picture: np.ndarray) -> None:
    """Videos, arrays and what is skipped stand between them; the rest may be left unread."""
    write_video(folder / "d.avi", 2)
    for number in range(40):
        Image.fromarray(picture).save(folder / f"e{number:02}.png")
    found = [Path(frame.name).name for frame in frames(folder, picture, folder / "b.png")]
    assert found == [
        "a.PNG", "b.png", "c.bmp", "d.avi#0", "d.avi#1", *(f"e{n:02}.png" for n in range(40)),
        "image 46", "b.png",
    ]  # fmt: skip
    iterator = iter(frames(folder))
    assert Path(next(iterator).name).name == "a.PNG"
    iterator.close()  # type: ignore[attr-defined]


def test_a_named_file_that_is_bad_is_skipped_too(folder: Path) -> None:
    source = frames(folder / "text.jpg", str(folder / "a.PNG"))
    assert [Path(frame.name).name for frame in source] == ["a.PNG"]
    assert len(source.skipped) == 1


def test_glob(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.PNG").rename(folder / "sub" / "a.png")
    assert [Path(f.name).name for f in frames(str(folder / "*.png"))] == ["b.png"]
    assert [Path(f.name).name for f in frames(f"{folder}/**/*.png")] == ["b.png", "a.png"]


def test_a_file_whose_name_looks_like_a_glob(folder: Path) -> None:
    (folder / "b.png").rename(folder / "b[1].png")
    assert [Path(f.name).name for f in frames(str(folder / "b[1].png"))] == ["b[1].png"]


@pytest.mark.parametrize("name", ["none.png", "*.gif", "none/"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, folder, camera or stream"):
        frames(str(tmp_path / name))


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images or videos in the folder"):
        frames(tmp_path)


def test_video(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.avi", 4)
    found = list(frames(tmp_path / "clip.avi"))
    assert [frame.index for frame in found] == [0, 1, 2, 3]
    assert found[3].name.endswith("clip.avi#3")
    assert found[3].source.endswith("clip.avi")
    assert found[0].fps == pytest.approx(12)
    for number, frame in enumerate(found):
        assert frame.image.shape == (48, 64, 3)
        assert abs(frame.image.mean() - number * 40) < 4


def test_video_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "clip.avi").write_text("no video")
    source = frames(tmp_path / "clip.avi")
    assert list(source) == []
    assert "clip.avi cannot be opened as a video" in source.skipped[0]


@pytest.mark.parametrize("camera", ["987", 987])
def test_camera_that_is_not_there(camera: Any) -> None:
    source = frames(camera)
    assert list(source) == []
    assert source.skipped == ["camera 987 cannot be opened as a video"]


def test_stream_that_is_not_there() -> None:
    source = frames("http://127.0.0.1:9/stream.mjpg")
    assert list(source) == []
    assert "127.0.0.1:9/stream.mjpg cannot be opened" in source.skipped[0]


def test_images_in_memory(picture: np.ndarray) -> None:
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    found = list(frames(picture, tensor, tensor / 255, Image.fromarray(picture)))
    assert [frame.name for frame in found] == [f"image {number}" for number in range(4)]
    for frame in found:
        np.testing.assert_array_equal(frame.image, picture)


# to_image and to_batch


def test_arrays_and_tensors_are_not_copied(picture: np.ndarray) -> None:
    tensor = torch.from_numpy(picture)
    assert to_image(picture).data_ptr() == picture.ctypes.data
    assert to_image(tensor.permute(2, 0, 1)).data_ptr() == picture.ctypes.data
    crop = picture[2:9, 3:20]
    assert to_image(crop).data_ptr() == crop.ctypes.data
    assert torch.equal(to_image(crop), torch.from_numpy(crop))


def test_reversed_and_read_only_arrays(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(to_image(picture[..., ::-1]).numpy(), picture[..., ::-1])
    picture.flags.writeable = False
    np.testing.assert_array_equal(to_image(picture).numpy(), picture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_point_becomes_float32(picture: np.ndarray, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(picture).permute(2, 0, 1) / 255
    image = to_image(tensor.to(dtype).requires_grad_())
    assert image.dtype == torch.float32
    assert image.shape == (24, 32, 3)
    assert not image.requires_grad
    assert (image.permute(2, 0, 1) - tensor).abs().max() < 0.01


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA"])
def test_pil(picture: np.ndarray, mode: str) -> None:
    image = Image.fromarray(picture).convert(mode)
    np.testing.assert_array_equal(to_image(image).numpy(), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 5, 3), np.float32), r"a numpy array \[4, 5, 3\] float32"),
        (np.zeros((3, 4, 5), np.uint8), r"a numpy array \[3, 4, 5\] uint8"),
        (np.zeros((4, 5), np.uint8), r"\[4, 5\] uint8"),
        (np.zeros((4, 5, 4), np.uint8), r"\[4, 5, 4\] uint8"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\] uint8"),
        (torch.zeros(4, 5, 3), r"a tensor \[4, 5, 3\] torch.float32"),
        (torch.zeros(4, 4, 5), r"a tensor \[4, 4, 5\]"),
        (torch.zeros(1, 3, 4, 5), r"a tensor \[1, 3, 4, 5\]"),
        (torch.zeros(3, 0, 5), r"a tensor \[3, 0, 5\]"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "torch.int64"),
        (torch.full((3, 4, 5), 255.0), r"values in 255\.\.255"),
        (torch.full((3, 4, 5), -0.5), r"values in -0\.5"),
        (torch.full((3, 4, 5), torch.nan), "values in nan"),
        ([1, 2], "a list"),
        (None, "a NoneType"),
    ],
)
def test_refuses_with_what_would_be_right(image: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"picture 3 is .*{says}.*give a path, a PIL image"):
        to_image(image, "picture 3")


def test_to_pixels_is_the_inverse(picture: np.ndarray) -> None:
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    np.testing.assert_array_equal(to_pixels(to_image(tensor)), picture)
    np.testing.assert_array_equal(to_pixels(to_image(tensor / 255)), picture)


def test_to_batch(picture: np.ndarray) -> None:
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for one in ("x.jpg", Path("x.jpg"), picture, tensor, Image.fromarray(picture)):
        (image,) = to_batch(one)
        assert image is one
    assert to_batch(["x.jpg", picture]) == ["x.jpg", picture]
    assert len(list(to_batch(torch.zeros(5, 3, 4, 4)))) == 5
    assert len(list(to_batch(np.zeros((5, 4, 4, 3), np.uint8)))) == 5


def test_to_batch_asks_a_generator_for_nothing() -> None:
    asked: list[int] = []
    batch = iter(to_batch(asked.append(number) for number in range(3)))
    assert asked == []
    next(batch)
    assert asked == [0]


def test_only_floating_point_tensors_are_looked_into() -> None:
    """A uint8 tensor on a GPU is taken without waiting for it."""
    assert to_image(torch.empty(3, 4, 5, dtype=torch.uint8, device="meta")).shape == (4, 5, 3)
    with pytest.raises(RuntimeError, match="meta"):
        to_image(torch.empty(3, 4, 5, device="meta"))
