"""Plans: what a block is made of, in the terms of the ops.

A block, of this library or of a host, describes itself as a plan; `run` computes it with the ops, on maps (B, H, W, C),
and the engine makes steps of the same plan (`inference/program.py`). A plan refers to modules and tensors as they are
at one call, and is made anew for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import dispatch
from ..ops.conv3x3 import reads_image
from ..ops.pointwise_conv import product_for_two
from ..ops.random import draw_seed
from ..ops.running_stats import update_all_running_stats
from ..ops.types import ACTIVATIONS, BatchNorm, ConvNorm, Layer, LayerNorm, Linear, Moments
from .guard import dropout_rate, is_dropout, is_plain
from .layout import resize, to_nchw, to_nhwc, whole_patches

ACTIVATION_NAMES: dict[type[nn.Module], str] = {nn.Identity: "identity", nn.SiLU: "silu", nn.ReLU: "relu"}


def activation_name(module: nn.Module) -> str:
    """The op's name of what an activation module computes; of others that of the class, which no op knows."""
    return ACTIVATION_NAMES.get(type(module), type(module).__name__)


def batch_norm(norm: nn.BatchNorm2d | None) -> BatchNorm | None:
    if norm is None:
        return None
    training = norm.training or norm.running_mean is None
    return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, training, norm.eps)


def layer_norm(norm: nn.LayerNorm | nn.GroupNorm) -> LayerNorm:
    return LayerNorm(norm.weight, norm.bias, norm.eps, isinstance(norm, nn.GroupNorm))


def linear(layer: nn.Linear | nn.Conv2d) -> Linear:
    return Linear(layer.weight, layer.bias)


def dropouts(
    attention: nn.Module | None, output: nn.Module | None, hidden: nn.Module | None, ffn_output: nn.Module | None
) -> dict[str, float]:
    """The probabilities with which the dropouts of a layer drop now, as `ops.global_representation` names them; None is
    a place without one.

    Raises:
        Unfit: one of them is another module.
    """
    modules = {"attention": attention, "hidden": hidden, "output": output, "ffn_output": ffn_output}
    for place, module in modules.items():
        if module is not None and not is_dropout(module):
            raise Unfit(f"its {place} dropout is a {type(module).__name__}")
    return {f"{place}_dropout": 0.0 if module is None else dropout_rate(module) for place, module in modules.items()}


class Unfit(Exception):
    """No plan describes a block; the message says why. It never leaves the block."""


class UnfitNow(Unfit):
    """The same, for as long as its flags, such as `training`, are as they are."""


def measured(y: Tensor, *batches: tuple[nn.BatchNorm2d, Moments | None, Tensor]) -> Tensor:
    """y, with what an op measured written to the running statistics: (norm, moments, map) of each norm.

    The second pass of a checkpoint ends as soon as it has every tensor that backward needs. PyTorch's norms write their
    statistics before they save the last of theirs, ops after: where a checkpoint counts, one more is saved behind it.
    """
    update_all_running_stats(*batches)
    measured = any(moments is not None for _, moments, _ in batches)
    if not measured or not y.requires_grad or torch.compiler.is_compiling() or not _saved_tensors_are_watched():
        return y
    return y * y.new_ones(())


