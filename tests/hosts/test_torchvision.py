"""Fused models of torchvision, detectors with a backbone of timm, and encoders that wrap one, are what they were."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.mobilenetv3 import InvertedResidual as InvertedResidualV3
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import Conv2dNormActivation, Conv3dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign

from mvit3_kernels import _native, explain, fuse, fuse_report, unfuse

from .compare import distances, images, pickled, prepare

EXACT = 1e-12
built = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")


def became(model: nn.Module) -> list[str]:
    """What blocks of a fused model are now, with why the others were left."""
    return [row.became or row.reason for row in fuse_report(model)]


BLOCKS = {
    "pointwise": ((4, 6, 1), {}),
    "depthwise": ((4, 4, 3), {"stride": 2, "groups": 4, "activation_layer": nn.SiLU}),
    "dense": ((4, 6, 3), {"dilation": 2}),
    "wide": ((4, 6, (5, 3)), {"padding": (0, 2), "bias": True}),
    "no activation": ((4, 6, 1), {"activation_layer": None}),
    "no norm": ((4, 6, 1), {"norm_layer": None}),
    "identity": ((4, 6, 1), {"activation_layer": nn.Identity, "inplace": None}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("block", BLOCKS)
def test_conv_norm_activation_is_exact(block, training):
    arguments, options = BLOCKS[block]
    model = prepare(Conv2dNormActivation(*arguments, **options))
    found = distances(model, images(2, 4, 9, 13), training)
    assert all(distance <= EXACT for distance in found.values()), found
    assert became(fuse(model, "training")) == ["FusedConv2dNormActivation"]


LEFT = {
    "relu6": ({"activation_layer": nn.ReLU6}, "act 'ReLU6' has no kernel"),
    "hardswish": ({"activation_layer": nn.Hardswish}, "act 'Hardswish' has no kernel"),
    "frozen": ({"norm_layer": FrozenBatchNorm2d}, "it has a FrozenBatchNorm2d where the op has a BatchNorm2d"),
    "alone": ({"norm_layer": None, "activation_layer": None}, "a convolution alone is as fast as it is"),
    "linear": ({"activation_layer": None}, "a norm without activation is as fast as it is"),
    "bare": ({"norm_layer": None}, "a convolution without norm is fused with its activation where it is 1x1 only"),
    "odd": ({"norm_layer": None, "activation_layer": nn.ReLU6}, "it has a ReLU6 where the op has a BatchNorm2d"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_no_op_computes_is_left_with_a_reason(case):
    options, reason = LEFT[case]
    model = nn.Sequential(Conv2dNormActivation(3, 4, **options), Conv2dNormActivation(4, 4))
    (left,) = fuse_report(fuse(model, "training")).left()
    assert (left.name, left.kind) == ("0", "Conv2dNormActivation") and reason in left.reason
    assert type(model[0]) is Conv2dNormActivation
    model[0].append(nn.ReLU())
    del model[0][0:2]
    assert left.kind in str(fuse_report(model))


def test_other_dimensions_are_of_no_concern():
    model = nn.Sequential(Conv3dNormActivation(3, 4), Conv2dNormActivation(4, 4))
    assert became(fuse(model, "training")) == ["FusedConv2dNormActivation"]


def test_the_map_may_have_the_hosts_name():
    host, x = prepare(Conv2dNormActivation(3, 8, 1)), images(2, 3, 5, 4)
    want = host(input=x)
    fused = fuse(host, "training")
    assert torch.allclose(fused(input=x), want, rtol=EXACT)
    for keywords in ({}, {"other": x}):
        with pytest.raises(TypeError, match="forward"):
            fused(**keywords)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = fused

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(input=x)

    row = next(row for row in explain(Caller(), x) if row.what == "block")
    assert row.ran == "modules" and "not just a map" in row.reason


def test_changes_and_hooks_take_effect():
    host = prepare(Conv2dNormActivation(3, 4)).train()
    model, x, calls = fuse(copy.deepcopy(host), "training"), images(2, 3, 9, 7), []
    for m in (host, model):
        m[1].register_forward_hook(lambda module, inputs, output: calls.append(0) or 2 * output)
    assert model(x).equal(host(x)) and len(calls) == 2
    assert "1 has a hook" in " ".join(became(model) + explain(model, x).reasons())
    model[1]._forward_hooks.clear()
    assert type(unfuse(pickled(model))) is Conv2dNormActivation


def residual_v2(activation: type[nn.Module] = nn.SiLU, **options) -> nn.Module:
    block = InvertedResidual(**{"inp": 4, "oup": 4, "stride": 1, "expand_ratio": 2, **options})
    for conv in (m for m in block.conv if isinstance(m, Conv2dNormActivation)):
        conv[2] = activation()
    return block


def residual_v3(kernel: int = 3, stride: int = 1, dilation: int = 1, **options) -> nn.Module:
    options = {"use_se": False, "activation": "RE", "expanded_channels": 16, "out_channels": 8, **options}
    config = InvertedResidualConfig(8, kernel, stride=stride, dilation=dilation, width_mult=1.0, **options)
    return InvertedResidualV3(config, nn.BatchNorm2d)


RESIDUALS = {
    "v2": (residual_v2, ""),
    "v2 without skip": (lambda: residual_v2(nn.ReLU, oup=6, stride=2), ""),
    "v2 as it is": (lambda: residual_v2(nn.ReLU6), "act 'ReLU6' has no kernel"),
    "v2 without expansion": (lambda: residual_v2(expand_ratio=1), "it is not an expansion, a filter and a projection"),
    "v2 frozen": (lambda: residual_v2(norm_layer=FrozenBatchNorm2d), "it has a FrozenBatchNorm2d"),
    "v3": (residual_v3, ""),
    "v3 dilated": (lambda: residual_v3(dilation=2, stride=2, out_channels=16), ""),
    "v3 with stride": (lambda: residual_v3(stride=2), ""),
    "v3 with attention": (lambda: residual_v3(use_se=True), "it has Conv2dNormActivation, Conv2dNormActivation, Sq"),
    "v3 with hardswish": (lambda: residual_v3(activation="HS"), "act 'Hardswish' has no kernel"),
    "v3 wide": (lambda: residual_v3(kernel=5), "its convolutions are not 1x1, depth-wise 3x3 and 1x1"),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", RESIDUALS)
def test_inverted_residuals(case, training):
    make, reason = RESIDUALS[case]
    block = make()
    model = prepare(nn.Sequential(block, Conv2dNormActivation(block.out_channels, 4)))
    found = distances(model, images(2, 4 if "v2" in case else 8, 9, 7), training)
    assert all(distance <= EXACT for distance in found.values()), found
    left = [row.reason for row in fuse_report(fuse(model, "training")) if row.name == "0"]
    assert reason in left[0] if reason else left == [""]
    inside = [type(m).__name__ for m in model.modules()]
    # A block speaks for the Sequential inside of it; where it is left, the Sequential has its own rows.
    assert ("FusedSequential" in inside) == (case in ("v2 as it is", "v2 without expansion"))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_heads_of_segmentation(training):
    model = prepare(nn.Sequential(FCNHead(8, 6), DeepLabHead(6, 3, (2, 3))))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 0.1  # a pooled map has one pixel
    found = distances(model, images(3, 8, 9, 7), training)
    assert all(distance <= EXACT for distance in found.values()), found
    rows = became(fuse(model, "training"))
    # Head, its 1x1 branch, two of dilated convolutions and the projection; the pooled branch has a forward of its own.
    assert sorted(rows) == ["FusedASPPConv"] * 2 + ["FusedDeepLabHead", "FusedFCNHead"] + ["FusedSequential"] * 2
    assert pickled(model)[1][0].convs[1](images(1, 6, 3, 3)).shape == (1, 256, 3, 3)


class Maps(nn.Module):
    """A backbone as SSD takes it: maps by name."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.out_channels = encoder.feature_info.channels()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict((str(i), y) for i, y in enumerate(self.encoder(x)))


