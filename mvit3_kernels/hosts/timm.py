"""timm: MobileViT and MobileViTv2 blocks, inverted residuals and Conv-BN-activation of any model, and ByobNet, the
class of the networks `mobilevit_*` and `mobilevitv2_*`."""

from __future__ import annotations

from contextlib import suppress

from timm.layers import BatchNormAct2d, ClassifierHead, ConvMlp, ConvNormAct, DropPath, GroupNorm1, Mlp
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool, SelectAdaptivePool2d
from timm.models import FeatureDictNet, FeatureListNet
from timm.models.byobnet import BottleneckBlock, ByobNet
from timm.models.mobilevit import LinearSelfAttention, LinearTransformerBlock, MobileVitBlock, MobileVitV2Block
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ..inference import FusedNetwork, stands_for_network
from ..inference.program import IMAGE, Program, Refused, assemble, emit, pool
from ..nn.guard import known, tampered, tampered_below
from ..nn.plans import (
    ConvPlan,
    LayerPlan,
    ResidualPlan,
    SeparablePlan,
    TokensPlan,
    TransformerPlan,
    Unfit,
    UnfitNow,
    activation_name,
    dropouts,
    layer_norm,
    linear,
)
from ..ops.types import Layer
from .swapped import Swapped, known_of_host, stands_for

known_of_host(Attention, BatchNormAct2d, Block, ConvMlp, DropPath, GroupNorm1, Mlp)
known_of_host(LinearSelfAttention, LinearTransformerBlock)
known_of_host(ClassifierHead, FastAdaptiveAvgPool, SelectAdaptivePool2d)
known(nn.Flatten)


def _expect(name: str, module: nn.Module | None, *kinds: type[nn.Module]) -> None:
    if not isinstance(module, kinds):
        raise Unfit(f"{name} is a {type(module).__name__}")


def _expect_identity(module: nn.Module, *names: str) -> None:
    for name in names:
        _expect(name, getattr(module, name, nn.Identity()), nn.Identity)


def _conv(name: str, module: nn.Module) -> ConvPlan:
    _expect(name, module, ConvNormAct)
    conv, norm = module.conv, module.bn
    if getattr(module, "aa", None) is not None:
        raise Unfit(f"{name} blurs its map")
    if type(norm) is nn.Sequential and not len(norm):
        return ConvPlan(conv)
    _expect(f"{name}.bn", norm, BatchNormAct2d)
    _expect(f"{name}.bn.drop", norm.drop, nn.Identity)
    return ConvPlan(conv, norm, activation_name(norm.act))


def _drops_paths(module: nn.Module) -> bool:
    return isinstance(module, DropPath) and module.training and module.drop_prob > 0


@stands_for(ConvNormAct)
class FusedConvNormAct(Swapped, ConvNormAct):
    def describe(self) -> ConvPlan:
        return _conv("it", self)


@stands_for(BottleneckBlock)
class FusedBottleneckBlock(Swapped, BottleneckBlock):
    def describe(self) -> ResidualPlan:
        _expect_identity(self, "conv2b_kxk", "attn", "attn_last", "act")
        if self.shortcut is not None:
            _expect_identity(self, "shortcut")
        _expect("drop_path", self.drop_path, nn.Identity, DropPath)
        convs = (_conv(name, getattr(self, name)) for name in ("conv1_1x1", "conv2_kxk", "conv3_1x1"))
        drop_path = self.drop_path if _drops_paths(self.drop_path) else None
        return ResidualPlan(*convs, self.shortcut is not None, drop_path)


