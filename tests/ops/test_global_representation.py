# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import pytest

from mvit3_kernels.ops import Layer, global_representation

from . import plain
from .dropout import DropoutContract
from .inputs import Bad, bad_dropout, bad_layer_norm, bad_linear, bad_map, bad_patches, chosen, seed
from .measure import assert_same, evaluate


class TestGlobalRepresentation(DropoutContract):
    op = staticmethod(global_representation)
    # norms over four channels, twice: how much a rounding grows there is a matter of the draw
    draws = {"transformer-dropouts": 4}
    cases = {
        "transformer": {"num_heads": 2},
        "separable": {"per_sample": True, "conv": True},
        "transformer-dropouts": {"num_heads": 2, "dropouts": (0.3, 0.2, 0.1)},
        "separable-dropouts": {"per_sample": True, "dropouts": (0.3, 0.2, 0.1)},
        "separable-ffn-dropout": {"per_sample": True, "layers": 1, "dropouts": (0.0, 0.0, 0.0), "ffn_dropout": 0.4},
        "one-layer": {"layers": 1, "per_sample": True, "bias": False, "height": 2, "width": 2},
        "no-layer": {"layers": 0},
        "odd-map": {"num_heads": 1, "channels": 9, "height": 7, "width": 13, "patch_size": (1, 1), "layers": 1},
        "head-of-15": {"num_heads": 2, "channels": 30, "layers": 1},
        "one-channel": {"channels": 1, "per_sample": True, "layers": 1},
        "no-final-norm": {"per_sample": True, "layers": 1, "final": False},
    }
    symbolic = False
    roundings = 64
    dropouts = ("attention_dropout", "hidden_dropout", "output_dropout", "ffn_output_dropout")
    test_mean_and_probability = None  # later layers and the final norm see the masks, so that none is linear
    bad_case = {"num_heads": 2, "dropouts": (0.5, 0.5, 0.5), "ffn_dropout": 0.5}
    bad = (
        *bad_map("x"),
        *bad_layer_norm("norm", 4),
        *bad_layer_norm("layers[1].norm1", 4),
        *bad_linear("layers[1].qkv", 4, 12),
        *bad_linear("layers[0].out_proj", 4, 4),
        *bad_layer_norm("layers[1].norm2", 4),
        *bad_linear("layers[0].fc1", 4, 6, any_outputs=True),
        *bad_linear("layers[1].fc2", 6, 4),
        *bad_patches(),
        *bad_dropout(*dropouts),
        *(Bad("num_heads", lambda _, heads=heads: heads, ValueError, "divide the 4 channels") for heads in (0, -1, 3)),
    )

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=4,
        width=6,
        channels=4,
        hidden=6,
        layers=2,
        num_heads=None,
        dropouts=(0.0, 0.0, 0.0),
        ffn_dropout=None,
        **options,
    ):
        """`options`: `per_sample`, `final` (whether a norm comes last), `patch_size`, and those of the weights."""
        own, linear = chosen(options, "per_sample", "final", "patch_size")
        per_sample, final = own.get("per_sample", False), own.get("final", True)

        def layer():
            return Layer(
                draw.layer_norm(channels, per_sample),
                draw.linear(3 * channels if num_heads else 1 + 2 * channels, channels, **linear),
                draw.linear(channels, channels, **linear),
                draw.layer_norm(channels, per_sample),
                draw.linear(hidden, channels, **linear),
                draw.linear(channels, hidden, **linear),
            )

        return {
            "x": draw(batch, height, width, channels),
            "layers": [layer() for _ in range(layers)],
            "norm": draw.layer_norm(channels, per_sample) if final else None,
            "num_heads": num_heads,
            "patch_size": own.get("patch_size", (2, 2)),
            "attention_dropout": dropouts[0],
            "hidden_dropout": dropouts[1],
            "output_dropout": dropouts[2],
            "seed": seed() if any(dropouts) or ffn_dropout else None,
            "ffn_output_dropout": ffn_dropout,
        }

    @staticmethod
    def plain(
        x,
        layers,
        norm,
        num_heads,
        patch_size,
        attention_dropout,
        hidden_dropout,
        output_dropout,
        seed,
        ffn_output_dropout,
    ):
        x, last = plain.nchw(x), output_dropout if ffn_output_dropout is None else ffn_output_dropout
        dropout = (attention_dropout, hidden_dropout, output_dropout, last)
        for i, layer in enumerate(layers):
            # attention, its output, feed-forward network
            seeds = [None if seed is None else seed + 3 * i + j for j in range(3)]
            if num_heads is None:
                x = plain.separable_layer(x, layer, patch_size, dropout, seeds)
            else:
                x = plain.transformer_layer(x, layer, num_heads, patch_size, dropout, seeds)
        return plain.nhwc(x if norm is None else plain.layer_norm(x, norm))

    @staticmethod
    def raw(x, layers, norm, num_heads, patch_size, *dropout, **named):
        flat = [t for layer in layers for norm_or_linear in layer for t in norm_or_linear[:2]]
        norm = (None, None, *layers[0].norm1[2:]) if norm is None else norm
        return x, flat, *norm, num_heads, patch_size, *dropout, *named.values()

    def test_layers_are_not_interchangeable(self):
        arguments = self.make("transformer")
        turned = {**arguments, "layers": arguments["layers"][::-1]}
        with pytest.raises(AssertionError):
            assert_same(evaluate(global_representation, turned), evaluate(global_representation, arguments), 1e-3)

    def test_a_layer_must_be_a_layer(self):
        arguments = self.make("transformer")
        with pytest.raises(TypeError, match=r"layers\[0\] must be a Layer, got tuple"):
            global_representation(**{**arguments, "layers": [tuple(arguments["layers"][0])]})
