"""The decode kernels against the compiled operator, which tests/ops/test_decode.py checks.

Equal to the last bit in the interpreter, where both use this machine's exp; on a GPU nearly so.
"""

import math
from importlib import import_module
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from yolov4_fast.ops import decode
from yolov4_fast.ops.kernels.decode import BLOCK, append, raw_bound

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there
ANCHORS = (((10.0, 14.5), (23.1, 27.0), (37.0, 58.0)), ((81.0, 82.0), (135.0, 169.0)))
SCALES = (1.2, 1.05)
HEIGHT, WIDTH = 48, 80
SHAPES = ((4, 6), (2, 3))  # of the two maps


class Buffers(NamedTuple):
    boxes: Tensor
    scores: Tensor
    class_ids: Tensor
    numbers: Tensor
    counts: Tensor


def buffers(batch, room):
    """Full of values that no candidate has."""
    class_ids, numbers = torch.full((2, batch, room), -7, dtype=torch.int32, device=DEVICE)
    return Buffers(
        torch.full((batch, room, 4), torch.nan, device=DEVICE),
        torch.full((batch, room), torch.nan, device=DEVICE),
        class_ids,
        numbers,
        torch.full((batch,), 99, dtype=torch.int32, device=DEVICE),
    )


def random_maps(batch=2, classes=4, seed=0, new_coords=False, shapes=SHAPES, anchors=ANCHORS):
    """[B, A * (5 + C), h, w]: objectness around the threshold, one cell in four likely."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for sizes, shape in zip(anchors, shapes, strict=True):
        size = (batch, len(sizes) * (5 + classes), *shape)
        raw = torch.randn(size, generator=generator) * 2 - 2
        maps.append((raw.sigmoid() if new_coords else raw).to(DEVICE))
    return maps


def views(maps, dtype=torch.float32, padding=0):
    """The maps channels-last in rows of `padding` more channels, which hold NaN."""
    result = []
    for raw in maps:
        batch, channels, height, width = raw.shape
        shape = (batch, height, width, channels + padding)
        wide = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        wide[..., :channels] = raw.permute(0, 2, 3, 1)
        result.append(wide[..., :channels])
    return result


def appended(maps, confidence=0.25, room=700, new_coords=False, placement=None, anchors=ANCHORS):
    """Buffers filled from view tensors."""
    found = buffers(len(maps[0]), room)
    heads = len(maps)
    new = new_coords if isinstance(new_coords, tuple) else (new_coords,) * heads
    scales = (*SCALES, 1.1, 1.0, 2.0)[:heads]
    append(maps, anchors, scales, new, HEIGHT, WIDTH, confidence, placement, *found)
    return found


def expected_of(maps, confidence=0.25, new_coords=False, placement=None, anchors=ANCHORS):
    """What the extension finds in [B, C, h, w] maps of float32."""
    heads = len(maps)
    new = new_coords if isinstance(new_coords, tuple) else (new_coords,) * heads
    scales = (*SCALES, 1.1, 1.0, 2.0)[:heads]
    maps = [raw.float().cpu() for raw in maps]
    placement = None if placement is None else placement.cpu()
    return decode(
        maps, anchors, scales, new, HEIGHT, WIDTH, confidence, placement,
        implementation="extension",
    )  # fmt: skip


def close(a, b):
    if DEVICE == "cpu":
        assert torch.equal(a, b)
    else:  # exp of another library: a rounding to float32 may fall on the other side
        torch.testing.assert_close(a.cpu(), b, rtol=2.4e-7, atol=1e-7)


def assert_same(found, expected):
    """The same candidates of every image in the order of their numbers, and nothing beyond."""
    assert torch.equal(found.counts.cpu(), expected.counts)
    for image, count in enumerate(expected.counts.tolist()):
        numbers = found.numbers[image, :count]
        order = numbers.argsort()
        assert len(numbers.unique()) == count
        close(found.boxes[image, order], expected.boxes[image, :count])
        close(found.scores[image, order], expected.scores[image, :count])
        assert torch.equal(found.class_ids[image, order].cpu(), expected.class_ids[image, :count])
        assert found.boxes[image, count:].isnan().all()
        assert found.scores[image, count:].isnan().all()
        assert (found.class_ids[image, count:] == -7).all()
        assert (found.numbers[image, count:] == -7).all()


@pytest.mark.parametrize("new_coords", [False, True, (True, False)])
@pytest.mark.parametrize("confidence", [0.0, 0.001, 0.25, 0.4])
def test_matches_the_extension(new_coords, confidence):
    maps = random_maps(1 if confidence < 0.1 else 2, 3, new_coords=new_coords is True)
    found = appended(views(maps), confidence, 300, new_coords)
    expected = expected_of(maps, confidence, new_coords)
    assert expected.counts.min() > 0
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padding", [0, 5])
def test_maps_of_each_type_in_padded_rows(dtype, padding):
    maps = [raw.to(dtype).float() for raw in random_maps(2, 4)]
    found = appended(views(maps, dtype, padding))
    assert_same(found, expected_of(maps))


@pytest.mark.parametrize("classes", [1, 2, 80, 128, 129, 300])
def test_numbers_of_classes(classes):
    maps = random_maps(1, classes, seed=classes, shapes=((2, 3), (1, 2)))
    assert_same(appended(views(maps), 0.2, 4000), expected_of(maps, 0.2))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5])
def test_numbers_of_heads(heads):
    """Three heads share a launch; each has its own shape, anchors and classes."""
    anchors = tuple(
        tuple((7.0 * i + 3 + head, 11.0 + i) for i in range(head % 4 + 1)) for head in range(heads)
    )
    maps = []
    for head, sizes in enumerate(anchors):
        shape = ((5 - head, head + 1),)
        maps += random_maps(2, 2 + head, head, shapes=shape, anchors=(sizes,))
    new = tuple(head == 3 for head in range(heads))
    found = appended(views(maps), 0.2, 700, new, anchors=anchors)
    assert_same(found, expected_of(maps, 0.2, new, anchors=anchors))


def test_numbers_are_places_among_all_boxes_and_classes():
    maps = [torch.full_like(raw, -20.0) for raw in random_maps(1)]
    maps[0][0, 9 + 4, 2, 3] = 20.0  # second anchor, row 2, column 3
    maps[0][0, 9 + 5 + 2, 2, 3] = 3.0  # third of four classes
    maps[1][0, 4, 1, 1] = 20.0
    maps[1][0, 5, 1, 1] = 3.0
    found = appended(views(maps), 0.25, 4)
    first, second = (24 + 2 * 6 + 3) * 4 + 2, (3 * 24 + 1 * 3 + 1) * 4
    assert sorted(found.numbers[0, :2].tolist()) == [first, second]


def test_many_programs_share_the_work():
    """More anchors than a program of either kernel takes, nearly all of them empty."""
    maps = [torch.full((1, 27, 20, 21), -9.0, device=DEVICE)]
    maps[0][0, 4, ::6, ::4] = 3.0
    maps[0][0, 5 + 18 : 9 + 18, 19, 20] = 2.0
    maps[0][0, 4 + 18, 19, 20] = 2.0
    maps[0][0, 6, ::6, ::4] = 1.0
    assert 3 * 20 * 21 > 4 * BLOCK
    found = appended(views(maps), anchors=ANCHORS[:1])
    expected = expected_of(maps, anchors=ANCHORS[:1])
    assert expected.counts.tolist() == [4 * 6 + 4]
    assert_same(found, expected)


def test_a_program_takes_several_anchors(monkeypatch):
    monkeypatch.setattr("yolov4_fast.ops.kernels.decode.PROGRAMS", 6)  # three an image
    maps = random_maps(2, 2, seed=11)
    expected = expected_of(maps, 0.1)
    assert int(expected.counts.min()) > 12
    assert_same(appended(views(maps), 0.1), expected)


@pytest.mark.parametrize("room", [1, 7])
def test_overflow_writes_nothing_beyond_the_room_and_counts_all(room):
    maps = random_maps(2, 4, seed=3)
    everything = appended(views(maps))
    assert int(everything.counts.min()) > room
    wide = [part[0] for part in buffers(1, 2 * room + 100)[:4]]
    parts = [part[: 2 * room].view(2, room, *part.shape[1:]) for part in wide]
    found = Buffers(*parts, buffers(2, 1).counts)
    append(views(maps), ANCHORS, SCALES, (False,) * 2, HEIGHT, WIDTH, 0.25, None, *found)
    for part in wide:
        untouched = part[2 * room :]
        assert (untouched.isnan() if untouched.is_floating_point() else untouched == -7).all()
    assert torch.equal(found.counts, everything.counts)
    for image in range(2):
        rows = [everything.numbers[image].tolist().index(n) for n in found.numbers[image].tolist()]
        assert len(set(rows)) == room
        assert torch.equal(found.boxes[image], everything.boxes[image, rows])
        assert torch.equal(found.scores[image], everything.scores[image, rows])


def test_placement():
    maps = random_maps(2, 4, seed=5)
    place = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 1.5, -0.5, -0.25]], device=DEVICE)
    found = appended(views(maps), placement=place)
    assert_same(found, expected_of(maps, placement=place))


def test_confidence_is_strict():
    """Every few scores as the confidence: what lies over it stays, what equals it goes."""
    maps = random_maps(1, 2, seed=6)
    scores = expected_of(maps).scores[0].sort().values
    for confidence in scores[:: max(1, len(scores) // 4)].tolist():
        assert int(appended(views(maps), confidence).counts) == int((scores > confidence).sum())
    half = [torch.zeros_like(raw) for raw in random_maps(1, 4)]
    for raw in half:
        raw.view(1, -1, 9, *raw.shape[2:])[:, :, 5:] = 40.0  # objectness and score are exactly 0.5
    assert appended(views(half), 0.5).counts.tolist() == [0]
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert appended(views(half), below).counts.tolist() == [(3 * 24 + 2 * 6) * 4]


def test_objectness_is_strict_by_itself():
    """With new_coords a class may be over 1: the score passes where the objectness does not."""
    maps = [torch.zeros_like(raw) for raw in random_maps(1)]
    maps[0][0, 5, 0, :2] = 2.0
    maps[0][0, 4, 0, :2] = torch.tensor([0.25, 0.26])
    found = appended(views(maps), 0.25, 4, new_coords=True)
    assert found.counts.tolist() == [1] and found.scores[0, 0] == pytest.approx(0.52)


@pytest.mark.parametrize("new_coords", [False, True])
def test_bound_lets_through_whatever_passes(new_coords):
    """The raw values just at a threshold, where roundings decide: none that passes is left out."""
    for confidence in np.float32([0.0, 1e-30, 1e-3, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0]):
        bound = np.float32(raw_bound(float(confidence), new_coords))
        values = np.nextafter(bound, np.float32(-np.inf)) if np.isfinite(bound) else bound
        for raw in (bound, values):
            p = float(raw) if new_coords else 1 / (1 + math.exp(min(-float(raw), 700)))
            assert not np.float32(p) > confidence
        if 0 < confidence < 1 and np.isfinite(bound):
            exact = confidence if new_coords else math.log(confidence / (1 - confidence))
            assert abs(float(bound) - exact) < 1e-5 * max(1, abs(exact), 1 / (1 - confidence))


@pytest.mark.parametrize("confidence", [0.0, 0.25])
@pytest.mark.parametrize("channel", range(6))
def test_nan_is_never_a_candidate(confidence, channel):
    maps = [torch.full_like(raw, -200.0) for raw in random_maps(1)]
    maps[1][0, :9, 1, 1] = 1.0
    maps[1][0, channel, 1, 1] = torch.nan
    found = appended(views(maps), confidence, 9)
    assert found.counts.tolist() == [3 if channel == 5 else 0]
    assert_same(found, expected_of(maps, confidence))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_infinite_values():
    maps = [torch.full_like(raw, -torch.inf) for raw in random_maps(1)]
    assert appended(views(maps), 0.0, 4).counts.tolist() == [0]
    maps[0][0, :9, 1, 1] = torch.tensor([0.0, 0, 0, 0, torch.inf, torch.inf, 1, 2, -torch.inf])
    found = appended(views(maps), 0.25, 4)
    assert_same(found, expected_of(maps))
    assert found.counts.tolist() == [3] and found.scores[0].nan_to_num().max() == 1
    maps[0][0, 2, 1, 1] = 1000.0  # exp overflows: no box
    assert appended(views(maps), 0.25, 4).counts.tolist() == [0]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("side", range(4))
def test_one_infinite_corner_is_no_box(side):
    """A box from -3.3e38 to 3.5e38, the latter infinite in float32, or the other way round."""
    maps = [torch.full_like(raw, -20.0) for raw in random_maps(1, 1)]
    maps[0][0, :6, 1, 1] = torch.tensor([0.0, 0, 0, 0, 20, 20])
    axis = side % 2
    maps[0][0, 2 + axis, 1, 1] = math.log(6.8 * (WIDTH, HEIGHT)[axis] / ANCHORS[0][0][axis])
    center = float(expected_of(maps).boxes[0, 0, [axis, axis + 2]].mean())
    place = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=DEVICE)
    for shift, count in ((0.0, 1), (0.1 if side >= 2 else -0.1, 0)):
        place[0, axis], place[0, 2 + axis] = 1e38, (shift - center) * 1e38
        found = appended(views(maps), room=2, placement=place)
        assert found.counts.tolist() == expected_of(maps, placement=place).counts.tolist()
        assert found.counts.tolist() == [count]


def test_nothing_found_resets_the_counts():
    maps = [torch.full_like(raw, -9.0) for raw in random_maps(3)]
    found = appended(views(maps), room=2)
    assert found.counts.tolist() == [0, 0, 0] and found.scores.isnan().all()
    assert appended(views(random_maps(1)), 1.0, 2).counts.tolist() == [0]


@pytest.mark.parametrize("capacity", [0, 3, 40])
def test_decode_itself_asks_for_the_kernel(capacity):
    """Sorted, padded and cut as the extension does it."""
    maps = random_maps(2, 4, seed=8)
    maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
    arguments = (ANCHORS, SCALES, (False,) * 2, HEIGHT, WIDTH, 0.3)
    place = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 1.5, -0.5, -0.25]])
    found = decode(maps, *arguments, place, capacity, implementation="kernel")
    expected = decode([raw.cpu() for raw in maps], *arguments, place, capacity)
    assert 3 < int(expected.counts.max()) < 40
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        close(got, want)


def test_decode_finds_more_than_the_room_it_guessed(monkeypatch):
    monkeypatch.setattr(import_module("yolov4_fast.ops.decode"), "FIRST_ROOM", 5)
    maps = random_maps(2, 4, seed=9)
    arguments = (ANCHORS, SCALES, (False,) * 2, HEIGHT, WIDTH, 0.25)
    for capacity in (0, 2):
        found = decode(maps, *arguments, None, capacity, implementation="kernel")
        expected = decode([raw.cpu() for raw in maps], *arguments, None, capacity)
        assert int(expected.counts.max()) > 5
        for got, want in zip(found, expected, strict=True):
            close(got, want)
    empty = decode([raw[:0] for raw in maps], *arguments, implementation="kernel")
    assert empty.boxes.shape == (0, 0, 4) and empty.counts.shape == (0,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"maps": []}, "at least one map"),
        ({"maps": [raw.permute(0, 2, 3, 1) for raw in random_maps()]}, "map 0 must be a channel"),
        ({"maps": [views(random_maps())[0], views(random_maps(1))[1]]}, "batch of 2"),
        ({"maps": [views(random_maps())[0], views(random_maps())[1].half()]}, "float16"),
        ({"maps": [raw.double() for raw in views(random_maps())]}, "float64"),
        ({"anchors": (ANCHORS[0][:2], ANCHORS[1])}, "27 channels do not divide into 2 anchors"),
        ({"placement": torch.zeros(2, 3, device=DEVICE)}, r"placement must be \[2, 4\]"),
        ({"scores": torch.zeros(2, 8, device=DEVICE)[:, ::2]}, "scores .* contiguous"),
        ({"numbers": torch.zeros(2, 4, device=DEVICE)}, r"numbers must be \[2, 4\] torch.int32"),
        ({"counts": torch.zeros(2, 1, device=DEVICE)}, r"counts must be \[2\]"),
    ],
)
def test_bad_arguments_are_named(change, words):
    arguments = {
        "maps": views(random_maps()), "anchors": ANCHORS, "scale_x_y": SCALES,
        "new_coords": (False,) * 2, "height": HEIGHT, "width": WIDTH, "confidence": 0.25,
        "placement": None, **buffers(2, 4)._asdict(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        append(**(arguments | change))
