"""Plans of cuDNN's generated convolutions: their names, which of them suit a size, and a folder
that keeps compiled ones.

An engine of cuDNN generates kernels in many tilings, numbered by a setting (KERNEL_CFG, 24 in plan
names). Its own suggestions begin with the same few for every size; small maps, narrow layers and
batch 1 want other ones, or sums in parts (SPLIT_K_SLC, 17 in plan names), so that all processors
have work. Which number is which tiling was read off the generated kernels' names, with cuDNN 9.26.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from yolov4_fast.files import replacing

logger = logging.getLogger(__name__)

# The engine for Hopper: (pixels, filters) of a tile -> its number and how well a processor works
# in that tile, beside the largest ones: a tile loads (1 / pixels + 1 / filters) for each product.
HOPPER_ENGINE, HOPPER_SM = 4, 90
HOPPER_TILES = {
    (128, 128): (3, 1.0),
    (256, 64): (4, 0.95),
    (64, 256): (10, 0.95),
    (128, 64): (8, 0.8),
    (64, 128): (9, 0.8),
    (256, 32): (14, 0.6),
    (64, 64): (55, 0.6),
    (128, 32): (16, 0.5),
}
USUAL_TILE = (128, 128)  # of other engines' first suggestion, near enough
FIXED_COST = 128  # of a tile beside its products, as the depth that takes as long
PART_COST = 128  # of adding up parts, for each of them
LEAST_DEPTH = 256  # of a part
PARTS = (2, 4, 8, 16)
OTHERS = 4  # tilings beside cuDNN's suggestions


@dataclass(frozen=True)
class PlanName:
    """What cuDNN's name of a plan says. parts: of the sum over input channels and cells."""

    engine: int
    config: int
    parts: int = 1

    def __str__(self) -> str:
        parts = f"_k17={self.parts}" if self.parts > 1 else ""
        return f"eng{self.engine}{parts}_k24={self.config}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None where the plan has other settings."""
        match = re.fullmatch(r"eng(\d+)(?:_k17=(\d+))?_k24=(\d+)", name)
        if match is None:
            return None
        engine, parts, config = match.groups()
        return cls(int(engine), int(config), int(parts or 1))


def tilings(
    first: PlanName, *, pixels: int, filters: int, depth: int, sm: int, processors: int
) -> list[PlanName]:
    """Other settings of the engine of cuDNN's first suggestion, by estimated time, at most OTHERS:
    each tiling in the number of parts that suits it best.

    The convolution as a product of matrices: [pixels, depth] x [depth, filters].
    """
    tiles = {USUAL_TILE: (first.config, 1.0)}
    if first.engine == HOPPER_ENGINE and sm == HOPPER_SM:
        tiles = HOPPER_TILES

    times: dict[PlanName, float] = {}
    for (high, wide), (config, efficiency) in tiles.items():
        count = -(-pixels // high) * -(-filters // wide)
        efforts: dict[PlanName, float] = {}
        for parts in (1, *PARTS):
            if parts > 1 and (depth // parts < LEAST_DEPTH or count * parts > 2 * processors):
                break
            rounds = -(-count * parts // processors)
            effort = depth / parts + FIXED_COST + (parts - 1) * PART_COST
            efforts[PlanName(first.engine, config, parts)] = rounds * effort
        best = min(efforts, key=efforts.__getitem__)
        times[best] = efforts[best] * high * wide / efficiency
    times.pop(first, None)
    return sorted(times, key=times.__getitem__)[:OTHERS]


@dataclass(frozen=True)
class PlanStore:
    """A folder of compiled plans, of the user's own cache: they hold machine code.

    A plan is found by what it is for, the GPU and cuDNN included; others are not looked at.
    """

    folder: Path

    def path(self, versions: str, problem: object, name: str) -> Path:
        """versions: the GPU and cuDNN. problem: what the plan computes, told by its repr."""
        text = f"{versions}\n{problem!r}\n{name}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.plan"

    def read(self, versions: str, problem: object, name: str) -> bytes | None:
        try:
            return self.path(versions, problem, name).read_bytes()
        except OSError:
            return None

    def write(self, versions: str, problem: object, name: str, data: bytes) -> None:
        """Where it cannot be written to, it is logged: the next start compiles again."""
        path = self.path(versions, problem, name)
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            logger.info("%s: cannot keep a compiled plan (%s)", path, error.strerror or error)
