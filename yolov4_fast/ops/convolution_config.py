"""How the Triton convolution tiles a layer: `ConvConfig`, and which few are worth timing.

A layer is a matrix product of m = B * OH * OW cells, n = O filters and k = KH * KW * I. The time of
a tiling is estimated as the matrix instructions, or the operands' way from L2 where that is longer,
of the busiest multiprocessor, and the constant costs of a program. The estimate only has to bring
the good ones to the front: the engine times what `configs_for` returns, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MOST_CONFIGS = 6
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
LEAST_STEPS = 4  # of the K loop in each part of a split

# Of the estimate: orders of magnitude for a Hopper multiprocessor at about 1.7 GHz, not measured.
SCALAR_RATE = 128  # multiply-adds a cycle outside the tensor cores
L2_BYTES = 48  # a cycle, to shared memory
MEMORY_BYTES = 18  # a cycle, of 4.3 TB/s
EPILOGUE_RATE = 8  # activated values a cycle: Mish takes two of 16 special functions
STEP_CYCLES = 100  # least of a step: waiting and addresses
PROGRAM_CYCLES = 1500  # start, first loads and last stores
LAUNCH_CYCLES = 3000  # of one more kernel
SHARED_BYTES = 220 * 1024


@dataclass(frozen=True)
class ConvConfig:
    """A tiling. block_m cells x block_n filters of a program, powers of two; block_k of K a step,
    at most (fewer where the source has fewer channels); num_stages of its pipeline; split_k parts
    of K, each of a program of its own; group_m rows of tiles go together through the filters.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8

    def __post_init__(self) -> None:
        blocks = (self.block_m, self.block_n, self.block_k)
        if min(blocks) < 16 or any(block & (block - 1) for block in blocks):
            raise ValueError(f"blocks must be powers of two of at least 16, not {blocks}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be a power of two up to 16, not {self.num_warps}")
        for name in ("num_stages", "split_k", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


# Hopper and Blackwell: matrix instructions of four warps read shared memory; 128 bytes of K a step.
WARPGROUP = (
    ConvConfig(128, 256, 64, 8, 3),
    ConvConfig(128, 128, 64, 8, 4),
    ConvConfig(128, 128, 64, 4, 4),
    ConvConfig(128, 64, 64, 4, 4),
    ConvConfig(64, 128, 64, 4, 4),
    ConvConfig(64, 64, 64, 4, 5),
    ConvConfig(128, 32, 64, 4, 4),
)
# Ampere, Ada and GeForce Blackwell: operands in registers, 100 KB of shared memory.
WARP = (
    ConvConfig(128, 128, 32, 8, 3),
    ConvConfig(128, 64, 32, 4, 3),
    ConvConfig(64, 128, 32, 4, 3),
    ConvConfig(64, 64, 32, 4, 4),
    ConvConfig(128, 32, 32, 4, 4),
)
# Plain multiply-adds: float32, and all of Turing, for whose tensor cores Triton has no code.
SCALAR = (
    ConvConfig(128, 64, 16, 8, 3),
    ConvConfig(64, 64, 16, 4, 3),
    ConvConfig(64, 32, 16, 4, 3),
)


def configs_for(
    m: int, n: int, k: int, sm_count: int, dtype: torch.dtype, sm: int
) -> list[ConvConfig]:
    """The few tilings worth timing for a layer, at most six, the most promising first. Among them
    are always one that needs no workspace and one of four warps.

    sm_count: multiprocessors of the GPU; sm: its compute capability, 90 for an H200.
    """
    tilings, rate = _tilings(dtype, sm)

    def cost(config: ConvConfig) -> float:
        return estimate(config, m, n, k, sm_count, rate)

    found = []
    for tiling in tilings:
        whole, *parts = _with_splits(tiling, m, n, k, sm_count)
        best = min(parts, key=cost, default=whole)
        found += [whole] if cost(whole) <= cost(best) else [best, whole]
    found.sort(key=cost)
    chosen = found[:MOST_CONFIGS]
    for needed in (_is_whole, _has_four_warps):
        if not any(map(needed, chosen)):
            chosen[-1] = next(filter(needed, found))
    return chosen


def estimate(config: ConvConfig, m: int, n: int, k: int, sm_count: int, rate: int) -> float:
    """Clock cycles of a layer, roughly. rate: multiply-adds of a multiprocessor in one cycle."""
    item = 4 if rate == SCALAR_RATE else 2
    tile = config.block_m * config.block_n
    operands = (config.block_m + config.block_n) * config.block_k * item  # bytes a step
    steps = cdiv(cdiv(k, config.block_k), config.split_k)
    step = max(tile * config.block_k / rate, operands / L2_BYTES, STEP_CYCLES)
    written = 4 * tile if config.split_k > 1 else item * tile
    program = steps * step + max(written / MEMORY_BYTES, tile / EPILOGUE_RATE)
    programs = cdiv(m, config.block_m) * cdiv(n, config.block_n) * config.split_k
    beside = max(1, min(SHARED_BYTES // (operands * config.num_stages), 16 // config.num_warps))
    cycles = cdiv(programs, sm_count) * program
    cycles += cdiv(programs, sm_count * beside) * PROGRAM_CYCLES
    if config.split_k > 1:
        cycles += LAUNCH_CYCLES + 4 * config.split_k * m * n / (MEMORY_BYTES * sm_count)
    return cycles


def workspace_bytes(config: ConvConfig, m: int, n: int) -> int:
    """What the partial sums of a split K take, float32."""
    return 0 if config.split_k == 1 else 4 * config.split_k * m * n


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tilings(dtype: torch.dtype, sm: int) -> tuple[tuple[ConvConfig, ...], int]:
    """Tilings for a GPU, and its rate."""
    if dtype == torch.float32 or sm < 80:
        return SCALAR, SCALAR_RATE
    return (WARPGROUP, 2048) if 90 <= sm < 120 else (WARP, 512)


def _with_splits(tiling: ConvConfig, m: int, n: int, k: int, sm_count: int) -> list[ConvConfig]:
    """The tiling without and with the splits of K that leave every part some steps and help to
    fill the GPU. Two steps need no more than two stages, and shared memory for more programs.
    """
    programs = cdiv(m, tiling.block_m) * cdiv(n, tiling.block_n)
    steps = cdiv(k, tiling.block_k)
    return [
        replace(
            tiling,
            split_k=split,
            num_stages=tiling.num_stages if cdiv(steps, split) > 2 else 2,
        )
        for split in SPLITS
        if split == 1 or (steps >= LEAST_STEPS * split and programs * split <= 2 * sm_count)
    ]


def _is_whole(config: ConvConfig) -> bool:
    return config.split_k == 1


def _has_four_warps(config: ConvConfig) -> bool:
    return config.num_warps == 4
