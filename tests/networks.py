"""Which networks differ in more than their widths."""

from __future__ import annotations

import torch
from torch import nn

from mvit3_kernels import create_model, list_models

# Networks that are another one in other widths: the same modules in the same order, and the same operators.
SAME_OPERATORS = {
    "mobilevit_xs": "mobilevit_s",
    "mobilevitv3_xs": "mobilevitv3_s",
    "mobilevitv3_xs_fast": "mobilevitv3_s_fast",
    **{f"mobilevitv2_{width}": "mobilevitv2_050" for width in ("075", "100", "125", "150", "175", "200")},
    **{f"mobilevitv3_{width}": "mobilevitv3_050" for width in ("075", "100", "200")},
}


def structure(name: str) -> list[tuple]:
    """All that the operators of a network's program depend on, in order, whatever its widths."""
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
    options = ("act", "has_skip", "stride", "padding", "dilation", "kernel_size", "num_heads", "eps", "bias")

    def value(module: nn.Module, option: str) -> object:
        found = getattr(module, option, None)
        return found is not None if option == "bias" else found

    return [(key, type(m), *(value(m, option) for option in options)) for key, m in model.named_modules()]


# One of each: where nothing depends on widths, a test of these is one of all.
DISTINCT = [name for name in list_models() if name not in SAME_OPERATORS]
