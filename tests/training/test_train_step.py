"""One optimiser step: what each setting does to it, on a small network and made-up batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from run_results import two_heads

from training.config import TrainConfig
from training.distributed import Processes
from training.loader import Batch
from training.losses import LossConfig, Losses, detection_loss
from training.trainer import Diverged, Trainer, TrainingError
from yolov4_fast.darknet.cfg import parse_cfg
from yolov4_fast.network.architectures import by_name

CPU = Processes(torch.device("cpu"))
STEPS = 10  # an epoch
BASE = TrainConfig(
    optimizer="sgd", nesterov=False, momentum=0.0, learning_rate=0.01, warmup_epochs=0,
    schedule="constant", weight_decay=0.0, clip_gradient=0.0, ema_decay=0.0, batch_size=8, epochs=1,
)  # fmt: skip


def batch(seed: int = 0, images: int = 8, height: int = 64, width: int = 64) -> Batch:
    """Noise with one or two objects in each picture, none in every third."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8)
    rows = [
        [image, rng.integers(3), *rng.uniform(0.3, 0.7, 2), *rng.uniform(0.1, 0.5, 2)]
        for image in range(images)
        for _ in range(image % 3)
    ]
    return Batch(
        torch.from_numpy(pictures).permute(0, 3, 1, 2),
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 6),
    )


def made(config: TrainConfig, norm: bool = False) -> Trainer:
    return Trainer(config, parse_cfg(two_heads(norm)), STEPS, CPU)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.module.parameters()])


def moved(config: TrainConfig, norm: bool = False, steps: int = 1, seed: int = 0) -> torch.Tensor:
    """How far the weights of a new trainer move in some steps."""
    trainer = made(config, norm)
    before = weights(trainer)
    for step in range(steps):
        trainer.train_step(batch(seed + step))
    return weights(trainer) - before


@pytest.mark.parametrize("subdivisions", [2, 4, 8])
@pytest.mark.parametrize("normaliser", ["positives", "images"])
def test_mini_batches_add_up_to_the_whole_batch(subdivisions, normaliser):
    config = replace(BASE, loss=LossConfig(normaliser=normaliser))
    whole, parts = made(config), made(replace(config, subdivisions=subdivisions))
    for step in range(3):
        losses = whole.train_step(batch(step)), parts.train_step(batch(step))
        torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]))
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)


def test_mini_batches_normalised_by_themselves_would_not(monkeypatch):
    """That the test above can fail."""
    whole = moved(BASE)
    monkeypatch.setattr(
        "training.trainer.detection_loss",
        lambda *values, positives: detection_loss(*values),
    )
    assert torch.allclose(moved(BASE), whole, atol=1e-6, rtol=1e-5)
    parts = moved(replace(BASE, subdivisions=2))
    assert not torch.allclose(parts, whole, atol=1e-6, rtol=1e-5)


def test_normalising_by_images_is_the_sum_over_them():
    by_positives = made(BASE).train_step(batch())
    by_images = made(replace(BASE, loss=LossConfig(normaliser="images"))).train_step(batch())
    ratio = by_positives.total.item() / by_images.total.item()
    objects = len(batch().targets)
    assert 8 / (3 * objects) < ratio <= 8 / objects  # an object has one to three positives here


def test_the_gradient_is_clipped_to_its_largest_norm():
    free = moved(BASE).norm().item() / BASE.learning_rate
    clipped = moved(replace(BASE, clip_gradient=free / 4)).norm().item() / BASE.learning_rate
    assert clipped == pytest.approx(free / 4, rel=1e-4)
    assert torch.equal(moved(replace(BASE, clip_gradient=2 * free)), moved(BASE))


def test_the_schedule_reaches_the_step():
    late = made(replace(BASE, schedule="steps", steps=(0.5,), scales=(0.25,)))
    early = made(BASE)
    late.step = early.step = 5
    before = weights(late)
    late.train_step(batch())
    early.train_step(batch())
    ratio = (weights(late) - before).norm() / (weights(early) - before).norm()
    assert ratio.item() == pytest.approx(0.25, rel=1e-4)


def test_averaging_can_be_off():
    for decay, same in ((0.0, True), (0.9, False)):
        trainer = made(replace(BASE, ema_decay=decay))
        for step in range(3):
            trainer.train_step(batch(step))
        state = trainer.module.state_dict()
        assert all(torch.equal(trainer.average.state[k], v) for k, v in state.items()) == same


def test_attacks_are_drawn_by_step_and_alter_the_pictures(monkeypatch):
    assert torch.equal(moved(replace(BASE, adversarial=0.0)), moved(BASE))
    assert not torch.equal(moved(replace(BASE, adversarial=1.0)), moved(BASE))
    trainer = made(replace(BASE, adversarial=0.25))
    drawn = [trainer.attacked(step) for step in range(400)]
    assert 70 < sum(drawn) < 130
    assert drawn == [made(replace(BASE, adversarial=0.25)).attacked(step) for step in range(400)]
    assert drawn != [made(replace(BASE, adversarial=0.25, seed=1)).attacked(s) for s in range(400)]
    seen = []
    trainer = made(replace(BASE, adversarial=1.0, adversarial_step=0.1))
    trainer.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    trainer.train_step(batch())
    change = (seen[1] - seen[0]).abs()
    assert len(seen) == 2 and 0 < change.max().item() <= 0.1 + 1e-6


def test_attacks_are_made_in_every_mini_batch():
    seen = []
    trainer = made(replace(BASE, adversarial=1.0, subdivisions=2))
    trainer.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.train_step(batch())
    assert seen == [4, 4, 4, 4]