def encoder(name: str = "mobilevit_xxs", out_indices: tuple[int, ...] = (2, 3, 4)) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, out_indices=out_indices)


class Detection(nn.Module):
    """A detector as a function of images: its losses in training, boxes, scores and labels in evaluation."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> list[Tensor]:
        box = torch.tensor([[4.0, 6.0, 40.0, 50.0]], dtype=x.dtype)
        target = {"labels": torch.tensor([1]), "masks": torch.ones(1, *x.shape[2:], dtype=torch.uint8)}
        targets = [{**target, "boxes": box + i} for i in range(len(x))] if self.training else None
        found = self.detector(list(x), targets)
        found = [found] if self.training else found
        return [t for one in found for t in one.values() if t.is_floating_point()]


def ssd() -> nn.Module:
    backbone = Maps(encoder())
    boxes = DefaultBoxGenerator([[2]] * 3)
    return SSD(backbone, boxes, (64, 64), num_classes=3, topk_candidates=20, detections_per_img=10)


def ssdlite() -> nn.Module:
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, width_mult=0.25, topk_candidates=20, detections_per_img=10
    )
    model.transform.fixed_size = (96, 96)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 0.1  # the last maps have one pixel: the host's own error is large where two images differ by little
    return model


class Pyramid(nn.Module):
    """The maps of BackboneWithFPN."""

    def __init__(self) -> None:
        super().__init__()
        network = encoder()
        names = network.feature_info.module_name()
        returned = {name.replace(".", "_"): str(i) for i, name in enumerate(names)}
        self.backbone = BackboneWithFPN(network, returned, network.feature_info.channels(), 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x).values())


def mask_rcnn() -> nn.Module:
    backbone = Maps(encoder(out_indices=(3,)))
    (width,) = backbone.out_channels
    backbone.out_channels = width
    parts = {
        "rpn_anchor_generator": AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 5, 1),
        "box_head": TwoMLPHead(width * 25, 16),
        "box_predictor": FastRCNNPredictor(16, 3),
        "mask_roi_pool": MultiScaleRoIAlign(["0"], 4, 1),
        "mask_head": MaskRCNNHeads(width, (8,), 1),
        "mask_predictor": MaskRCNNPredictor(8, 8, 3),
    }
    # the weights of the test move boxes far: without the last option none stays on the images
    options = {"min_size": 64, "max_size": 96, "box_score_thresh": -1.0, "bbox_reg_weights": (1e3, 1e3, 1e3, 1e3)}
    return MaskRCNN(backbone, **options, **parts)


# What is in their reports, and how often.
DETECTORS = {
    "ssd": (lambda: Detection(ssd()), {"FusedMobileVitBlock": 3, "FusedBottleneckBlock": 7}),
    "fpn": (Pyramid, {"FusedMobileVitBlock": 3, "a convolution alone is as fast as it is": 6}),
    "mask": (lambda: Detection(mask_rcnn()), {"FusedMobileVitBlock": 2, "FusedBottleneckBlock": 6}),
    "ssdlite": (lambda: Detection(ssdlite()), {"FusedInvertedResidualV3": 2, "act 'Hardswish' has no kernel": 1}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name, training):
    make, rows = DETECTORS[name]
    torch.manual_seed(0)
    model, x = prepare(make()), images(2, 3, 70, 51)
    assert all(t.numel() > 0 for t in copy.deepcopy(model).train(training)(x))
    found = distances(model, x, training)
    assert all(distance <= EXACT for distance in found.values()), found
    report = became(fuse(model, "training"))
    assert all(report.count(row) >= count for row, count in rows.items()), report


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_classifiers(training):
    for make, pixels in ((mobilenet_v2, 47), (mobilenet_v3_large, 33)):
        torch.manual_seed(0)
        model = prepare(make(num_classes=5, width_mult=0.25))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found = distances(model, images(3, 3, pixels, pixels), training)
        assert all(distance <= EXACT for distance in found.values()), found


class Universal(nn.Module):
    """An encoder with a network of timm inside, as libraries of segmentation wrap it: images are its first map."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = encoder(name, out_indices=(0, 1, 2, 3, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, *self.model(x)]


class Unet(nn.Module):
    """A decoder of plain convolutions over such an encoder."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = Universal(name)
        widths = self.encoder.model.feature_info.channels()
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
            for width in widths
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(y) for layer, y in zip(self.decoder, self.encoder(x)[1:], strict=True)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_encoders(name, training):
    model = prepare(Unet(name))
    found = distances(model, images(2, 3, 64, 49), training, "inference")
    assert all(distance <= EXACT for distance in found.values()), found
    report = {row.name: row.became for row in fuse_report(fuse(model))}
    assert report["encoder.model"] == "FusedFeatureListNet" and report["decoder.4"] == "FusedSequential"
    assert all(report.values())


@built
@torch.no_grad()
def test_an_encoder_is_one_program():
    model, x = Unet("mobilevitv2_050").eval(), images(1, 3, 64, 49).float()
    want = model(x)
    for got, t in zip(fuse(model)(x), want, strict=True):
        assert torch.allclose(got, t, rtol=1e-3, atol=1e-4)
    assert next(row.ran for row in explain(model, x) if row.kind == "network") == "fused"
