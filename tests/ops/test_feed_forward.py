# ruff: noqa: RUF012 -- class attributes are the tables of the tests
from mvit3_kernels.ops import feed_forward

from . import plain
from .dropout import DropoutContract
from .inputs import bad_dropout, bad_layer_norm, bad_linear, bad_map, seed


class TestFeedForward(DropoutContract):
    op = staticmethod(feed_forward)
    compilers = ("aot_eager", "inductor")
    cases = {
        "per-token": {},
        "per-sample": {"per_sample": True, "conv": True},
        "no-bias": {"bias": False},
        "hidden-dropout": {"hidden_dropout": 0.3},
        "dropouts": {"hidden_dropout": 0.5, "output_dropout": 0.25, "per_sample": True},
        "odd-map": {"height": 7, "width": 13, "channels": 15, "hidden": 9, "output_dropout": 0.5},
        "one-channel": {"channels": 1, "hidden": 1, "per_sample": True},
    }
    dropouts = ("hidden_dropout", "output_dropout")
    bad_case = {"hidden_dropout": 0.5, "output_dropout": 0.5}
    bad = (
        *bad_map("x"),
        *bad_layer_norm("norm", 4),
        *bad_linear("fc1", 4, 6, any_outputs=True),
        *bad_linear("fc2", 6, 4),
        *bad_dropout("hidden_dropout", "output_dropout"),
    )

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=3,
        width=5,
        channels=4,
        hidden=6,
        per_sample=False,
        hidden_dropout=0.0,
        output_dropout=0.0,
        **linear,
    ):
        return {
            "x": draw(batch, height, width, channels),
            "norm": draw.layer_norm(channels, per_sample),
            "fc1": draw.linear(hidden, channels, **linear),
            "fc2": draw.linear(channels, hidden, **linear),
            "hidden_dropout": hidden_dropout,
            "output_dropout": output_dropout,
            "seed": seed() if hidden_dropout or output_dropout else None,
        }

    @staticmethod
    def plain(x, *arguments, **named):
        return plain.nhwc(plain.feed_forward(plain.nchw(x), *arguments, **named))

    @staticmethod
    def raw(x, norm, fc1, fc2, *dropout, **named):
        return x, *norm, *fc1, *fc2, *dropout, *named.values()
