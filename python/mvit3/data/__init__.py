"""Images and labels for training, evaluation and prediction."""

from .config import AugmentConfig, DataConfig, SamplerConfig
from .decode import DecodeError
from .digits import Dataset, Split, load_digits
from .loader import EvaluationLoader, Loaders, TrainLoader, loaders, validation
from .sources import DataError
from .transforms import EvaluationTransform, evaluation_transform

__all__ = [
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
    "evaluation_transform",
    "load_digits",
    "loaders",
    "validation",
]
