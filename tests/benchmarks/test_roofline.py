"""The floors that a plan is measured against."""

import torch

from benchmarks.roofline import Cost, Rates, cost, costs, measure_rates
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.plan import Convolution, Upsample
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.fold import without_normalisation
from yolov4_fast.network.layers import Network


def folded(name: str) -> Network:
    return without_normalisation(by_name(name).resized(416, 416))


def test_the_operations_of_a_plan_are_those_of_its_network():
    network = folded("yolov4")
    plan = lower(network)
    total = sum(c.operations for c in costs(plan, 1, 2))
    convolutions = sum(
        layer.operations(*shapes)
        for layer, shapes in zip(network.layers, network.input_shapes(), strict=True)
        if layer.name == "convolutional"
    )
    assert total == convolutions
    assert sum(c.operations for c in costs(plan, 8, 2)) == 8 * total


def test_bytes_of_single_steps():
    plan = lower(folded("yolov4"))
    first = next(step for step in plan.steps if isinstance(step, Convolution))
    assert cost(plan, first, 2, 2) == Cost(
        read=2 * 416 * 416 * 3 * 2,
        written=2 * 416 * 416 * 32 * 2,
        weights=3 * 3 * 3 * 32 * 2,
        operations=2 * 2 * 416 * 416 * 32 * 27,
    )
    upsampling = next(step for step in plan.steps if isinstance(step, Upsample))
    moved = cost(plan, upsampling, 1, 2)
    assert moved.written == 4 * moved.read and moved.operations == moved.weights == 0


def test_a_floor_is_the_larger_of_two_times():
    rates = Rates(copy=100, matrix=1000)
    assert Cost(50, 30, 20, 500).floor(rates) == 1.0
    assert Cost(50, 30, 20, 5000).floor(rates) == 5.0


def test_rates_are_measured():
    rates = measure_rates(torch.device("cpu"), torch.float32, gigabytes=0.01)
    assert rates.copy > 1e8 and rates.matrix > 1e8
