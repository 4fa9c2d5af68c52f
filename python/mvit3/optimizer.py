"""The optimiser of a configuration."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import nn

from .config import OptimizerConfig
from .network import STAGES, stage_of


def build_optimizer(model: nn.Module, config: OptimizerConfig, factor: float = 1.0) -> torch.optim.Optimizer:
    """timm's optimiser of that name, in one fused call where PyTorch has one; learning rates are multiplied by
    `factor`."""
    info = get_optimizer_info(config.name)
    options: dict[str, object] = {}
    if info.has_betas and info.num_betas == 2:
        options["betas"] = config.betas
    if info.has_eps:
        options["eps"] = config.eps
    if isinstance(info.opt_class, type) and issubclass(info.opt_class, (torch.optim.Adam, torch.optim.SGD)):
        options["fused"] = True
    scaled = config.head_lr_scale != 1 or config.layer_decay != 1
    return create_optimizer_v2(
        _groups(model, config) if scaled else model,
        config.name,
        lr=factor * config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        filter_bias_and_bn=config.no_decay_1d,
        **options,
    )


def _groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Parameters by stage and by whether they decay; timm's schedules multiply the learning rate of a group by its
    `lr_scale`."""
    groups: dict[tuple[int, bool], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stage = stage_of(name)
            decays = parameter.ndim > 1 or not config.no_decay_1d
            scale = config.layer_decay ** (len(STAGES) - 1 - stage) * (
                config.head_lr_scale if STAGES[stage] == "classifier" else 1.0
            )
            options = {"params": [], "lr_scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
            groups.setdefault((stage, decays), options)["params"].append(parameter)
    return list(groups.values())
