"""Matching the detections of two runs."""

import numpy as np
import pytest

from benchmarks.agreement import agreement
from yolov4_fast.detections import Detections


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(
        table[:, :4].copy(),
        table[:, 4].copy(),
        table[:, 5].astype(np.int32),
        ("a", "b"),
        (100, 100),
    )


def test_equal_runs_agree():
    run = [detections((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.5, 1)), detections()]
    result = agreement(run, run)
    assert (result.boxes, result.matched) == (2, 2)
    assert result.worst_overlap == pytest.approx(1) and result.worst_score == 0
    assert result.within(0)


def test_a_shifted_box_a_changed_class_and_a_lost_one_do_not_match():
    reference = [
        detections((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.5, 1), (50, 50, 90, 90, 0.4, 0))
    ]
    other = [detections((0, 0, 10, 12, 0.9, 0), (20, 20, 40, 40, 0.5, 0))]
    result = agreement(reference, other)
    assert (result.boxes, result.matched) == (3, 0)
    assert not result.within(1)


def test_scores_are_compared_and_low_ones_of_the_reference_left_out():
    reference = [detections((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.29, 1))]
    result = agreement(reference, [detections((0, 0, 10, 10, 0.88, 0))])
    assert (result.boxes, result.matched) == (1, 1)
    assert result.worst_score == pytest.approx(0.02, abs=1e-6)
    assert result.within(0.03) and not result.within(0.01)


def test_one_box_matches_once():
    reference = [detections((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 10, 0.8, 0))]
    assert agreement(reference, [detections((0, 0, 10, 10, 0.9, 0))]).matched == 1
