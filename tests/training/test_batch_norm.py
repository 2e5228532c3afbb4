"""Normalisation in training: over processes, across mini-batches, frozen. Two processes of gloo on
this machine stand for any number anywhere.
"""

import copy
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from training.batch_norm import BatchNorm, begin_batch, convert, frozen
from yolov4_fast.network.layers import IMAGE, Conv, Network, Route, Shortcut
from yolov4_fast.network.module import ConvBlock, NetworkModule
from yolov4_fast.ops.full_precision import full_precision

MOMENTUM = 0.3
PROCESSES = 2
# Where each runs: without a GPU kernels are interpreted.
IMPLEMENTATIONS = {"kernel": "cuda" if torch.cuda.is_available() else "cpu", "reference": "cpu"}


def conv(source: int, filters: int, size: int, activation: str, stride: int = 1) -> Conv:
    return Conv(inputs=(source,), filters=filters, size=size, stride=stride, activation=activation)


def network() -> Network:
    """Six convolutions, a shortcut and a concatenation, whose gradients are slices."""
    layers = (
        conv(IMAGE, 8, 3, "mish"),
        conv(0, 12, 3, "mish", 2),
        conv(1, 6, 1, "leaky"),
        conv(2, 12, 3, "mish"),
        Shortcut(inputs=(1, 3)),
        conv(4, 5, 1, "hard_swish"),
        Route(inputs=(4, 5)),
        conv(6, 7, 1, "linear"),
    )
    return Network(layers=layers, width=16, height=12, channels=3)


def make(dtype: torch.dtype = torch.float64) -> NetworkModule:
    torch.manual_seed(0)
    module = NetworkModule(network(), MOMENTUM)
    for block in module.modules():
        if isinstance(block, nn.BatchNorm2d):
            nn.init.uniform_(block.weight, 0.5, 1.5)
            nn.init.normal_(block.bias)
    return module.to(dtype).to(memory_format=torch.channels_last)


