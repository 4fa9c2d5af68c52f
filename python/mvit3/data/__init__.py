"""Images and labels for training, evaluation and prediction."""

from .config import AugmentConfig, DataConfig, SamplerConfig
from .decode import DecodeError
from .digits import DATASETS, Dataset, Split, augment, load_digits, train_batches
from .loader import EvaluationLoader, Loaders, TrainLoader, loaders, validation
from .sources import DataError
from .transforms import EvaluationTransform, evaluation_transform

__all__ = [
    "DATASETS",
    "AugmentConfig",
    "DataConfig",
    "DataError",
    "Dataset",
    "DecodeError",
    "EvaluationLoader",
    "EvaluationTransform",
    "Loaders",
    "SamplerConfig",
    "Split",
    "TrainLoader",
    "augment",
    "evaluation_transform",
    "load_digits",
    "loaders",
    "train_batches",
    "validation",
]
