"""Photometric changes of 8-bit pictures.

Darknet's jitter: hue shifted, saturation and exposure (HSV value) scaled, in 8-bit HSV through
tables. Brightness and contrast in RGB through one table. Gaussian noise.
"""

from __future__ import annotations

from statistics import NormalDist

import cv2
import numpy as np

_LEVELS = np.arange(256, dtype=np.float32)
_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
_NORMAL = _QUANTILES / _QUANTILES.std()  # 256 equally likely values of standard deviation 1


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


def jitter_tone(
    image: np.ndarray, brightness: float, contrast: float, rng: np.random.Generator
) -> np.ndarray:
    """A new image whose levels are spread about the middle one by up to `contrast`, or drawn
    together by it, and then moved by up to `brightness` of the range either way.
    """
    factor = random_scale(contrast, rng)
    shift = rng.uniform(-brightness, brightness) * 255
    offset = 127.5 * (1 - factor) + shift
    return cv2.addWeighted(image, factor, image, 0, offset)  # the second counts nothing


def add_noise(image: np.ndarray, limit: float, rng: np.random.Generator) -> np.ndarray:
    """A new image with Gaussian noise of a standard deviation between 0 and `limit` levels, of its
    own in each channel and cut off at 127 levels.

    Random bytes choose among 256 quantiles of the normal distribution: a tenth of the time that a
    generator of normal numbers takes.
    """
    levels = np.clip(_NORMAL * rng.uniform(0, limit), -127, 127)
    picks = np.frombuffer(rng.bytes(image.size), dtype=np.uint8).reshape(image.shape)
    noise = cv2.LUT(picks, np.rint(levels + 128).astype(np.uint8))
    return cv2.addWeighted(image, 1, noise, 1, -128)
