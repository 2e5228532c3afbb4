"""Memory that a kernel needs only while it runs: one block that the kernels of an executor share,
as they run one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Every kernel says what it needs when it is made; the block is there from the first run on.

    Its address is fixed by then, so that it may stand in a captured graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes = 0
        self._block: Tensor | None = None

    def need(self, bytes: int) -> None:
        """Raises RuntimeError where kernels have run already."""
        if self._block is not None and bytes > self._block.numel():
            raise RuntimeError("a kernel was made after others had run in the same scratch memory")
        self._bytes = max(self._bytes, bytes)

    def block(self) -> Tensor:
        """[bytes] uint8, contents undefined."""
        if self._block is None:
            with torch.inference_mode(False):  # so that it may be written to outside of it as well
                size = max(self._bytes, 1)
                self._block = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._block
