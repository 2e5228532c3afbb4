"""Fixtures that every test may use: the material beside the repository, the Darknet reference.

Without a GPU Triton's kernels run in its interpreter, which must be chosen before they are defined.
"""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.names import read_names
from yolov4_fast.darknet.weights import read_weights
from yolov4_fast.network.layers import Network

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material beside the repository; skips the test where there is none."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder ../shared, which is not here")
    return path


@pytest.fixture(scope="session")
def bccd(shared: Path) -> Path:
    """Real images of blood cells with VOC annotations."""
    return shared / "data" / "BCCD"


@pytest.fixture(scope="session")
def darknet_reference() -> Path:
    """A small network and what Darknet itself detects with it on three images."""
    return ROOT / "tests" / "data" / "darknet"


class Mini(NamedTuple):
    """The small network of the Darknet reference with its weights."""

    network: Network
    state: dict[str, Tensor]
    class_names: tuple[str, ...]


@pytest.fixture(scope="session")
def mini(darknet_reference: Path) -> Mini:
    """33 layers, 160x128 px input, three classes, two heads; finds plenty in its three images."""
    network = read_cfg(darknet_reference / "mini.cfg")
    state = read_weights(darknet_reference / "mini.weights", network)
    return Mini(network, state, read_names(darknet_reference / "mini.names"))
