"""A network outside of its process: as a folder that the Hugging Face Hub knows, `model.safetensors` and
`config.json`."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# In front of a network's name where other libraries look for it: they have networks of the same names.
PREFIX = "mvit3_"


def needed(package: str, purpose: str) -> ModuleType:
    """An optional package; ImportError, with what needs it, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {package} (pip install {package})") from error


def refuse_script() -> None:
    """Says to torch.jit.script what takes its place."""
    raise NotImplementedError(
        "torch.jit.script cannot compile networks of mvit3_kernels, whose blocks choose their kernels in Python: use "
        "torch.export, torch.onnx.export(dynamo=True) or torch.jit.trace, or torch.compile"
    )


class Savable:
    """What networks of `create_model` have to save themselves, and to say how they cannot be."""

    # `create_model` with the arguments that made this network
    _created: partial | None = None
    # how a published classifier reads images, as `registry.preprocessing` says it
    pretrained_cfg: dict[str, Any] | None = None

    def __prepare_scriptable__(self) -> None:
        """torch.jit.script asks for this."""
        refuse_script()

    def pretrained_config(self) -> dict[str, Any]:
        """What `config.json` says: the name behind "mvit3_" and the other arguments of `create_model`, in the form that
        timm reads too.

        Raises:
            ValueError: the network is not what `create_model` makes of these arguments: it was made by its class, or
                layers of it were replaced or pruned.
        """
        if self._created is None:
            raise ValueError(
                f"a network must be made by create_model to be saved, got a {type(self).__name__} made by its class"
            )
        made = partial(self._created, **({} if _has_features_only(self) else {"num_classes": self.num_classes}))
        _check_same(self, made)
        (name,), arguments = made.args, {key: value for key, value in made.keywords.items() if value is not None}
        num_classes = arguments.pop("num_classes", 0)
        found = {"architecture": PREFIX + name, "num_classes": num_classes, "model_args": arguments}
        if self.pretrained_cfg is not None:
            found["pretrained_cfg"] = self.pretrained_cfg | {"num_classes": num_classes}
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes the network into a folder, which is made where it is missing: its weights into `model.safetensors`,
        `pretrained_config` into `config.json`. `mvit3_kernels.from_pretrained` reads it.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: as `pretrained_config`, or a weight is on the meta device.
        """
        safetensors = needed("safetensors.torch", "save_pretrained")
        text, state = json.dumps(self.pretrained_config(), indent=2), self.state_dict()
        if any(tensor.is_meta for tensor in state.values()):
            raise ValueError("a network must have storage to be saved, got one on the meta device")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        safetensors.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(text + "\n")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Network of mvit3_kernels",
    ) -> str:
        """Saves the network as `save_pretrained` does into a repository of the Hugging Face Hub, which is made where it
        is missing. Returns the address of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            ValueError: as `pretrained_config`.
        """
        api = needed("huggingface_hub", "push_to_hub").HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(done)


def _has_features_only(model: Any) -> bool:
    return getattr(model, "features_only", False)


def _check_same(model: Any, made: partial) -> None:
    """Raises ValueError unless a network has the tensors, and the pooling, of one that its arguments make."""
    with torch.device("meta"):
        fresh = made()
    own, other = (_shapes(network.state_dict()) for network in (model, fresh))
    pooling, usual = (getattr(network, "global_pool", None) for network in (model, fresh))
    wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    wrong += [] if pooling == usual else [f"global_pool {pooling!r}"]
    if wrong:
        raise ValueError(
            f"a network must be as create_model makes it to be saved, got one that was changed: {', '.join(wrong[:5])}"
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
