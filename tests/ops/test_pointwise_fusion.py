# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import torch

from mvit3_kernels.ops import pointwise_fusion
from mvit3_kernels.ops.types import ACTIVATIONS

from . import plain
from .contract import Contract
from .inputs import bad_activation, bad_batch_norm, bad_map, bad_weight


class TestPointwiseFusion(Contract):
    op = staticmethod(pointwise_fusion)
    maps = ("a", "b", "residual")
    batch_norms = ("norm",)
    cases = {
        "silu-residual": {"act": "silu", "residual": True},
        "identity": {"conv": False},
        "eval-silu": {"training": False, "act": "silu"},
        "eval-residual": {"training": False, "residual": True, "act": "relu"},
        "odd-map": {"act": "silu", "height": 7, "width": 13, "first": 15, "second": 9, "outputs": 5},
        "one-channel": {"first": 1, "second": 1, "outputs": 1, "residual": True, "eps": 0.1},
    }
    bad_case = {"training": False, "residual": True}
    bad = (
        *bad_map("a"),
        *bad_map("b", first=False),
        *bad_weight("weight", 6),
        *bad_batch_norm("norm", 3),
        *bad_activation(),
        *bad_map("residual", first=False),
    )

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=3,
        width=5,
        first=4,
        second=2,
        outputs=3,
        conv=True,
        act="identity",
        residual=False,
        **norm,
    ):
        return {
            "a": draw(batch, height, width, first),
            "b": draw(batch, height, width, second),
            "weight": draw.linear(outputs, first + second, False, conv).weight,
            "norm": draw.batch_norm(outputs, **norm),
            "act": act,
            "residual": draw(batch, height, width, outputs) if residual else None,
        }

    @staticmethod
    def plain(a, b, weight, norm, act, residual):
        y, moments = plain.batch_norm(plain.conv1x1(torch.cat((plain.nchw(a), plain.nchw(b)), 1), weight), norm)
        y = plain.nhwc(plain.activate(y, act))
        return (y if residual is None else y + residual), moments

    @staticmethod
    def raw(a, b, weight, norm, act, residual):
        return a, b, weight, *norm, ACTIVATIONS.index(act), residual
