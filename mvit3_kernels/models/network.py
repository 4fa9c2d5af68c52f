"""The network that all families share: stem, two stages of inverted residuals, three stages with a MobileViT block,
head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..nn import ConvNormAct, InvertedResidual
from ..nn.guard import Guard, hooked, known, tampered_below
from ..nn.layout import to_nchw, to_nhwc
from ..nn.weights import weights_of_products
from ..ops import dispatch
from ..ops.rounded_weights import rounded_together
from ..ops.running_stats import written_together
from ..ops.types import Linear
from .saving import Savable, refuse_script

LAYERS = ("layer_1", "layer_2", "layer_3", "layer_4", "layer_5")


@dataclass(frozen=True)
class Stage:
    """One of layer_3, layer_4, layer_5: output channels, width and hidden width of the attention layers, and their
    number."""

    channels: int
    dim: int
    ffn_dim: int
    depth: int


@dataclass(frozen=True)
class Architecture:
    """A published network."""

    stem: int
    layer_1: int
    layer_2: int
    layer_2_depth: int
    stages: tuple[Stage, Stage, Stage]
    expand_ratio: int
    block: type[nn.Module]  # built as block(channels, dim, ffn_dim, depth, **dropouts)
    dilate_block: bool  # whether an output stride below 32 dilates the block's own convolution: the releases differ
    head_channels: int | None  # of conv_1x1_exp; None: the network has none and its classifier is called "1", not "fc"
    init: Callable[[nn.Module], None]
    drop_rate: float = 0.0
    proj_drop_rate: float = 0.0

    @property
    def v1_style(self) -> bool:
        """MobileViTv1 and MobileViTv3-XXS/XS/S, as opposed to MobileViTv2 and MobileViTv3-w."""
        return self.head_channels is not None


MOST_FEW_SAMPLES = 32  # of which a product reads a weight in float32 sooner than it is rounded by a launch of its own


def _linear_why_not(classifier: nn.Module) -> str | None:
    """Why the last layer of a classifier is not what `ops.pointwise_conv` computes; None where it is."""
    if type(classifier) is not nn.Sequential or type(classifier[-1]) is not nn.Linear:
        return "its last layer is not an nn.Linear in an nn.Sequential"
    return tampered_below(classifier)


def _casts_weights(x: Tensor, layer: nn.Linear) -> bool:
    """Whether PyTorch would round a layer's weights for a map x of few samples, where a Triton kernel reads them as
    they are."""
    if torch.compiler.is_compiling() or dispatch.writes_aten() or dispatch.transform() is not None:
        return False  # an exported program must not remember how many samples it was traced with
    if x.shape[0] > MOST_FEW_SAMPLES or dispatch.forced_backend() not in (None, "triton"):
        return False
    cast = dispatch.as_autocast(x)
    if cast.dtype is torch.float32 or layer.weight.dtype is not torch.float32:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return False
    return dispatch.triton_32_bit_why_not(cast) is None


def _why_one_by_one(network: nn.Module) -> str | None:
    """Why the running statistics of a network's norms are written, and its weights rounded, one by one; None where
    nobody can tell."""
    places = [m for _, m in network.named_modules(remove_duplicate=False) if isinstance(m, nn.BatchNorm2d)]
    if len(set(places)) < len(places):
        return "a norm stands in two places, and each may read what the other wrote"
    return tampered_below(network)


def make_divisible(value: float, divisor: int, minimum: int | None = None) -> int:
    """The multiple of `divisor` nearest to `value` (half up), at least `minimum`, one step up where it falls below 90 %
    of `value`."""
    rounded = max(divisor if minimum is None else minimum, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@known
class GlobalPool(nn.Module):
    """Mean over height and width: (B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        # as it lies in memory: the gradient of mean((2, 3)) comes in the other layout
        return x.permute(0, 2, 3, 1).mean((1, 2))

    def __prepare_scriptable__(self) -> None:
        refuse_script()  # also where torch.fx has taken the network apart


class FeatureInfo:
    """Channels, stride and name of each feature map that a `features_only` model returns."""

    def __init__(self, info: Sequence[dict[str, object]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = list(info), tuple(out_indices)

    def _get(self, key: str, index: int | Sequence[int] | None) -> object:
        if isinstance(index, int):
            return self.info[index][key]
        return [self.info[i][key] for i in (self.out_indices if index is None else index)]

    def channels(self, index: int | Sequence[int] | None = None) -> object:
        return self._get("num_chs", index)

    def reduction(self, index: int | Sequence[int] | None = None) -> object:
        """Strides with respect to the image."""
        return self._get("reduction", index)

    def module_name(self, index: int | Sequence[int] | None = None) -> object:
        return self._get("module", index)

    def get_dicts(self) -> list[dict[str, object]]:
        return [self.info[i] for i in self.out_indices]


class MobileViT(Savable, nn.Module):
    """A network of the MobileViT family, on images (B, in_chans, H, W) of any size and memory format.

    Without `features_only`, returns logits (B, num_classes), or pooled features (B, num_features) with num_classes 0.
    With it, returns the list of feature maps (B, C, H / stride, W / stride) of the stages in `out_indices` and has no
    head. State-dict keys are the published ones. Use `create_model`, which documents the arguments.
    """

    _whole: Guard | None = None  # what `_why_apart` says, with the weights of products
    _head: Guard | None = None  # what is known about the classifier for `_few`

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        drop_rate: float | None = None,
        proj_drop_rate: float | None = None,
        attn_drop_rate: float = 0.0,
        ffn_drop_rate: float = 0.0,
        output_stride: int = 32,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        arch = architecture
        rates = {
            "drop_rate": arch.drop_rate if drop_rate is None else drop_rate,
            "proj_drop_rate": arch.proj_drop_rate if proj_drop_rate is None else proj_drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "ffn_drop_rate": ffn_drop_rate,
        }
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if num_classes < 0 or in_chans < 1:
            raise ValueError(
                f"num_classes must be at least 0 and in_chans at least 1, got {num_classes} and {in_chans}"
            )
        if out_indices is not None and not features_only:
            raise ValueError("out_indices needs features_only=True")
        indices = tuple(range(5)) if out_indices is None else tuple(i % 5 if -5 <= i < 5 else i for i in out_indices)
        if any(i > 4 for i in indices) or not indices:
            raise ValueError(f"out_indices must name stages 0 to 4 (or -5 to -1), got {tuple(out_indices)}")

        self._architecture = arch
        self.in_chans = in_chans
        self.features_only = features_only
        self.grad_checkpointing = False
        self.drop_rate = rates["drop_rate"]
        self.conv_1 = ConvNormAct(in_chans, arch.stem, 3, stride=2)
        dropouts = {
            "dropout": rates["proj_drop_rate"],
            "attn_dropout": attn_drop_rate,
            "ffn_dropout": ffn_drop_rate,
        }
        info = self._build_stages(arch, output_stride, dropouts)
        self.feature_info = FeatureInfo(info, indices)
        self.num_features = info[-1]["num_chs"]
        self.num_classes = 0
        self.conv_1x1_exp = self.classifier = None
        if not features_only:
            self._build_head(arch)
        arch.init(self)
        if not features_only:
            self.reset_classifier(num_classes)
        elif num_classes not in (0, 1000):
            raise ValueError(f"num_classes has no meaning with features_only=True, got {num_classes}")

    def _build_stages(
        self, arch: Architecture, output_stride: int, dropouts: dict[str, float]
    ) -> list[dict[str, int | str]]:
        """layer_1 to layer_5, and what feature_info says of each."""

        def inverted_residual(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> InvertedResidual:
            return InvertedResidual(inputs, outputs, make_divisible(inputs * arch.expand_ratio, 8), stride, dilation)

        self.layer_1 = nn.Sequential(inverted_residual(arch.stem, arch.layer_1))
        self.layer_2 = nn.Sequential(
            inverted_residual(arch.layer_1, arch.layer_2, stride=2),
            *(inverted_residual(arch.layer_2, arch.layer_2) for _ in range(arch.layer_2_depth - 1)),
        )
        info = [
            {"num_chs": arch.layer_1, "reduction": 2, "module": "layer_1"},
            {"num_chs": arch.layer_2, "reduction": 4, "module": "layer_2"},
        ]
        channels, reduction, dilation = arch.layer_2, 4, 1
        for number, stage in enumerate(arch.stages, start=3):
            # Past the output stride a stage keeps its resolution; its inverted residual still has the previous
            # dilation.
            stride = 2 if reduction < output_stride else 1
            block_dilation = dilation if stride == 2 else 2 * dilation
            options = dropouts | ({"dilation": block_dilation} if arch.dilate_block else {})
            block = arch.block(stage.channels, stage.dim, stage.ffn_dim, stage.depth, **options)
            setattr(
                self,
                f"layer_{number}",
                nn.Sequential(inverted_residual(channels, stage.channels, stride, dilation), block),
            )
            channels, reduction, dilation = stage.channels, reduction * stride, block_dilation
            info.append({"num_chs": channels, "reduction": reduction, "module": f"layer_{number}"})
        return info

    def _build_head(self, arch: Architecture) -> None:
        """All behind the last stage but the linear layer."""
        self.global_pool = "avg"
        self.conv_1x1_exp = nn.Identity()
        if arch.head_channels is not None:
            self.conv_1x1_exp = ConvNormAct(self.num_features, arch.head_channels)
            self.num_features = arch.head_channels
        pool = OrderedDict(global_pool=GlobalPool())
        if self.drop_rate > 0:
            pool["dropout"] = nn.Dropout(self.drop_rate)
        if arch.head_channels is None:
            pool = OrderedDict({"0": nn.Sequential(pool)})  # the classifier of this family is called "1"
        self.classifier = nn.Sequential(pool)

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features."""
        return self.num_features

    def get_classifier(self) -> nn.Module | None:
        """The last linear layer (nn.Identity with num_classes 0; None with features_only)."""
        return None if self.classifier is None else self.classifier[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of `num_classes` outputs, initialised as published; 0 removes it.

        Args:
            global_pool: "avg", the mean; "" with num_classes 0: the network returns its last map. None: as it is.
        """
        if self.classifier is None:
            raise ValueError("reset_classifier: a features_only model has no classifier")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        if global_pool == "" and num_classes:
            raise ValueError(f"global_pool '' needs num_classes 0: a classifier reads pooled maps, got {num_classes}")
        v1_style = self._architecture.v1_style
        if global_pool is not None:
            pooling = self.classifier if v1_style else self.classifier[0]
            pooling.global_pool = (GlobalPool() if global_pool else nn.Identity()).train(self.training)
            self.global_pool = global_pool
        reference = self.conv_1.block.conv.weight
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self._architecture.init(layer)
        layer.train(self.training)
        setattr(self.classifier, "fc" if v1_style else "1", layer.to(reference.device, reference.dtype))
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the maps between the five layers and computes the rest again in backward: less
        memory, more time. Norms update their running statistics in both passes, as PyTorch's do."""
        self.grad_checkpointing = enable

    def forward_maps(self, x: Tensor, last: int = 4) -> list[Tensor]:
        """The outputs of layer_1 to layer_5, or up to the stage `last`."""
        x = self.conv_1(to_nchw(to_nhwc(x)))  # channels_last, in terms that vmap knows
        maps = []
        for name in LAYERS[: last + 1]:
            layer = getattr(self, name)
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing else layer(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, num_features, H / 32, W / 32)."""
        x = self.forward_maps(x)[-1]
        return x if self.conv_1x1_exp is None else self.conv_1x1_exp(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, unless `pre_logits`, the classifier."""
        few = not pre_logits and self._few(x)
        if not pre_logits and not few:
            return self.classifier(x)
        for layer in self.classifier[:-1]:
            x = layer(x)
        if few:
            layer = self.classifier[-1]
            x = ops.pointwise_conv(x[:, None, None], Linear(layer.weight, layer.bias))[0].flatten(1)
        return x

    def _few(self, x: Tensor) -> bool:
        """Whether the last layer is one launch of few samples' own, where PyTorch's has two more for its casts."""
        if not isinstance(x, Tensor):  # torch.fx traces with something in its place
            return False
        if x.device.type == "cpu" and not dispatch.INTERPRETED:
            return False
        layer = self.get_classifier()
        if type(layer) is not nn.Linear or not _casts_weights(x, layer):
            return False
        if self._head is None:
            self._head = Guard()
        reason = hooked(self.classifier) or self._head.ask(self.classifier, _linear_why_not)
        return reason is None and self._head.altered is None

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        with self._statistics(), self._weights():
            if self.features_only:
                maps = self.forward_maps(x)
                return [maps[i] for i in self.feature_info.out_indices]
            return self.forward_head(self.forward_features(x))

    def _statistics(self) -> AbstractContextManager[None]:
        """Inside, norms in training write their running statistics together at the end: three launches for all, where
        each block's own are three. Only where nobody could read them before: without hooks, and without modules that
        this library does not know."""
        if not self.training or torch.compiler.is_compiling():
            return nullcontext()
        return nullcontext() if self._why_apart() else written_together()

    def _weights(self) -> AbstractContextManager[None]:
        """Inside, ops on a GPU find the weights that they multiply with maps of 16 bits rounded, all in one launch.
        Only where nobody could change them in between."""
        if self.grad_checkpointing or torch.compiler.is_compiling():
            return nullcontext()
        return rounded_together(self._weights_of_products)

    def _weights_of_products(self) -> list[Tensor]:
        if self._why_apart():
            return []
        whole = self._whole
        if whole.plan is None or whole.plan[0] is not whole.answer:
            whole.plan = whole.answer, weights_of_products(self)
        return whole.plan[1]

    def _why_apart(self) -> str | None:
        if self._whole is None:
            self._whole = Guard()
        return self._whole.ask(self, _why_one_by_one)
