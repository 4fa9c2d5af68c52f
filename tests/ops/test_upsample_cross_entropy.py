# ruff: noqa: RUF012 -- class attributes are the tables of the tests
from __future__ import annotations

import torch
import torch.nn.functional as F

from mvit3_kernels.ops import upsample_cross_entropy

from .contract import Contract
from .inputs import Bad, Draw, bad_map, bad_parameter
from .measure import evaluate, tensors

IGNORE = 255


def labels(draw: Draw, classes: int, *shape: int) -> torch.Tensor:
    """Of which a fifth is ignored."""
    target = torch.randint(0, classes, shape, generator=draw.generator)
    return target.masked_fill_(torch.rand(shape, generator=draw.generator) < 0.2, IGNORE)


class TestUpsampleCrossEntropy(Contract):
    op = staticmethod(upsample_cross_entropy)
    maps = ("logits",)
    cases = {
        "corners": {"align_corners": True},
        "centres": {},
        "smoothed": {"label_smoothing": 0.1},
        "one-class": {"classes": 1},
        "one-position": {"height": 1, "width": 1},
        "smaller": {"scale": 0.5, "height": 4, "width": 6},
        "same-size": {"scale": 1},
    }
    autocast_dtype = torch.float32
    bad_case = {"weighted": True}
    bad = (
        *bad_map("logits"),
        *bad_parameter("weight", 5),
        Bad("target", lambda t: t.int(), TypeError, "int64"),
        Bad("target", lambda t: t.tolist(), TypeError, "Tensor"),
        Bad("target", lambda t: t[0], ValueError, "(B, H, W)"),
        Bad("target", lambda t: t[:1], ValueError, "batch of the logits"),
        Bad("target", lambda t: t[:, :0], ValueError, "at least one pixel"),
        Bad("target", lambda t: t.to("meta"), ValueError, "device"),
        Bad("label_smoothing", lambda _: 1.5, ValueError, "0 to 1"),
        Bad("label_smoothing", lambda _: float("nan"), ValueError, "0 to 1"),
    )

    @staticmethod
    def arguments(draw, batch=2, height=3, width=4, classes=5, scale=3, weighted=False, **options):
        size = (int(height * scale), int(width * scale))
        return {
            "logits": draw(batch, height, width, classes, scale=2.0),
            "target": labels(draw, classes, batch, *size),
            "align_corners": False,
            "ignore_index": IGNORE,
            "weight": draw(classes).exp() if weighted else None,
            "label_smoothing": 0.0,
            **options,
        }

    @staticmethod
    def plain(logits, target, align_corners, ignore_index, weight, label_smoothing):
        """Each pixel's log-softmax of products with PyTorch's own interpolation, written out."""
        nchw = logits.permute(0, 3, 1, 2).contiguous()
        large = F.interpolate(nchw, target.shape[1:], mode="bilinear", align_corners=align_corners)
        log_p = large - large.logsumexp(1, keepdim=True)
        counted = target != ignore_index
        chosen = log_p.gather(1, target.where(counted, 0)[:, None])[:, 0]
        loss = -(1 - label_smoothing) * chosen - label_smoothing * log_p.mean(1)
        return loss.where(counted, 0).sum() / counted.sum()

    @staticmethod
    def raw(*, logits, target, **options):
        return (logits, target, *options.values())

    def test_batch_of_no_sample(self, case):
        """A mean over nothing."""
        got = evaluate(self.op, self.make(case, batch=0))
        assert got["y[0]"].isnan() and got["d logits"].shape[0] == 0

    def test_export_is_aten(self, case):
        arguments = self.cast(self.make(case, grad=False), torch.float32, torch.float32)
        program = torch.export.export(Loss(), (), arguments).module()
        torch.testing.assert_close(tensors(program(**arguments)), tensors(self.op(**arguments)), rtol=1e-5, atol=1e-6)

    def test_precision(self, case, dtype):
        """16-bit logits are computed with in float32; the kernel is held to it in test_upsample_cross_entropy_cpu."""
        arguments = self.cast(self.make(case), dtype, dtype)
        got = evaluate(self.op, arguments)
        want = evaluate(self.op, self.cast(arguments, torch.float32, torch.float32))
        assert got["y[0]"].dtype == torch.float32 and got["d logits"].dtype == dtype
        torch.testing.assert_close(got["y[0]"], want["y[0]"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got["d logits"].float(), want["d logits"], rtol=1e-2, atol=1e-6)

    def test_autocast(self, case):
        arguments = self.cast(self.make(case), torch.float32, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(self.op, arguments)
        want = evaluate(self.op, arguments)
        assert {t.dtype for t in got.values()} == {torch.float32}
        assert all(torch.equal(t, want[name]) for name, t in got.items())


class Loss(torch.nn.Module):
    def forward(self, **arguments):
        return upsample_cross_entropy(**arguments)
