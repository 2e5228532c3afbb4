"""decode, each implementation against the definition written out one cell at a time."""

import math

import numpy as np
import pytest
import torch

from yolov4_fast.ops import decode

IMPLEMENTATIONS = ("extension", "reference")
ANCHORS = (((10.0, 14.0), (23.0, 27.0), (37.0, 58.0)), ((81.0, 82.0), (135.0, 169.0)))
SCALES = (1.2, 1.05)
HEIGHT, WIDTH = 48, 80
SHAPES = ((6, 10), (3, 5))  # of the two maps


def random_maps(batch=2, classes=4, seed=0, new_coords=False):
    """Objectness spread around the threshold, one cell in four likely."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for anchors, shape in zip(ANCHORS, SHAPES, strict=True):
        size = (batch, len(anchors) * (5 + classes), *shape)
        raw = torch.randn(size, generator=generator) * 2 - 1
        maps.append(raw.sigmoid() if new_coords else raw)
    return maps


def run(maps, confidence, implementation="extension", new_coords=False, **arguments):
    return decode(
        maps, ANCHORS, SCALES, (new_coords,) * 2, HEIGHT, WIDTH, confidence,
        implementation=implementation, **arguments,
    )  # fmt: skip


def definition(maps, confidence, image, new_coords=False):
    """(box, score, class) of one image in order, boxes relative to the network's input."""

    def probability(x):
        return x if new_coords else 1 / (1 + math.exp(-x))

    confidence = float(np.float32(confidence))
    for raw, anchors, scale in zip(maps, ANCHORS, SCALES, strict=True):
        height, width = raw.shape[2:]
        cells = raw[image].view(len(anchors), -1, height, width).double()
        for a, i, j in np.ndindex(len(anchors), height, width):
            tx, ty, tw, th, to, *classes = cells[a, :, i, j].tolist()
            if not np.float32(probability(to)) > confidence:
                continue
            x = (probability(tx) * scale - (scale - 1) / 2 + j) / width
            y = (probability(ty) * scale - (scale - 1) / 2 + i) / height
            w = (4 * tw**2 if new_coords else math.exp(tw)) * anchors[a][0] / WIDTH
            h = (4 * th**2 if new_coords else math.exp(th)) * anchors[a][1] / HEIGHT
            for c, tc in enumerate(classes):
                score = np.float32(probability(to) * probability(tc))
                if score > confidence:
                    yield (x - w / 2, y - h / 2, x + w / 2, y + h / 2), score, c


