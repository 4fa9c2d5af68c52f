"""Networks from a folder that `save_pretrained` wrote, or from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .checkpoint import CheckpointError, load_checkpoint
from .create import create_model
from .detection import SSDNetwork
from .network import MobileViT
from .saving import CONFIG, PREFIX, WEIGHTS, needed
from .segmentation import SegmentationNetwork

# What timm's `create_model` takes and ours does not: they change nothing in evaluation.
TIMM_ALONE = ("global_pool", "drop_path_rate", "act_layer", "scriptable", "exportable", "no_jit")


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **arguments: object,
) -> MobileViT | SegmentationNetwork | SSDNetwork:
    """The network of a folder, or of a repository of the Hugging Face Hub, in evaluation mode on the CPU.

    The folder holds `config.json` and `model.safetensors` as `save_pretrained` writes them, or as timm does for a
    network of `mvit3_kernels.timm`.

    Args:
        path_or_id: an existing folder, else the "owner/name" of a repository.
        revision, cache_dir, token, local_files_only: of the repository, as huggingface_hub takes them.
        arguments: of `create_model`, in place of the saved ones. With another `num_classes` the classifier, or the
            layers of a head that depend on it, are fresh.

    Raises:
        CheckpointError: a file is missing, damaged, or not of a network of this library.
        ImportError: safetensors is not installed, or, for a repository, huggingface_hub.
        TypeError, ValueError: wrong arguments, as in `create_model`.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        config, weights = folder / CONFIG, folder / WEIGHTS
    else:
        hub = needed("huggingface_hub", f"from_pretrained: {os.fspath(path_or_id)!r} is no folder; a download")
        options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        config, weights = (
            Path(hub.hf_hub_download(os.fspath(path_or_id), name, **options)) for name in (CONFIG, WEIGHTS)
        )
    name, saved = _read(config)
    if not weights.is_file():
        raise CheckpointError(f"{weights}: cannot be read: there is no such file")
    model = create_model(name, **saved | arguments)
    other_classes = getattr(model, "num_classes", None) != saved.get("num_classes", model.num_classes)
    load_checkpoint(model, weights, drop_head=other_classes and model.num_classes > 0)
    return model.eval()


def _read(path: Path) -> tuple[str, dict[str, object]]:
    """The name of a network and the other arguments of `create_model` in a `config.json`."""
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{path}: has no entry 'architecture' that names a network")
    arguments = dict(config.get("model_args") or {})
    if arguments.get("global_pool") == "":
        raise CheckpointError(f"{path}: of a network without pooling, which create_model does not make")
    for name in TIMM_ALONE:
        arguments.pop(name, None)
    if not arguments.get("features_only"):
        arguments.setdefault("num_classes", config.get("num_classes"))
    return config["architecture"].removeprefix(PREFIX), arguments
