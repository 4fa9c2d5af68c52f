"""upsample_cross_entropy and upsample_argmax on the CPU, at the shapes of DeepLabv3 on PASCAL VOC and ADE20K.

    python benchmarks/bench_upsample.py [--json] [--quick] [--compile] [--threads 2]

"eager" is torch.nn.functional.interpolate and cross_entropy (or argmax) on a channels_last map, "compile" the same
under torch.compile. Results and gradients are held to twice eager's error before they are timed; the truth is taken
image by image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Case, Make, Run, compiled, mode, run_cases
from mvit3_kernels.ops import upsample_argmax, upsample_cross_entropy

# (batch, side of the small map, classes, side of the labels)
SHAPES = ((4, 32, 21, 512), (4, 64, 150, 512), (4, 32, 150, 512))
IGNORE = 255


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    large = F.interpolate(logits.permute(0, 3, 1, 2), target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(large, target, ignore_index=IGNORE)


def plain_labels(logits: Tensor, target: Tensor) -> Tensor:
    size = target.shape[1:]
    return F.interpolate(logits.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True).argmax(1)


def inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    batch, small, classes, large = shape
    torch.manual_seed(0)
    target = torch.randint(0, classes, (batch, large, large))
    target[torch.rand(target.shape) < 0.1] = IGNORE
    return torch.randn(batch, small, small, classes), target


def loss_case(shape: tuple[int, int, int, int], training: bool) -> Case:
    logits, target = inputs(shape)
    x = logits.requires_grad_()

    def run(loss) -> dict[str, Tensor]:
        value = loss(x, target)
        (gradient,) = torch.autograd.grad(value, x)
        return {"loss": value.detach(), "dlogits": gradient}

    def truth() -> dict[str, Tensor]:
        total, gradients, pixels = 0.0, [], (target != IGNORE).sum()
        for one, labels in zip(x.detach().double(), target, strict=True):
            one.requires_grad_()
            loss = plain_loss(one[None], labels[None]) * (labels != IGNORE).sum() / pixels
            gradients.append(torch.autograd.grad(loss, one)[0])
            total = total + loss.detach()
        return {"loss": total, "dlogits": torch.stack(gradients)}

    return Case(
        columns(shape, "upsample_cross_entropy", training),
        {
            "eager": lambda: run(plain_loss),
            "ours": lambda: run(lambda x, t: upsample_cross_entropy(x, t, True, IGNORE)),
        },
        truth,
        rounds=9,
        bytes=2 * x.numel() * 4 + target.numel() * 8,
        compiled=lambda: partial(run, compiled(plain_loss)),
    )


def labels_case(shape: tuple[int, int, int, int], training: bool) -> Case:
    logits, target = inputs(shape)

    # labels are right or wrong: but for ties, of which random logits have none but by rounding, all are eager's
    different = (plain_labels(logits, target) != upsample_argmax(logits, target.shape[1:], True)[0]).double().mean()
    if different > 1e-5:
        raise AssertionError(f"{different:.1e} of the labels differ from eager's")

    def compiled_labels() -> Run:
        call = compiled(plain_labels)
        return lambda: {"labels": call(logits, target)}

    return Case(
        columns(shape, "upsample_argmax", training),
        {
            "eager": lambda: {"labels": plain_labels(logits, target)},
            "ours": lambda: {"labels": upsample_argmax(logits, target.shape[1:], True)[0]},
        },
        None,
        rounds=9,
        bytes=logits.numel() * 4 + target.numel() * 8,
        compiled=compiled_labels,
    )


def columns(shape: tuple[int, int, int, int], op: str, training: bool) -> dict[str, str]:
    batch, small, classes, large = shape
    text = f"{batch}x{small}x{small}x{classes} -> {large}x{large}"
    return {"op": op, "network": "deeplabv3", "shape": text, "dtype": "float32", "mode": mode(training)}


def cases(options: argparse.Namespace) -> Iterator[Make]:
    for make, training in ((loss_case, True), (labels_case, False)):
        yield from (partial(make, shape, training) for shape in SHAPES)


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "upsample", cases)