def pictures(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whose brightness differs from one to the next, so that it matters which are together."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 12, 16, generator=generator, dtype=torch.float64)
    images = images + torch.arange(count)[:, None, None, None]
    return images.to(dtype).to(memory_format=torch.channels_last)


def cost(output: Tensor) -> Tensor:
    """A sum over pictures, so that those of mini-batches and processes add up; cubes, as sums of a
    normalised map and of its squares hardly change.
    """
    weights = torch.linspace(-1, 2, output[0].numel(), dtype=torch.float64).view(output[0].shape)
    return (output.double() * weights.to(output.device)).sum() + (output.double() ** 3).sum()


class Outcome(NamedTuple):
    outputs: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(module: nn.Module, batches: list[Tensor]) -> Outcome:
    """One optimiser step's mini-batches, without the step."""
    module.train()
    begin_batch(module)
    outputs = []
    for images in batches:
        (output,) = module(images)
        cost(output).backward()
        outputs.append(output.detach())
    return Outcome(
        torch.cat(outputs),
        {name: p.grad.clone() for name, p in module.named_parameters()},
        {name: value.clone() for name, value in module.named_buffers()},
    )


def check(found: Outcome, expected: Outcome, tolerance: float = 1e-9) -> None:
    def near(a: Tensor, b: Tensor, what: str) -> None:
        a, b = a.cpu(), b.cpu()
        limit = tolerance * float(b.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(a, b, rtol=0, atol=limit, msg=lambda text: f"{what}: {text}")

    near(found.outputs, expected.outputs, "outputs")
    for name in expected.gradients:
        near(found.gradients[name], expected.gradients[name], name)
    for name in expected.buffers:
        near(found.buffers[name], expected.buffers[name], name)


# Several processes


class Scenario(NamedTuple):
    mode: str
    minibatches: list[int]  # pictures of each, over all processes
    dtype: torch.dtype = torch.float64


SCENARIOS = {
    "sync": Scenario("sync", [6]),
    "sync, shares that differ": Scenario("sync", [5]),
    "sync, float32": Scenario("sync", [6], torch.float32),
    "local": Scenario("local", [6]),
    "cross": Scenario("cross", [4, 3, 5]),
}


def share(images: Tensor, rank: int) -> Tensor:
    """Every PROCESSES-th picture, as the loader deals them out."""
    return images[rank::PROCESSES].contiguous(memory_format=torch.channels_last)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        module = make(scenario.dtype)
        convert(module, scenario.mode, len(scenario.minibatches))
        batches = pictures(sum(scenario.minibatches), scenario.dtype).split(scenario.minibatches)
        results[name] = step(module, [share(images, rank) for images in batches])._asdict()
        if name == "sync":
            results["frozen"] = frozen_step(module, share(batches[0], rank))
    module = make()
    convert(module, "sync")
    wrapped = nn.parallel.DistributedDataParallel(module)
    results["wrapped"] = step(wrapped, [share(pictures(6), rank)])._asdict()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def frozen_step(module: nn.Module, images: Tensor) -> dict[str, bool | Tensor]:
    before = copy.deepcopy(dict(module.named_buffers()))
    with frozen(module):
        (output,) = module(images)
    after = dict(module.named_buffers())
    return {
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
        "output": output.detach(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found in each scenario."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def joined(results: list[dict], name: str, minibatches: list[int]) -> Outcome:
    """Outputs in the order of the whole batch, gradients summed; buffers of the first process."""
    outputs = []
    shares = [list(found[name]["outputs"]) for found in results]
    for count in minibatches:
        outputs += [shares[number % PROCESSES].pop(0) for number in range(count)]
    gradients = {
        key: sum(found[name]["gradients"][key] for found in results)
        for key in results[0][name]["gradients"]
    }
    return Outcome(torch.stack(outputs), gradients, results[0][name]["buffers"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, s in SCENARIOS.items() if s.mode == "sync"])
def test_sync_is_one_process_with_the_whole_batch(results, name):
    scenario = SCENARIOS[name]
    expected = step(make(scenario.dtype), [pictures(scenario.minibatches[0], scenario.dtype)])
    tolerance = 1e-9 if scenario.dtype == torch.float64 else 3e-5
    check(joined(results, name, scenario.minibatches), expected, tolerance)


@pytest.mark.slow
def test_every_process_records_the_same_bits(results):
    for name in ("sync", "sync, shares that differ", "cross"):
        first, second = (found[name]["buffers"] for found in results)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_local_statistics_are_a_processes_own(results):
    for rank, found in enumerate(results):
        check(Outcome(**found["local"]), step(make(), [share(pictures(6), rank)]))
    whole = step(make(), [pictures(6)])
    assert not torch.allclose(joined(results, "local", [6]).outputs, whole.outputs, atol=0.1)


@pytest.mark.slow
def test_cross_over_processes_is_one_process_with_the_whole_mini_batches(results):
    minibatches = SCENARIOS["cross"].minibatches
    module = make()
    convert(module, "cross", len(minibatches))
    expected = step(module, list(pictures(sum(minibatches)).split(minibatches)))
    check(joined(results, "cross", minibatches), expected)


@pytest.mark.slow
def test_frozen_processes_normalise_together_and_record_nothing(results):
    (whole,) = make()(pictures(6))
    for rank, found in enumerate(results):
        assert found["frozen"]["unchanged"]
        torch.testing.assert_close(found["frozen"]["output"], share(whole.detach(), rank))


@pytest.mark.slow
def test_distributed_data_parallel_averages_what_one_process_finds(results):
    expected = step(make(), [pictures(6)])
    for found in results:
        for key, gradient in expected.gradients.items():
            own = found["wrapped"]["gradients"][f"module.{key}"]
            torch.testing.assert_close(own * PROCESSES, gradient, rtol=0, atol=1e-9 * 1e3)


# Across mini-batches


class ByHand(nn.Module):
    """CmBN as it is told: torch's normalisation of all mini-batches so far, in one tensor."""

    def __init__(self, norm: nn.BatchNorm2d, last: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.seen: list[Tensor] = []
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        everything = torch.cat([*self.seen, x])
        self.seen.append(x.detach())
        z = F.batch_norm(
            everything, None, None, self.weight, self.bias, training=True, eps=self.eps
        )
        if len(self.seen) == self.last:
            variance, mean = torch.var_mean(everything.detach(), (0, 2, 3))
            self.running_mean.mul_(1 - MOMENTUM).add_(MOMENTUM * mean)
            self.running_var.mul_(1 - MOMENTUM).add_(MOMENTUM * variance)
            self.num_batches_tracked += 1
        return z[-len(x) :]


def by_hand(minibatches: list[int]) -> Outcome:
    module = make()
    for block in module.modules():
        if isinstance(block, ConvBlock):
            norm = ByHand(block.bn, len(minibatches))
            norm.register_buffer("running_mean", norm.__dict__.pop("running_mean"))
            norm.register_buffer("running_var", norm.__dict__.pop("running_var"))
            block.bn = norm
    return step(module, list(pictures(sum(minibatches)).split(minibatches)))


@pytest.mark.parametrize("minibatches", [[4, 4], [2, 5, 1], [1, 1, 1, 1]])
def test_cross_is_what_is_done_by_hand(minibatches):
    module = make()
    convert(module, "cross", len(minibatches))
    found = step(module, list(pictures(sum(minibatches)).split(minibatches)))
    check(found, by_hand(minibatches))


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_cross_in_float32(implementation):
    device = IMPLEMENTATIONS[implementation]
    module = make(torch.float32).to(device)
    convert(module, "cross", 2, implementation)
    with full_precision():
        found = step(module, list(pictures(4, torch.float32).to(device).split([2, 2])))
    expected = by_hand([2, 2])
    single = Outcome(
        expected.outputs.float(),
        {name: value.float() for name, value in expected.gradients.items()},
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in expected.buffers.items()
        },
    )
    check(found, single, 3e-5)


def test_the_mini_batches_of_a_batch_matter_and_those_of_the_last_one_do_not():
    images = pictures(4)
    module = make()
    convert(module, "cross", 2)
    first = step(module, list(images.split(2)))
    plain = make()
    convert(plain, "local")
    own = step(plain, list(images.split(2)))
    torch.testing.assert_close(first.outputs[:2], own.outputs[:2])  # nothing was before
    assert not torch.allclose(first.outputs[2:], own.outputs[2:], atol=0.1)
    again = step(module, list(images.split(2)))
    torch.testing.assert_close(again.outputs, first.outputs, rtol=0, atol=0)


def test_running_statistics_move_once_a_batch():
    module = make()
    convert(module, "cross", 3)
    begin_batch(module)
    norm = module.layers["0"].bn
    before = norm.running_mean.clone()
    for number in range(3):
        assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 0
        module(pictures(6)[2 * number : 2 * number + 2])
    assert not torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 1


def test_a_mini_batch_too_many_is_named():
    module = make()
    convert(module, "cross", 2)
    for _ in range(2):
        module(pictures(2))
    with pytest.raises(ValueError, match=r"a batch has 2 mini-batches .* call begin_batch"):
        module(pictures(2))
    begin_batch(module)
    module(pictures(2))


@pytest.mark.parametrize("mode", ["sync", "local", "cross"])
def test_one_mini_batch_in_one_process_is_torch_to_the_bit(mode):
    plain, module = make(torch.float32), make(torch.float32)
    convert(module, mode, 1)
    expected, found = (step(m, [pictures(4, torch.float32)]) for m in (plain, module))
    assert torch.equal(found.outputs, expected.outputs)
    for name, value in expected.gradients.items():
        assert torch.equal(found.gradients[name], value), name
    for name, value in expected.buffers.items():
        assert torch.equal(found.buffers[name], value), name


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_the_fused_operator_by_name(implementation):
    device = IMPLEMENTATIONS[implementation]
    module = make(torch.float32).to(device)
    convert(module, "local", 1, implementation)
    images = pictures(4, torch.float32)
    with full_precision():
        found = step(module, [images.to(device)])
    check(found, step(make(torch.float32), [images]), 3e-5)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype, implementation):
    """The map keeps the type that the convolution gave it; parameters and what is recorded stay in
    float32. Tolerance: a unit in the last place of each type, through seven layers.
    """
    module, plain = make(torch.float32), make(torch.float32)
    convert(module, "local", 1, implementation)
    images = pictures(4, torch.float32)
    with torch.autocast("cpu", dtype):
        (output,) = module.train()(images)
        (expected,) = plain.train()(images)
    assert output.dtype == dtype
    cost(output).backward()
    cost(expected).backward()
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(
        output.float(),
        expected.float(),
        rtol=0,
        atol=tolerance * float(expected.detach().abs().max()),
    )
    for (name, mine), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32 and mine.grad.isfinite().all()
        limit = 2 * tolerance * float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=limit, msg=name)
    norm = module.layers["0"].bn
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32


# Conversion and freezing


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_conversion_keeps_keys_parameters_and_results(implementation):
    module = make(torch.float32)
    images = pictures(4, torch.float32)
    keys, parameters = list(module.state_dict()), list(module.parameters())
    trained = copy.deepcopy(module)
    (expected,) = trained.train()(images)
    (evaluated,) = trained.eval()(images)
    convert(module, "sync", 1, implementation)
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(
        isinstance(block.bn, BatchNorm) and block.activation == "linear"
        for block in module.modules()
        if isinstance(block, ConvBlock)
    )
    torch.testing.assert_close(module.train()(images)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.eval()(images)[0], evaluated, rtol=1e-5, atol=1e-5)
    other = NetworkModule(network())
    other.load_state_dict(module.state_dict())
    module.load_state_dict(trained.state_dict())
    assert torch.equal(module.eval()(images)[0], evaluated)


def test_conversion_again_changes_the_mode_and_keeps_the_activation():
    module = make()
    images = pictures(4)
    convert(module, "cross", 2)
    convert(module, "local")
    norm = module.layers["0"].bn
    assert (norm.mode, norm.subdivisions, norm.activation) == ("local", 1, "mish")
    check(step(module, [images]), step(make(), [images]))


def test_a_converted_module_can_be_copied():
    module = make()
    convert(module, "cross", 2)
    module(pictures(2))
    other = copy.deepcopy(module)
    assert torch.equal(other(pictures(4)[2:])[0], module(pictures(4)[2:])[0])


def test_an_activation_with_parameters_stays_with_its_block():
    layers = (conv(IMAGE, 4, 3, "prelu"), conv(0, 4, 3, "mish"))
    module = NetworkModule(Network(layers=layers, width=8, height=8, channels=3))
    images = torch.randn(2, 3, 8, 8)
    (expected,) = copy.deepcopy(module)(images)
    convert(module, "local", 1, "reference")
    assert module.layers["0"].activation == "prelu"
    assert module.layers["0"].bn.activation == "linear"
    torch.testing.assert_close(module(images)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "sync", "local", "cross"])
def test_frozen_records_nothing_and_normalises_by_the_batch(mode):
    module, images = make(), pictures(6)
    if mode:
        convert(module, mode, 2 if mode == "cross" else 1)
    (expected,) = copy.deepcopy(module)(images[2:])
    before = copy.deepcopy(module.state_dict())
    with frozen(module):
        for _ in range(3):
            (output,) = module(images[2:])
    assert torch.equal(output, expected)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    module(images[:2])  # recording goes on
    if mode != "cross":
        assert not torch.equal(module.state_dict()["layers.0.bn.running_mean"],
                               before["layers.0.bn.running_mean"])  # fmt: skip


def test_frozen_in_the_middle_of_a_batch_uses_what_was_before_and_adds_nothing():
    batches = list(pictures(6).split(2))
    module, undisturbed = make(), make()
    for m in (module, undisturbed):
        convert(m, "cross", 3)
    begin_batch(module)
    outputs = []
    for images in batches:
        with frozen(module):
            (attacked,) = module(images)
        (output,) = module(images)
        assert torch.equal(attacked, output)
        cost(output).backward()
        outputs.append(output.detach())
    expected = step(undisturbed, batches)
    assert torch.equal(torch.cat(outputs), expected.outputs)
    assert torch.equal(
        module.layers["7"].bn.running_var, expected.buffers["layers.7.bn.running_var"]
    )


def test_frozen_ends_where_an_error_leaves_it():
    module = make()
    convert(module, "local")
    with pytest.raises(RuntimeError, match="attack"), frozen(module):
        raise RuntimeError("attack")
    module(pictures(2))
    assert module.layers["0"].bn.num_batches_tracked == 1


def test_in_evaluation_the_running_statistics_are_used():
    module, images = make(), pictures(3)
    convert(module, "cross", 2, "reference")
    plain = make()
    for m in (module, plain):
        m.eval()
        m.layers["0"].bn.running_mean.fill_(0.7)
    assert torch.equal(module(images)[0], plain(images)[0])
    with frozen(module):
        assert torch.equal(module(images)[0], plain(images)[0])


def test_one_value_a_channel_is_refused_as_in_torch():
    for implementation in (None, "reference"):
        module = NetworkModule(
            Network(layers=(conv(IMAGE, 4, 1, "mish"),), width=1, height=1, channels=3)
        )
        convert(module, "local", 1, implementation)
        with pytest.raises(ValueError, match=r"more than (1|one) value"):
            module(torch.zeros(1, 3, 1, 1))


def saved(function: Callable[[], object]) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_the_fused_operator_keeps_a_third_less():
    """Each convolution's output instead of that and the normalised map; both keep the result."""
    images = pictures(4, torch.float32)
    plain, fused = make(torch.float32), make(torch.float32)
    convert(fused, "local", 1, "reference")
    parameters = sum(p.nbytes for p in plain.parameters()) + images.nbytes
    before, after = (saved(lambda m=m: m(images)) - parameters for m in (plain, fused))
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("global",), "batch_norm must be one of sync, local, cross, not 'global'"),
        (("cross", 0), "subdivisions must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(make(), *arguments)


def test_a_normalisation_that_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match="move by a fixed share"):
        BatchNorm(nn.BatchNorm2d(4, momentum=None), "mish")
    with pytest.raises(ValueError, match="with weights"):
        BatchNorm(nn.BatchNorm2d(4, affine=False), "mish")
    assert math.isclose(BatchNorm(nn.BatchNorm2d(4, momentum=0.25), "mish").momentum, 0.25)
