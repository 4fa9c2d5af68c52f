"""ml-cvnets (Apple) and what was built on copies of it, as the MobileViTv3 release: ConvLayer, InvertedResidual and the
MobileViT blocks.

It is no package but a tree that people copy, so nothing is imported from it: `recognise` knows its classes by the
module path `cvnets.`, their name, and the names that their code uses, which must be among those of the known versions
(0.1 to 0.4). That the plan is what this code computes is found out by computing both (`probe.py`); a class that is
left says why. MobileViTv3's blocks are told from the widths of their convolutions.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn

from ..inference import FUSED, FusedNetwork, stands_for_network
from ..inference.program import IMAGE, Program, Refused, assemble, emit, pool
from ..nn.guard import LOGGER, inherits, is_as_written, is_plain, known, methods_called, tampered_below
from ..nn.layout import to_nchw, to_nhwc
from ..nn.plans import (
    ACTIVATION_NAMES,
    ConvPlan,
    LayerPlan,
    ResidualPlan,
    SeparablePlan,
    TokensPlan,
    TransformerPlan,
    Unfit,
    activation_name,
    dropouts,
    layer_norm,
    linear,
)
from ..ops.types import Layer, LayerNorm, Linear
from .plain import is_sequential
from .probe import why_different
from .swapped import SWAPPED, Swapped, stands_for

# What the code of each class uses, its forward and the methods that it calls, in any of the known versions; and what
# any may use, which looks at nothing but shapes.
_SHAPES = (
    "torch F math shape size dim ndim reshape view contiguous transpose permute flatten unsqueeze squeeze int len "
    "isinstance format list tuple range zip"
)
_MOBILEVIT = (
    "local_rep global_rep conv_proj fusion unfolding folding patch_h patch_w patch_area ceil interpolate cat forward "
    "forward_spatial forward_temporal TransformerEncoder LinearAttnFFN Tuple Tensor NotImplementedError unfold fold "
    "resize_input_if_needed enable_coreml_compatible_fn unfolding_coreml unfolding_pytorch folding_coreml "
    "folding_pytorch unfolding_weights conv2d pixel_shuffle"
)
_PARTS = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp", "classifier")
_NETWORK = (
    f"{' '.join(_PARTS)} extract_features _extract_features forward_classifier _forward_classifier _forward_layer "
    "gradient_checkpointing gradient_checkpoint_fn neural_augmentor training"
)
USED = {
    "ConvLayer": "block",
    "ConvLayer2d": "block",
    "InvertedResidual": "use_res_connect block",
    "Identity": "",
    "LinearLayer": (
        "channel_first training logger error no_grad conv2d weight bias clone detach out_features in_features linear "
        "addmm t matmul"
    ),
    "LayerNorm": "normalized_shape std_mean eps weight bias addcmul super forward NotImplementedError",
    "MultiHeadAttention": (
        "mac_device forward_mac_device forward_other coreml_compatible forward_tracing forward_default forward_pytorch"
        " qkv_proj out_proj attn_dropout softmax scaling num_heads head_dim embed_dim chunk bmm matmul append cat"
        " linear weight bias masked_fill dtype to bool float get multi_head_attention_forward empty p training"
    ),
    "LinearSelfAttention": (
        "_forward_self_attn _forward_cross_attn qkv_proj out_proj attn_dropout split embed_dim softmax sum relu "
        "expand_as conv2d block conv weight bias"
    ),
    "TransformerEncoder": "pre_norm_mha pre_norm_ffn drop_path",
    "LinearAttnFFN": "pre_norm_attn pre_norm_ffn",
    "GlobalPool": "_global_pool pool_type keep_dim mean abs NotImplementedError",
}


@cache
def _names(kind: type[nn.Module]) -> frozenset[str]:
    """The names that the code of a class uses where it is called."""
    codes, found = [method.__code__ for _, _, method in methods_called(kind)], set()
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(found)


def _is_block(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("cvnets.modules.") and kind.__name__.startswith("MobileViT")


def _is_network(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("cvnets.models.classification.") and kind.__name__.startswith("MobileViT")


def _unknown(kind: type[nn.Module]) -> str | None:
    """Why a class is none of the known versions."""
    used = _MOBILEVIT if _is_block(kind) else _NETWORK if _is_network(kind) else USED.get(kind.__name__)
    if used is None:
        return f"a {kind.__module__}.{kind.__name__}"
    others = _names(kind) - {*used.split(), *_SHAPES.split()}
    if others:
        return f"an unknown version of {kind.__module__}.{kind.__name__}: its code uses {', '.join(sorted(others))}"
    return None if is_as_written(kind) else f"a {kind.__name__} of which a method has been replaced"


def recognise(kinds: Iterable[type]) -> None:
    """Registers the classes of ml-cvnets that are among these."""
    for kind in kinds:
        if kind.__module__.partition(".")[0] == "cvnets" and issubclass(kind, nn.Module) and kind not in _met:
            bases = [base for base in _PLAIN if inherits(kind, base)]
            _met[kind] = None if bases else _unknown(kind)
            if bases:
                known(kind)
                ACTIVATION_NAMES.update((kind, ACTIVATION_NAMES[base]) for base in bases if base in ACTIVATION_NAMES)
            else:
                _register(kind)


def _register(kind: type[nn.Module]) -> None:
    if _is_block(kind) or kind.__name__ in _SWAPPED:
        stands_for(kind)(_made(_SWAPPED.get(kind.__name__, _MobileViTBlock), kind))
    elif _is_network(kind) and _met[kind] is not None:
        LOGGER.warning("no program is made of a %s: it is %s", kind.__name__, _met[kind])
    elif _is_network(kind):
        stands_for_network(kind)(_made(_MobileViT, kind))
        assemble.register(kind, _assemble)
    elif kind.__name__ in USED and _met[kind] is None:
        known(kind)
        if kind.__name__ in _EMIT:
            emit.register(kind, _EMIT[kind.__name__])


def _made(base: type[nn.Module], host: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of one of the host's, and has its name."""
    return type(host.__name__, (base, host), {"__module__": __name__, "__doc__": base.__doc__, "host": host})


