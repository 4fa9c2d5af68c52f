"""Images and labels for training, evaluation and prediction."""

from importlib import import_module

# Name and module; each is loaded at its first use, because the options of the command line need `config` alone.
_HOMES = {
    "Annotations": "targets",
    "AugmentConfig": "config",
    "Boxes": "targets",
    "DataConfig": "config",
    "DataError": "errors",
    "Dataset": "digits",
    "DecodeError": "decode",
    "EvaluationLoader": "loader",
    "EvaluationTransform": "transforms",
    "Loaders": "loader",
    "SamplerConfig": "config",
    "Split": "digits",
    "TrainLoader": "loader",
    "evaluation_transform": "transforms",
    "load_digits": "digits",
    "loaders": "loader",
    "validation": "loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
