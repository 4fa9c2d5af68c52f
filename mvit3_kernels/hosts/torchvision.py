"""torchvision: Conv2dNormActivation in any model and detection backbone, the inverted residuals of MobileNetV2 and
MobileNetV3 where their activations are ones that the ops have, and the heads of segmentation."""

from __future__ import annotations

from torch import nn
from torchvision.models import mobilenetv2, mobilenetv3
from torchvision.models.segmentation.deeplabv3 import ASPPConv, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.misc import Conv2dNormActivation, Conv3dNormActivation, ConvNormActivation

from ..nn.plans import ACTIVATION_NAMES, ConvPlan, ResidualPlan, Unfit, activation_name
from .plain import Sequence, is_sequential
from .swapped import Swapped, stands_for


def _conv(module: nn.Module) -> ConvPlan:
    if not isinstance(module, ConvNormActivation):
        raise Unfit(f"a {type(module).__name__} stands where a Conv2dNormActivation should")
    children = list(module)
    if not 1 <= len(children) <= 3:
        raise Unfit(f"it has {len(children)} modules")
    conv, *others = children
    act = others.pop() if len(others) == 2 or (others and type(others[0]) in ACTIVATION_NAMES) else nn.Identity()
    return ConvPlan(conv, _norm(*others) if others else None, activation_name(act))


def _norm(module: nn.Module) -> nn.BatchNorm2d:
    if type(module) is not nn.BatchNorm2d:
        raise Unfit(f"it has a {type(module).__name__} where the op has a BatchNorm2d")
    return module


class _FusedConv(Swapped):
    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        return not isinstance(module, Conv3dNormActivation)

    def describe(self) -> ConvPlan:
        plan = _conv(self)
        if reason := plan.why_no_gain() or plan.misfit():
            raise Unfit(reason)
        return plan


@stands_for(ConvNormActivation)
class FusedConvNormActivation(_FusedConv, ConvNormActivation):
    pass


@stands_for(Conv2dNormActivation)
class FusedConv2dNormActivation(_FusedConv, Conv2dNormActivation):
    pass


def _children(sequence: nn.Module, count: int) -> list[nn.Module]:
    """The children of an inverted residual that expands its input."""
    if not is_sequential(sequence):
        raise Unfit(f"a {type(sequence).__name__} stands where a Sequential should")
    if len(sequence) != count:
        kinds = ", ".join((child.host if isinstance(child, Swapped) else type(child)).__name__ for child in sequence)
        raise Unfit(f"it is not an expansion, a filter and a projection: it has {kinds}")
    return list(sequence)


@stands_for(mobilenetv2.InvertedResidual)
class FusedInvertedResidual(Swapped, mobilenetv2.InvertedResidual):
    def describe(self) -> ResidualPlan:
        expand, depthwise, conv, norm = _children(self.conv, 4)
        return ResidualPlan(_conv(expand), _conv(depthwise), ConvPlan(conv, _norm(norm)), self.use_res_connect)


@stands_for(mobilenetv3.InvertedResidual)
class FusedInvertedResidualV3(Swapped, mobilenetv3.InvertedResidual):
    def describe(self) -> ResidualPlan:
        return ResidualPlan(*(_conv(child) for child in _children(self.block, 3)), self.use_res_connect)


@stands_for(ASPPConv)
class FusedASPPConv(Sequence, ASPPConv):
    pass


@stands_for(DeepLabHead)
class FusedDeepLabHead(Sequence, DeepLabHead):
    pass


@stands_for(FCNHead)
class FusedFCNHead(Sequence, FCNHead):
    pass
