"""Loaders of the images of the tests of the data."""

from types import SimpleNamespace

import torch

from mvit3.data import AugmentConfig, DataConfig, SamplerConfig


def config(root="", augment=None, sampler=None, **data):
    defaults = dict(source="folder", root=str(root), batch_size=8, eval_batch_size=5, resize=36, crop=32, workers=0)
    return SimpleNamespace(
        data=DataConfig(**{**defaults, **data}),
        augment=AugmentConfig(**(augment or dict(rand_augment=2, erase=0.25, color_jitter=0.2))),
        sampler=SamplerConfig(**(sampler or dict(size=32, sizes=(24, 32, 40)))),
    )


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )
