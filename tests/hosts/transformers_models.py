"""Small networks of transformers under which every part shows in the results, and what a call of them gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTForSemanticSegmentation,
    MobileViTModel,
    MobileViTV2Config,
    MobileViTV2ForImageClassification,
    MobileViTV2ForSemanticSegmentation,
    MobileViTV2Model,
)

KINDS = {
    "v1": MobileViTModel,
    "v1 classes": MobileViTForImageClassification,
    "v1 masks": MobileViTForSemanticSegmentation,
    "v2": MobileViTV2Model,
    "v2 classes": MobileViTV2ForImageClassification,
    "v2 masks": MobileViTV2ForSemanticSegmentation,
}
FAMILIES = ("v1 classes", "v2 classes")


def network(name: str, **options: object) -> nn.Module:
    """A small network of `KINDS` in evaluation, which never drops unless `options` of its configuration say so."""
    options = {"num_labels": 5, "classifier_dropout_prob": 0.0, "aspp_dropout_prob": 0.0, **options}
    if name.startswith("v1"):
        widths = {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 12, 12, 16, 16, 32], "expand_ratio": 2.0}
        options = {**widths, "aspp_out_channels": 8, "hidden_dropout_prob": 0.0, **options}
        config = MobileViTConfig(**options)
    else:
        widths = {"width_multiplier": 0.25, "base_attn_unit_dims": [48, 64, 96], "n_attn_blocks": [2, 1, 1]}
        config = MobileViTV2Config(**{**widths, "aspp_out_channels": 8, **options})
    return randomise(KINDS[name](config)).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim > 1:
            t.normal_(0, t[0].numel() ** -0.5, generator=draw)
        elif "var" in name or ("norm" in name and "weight" in name):
            t.uniform_(0.5, 1.5, generator=draw)
        elif t.is_floating_point():
            t.normal_(0, 0.2, generator=draw)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def outputs(model: nn.Module, x: Tensor, hidden: bool = True) -> dict[str, Tensor]:
    """Everything that a call returns."""
    found = dict(model(x, output_hidden_states=hidden))
    states = {f"state {i}": t for i, t in enumerate(found.pop("hidden_states", ()))}
    return {**found, **states}


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients of parameters and pixels, and the buffers after the call."""
    x = x.clone().requires_grad_()
    found = outputs(model, x)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t) for t in found.values()]
    torch.autograd.backward(list(found.values()), weights)
    grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    return {**{name: t.detach() for name, t in found.items()}, "d x": x.grad, **grads, **buffers}


def distance(found: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> float:
    """The largest difference of outputs, of all gradients together and of buffers, relative to what is wanted."""
    assert found.keys() == want.keys()
    assert [name for name, t in found.items() if t is None] == [name for name, t in want.items() if t is None]
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, t in want.items():
        assert t is None or t.shape == found[name].shape, name
        if t is not None:
            groups.setdefault("gradients" if name.startswith("d ") else name, []).append((found[name], t))
    worst = 0.0
    for pairs in groups.values():
        a, b = (torch.cat([t.flatten().double() for t in side]) for side in zip(*pairs, strict=True))
        worst = max(worst, ((a - b).norm() / b.norm().clamp(min=1e-30)).item())
    return worst