def test_dropblock_rises_over_the_run_and_is_drawn_by_step():
    config = replace(BASE, dropblock=0.5, dropblock_size=3)
    assert torch.equal(moved(config), moved(BASE))  # the probability is 0 at first
    drops = made(config)
    told = []
    for step in range(STEPS):
        drops.train_step(batch(step))
        assert drops.dropblocks
        told.append(drops.dropblocks.probability)
    assert told == pytest.approx([0.5 * step / STEPS for step in range(STEPS)])
    other = moved(config, steps=STEPS)
    assert torch.equal(other, moved(config, steps=STEPS))
    assert not torch.equal(other, moved(BASE, steps=STEPS))


def test_chance_depends_on_nothing_but_seed_and_step():
    """Whatever was drawn before a step, as when a run is resumed."""
    config = replace(BASE, dropblock=0.5, dropblock_size=3, adversarial=0.5)
    one, other = made(config), made(config)
    one.step = other.step = 6
    one.train_step(batch())
    torch.rand(17)
    np.random.default_rng().random()
    other.train_step(batch())
    assert torch.equal(weights(one), weights(other))


def test_statistics_of_a_batch_so_far():
    """CmBN differs from one's own statistics where there is more than one mini-batch."""
    for subdivisions, same in ((1, True), (2, False)):
        config = replace(BASE, subdivisions=subdivisions)
        local = moved(replace(config, batch_norm="local"), norm=True)
        cross = moved(replace(config, batch_norm="cross"), norm=True)
        assert torch.allclose(local, cross, atol=1e-6) == same


def test_statistics_over_one_process_are_its_own():
    local = moved(replace(BASE, batch_norm="local"), norm=True)
    assert torch.equal(moved(replace(BASE, batch_norm="sync"), norm=True), local)


def test_bfloat16_trains_float32_weights():
    exact, coarse = moved(BASE, norm=True), moved(replace(BASE, precision="bf16"), norm=True)
    assert coarse.dtype == torch.float32 and not torch.equal(exact, coarse)
    assert torch.nn.functional.cosine_similarity(exact, coarse, dim=0) > 0.98


def test_the_loss_is_that_of_the_whole_batch():
    losses = made(BASE).train_step(batch())
    assert isinstance(losses, Losses)
    assert losses.total.item() == pytest.approx(sum(term.item() for term in losses[1:]), rel=1e-5)


def test_a_batch_without_objects_is_trained_on():
    empty = batch()._replace(targets=torch.zeros(0, 6))
    losses = made(replace(BASE, adversarial=1.0, subdivisions=2)).train_step(empty)
    assert losses.box == losses.classes == 0 and losses.objectness > 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_does_not_reach_the_weights(monkeypatch, where):
    def exploding(heads, maps, targets, config, *, positives):
        """A finite loss whose gradient is infinite (the square root at 0), or an infinite one."""
        term = sum((raw * 0).sum() for raw in maps).sqrt()
        term = term + torch.inf if where == "loss" else term
        return Losses(term, term.detach(), term.detach(), term.detach())

    trainer = made(BASE, norm=True)
    before = {name: value.clone() for name, value in trainer.module.named_parameters()}
    monkeypatch.setattr("training.trainer.detection_loss", exploding)
    one = batch()
    with pytest.raises(Diverged, match=rf"the {where} became (inf|nan) at step 0; a lower") as told:
        trainer.train_step(one)
    assert all(torch.equal(v, before[k]) for k, v in trainer.module.named_parameters())
    assert trainer.step == 0 and told.value.step == 0
    assert torch.equal(told.value.batch.images, one.images)
    assert not torch.isfinite(told.value.losses.total) == (where == "loss")


def test_given_weights_are_taken_where_they_fit():
    one, other = made(BASE), made(replace(BASE, seed=1))
    state = one.module.state_dict()
    name = next(iter(state))
    taken, total = other.initialise({**state, name: torch.zeros(1), "more": torch.zeros(2)})
    assert (taken, total) == (len(state) - 1, len(state))
    assert not torch.equal(other.module.state_dict()[name], state[name])
    last = list(state)[-1]
    assert torch.equal(other.module.state_dict()[last], state[last])
    assert torch.equal(other.average.state[last], state[last])


def test_a_batch_that_does_not_split_among_processes_is_refused():
    three = Processes(torch.device("cpu"), rank=0, world=3)
    with pytest.raises(TrainingError, match="8 does not split into 2 subdivisions on 3 processes"):
        Trainer(replace(BASE, subdivisions=2), parse_cfg(two_heads(False)), STEPS, three)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 1}, "a mini-batch of 1 at 32x32"),
        ({"batch_size": 4, "subdivisions": 4}, "a mini-batch of 1 at 32x32"),
        ({"batch_size": 1, "width": 64, "height": 64, "multi_scale": (32, 64)}, "1 at 32x32"),
        ({"batch_size": 2}, None),
        ({"batch_size": 1, "width": 64}, None),
    ],
)
def test_a_normalisation_needs_two_values_a_channel(changes, told):
    config = replace(BASE, width=32, height=32) if "width" not in changes else BASE
    config = replace(config, height=32) if "height" not in changes else config
    config = replace(config, **changes)
    network = by_name(
        "yolov4-tiny", num_classes=3, width_multiple=0.125, width=config.width, height=config.height
    )
    if told is None:
        Trainer(config, network, STEPS, CPU).train_step(
            batch(images=config.batch_size, height=config.height, width=config.width)
        )
        return
    with pytest.raises(TrainingError, match=told):
        Trainer(config, network, STEPS, CPU)
