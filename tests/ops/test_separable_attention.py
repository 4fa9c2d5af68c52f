# ruff: noqa: RUF012 -- class attributes are the tables of the tests
from mvit3_kernels.ops import separable_attention

from . import plain
from .dropout import DropoutContract
from .inputs import bad_dropout, bad_layer_norm, bad_linear, bad_map, bad_patches, seed


class TestSeparableAttention(DropoutContract):
    op = staticmethod(separable_attention)
    cases = {
        "per-sample": {"conv": True},
        "per-token": {"per_sample": False},
        "no-bias": {"bias": False},
        "attention-dropout": {"attention_dropout": 0.3},
        "dropouts": {"attention_dropout": 0.5, "output_dropout": 0.25},
        "width-15": {"channels": 15, "height": 6, "width": 10},
        "odd-map": {"channels": 9, "height": 7, "width": 13, "patch_size": (1, 1)},
        "patch-3x2": {"height": 6, "width": 4, "patch_size": (3, 2)},
        "one-patch": {"height": 2, "width": 2},
        "one-channel": {"channels": 1},
    }
    symbolic = False
    dropouts = ("attention_dropout", "output_dropout")
    bad_case = {"attention_dropout": 0.5, "output_dropout": 0.5}
    bad = (
        *bad_map("x"),
        *bad_layer_norm("norm", 4),
        *bad_linear("qkv", 4, 9),
        *bad_linear("out_proj", 4, 4),
        *bad_patches(),
        *bad_dropout("attention_dropout", "output_dropout"),
    )

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=4,
        width=6,
        channels=4,
        per_sample=True,
        patch_size=(2, 2),
        attention_dropout=0.0,
        output_dropout=0.0,
        **linear,
    ):
        return {
            "x": draw(batch, height, width, channels),
            "norm": draw.layer_norm(channels, per_sample),
            "qkv": draw.linear(1 + 2 * channels, channels, **linear),
            "out_proj": draw.linear(channels, channels, **linear),
            "patch_size": patch_size,
            "attention_dropout": attention_dropout,
            "output_dropout": output_dropout,
            "seed": seed() if attention_dropout or output_dropout else None,
        }

    @staticmethod
    def plain(x, *arguments, **named):
        return plain.nhwc(plain.separable_attention(plain.nchw(x), *arguments, **named))

    @staticmethod
    def raw(x, norm, qkv, out_proj, *rest, **named):
        return x, *norm, *qkv, *out_proj, *rest, *named.values()