class _Made:
    """A class of `_made` cannot be imported, so a pickle names the host's. Where that is not known when it is read, the
    module is the host's own."""

    host: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.host,), *state


def _new(host: type[nn.Module]) -> nn.Module:
    recognise([host])
    made = SWAPPED.get(host) or FUSED.get(host)
    return host.__new__(host if made is None or _met[host] is not None else made)


# The classes that were shown, and why they are none of the known versions.
_met: dict[type[nn.Module], str | None] = {}
_PLAIN = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Dropout,
    nn.SiLU,
    nn.ReLU,
    nn.Identity,
)
known(nn.Softmax)


# Parts


def _expect(name: str, module: nn.Module | None, *kinds: str) -> None:
    kind = getattr(type(module), "host", type(module))
    if kind.__module__.partition(".")[0] != "cvnets" or kind.__name__ not in kinds:
        raise Unfit(f"{name} is a {kind.__module__}.{kind.__name__}")
    if (reason := _met.get(kind, f"a {kind.__name__} that fuse has not seen")) is not None:
        raise Unfit(f"{name} is {reason}")


def _children(name: str, module: nn.Module | None, count: int) -> list[nn.Module]:
    if not is_sequential(module) or len(module) != count:
        raise Unfit(f"{name} is not a Sequential of {count} modules")
    return list(module)


def _conv(name: str, module: nn.Module | None) -> ConvPlan:
    _expect(name, module, "ConvLayer", "ConvLayer2d")
    parts = dict(module.block.named_children())
    if not is_sequential(module.block) or [p for p in ("conv", "norm", "act") if p in parts] != list(parts):
        raise Unfit(f"{name} is not made of conv, norm and act")
    conv, norm, act = (parts.get(part) for part in ("conv", "norm", "act"))
    if not (norm is None or is_plain(norm, nn.BatchNorm2d)):
        raise Unfit(f"{name}.norm is a {type(norm).__name__}")
    return ConvPlan(conv, norm, "identity" if act is None else activation_name(act))


def _residual(block: nn.Module) -> ResidualPlan:
    names = ("exp_1x1", "conv_3x3", "red_1x1")
    if not is_sequential(block.block) or tuple(block.block._modules) != names:
        raise Unfit(f"it is not made of {', '.join(names)}")
    return ResidualPlan(*(_conv(name, getattr(block.block, name)) for name in names), bool(block.use_res_connect))