def _layer(block: Block | LinearTransformerBlock, qkv: nn.Module, out_proj: nn.Module) -> Layer:
    kind = type(qkv)
    for name, module in (("fc1", block.mlp.fc1), ("fc2", block.mlp.fc2), ("out_proj", out_proj)):
        _expect(name, module, kind)
        if kind is nn.Conv2d and not ConvPlan(module).is_pointwise():
            raise Unfit(f"{name} is not a 1x1 convolution")
    if activation_name(block.mlp.act) != "silu":
        raise Unfit(f"its feed-forward network has act {activation_name(block.mlp.act)!r}, the op has 'silu'")
    for name in ("drop_path1", "drop_path2"):
        module = getattr(block, name)
        _expect(name, module, nn.Identity, DropPath)
        if _drops_paths(module):
            raise UnfitNow("its layers drop paths")
    return Layer(
        layer_norm(block.norm1),
        linear(qkv),
        linear(out_proj),
        layer_norm(block.norm2),
        linear(block.mlp.fc1),
        linear(block.mlp.fc2),
    )


def _transformer_layer(block: nn.Module) -> LayerPlan:
    _expect("a layer", block, Block)
    attention, mlp = block.attn, block.mlp
    _expect("attn", attention, Attention)
    _expect("mlp", mlp, Mlp)
    _expect_identity(block, "ls1", "ls2")
    _expect_identity(attention, "q_norm", "k_norm", "norm")
    _expect_identity(mlp, "norm")
    for name in ("norm1", "norm2"):
        _expect(name, getattr(block, name), nn.LayerNorm)
    for name in ("qkv", "proj"):
        _expect(name, getattr(attention, name), nn.Linear)
    heads, width = attention.num_heads, attention.qkv.in_features
    if getattr(attention, "gate", None) is not None:
        raise Unfit("its attention is gated")
    kept = {attention.qkv.out_features / 3, attention.proj.in_features, attention.proj.out_features}
    if kept != {width} or attention.head_dim * heads != width or attention.scale != attention.head_dim**-0.5:
        raise Unfit("its attention does not keep the width, or scales in a way of its own")
    if attention.training is not attention.attn_drop.training:
        raise UnfitNow("its attention is in another mode than its dropout")
    layer = _layer(block, attention.qkv, attention.proj)
    rates = dropouts(attention.attn_drop, attention.proj_drop, mlp.drop1, mlp.drop2)
    return LayerPlan(layer, heads, rates)


def _separable_layer(block: nn.Module) -> LayerPlan:
    _expect("a layer", block, LinearTransformerBlock)
    attention, mlp = block.attn, block.mlp
    _expect("attn", attention, LinearSelfAttention)
    _expect("mlp", mlp, ConvMlp)
    _expect_identity(mlp, "norm")
    for name in ("norm1", "norm2"):
        _group_norm(name, getattr(block, name))
    for name in ("qkv_proj", "out_proj"):
        _expect(name, getattr(attention, name), nn.Conv2d)
    if not ConvPlan(attention.qkv_proj).is_pointwise():
        raise Unfit("qkv_proj is not a 1x1 convolution")
    if attention.qkv_proj.out_channels != 1 + 2 * attention.embed_dim:
        raise Unfit("its attention does not keep the width")
    layer = _layer(block, attention.qkv_proj, attention.out_proj)
    return LayerPlan(layer, None, dropouts(attention.attn_drop, attention.out_drop, mlp.drop, None))


def _group_norm(name: str, module: nn.Module) -> None:
    _expect(name, module, GroupNorm1)
    if module._fast_norm:
        raise Unfit(f"{name} is a fast norm")


@stands_for(MobileVitBlock)
class FusedMobileVitBlock(Swapped, MobileVitBlock):
    def describe(self) -> TransformerPlan:
        _expect("transformer", self.transformer, nn.Sequential)
        _expect("norm", self.norm, nn.LayerNorm)
        layers = [_transformer_layer(block) for block in self.transformer]
        return TransformerPlan(
            (_conv("conv_kxk", self.conv_kxk), ConvPlan(self.conv_1x1)),
            TokensPlan.of(layers, layer_norm(self.norm), tuple(self.patch_size)),
            _conv("conv_proj", self.conv_proj),
            None if self.conv_fusion is None else _conv("conv_fusion", self.conv_fusion),
        )


