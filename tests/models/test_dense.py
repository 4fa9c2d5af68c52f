"""Networks of dense prediction against their golden values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mvit3_kernels import CheckpointError, _native, create_model, explain, fuse, list_models, load_checkpoint
from mvit3_kernels.models.detection import decode, encode
from mvit3_kernels.tasks import segmentation_loss, ssd_loss

from .. import golden
from ..tasks.recipe import segmentation_labels, ssd_targets

NO_DROPOUT = {"drop_rate": 0.0, "proj_drop_rate": 0.0}
F64, F32 = 1e-10, 1e-5


def make(published: str, dtype: torch.dtype = torch.float64, **options: float) -> nn.Module:
    name, own = golden.DENSE[published]
    return golden.fill(create_model(name, **own, **options)).to(dtype)


@pytest.mark.parametrize("published", golden.DENSE)
def test_state_dict_is_the_published_one(published):
    name, options = golden.DENSE[published]
    with torch.device("meta"):
        model = create_model(name, **options)
    assert [[key, list(t.shape)] for key, t in model.state_dict().items()] == golden.state_dicts()[published]


@pytest.mark.parametrize("dtype, bound", [(torch.float64, F64), (torch.float32, F32)], ids=str)
def test_detection(dtype, bound):
    want = golden.load("ssd_mobilevitv3_small_v3")
    model = make("ssd_mobilevitv3_small_v3", dtype).eval()
    with torch.no_grad():
        scores, offsets = model(golden.image(0, 1, 3, 320, 320).to(dtype))
    for name, found in (("scores", scores), ("boxes", offsets)):
        assert list(found.shape) == want[f"{name}_raw_shape"].tolist()
        assert golden.relative(golden.summary(found.double()), want[f"{name}_raw_mean_std_l2"]) < bound
        assert golden.relative(found.flatten()[:64], want[f"{name}_raw_first64"]) < bound
    anchors = model.anchors((320, 320))
    assert torch.equal(anchors, torch.from_numpy(want["anchors_all_float32"][0]))
    if dtype is torch.float64:  # exp() of float32's errors is not small
        boxes = decode(offsets, anchors.double())[0]
        assert golden.relative(boxes.flatten()[:64], want["boxes_decoded_corner_first64"]) < bound
        assert golden.relative(encode(boxes[:16], anchors[:16].double()), offsets[0, :16]) < 1e-9


@pytest.mark.parametrize("dtype, bound", [(torch.float64, F64), (torch.float32, F32)], ids=str)
def test_segmentation(dtype, bound):
    want = golden.load("deeplabv3_mobilevitv3_small_v3")
    model = make("deeplabv3_mobilevitv3_small_v3", dtype).eval()
    with torch.no_grad():
        y = model(golden.image(0, 1, 3, 512, 512).to(dtype))
        odd = model(golden.image(0, 1, 3, 200, 232).to(dtype))
    assert golden.relative(golden.summary(y.double()), want["seg512_mean_std_l2"]) < bound
    assert golden.relative(y[:, :, ::64, ::64], want["seg512_grid64"]) < bound
    assert list(odd.shape) == want["seg200x232_shape"].tolist()
    assert golden.relative(golden.summary(odd.double()), want["seg200x232_mean_std_l2"]) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("published", ["deeplabv3_mobilevitv3_small_v3", "deeplabv3_mobilevitv3_1.00"])
def test_label_map(published, dtype):
    """The published evaluation of an image: made smaller to whole strides, labels at its original size."""
    want = golden.load(f"segeval_{published.replace('deeplabv3_', 'deeplabv3_voc_')}")
    model = make(published, dtype).eval()
    image = golden.image(7, 1, 3, *want["input_shape"].tolist())
    size = want["net_input_shape"][2:].tolist()
    x = nn.functional.interpolate(image.double(), size, mode="bilinear", align_corners=model.align_corners).to(dtype)
    with torch.no_grad():
        found = model.label_map(x, want["orig_shape"].tolist())
        assert torch.equal(model.label_map(x), model(x).argmax(1))
    assert torch.equal(found[0], torch.from_numpy(want["pred"]).long())


def check_step(model: nn.Module, x: torch.Tensor, want: dict[str, np.ndarray]) -> None:
    """Gradients of all parameters and of the images, and the running statistics after one forward pass."""
    found = dict(model.named_parameters())
    assert list(found) == want["param_names"].tolist()
    norms = torch.stack([p.grad.norm() for p in found.values()])
    total = float(want["total_grad_norm"])
    assert abs(norms.norm().item() - total) < 1e-9 * total
    # a norm's bias in front of a convolution and another norm has no gradient but rounding
    assert np.abs(norms.numpy() - want["grad_l2"]).max() < 1e-9 * total
    for p, first in zip(found.values(), want["grad_first8"], strict=True):
        got = p.grad.flatten()[:8].numpy()
        assert np.abs(got - first[: len(got)]).max() < 1e-9 * total
    assert golden.relative(golden.summary(x.grad)[2], want["input_grad_mean_std_l2"][2]) < 1e-9
    buffers = dict(model.named_buffers())
    for name, norm in zip(want["bn_names"].tolist(), want["bn_l2"], strict=True):
        assert abs(buffers[name].norm().item() - norm) < 1e-10 * norm


@pytest.mark.parametrize("published", ["ssd_mobilevitv3_small_v3", "ssd_mobilevitv3_1.00"])
def test_training_step_of_detection(published):
    want = golden.load(published.replace("ssd_", "ssd_train320_"))
    model = make(published, **NO_DROPOUT).train()
    x = golden.image(0, 2, 3, 320, 320).double().requires_grad_()
    scores, offsets = model(x)
    assert golden.relative(golden.summary(scores), want["scores_mean_std_l2"]) < F64
    assert golden.relative(golden.summary(offsets), want["boxes_mean_std_l2"]) < F64
    loss = ssd_loss(scores, offsets, ssd_targets(want["image_sets"].tolist()))
    assert golden.relative(loss, want["loss"]) < F64
    loss.backward()
    check_step(model, x, want)


@pytest.mark.parametrize(
    "published, stored, ignore",
    [
        ("deeplabv3_mobilevitv3_small_v3", "deeplabv3_voc_mobilevitv3_small_v3", 255),
        ("deeplabv3_mobilevitv3_1.00", "deeplabv3_voc_mobilevitv3_1.00", 255),
        ("pspnet_mobilevitv3_1.00", "pspnet_voc_mobilevitv3_1.00", 255),
        ("deeplabv3_ade20k_mobilevitv3_0.50", "deeplabv3_ade20k_mobilevitv3_0.50", -1),
    ],
)
def test_training_step_of_segmentation(published, stored, ignore):
    want = golden.load(f"seg_train128_{stored}")
    model = make(published, **NO_DROPOUT).train()
    x = golden.image(0, 2, 3, 128, 128).double().requires_grad_()
    labels = segmentation_labels(61, model.num_classes, (2, 128, 128), ignore)
    found = model(x)
    logits, auxiliary = found if want["has_aux"].item() else (found, None)
    assert golden.relative(golden.summary(logits), want["out_mean_std_l2"]) < F64
    if auxiliary is not None:
        assert golden.relative(golden.summary(auxiliary), want["aux_mean_std_l2"]) < F64
    loss = segmentation_loss(found, labels, ignore_index=ignore)
    assert golden.relative(loss, want["loss"]) < F64
    loss.backward()
    check_step(model, x, want)


def test_the_loss_of_small_logits_is_that_of_the_output():
    want = golden.load("seg_train128_deeplabv3_voc_mobilevitv3_1.00")
    model = make("deeplabv3_mobilevitv3_1.00", torch.float32, **NO_DROPOUT).train()
    labels = segmentation_labels(61, 21, (2, 128, 128), 255)
    small = model.small_logits(golden.image(0, 2, 3, 128, 128))
    loss = segmentation_loss(small, labels, align_corners=model.align_corners)
    assert golden.relative(loss, want["loss"]) < F32
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert golden.relative(norm, want["total_grad_norm"]) < 1e-3  # ill-conditioned: the pooled branch has two values


@pytest.mark.parametrize(
    "name", ["deeplabv3_mobilevit_xxs", "pspnet_mobilevitv3_xxs", "ssdlite_mobilevitv2_050", "ssdlite_mobilevitv3_xxs"]
)
def test_any_image_size_and_number_of_classes(name):
    model = create_model(name, num_classes=5, in_chans=4).eval()
    with torch.no_grad():
        for size in ((65, 97), (128, 64), (225, 300)):
            y = model(torch.randn(2, 4, *size))
            if name.startswith("ssdlite"):
                count = len(model.anchors(size))
                assert y[0].shape == (2, count, 5) and y[1].shape == (2, count, 4)
            else:
                assert y.shape == (2, 5, *(-(-side // 16) * 16 for side in size))


def test_names():
    assert len(list_models()) == 20 and len(list_models("*")) == 80
    assert list_models(task="detection")[0] == "ssdlite_mobilevit_s"
    assert list_models("pspnet_mobilevitv3_*", task="segmentation") == list_models("pspnet_mobilevitv3_*")
    with pytest.raises(
        ValueError, match="task must be one of classification, segmentation, detection or None, got 'x'"
    ):
        list_models(task="x")
    with pytest.raises(ValueError, match=r"nearest are .*deeplabv3_mobilevitv3_s"):
        create_model("deeplab_mobilevitv3_s")
    with pytest.raises(ValueError, match="features_only and out_indices are of a backbone alone"):
        create_model("ssdlite_mobilevitv3_s", features_only=True)
    with pytest.raises(ValueError, match="num_classes must be at least 1 for detection, got 0"):
        create_model("ssdlite_mobilevitv3_s", num_classes=0)
    with pytest.raises(ValueError, match="output_stride must be 32 for detection, got 16"):
        create_model("ssdlite_mobilevitv3_s", output_stride=16)


@pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("name", ["deeplabv3_mobilevitv3_xxs", "ssdlite_mobilevitv2_050"])
def test_fuse_serves_the_backbone(name):
    model = golden.fill(create_model(name, num_classes=5)).eval()
    x = golden.image(0, 1, 3, 128, 160)
    with torch.inference_mode():
        want = model(x)
        fuse(model)
        got = model(x)
        assert "fused" in str(explain(model, x))
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (want, got)), strict=True):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_batch_of_detection_stays_open():
    model, x = create_model("ssdlite_mobilevitv3_xxs", num_classes=4).eval(), torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert model(x[:0])[0].shape == (0, len(model.anchors((96, 128))), 4)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for batch in (1, 5):
            images = torch.randn(batch, 3, 96, 128)
            for got, want in zip(program(images), model(images), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_anchors_are_the_callers_own():
    model = create_model("ssdlite_mobilevitv3_xxs")
    with torch.inference_mode():
        model.anchors((64, 64)).mul_(320)
    again = model.anchors((64, 64))
    assert again.max() <= 1 and not again.is_inference()


@pytest.mark.parametrize("name", ["deeplabv3_mobilevitv2_050", "ssdlite_mobilevitv3_xxs"])
def test_checkpoint_of_another_number_of_classes(name, tmp_path):
    torch.save(create_model(name, num_classes=4).state_dict(), tmp_path / "four.pt")
    model = create_model(name, num_classes=7)
    with pytest.raises(CheckpointError, match="unlike"):
        load_checkpoint(model, tmp_path / "four.pt")
    report = load_checkpoint(model, tmp_path / "four.pt", drop_head=True)
    assert report.dropped and all("seg_head" in key or "ssd_heads" in key for key in report.dropped)
