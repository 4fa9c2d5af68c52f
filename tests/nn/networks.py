"""Networks whose every part shows in their results, and what their modules compute one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import mvit3_kernels
from mvit3_kernels import create_model
from tests.golden import fill


def network(name: str, **options) -> nn.Module:
    """Weights under which a network listens to its images: every part of it shows in the logits."""
    return fill(create_model(name, **options)).eval()


FAMILIES = ("mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050")


@torch.no_grad()
def by_modules(model: nn.Module, x: Tensor) -> Tensor:
    """The model with every module called, in plain PyTorch: a hook for all modules keeps every block from running as
    one op."""
    hook = register_module_forward_hook(lambda *_: None)
    try:
        with mvit3_kernels.backend("reference"):
            return model(x)
    finally:
        hook.remove()
