# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import pytest
import torch
from torch import nn

from mvit3_kernels.ops import batch_norm_act
from mvit3_kernels.ops.types import ACTIVATIONS

from . import plain
from .contract import Contract
from .inputs import bad_activation, bad_batch_norm, bad_map


class TestBatchNormAct(Contract):
    op = staticmethod(batch_norm_act)
    maps = ("x", "residual")
    batch_norms = ("norm",)
    cases = {
        "silu-residual": {"act": "silu", "residual": True},
        "relu": {"act": "relu", "eps": 1e-3},
        "identity": {},
        "eval-silu": {"training": False, "act": "silu"},
        "eval-residual": {"training": False, "residual": True},
        "odd-map": {"act": "silu", "height": 7, "width": 13, "channels": 15},
        "one-channel": {"act": "silu", "channels": 1},
        "large-mean": {"act": "silu", "mean": 8.0},
        "one-position": {"batch": 4, "height": 1, "width": 2},
    }
    autocast_dtype = torch.float32  # a normalisation, like PyTorch's own, keeps its input's dtype
    bad_case = {"training": False, "residual": True}
    bad = (*bad_map("x"), *bad_map("residual", first=False), *bad_batch_norm("norm", 4), *bad_activation())

    @staticmethod
    def arguments(
        draw, batch=2, height=3, width=5, channels=4, training=True, act="identity", residual=False, eps=1e-5, mean=0.0
    ):
        return {
            "x": draw(batch, height, width, channels, mean=mean),
            "norm": draw.batch_norm(channels, training, eps),
            "act": act,
            "residual": draw(batch, height, width, channels) if residual else None,
        }

    @staticmethod
    def plain(x, norm, act, residual):
        y, moments = plain.batch_norm(plain.nchw(x), norm)
        y = plain.nhwc(plain.activate(y, act))
        return (y if residual is None else y + residual), moments

    @staticmethod
    def raw(x, norm, act, residual):
        return x, *norm, ACTIVATIONS.index(act), residual

    def test_constant_channel(self):
        """Variance 0: y is the bias and the gradient of x is finite."""
        arguments = self.make("identity")
        arguments["x"] = torch.full_like(arguments["x"], 3.0).requires_grad_()
        y, moments = batch_norm_act(**arguments)
        torch.testing.assert_close(y, arguments["norm"].bias.expand_as(y), rtol=0, atol=1e-12)
        torch.testing.assert_close(moments.mean, torch.full_like(moments.mean, 3.0), rtol=0, atol=1e-12)
        torch.testing.assert_close(moments.var, torch.zeros_like(moments.var), rtol=0, atol=1e-12)
        assert torch.autograd.grad(y.sum(), arguments["x"])[0].isfinite().all()

    def test_output_is_contiguous(self):
        for case in self.cases:
            arguments = self.make(case)
            arguments["x"] = plain.nhwc(plain.nchw(arguments["x"]))
            assert batch_norm_act(**arguments)[0].is_contiguous(), case

    def test_moments_update_running_statistics(self):
        """The returned moments hold what torch's module needs for its buffers: momentum 0.1, unbiased variance."""
        arguments = self.make("identity", grad=False)
        x, norm = arguments["x"], arguments["norm"]
        module = nn.BatchNorm2d(x.shape[-1]).double()
        module.load_state_dict(
            {**norm._asdict(), "num_batches_tracked": torch.tensor(0)} | {"weight": norm.weight}, strict=False
        )
        want = module(plain.nchw(x))
        y, (mean, var) = batch_norm_act(x, norm)
        rows = x.shape[:-1].numel()
        torch.testing.assert_close(plain.nchw(y), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_mean.lerp(mean, 0.1), module.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            norm.running_var.lerp(var * rows / (rows - 1), 0.1), module.running_var, rtol=1e-12, atol=1e-12
        )

    def test_a_kernel_refuses_a_second_derivative(self):
        """Rather than handing out one that lacks the kernel's part."""
        arguments = self.cast(self.make("silu-residual"), torch.float32, torch.float32)
        y = torch.ops.mvit3.batch_norm_act(*self.raw(**arguments))[0]
        [dx] = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
            torch.autograd.grad(dx.sum(), arguments["x"])
