"""Every network by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from . import mobilevit, mobilevitv2, mobilevitv3
from .network import MobileViT

_ARCHITECTURES = {**mobilevit.ARCHITECTURES, **mobilevitv2.ARCHITECTURES, **mobilevitv3.ARCHITECTURES}


def list_models(pattern: str = "") -> list[str]:
    """The names that `create_model` knows, sorted; with a shell pattern ("mobilevitv3*"), those that match it."""
    names = sorted(_ARCHITECTURES)
    return fnmatch.filter(names, pattern) if pattern else names


def create_model(
    name: str,
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
    checkpoint_path: str | None = None,
) -> MobileViT:
    """A network of the MobileViT family with fresh weights, or those of a checkpoint.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; 0 for pooled features.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier; proj_drop_rate behind each attention and feed-forward network. None: as published (0.1 and
            0.1, XXS 0.05, for MobileViTv1 and MobileViTv3-XXS/XS/S; 0 for the others).
        attn_drop_rate: dropout on attention probabilities or scores; ffn_drop_rate on the feed-forward network's hidden tensor.
        output_stride: 32, or 16 or 8 for dense prediction: later stages keep their resolution and dilate their convolutions, as published.
        features_only: return the list of feature maps of the stages (model.feature_info tells channels and strides); no head is built.
        out_indices: which of the five stages to return, with features_only; negative ones count from the end.
        checkpoint_path: loaded with `load_checkpoint`.

    Returns:
        A module that takes images (B, in_chans, H, W) of any size and any memory format.

    Raises:
        ValueError: an unknown name (the nearest are listed) or an impossible value.
    """
    if name not in _ARCHITECTURES:
        nearest = difflib.get_close_matches(name, _ARCHITECTURES, 3, 0.5)
        raise ValueError(f"name must be one of list_models(), got {name!r}; the nearest are {', '.join(nearest or list_models()[:3])}")
    model = MobileViT(
        _ARCHITECTURES[name],
        num_classes,
        in_chans,
        drop_rate=drop_rate,
        proj_drop_rate=proj_drop_rate,
        attn_drop_rate=attn_drop_rate,
        ffn_drop_rate=ffn_drop_rate,
        output_stride=output_stride,
        features_only=features_only,
        out_indices=out_indices,
    )
    if checkpoint_path:
        from .checkpoint import load_checkpoint

        load_checkpoint(model, checkpoint_path)
    return model
