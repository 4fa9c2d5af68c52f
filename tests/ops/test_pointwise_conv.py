# ruff: noqa: RUF012 -- class attributes are the tables of the tests
from mvit3_kernels.ops import pointwise_conv
from mvit3_kernels.ops.types import ACTIVATIONS

from . import plain
from .contract import Contract
from .dropout import DropoutContract
from .inputs import bad_activation, bad_batch_norm, bad_dropout, bad_linear, bad_map, chosen, seed


class TestPointwiseConv(Contract):
    op = staticmethod(pointwise_conv)
    maps = ("x", "residual")
    batch_norms = ("norm",)
    cases = {
        "silu-residual": {"act": "silu", "residual": True},
        "bias": {"bias": True, "conv": False},
        "eval-silu": {"training": False, "act": "silu", "bias": True},
        "eval-residual": {"training": False, "residual": True},
        "plain": {"norm": False},
        "bias-relu-residual": {"norm": False, "act": "relu", "bias": True, "residual": True},
        "odd-map": {"act": "silu", "height": 7, "width": 13, "channels": 15, "outputs": 9},
        "one-channel": {"channels": 1, "outputs": 1, "act": "silu", "eps": 0.1},
    }
    bad_case = {"training": False, "residual": True, "bias": True}
    bad = (
        *bad_map("x"),
        *bad_linear("conv", 4, 3, any_outputs=True),
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
        channels=4,
        outputs=3,
        norm=True,
        act="identity",
        residual=False,
        dropout=0.0,
        **options,
    ):
        """`options`: those of the weights, `bias` and `conv`, and of the norm."""
        linear, of_norm = chosen({"bias": False, "conv": True, **options}, "bias", "conv")
        return {
            "x": draw(batch, height, width, channels),
            "conv": draw.linear(outputs, channels, **linear),
            "norm": draw.batch_norm(outputs, **of_norm) if norm else None,
            "act": act,
            "residual": draw(batch, height, width, outputs) if residual else None,
            "dropout": dropout,
            "seed": seed() if dropout else None,
        }

    @staticmethod
    def plain(x, conv, norm, act, residual, dropout, seed):
        y, moments = plain.conv1x1(plain.nchw(x), *conv), None
        if norm is not None:
            y, moments = plain.batch_norm(y, norm)
        y = plain.dropped(plain.nhwc(plain.activate(y, act)), dropout, seed, 0)
        return (y if residual is None else y + residual), moments

    @staticmethod
    def raw(x, conv, norm, act, residual, dropout, seed):
        norm = norm or (None, None, None, None, False, 0.0)
        return x, *conv, *norm, ACTIVATIONS.index(act), residual, dropout, seed


class TestDropout(DropoutContract):
    """Of the same op: without a norm in training, which makes samples depend on each other."""

    op = staticmethod(pointwise_conv)
    maps = TestPointwiseConv.maps
    cases = {
        "residual": {"dropout": 0.3, "bias": True, "residual": True},
        "frozen-silu": {"dropout": 0.5, "norm": True, "training": False, "act": "silu"},
        "training-silu": {"dropout": 0.25, "norm": True, "act": "silu", "residual": True},
        "odd-map": {"dropout": 0.5, "height": 7, "width": 13, "channels": 15, "outputs": 9},
        "almost-all": {"dropout": 0.99, "residual": True, "outputs": 2},
    }
    dropouts = ("dropout",)
    bad_case = {"dropout": 0.5}
    bad = (*bad_dropout("dropout"),)
    plain = staticmethod(TestPointwiseConv.plain)
    raw = staticmethod(TestPointwiseConv.raw)

    @staticmethod
    def arguments(draw, *sizes, norm=False, **options):
        return TestPointwiseConv.arguments(draw, *sizes, norm=norm, **options)
