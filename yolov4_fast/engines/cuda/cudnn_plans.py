"""Plans of cuDNN's generated convolutions: their names, which of them suit a size, and a folder
that keeps compiled ones.

An engine of cuDNN generates kernels in many tilings, numbered by a setting (KERNEL_CFG, 24 in plan
names). Its own suggestions begin with the same few for every size; small maps, narrow layers and
batch 1 want other ones, or sums in parts (SPLIT_K_SLC, 17 in plan names), so that all processors
have work.

Which number is which tiling was read off the names of kernels generated for an H200, with cuDNN
9.19 and 9.26; engines 2 and 7 have the same numbers in both. For Hopper, 9.26 suggests engine 4.
9.19 refuses it; it suggests engine 7 in two or three tilings (kernels for sm80), and takes engine 2
(kernels for sm90) where tensors are dense, though it suggests that for FP8 only.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from yolov4_fast.engines.cuda.cudnn_problem import FP8, Problem
from yolov4_fast.files import replacing

logger = logging.getLogger(__name__)

Tiles = Mapping[tuple[int, int], tuple[int, float]]

# (pixels, filters) of a tile -> its number and how well a processor works in that tile, beside the
# largest ones of the engine: a tile loads (1 / pixels + 1 / filters) for each product.
HOPPER_SM = 90
HOPPER_ENGINE = 4
HOPPER_TILES: Tiles = {
    (128, 128): (3, 1.0),
    (256, 64): (4, 0.95),
    (64, 256): (10, 0.95),
    (128, 64): (8, 0.8),
    (64, 128): (9, 0.8),
    (256, 32): (14, 0.6),
    (64, 64): (55, 0.6),
    (128, 32): (16, 0.5),
}
DENSE_ENGINE = 2
DENSE_TILES: Tiles = {  # of half precision
    (128, 128): (2, 1.0),
    (256, 64): (10, 0.95),
    (128, 64): (6, 0.8),
    (64, 128): (14, 0.8),
    (64, 64): (16, 0.6),
}
DENSE_FP8_TILES: Tiles = {
    (128, 128): (23, 1.0),
    (256, 64): (20, 0.95),
    (64, 256): (26, 0.95),
    (128, 64): (17, 0.8),
}
ANY_ENGINE = 7
ANY_TILES: Tiles = {  # 128 bytes deep
    (256, 128): (0, 1.0),
    (128, 256): (1, 1.0),
    (128, 128): (4, 0.95),
    (256, 64): (2, 0.85),
    (64, 256): (3, 0.85),
    (128, 64): (9, 0.75),
    (64, 128): (10, 0.75),
    (64, 64): (11, 0.6),
}
SHALLOW, SHALLOW_BYTES = 13, 64  # what to add to a number for the same tile half as deep
NARROW_TILES: Tiles = {(128, 32): (25, 0.5)}  # it comes in one depth
UNALIGNED_TILES: Tiles = {(128, 32): (27, 1.0)}  # of the few for channels like the image's 3
USUAL_TILE = (128, 128)  # of other engines' first suggestion, near enough
FIXED_COST = 128  # of a tile beside its products, as the depth that takes as long
PART_COST = 128  # of adding up parts, for each of them
LEAST_DEPTH = 256  # of a part
PARTS = (1, 2, 4, 8, 16)
DENSE_PARTS = (1,)  # in 9.19 engine 2 refuses to sum in parts, but for some tiles in two
OTHERS = 4  # tilings beside cuDNN's suggestions
OTHERS_DENSE = 3  # that many of them are of engine 2, where engine 4 is missing


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
    suggested: Sequence[PlanName], problem: Problem, *, sm: int, processors: int
) -> list[PlanName]:
    """Other plans than the first of cuDNN's suggestions, likely ones first, at most OTHERS: of the
    engines that suit the problem, each tiling in the number of parts that suits it best.

    suggested: at least one.
    """
    first = suggested[0]
    if sm != HOPPER_SM:
        best = _by_time(first.engine, {USUAL_TILE: (first.config, 1.0)}, problem, processors)
        return [plan for plan in best if plan != first]

    if any(plan.engine == HOPPER_ENGINE for plan in suggested):
        found = _by_time(HOPPER_ENGINE, HOPPER_TILES, problem, processors)
    elif not problem.aligned:
        found = _by_time(ANY_ENGINE, UNALIGNED_TILES, problem, processors)
    else:
        shallow = problem.channels * problem.dtype.itemsize <= SHALLOW_BYTES
        tiles = {
            tile: (config + SHALLOW * shallow, efficiency)
            for tile, (config, efficiency) in ANY_TILES.items()
        }
        found = _by_time(ANY_ENGINE, tiles | dict(NARROW_TILES), problem, processors)
        if problem.dense:
            tiles = dict(DENSE_FP8_TILES if problem.dtype == FP8 else DENSE_TILES)
            dense = _by_time(DENSE_ENGINE, tiles, problem, processors, DENSE_PARTS)
            found = [*[plan for plan in dense if plan != first][:OTHERS_DENSE], *found]
    return [plan for plan in found if plan != first][:OTHERS]


def _by_time(
    engine: int,
    tiles: Tiles,
    problem: Problem,
    processors: int,
    choices: tuple[int, ...] = PARTS,
) -> list[PlanName]:
    """One plan for each tile, by estimated time. choices: of parts.

    The convolution as a product of matrices: [pixels, depth] x [depth, filters].
    """
    batch, height, width, filters = problem.out_shape
    pixels, depth = batch * height * width, problem.size**2 * problem.channels
    times: dict[PlanName, float] = {}
    for (high, wide), (config, efficiency) in tiles.items():
        count = -(-pixels // high) * -(-filters // wide)
        efforts: dict[PlanName, float] = {}
        for parts in choices:
            if parts > 1 and (depth // parts < LEAST_DEPTH or count * parts > 2 * processors):
                break
            rounds = -(-count * parts // processors)
            effort = depth / parts + FIXED_COST + (parts - 1) * PART_COST
            efforts[PlanName(engine, config, parts)] = rounds * effort
        best = min(efforts, key=efforts.__getitem__)
        times[best] = efforts[best] * high * wide / efficiency
    return sorted(times, key=times.__getitem__)


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
