"""The classifier, its loss, its steps and its validation; each setting changes what comes out."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn_classes import CLASSES, draw

from training.classify.classifier import Classifier, hits, mixed_cross_entropy
from training.classify.config import PretrainConfig
from training.classify.examples import Batch
from training.classify.trainer import ClassifierTrainer
from training.distributed import Processes
from training.pretrain import make_backbone


class TestLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
    def test_it_is_the_cross_entropy_with_shared_labels(self, smoothing: float) -> None:
        torch.manual_seed(0)
        logits = (5 * torch.randn(6, 7, dtype=torch.float64)).float().requires_grad_()
        classes = torch.randint(7, (6, 4))
        shares = torch.rand(6, 4).softmax(1)
        target = torch.zeros(6, 7).scatter_add_(1, classes, shares)
        assert torch.allclose(target.sum(1), torch.ones(6))
        expected = F.cross_entropy(logits.double(), target.double(), label_smoothing=smoothing)
        loss = mixed_cross_entropy(logits, classes, shares, smoothing)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        smooth = (1 - smoothing) * target + smoothing / 7
        torch.testing.assert_close(gradient, (logits.softmax(1) - smooth) / 6)

    def test_smoothing_keeps_certainty_finite(self) -> None:
        """The best logits of a smoothed label are log((1 - s + s/C) / (s/C)) apart, and no more."""
        classes, shares = torch.tensor([[0]]), torch.ones(1, 1)
        losses = [
            [float(mixed_cross_entropy(torch.tensor([[gap, 0.0]]), classes, shares, smoothing))
             for gap in (1.0, float(np.log(0.95 / 0.05)), 20.0)]
            for smoothing in (0.0, 0.1)
        ]  # fmt: skip
        assert losses[0] == sorted(losses[0], reverse=True)
        assert losses[1][1] == min(losses[1])

    def test_extreme_logits_stay_finite(self) -> None:
        logits = torch.tensor([[1e30, -1e30, 0.0]]).bfloat16().float().requires_grad_()
        loss = mixed_cross_entropy(logits, torch.tensor([[1, 1]]), torch.tensor([[0.5, 0.5]]), 0.1)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()

    def test_hits(self) -> None:
        logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]])
        assert hits(logits, torch.tensor([0, 0]), 1) == 1
        assert hits(logits, torch.tensor([1, 1]), 2) == 1
        assert hits(logits, torch.tensor([3, 0]), 5) == 2  # no more than there are
        assert hits(logits[:0], torch.tensor([], dtype=torch.int64), 5) == 0


def trainer(config: PretrainConfig, steps: int = 5) -> ClassifierTrainer:
    network = make_backbone(config)
    return ClassifierTrainer(config, network, CLASSES, steps, Processes(torch.device("cpu")))


def batch_of(count: int = 6) -> Batch:
    rng = np.random.default_rng(3)
    drawn = [cv2.resize(draw(i % 3, rng), (64, 64)) for i in range(count)]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    classes = (torch.arange(count) % 3)[:, None].repeat(1, 4)
    return Batch(images, classes, torch.tensor([1.0, 0, 0, 0]).repeat(count, 1), ())


def small(**settings: object) -> PretrainConfig:
    plain = {"width_multiple": 1 / 16, "width": 64, "height": 64, "epochs": 2, "warmup_epochs": 0.0}
    return PretrainConfig(model="yolov4", **plain | settings)


def trained_weights(**settings: object) -> torch.Tensor:
    """The averaged weights after three steps."""
    run = trainer(small(**settings))
    for _ in run.run_epoch([batch_of()] * 3):
        pass
    return torch.cat([value.flatten().double() for value in run.average.state.values()])


@pytest.fixture(scope="module")
def plain_weights() -> torch.Tensor:
    return trained_weights()


class TestTrainer:
    @pytest.mark.parametrize(
        "changes",
        [
            {"learning_rate": 2e-3}, {"weight_decay": 0.5}, {"optimizer": "sgd"},
            {"optimizer": "adam"}, {"momentum": 0.5}, {"clip_gradient": 1e-3},
            {"label_smoothing": 0.3}, {"ema_decay": 0.0}, {"seed": 1}, {"precision": "bf16"},
            {"warmup_epochs": 1.0}, {"warmup_steps": 5}, {"schedule": "constant"},
            {"schedule": "steps", "steps": (0.1, 0.2)}, {"final_learning_rate": 0.9},
            {"activation": "leaky"}, {"dropblock": 0.5},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_setting_changes_the_weights(
        self, changes: dict[str, object], plain_weights: torch.Tensor
    ) -> None:
        found = trained_weights(**changes)
        assert torch.isfinite(found).all() and not torch.equal(found, plain_weights)

    def test_no_change_does_not(self, plain_weights: torch.Tensor) -> None:
        assert torch.equal(trained_weights(), plain_weights)

    @pytest.mark.parametrize(
        ("changes", "layers"),
        [({}, 105), ({"csp": False}, 75), ({"width_multiple": 1 / 8}, 105),
         ({"weighted_shortcuts": "relu"}, 105)],
        ids=str,
    )  # fmt: skip
    def test_changes_of_the_architecture(self, changes: dict[str, object], layers: int) -> None:
        network = make_backbone(small(**changes))
        assert len(network.layers) == layers and (network.width, network.height) == (64, 64)
        tensors = network.tensors()
        assert tensors["layers.0.conv.weight"][0] == 8
        wide = 128 if changes.get("width_multiple") else 64
        assert network.shapes()[-1] == (wide, 2, 2)
        weighted = any(key.endswith(".weights") for key in tensors)
        assert weighted == ("weighted_shortcuts" in changes)

    def test_dropblock_rises_over_the_run(self) -> None:
        run = trainer(small(dropblock=0.2, epochs=2), steps=3)
        assert run.dropblock is not None
        met = []
        for _ in range(2):
            met += [run.dropblock.probability for _ in run.run_epoch([batch_of()] * 3)]
        assert met == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16, 0.2])
        assert trainer(small(dropblock=0.0)).dropblock is None

    def test_validation_is_of_the_averaged_weights(self) -> None:
        run = trainer(small())
        for value in run.average.state.values():
            value.zero_()
        run.average.state["classifier.bias"][1] = 1.0
        batch = batch_of()
        skipped = batch._replace(shares=batch.shares.clone())
        skipped.shares[0] = 0  # could not be decoded
        accuracy = run.validate([batch, skipped])
        assert accuracy.pictures == 11
        assert accuracy.top1 == pytest.approx(4 / 11) and accuracy.top5 == 1
        nothing = batch._replace(shares=torch.zeros(6, 4))
        with pytest.raises(ValueError, match="none of the validation pictures can be decoded"):
            run.validate([nothing])

    def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = trainer(small())
        before = {name: value.clone() for name, value in run.module.named_parameters()}
        monkeypatch.setattr("training.classify.trainer.mixed_cross_entropy", exploding)
        with pytest.raises(
            ValueError, match=r"gradient (nan|inf) at step 0; a lower learning rate"
        ):
            list(run.run_epoch([batch_of()]))
        assert all(torch.equal(v, before[k]) for k, v in run.module.named_parameters())

    def test_the_state_dict_is_the_backbones_and_the_linear_layer(self) -> None:
        network = make_backbone(small())
        module = Classifier(network, 5).eval()
        keys = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
        assert keys == {*network.tensors(), "classifier.weight", "classifier.bias"}
        (logits,) = module(torch.rand(2, 3, 96, 32))
        assert logits.shape == (2, 5) and logits.dtype == torch.float32


def exploding(logits: torch.Tensor, *_: object) -> torch.Tensor:
    """A finite loss whose gradient is infinite: the square root at 0."""
    return (logits * 0).sum().sqrt()
