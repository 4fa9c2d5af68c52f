# ruff: noqa: RUF012 -- class attributes are the tables of the tests
from mvit3_kernels.ops import norm_linear

from . import plain
from .contract import Contract
from .inputs import bad_layer_norm, bad_linear, bad_map
from .measure import assert_same, evaluate


class TestNormLinear(Contract):
    op = staticmethod(norm_linear)
    cases = {
        "per-token": {},
        "per-sample": {"per_sample": True},
        "no-bias": {"bias": False, "conv": True, "eps": 1e-3},
        "per-sample-conv": {"per_sample": True, "conv": True, "eps": 1e-3},
        "odd-map": {"height": 7, "width": 13, "channels": 15, "outputs": 9},
        "odd-map-per-sample": {"height": 7, "width": 13, "channels": 9, "outputs": 15, "per_sample": True},
        "one-channel-per-sample": {"channels": 1, "outputs": 2, "per_sample": True},
        "large-mean": {"mean": 8.0},
        "one-position": {"height": 1, "width": 1, "per_sample": True},
    }
    bad = (*bad_map("x"), *bad_layer_norm("norm", 4), *bad_linear("projection", 4, 3, any_outputs=True))

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=3,
        width=5,
        channels=4,
        outputs=3,
        per_sample=False,
        eps=1e-5,
        mean=0.0,
        **linear,
    ):
        return {
            "x": draw(batch, height, width, channels, mean=mean),
            "norm": draw.layer_norm(channels, per_sample, eps),
            "projection": draw.linear(outputs, channels, **linear),
        }

    @staticmethod
    def plain(x, norm, projection):
        return plain.nhwc(plain.conv1x1(plain.layer_norm(plain.nchw(x), norm), *projection))

    @staticmethod
    def raw(x, norm, projection):
        return x, *norm, *projection

    def test_a_norm_over_one_value(self):
        """Variance 0: the normalised value is the norm's bias, and no gradient is left for x."""
        for per_sample in (False, True):
            size = {"batch": 1, "height": 1, "width": 1, "channels": 1, "per_sample": per_sample}
            got = evaluate(norm_linear, self.make("per-token", **size))
            assert_same(got, evaluate(self.plain, self.make("per-token", **size)), 1e-12)
            assert got["d x"].abs() < 1e-12
