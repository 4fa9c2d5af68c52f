"""A network in channels_last memory crosses the library without a copy that only moves elements, forward and backward.

Operators are watched on tensors that exist in name only, with the kernels of a backend in their places, so no GPU is
needed; tests/gpu/test_profile_gpu.py looks at the kernels of a real one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.ops import dispatch

FAMILIES = ("mobilevitv3_xxs", "mobilevitv3_050", "mobilevitv2_050", "mobilevit_xxs")
COPIES = ("clone", "_to_copy", "copy_", "contiguous", "cat", "roll", "flip", "im2col", "col2im")
# A dense 3x3 convolution over a concatenation is the library's, which wants one tensor: the fusion of MobileViTv1.
CONCATENATIONS = {"mobilevit_xxs": 3}


def _in_place(t: Tensor) -> bool:
    """Whether the rows of a map (B, H, W, C) lie at one distance: contiguous, or some channels of a contiguous map."""
    return t[..., 0].numel() < 2 or (
        t.stride(3) == 1 and t.stride(1) == t.shape[2] * t.stride(2) and t.stride(0) == t.shape[1] * t.stride(1)
    )


class Watch(TorchDispatchMode):
    """Lists operators that copy a map, and kernels that would have to copy what they are given."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.found, self.ours, self.images = [], 0, images.shape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # A map is told from a parameter by the size of the batch; the images are cast once, at the entrance.
        maps = [
            t
            for t in leaves
            if t.ndim == 4 and t.shape[0] == self.images[0] and t.shape != self.images and t.is_floating_point()
        ]
        if name.startswith("mvit3."):
            self.ours += 1
            wrong = [t for t in maps if not _in_place(t)]
        elif "convolution" in name:
            wrong = [t for t in maps if not t.is_contiguous(memory_format=torch.channels_last)]
        else:
            wrong = maps if name.split(".")[1] in COPIES else []
        self.found += [(name, tuple(t.shape), t.stride(), t.dtype) for t in wrong[:1]]
        return out


def pretend(backend: str, monkeypatch) -> None:
    """Lets `backend` take every call, and no other backend any."""
    if backend == "triton":
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
        monkeypatch.setattr(_native, "why_not", lambda: "another backend is watched")


def watched(name: str, training: bool, side: int = 64) -> Watch:
    model = mvit3_kernels.create_model(name, num_classes=10).to(memory_format=torch.channels_last).train(training)
    with FakeTensorMode() as mode:
        for module in model.modules():
            for tensors, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda t: t)):
                tensors |= {key: wrap(mode.from_tensor(t).detach()) for key, t in tensors.items() if t is not None}
        images = torch.empty(7, 3, side, side)  # no width of a network is 7
        images = images.contiguous(memory_format=torch.channels_last)
        with Watch(images) as watch:
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                logits = model(images)
            if training:
                F.cross_entropy(logits.float(), torch.zeros(7, dtype=torch.long)).backward()
    return watch


def offers(name: str, backend: str) -> bool:
    return any(kernel.backend == backend for kernel in getattr(mvit3_kernels.ops, name).__globals__["KERNELS"])


# A backend without a kernel for an op of a network runs that op's reference, which moves elements about.
OPS = {
    "mobilevitv3_xxs": ("inverted_residual", "depthwise_conv"),
    "mobilevitv3_050": ("inverted_residual", "depthwise_conv", "separable_attention"),
    "mobilevitv2_050": ("inverted_residual", "depthwise_conv", "separable_attention"),
    "mobilevit_xxs": ("inverted_residual",),
}
CASES = [(name, "triton") for name in FAMILIES if all(offers(op, "triton") for op in OPS[name])] + [
    (name, "cpu") for name in FAMILIES
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_no_copy_inside_the_network(name, backend, training, monkeypatch):
    if backend == "cpu" and _native.why_not():
        pytest.skip(_native.why_not())
    pretend(backend, monkeypatch)
    watch = watched(name, training)
    allowed = CONCATENATIONS.get(name, 0)
    concatenations = [call for call in watch.found if call[0].startswith("aten.cat")]
    others = [call for call in watch.found if not call[0].startswith("aten.cat")]
    assert watch.ours > 20
    assert not others, others
    assert len(concatenations) == allowed, concatenations


def test_the_watch_sees_a_copy():
    """A network in the other layout is copied at its entrance, and a backward pass that comes in the other layout at
    its end."""
    layer = mvit3_kernels.nn.ConvNormAct(16, 24)
    with FakeTensorMode() as mode, Watch(torch.empty(7, 3, 8, 8)) as watch:
        for module in layer.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {key: mode.from_tensor(t).detach() for key, t in tensors.items() if t is not None}
        y = layer(torch.empty(7, 16, 8, 8).requires_grad_())
        assert [call[0] for call in watch.found] == ["aten.clone.default"]
        y.backward(torch.empty(7, 24, 8, 8))
        assert len(watch.found) > 1