def _transformer_layer(layer: nn.Module) -> LayerPlan:
    _expect("a layer", layer, "TransformerEncoder")
    drop_path = getattr(layer, "drop_path", None)
    if not (drop_path is None or is_plain(drop_path, nn.Identity)):
        _expect("drop_path", drop_path, "Identity")
    norm1, attention, output = _children("pre_norm_mha", layer.pre_norm_mha, 3)
    norm2, fc1, act, hidden, fc2, ffn_output = _children("pre_norm_ffn", layer.pre_norm_ffn, 6)
    _expect("attention", attention, "MultiHeadAttention")
    qkv, out_proj = attention.qkv_proj, attention.out_proj
    for name, part in {"qkv_proj": qkv, "out_proj": out_proj, "fc1": fc1, "fc2": fc2}.items():
        _expect(name, part, "LinearLayer")
        if getattr(part, "channel_first", False):
            raise Unfit(f"{name} reads channels first, as for export")
    width = attention.num_heads * attention.head_dim
    if {qkv.in_features, qkv.out_features / 3, out_proj.in_features, out_proj.out_features} != {width}:
        raise Unfit("its attention does not keep the width")
    if activation_name(act) != "silu":
        raise Unfit(f"its feed-forward network has act {activation_name(act)!r}, the op has 'silu'")
    norms = _layer_norm("a norm", norm1), _layer_norm("a norm", norm2)
    weights = Layer(norms[0], linear(qkv), linear(out_proj), norms[1], linear(fc1), linear(fc2))
    rates = dropouts(attention.attn_dropout, output, hidden, ffn_output)
    return LayerPlan(weights, attention.num_heads, rates)


def _layer_norm(name: str, norm: nn.Module) -> LayerNorm:
    if not is_plain(norm, nn.LayerNorm):
        _expect(name, norm, "LayerNorm")
    return layer_norm(norm)


def _separable_layer(layer: nn.Module) -> LayerPlan:
    _expect("a layer", layer, "LinearAttnFFN")
    norm1, attention, output = _children("pre_norm_attn", layer.pre_norm_attn, 3)
    norm2, fc1, hidden, fc2, ffn_output = _children("pre_norm_ffn", layer.pre_norm_ffn, 5)
    _expect("attention", attention, "LinearSelfAttention")
    norms = _group_norm("a norm", norm1), _group_norm("a norm", norm2)
    qkv = _pointwise("qkv_proj", attention.qkv_proj, "identity")
    out_proj = _pointwise("out_proj", attention.out_proj, "identity")
    if attention.qkv_proj.block.conv.out_channels != 1 + 2 * attention.embed_dim:
        raise Unfit("its attention does not keep the width")
    fc1, fc2 = _pointwise("fc1", fc1, "silu"), _pointwise("fc2", fc2, "identity")
    rates = dropouts(attention.attn_dropout, output, hidden, ffn_output)
    return LayerPlan(Layer(norms[0], qkv, out_proj, norms[1], fc1, fc2), None, rates)


def _group_norm(name: str, norm: nn.Module) -> LayerNorm:
    if not is_plain(norm, nn.GroupNorm):
        raise Unfit(f"{name} is a {type(norm).__name__}")
    return layer_norm(norm)


def _pointwise(name: str, layer: nn.Module, act: str) -> Linear:
    plan = _conv(name, layer)
    if plan.norm is not None or plan.act != act or not plan.is_pointwise():
        raise Unfit(f"{name} is not a plain 1x1 convolution with act {act}")
    return linear(plan.conv)


# Blocks


class _Swapped(_Made, Swapped):
    @staticmethod
    def patch_size(block: nn.Module) -> tuple[int, int]:
        return 2, 2

    @classmethod
    def compute(cls, block: nn.Module, x: Tensor) -> Tensor:
        return to_nchw(cls.describe(block).run(to_nhwc(x)))

    def misfit(self) -> str | None:
        try:
            return super().misfit() or why_different(self, self.compute, self.patch_size(self))
        except AttributeError as error:
            return _lacks(error)

    @classmethod
    def why_left(cls, module: nn.Module) -> str | None:
        try:
            reason = _met[cls.host] or super().why_left(module)
            if reason is not None or tampered_below(module) is not None:  # that may pass
                return reason
            return why_different(module, cls.compute, cls.patch_size(module))
        except AttributeError as error:
            return _lacks(error)


def _lacks(error: AttributeError) -> str:
    return f"it is not made as the known versions are: {error}"


class _ConvLayer(_Swapped):
    def describe(self) -> ConvPlan:
        return _conv("it", self)


class _InvertedResidual(_Swapped):
    def describe(self) -> ResidualPlan:
        return _residual(self)


