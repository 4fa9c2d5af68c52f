# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The Triton kernels of pointwise_conv on CPU tensors, step by step; run by test_pointwise_conv_triton.py."""

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3_kernels import nn, ops
from mvit3_kernels.ops.pointwise_conv import product_for_two
from mvit3_kernels.ops.types import Linear
from tests.bounds import assert_bound, half_a_rounding
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_pointwise_conv_cpu import TestPointwiseConvCpu as Cpu
from tests.ops.test_running_stats import Counted
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestPointwiseConv(TritonResults):
    op = staticmethod(ops.pointwise_conv)
    maps = ("x", "residual")
    # Several blocks of inputs and of outputs, several parts of the rows, and less than one.
    shapes = ((2, 3, 5, 7, 9), (2, 9, 7, 33, 70))
    options = {
        name: Cpu.options[name] for name in ("training-silu", "training-bias-residual", "training-large-mean", "plain")
    }
    options |= {name: Cpu.options[name] for name in ("frozen-silu-residual", "plain-silu")}
    options |= {name: Cpu.options[name] for name in ("plain-relu", "plain-dropout", "training-silu-dropout")}
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)
    test_with_and_without_gradients_agree = Cpu.test_with_and_without_gradients_agree
    test_a_bias_that_cancels_the_product = Cpu.test_a_bias_that_cancels_the_product
    test_a_constant_channel = Cpu.test_a_constant_channel

    @pytest.mark.parametrize("sizes", [(1, 9, 15, 17, 70), (3, 13, 14, 80, 70)], ids=["wide", "held"])
    @pytest.mark.parametrize("name", ["training-large-mean", "frozen-silu-residual", "plain-silu"])
    def test_many_rows(self, sizes, name):
        """Enough for blocks of 128 outputs, and for programs that hold the weights of several blocks of 64."""
        self.hold(self.make(sizes, name), torch.bfloat16)

    @pytest.mark.parametrize("sizes", [(2, 7, 7, 16, 80), (2, 14, 7, 48, 272)], ids=["64 rows", "128 rows"])
    @pytest.mark.parametrize("name", ["training-bias-residual", "training-large-mean"])
    def test_whole_channels(self, sizes, name):
        """Channels and rows for the kernel that multiplies the gradient of p as it makes it."""
        self.hold(self.make(sizes, name), torch.bfloat16 if sizes[-1] == 80 else torch.float16)

    @pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
    def test_the_classifier_of_few_samples(self, name):
        """One launch reads its weights in float32; what a hook, a forward of its own or a gradient asks for is done."""
        network = mvit3_kernels.create_model(name, num_classes=7).eval()
        classifier, layer = network.classifier, network.get_classifier()
        x, seen = torch.randn(2, network.num_features, 3, 2), []

        def logits(name, grad=False, samples=2):
            given = x[:1].expand(samples, -1, -1, -1) if samples > 2 else x
            autocast = torch.autocast("cpu", torch.bfloat16)
            with mvit3_kernels.backend(name), autocast, torch.set_grad_enabled(grad), Counted() as counted:
                y = network.forward_head(given)
            return y, not {"aten::linear", "aten::addmm"}.intersection(counted.names)

        truth = {"y": F.linear(x.double().mean((2, 3)), layer.weight.double(), layer.bias.double())}
        (y, one), (reference, two) = logits("triton"), logits("reference")
        assert one and not two and y.dtype is torch.bfloat16 and y.shape == (2, 7)
        assert_bound({"y": y}, {"y": reference}, truth, half_a_rounding(torch.bfloat16), least=0)
        assert not logits("triton", grad=True)[1] and not logits("triton", samples=40)[1]
        for module in (layer, classifier, classifier[0]):
            handle = module.register_forward_hook(lambda module, *_: seen.append(module))
            assert not logits("triton")[1]
            assert seen.pop() is module
            handle.remove()
        layer.forward = lambda x: x[:, :7]
        assert torch.equal(logits("triton")[0], x.mean((2, 3))[:, :7])
        del layer.forward
        assert logits("triton")[1]


F64 = torch.float64
TWICE = "mvit3::pointwise_conv_twice_backward"


@pytest.mark.parametrize("read", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
@pytest.mark.parametrize("sizes", [(2, 7, 7, 16, 80), (1, 3, 5, 7, 9), (0, 3, 5, 7, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_for_two(dtype, sizes, read):
    torch.manual_seed(0)
    *pixels, inputs, outputs = sizes
    x, weight = torch.randn(*pixels, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    gradients = [torch.randn(*pixels, outputs).to(dtype) for _ in read]

    def results(backend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        with mvit3_kernels.backend(backend), Counted() as counted:
            y = product_for_two(leaves[0], Linear(leaves[1], None))
            found = torch.autograd.grad([y[i] for i in read], leaves, [g.to(dtype) for g in gradients])
        assert (TWICE in counted.names) == (backend == "triton")
        return {"y": y[read[0]], "d x": found[0], "d weight": found[1]}

    found, reference, truth = (results(*of) for of in (("triton", dtype), ("reference", dtype), ("reference", F64)))
    assert_bound(found, reference, truth, half_a_rounding(dtype))


@pytest.mark.parametrize("block", [nn.MobileViTV3Block, nn.MobileViTV3SeparableBlock])
def test_blocks_add_the_gradients_of_local_representations_in_a_kernel(block):
    """Unless somebody could see that its two readers have one each."""
    torch.manual_seed(0)
    block, images = block(16, 16, 32, 1), torch.randn(2, 16, 4, 4)

    def gradients():
        with mvit3_kernels.backend("triton"), Counted() as counted:
            x = images.clone().requires_grad_()
            (block(x) * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
        found = [x.grad, *(p.grad.clone() for p in block.parameters())]
        block.zero_grad()
        return found, TWICE in counted.names

    together, in_a_kernel = gradients()
    assert in_a_kernel
    for module in (block.local_rep, block.local_rep[-1], block.global_rep):
        seen = []
        hook = module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        apart, in_a_kernel = gradients()
        hook.remove()
        assert seen and not in_a_kernel
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


del Cpu
