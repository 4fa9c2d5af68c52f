"""The weights of a network that ops multiply with maps."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import SeparableLayer, TransformerLayer
from .conv import ConvNormAct


def weights_of_products(root: nn.Module) -> list[Tensor]:
    """Those of 1x1 convolutions and of layers of attention that are as they were made, a layer's one behind the other
    as `ops.global_representation` takes them. A layer of separable attention in training has none: what it makes of its
    weights, beside rounding them, takes a launch anyway."""
    found, inside = [], set()
    for module in root.modules():
        if id(module) in inside:
            continue
        if type(module) in (TransformerLayer, SeparableLayer):
            inside.update(id(child) for child in module.modules())
            if module.misfit() is None and not (type(module) is SeparableLayer and module.training):
                layer = module.layer()
                found += (linear.weight for linear in (layer.qkv, layer.out_proj, layer.fc1, layer.fc2))
        elif type(module) is ConvNormAct and module.misfit() is None and module.plan().is_pointwise():
            found.append(module.block.conv.weight)
    return found
