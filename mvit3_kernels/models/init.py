"""Initialisation as published."""

from __future__ import annotations

from torch import nn


def init_kaiming(module: nn.Module) -> None:
    """MobileViTv1 and MobileViTv3-XXS/XS/S: convolutions Kaiming-normal over fan-out, linear layers truncated normal of
    deviation 0.02, biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
        elif isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            nn.init.zeros_(m.bias)


def init_default(module: nn.Module) -> None:
    """MobileViTv2 and MobileViTv3-w: PyTorch's defaults for convolutions (the released initialiser never reached them),
    the classifier Xavier-uniform with bias 0."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
