"""Images and labels for training, evaluation and prediction."""

from .config import AugmentConfig, DataConfig, SamplerConfig
from .digits import DATASETS, Dataset, Split, augment, load_digits, train_batches

__all__ = [
    "DATASETS",
    "AugmentConfig",
    "DataConfig",
    "Dataset",
    "SamplerConfig",
    "Split",
    "augment",
    "load_digits",
    "train_batches",
]
