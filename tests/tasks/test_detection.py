from __future__ import annotations

import numpy as np
import pytest
import torch

from mvit3_kernels.tasks.detection import assign, detections, ssd_loss

from .. import golden
from .recipe import ANCHORS, boxes, raw_outputs, ssd_targets

SETS = ["overlap", "tiny", "large", "epsedge", "empty"]
V1 = {"candidates": None, "per_class": 200, "per_image": None}


def test_assignment():
    """All images in one batch: of different numbers of boxes, and of none."""
    stored, found = golden.load("ssdmatch"), assign(*boxes(SETS), ANCHORS)
    assert found.offsets.isfinite().all()
    for i, name in enumerate(SETS):
        positive = torch.nonzero(found.labels[i]).flatten()
        assert positive.tolist() == stored[f"{name}_pos_index"].tolist()
        assert found.labels[i][positive].tolist() == stored[f"{name}_pos_labels"].tolist()
        want = torch.from_numpy(stored[f"{name}_targets_f32"]).view(-1, 4)
        torch.testing.assert_close(found.offsets[i][positive], want, rtol=1e-5, atol=4e-6)
        assert found.offsets[i].count_nonzero() <= 4 * len(positive)


def test_a_later_box_wins_an_anchor():
    same = torch.tensor([[0.2, 0.2, 0.4, 0.4]] * 2)
    found = assign([same], [torch.tensor([3, 5])], ANCHORS)
    assert 5 in found.labels  # the anchor that both claim; all others have the first of two equal boxes
    assert (found.labels == 5).sum() == 1


def test_images_without_boxes():
    found = assign([torch.empty(0, 4)] * 2, [torch.empty(0, dtype=torch.int64)] * 2, ANCHORS)
    assert found.labels.shape == (2, 3232) and not found.labels.any() and not found.offsets.any()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("case", ["random", "zeros", "allempty"])
def test_loss(version, case):
    want = {key.removeprefix(f"{case}_"): v for key, v in golden.load(f"ssdloss_{version}").items() if case in key}
    sets, seed = want["image_sets"].tolist(), int(want["seed"])
    shape = (len(sets), 3232, 81)
    scores = np.random.default_rng(seed).standard_normal(shape) * float(want["scale"])
    scores[..., 0] += float(want["bg"])
    offsets = np.random.default_rng(seed + 1).standard_normal((*shape[:2], 4)) * (case != "zeros")
    scores, offsets = (torch.from_numpy(t).requires_grad_() for t in (scores, offsets))
    loss = ssd_loss(scores, offsets, ssd_targets(sets))
    loss.backward()
    if case == "allempty":  # 0 / 0 in v1
        assert loss == 0 and not scores.grad.any() and not offsets.grad.any()
        return
    assert golden.relative(loss, want["total"]) < 1e-12
    assert golden.relative(scores.grad.norm(), want["grad_scores_l2"]) < 1e-12
    assert golden.relative(offsets.grad.norm(), want["grad_boxes_l2"]) < 1e-12
    if case == "random":
        assert torch.nonzero(scores.grad.norm(dim=-1)).tolist() == want["selected_index"].tolist()


def test_what_is_not_chosen_may_be_anything():
    """Infinite scores of anchors that the loss does not choose neither enter it nor its gradient."""
    targets = ssd_targets(["overlap"])
    scores = torch.randn(1, 3232, 81, dtype=torch.float64)
    scores[..., 0] = 20
    scores[0, 5, 0] = 500.0
    offsets = torch.zeros(1, 3232, 4, dtype=torch.float64)
    offsets[0, 5] = torch.inf
    scores.requires_grad_(), offsets.requires_grad_()
    loss = ssd_loss(scores, offsets, targets)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and not offsets.grad[0, 5].any()


@pytest.mark.parametrize("case", ["sparse", "dense", "topk", "none", "ties3", "ties10"])
def test_detections(case):
    want = golden.load("ssdpost_v2")
    [found] = detections(*raw_outputs(case), ANCHORS.double())
    assert len(found.boxes) == len(found.scores) == len(found.labels) == int(want[f"{case}_n"])
    assert abs(found.scores.sum().item() - float(want[f"{case}_scores_sum"])) < 1e-10
    if case in ("sparse", "dense", "topk"):
        assert found.labels.tolist() == want[f"{case}_labels"].tolist()
        assert np.abs(found.boxes.numpy() - want[f"{case}_boxes"]).max() < 1e-12
    elif case == "ties3":  # in any order
        rows = [sorted(map(tuple, np.round(b, 12).tolist())) for b in (found.boxes.numpy(), want["ties3_boxes"])]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("threshold, prefix", [(0.05, ""), (0.01, "thr001_")])
@pytest.mark.parametrize("case", ["sparse", "dense", "topk", "none"])
def test_detections_of_the_first_release(case, threshold, prefix):
    want, name = golden.load("ssdpost_v1"), f"{prefix}{case}"
    [found] = detections(*raw_outputs(case), ANCHORS.double(), score_threshold=threshold, **V1)
    assert len(found.boxes) == int(want[f"{name}_n"])
    assert abs(found.scores.sum().item() - float(want[f"{name}_scores_sum"])) < 1e-9
    assert (found.labels.diff() >= 0).all()


@pytest.mark.parametrize("box", [[0.2, 0.2, 0.2, 0.5], [0.5, 0.5, 0.2, 0.2], [torch.nan, 0.1, 0.5, 0.5]])
def test_boxes_without_area_are_left_out(box):
    found = assign([torch.tensor([box, [0.1, 0.1, 0.6, 0.6]])], [torch.tensor([3, 5])], ANCHORS)
    want = assign([torch.tensor([[0.1, 0.1, 0.6, 0.6]])], [torch.tensor([5])], ANCHORS)
    assert torch.equal(found.labels, want.labels) and torch.equal(found.offsets, want.offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_detections_of_16_bit_outputs(dtype):
    scores, offsets = (t.to(dtype) for t in raw_outputs("sparse"))
    [found], [want] = detections(scores, offsets, ANCHORS), detections(scores.float(), offsets.float(), ANCHORS)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)) and found.boxes.dtype == torch.float32