def _saved_tensors_are_watched() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class ConvPlan(NamedTuple):
    """A convolution, the batch norm behind it or None, and the activation that follows."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None = None
    act: str = "identity"

    def is_pointwise(self) -> bool:
        """Whether the convolution is a product with each pixel."""
        conv = self.conv
        return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)

    def is_depthwise(self) -> bool:
        """Whether the convolution is one that `ops.depthwise_conv` knows: 3x3 on each channel, padded to keep the size
        at stride 1."""
        conv = self.conv
        return self._is_padded3x3() and conv.groups == conv.in_channels == conv.out_channels and conv.bias is None

    def is_dense3x3(self) -> bool:
        """Whether the convolution is a 3x3 one of all channels, padded to keep the size at stride 1."""
        return self._is_padded3x3() and self.conv.groups == 1

    def _is_padded3x3(self) -> bool:
        conv = self.conv
        return (
            conv.kernel_size == (3, 3)
            and conv.stride in ((1, 1), (2, 2))
            and conv.padding == conv.dilation == (conv.dilation[0], conv.dilation[0])
        )

    def _is_conv3x3_op(self, x: Tensor) -> bool:
        """Whether `ops.conv3x3` takes the call: it has a kernel for stride 1, on the CPU alone, and one for images, on
        a GPU in evaluation."""
        conv = self.conv
        if not self.is_dense3x3() or conv.bias is not None:
            return False
        if conv.stride == (1, 1) and dispatch.forced_backend() not in ("triton", "cuda"):
            return True
        return reads_image(x, conv.weight, batch_norm(self.norm), conv.stride[0], conv.dilation[0])

    def misfit(self) -> str | None:
        """Why no op computes this; None where one does."""
        if not is_plain(self.conv, nn.Conv2d):
            return f"its convolution is a {type(self.conv).__name__}"
        if self.norm is not None and not isinstance(self.norm, nn.BatchNorm2d):
            return f"its norm is a {type(self.norm).__name__}"
        if not isinstance(self.act, str) or self.act not in ACTIVATIONS:
            return f"act {self.act!r} has no kernel"
        if self.norm is None and not self.is_pointwise():
            return "a convolution without norm is fused with its activation where it is 1x1 only"
        return None

    def why_no_gain(self) -> str | None:
        """Why the modules take no more passes over memory than the op; None where they do."""
        if self.norm is None and self.act == "identity":
            return "a convolution alone is as fast as it is"
        if self.act == "identity" and not (self.is_pointwise() or self.is_depthwise()):
            return "a norm without activation is as fast as it is, behind this convolution"
        return None

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, H, W, C) in and out; `residual` is added behind the activation."""
        (conv, norm, act), parameters = self, batch_norm(self.norm)
        if self.is_pointwise():
            y, moments = ops.pointwise_conv(x, linear(conv), parameters, act, residual)
        elif residual is None and self.is_depthwise():
            y, moments = ops.depthwise_conv(x, conv.weight, parameters, act, conv.stride[0], conv.dilation[0])
        elif residual is None and self._is_conv3x3_op(x):
            y, moments = ops.conv3x3(x, conv.weight, parameters, act, conv.stride[0], conv.dilation[0])
        else:
            y, moments = ops.batch_norm_act(to_nhwc(conv(to_nchw(x))), parameters, act, residual)
        return y if norm is None else measured(y, (norm, moments, y))

    def serves_two(self) -> bool:
        """Whether `run_for_two` may return more than one tensor."""
        return self.norm is None and self.act == "identity" and self.is_pointwise() and self.conv.bias is None

    def run_for_two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`run` for two readers of its result."""
        if self.serves_two():
            return product_for_two(x, linear(self.conv))
        y = self.run(x)
        return y, y

    def fuses_concat(self) -> bool:
        """Whether `run_concat` builds no concatenation."""
        return self.norm is not None and self.is_pointwise() and self.conv.bias is None

    def run_concat(self, a: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
        """`run` on the concatenation of a and b, (B, H, W, C) each."""
        if not self.fuses_concat():
            return self.run(torch.cat((a, b), -1), residual)
        y, moments = ops.pointwise_fusion(a, b, self.conv.weight, batch_norm(self.norm), self.act, residual)
        return measured(y, (self.norm, moments, y))


class ResidualPlan(NamedTuple):
    """1x1 expansion, depth-wise 3x3, 1x1 projection; with `skip` the input is added. `drop_path`: a module that the
    result passes before that, where it does anything now."""

    expand: ConvPlan
    depthwise: ConvPlan
    project: ConvPlan
    skip: bool
    drop_path: nn.Module | None = None

    def misfit(self) -> str | None:
        for name, part in zip(self._fields, self[:3], strict=False):
            if reason := part.misfit():
                return f"{name}: {reason}"
            if part.norm is None or part.conv.bias is not None:
                return f"{name} has no norm, or a bias beside it"
        expand, depthwise, project = self[:3]
        if not (expand.is_pointwise() and depthwise.is_depthwise() and project.is_pointwise()):
            return "its convolutions are not 1x1, depth-wise 3x3 and 1x1"
        if (expand.act, project.act) != (depthwise.act, "identity"):
            return (
                f"its activations are {expand.act}, {depthwise.act} and {project.act}, where the op knows act, act "
                "and identity"
            )
        if self.skip and not self.can_skip():
            return f"it adds its input at stride {depthwise.conv.stride[0]}, or to a map of another width"
        return None

    def can_skip(self) -> bool:
        return self.depthwise.conv.stride == (1, 1) and self.expand.conv.in_channels == self.project.conv.out_channels

    def run(self, x: Tensor) -> Tensor:
        parts = self[:3]
        convs = (ConvNorm(part.conv.weight, batch_norm(part.norm)) for part in parts)
        (stride, _), (dilation, _) = self.depthwise.conv.stride, self.depthwise.conv.dilation
        skip = self.skip and self.drop_path is None
        y, moments = ops.inverted_residual(x, *convs, stride, dilation, self.expand.act, skip)
        y = measured(y, *zip((part.norm for part in parts), moments, (x, y, y), strict=True))
        if self.drop_path is None:
            return y
        y = to_nhwc(self.drop_path(to_nchw(y)))
        return y + x if self.skip else y


class LayerPlan(NamedTuple):
    """A pre-norm layer; `num_heads` is None for separable attention. `dropouts`: the probabilities with which it drops
    now, by the names of `ops.global_representation`."""

    layer: Layer
    num_heads: int | None
    dropouts: dict[str, float]


class TokensPlan(NamedTuple):
    """Pre-norm layers and the final norm, as `ops.global_representation` takes them. `dropouts`: the probabilities
    with which all layers drop now, by its names."""

    layers: list[Layer]
    norm: LayerNorm | None
    num_heads: int | None
    patch_size: tuple[int, int]
    dropouts: dict[str, float]

    @staticmethod
    def of(layers: list[LayerPlan], norm: LayerNorm | None, patch_size: tuple[int, int]) -> TokensPlan:
        """The plan of layers that share heads and dropouts.

        Raises:
            Unfit: they do not.
        """
        if len({layer.num_heads for layer in layers}) > 1:
            raise Unfit("its layers differ in heads")
        if any(layer.dropouts != layers[0].dropouts for layer in layers):
            raise UnfitNow("its layers drop with different probabilities")
        heads, dropouts = (layers[0].num_heads, layers[0].dropouts) if layers else (None, {})
        return TokensPlan([layer.layer for layer in layers], norm, heads, patch_size, dropouts)

    def drops(self) -> bool:
        return any(p > 0 for p in self.dropouts.values())

    def run(self, x: Tensor) -> Tensor:
        seed = draw_seed(x.device) if self.drops() else None
        return ops.global_representation(
            x, self.layers, self.norm, self.num_heads, self.patch_size, **self.dropouts, seed=seed
        )


class TransformerPlan(NamedTuple):
    """The block of MobileViTv1: convolutions, layers on a map that is resized to whole patches and back, projection,
    and a convolution of the block's input beside it. MobileViTv3's has `with_local`: beside it is what the convolutions
    made, and the input is added."""

    local: tuple[ConvPlan, ...]
    tokens: TokensPlan
    project: ConvPlan
    fusion: ConvPlan | None
    with_local: bool = False

    def misfit(self) -> str | None:
        return misfit_of(*self.local, self.project, *(() if self.fusion is None else (self.fusion,)))

    def run(self, x: Tensor) -> Tensor:
        local, beside = _run_local(self.local, x, self.with_local)
        tokens = _resize(local, whole_patches(to_nchw(local), self.tokens.patch_size), align_corners=False)
        tokens = _resize(self.tokens.run(tokens), local.shape[1:3], align_corners=False)
        projected = self.project.run(tokens)
        if self.fusion is None:
            return projected
        if self.with_local:
            return self.fusion.run_concat(beside, projected, residual=x)
        return self.fusion.run_concat(x, projected)


class SeparablePlan(NamedTuple):
    """The block of MobileViTv2: convolutions, layers, projection. Where the map has no whole patches it is resized to
    them first and stays so; with `crops`, pixels behind the last whole patch take no part in the layers, which leave
    zeros there. MobileViTv3's has `with_local`: what the convolutions made stands behind what the layers made, and the
    input is added."""

    local: tuple[ConvPlan, ...]
    tokens: TokensPlan
    project: ConvPlan
    crops: bool = False
    with_local: bool = False

    def misfit(self) -> str | None:
        return misfit_of(*self.local, self.project)

    def run(self, x: Tensor) -> Tensor:
        if not self.crops:
            x = _resize(x, whole_patches(to_nchw(x), self.tokens.patch_size), align_corners=True)
        local, beside = _run_local(self.local, x, self.with_local)
        tokens = self._run_cropped(local) if self.crops else self.tokens.run(local)
        return self.project.run_concat(tokens, beside, residual=x) if self.with_local else self.project.run(tokens)

    def _run_cropped(self, x: Tensor) -> Tensor:
        (height, width), (ph, pw) = x.shape[1:3], self.tokens.patch_size
        if height < ph or width < pw:
            raise ValueError(f"a map of {height} x {width} pixels has no whole patch of {ph} x {pw}")
        rows, columns = height // ph * ph, width // pw * pw
        if (rows, columns) == (height, width):
            return self.tokens.run(x)
        return F.pad(self.tokens.run(x[:, :rows, :columns]), (0, 0, 0, width - columns, 0, height - rows))


def _run_local(plans: tuple[ConvPlan, ...], x: Tensor, for_two: bool) -> tuple[Tensor, Tensor]:
    """What the convolutions in front of the layers make of x, for these and for whoever else reads it."""
    if not for_two or not plans:
        for plan in plans:
            x = plan.run(x)
        return x, x
    for plan in plans[:-1]:
        x = plan.run(x)
    return plans[-1].run_for_two(x)


def misfit_of(*plans: ConvPlan) -> str | None:
    return next((f"{plan.conv}: {reason}" for plan in plans if (reason := plan.misfit())), None)


def _resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return to_nhwc(resize(to_nchw(x), size, align_corners))
