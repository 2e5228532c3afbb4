"""Darknet's colour jitter: hue shifted, saturation and exposure (HSV value) scaled, in 8-bit HSV
through tables.
"""

from __future__ import annotations

import cv2
import numpy as np

_LEVELS = np.arange(256, dtype=np.float32)


def random_scale(limit: float, rng: np.random.Generator) -> float:
    """A factor from 1 to `limit`, or as often its inverse."""
    factor = rng.uniform(1.0, limit)
    return float(factor if rng.random() < 0.5 else 1.0 / factor)


def jitter_colour(
    image: np.ndarray, hue: float, saturation: float, exposure: float, rng: np.random.Generator
) -> np.ndarray:
    """A new image uint8 [H, W, 3] RGB with its colours changed.

    Hue moves by up to `hue` of the colour circle either way; saturation and exposure are multiplied
    by up to the factor given, or divided. hue=0, saturation=1 and exposure=1 change nothing.
    """
    shift = rng.uniform(-hue, hue)
    saturate = random_scale(saturation, rng)
    expose = random_scale(exposure, rng)
    if hue == 0 and saturation == 1 and exposure == 1:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue in 0..255: wraps as uint8 does
    tables = np.stack(
        [
            (_LEVELS + round(shift * 256)) % 256,
            np.minimum(_LEVELS * saturate, 255),
            np.minimum(_LEVELS * expose, 255),
        ],
        axis=-1,
    )
    hsv = cv2.LUT(hsv, np.rint(tables).astype(np.uint8)[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
