# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import torch.nn.functional as F

from mvit3_kernels.ops import depthwise_conv
from mvit3_kernels.ops.types import ACTIVATIONS

from . import plain
from .contract import Contract
from .inputs import bad_activation, bad_batch_norm, bad_depthwise, bad_map


class TestDepthwiseConv(Contract):
    op = staticmethod(depthwise_conv)
    batch_norms = ("norm",)
    cases = {
        "silu": {"act": "silu"},
        "stride": {"act": "silu", "stride": 2},
        "dilation": {"dilation": 2},
        "eval-stride-dilation": {"training": False, "stride": 2, "dilation": 3, "act": "relu"},
        "eval-silu": {"training": False, "act": "silu"},
        "odd-map": {"act": "silu", "height": 7, "width": 13, "channels": 15},
        "odd-map-stride": {"act": "silu", "height": 7, "width": 13, "channels": 9, "stride": 2},
        "one-channel": {"act": "silu", "channels": 1, "eps": 0.1},
        "one-row": {"height": 1, "width": 4, "stride": 2},
    }
    bad_case = {"training": False}
    bad = (*bad_map("x"), *bad_depthwise("weight", 3), *bad_batch_norm("norm", 3), *bad_activation())

    @staticmethod
    def arguments(
        draw, batch=2, height=3, width=5, channels=3, training=True, act="identity", stride=1, dilation=1, eps=1e-5
    ):
        return {
            "x": draw(batch, height, width, channels),
            "weight": draw(channels, 1, 3, 3, scale=1 / 3),
            "norm": draw.batch_norm(channels, training, eps),
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
                y = (
                    y
                    + weight[:, :, i, j, None] * padded[:, :, top : top + height : stride, left : left + width : stride]
                )
        y, moments = plain.batch_norm(y, norm)
        return plain.nhwc(plain.activate(y, act)), moments

    @staticmethod
    def raw(x, weight, norm, act, stride, dilation):
        return x, weight, *norm, ACTIVATIONS.index(act), stride, dilation
