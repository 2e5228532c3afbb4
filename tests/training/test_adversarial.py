"""The attack of self-adversarial training: what it does to the picture, and to nothing else."""

import pytest
import torch

from training.adversarial import attack
from training.assign import assign
from training.batch_norm import convert
from training.losses import LossConfig, detection_loss, linear_heads
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.module import NetworkModule

SIZE = 64
TARGETS = torch.tensor(
    [[0.0, 0.0, 0.4, 0.5, 0.5, 0.6], [0.0, 1.0, 0.8, 0.2, 0.2, 0.2], [1.0, 1.0, 0.5, 0.5, 0.9, 0.8]]
)


def trained(name="yolov4"):
    """A small network after a few steps, and its three pictures; the last one has no objects."""
    network = by_name(
        name, num_classes=2, width=SIZE, height=SIZE, width_multiple=0.125, depth_multiple=0.1
    )
    torch.manual_seed(0)
    module = NetworkModule(network).train()
    linear_heads(module)
    images = torch.rand(3, 3, SIZE, SIZE) * 0.8 + 0.1
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        detection_loss(network.heads, module(images), TARGETS, LossConfig()).total.backward()
        optimizer.step()
    return network, module, images


@pytest.fixture(scope="module")
def setup():
    return trained()


def objectness(network, module, images):
    """Logits of objectness that the network in its present mode gives to the objects."""
    with torch.no_grad():
        maps = module(images)
    values = []
    for head, raw, p in zip(
        network.heads, maps, assign(network.heads, TARGETS, SIZE, SIZE), strict=True
    ):
        raw = raw.unflatten(1, (len(head.mask), -1))
        values.append(raw[p.image, p.anchor, 4, p.y, p.x])
    return torch.cat(values)


@pytest.mark.parametrize("name", ["yolov4", "yolov4-csp"])
def test_objects_seem_to_be_there_less(name):
    network, module, images = trained(name)
    attacked = attack(module, images, network.heads, TARGETS, 0.02)
    noise = (images + 0.02 * torch.randn_like(images).sign()).clamp(0, 1)
    before, after, other = (objectness(network, module, x) for x in (images, attacked, noise))
    assert (after < before).float().mean() > 0.7
    by_attack, by_noise = before.mean() - after.mean(), before.mean() - other.mean()
    assert by_attack > 0.1 and by_attack > 3 * by_noise.abs()  # noise of the same size hides little


@pytest.mark.parametrize("step", [0.005, 0.02, 1.0])
def test_no_value_changes_by_more_than_the_step_or_leaves_the_range(setup, step):
    network, module, images = setup
    attacked = attack(module, images, network.heads, TARGETS, step)
    assert attacked.shape == images.shape and attacked.dtype == images.dtype
    assert not attacked.requires_grad
    assert attacked.min() >= 0 and attacked.max() <= 1
    change = (attacked - images).abs()
    assert change.max() <= step + 1e-6
    if step < 0.1:  # values are at least .1 from either end: nearly all take the whole step
        assert (change[:2] > step * 0.99).float().mean() > 0.95


def test_a_longer_step_hides_more(setup):
    network, module, images = setup
    means = [
        objectness(network, module, attack(module, images, network.heads, TARGETS, step)).mean()
        for step in (0.002, 0.01, 0.03)
    ]
    assert means[0] > means[1] > means[2]


def test_pictures_without_objects_stay_as_they_are(setup):
    network, module, images = setup
    nothing = attack(module, images, network.heads, torch.zeros(0, 6), 0.02)
    assert (nothing == images).all()


def test_the_network_and_the_given_pictures_are_left_as_they_were(setup):
    network, module, images = setup
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    given = images.clone()
    attack(module, images, network.heads, TARGETS, 0.02)
    for name, value in module.state_dict().items():
        assert (value == before[name]).all(), name
    assert all((p.grad == n).all() for n, p in enumerate(module.parameters()))
    assert all(p.requires_grad for p in module.parameters())
    assert [part.training for part in module.modules()] == modes
    assert (images == given).all() and not images.requires_grad and images.grad is None
    module.zero_grad()


def test_statistics_across_mini_batches_are_left_as_they_were():
    """An attack before and between the two mini-batches of a batch changes nothing of either."""
    images, results = torch.rand(4, 3, SIZE, SIZE), []
    for attacks in (False, True):
        network, module, _ = trained()
        convert(module, "cross", subdivisions=2)
        maps = []
        for part in images.split(2):
            if attacks:
                attack(module, part, network.heads, TARGETS, 0.02)
            maps.append(module(part)[0].detach())
        results.append([*maps, *module.state_dict().values()])
    assert all((one == other).all() for one, other in zip(*results, strict=True))


def test_it_is_deterministic_and_draws_nothing(setup):
    network, module, images = setup
    state = torch.get_rng_state()
    first, again = (attack(module, images, network.heads, TARGETS, 0.02) for _ in range(2))
    assert (first == again).all()
    assert (torch.get_rng_state() == state).all()


def test_it_works_within_no_grad_and_in_bfloat16(setup):
    network, module, images = setup
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attacked = attack(module, images, network.heads, TARGETS, 0.02)
    assert attacked.dtype == torch.float32
    mean = objectness(network, module, images).mean()
    assert objectness(network, module, attacked).mean() < mean
