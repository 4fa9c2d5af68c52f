# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import torch

from mvit3_kernels.ops import dropout

from . import plain
from .dropout import DropoutContract
from .inputs import bad_dropout, bad_map, seed


class TestDropout(DropoutContract):
    op = staticmethod(dropout)
    maps = ("x", "residual")
    cases = {
        "dropout": {"p": 0.3},
        "residual": {"p": 0.5, "residual": True},
        "nothing-is-dropped": {"p": 0.0, "residual": True},
        "odd-map": {"height": 7, "width": 13, "channels": 15, "p": 0.25, "residual": True},
    }
    autocast_dtype = torch.float32
    dropouts = ("p",)
    bad_case = {"p": 0.5, "residual": True}
    bad = (*bad_map("x"), *bad_dropout("p"), *bad_map("residual", first=False))

    @staticmethod
    def arguments(draw, batch=2, height=3, width=5, channels=4, p=0.0, residual=False):
        x = draw(batch, height, width, channels)
        return {
            "x": x,
            "p": p,
            "seed": seed() if p else None,
            "residual": draw(*x.shape) if residual else None,
        }

    @staticmethod
    def plain(x, p, seed, residual):
        y = plain.dropped(x, p, seed, 0)
        return y if residual is None else y + residual

    @staticmethod
    def raw(x, p, seed, residual):
        return x, p, seed, residual
