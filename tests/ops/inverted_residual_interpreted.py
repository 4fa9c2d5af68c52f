# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The Triton kernels of inverted_residual on CPU tensors, step by step; run by test_inverted_residual_triton.py."""

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

import mvit3_kernels
from mvit3_kernels import ops
from mvit3_kernels.nn import ConvNormAct
from mvit3_kernels.nn import conv as nn_conv
from mvit3_kernels.ops import dispatch
from mvit3_kernels.ops.inverted_residual.cost import MOST_INPUTS_IN_BACKWARD
from mvit3_kernels.ops.registry import FORMS
from tests.bounds import assert_bound, half_a_rounding
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import Draw, mapped
from tests.ops.kernel import in_float32
from tests.ops.plain import nchw, nhwc
from tests.ops.test_inverted_residual_triton import arguments, registered
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()
OP = sys.modules["mvit3_kernels.ops.inverted_residual"]


class TestInvertedResidual(TritonResults):
    op = staticmethod(ops.inverted_residual)
    shapes = ((2, 9, 7, 5, 9, 5),)
    options = {"skip": {}, "stride-mean": {"stride": 2, "act": "relu", "mean": 10.0}}
    arguments = staticmethod(arguments)
    registered = staticmethod(lambda given: registered(**given))

    def test_several_blocks(self):
        """Of rows, inputs, wide channels and outputs; the gradient of the expansion in one step."""
        self.test_bound((2, 9, 7, 33, 66, 40), "stride-mean", torch.float16)

    def test_wide_rows(self):
        """The gradient of the expansion in three steps, as in float32, where it does not fit a program."""
        self.test_bound((1, 6, 6, 70, 40, 12), "skip", torch.bfloat16)

    def test_whole_blocks(self):
        """Several blocks of inputs and outputs, all of which are full."""
        self.test_bound((1, 6, 6, 64, 40, 64), "skip", torch.float32)

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
    def test_few_rows(self, half, monkeypatch):
        """The projection of maps that leave most of a GPU idle."""
        launchers, chosen = importlib.import_module(f"{OP.__name__}.triton"), []
        configuration = launchers.configuration
        monkeypatch.setattr(launchers, "multiprocessors", lambda x: 132)
        monkeypatch.setattr(launchers, "multiplies_from_shared_memory", lambda x: True)
        monkeypatch.setattr(launchers, "configuration", lambda *of: chosen.append(of[0]) or configuration(*of))
        self.test_bound((2, 9, 7, 33, 66, 40), "stride-mean", half)
        assert "project_few" in chosen

    def test_dilation(self):
        self.options = {"dilated": {"dilation": 2, "act": "identity"}}
        self.test_bound(self.shapes[0], "dilated", torch.float32)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_evaluation(self, stride, dtype):
        """The three ops, each in its kernel."""
        given = mapped(self.arguments(Draw(), *self.shapes[0], training=False, stride=stride), lambda _, t: t.to(dtype))
        truth, _ = ops.inverted_residual(**mapped(given, lambda _, t: t.double()))
        found = {}
        for backend in ("reference", self.backend):
            with mvit3_kernels.backend(backend):
                y, moments = ops.inverted_residual(**given)
            assert moments == (None, None, None) and y.dtype == dtype
            found[backend] = {"y": y}
        assert_bound(found[self.backend], found["reference"], {"y": truth}, half_a_rounding(dtype), least=0)

    @pytest.mark.parametrize("options", [{}, {"stride": 2, "act": "relu"}, {"dilation": 2, "act": "identity"}], ids=str)
    @pytest.mark.parametrize("sizes", [(2, 9, 7, 5, 9, 5), (1, 5, 6, 33, 128, 140)], ids=str)
    def test_evaluation_of_few_pixels(self, sizes, options, monkeypatch):
        """Two launches, the second of which filters: channels that fill its steps and that do not, several blocks of
        outputs."""
        given = self.arguments(Draw(), *sizes, training=False, **options)
        given = mapped(given, lambda _, t: t.bfloat16())
        truth, _ = ops.inverted_residual(**mapped(given, lambda _, t: t.double()))
        with mvit3_kernels.backend("reference"):
            reference, _ = ops.inverted_residual(**given)
        monkeypatch.setattr(OP, "KERNELS", (OP.FEW_PIXELS,))
        with mvit3_kernels.backend("triton"):
            y, moments = ops.inverted_residual(**given)
            assert moments == (None, None, None)
        assert_bound({"y": y}, {"y": reference}, {"y": truth}, half_a_rounding(torch.bfloat16), least=0)

    @pytest.mark.parametrize("options", [{}, {"stride": 2, "act": "relu"}, {"act": "identity"}], ids=str)
    @pytest.mark.parametrize(("sizes", "most"), [((2, 9, 11, 5, 40, 5), 16), ((2, 9, 7, 33, 130, 40), 8)], ids=str)
    def test_evaluation_in_one_launch(self, sizes, most, options, monkeypatch):
        """Tiles of 8x8, 4x8 and 4x4 outputs, some of which reach beyond the map, and whose inputs are read in several
        steps; channels that fill no block."""
        monkeypatch.setattr(sys.modules[f"{OP.__name__}.cost"], "MOST_PROGRAMS", most)
        monkeypatch.setattr(sys.modules[f"{OP.__name__}.cost"], "LEAST_PROGRAMS", 1)
        given = self.arguments(Draw(), *sizes, training=False, **options)
        given = mapped(given, lambda _, t: t.bfloat16())
        truth, _ = ops.inverted_residual(**mapped(given, lambda _, t: t.double()))
        with mvit3_kernels.backend("reference"):
            reference, _ = ops.inverted_residual(**given)
        monkeypatch.setattr(OP, "KERNELS", (OP.ONE_LAUNCH,))
        with mvit3_kernels.backend("triton"):
            y, moments = ops.inverted_residual(**given)
            assert moments == (None, None, None)
        assert_bound({"y": y}, {"y": reference}, {"y": truth}, half_a_rounding(torch.bfloat16), least=0)

    @pytest.mark.parametrize("sizes", [(1, 5, 7, 20, 33), (2, 9, 8, 130, 40)], ids=str)
    def test_a_local_representation(self, sizes, monkeypatch):
        """Depth-wise and 1x1 convolution of a block in one launch, without a norm behind the latter; channels and
        outputs of several blocks; what has a hook, another form or a gradient runs as its modules."""
        monkeypatch.setattr(sys.modules[f"{OP.__name__}.cost"], "LEAST_LOCAL_TILES", 1)
        batch, height, width, channels, outputs = sizes
        local = ConvNormAct(channels, channels, 3, groups=channels, dilation=2)
        convs = torch.nn.Sequential(local, ConvNormAct(channels, outputs, norm=False, act="identity")).eval()
        for t in (local.norm.running_mean, local.norm.running_var, local.norm.weight, local.norm.bias):
            t.data.uniform_(0.5, 1.5)
        convs, x = convs.bfloat16(), torch.randn(batch, channels, height, width).bfloat16()
        seen, one_launch = [], nn_conv.filter_and_project
        monkeypatch.setattr(nn_conv, "filter_and_project", lambda *given: seen.append(one_launch(*given)) or seen[-1])

        def result(backend, convs=convs, x=x, grad=False):
            """What the block computes, and whether in one launch."""
            seen.clear()
            with mvit3_kernels.backend(backend), torch.set_grad_enabled(grad):
                y = nn_conv.local_representation(convs, x)
            return {"y": y.detach()}, [t is not None for t in seen] == [True]

        (found, one), (reference, two) = result("triton"), result("reference")
        truth, _ = result("reference", copy.deepcopy(convs).double(), x.double())
        assert one and not two
        assert_bound(found, reference, truth, half_a_rounding(torch.bfloat16), least=0)
        assert not result("triton", grad=True)[1] and not result("triton", copy.deepcopy(convs).float(), x.float())[1]
        frozen, leaf = copy.deepcopy(convs).float().requires_grad_(False), x.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):  # the gradient is of the map before it is rounded
            assert nn_conv.local_representation(frozen, leaf).requires_grad
        called = []
        for module in (convs, convs[1], local, local.norm):
            with module.register_forward_hook(lambda module, *_: called.append(module)):
                y, one = result("triton")
            assert called.pop() is module and not one
            assert_bound(y, reference, truth, half_a_rounding(torch.bfloat16), least=0)
        convs[1].act = "relu"
        assert not result("triton")[1]

    def test_a_frozen_norm(self):
        """Norms in training beside one that is not: the three ops again."""
        given = in_float32(self.make(self.shapes[0]))
        given["depthwise"] = given["depthwise"]._replace(norm=given["depthwise"].norm._replace(training=False))
        found = {}
        for backend in ("reference", self.backend):
            with mvit3_kernels.backend(backend):
                found[backend], moments = ops.inverted_residual(**given)
            assert [m is None for m in moments] == [False, True, False]
        torch.testing.assert_close(found[self.backend], found["reference"])

    def test_constant_channels(self):
        """Variance 0: the norms return their biases. (With a small eps they multiply the rounding of a product 300
        times each.)"""
        given = in_float32(self.arguments(Draw(), *self.shapes[0], eps=0.1))
        given["x"][...] = 0.1
        given["depthwise"].weight[:, :, :, [0, 2]] = 0  # a border would not be constant
        given["depthwise"].weight[:, :, [0, 2]] = 0
        with mvit3_kernels.backend(self.backend):
            y, moments = ops.inverted_residual(**given)
        assert not moments[0].var.any() and all(m.var.max() < 1e-12 for m in moments), moments
        torch.testing.assert_close(y, (given["project"].norm.bias + 0.1).expand_as(y))

    def test_mean_of_many_deviations(self):
        """Variances from the moments of the input, against float64."""
        given = in_float32(self.make((2, 16, 16, 20, 40, 20)))
        given["x"] = given["x"] * 0.01 + 5
        _, moments = ops.inverted_residual(**given)
        e = given["x"].double() @ given["expand"].weight.flatten(1).double().T
        torch.testing.assert_close(moments[0].mean.double(), e.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments[0].var.double(), e.var((0, 1, 2), correction=0), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("size, inputs, width", [(1e-8, 1e4, 40), (1e4, 1e-3, 40), (1e-8, 1e4, 270)])
    def test_a_correction_that_float16_does_not_hold(self, size, inputs, width):
        """The matrix of the correction is too small (of many rows) or too large for a number of float16; what it adds
        to dx is not."""
        draw, kernels = torch.Generator().manual_seed(1), importlib.import_module(f"{OP.__name__}.triton")
        x = (inputs * torch.randn(2, 5, 5, width, generator=draw)).half()
        weight, correction = torch.randn(66, width, generator=draw), size * torch.randn(2, 66, generator=draw)
        correction[1] = 0
        mean, dx = x.float().mean((0, 1, 2)), torch.zeros_like(x)
        kernels._correct(dx, x, None, weight, correction, mean)
        rounded = weight.half().double()
        matrix = rounded.T @ (correction[0].double()[:, None] * rounded)
        truth = -(x.double() - mean.double()) @ matrix
        assert (dx.double() - truth).norm() <= 2e-3 * truth.norm()


# The fused CUDA C++ ops, in plain PyTorch: what their schema says, with maps rounded as they are stored.


def _activate(v, act):
    return F.silu(v) if act == 1 else v.relu() if act == 2 else v


def _slope(v, act):
    s = v.sigmoid()
    return s * (1 + v * (1 - s)) if act == 1 else (v > 0).float() if act == 2 else torch.ones_like(v)


def _expanded(x, expand, scale, shift):
    return (x.float() @ expand.flatten(1).to(x.dtype).float().T) * scale + shift


@torch.library.impl("mvit3::inverted_residual_filter", "CPU")
def _filter(x, expand, scale, shift, depthwise, stride, dilation, act, parts):
    a = _activate(_expanded(x, expand, scale, shift), act)
    z = (
        nhwc(F.conv2d(nchw(a), depthwise.float(), None, stride, dilation, dilation, len(scale)))
        .to(x.dtype)
        .contiguous()
    )
    # Parts of unequal sizes, the last one empty.
    rows, moments, counts = z.double().flatten(0, 2), torch.zeros(2, parts + 1, len(scale)), torch.zeros(parts + 1)
    for part, some in enumerate(rows.tensor_split(parts)):
        moments[0, part], moments[1, part] = some.mean(0), some.var(0, correction=0) * len(some)
        counts[part] = len(some)
    return z, moments, counts


@torch.library.impl("mvit3::inverted_residual_filter_backward", "CPU")
def _filter_backward(*arguments):
    call = FORMS["inverted_residual_filter_backward"].call(*arguments)
    x, dp, act = call.x, call.dp, call.act
    weight, rows = call.expand.flatten(1).to(x.dtype).float(), call.z[..., 0].numel()
    rstd = (call.expand_var + call.expand_eps).rsqrt()
    scale = rstd * call.expand_weight
    z_rstd = (call.depthwise_var + call.depthwise_eps).rsqrt()
    z_scale, z, wide = z_rstd * call.depthwise_weight, call.z.float(), len(scale)
    z_shift = call.depthwise_bias - call.depthwise_mean * z_scale
    *dproject, total, weighted = call.part.sum(0)
    if x.dtype is not torch.float32:  # else the sums of g * (z - mean) come, but for these tests never to this op
        weighted = weighted - call.depthwise_mean * total
    dmiddle = z_rstd * weighted
    normal = (z - call.depthwise_mean) * z_rstd
    g = (dp.float() @ call.project.flatten(1).to(dp.dtype).float()) * _slope(z * z_scale + z_shift, act)
    dz = nchw(z_scale * (g - total / rows - normal * dmiddle / rows))
    pre = _expanded(x, call.expand, scale, call.expand_bias - call.expand_mean * scale)
    a, geometry = nchw(_activate(pre, act)), (call.stride, call.dilation, call.dilation, wide)
    ddepthwise = conv2d_weight(a, (wide, 1, 3, 3), dz, *geometry)
    grad = nhwc(conv2d_input(a.shape, call.depthwise.float(), dz, *geometry)) * _slope(pre, act)
    dprojection, none = torch.stack(dproject).view(call.project.shape), call.part.new_empty
    if x.shape[-1] > MOST_INPUTS_IN_BACKWARD:
        scaled = (weight * scale[:, None]).to(x.dtype)
        return (x.new_empty(0), grad.to(x.dtype).contiguous(), scaled, *(none(0) for _ in range(4)),
                ddepthwise, dmiddle, total.clone(), dprojection)  # fmt: skip
    dx = ((grad * scale) @ weight).to(x.dtype)
    grad, dbias = grad.flatten(0, 2), grad.sum((0, 1, 2))
    product = grad.T @ x.float().flatten(0, 2) - dbias[:, None] * call.mean
    dweight = rstd * (weight * product).sum(1)
    dexpand = scale[:, None] * (product - (dweight * rstd)[:, None] * (weight @ call.covariance))
    correction = torch.stack((scale * rstd * dweight, scale * dbias)) / len(grad)
    return (dx, x.new_empty(0), x.new_empty(0), correction, dexpand.view(call.expand.shape), dweight, dbias,
            ddepthwise, dmiddle, total.clone(), dprojection)  # fmt: skip


class TestFused(TritonResults):
    backend = "cuda"
    op = staticmethod(ops.inverted_residual)
    shapes = TestInvertedResidual.shapes
    options = {"training": {"mean": 3.0}}
    arguments = staticmethod(arguments)
    registered = staticmethod(lambda given: registered(**given, store=False))
    # of other kernels
    test_maps_that_are_too_large = test_small_batches = test_nan_and_infinity_reach_the_results = None

    def test_wide_inputs(self):
        """The fused kernel leaves what their gradient is multiplied by to the kernels of the stored way."""
        self.test_bound((1, 6, 6, 70, 40, 12), "training", torch.bfloat16)

    @pytest.fixture(autouse=True)
    def offered(self, monkeypatch):
        """By their predicate the ops are for a GPU, and for 16 bits."""
        monkeypatch.setattr(
            OP, "KERNELS", (dispatch.Kernel("cuda", lambda x, *_: dispatch.triton_why_not(x)), OP.KERNELS[-1])
        )
