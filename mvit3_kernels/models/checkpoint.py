"""Loading of published checkpoints, and of those of timm and transformers."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .keys import KEY_MAPS
from .network import LAYERS, MobileViT
from .registry import ARCHITECTURES, list_models

# Entries of a training checkpoint that hold the tensors of a network, in the order in which they are looked for.
_EMA_ENTRIES = (
    "ema_model_state_dict",
    "ema_state_dict",
    "model_ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_model",
    "ema",
)
_ENTRIES = ("model_state_dict", "state_dict", "model", "module", "net")

# What data parallelism, torch.compile, weight averaging and training frameworks put before the names of the module that
# they wrap.
_WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+|(?<![^.])_orig_mod\.")

# First words of published names: any other one that all names of a file share is that of a wrapper too, such as "m."
# of a LightningModule that calls its network m.
_PARTS = {"encoder", "conv_1", *LAYERS, "conv_1x1_exp", "classifier", "seg_head", "extra_layers", "ssd_heads"}

# Parts of a network behind the backbone (and the step counter of torch's AveragedModel): a model that has no such part
# takes none.
_HEADS = ("classifier", "conv_1x1_exp", "seg_head", "ssd_heads", "extra_layers", "segmentation_head", "n_averaged")


_OLD_FORMAT = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # what torch.save wrote first, before 1.6


class CheckpointError(RuntimeError):
    """A file that cannot be loaded; the message names the file and the reason, and the model is as it was."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        format: whose tensor names the file has: "published", "timm mobilevit", "timm mobilevitv2", "transformers
            MobileViT" or "transformers MobileViTV2".
        entry: the entry of the training checkpoint that was taken, such as "ema_state_dict"; None where the file is a
            plain state dict.
        loaded: how many tensors of the model were set.
        dropped: names in the file that were not used: those of a head that the model lacks, or that `drop_head`
            replaced.
        kept: names in the model that were not set: the head with `drop_head`, and `num_batches_tracked` that the file
            lacks.
    """

    format: str
    entry: str | None
    loaded: int
    dropped: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        source = f"{self.format} names" + (f", entry {self.entry!r}" if self.entry else "")
        parts = [_listing("dropped from the file", self.dropped), _listing("kept in the model", self.kept)]
        return "; ".join([f"loaded {self.loaded} tensors ({source})", *filter(None, parts)])


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, drop_head: bool = False, ema: bool | None = None
) -> LoadReport:
    """Loads the weights in a file into a model, completely or not at all.

    The file holds a state dict, or a training checkpoint with one, as torch.save or safetensors writes them; never is
    code in it run. Its tensor names are the published ones, timm's or transformers' (recognised by themselves), behind
    any "module.", "model." or "_orig_mod.", and any other prefix that all of them share. A network without "encoder."
    in its names takes the backbone out of a segmentation or detection checkpoint. The weights of a head that the model
    does not have (features_only, num_classes=0) are dropped. Tensors are converted to the model's dtype and device.

    To load a backbone into a network with another head, load it into the backbone: `load_checkpoint(network.encoder,
    path)`.

    Args:
        model: a network of `create_model`, or any module with published names; may be compiled or wrapped in data
            parallelism.
        path: the file.
        drop_head: keep the model's fresh classifier, for another number of classes (and its conv_1x1_exp where the file
            has none; of a segmentation or detection network the layers of its head that differ).
        ema: of a training checkpoint, True takes the averaged weights, False the raw ones, None those that a checkpoint
            of `mvit3 train` names as the better ones, else the averaged where there are any (the published accuracies
            are theirs).

    Returns:
        What was loaded, dropped and kept.

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged or foreign, holds Python objects that only code
            could restore, lacks the entry that `ema` asks for, or its tensors are not exactly the model's; all such
            names are counted and the first are listed.
        ValueError: the model is on the meta device, or is a container of several networks.
    """
    state = model.state_dict()
    own = {_WRAPPERS.sub("", name): (name, tensor) for name, tensor in state.items()}
    if len(own) != len(state):
        raise ValueError("model must be one network, got a container of several: load each by itself")
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("model must have storage, got one on the meta device: call model.to_empty(device=...) first")
    path = os.fsdecode(path)
    entry, tensors = _select(path, _read(path), ema)
    with_encoder = any(name.startswith("encoder.") for name in own)
    layout, sources = _published_names(path, tensors, with_encoder, {_part(name) for name in own})

    foreign_parts = set(_HEADS) - {_part(name) for name in own} | ({"classifier"} if drop_head else set())
    dropped = {name for name in sources if _part(name) in foreign_parts}
    found = {
        name: _join(path, [tensors[key] for key in keys], keys) for name, keys in sources.items() if name not in dropped
    }
    optional = {"classifier", "conv_1x1_exp"} - {_part(name) for name in found} if drop_head else set()
    missing = [
        name
        for name in own
        if name not in found and not (_part(name) in optional or name.endswith("num_batches_tracked"))
    ]
    unexpected = [name for name in found if name not in own]
    unlike = [name for name in found if name in own and not _fits(name, found[name], own[name][1])]
    if drop_head:  # of a network for dense prediction: what depends on the number of classes
        others = {name for name in unlike if _part(name) in ("seg_head", "ssd_heads")}
        dropped |= others
        unlike = [name for name in unlike if name not in others]
        found = {name: tensor for name, tensor in found.items() if name not in others}
    if missing or unexpected or unlike:
        differences = [
            f"{name} {_describe(found[name])} in the file, {_describe(own[name][1])} in the model" for name in unlike
        ]
        lines = [
            _listing("missing from the file", missing),
            _listing("unexpected in the file", [", ".join(sources[name]) for name in unexpected]),
            _listing("unlike", differences),
        ]
        hint = _hint(sources, found, own, [*missing, *unexpected, *unlike])
        raise CheckpointError(
            "\n  ".join(filter(None, [f"{path}: its tensors ({layout} names) are not the model's", *lines, hint]))
        )

    model.load_state_dict({own[name][0]: tensor for name, tensor in found.items()}, strict=False)
    return LoadReport(
        layout,
        entry,
        len(found),
        tuple(key for name in sources if name in dropped for key in sources[name]),
        tuple(name for stripped, (name, _) in own.items() if stripped not in found),
    )


def count_outputs(path: str | os.PathLike[str]) -> int | None:
    """Classes of the classifier in a file that `load_checkpoint` reads, None where it has none; CheckpointError as
    there."""
    path = os.fsdecode(path)
    _, tensors = _select(path, _read(path), None)
    _, sources = _published_names(path, tensors, False)
    heads = [
        tensors[key]
        for name, keys in sources.items()
        if _part(name) == "classifier"
        for key in keys
        if name.endswith("weight")
    ]
    return int(heads[0].shape[0]) if heads else None


def parts(path: str | os.PathLike[str]) -> set[str]:
    """The parts of a network that a file which `load_checkpoint` reads has tensors of: the first words of their
    published names, such as encoder and seg_head; CheckpointError as there."""
    path = os.fsdecode(path)
    _, tensors = _select(path, _read(path), None)
    return {_part(name) for name in _published_names(path, tensors, True)[1]}


def _read(path: str) -> object:
    """The content of a file that torch.save or safetensors wrote, tensors on the CPU."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    # A safetensors file starts with the length of its header, which is JSON.
    if path.endswith(".safetensors") or start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:4] == b"PK\x03\x04":
        _check_archive(path)
    elif start[:1] != b"\x80":
        raise CheckpointError(f"{path}: neither a file of torch.save nor of safetensors; it starts with {start[:8]!r}")
    elif _OLD_FORMAT not in start:
        raise CheckpointError(
            f"{path}: a Python pickle, but not of torch.save; it is not read, as that can run code from the file"
        )
    try:
        # Mapped, what is not needed of a training checkpoint (optimiser state) takes no memory; files of before torch
        # 1.6 cannot be.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start[:1] == b"P")
    except Exception as error:  # on damaged data torch's reader ends in errors of many types
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it needs the package safetensors (pip install safetensors)") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated, damaged or not of safetensors: {error}") from error


