"""Pictures of three classes, and the command line that trains on them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_classes import CLASSES, command_of, draw


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of each class to train on, 12 to validate on."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 12)):
        for kind, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                cv2.imwrite(str(root / split / name / f"{number:02d}.png"), draw(kind, rng))
    return root


@pytest.fixture
def command(pictures: Path, tmp_path: Path) -> list[str]:
    return command_of(pictures, tmp_path / "run")