def assert_same(result, expected):
    """result: Candidates of a batch. expected: a list of (box, score, class) for each image."""
    assert result.counts.tolist() == [len(image) for image in expected]
    for b, image in enumerate(expected):
        count = len(image)
        boxes = torch.tensor([box for box, _, _ in image]).reshape(-1, 4)
        scores = torch.tensor([float(score) for _, score, _ in image])
        torch.testing.assert_close(result.boxes[b, :count], boxes, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.scores[b, :count], scores, rtol=0, atol=1e-7)
        assert result.class_ids[b, :count].tolist() == [c for _, _, c in image]
        assert (result.boxes[b, count:] == 0).all() and (result.scores[b, count:] == 0).all()
        assert (result.class_ids[b, count:] == -1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("confidence", [0.0, 0.001, 0.25, 0.7])
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (2, 4), (3, 17)])
def test_matches_the_definition(implementation, new_coords, confidence, batch, classes):
    maps = random_maps(batch, classes, new_coords=new_coords)
    expected = [list(definition(maps, confidence, b, new_coords)) for b in range(batch)]
    assert any(expected)
    assert_same(run(maps, confidence, implementation, new_coords), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_classes_of_one_cell(implementation):
    maps = [torch.full_like(raw, -20.0) for raw in random_maps(1)]
    maps[0][0, 9 + 4, 2, 3] = 20.0  # second anchor, row 2, column 3
    maps[0][0, 9 + 5 : 9 + 8, 2, 3] = torch.tensor([3.0, -3.0, 2.0])
    result = run(maps, 0.25, implementation)
    assert result.class_ids.tolist() == [[0, 2]] and result.counts.tolist() == [2]
    assert torch.equal(result.boxes[0, 0], result.boxes[0, 1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_confidence_is_strict(implementation):
    """Every score in turn as the confidence: what lies over it stays, what equals it goes."""
    maps = random_maps(1)
    everything = run(maps, 0.2, implementation)
    scores = everything.scores[0]
    for confidence in sorted(scores.tolist())[:: max(1, len(scores) // 40)]:
        over = scores > confidence
        result = run(maps, confidence, implementation)
        assert torch.equal(result.scores[0], scores[over])
        assert torch.equal(result.boxes[0], everything.boxes[0, over])
    maps = [torch.zeros_like(raw) for raw in maps]
    for raw in maps:
        raw.view(1, -1, 9, *raw.shape[2:])[:, :, 5:] = 40.0  # objectness and score are exactly 0.5
    assert run(maps, 0.5, implementation).counts.tolist() == [0]
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert run(maps, below, implementation).counts.tolist() == [(3 * 60 + 2 * 15) * 4]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_objectness_is_strict_by_itself(implementation):
    """With new_coords a class may be over 1: the score passes where the objectness does not."""
    maps = [torch.zeros_like(raw) for raw in random_maps(1)]
    maps[0][0, 5, 0, :2] = 2.0
    maps[0][0, 4, 0, :2] = torch.tensor([0.25, 0.26])
    result = run(maps, 0.25, implementation, new_coords=True)
    assert result.scores.tolist() == [[pytest.approx(0.52)]]


@pytest.mark.parametrize("confidence", [0.001, 0.25, 0.9])
def test_extension_equals_reference_on_many_cells(confidence):
    """Over 40,000 cells, enough for roundings to matter: the same candidates, to the last bit."""
    maps = [torch.randn(1, 27, 96, 150) * 3 - 2, torch.randn(1, 18, 48, 75) * 3]
    fast, slow = run(maps, confidence), run(maps, confidence, "reference")
    assert fast.counts.item() > 100
    assert torch.equal(fast.class_ids, slow.class_ids) and torch.equal(fast.counts, slow.counts)
    torch.testing.assert_close(fast.scores, slow.scores, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(fast.boxes, slow.boxes, rtol=2.4e-7, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_matter(implementation):
    maps = random_maps(2)
    expected = run(maps, 0.25, implementation)
    channels_last = [raw.to(memory_format=torch.channels_last) for raw in maps]
    wide = [torch.full((2, raw.shape[1], 9, 20), torch.nan) for raw in maps]
    cut = []
    for raw, space in zip(maps, wide, strict=True):
        view = space[:, :, : raw.shape[2], : 2 * raw.shape[3] : 2]
        cut.append(view.copy_(raw))
    for views in (channels_last, cut):
        assert not any(view.is_contiguous() for view in views)
        for got, want in zip(run(views, 0.25, implementation), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_number_of_threads_does_not_change_the_result(layout):
    maps = [torch.randn(2, 27, 96, 150), torch.randn(2, 18, 48, 75)]
    maps = [raw.to(memory_format=layout) for raw in maps]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(run(maps, 0.4))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_placement(implementation):
    maps = random_maps(2)
    place = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 1.5, -0.5, -0.25]])
    plain, placed = (
        run(maps, 0.25, implementation),
        run(maps, 0.25, implementation, placement=place),
    )
    assert torch.equal(placed.boxes[0], plain.boxes[0])
    count = plain.counts[1]
    expected = plain.boxes[1, :count] * place[1, [0, 1, 0, 1]] + place[1, [2, 3, 2, 3]]
    torch.testing.assert_close(placed.boxes[1, :count], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_capacity(implementation):
    maps = random_maps(2)
    free = run(maps, 0.25, implementation)
    most = int(free.counts.max())
    roomy = run(maps, 0.25, implementation, capacity=most + 7)
    assert roomy.boxes.shape == (2, most + 7, 4)
    assert torch.equal(roomy.boxes[:, :most], free.boxes)
    assert (roomy.class_ids[:, most:] == -1).all()
    tight = run(maps, 0.25, implementation, capacity=3)
    assert torch.equal(tight.boxes, free.boxes[:, :3])
    assert torch.equal(tight.class_ids, free.class_ids[:, :3])
    assert torch.equal(tight.counts, free.counts)  # how many there were


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_found(implementation):
    maps = [torch.full_like(raw, -9.0) for raw in random_maps(2)]
    result = run(maps, 0.25, implementation)
    assert result.boxes.shape == (2, 0, 4) and result.counts.tolist() == [0, 0]
    result = run([raw[:0] for raw in maps], 0.25, implementation)
    assert result.boxes.shape == (0, 0, 4) and result.counts.shape == (0,)
    assert run(random_maps(1), 1.0, implementation).counts.tolist() == [0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("confidence", [0.0, 0.25])
@pytest.mark.parametrize("channel", range(6))
def test_nan_is_never_a_candidate(implementation, confidence, channel):
    maps = [torch.full_like(raw, -200.0) for raw in random_maps(1)]
    maps[1][0, :9, 1, 1] = 1.0
    assert run(maps, confidence, implementation).counts.tolist() == [4]
    maps[1][0, channel, 1, 1] = torch.nan
    assert run(maps, confidence, implementation).counts.tolist() == [3 if channel == 5 else 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_values(implementation):
    maps = [torch.full_like(raw, -torch.inf) for raw in random_maps(1)]
    assert run(maps, 0.0, implementation).counts.tolist() == [0]
    maps[0][0, :9, 1, 1] = torch.tensor([0.0, 0, 0, 0, torch.inf, torch.inf, 1, 2, -torch.inf])
    result = run(maps, 0.25, implementation)
    assert result.class_ids.tolist() == [[0, 1, 2]] and result.scores[0, 0] == 1
    maps[0][0, 2, 1, 1] = 1000.0  # exp overflows: no box
    assert run(maps, 0.25, implementation).counts.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"maps": []}, "0 maps"),
        ({"scale_x_y": (1.0,)}, "2, 1 and 2"),
        ({"maps": [raw.double() for raw in random_maps()]}, "float64"),
        ({"maps": [random_maps(1)[0], random_maps(2)[1]]}, "map 1 must be"),
        ({"maps": [torch.zeros(1, 26, 6, 10), torch.zeros(1, 18, 3, 5)]}, "26 channels of map 0"),
        ({"maps": [torch.zeros(1, 15, 6, 10), torch.zeros(1, 18, 3, 5)]}, "15 channels of map 0"),
        ({"height": 0}, "not 0 and 80"),
        ({"confidence": 1.5}, "1.5"),
        ({"confidence": math.nan}, "nan"),
        ({"placement": torch.zeros(3, 4)}, r"\[3, 4\]"),
        ({"capacity": -1}, "-1"),
        ({"implementation": "slow"}, "slow"),
    ],
)
def test_bad_arguments_are_named(change, words):
    arguments = {
        "maps": random_maps(), "anchors": ANCHORS, "scale_x_y": SCALES, "new_coords": (False,) * 2,
        "height": HEIGHT, "width": WIDTH, "confidence": 0.25,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        decode(**(arguments | change))


def flat_arguments():
    flat = [side for anchors in ANCHORS for size in anchors for side in size]
    return [random_maps(), flat, [3, 2], list(SCALES), [False, False], HEIGHT, WIDTH, 0.25]


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (1, [1.0, 2.0], "2 in all"),
        (2, [3, 4], "18 channels of map 1"),
        (2, [3], "not 1, 2 and 2"),
        (7, -0.5, "not -0.5"),
    ],
)
def test_the_operator_itself_refuses_what_does_not_fit(position, value, words):
    arguments = flat_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.yolov4_fast.decode(*arguments)


@pytest.mark.parametrize("capacity", [0, 50])
def test_opcheck(capacity):
    arguments = (*flat_arguments(), torch.tensor([[1.0, 1, 0, 0]] * 2), capacity)
    torch.library.opcheck(torch.ops.yolov4_fast.decode.default, arguments)
