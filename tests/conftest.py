"""Fixtures that every test may use: the material beside the repository, the Darknet reference.

Without a GPU Triton's kernels run in its interpreter, which must be chosen before they are defined.
"""

import os
import signal
from importlib.metadata import version
from importlib.util import find_spec
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

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what programs under test inherit


def _repair_interpreter() -> None:
    """Triton 3.6's interpreter cannot use a number of a kernel as the bound of a range: it asks an
    array of one element for its integer value, which numpy refuses from 2.4 on.
    """
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if find_spec("triton") and version("triton").startswith("3.6."):
    _repair_interpreter()

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
