"""Augmentations on (image, boxes, class ids) in NumPy and OpenCV, each drawing from a generator
it is given.
"""

from training.augment.config import AugmentConfig
from training.augment.pipeline import augmented
from training.augment.sample import Sample

__all__ = ["AugmentConfig", "Sample", "augmented"]
