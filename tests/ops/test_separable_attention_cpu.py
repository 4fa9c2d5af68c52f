# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of separable_attention."""

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import separable_attention

from ..bounds import assert_bound, half_a_rounding, relative_errors
from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import mapped
from .test_separable_attention import TestSeparableAttention as Reference


@needs_the_kernels
class TestSeparableAttentionCpu(CpuKernel):
    op = staticmethod(separable_attention)
    # The later ones fill several tiles, panels and ranges of rows.
    shapes = (
        (2, 4, 6, 5, (2, 2)),
        (1, 1, 1, 3, (1, 1)),
        (3, 1, 14, 17, (1, 2)),
        (2, 7, 13, 9, (1, 1)),
        (2, 8, 8, 33, (8, 8)),
        (5, 9, 12, 16, (3, 2)),
        (1, 16, 16, 96, (2, 2)),
        (3, 32, 32, 64, (2, 2)),
        (1, 32, 30, 130, (2, 2)),
        (2, 8, 8, 256, (2, 2)),
        (17, 8, 8, 40, (2, 2)),
    )
    options = {
        "per-sample": {"conv": True},
        "per-token": {"per_sample": False},
        "no-bias": {"bias": False},
        "large-mean": {"mean": 30.0},
        "dropouts": {"attention_dropout": 0.3, "output_dropout": 0.2},
    }
    threaded = ((3, 32, 32, 24, (2, 2)), (1, 32, 32, 64, (2, 2)), (4, 16, 16, 64, (4, 2)))

    @staticmethod
    def arguments(draw, batch, height, width, channels, patch_size, mean=0.0, **options):
        arguments = Reference.arguments(draw, batch, height, width, channels, patch_size=patch_size, **options)
        arguments["x"] += mean
        return arguments

    @staticmethod
    def registered(arguments):
        x, norm, qkv, out_proj, patch_size, *dropout = arguments.values()
        inputs = (x, *norm, *qkv, *out_proj, *patch_size)
        yield torch.ops.mvit3.separable_attention_forward.default, (*inputs, *dropout)
        y, *kept = torch.ops.mvit3.separable_attention_forward(*inputs, *dropout)
        backward = (
            torch.ones_like(y),
            x,
            norm.weight,
            norm.bias,
            norm.per_sample,
            *qkv,
            *out_proj,
            *kept,
            *patch_size,
            *dropout,
        )
        yield torch.ops.mvit3.separable_attention_backward.default, backward
        with torch.no_grad():
            detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
        torch.library.opcheck(torch.ops.mvit3.separable_attention_inference.default, tuple(detached))

    def test_inference_is_training_without_gradients(self, shape, option):
        arguments = in_float32(self.make(shape, option))
        with torch.no_grad(), mvit3_kernels.backend("cpu"):
            found = separable_attention(**arguments)
        assert torch.equal(found, self.results("cpu", arguments)["y"])

    def test_scores_far_apart(self, option):
        """Maxima that grow from tile to tile, and exponentials that vanish."""
        arguments = self.make((2, 40, 30, 16, (2, 2)), option)
        arguments["qkv"].weight[0] *= 40
        arguments["x"] *= torch.linspace(0.1, 10, 40)[:, None, None]
        truth = self.results("reference", arguments, torch.float64)
        found, reference = (self.results(backend, arguments) for backend in ("cpu", "reference"))
        assert_bound(found, reference, truth, half_a_rounding(torch.float32))

    @pytest.mark.parametrize("threads", [1, 2, 3, 5])
    @pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
    def test_every_cut_into_tasks_agrees(self, batch, threads):
        """Whole samples or ranges of rows, as many as the threads."""
        arguments, before = self.make((batch, 20, 18, 48, (2, 2)), "dropouts"), torch.get_num_threads()
        truth = self.results("reference", arguments, torch.float64)
        torch.set_num_threads(threads)
        try:
            errors = relative_errors(self.results("cpu", arguments), truth)
        finally:
            torch.set_num_threads(before)
        assert max(errors.values()) < 1e-6, errors

    def test_the_kernel_checks_what_it_is_given(self):
        x, norm, qkv, out_proj, *_ = in_float32(self.make((2, 4, 6, 5, (2, 2)))).values()
        op = torch.ops.mvit3.separable_attention_inference
        with pytest.raises(RuntimeError, match=r"must be a multiple of \(patch_height, patch_width\), got \(3, 2\)"):
            op(x, *norm, *qkv, *out_proj, 3, 2)
        with pytest.raises(RuntimeError, match=r"1 \+ 2D rows"):
            op(x, *norm, qkv.weight[:-1], qkv.bias, *out_proj, 2, 2)
        with pytest.raises(RuntimeError, match=r"out_weight must have 5 outputs of 5 values, got shape"):
            op(x, *norm, *qkv, out_proj.weight[:-1], out_proj.bias, 2, 2)


@needs_the_kernels
def test_what_is_kept_for_backward():
    """x, the scores and a few values a sample: no keys, values or attended tokens."""
    arguments = mapped(TestSeparableAttentionCpu().make((2, 4, 6, 32, (2, 2))), lambda _, t: t.float().requires_grad_())
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        mvit3_kernels.backend("cpu"),
    ):
        separable_attention(**arguments)
    parameters = {
        t.data_ptr() for group in ("norm", "qkv", "out_proj") for t in arguments[group] if isinstance(t, torch.Tensor)
    }
    activations = [t for t in kept if t.data_ptr() not in parameters]
    statistics, positions = 2, 4
    assert sum(t.numel() for t in activations) == 2 * (4 * 6 * (32 + 1) + statistics + 2 * positions * 32)
