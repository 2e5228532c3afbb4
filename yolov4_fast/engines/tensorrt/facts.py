"""What an engine file knows of its plan without TensorRT, and where the plan can run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Self

from yolov4_fast.engines.cuda.device import Properties
from yolov4_fast.engines.engine import EngineError

PLAN = "model.plan"
FACTS = "plan.json"
AMPERE = 80  # the least compute capability x 10 of "ampere-plus"


@dataclass(frozen=True)
class Facts:
    """Of `builder.Built`: version of TensorRT and GPU that the plan was built with, and whether it
    runs with others; and the names of its maps, in head order.
    """

    version: str
    gpu: str
    sm: int
    version_compatible: bool
    hardware_compatible: str | None
    maps: tuple[str, ...]

    @classmethod
    def of(cls, text: bytes) -> Self:
        """Raises EngineError."""
        try:
            facts = json.loads(text)
            options = facts["options"]
            return cls(
                version=str(facts["tensorrt"]),
                gpu=str(facts["gpu"]),
                sm=int(facts["sm"]),
                version_compatible=bool(options["version_compatible"]),
                hardware_compatible=options["hardware_compatible"],
                maps=tuple(map(str, facts["maps"])),
            )
        except (ValueError, KeyError, TypeError):
            raise EngineError(f"its {FACTS} is damaged") from None

    def check(self, version: str, found: Properties) -> None:
        """Raise EngineError where the plan cannot run with this TensorRT or on this GPU."""
        if not self._runs_with(version):
            later = " or a later one of the same major version" if self.version_compatible else ""
            raise EngineError(
                f"its plan was built by TensorRT {self.version}, and this is {version}: plans run "
                f"with the version that built them{later}"
            )
        if not self._runs_on(found):
            raise EngineError(
                f"its plan was built on {self.gpu} (sm_{self.sm}), and this is {found.name} "
                f"(sm_{found.sm})"
            )

    def _runs_with(self, version: str) -> bool:
        if version == self.version:
            return True
        built, here = _numbers(self.version), _numbers(version)
        return self.version_compatible and built[:1] == here[:1] and built <= here

    def _runs_on(self, found: Properties) -> bool:
        match self.hardware_compatible:
            case "ampere-plus":
                return found.sm >= AMPERE
            case "same-sm":
                return found.sm == self.sm
        return (found.name, found.sm) == (self.gpu, self.sm)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
