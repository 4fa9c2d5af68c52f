"""The network of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels.models.checkpoint import parts
from mvit3_kernels.models.drop_path import set_drop_path

from . import checkpoint
from .config import ModelConfig, TrainConfig
from .names import task_of

# from the image on
STAGES = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp", "classifier")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: str, network: str) -> None:
    """Loads a state dict; CheckpointError where it is of another network, with what differs. The model is then as it
    was."""
    own = model.state_dict()
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    missing, strange = [name for name in own if name not in state], [name for name in state if name not in own]
    parts = []
    if other:
        there, here = ("x".join(map(str, tensors[other[0]].shape)) or "one number" for tensors in (state, own))
        parts.append(f"{other[0]} is {there} there and {here} in the network" + _more(other, "differ"))
    if missing:
        parts.append(f"it lacks {missing[0]}" + _more(missing, "are missing"))
    if strange:
        parts.append(f"it has {strange[0]}, which the network has not" + _more(strange, "are unknown"))
    if parts:
        raise checkpoint.CheckpointError(f"{origin} does not fit {network}: {'; '.join(parts)}")
    model.load_state_dict(state)


def _more(names: list[str], what: str) -> str:
    return f" ({len(names)} {what} in all)" if len(names) > 1 else ""


def backbone(model: nn.Module) -> nn.Module:
    """The part of a network that sees the image: of a classifier all of it."""
    return getattr(model, "encoder", model)


def stage_of(parameter: str) -> int:
    """Which of `STAGES` a parameter of a network belongs to; what stands behind the backbone of a network for dense
    prediction is its classifier."""
    part = parameter.removeprefix("encoder.").partition(".")[0]
    return STAGES.index(part if part in STAGES else "classifier")


def build_model(
    config: TrainConfig,
    num_classes: int,
    device: torch.device,
    pretrained: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """The network of a configuration, with fresh weights or, with `pretrained`, those that `model.pretrained` names;
    the seed decides the fresh ones. `say` is told what a backbone alone was loaded from."""
    torch.manual_seed(config.run.seed)
    m = config.model
    model = _create(m, num_classes)
    if m.pretrained and pretrained:
        _load_pretrained(model, m, num_classes, say)
    for module in _frozen(model, m):
        module.requires_grad_(False)
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)


def _create(config: ModelConfig, num_classes: int) -> nn.Module:
    return mvit3_kernels.create_model(
        config.name,
        num_classes,
        drop_rate=config.drop_rate,
        proj_drop_rate=config.proj_drop_rate,
        attn_drop_rate=config.attn_drop_rate,
        ffn_drop_rate=config.ffn_drop_rate,
        output_stride=config.output_stride,
    )


def _load_pretrained(model: nn.Module, config: ModelConfig, num_classes: int, say: Callable[[str], None]) -> None:
    """Loads `model.pretrained`: all of the network or, of a file without its head, the backbone."""
    ema = _average(Path(config.pretrained))
    if task_of(config.name) == "classification":
        mvit3_kernels.load_checkpoint(model, config.pretrained, drop_head=config.drop_head, ema=ema)
        return
    heads = {name.partition(".")[0] for name in model.state_dict()} - {"encoder"}
    if heads <= parts(config.pretrained):
        fresh = _class_layers(model, config, num_classes) if config.drop_head else {}
        mvit3_kernels.load_checkpoint(model, config.pretrained, drop_head=config.drop_head, ema=ema)
        model.load_state_dict(fresh, strict=False)
        return
    found = mvit3_kernels.load_checkpoint(model.encoder, config.pretrained, ema=ema)
    unused = sorted({name.removeprefix("module.").partition(".")[0] for name in found.dropped})
    say(
        f"model.pretrained {config.pretrained}: the backbone has its weights ({found.loaded} tensors); missing, and "
        f"fresh: {', '.join(sorted(heads))}; unexpected, and left out: {', '.join(unused) or 'nothing'}"
    )


def _class_layers(model: nn.Module, config: ModelConfig, num_classes: int) -> dict[str, Tensor]:
    """Copies of the tensors of a network whose shapes depend on the number of classes."""
    with torch.device("meta"):
        other = _create(config, num_classes + 1).state_dict()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.shape != other[name].shape}


def _average(path: Path) -> bool | None:
    """Whether the averaged weights of a file are its better ones; None where it does not tell."""
    content = checkpoint.read(path)
    return None if content is None else checkpoint.better_weights(content) == checkpoint.AVERAGE


def _frozen(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """What a configuration keeps as it is."""
    found = [getattr(backbone(model), stage) for stage in STAGES[: config.freeze_stages]]
    if config.freeze_bn:
        found += [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return found


def train_mode(model: nn.Module, config: ModelConfig) -> None:
    """Puts a network in training mode, but for what is frozen: that keeps its statistics and drops nothing."""
    model.train()
    set_drop_path(backbone(model), config.drop_path_rate)
    for module in _frozen(model, config):
        module.eval()


def evaluation_mode(model: nn.Module) -> None:
    """Puts a network in evaluation mode, without the hooks of training, so that its blocks run fused."""
    model.eval()
    set_drop_path(backbone(model), 0.0)
