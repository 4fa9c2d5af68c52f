"""The network of a configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import mvit3_kernels

from . import checkpoint
from .config import TrainConfig


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
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)


def _average(path: Path) -> bool | None:
    """Whether the averaged weights of a file are its better ones; None where it does not tell."""
    content = checkpoint.read(path)
    return None if content is None else checkpoint.better_weights(content) == checkpoint.AVERAGE
