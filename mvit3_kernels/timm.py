"""Networks of this library under timm's names and conventions: `import mvit3_kernels.timm`, then
`timm.create_model("mobilevitv3_s")`.

Every classifier of `list_models()` is registered as "mvit3_<name>" and, where timm has no network of its name, as
"<name>" too; timm's own are never replaced. What is made is a `TimmMobileViT`, whose state-dict keys are those of
`mvit3_kernels.create_model`: published checkpoints load with `mvit3_kernels.load_checkpoint`.

There are no weights to download, so `pretrained=True` is an error of timm's; `checkpoint_path` and "local-dir:<folder>"
with a folder of `save_pretrained` load. Published v1-style weights read the colours as blue, green, red, as
`pretrained_cfg["notes"]` says; timm's transforms hand over red, green, blue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.models import (
    FeatureInfo,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from . import nn as blocks
from .inference import FusedNetwork, stands_for_network
from .models.create import create_model
from .models.drop_path import set_drop_path
from .models.network import LAYERS, Architecture, GlobalPool, MobileViT
from .models.registry import ARCHITECTURES, preprocessing
from .models.saving import PREFIX
from .nn.guard import known

__all__ = ["TimmMobileViT"]


def _taken(depth: int, indices: int | Sequence[int]) -> list[int]:
    """Which of `depth` stages are meant: the last so many, or those with these numbers, negative ones from the end."""
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"indices must be 1 to {depth} stages, got {indices}")
        return list(range(depth - indices, depth))
    taken = [i + depth if i < 0 else i for i in indices]
    if not taken or min(taken) < 0 or max(taken) >= depth:
        raise ValueError(f"indices must name some of {depth} stages, got {list(indices)}")
    return taken


@known
class TimmMobileViT(MobileViT):
    """`MobileViT` with the methods that timm's networks have beside those that both have. Use `timm.create_model`.

    Args:
        architecture, num_classes, in_chans, options: as in `MobileViT`.
        global_pool: "avg" or, with num_classes 0, "".
        drop_path_rate: stochastic depth in training, as `mvit3 train` has it (`models/drop_path.py`).
        act_layer: "silu", "swish" or `torch.nn.SiLU`, the one activation of the family.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an impossible value or an unknown argument.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        act_layer: str | type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if act_layer not in (None, "silu", "swish", nn.SiLU):
            raise ValueError(f"act_layer must be 'silu', the one activation of these networks, got {act_layer!r}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
        with nullcontext() if device is None else torch.device(device):
            super().__init__(architecture, num_classes, in_chans, **options)
        if global_pool != "avg":
            self.reset_classifier(num_classes, global_pool)
        self.feature_info = FeatureInfo(self.feature_info.info, self.feature_info.out_indices)
        self.drop_path_rate = drop_path_rate
        self.to(dtype=dtype)
        self.train()

    def train(self, mode: bool = True) -> TimmMobileViT:
        """As in PyTorch; stochastic depth is there in training alone, so that evaluation runs fused."""
        super().train(mode)
        if self.drop_path_rate:
            set_drop_path(self, self.drop_path_rate if mode else 0.0)
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for timm's layer-wise learning rates."""
        blocks = r"^layer_(\d+)" if coarse else r"^layer_(\d+)\.(\d+)"
        return {"stem": r"^conv_1\.", "blocks": [(blocks, None), (r"^conv_1x1_exp", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """None beside biases and norms, which timm's optimizers leave out by themselves."""
        return set()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stages in `indices` (an int: the last so many; None: all), and before them what
        `forward_features` returns unless `intermediates_only`. No norm follows the stages, so `norm` changes nothing;
        `stop_early` computes no stage behind the last one that is asked for, and the first result is then its map."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        depth = len(self.feature_info)
        taken = _taken(depth, depth if indices is None else indices)
        last = max(taken) if stop_early else depth - 1
        maps = self.forward_maps(x, last)
        found = [maps[i] for i in taken]
        if intermediates_only:
            return found
        whole = last == len(LAYERS) - 1 and self.conv_1x1_exp is not None
        return self.conv_1x1_exp(maps[-1]) if whole else maps[-1], found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes out the stages behind those in `indices`, and the head; returns the indices as they count now."""
        taken = _taken(len(self.feature_info), indices)
        last = max(taken)
        pruned = last < len(LAYERS) - 1
        if pruned:
            for name in (*LAYERS[last + 1 :], "conv_1x1_exp"):
                setattr(self, name, nn.Identity().train(self.training))
            info = self.feature_info.info[: last + 1]
            self.num_features = info[-1]["num_chs"]
            self.feature_info = FeatureInfo(info, tuple(range(last + 1)))
        if self.classifier is not None and (prune_head or pruned):
            self.reset_classifier(0, "")
        return taken


@known
@stands_for_network(TimmMobileViT)
class FusedTimmMobileViT(FusedNetwork, TimmMobileViT):
    """What `fuse` makes of a `TimmMobileViT`."""

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self._fused.run(x) if self._runs_program(x) else self._ordinary(super().forward, x)


# torch.fx, as timm uses it, takes a network apart into these and traces into none of them.
for _kind in (*(getattr(blocks, name) for name in blocks.__all__), GlobalPool):
    if isinstance(_kind, type) and issubclass(_kind, nn.Module):
        register_notrace_module(_kind)


def _features(model: TimmMobileViT, out_indices: int | Sequence[int]) -> TimmMobileViT:
    """A network that returns the maps of its stages, with the head taken out: what timm's `features_only` asks for,
    and `fuse` can run as one program."""
    info = model.feature_info.from_other(tuple(_taken(len(model.feature_info), out_indices)))
    model.feature_info, model.features_only = info, True
    model.conv_1x1_exp = model.classifier = None
    del model.global_pool  # there is none, as in a features_only network of `create_model`
    model.num_features, model.num_classes = info[-1]["num_chs"], 0
    return model


def _entry(name: str, registered: str) -> Callable[..., nn.Module]:
    """The function that timm calls for a network's name."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        model = build_model_with_cfg(
            partial(TimmMobileViT, ARCHITECTURES[name]),
            registered,
            pretrained,
            feature_cfg={"feature_cls": _features},
            **options,
        )
        if isinstance(model, TimmMobileViT):
            own = {key: options[key] for key in _SHARED if key in options}
            if model.features_only:
                own = {**own, "num_classes": None, "out_indices": model.feature_info.out_indices}
            model._created = partial(create_model, name, **own)
        return model

    create.__name__ = create.__qualname__ = registered
    return create


# Arguments that timm's `create_model` and ours share.
_SHARED = (
    "num_classes",
    "in_chans",
    "drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "ffn_drop_rate",
    "output_stride",
    "features_only",
    "out_indices",
)
_NAMES = {registered: name for name in ARCHITECTURES for registered in (name, PREFIX + name)}
_NAMES = {registered: name for registered, name in _NAMES.items() if not timm.is_model(registered)}
default_cfgs = generate_default_cfgs({registered: preprocessing(name) for registered, name in _NAMES.items()})
for _registered, _name in _NAMES.items():
    register_model(_entry(_name, _registered))
