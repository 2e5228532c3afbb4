"""Calibration: thresholds, distances, sensitivities, and what stays in higher precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantized_network import HEAD_CONVOLUTION, folded, pictures, small_network

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.quantize import METHODS, quantize
from yolov4_fast.engines.quantize.calibrate import BINS, Histograms, histograms
from yolov4_fast.engines.quantize.distance import distance
from yolov4_fast.engines.quantize.emulate import (
    Emulation,
    filter_scales,
    round_filters,
    round_tensor,
    scale_of,
)
from yolov4_fast.engines.quantize.sensitivity import FAR, SHARE, kept, sensitivities
from yolov4_fast.network.layers import IMAGE


def of(values: np.ndarray) -> Histograms:
    """Histograms of one layer, the picture's."""
    largest = float(np.abs(values).max())
    counts = np.histogram(np.abs(values), BINS, (0, largest))[0].astype(float)
    return Histograms({IMAGE: largest}, {IMAGE: counts}, {IMAGE: IMAGE})


def test_thresholds_are_of_all_images_and_shared_where_scales_are() -> None:
    emulation, images = Emulation(*folded()), pictures(3)
    found = histograms(emulation, images, progress=False)
    outputs = [emulation.outputs(image) for image in images]
    for layer, threshold in found.thresholds("minmax").items():
        group = [other for other, first in found.first.items() if first == found.first[layer]]
        largest = max(float(each[i].abs().max()) for each in outputs for i in group if i in each)
        assert threshold == pytest.approx(largest)
    seen = sum(each[IMAGE].numel() for each in outputs)
    assert found.counts[IMAGE].sum() == seen
    assert found.thresholds("minmax")[4] == found.thresholds("minmax")[6]


def test_a_single_outlier_is_cut_off_by_all_but_minmax() -> None:
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[0] = 60.0
    found = {method: of(values).thresholds(method)[IMAGE] for method in METHODS}
    assert found["minmax"] == 60.0
    assert 4.2 < found["percentile"] < 4.7  # 4.42 is what one of 100,000 normal values exceeds
    assert 2.5 < found["entropy"] < 6.0


def test_entropy_keeps_what_is_spread_evenly() -> None:
    values = np.random.default_rng(0).uniform(-3, 3, 500_000)
    assert of(values).thresholds("entropy")[IMAGE] > 2.9


def test_no_image_and_no_number_are_told() -> None:
    with pytest.raises(EngineError, match="no calibration images: INT8 needs some"):
        quantize(*folded(), [])
    with pytest.raises(EngineError, match="activations of the calibration images are not finite"):
        quantize(*folded(), [pictures(1)[0] * float("nan")])


def test_rounding_is_to_the_nearest_step_and_to_8_bits() -> None:
    values = torch.tensor([0.0, 0.24, 0.26, -0.26, 0.75, 1.25, 100.0, -100.0])
    steps = torch.tensor([0.0, 0.0, 0.5, -0.5, 1.0, 1.0, 63.5, -64.0])
    assert round_tensor(values, 0.5).tolist() == steps.tolist()
    assert scale_of(127.0) == 1.0 and scale_of(0.0) == 2.0**-14
    assert scale_of(1.0) == float(np.float16(1 / 127))


def test_filters_are_rounded_each_by_its_own_largest() -> None:
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([1e-4, 0.1, 1.0, 30.0, 0.0]).view(-1, 1, 1, 1)
    scales = filter_scales(weight)
    assert torch.allclose(scales[:4], weight.abs().amax((1, 2, 3))[:4] / 127, rtol=0.06)
    error = (round_filters(weight) - weight).abs().amax((1, 2, 3))
    assert (error <= 0.51 * scales + 0.05 * weight.abs().amax((1, 2, 3)) * (scales < 1e-5)).all()


def test_distance_is_0_of_the_same_and_1_of_nothing_found() -> None:
    network, state = folded()
    emulation = Emulation(network, state)
    maps = emulation.maps(emulation.outputs(pictures(1)[0]))
    assert distance(network, maps, maps) == pytest.approx(0, abs=1e-6)
    nothing = [raw.clone() for raw in maps]
    for raw in nothing:
        raw.unflatten(1, (2, 8))[:, :, 4] = -50  # objectness
    assert distance(network, maps, nothing) == pytest.approx(1, abs=1e-3)
    little = [raw + 0.01 * torch.randn(raw.shape) for raw in maps]
    more = [raw + 0.1 * torch.randn(raw.shape) for raw in maps]
    assert 0 < distance(network, maps, little) < distance(network, maps, more) < 1


def test_only_what_depends_on_a_convolution_is_computed_again() -> None:
    network, state = folded()
    emulation, image = Emulation(network, state), pictures(1)[0]
    scales = quantize(network, state, [image], method="minmax", keep=()).scales
    exact = emulation.outputs(image)
    for index, layer in network.convolutions():
        source = layer.inputs[0]
        if source == 2:  # the sum reads it too, and would be rounded in the whole run
            continue
        whole = emulation.outputs(image, {source: scales[source]}, (index,))
        changed = emulation.changed(exact, scales, index)
        assert changed.keys() == whole.keys()
        assert all(torch.equal(changed[each], whole[each]) for each in whole)
        assert not torch.equal(changed[HEAD_CONVOLUTION], exact[HEAD_CONVOLUTION])


def test_the_convolution_that_rounding_harms_most_is_found_and_kept() -> None:
    network, state = folded()
    images = pictures(2)
    state["layers.14.conv.weight"][:, 0] *= 30  # one input outweighs the others of each channel
    quantised = quantize(network, state, images)
    found = quantised.sensitivity
    assert max(found, key=lambda each: found[each]) == 14
    assert set(found) == {index for index, _ in network.convolutions()}
    assert HEAD_CONVOLUTION in quantised.kept


def test_kept_are_those_far_above_the_mean_within_their_share() -> None:
    network = small_network()
    work = {
        index: layer.operations(*network.input_shapes()[index])
        for index, layer in network.convolutions()
    }
    share = {index: operations / sum(work.values()) for index, operations in work.items()}
    cheap = min(set(work) - {HEAD_CONVOLUTION}, key=lambda each: share[each])
    dear = max(work, key=lambda each: share[each])
    assert share[cheap] < SHARE < share[dear]
    flat = dict.fromkeys(work, 1.0)
    assert kept(network, flat) == {HEAD_CONVOLUTION}
    assert kept(network, flat | {cheap: 3 * FAR * len(work)}) == {HEAD_CONVOLUTION, cheap}
    assert kept(network, flat | {dear: 3 * FAR * len(work)}) == {HEAD_CONVOLUTION}


def test_sensitivities_are_the_mean_over_the_images() -> None:
    network, state = folded()
    emulation, images = Emulation(network, state), pictures(2)
    scales = quantize(network, state, images, method="minmax", keep=()).scales
    single = [sensitivities(emulation, scales, [image], progress=False) for image in images]
    both = sensitivities(emulation, scales, images, progress=False)
    for index, value in both.items():
        assert value == pytest.approx((single[0][index] + single[1][index]) / 2)
