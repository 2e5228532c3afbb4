"""What can be asked of a TensorRT build beyond the network, its precision and its largest batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from yolov4_fast.engines.engine import EngineError

Size = tuple[int, int]  # width, height in px
Compatibility = Literal["ampere-plus", "same-sm"]


@dataclass(frozen=True, kw_only=True)
class TensorRtOptions:
    """How a plan is built. Raises EngineError where values do not fit together.

    min_batch, opt_batch: the least batch that runs, and the one that kernels are chosen for; the
    largest batch where opt_batch is None. min_size, opt_size, max_size: all three or none, for a
    model whose height and width are open. workspace_mb: most scratch memory of a layer in MiB; all
    of the GPU's where None. timing_cache: file of kernel timings that is read and added to; by
    version and GPU in the user's cache folder for "default", none for None. version_compatible:
    the plan runs with later versions of TensorRT too. hardware_compatible: "ampere-plus" runs on
    all GPUs from Ampere on, "same-sm" on others of the same compute capability, None only on this
    model. dla: number of the DLA core that runs what it can, the GPU the rest. detailed: the plan
    knows what its layers are made of, for the inspector. tf32: float32 convolutions may round
    their inputs to 10 bits.
    """

    min_batch: int = 1
    opt_batch: int | None = None
    min_size: Size | None = None
    opt_size: Size | None = None
    max_size: Size | None = None
    workspace_mb: int | None = None
    timing_cache: Path | Literal["default"] | None = "default"
    version_compatible: bool = False
    hardware_compatible: Compatibility | None = None
    dla: int | None = None
    detailed: bool = True
    tf32: bool = False

    def __post_init__(self) -> None:
        for name in ("min_batch", "opt_batch", "workspace_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{name} {value}: it must be at least 1")
        if self.opt_batch is not None and self.opt_batch < self.min_batch:
            raise EngineError(f"opt_batch {self.opt_batch} is less than min_batch {self.min_batch}")
        if self.dla is not None and self.dla < 0:
            raise EngineError(f"dla {self.dla}: DLA cores are numbered from 0")
        if isinstance(self.timing_cache, str) and self.timing_cache != "default":
            raise EngineError(
                f"timing_cache {self.timing_cache!r}: a file is given as a pathlib.Path; else "
                "'default' or None"
            )
        if self.hardware_compatible not in (None, *get_args(Compatibility)):
            raise EngineError(
                f"hardware_compatible {self.hardware_compatible!r} is not one of "
                f"{', '.join(get_args(Compatibility))}"
            )
        self._check_sizes()

    @property
    def sizes(self) -> tuple[Size, Size, Size] | None:
        """Least, usual and largest (width, height), where they are open."""
        if self.min_size is None or self.opt_size is None or self.max_size is None:
            return None
        return self.min_size, self.opt_size, self.max_size

    def batches(self, largest: int) -> tuple[int, int, int]:
        """Least, usual and largest batch. Raises EngineError where the largest is less."""
        usual = largest if self.opt_batch is None else self.opt_batch
        if not self.min_batch <= usual <= largest:
            raise EngineError(
                f"a least batch of {self.min_batch} and a usual one of {usual} do not fit a "
                f"largest of {largest}: each must be at most the next"
            )
        return self.min_batch, usual, largest

    def to_json(self) -> dict[str, Any]:
        """What shapes the plan, for programs: the place of the timing cache does not."""
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}

    def _check_sizes(self) -> None:
        given = [size for size in (self.min_size, self.opt_size, self.max_size) if size is not None]
        if not given:
            return
        if len(given) < 3:
            raise EngineError("min_size, opt_size and max_size go together: give all three or none")
        for axis, name in enumerate(("width", "height")):
            least, usual, largest = (size[axis] for size in given)
            if not 1 <= least <= usual <= largest:
                raise EngineError(
                    f"{name}s {least}, {usual} and {largest} of min_size, opt_size and max_size: "
                    "each must be at least 1 and at most the next"
                )