@stands_for(MobileVitV2Block)
class FusedMobileVitV2Block(Swapped, MobileVitV2Block):
    def describe(self) -> SeparablePlan:
        _expect("transformer", self.transformer, nn.Sequential)
        _group_norm("norm", self.norm)
        if getattr(self, "coreml_exportable", False):
            raise Unfit("it is made for export to Core ML")
        layers = [_separable_layer(block) for block in self.transformer]
        return SeparablePlan(
            (_conv("conv_kxk", self.conv_kxk), ConvPlan(self.conv_1x1)),
            TokensPlan.of(layers, layer_norm(self.norm), tuple(self.patch_size)),
            _conv("conv_proj", self.conv_proj),
        )


# The endings of a network's program. The second is missing where the head is not one that the engine knows.
FEATURES, LOGITS = 0, 1


@stands_for_network(ByobNet)
class FusedByobNet(FusedNetwork, ByobNet):
    apart = ("head",)

    def forward_features(self, x: Tensor) -> Tensor:
        if self._runs_program(x):
            return self._fused.run(x, FEATURES)
        return self._ordinary(super().forward_features, x)

    # Without hints: torch.fx copies them into its code, where TorchScript cannot read those of this file.
    def forward(self, x):
        if not self._runs_program(x):
            return self.forward_head(self._ordinary(super().forward_features, x))
        return self._fused.run(x, LOGITS) if self._fused.ends(LOGITS) else self.forward_head(self._fused.run(x))


@assemble.register
def _(network: ByobNet, program: Program) -> None:
    x = emit(network.stem, program, IMAGE)
    x = emit(network.stages, program, x)
    x = emit(network.final_conv, program, x)
    outputs = [x]
    if (tampered(network.head) or tampered_below(network.head)) is None:
        with suppress(Refused):
            outputs.append(emit(network.head, program, x))
    convert = (lambda results: results[0].permute(0, 3, 1, 2), lambda results: results[0].flatten(1))
    for output, converted in zip(outputs, convert, strict=False):
        program.finish([output], converted)


class _FusedFeatures(FusedNetwork):
    """A network whose modules are called in turn, some of whose maps are returned."""

    def returned(self) -> object:
        return tuple(self.return_layers.items()), self.concat

    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        return dict(self._fused.run(x)) if self._runs_program(x) else self._ordinary(super()._collect, x)


@stands_for_network(FeatureListNet)
class FusedFeatureListNet(_FusedFeatures, FeatureListNet):
    pass


@stands_for_network(FeatureDictNet)
class FusedFeatureDictNet(_FusedFeatures, FeatureDictNet):
    pass


@assemble.register
def _(network: FeatureDictNet, program: Program) -> None:
    maps, x = {}, IMAGE
    for name, module in network.items():
        x = emit(module, program, x)
        if name in network.return_layers:
            maps[network.return_layers[name]] = x
    different = sorted(set(maps.values()))
    if IMAGE in different:
        raise Refused("it returns its images")
    program.finish(
        different,
        lambda results: {name: results[different.index(x)].permute(0, 3, 1, 2) for name, x in maps.items()},
    )


@emit.register
def _(module: ClassifierHead, program: Program, x: int) -> int:
    if not _averages(module.global_pool):
        raise Refused("its head does not pool by averages alone")
    if type(module.flatten) is not nn.Identity:
        raise Refused("its head has a convolution")
    return emit(module.fc, program, emit(module.drop, program, pool(program, x)))


def _averages(pool: nn.Module) -> bool:
    """Whether it makes (B, C) of a map by averages."""
    if type(pool) is not SelectAdaptivePool2d:
        return False
    if type(pool.pool) is FastAdaptiveAvgPool:
        return pool.pool.flatten and pool.pool.dim == (2, 3) and type(pool.flatten) is nn.Identity
    return (
        type(pool.pool) is nn.AdaptiveAvgPool2d
        and pool.pool.output_size in (1, (1, 1))
        and type(pool.flatten) is nn.Flatten
        and (pool.flatten.start_dim, pool.flatten.end_dim) == (1, -1)
    )