def _check_archive(path: str) -> None:
    """Raises CheckpointError unless the zip file is complete and is torch.save's: torch's own reader checks no
    checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch.serialization.set_crc32_options(False) leaves all checksums 0.
            damaged = archive.testzip() if any(member.CRC for member in members) else None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from error
    if damaged:
        raise CheckpointError(f"{path}: damaged: wrong checksum of {damaged}")
    names = {member.filename.rpartition("/")[2] for member in members}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript program; save its tensors: torch.save(torch.jit.load(file).state_dict(), new_file)"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, but not of torch.save")


def _reason(error: Exception) -> str:
    """torch.load's error in a user's words."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", text)):
        return (
            f"it holds a Python object ({found[1]}); restoring one can run code from the file, so only tensors and "
            "plain values are read. "
            "If you trust its origin, save its state dict alone (torch.load(file, weights_only=False), then "
            "torch.save) or allow the type "
            "with torch.serialization.safe_globals"
        )
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.search(r"(.+)", text)
    return f"truncated, damaged or not of torch.save: {detail[1][:200] if detail else type(error).__name__}"


def _select(path: str, content: object, ema: bool | None) -> tuple[str | None, Mapping[str, Tensor]]:
    """The state dict in a file's content, and the entry where it was found."""
    if _is_state_dict(content):
        if ema:
            raise CheckpointError(
                f"{path}: a plain state dict, which does not tell averaged weights from others: leave ema at None"
            )
        return None, content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if ema is None and content.get("weights") in ("average", "trained"):
        ema = content["weights"] == "average"
    for name in {None: _EMA_ENTRIES + _ENTRIES, True: _EMA_ENTRIES, False: _ENTRIES}[ema]:
        value = content.get(name)
        if _is_state_dict(value):
            return name, value
        for inner in _ENTRIES if isinstance(value, Mapping) else ():  # such as {"ema": {"module": ..., "decay": ...}}
            if _is_state_dict(value.get(inner)):
                return f"{name}.{inner}", value[inner]
    kind = {None: "", True: " of averaged weights", False: " of raw weights"}[ema]
    entries = [f"{name!s} ({type(value).__name__})" for name, value in content.items()]
    raise CheckpointError(f"{path}: no state dict{kind} in it; {_listing('entries', entries) or 'it is an empty dict'}")


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _without_wrappers(keys: Iterable[str], parts: Collection[str]) -> dict[str, str]:
    """Each key, and what is left of it without the names of wrappers. `parts` are first words of the model's names."""
    stripped = {key: _WRAPPERS.sub("", key) for key in keys}
    while True:
        shared = {_part(name) for name in stripped.values() if "." in name}
        if len(shared) != 1 or shared <= _PARTS.union(parts):
            return stripped
        prefix = f"{shared.pop()}."
        stripped = {key: _WRAPPERS.sub("", name.removeprefix(prefix)) for key, name in stripped.items()}


