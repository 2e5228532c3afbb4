"""`Detections`: what was found in one image, frozen, and the forms it can take: COCO, JSON,
supervision, a drawing.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from yolov4_fast.sources import to_image, to_pixels

if TYPE_CHECKING:
    import supervision

FONT = cv2.FONT_HERSHEY_SIMPLEX


class Detection(NamedTuple):
    """One object."""

    box: np.ndarray  # [4] float32 xyxy px
    score: float
    class_id: int
    class_name: str


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, by descending score. The arrays cannot be written to."""

    boxes: np.ndarray  # [N, 4] float32 xyxy px of the original image, clipped to it
    scores: np.ndarray  # [N] float32 in 0..1
    class_ids: np.ndarray  # [N] int64
    class_names: tuple[str, ...]  # of all classes, so that class_names[class_id] is a name
    image_size: tuple[int, int]  # (height, width) px

    def __post_init__(self) -> None:
        for name, dtype in (
            ("boxes", np.float32),
            ("scores", np.float32),
            ("class_ids", np.int64),
        ):
            values = np.asarray(getattr(self, name), dtype).view()
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.class_ids.shape != (count,):
            raise ValueError(
                f"boxes {list(self.boxes.shape)}, scores {list(self.scores.shape)} and class_ids "
                f"{list(self.class_ids.shape)} must be [N, 4], [N] and [N]"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for box, score, class_id in zip(
            self.boxes, self.scores.tolist(), self.class_ids.tolist(), strict=True
        ):
            yield Detection(box, score, class_id, self.class_names[class_id])

    def to_json(self) -> list[dict[str, Any]]:
        """One {"class_id", "class_name", "score", "box": [x1, y1, x2, y2]} per detection."""
        return [
            {
                "class_id": found.class_id,
                "class_name": found.class_name,
                "score": found.score,
                "box": found.box.tolist(),
            }
            for found in self
        ]

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Entries of a COCO results file, boxes as [x, y, width, height].

        category_ids: the data set's category of each class; the class ids themselves by default.
        """
        if category_ids is not None and len(category_ids) < len(self.class_names):
            raise ValueError(
                f"{len(category_ids)} category ids for {len(self.class_names)} classes: "
                "give one per class"
            )
        entries = []
        for found in self:
            x1, y1, x2, y2 = found.box.tolist()
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[found.class_id] if category_ids else found.class_id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": found.score,
                }
            )
        return entries

    def to_supervision(self) -> supervision.Detections:
        """The same as `supervision.Detections`, class names in its data.

        Needs the supervision package.
        """
        try:
            import supervision
        except ImportError:
            raise ImportError("to_supervision needs supervision: pip install supervision") from None
        names = np.array([self.class_names[class_id] for class_id in self.class_ids], dtype=str)
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            data={"class_name": names},
        )

    def draw(self, image: Any) -> np.ndarray:  # [H, W, 3] uint8 RGB
        """A copy of the image with boxes, class names and scores, the likeliest on top.

        image: of any kind that `detect` takes, of `image_size`. Raises ValueError where the size
        differs.
        """
        canvas = to_pixels(to_image(image)).copy()
        if canvas.shape[:2] != tuple(self.image_size):
            raise ValueError(
                f"these detections belong to an image of {self.image_size[1]}x"
                f"{self.image_size[0]} px, not {canvas.shape[1]}x{canvas.shape[0]}"
            )
        for found in reversed(list(self)):
            _draw_one(canvas, found)
        return canvas


def class_color(class_id: int) -> tuple[int, int, int]:
    """A colour (RGB, 0..255) for a class: always the same, and far from those of its neighbours."""
    # Steps of the golden ratio never come near an earlier hue soon; two rings of lightness tell
    # later rounds apart.
    hue = (0.02 + class_id * 0.618033988749895) % 1
    red, green, blue = colorsys.hls_to_rgb(hue, (0.5, 0.64, 0.38)[class_id // 8 % 3], 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_one(canvas: np.ndarray, found: Detection) -> None:
    height, width = canvas.shape[:2]
    thickness = max(1, round((height + width) / 700))
    color = class_color(found.class_id)
    x1, y1, x2, y2 = (round(value) for value in found.box.tolist())
    cv2.rectangle(canvas, (x1, y1), (min(x2, width - 1), min(y2, height - 1)), color, thickness)

    scale = max(0.35, (height + width) / 3200)
    stroke = max(1, round(scale * 1.6))
    text = f"{found.class_name} {found.score:.2f}"
    (text_width, text_height), baseline = cv2.getTextSize(text, FONT, scale, stroke)
    label_width, label_height = text_width + 4, text_height + baseline + 2
    left = max(0, min(x1, width - label_width))
    top = y1 - label_height if y1 >= label_height else y1  # above the box, or just inside it
    top = max(0, min(top, height - label_height))
    cv2.rectangle(canvas, (left, top), (left + label_width, top + label_height), color, cv2.FILLED)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    origin = (left + 2, top + text_height + 1)
    cv2.putText(canvas, text, origin, FONT, scale, ink, stroke, cv2.LINE_AA)
