# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import torch
import torch.nn.functional as F

from mvit3_kernels.ops import conv3x3
from mvit3_kernels.ops.types import ACTIVATIONS

from . import plain
from .contract import Contract
from .inputs import bad_activation, bad_batch_norm, bad_conv3x3, bad_map


class TestConv3x3(Contract):
    op = staticmethod(conv3x3)
    batch_norms = ("norm",)
    cases = {
        "silu": {"act": "silu"},
        "stride": {"act": "silu", "stride": 2},
        "dilation": {"dilation": 2},
        "eval-stride-dilation": {"training": False, "stride": 2, "dilation": 3, "act": "relu"},
        "eval-silu": {"training": False, "act": "silu"},
        "plain": {"norm": False, "act": "relu"},
        "odd-map": {"act": "silu", "height": 7, "width": 13, "channels": 9, "outputs": 15},
        "all-but-the-centre-outside": {"dilation": 9},
        "one-channel": {"act": "silu", "channels": 1, "outputs": 1, "eps": 0.1},
    }
    bad_case = {"training": False}
    bad = (*bad_map("x"), *bad_conv3x3("weight", 4), *bad_batch_norm("norm", 3), *bad_activation())

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=3,
        width=5,
        channels=4,
        outputs=3,
        norm=True,
        act="identity",
        stride=1,
        dilation=1,
        **options,
    ):
        return {
            "x": draw(batch, height, width, channels),
            "weight": draw(outputs, channels, 3, 3, scale=1 / (9 * channels) ** 0.5),
            "norm": draw.batch_norm(outputs, **options) if norm else None,
            "act": act,
            "stride": stride,
            "dilation": dilation,
        }

    @staticmethod
    def plain(x, weight, norm, act, stride, dilation):
        """The nine taps, one by one."""
        x = plain.nchw(x)
        padded = F.pad(x, (dilation,) * 4)
        height, width = x.shape[2:]
        y = 0
        for i in range(3):
            for j in range(3):
                top, left = i * dilation, j * dilation
                window = padded[:, :, top : top + height : stride, left : left + width : stride]
                y = y + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
        moments = None
        if norm is not None:
            y, moments = plain.batch_norm(y, norm)
        return plain.nhwc(plain.activate(y, act)), moments

    @staticmethod
    def raw(x, weight, norm, act, stride, dilation):
        return x, weight, *(norm or (None, None, None, None, False, 0.0)), ACTIVATIONS.index(act), stride, dilation
