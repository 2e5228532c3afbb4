"""What tests of training runs share: settings, what a run leaves behind, a run as a process."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from yolov4_fast.checkpoint import read_checkpoint, read_resume

CLASSES = ("disc", "frame", "square")

# All that draws by chance or keeps a state of its own.
EVERYTHING = (
    "--multi-scale", "64-128", "--multi-scale-every", "2", "--subdivisions", "2",
    "--batch-norm", "cross", "--dropblock", "0.2", "--dropblock-size", "3",
    "--adversarial", "0.5", "--mixup", "0.3", "--ema-decay", "0.9",
)  # fmt: skip


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    return read_checkpoint(path).state | {f"resume {k}": v for k, v in read_resume(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """The same checkpoints bit for bit, and the same rows but for their speed."""
    for file in ("last.safetensors", "best.safetensors"):
        first, second = tensors(one / file), tensors(other / file)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, f"{len(different)} tensors of {file} differ: {different[:3]}"
    assert rows(one) == rows(other)


def rows(output: Path) -> list[dict]:
    """log.jsonl without what differs from run to run."""
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for row in found:
        row.pop("images_per_second", None)
    return found


def last_step(output: Path) -> int:
    """Of the checkpoint to go on from; 0 where there is none."""
    path = output / "last.safetensors"
    return read_checkpoint(path).metadata["progress"]["step"] if path.exists() else 0


@dataclass
class Child:
    """A run in a process of its own."""

    pid: int
    log: Path
    ask: Callable[[dict], dict]

    def wait(self) -> int:
        """-> exit status; below 0: the signal that ended it."""
        return self.ask({"wait": self.pid})["status"]

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; so far:\n{self.text}"
            time.sleep(0.005)


CONV = "[convolutional]\n{norm}filters={filters}\nsize=3\nstride=2\npad=1\nactivation=mish\n"
END = "[convolutional]\nfilters=16\nsize=1\nactivation=linear\n"
HEAD = (
    "[yolo]\nmask={mask}\nanchors=8,8,16,16,24,24,40,40\nnum=4\nclasses=3\niou_loss=ciou\n"
    "ignore_thresh={ignore}\niou_thresh=.3\n"
)


def two_heads(norm: bool, ignore: float = 0.6) -> str:
    """A cfg of four convolutions, with heads at strides 8 and 16, with or without normalisation.

    With ignore=1 its loss is smooth: nothing in it is decided by a threshold, so that rounding
    stays rounding.
    """
    normalised = "batch_normalize=1\n" if norm else ""
    layers = [CONV.format(norm=normalised, filters=n) for n in (4, 8, 12)]
    layers += [END, HEAD.format(mask="0,1", ignore=ignore), "[route]\nlayers=2\n"]
    layers += [CONV.format(norm=normalised, filters=12), END]
    layers += [HEAD.format(mask="2,3", ignore=ignore)]
    return "[net]\nwidth=64\nheight=64\nchannels=3\n" + "".join(layers)
