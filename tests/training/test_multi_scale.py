"""Sizes for multi-scale training."""

import pytest

from training.multi_scale import largest_size, multi_scale_size


def sizes(steps, seed=0, every=10, low=320, high=608, height=416, width=416, stride=32):
    return [multi_scale_size(seed, s, every, low, high, height, width, stride) for s in steps]


def test_the_size_stays_for_some_steps_and_follows_from_the_seed():
    drawn = sizes(range(200))
    assert all(len(set(drawn[start : start + 10])) == 1 for start in range(0, 200, 10))
    assert len(set(drawn)) > 5
    assert drawn == sizes(range(200)) != sizes(range(200), seed=1)
    assert len(set(sizes(range(10), every=1))) > 4


def test_all_multiples_between_the_bounds_are_drawn():
    widths = [width for _, width in sizes(range(0, 20_000, 10))]
    assert set(widths) == set(range(320, 609, 32))
    assert max(map(widths.count, set(widths))) < 1.4 * min(map(widths.count, set(widths)))
    assert {width for _, width in sizes(range(0, 900, 10), low=300, high=400)} == {320, 352, 384}


@pytest.mark.parametrize(("height", "width"), [(416, 416), (256, 320), (608, 320), (32, 640)])
@pytest.mark.parametrize("stride", [32, 64])
def test_the_height_keeps_the_proportion(height, width, stride):
    for got_height, got_width in sizes(
        range(0, 600, 10), height=height, width=width, stride=stride
    ):
        assert got_height % stride == got_width % stride == 0 and got_height > 0
        wanted = got_width * height / width
        assert abs(got_height - wanted) <= stride / 2 or got_height == stride


def test_the_largest():
    assert largest_size(320, 608, 416, 416, 32) == (608, 608)
    assert largest_size(320, 620, 256, 320, 32) == (480, 608)
    assert max(sizes(range(0, 3000, 10), height=256, width=320)) == (480, 608)


@pytest.mark.parametrize(("low", "high"), [(330, 350), (0, 20), (608, 320)])
def test_bounds_without_a_size_between_raise(low, high):
    with pytest.raises(ValueError, match=f"no multiple of 32 lies between .*{low} and {high}"):
        sizes([0], low=low, high=high)
