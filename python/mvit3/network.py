"""The network of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels.nn import InvertedResidual, MobileViTV3Block, MobileViTV3SeparableBlock

from . import checkpoint
from .config import ModelConfig, TrainConfig

STAGES = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp", "classifier")  # from the image on


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: str, network: str) -> None:
    """Loads a state dict; CheckpointError where it is of another network, with what differs. The model is then as it was."""
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


def build_model(config: TrainConfig, num_classes: int, device: torch.device, pretrained: bool = True) -> nn.Module:
    """The network of a configuration, with fresh weights or, with `pretrained`, those that `model.pretrained` names; the seed decides the
    fresh ones."""
    torch.manual_seed(config.run.seed)
    m = config.model
    model = mvit3_kernels.create_model(
        m.name,
        num_classes,
        drop_rate=m.drop_rate,
        proj_drop_rate=m.proj_drop_rate,
        attn_drop_rate=m.attn_drop_rate,
        ffn_drop_rate=m.ffn_drop_rate,
    )
    if m.pretrained and pretrained:
        mvit3_kernels.load_checkpoint(model, m.pretrained, drop_head=m.drop_head, ema=_average(Path(m.pretrained)))
    for module in _frozen(model, m):
        module.requires_grad_(False)
    if m.drop_path_rate:
        add_drop_path(model, m.drop_path_rate)
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)


def _average(path: Path) -> bool | None:
    """Whether the averaged weights of a file are its better ones; None where it does not tell."""
    content = checkpoint.read(path)
    return None if content is None else checkpoint.better_weights(content) == checkpoint.AVERAGE


def _frozen(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """What a configuration keeps as it is."""
    found = [getattr(model, stage) for stage in STAGES[: config.freeze_stages]]
    if config.freeze_bn:
        found += [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return found


def train_mode(model: nn.Module, config: ModelConfig) -> None:
    """Puts a network in training mode, but for what is frozen: that keeps its statistics and drops nothing."""
    model.train()
    for module in _frozen(model, config):
        module.eval()


def add_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth (Huang et al. 2016) in the blocks that add their input: inverted residuals and MobileViTv3 blocks, with rates from
    0 in the first to `rate` in the last. The layers of attention inside a block are one operation and keep theirs."""
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, (MobileViTV3Block, MobileViTV3SeparableBlock)) or (isinstance(module, InvertedResidual) and module.has_skip)
    ]
    for number, block in enumerate(blocks, 1):
        share = rate * (number - 1) / (len(blocks) - 1) if len(blocks) > 1 else rate
        if share:
            block.register_forward_hook(DropPath(share))


class DropPath:
    """After a block y = x + f(x) in training: an image keeps x alone with probability `rate`, the others get x + f(x) / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, block: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        (x,) = inputs
        if not block.training or x.shape != y.shape:  # a block that resizes its input
            return y
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)
        return x + (y - x) * kept
