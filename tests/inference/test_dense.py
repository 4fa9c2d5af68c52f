"""Networks of dense prediction as one program: backbone, head, and boxes of a detector."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels import _native, explain, fuse, refresh, unfuse
from mvit3_kernels.inference import FusedMobileViT
from mvit3_kernels.inference.program import IMAGE, Program
from mvit3_kernels.tasks import choose, detections
from tests.bounds import assert_bound, each
from tests.inference.test_fuse import images, network

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

NAMES = ("deeplabv3_mobilevitv3_xxs", "deeplabv3_mobilevitv2_050", "pspnet_mobilevitv3_050", "ssdlite_mobilevitv3_xxs")


def outputs(y: torch.Tensor | tuple) -> dict[str, torch.Tensor]:
    return dict(enumerate(y)) if isinstance(y, tuple) else {0: y}


def same(model: nn.Module, x: torch.Tensor) -> None:
    """The network's own code gives the same."""
    plain = unfuse(copy.deepcopy(model))
    for a, b in zip(outputs(model(x)).values(), outputs(plain(x)).values(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_networks(name):
    model = network(name, num_classes=7)
    for x in (images(2, 3, 96, 128), images(1, 3, 65, 97)):
        exact = copy.deepcopy(model).double()(x.double())
        with mvit3_kernels.backend("reference"):
            reference = model(x)
        found = fuse(model)(x)
        rows = [row for row in explain(model, x) if row.kind == "network"]
        assert [(row.what, row.ran) for row in rows] == [(type(model).__name__, "fused")]
        unfuse(model)
        named = ({str(i): t for i, t in outputs(y).items()} for y in (found, reference, exact))
        assert_bound(*named, 1e-6, group=each, least=0)


@torch.no_grad()
def test_label_maps_and_boxes():
    model, x = network("deeplabv3_mobilevitv3_xxs", num_classes=5), images(2, 3, 64, 96)
    want = model.label_map(x)
    assert torch.equal(fuse(model).label_map(x), want)
    model = network("ssdlite_mobilevitv2_050", num_classes=5)
    for x in (images(3, 3, 64, 96), images(1, 3, 97, 65)):
        plain = model.predict(x)
        probabilities, boxes = fuse(model).predict(x)
        for got, expected in zip((probabilities, boxes), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(probabilities.sum(-1), torch.ones(()), atol=1e-5)
        for got, expected in zip(
            choose(probabilities, boxes), detections(*model(x), model.anchors(x.shape[2:])), strict=True
        ):
            torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
        unfuse(model)


def test_what_predict_returns():
    """Also outside of the program, in the precision of the network."""
    model, x = network("ssdlite_mobilevitv3_xxs", num_classes=4).double(), images(1, 3, 64, 64).double()
    probabilities, boxes = fuse(model).predict(x)
    assert probabilities.dtype == boxes.dtype == torch.float64 and probabilities.requires_grad
    assert torch.allclose(probabilities.sum(-1), torch.ones((), dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float().predict(x.float())[0].dtype == torch.float32


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight of the head": lambda m: m.seg_head.aspp.aspp_layer["project"].block.conv.weight.data.mul_(1.5),
    "a statistic of a branch": lambda m: m.seg_head.aspp.aspp_layer["convs"][4].aspp_pool[1].norm.running_mean.add_(3),
    "a bias of the classifier": lambda m: m.seg_head.classifier.classifier.block.conv.bias.data.add_(1),
    "an activation": lambda m: setattr(m.seg_head.aspp.aspp_layer["project"], "act", "silu"),
    "a hook": lambda m: m.seg_head.aspp.register_forward_hook(lambda m, x, y: 2 * y),
    "another branch": lambda m: m.seg_head.aspp.aspp_layer["convs"].__setitem__(
        0, nn.Conv2d(m.encoder.feature_info.channels(4), 256, 1)
    ),
    "another pool": lambda m: m.seg_head.aspp.aspp_layer["convs"][4].aspp_pool.__setitem__(
        1, nn.Sequential(nn.Conv2d(m.encoder.feature_info.channels(4), 256, 1), nn.Sigmoid())
    ),
    "dropout that drops nothing": lambda m: setattr(m.seg_head.aspp, "dropout", nn.Identity()),
    "a hook in the backbone": lambda m: m.encoder.layer_2.register_forward_hook(lambda m, x, y: 2 * y),
    "other features": lambda m: setattr(m.encoder.feature_info, "out_indices", (0, 4, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_followed(change):
    model, x = fuse(network("deeplabv3_mobilevitv3_xxs", num_classes=4)), images(1, 3, 64, 64)
    before = model(x)
    CHANGES[change](model)
    same(model, x)
    assert ("nothing" in change or "features" in change) == torch.allclose(model(x), before, rtol=1e-3)
    served = model._fused.why_not(model, x) is None
    assert served == (change not in ("a hook", "another branch", "another pool", "a hook in the backbone"))


@torch.no_grad()
def test_where_the_program_cannot_serve_the_backbone_s_may():
    model, x = fuse(network("ssdlite_mobilevitv3_xxs", num_classes=4)), images(1, 3, 64, 64)
    model.ssd_heads[2].register_forward_hook(lambda m, x, y: 2 * y)
    rows = {row.what: row for row in explain(model, x) if row.kind == "network"}
    assert rows["FusedSSDNetwork"].reason.startswith("ssd_heads.2 has a hook")
    assert rows["encoder"].ran == "fused"
    same(model, x)
    model.ssd_heads[2]._forward_hooks.clear()
    assert "training mode" in model.train()._fused.why_not(model, x)


@torch.no_grad()
def test_copies_and_back():
    model, x = fuse(network("deeplabv3_mobilevitv2_050", num_classes=4)), images(1, 3, 64, 64)
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and twin._fused is not model._fused
        assert torch.equal(twin(x), want)
    assert refresh(model) is model and torch.equal(model(x), want)
    assert type(model.encoder) is FusedMobileViT
    unfuse(model)
    assert {type(m).__name__ for m in (model, model.encoder)} == {"SegmentationNetwork", "MobileViT"}
    assert torch.allclose(model(x), want, rtol=1e-3, atol=1e-4)
    model.train()
    logits, auxiliary = fuse(model)(images(2, 3, 64, 64))
    assert logits.shape == (2, 4, 64, 64) and auxiliary.shape == (2, 4, 4, 4)


@torch.no_grad()
def test_endings_run_what_they_need():
    """Two endings of one program, the shorter one on a size at which the other has no result."""
    program = Program(3)
    pooled = program.add("adaptive_pool", [IMAGE], (), [2])
    listed = program.add("anchors", [pooled], (), [3])
    assert program.finish([pooled], lambda results: results[0]) == 0
    assert program.finish([listed], lambda results: results[0]) == 1
    x = images(5, 3, 7, 9)
    want = nn.functional.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(program(x), want)
    torch.testing.assert_close(program(x, 1), want.reshape(5, 4, 1, 3))
    with pytest.raises(RuntimeError, match="ending must be 0 to 1, got 2"):
        torch.ops.mvit3.engine_run(program._engine, x, 2)


MISFITS = {
    "anchors takes multiples of 2 channels, got 3": ("anchors", [0], (), [2], ()),
    "boxes takes 12 channels, got 3": ("boxes", [0], (torch.ones(2, 2),), [6, 1], [0.1, 0.2]),
    "spread_taps takes 27 channels, got 3": ("spread_taps", [0, 0], (), [0], ()),
    "pointwise_sum takes 4 channels, got 6": (
        "pointwise_sum",
        [0, 0, 0],
        (torch.ones(3, 4), *torch.ones(2, 3)),
        [0],
        (),
    ),
    "takes a bias of one pixel, got 63": ("pointwise_sum", [0, 0], (torch.ones(3, 3), *torch.ones(2, 3)), [0], ()),
}


@pytest.mark.parametrize("message", MISFITS)
def test_maps_that_do_not_fit(message):
    program = Program(3)
    program.finish([program.add(*MISFITS[message])], lambda results: results[0])
    with pytest.raises(RuntimeError, match=message):
        program(images(5, 3, 7, 9))