def _published_names(
    path: str, keys: Iterable[str], with_encoder: bool, parts: Collection[str] = ()
) -> tuple[str, dict[str, list[str]]]:
    """The layout of the keys, and for each published name the keys whose tensors, stacked, are its tensor."""
    stripped = _without_wrappers(keys, parts)
    layout, names = "published", [(name, 0, key) for key, name in stripped.items()]
    for key_map in KEY_MAPS:
        if key_map.matches(stripped.values()):
            layout = key_map.name
            names = [
                (name, place, key)
                for (name, place, _), key in zip(key_map.translate(stripped.values()), stripped, strict=True)
            ]
    stacks = defaultdict(dict)
    for name, place, key in names:
        stack = stacks[name if with_encoder else name.removeprefix("encoder.")]
        if place in stack:
            raise CheckpointError(f"{path}: {stack[place]} and {key} are the same tensor of the model")
        stack[place] = key
    return layout, {name: [stack[place] for place in sorted(stack)] for name, stack in stacks.items()}


def _join(path: str, tensors: list[Tensor], keys: list[str]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    try:
        return torch.cat(tensors)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {', '.join(keys)} do not fit together: {', '.join(map(_describe, tensors))}"
        ) from error


def _part(name: str) -> str:
    return name.partition(".")[0]


def _fits(name: str, tensor: Tensor, own: Tensor) -> bool:
    # The average of a counter can be a fraction; elsewhere an integer in place of a float is another thing (quantised
    # weights).
    same_kind = tensor.is_floating_point() == own.is_floating_point() or name.endswith("num_batches_tracked")
    return tensor.shape == own.shape and same_kind and tensor.layout == torch.strided and not tensor.is_meta


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(title: str, names: Iterable[str], limit: int = 8) -> str:
    """ "title (count): the first names"; nothing for no names."""
    names = list(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title} ({len(names)}): {', '.join(names[:limit])}{more}" if names else ""


def _hint(
    sources: Mapping[str, list[str]],
    found: Mapping[str, Tensor],
    own: Mapping[str, tuple[str, Tensor]],
    wrong: list[str],
) -> str:
    """What to do about the wrong names, where that can be told."""
    dense = {"seg_head": "segmentation", "ssd_heads": "detection"}
    task = next((dense[part] for part in map(_part, sources) if part in dense), None)
    if task and all(_part(name) in ("classifier", "conv_1x1_exp") for name in wrong):
        return (
            f"The file is of a {task} network: drop_head=True takes its backbone and keeps the model's fresh classifier"
        )
    if all(_part(name) == "classifier" for name in wrong):
        return (
            "Only the classifier differs: drop_head=True keeps the model's fresh one; or create the model with the "
            "file's num_classes"
        )
    if task and all(_part(name) in dense for name in wrong):
        return "Only layers of the head differ: drop_head=True keeps the model's fresh ones of those, for other classes"
    if any(name.startswith("encoder.") for name in own) and not any(name.startswith("encoder.") for name in found):
        return "To load a backbone into this network, call load_checkpoint(network.encoder, path)"
    if not any(name in own for name in found):
        return "No name is known: neither a published one nor one of timm or transformers"
    fitting = [name for name in list_models() if _is_backbone_of(name, found)]
    return f"The file fits create_model({' or '.join(map(repr, fitting))})" if fitting else ""


def _is_backbone_of(name: str, found: Mapping[str, Tensor]) -> bool:
    with torch.device("meta"):
        own = MobileViT(ARCHITECTURES[name], features_only=True).state_dict()
    names = {name for name in own if not name.endswith("num_batches_tracked")}
    return names <= found.keys() and all(found[name].shape == own[name].shape for name in names)
