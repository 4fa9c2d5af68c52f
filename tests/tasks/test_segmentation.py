from __future__ import annotations

import numpy as np
import pytest
import torch

from mvit3_kernels import create_model
from mvit3_kernels.tasks import confusion_matrix, intersection_over_union, segmentation_loss

from .. import golden
from .recipe import segmentation_labels

CASES = [
    (version, key.removesuffix("_cfg"))
    for version in ("v1", "v2")
    for key in golden.load(f"segloss_{version}")
    if key.endswith("_cfg")
]


@pytest.mark.parametrize("version, case", CASES)
def test_loss(version, case):
    stored = golden.load(f"segloss_{version}")
    classes, ignore, h, w, height, width, aux_h, aux_w, seed, train = stored[f"{case}_cfg"].tolist()
    logits = torch.from_numpy(2 * np.random.default_rng(seed).standard_normal((2, classes, h, w))).requires_grad_()
    labels = segmentation_labels(seed + 1, classes, (2, height, width), ignore)
    if "all_ignored" in case:
        labels.fill_(ignore)
    given = logits
    if aux_h and train:
        auxiliary = 2 * np.random.default_rng(seed + 3).standard_normal((2, classes, aux_h, aux_w))
        given = (logits, torch.from_numpy(auxiliary))
    # v1 takes the nearest logit, and half of the sum where there are two
    loss = segmentation_loss(
        given, labels, ignore_index=ignore, interpolation="nearest" if version == "v1" else "bilinear"
    )
    if version == "v1" and isinstance(given, tuple):
        loss = loss / 2
    if "all_ignored" in case:
        assert loss.isnan()
        return
    assert golden.relative(loss, stored[f"{case}_loss"]) < 1e-12
    loss.backward()
    assert golden.relative(logits.grad.norm(), stored[f"{case}_grad_l2"]) < 1e-12
    assert golden.relative(logits.grad[0, 0], stored[f"{case}_grad_b0_c0"]) < 1e-10


@pytest.mark.parametrize("name, classes, ignore", [("voc", 21, 255), ("ade", 150, -1)])
def test_confusion_matrix(name, classes, ignore):
    stored, total = golden.load("miou"), 0
    for i, (batch, height, width) in enumerate([(2, 33, 29), (2, 40, 31), (1, 17, 50)]):
        shape, seed = (batch, height, width), 301 + 10 * i
        logits = np.random.default_rng(seed).standard_normal((batch, classes, height, width)).astype(np.float32)
        labels = np.random.default_rng(seed + 1).integers(0, classes - 3, shape)
        labels[np.random.default_rng(seed + 2).random(shape) < 0.15] = ignore
        logits += 3 * np.eye(classes, dtype=np.float32)[labels.clip(0, classes - 1)].transpose(0, 3, 1, 2)
        logits[:, classes - 1] -= 1000
        total += confusion_matrix(torch.from_numpy(logits).argmax(1), torch.from_numpy(labels), classes)
    assert total.tolist() == stored[f"{name}_confmat"].tolist()
    found = intersection_over_union(total).numpy()
    np.testing.assert_allclose(found, stored[f"{name}_iou_per_class"], rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("found", [torch.tensor([[0, 1]]), torch.empty(0, 3, dtype=torch.int64)])
def test_ignored_pixels_do_not_count(found):
    labels = torch.full_like(found, 255)
    assert not confusion_matrix(found, labels, 2).any()


def test_a_network_without_auxiliary_head():
    """`small_logits` gives None for it, and in evaluation for every network."""
    model = create_model("pspnet_mobilevitv2_050", num_classes=4)
    labels, x = torch.randint(0, 4, (2, 64, 64)), torch.randn(2, 3, 64, 64)
    for network in (create_model("deeplabv3_mobilevitv3_xxs", num_classes=4), model.eval()):
        assert segmentation_loss(network.small_logits(x), labels).isfinite()
    logits = list(model.train().small_logits(x))
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(tuple(logits), labels))


def test_labels_as_files_have_them():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (1, 9, 8), dtype=torch.uint8)
    labels[0, 0] = 255
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(logits, labels.long()))
    with pytest.raises(TypeError, match=r"target must be int64, got torch\.float32"):
        segmentation_loss(logits, labels.float())


@pytest.mark.parametrize("size", [50, (0, 3), (3,), (3, 4, 5)])
def test_size_of_a_label_map(size):
    with pytest.raises(ValueError, match=r"size must be two positive integers \(H, W\), got"):
        create_model("deeplabv3_mobilevitv3_xxs", num_classes=4).eval().label_map(torch.randn(1, 3, 64, 64), size)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="interpolation must be 'bilinear' or 'nearest', got 'bicubic'"):
        segmentation_loss(torch.randn(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64), interpolation="bicubic")
    with pytest.raises(ValueError, match="predicted must be classes of 0 to 1, got 0 to 2"):
        confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
