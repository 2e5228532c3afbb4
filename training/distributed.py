"""The processes of one training run: one alone, or those that torchrun started, one a device.

    torchrun --nproc-per-node 2 -m training.train ...

Rank 0 logs, validates and saves; the others wait for it. gloo joins processes on CPUs, nccl those
on GPUs. A process that fails ends the whole run, with one message: that of the first to fail.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=2)  # that the others wait for rank 0, which may validate for long
ERROR_KEY = "yolov4_fast/error"  # in the store that all processes share: the first to fail


@dataclass(frozen=True)
class Processes:
    """This process (`rank` of `world`, on `device`) among those of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    store: dist.Store | None = field(default=None, compare=False, repr=False)

    @classmethod
    def start(cls, device: torch.device) -> Processes:
        """Join the processes that torchrun's environment names; alone where it names none.

        device: where to train; a GPU without a number becomes the one of this process's number.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(device)
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if device.index >= torch.cuda.device_count():
                raise ValueError(
                    f"there are {torch.cuda.device_count()} GPUs here, none for process "
                    f"{device.index}: give torchrun no more --nproc-per-node"
                )
            torch.cuda.set_device(device)
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("yolov4_fast", store),
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
        return cls(device, rank, world, store)

    @property
    def main(self) -> bool:
        """Whether this is the process that logs, validates and saves."""
        return self.rank == 0

    @property
    def local_world(self) -> int:
        """Processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def sum_over(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; its own tensor where there is one alone.

        With GPUs the tensor must lie on one.
        """
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; every one has to ask."""
        if self.world == 1:
            return flag
        return bool(self.sum_over(torch.tensor(int(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def claim_error(self) -> bool:
        """Whether this process is the first of the run to fail, and so the one to say why."""
        if self.store is None:
            return True
        try:
            first = self.store.compare_set(ERROR_KEY, "", str(self.rank))
        except RuntimeError:  # the store went with the process that kept it
            return False
        return first == str(self.rank).encode()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
