"""PyTorch as a peer on a GPU: its network between our own resize, decoding and NMS.

What is compared is then the network and how it is launched. The pictures are staged in pinned
memory and copied in at once, as our engine does it; the network runs folded, channels-last and in
half precision, eagerly or compiled with max-autotune, which brings CUDA graphs. (Inductor's Triton
template for convolutions is left out: before PyTorch 2.13 it is silently wrong for kernels other
than 1x1 with 8 or more warps, pytorch issue 173068.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch._inductor.config as inductor
from torch import Tensor

from yolov4_fast.engines.pipeline import Settings
from yolov4_fast.model import Model
from yolov4_fast.network.fold import fold
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops import diou_nms
from yolov4_fast.ops.decode import Candidates
from yolov4_fast.ops.kernels import decode, resize
from yolov4_fast.ops.pack import pack
from yolov4_fast.ops.resize import region

TABLE_COLUMNS = 12
CAPACITY = 4096
MAX_DETECTIONS = 300


class TorchPeer:
    """Detects in batches of pictures of one size. compiled: by torch.compile, else eagerly."""

    def __init__(
        self,
        model: Model,
        pictures: Sequence[np.ndarray],
        settings: Settings,
        *,
        dtype: torch.dtype = torch.float16,
        compiled: bool = False,
        device: str = "cuda",
    ) -> None:
        self.settings = settings
        self.network, state = fold(model.network, model.state)
        module = NetworkModule(self.network)
        module.load_state_dict(state)
        module = module.eval().requires_grad_(False).to(device, dtype)
        self.module = module.to(memory_format=torch.channels_last)
        if compiled:
            # The variable of that name is read once, when somebody first imports Inductor.
            inductor.max_autotune_conv_backends = "ATEN"
            self.module = torch.compile(self.module, mode="max-autotune", dynamic=False)
        batch, (height, width, _) = len(pictures), pictures[0].shape
        table = 8 * TABLE_COLUMNS * batch
        self.host = torch.empty(table + batch * height * width * 3, dtype=torch.uint8)
        self.host = self.host.pin_memory()
        self.staged = torch.empty_like(self.host, device=device)
        self.pixels = self.host[table:].view(batch, height, width, 3)
        on_device = self.staged[table:].view(batch, height, width, 3)
        place = region((height, width), self.network.height, self.network.width, settings.resize)
        rows = [resize.table_row(image, place) for image in on_device]
        self.host[:table].view(torch.int64).copy_(torch.tensor(rows).flatten())
        self.table = self.staged[:table].view(torch.int64).view(batch, TABLE_COLUMNS)
        shape = (batch, self.network.height, self.network.width, 3)
        self.images = torch.empty(shape, dtype=dtype, device=device)
        class_ids = torch.empty(batch, CAPACITY, dtype=torch.int32, device=device)
        self.numbers = torch.empty_like(class_ids)
        self.counts = torch.empty(batch, dtype=torch.int32, device=device)
        self.candidates = Candidates(
            torch.empty(batch, CAPACITY, 4, device=device),
            torch.empty(batch, CAPACITY, device=device),
            class_ids,
            self.counts,
        )
        self.kept = (torch.empty(0), torch.empty(0))

    @torch.inference_mode()
    def detect(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Packed detections on the host, see `ops.pack`."""
        for target, picture in zip(self.pixels, pictures, strict=True):
            target.copy_(torch.from_numpy(picture))
        self.staged.copy_(self.host, non_blocking=True)
        resize.launch(self.table, self.images)
        maps = self.module(self.images.permute(0, 3, 1, 2))
        self.decode(maps)
        self.suppress()
        return self.pack().cpu()

    def decode(self, maps: Sequence[Tensor]) -> None:
        """maps: raw, channels-last."""
        heads = self.network.heads
        decode.append(
            [raw.permute(0, 2, 3, 1) for raw in maps],
            [head.anchors for head in heads],
            [head.scale_x_y for head in heads],
            [head.new_coords for head in heads],
            self.network.height,
            self.network.width,
            self.settings.confidence,
            None,
            *self.candidates[:3],
            self.numbers,
            self.counts,
        )

    def suppress(self) -> None:
        self.kept = diou_nms(
            *self.candidates,
            self.settings.iou,
            self.settings.beta,
            MAX_DETECTIONS,
            numbers=self.numbers,
        )

    def pack(self) -> Tensor:
        return pack(*self.candidates, *self.kept)
