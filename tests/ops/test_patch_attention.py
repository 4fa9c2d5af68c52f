# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import pytest
import torch

from mvit3_kernels.ops import patch_attention

from . import plain
from .dropout import DropoutContract
from .inputs import Bad, Draw, bad_dropout, bad_map, bad_patches, seed


class TestPatchAttention(DropoutContract):
    op = staticmethod(patch_attention)
    maps = ("qkv",)
    cases = {
        "two-heads": {},
        "four-heads": {"num_heads": 4, "head_dim": 3},
        "dropout": {"dropout": 0.3},
        "head-of-15": {"num_heads": 2, "head_dim": 15, "height": 6, "width": 10},
        "head-of-9-dropout": {"num_heads": 1, "head_dim": 9, "dropout": 0.5},
        "odd-map": {"height": 7, "width": 13, "patch_size": (1, 1)},
        "patch-3x2": {"height": 6, "width": 4, "patch_size": (3, 2)},
        "one-patch": {"height": 2, "width": 2},
        "one-channel": {"num_heads": 1, "head_dim": 1},
    }
    symbolic = False
    dropouts = ("dropout",)
    bad_case = {"dropout": 0.5}
    bad = (
        *bad_map("qkv"),
        *bad_patches(),
        *bad_dropout("dropout"),
        *(Bad("num_heads", lambda _, heads=heads: heads, ValueError, "divide the 12 channels") for heads in (0, -1, 3)),
    )

    @staticmethod
    def arguments(draw, batch=2, height=4, width=6, num_heads=2, head_dim=2, patch_size=(2, 2), dropout=0.0):
        return {
            "qkv": draw(batch, height, width, 3 * num_heads * head_dim),
            "num_heads": num_heads,
            "patch_size": patch_size,
            "dropout": dropout,
            "seed": seed() if dropout else None,
        }

    @staticmethod
    def plain(qkv, *arguments, **named):
        return plain.nhwc(plain.patch_attention(plain.nchw(qkv), *arguments, **named))

    @staticmethod
    def raw(qkv, *arguments, **named):
        return qkv, *arguments, *named.values()

    def test_a_pixel_sees_its_own_patch_position_only(self):
        """The value of one pixel reaches exactly the pixels of its sample that share its position inside a patch."""
        qkv = self.make("two-heads")["qkv"].detach()
        changed = qkv.clone()
        changed[1, 2, 5] += 1.0
        moved = (patch_attention(changed, 2) - patch_attention(qkv, 2)).abs().amax(-1) > 1e-9
        want = torch.zeros_like(moved)
        want[1, 0::2, 1::2] = True
        assert torch.equal(moved, want)

    @pytest.mark.parametrize("shift", [300.0, -300.0])
    def test_large_scores(self, shift):
        """Softmax is shift invariant, and one key that outweighs the others is returned alone."""
        qkv = Draw()(1, 4, 6, 6).to(torch.float32)
        qkv[..., :2], qkv[..., 2:4] = 1.0, 0.0
        want = patch_attention(qkv, 1)
        qkv[..., 2:4] = shift
        torch.testing.assert_close(patch_attention(qkv, 1), want)
        qkv[0, 2, 4, 2:4] = shift + 300
        torch.testing.assert_close(patch_attention(qkv, 1)[0, 0, 0], qkv[0, 2, 4, 4:])