class _MobileViTBlock(_Swapped):
    """Both styles of block, and MobileViTv3's of each."""

    @staticmethod
    def patch_size(block: nn.Module) -> tuple[int, int]:
        return block.patch_h, block.patch_w

    def describe(self) -> TransformerPlan | SeparablePlan:
        if getattr(self, "enable_coreml_compatible_fn", False):
            raise Unfit("it is made for export to Core ML")
        local = tuple(_conv("local_rep", layer) for layer in _children("local_rep", self.local_rep, 2))
        *layers, norm = _children("global_rep", self.global_rep, max(len(self.global_rep), 1))
        project, patch_size = _conv("conv_proj", self.conv_proj), (self.patch_h, self.patch_w)
        channels, width = local[0].conv.in_channels, local[-1].conv.out_channels
        if not isinstance(norm, nn.LayerNorm):
            tokens = TokensPlan.of([_separable_layer(layer) for layer in layers], _group_norm("norm", norm), patch_size)
            return SeparablePlan(local, tokens, project, with_local=project.conv.in_channels == 2 * width)
        tokens = TokensPlan.of([_transformer_layer(layer) for layer in layers], _layer_norm("norm", norm), patch_size)
        fusion = getattr(self, "fusion", None)
        fusion = None if fusion is None else _conv("fusion", fusion)
        # MobileViTv3's is 1x1, which tells where the widths do not
        with_local = fusion is not None and fusion.is_pointwise() and fusion.conv.in_channels == width + channels
        return TransformerPlan(local, tokens, project, fusion, with_local)

    def call_misfit(self, x: Tensor) -> str | None:
        if x.dtype is torch.float64 and _rounds(self):
            return "its attention rounds probabilities to float32, which the op in float64 does not"
        return self.norm_misfit(*x.shape[2:])

    def norm_misfit(self, height: int, width: int) -> str | None:
        """From version 0.3 on LayerNorm looks for the channels, and takes the patches for them where there are as
        many."""
        if not _looks_for_channels(self):
            return None
        patches = -(-height // self.patch_h) * -(-width // self.patch_w)
        if patches != self.global_rep[-1].normalized_shape[0]:
            return None
        return f"its LayerNorm takes {patches} patches for {patches} channels, and normalises over them"


# torch.compile asks while it traces, as it asks a guard.
@torch.compiler.assume_constant_result
def _rounds(block: nn.Module) -> bool:
    layers = (layer for layer in block.global_rep if hasattr(layer, "pre_norm_mha"))
    return any("float" in _names(type(layer.pre_norm_mha[1])) for layer in layers)


@torch.compiler.assume_constant_result
def _looks_for_channels(block: nn.Module) -> bool:
    norm = block.global_rep[-1]
    return isinstance(norm, nn.LayerNorm) and "std_mean" in _names(type(norm))


_SWAPPED = {"ConvLayer": _ConvLayer, "ConvLayer2d": _ConvLayer, "InvertedResidual": _InvertedResidual}


# Networks


class _MobileViT(_Made, FusedNetwork):
    """Both styles of classifier."""

    def forward(self, x, *args, **keywords):
        if args or keywords or not isinstance(x, Tensor) or not self._runs_program(x):
            return super().forward(x, *args, **keywords)
        return self._fused.run(x)


def _misfit(network: nn.Module) -> Callable[[Tensor], str | None]:
    """`norm_misfit` of every block, from the size of the images."""
    stride, blocks = 1, []
    for part in _PARTS[:-1]:
        for module in getattr(network, part).modules():
            if isinstance(module, _MobileViTBlock):
                blocks.append((part, stride, module))
            elif isinstance(module, nn.Conv2d):
                stride *= module.stride[0]

    def misfit(images: Tensor) -> str | None:
        for part, stride, block in blocks:
            if reason := block.norm_misfit(*(math.ceil(side / stride) for side in images.shape[2:])):
                return f"{part}: {reason}"
        return None

    return misfit


def _compute(network: nn.Module, x: Tensor) -> Tensor:
    for part in _PARTS:
        x = getattr(network, part)(x)
    return x


def _assemble(network: nn.Module, program: Program) -> None:
    if getattr(network, "neural_augmentor", None) is not None:
        raise Refused("it has a neural augmentor")
    x = IMAGE
    for part in _PARTS:
        x = emit(getattr(network, part), program, x)
    if x not in program.pooled:
        raise Refused("its classifier does not pool")
    if reason := why_different(network, _compute, (32, 32), modes=(False,)):
        raise Refused(reason)
    program.finish([x], lambda results: results[0].flatten(1))
    program.misfit = _misfit(network)


def _emit_pool(module: nn.Module, program: Program, x: int) -> int:
    if module.pool_type != "mean":
        raise Refused(f"its head pools by {module.pool_type}")
    return pool(program, x)


_EMIT = {
    "GlobalPool": _emit_pool,
    "Identity": emit.dispatch(nn.Identity),
    "LinearLayer": emit.dispatch(nn.Linear),
}
