"""A network by its name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial

from .checkpoint import load_checkpoint
from .detection import SSDNetwork
from .network import MobileViT
from .registry import ARCHITECTURES, HEADS, list_models, preprocessing, split_name
from .segmentation import SegmentationNetwork, build_segmentation

# As published: ImageNet, PASCAL VOC with the background, COCO with the background.
NUM_CLASSES = {"classification": 1000, "segmentation": 21, "detection": 81}
HEAD_DROP_RATE = 0.1  # of segmentation
OUTPUT_STRIDES = {"classification": 32, "segmentation": 16, "detection": 32}


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    *,
    drop_rate: float | None = None,
    proj_drop_rate: float | None = None,
    attn_drop_rate: float = 0.0,
    ffn_drop_rate: float = 0.0,
    output_stride: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    checkpoint_path: str | None = None,
) -> MobileViT | SegmentationNetwork | SSDNetwork:
    """A network of the MobileViT family with fresh weights, or those of a checkpoint: a classifier (`MobileViT`), or
    with "deeplabv3_", "pspnet_" (`SegmentationNetwork`) or "ssdlite_" (`SSDNetwork`) in front of the name one for dense
    prediction.

    Args:
        name: one of `list_models()`, or of `list_models(task="segmentation")` or `list_models(task="detection")`.
        num_classes: outputs of the classifier, 0 for pooled features; of dense prediction, with the background. None:
            as published for the task, 1000, 21 or 81.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier; proj_drop_rate behind each attention and feed-forward network. None:
            as published (0.1 and 0.1, XXS 0.05, for MobileViTv1 and MobileViTv3-XXS/XS/S; 0 for the others). In a
            segmentation network drop_rate is that of its head, None 0.1.
        attn_drop_rate: dropout on attention probabilities or scores; ffn_drop_rate on the feed-forward network's hidden
            tensor.
        output_stride: 32, or 16 or 8 for dense prediction: later stages keep their resolution and dilate their
            convolutions, as published. None: 16 for segmentation, else 32. With 8 DeepLabv3's branches dilate by 12, 24
            and 36 instead of 6, 12 and 18, as published for ADE20K.
        features_only: return the list of feature maps of the stages (model.feature_info tells channels and strides); no
            head is built.
        out_indices: which of the five stages to return, with features_only; negative ones count from the end.
        checkpoint_path: loaded with `load_checkpoint`.

    Returns:
        A module that takes images (B, in_chans, H, W) of any size and any memory format.

    Raises:
        ValueError: an unknown name (the nearest are listed) or an impossible value.
    """
    head, backbone = split_name(name)
    if backbone not in ARCHITECTURES:
        known = list_models("*")
        nearest = difflib.get_close_matches(name, known, 3, 0.5)
        raise ValueError(
            f"name must be one of list_models(), got {name!r}; the nearest are {', '.join(nearest or known[:3])}"
        )
    task = next(task for task, heads in HEADS.items() if head in (heads or (None,)))
    if task != "classification" and (features_only or out_indices is not None):
        raise ValueError(f"features_only and out_indices are of a backbone alone: create_model({backbone!r}, ...)")
    if task == "detection" and output_stride not in (None, 32):
        raise ValueError(f"output_stride must be 32 for detection, got {output_stride}")
    num_classes = NUM_CLASSES[task] if num_classes is None else num_classes
    if task != "classification" and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1 for {task}, got {num_classes}")
    backbone_only = features_only or task != "classification"
    model = MobileViT(
        ARCHITECTURES[backbone],
        1000 if backbone_only else num_classes,
        in_chans,
        drop_rate=drop_rate,
        proj_drop_rate=proj_drop_rate,
        attn_drop_rate=attn_drop_rate,
        ffn_drop_rate=ffn_drop_rate,
        output_stride=OUTPUT_STRIDES[task] if output_stride is None else output_stride,
        features_only=backbone_only,
        out_indices=out_indices,
    )
    if features_only and num_classes not in (0, 1000):
        raise ValueError(f"num_classes has no meaning with features_only=True, got {num_classes}")
    if task == "segmentation":
        model = build_segmentation(head, model, num_classes, HEAD_DROP_RATE if drop_rate is None else drop_rate)
    elif task == "detection":
        model = SSDNetwork(model, num_classes)
    model._created = partial(
        create_model,
        name,
        num_classes=None if features_only else num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        proj_drop_rate=proj_drop_rate,
        attn_drop_rate=attn_drop_rate,
        ffn_drop_rate=ffn_drop_rate,
        output_stride=output_stride,
        features_only=features_only or None,
        out_indices=out_indices,
    )
    model.pretrained_cfg = preprocessing(name) if task == "classification" else None
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)
    return model
