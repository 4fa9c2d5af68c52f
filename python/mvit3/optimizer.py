"""The optimiser of a configuration."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import nn

from .config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, factor: float = 1.0) -> torch.optim.Optimizer:
    """timm's optimiser of that name, in one fused call where PyTorch has one; learning rates are multiplied by `factor`."""
    info = get_optimizer_info(config.name)
    options: dict[str, object] = {}
    if info.has_betas and info.num_betas == 2:
        options["betas"] = config.betas
    if info.has_eps:
        options["eps"] = config.eps
    if isinstance(info.opt_class, type) and issubclass(info.opt_class, (torch.optim.Adam, torch.optim.SGD)):
        options["fused"] = True
    return create_optimizer_v2(
        model,
        config.name,
        lr=factor * config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        filter_bias_and_bn=config.no_decay_1d,
        **options,
    )
