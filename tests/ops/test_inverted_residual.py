# ruff: noqa: RUF012 -- class attributes are the tables of the tests
import pytest
import torch
from torch import nn
from torch.func import functional_call

from mvit3_kernels.ops import ConvNorm, inverted_residual
from mvit3_kernels.ops.types import ACTIVATIONS

from . import plain
from .contract import Contract
from .inputs import Draw, bad_activation, bad_batch_norm, bad_depthwise, bad_map, bad_weight


def block(inputs: int, wide: int, outputs: int, stride: int, dilation: int, act: str, eps: float) -> nn.Sequential:
    """The published block, of torch's own modules. Momentum 1, so that the running statistics become the batch's."""
    activation = {"identity": nn.Identity, "silu": nn.SiLU, "relu": nn.ReLU}[act]
    return nn.Sequential(
        nn.Conv2d(inputs, wide, 1, bias=False),
        nn.BatchNorm2d(wide, eps, 1.0),
        activation(),
        nn.Conv2d(wide, wide, 3, stride, dilation, dilation, groups=wide, bias=False),
        nn.BatchNorm2d(wide, eps, 1.0),
        activation(),
        nn.Conv2d(wide, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs, eps, 1.0),
    )


class TestInvertedResidual(Contract):
    op = staticmethod(inverted_residual)
    batch_norms = ("expand.norm", "depthwise.norm", "project.norm")
    cases = {
        "skip": {},
        "stride": {"stride": 2},
        "widths-differ": {"outputs": 2, "act": "relu"},
        "dilation": {"dilation": 2, "act": "identity"},
        "eval-skip": {"training": False},
        "eval-stride": {"training": False, "stride": 2, "outputs": 5},
        "odd-map": {"height": 7, "width": 13, "channels": 5, "wide": 15, "outputs": 5},
        "no-skip": {"skip": False},
        "eval-no-skip": {"training": False, "skip": False},
        "one-channel": {"channels": 1, "wide": 2, "outputs": 1, "eps": 0.1},
    }
    bad_case = {"training": False}
    bad = (
        *bad_map("x"),
        *bad_weight("expand.weight", 3),
        *bad_batch_norm("expand.norm", 6),
        *bad_depthwise("depthwise.weight", 6),
        *bad_batch_norm("depthwise.norm", 6),
        *bad_weight("project.weight", 6),
        *bad_batch_norm("project.norm", 3),
        *bad_activation(),
    )

    @staticmethod
    def arguments(
        draw,
        batch=2,
        height=3,
        width=5,
        channels=3,
        wide=6,
        outputs=3,
        stride=1,
        dilation=1,
        **others,
    ):
        own = {"act": "silu", "skip": None}
        norm = {name: value for name, value in others.items() if name not in own}
        return {
            "x": draw(batch, height, width, channels),
            "expand": ConvNorm(draw.linear(wide, channels, conv=True).weight, draw.batch_norm(wide, **norm)),
            "depthwise": ConvNorm(draw(wide, 1, 3, 3, scale=1 / 3), draw.batch_norm(wide, **norm)),
            "project": ConvNorm(draw.linear(outputs, wide, conv=True).weight, draw.batch_norm(outputs, **norm)),
            "stride": stride,
            "dilation": dilation,
            **{name: others.get(name, value) for name, value in own.items()},
        }

    @staticmethod
    def plain(x, expand, depthwise, project, stride, dilation, act, skip):
        wide, inputs = expand.weight.shape[:2]
        outputs, training = project.weight.shape[0], expand.norm.training
        parameters = {}
        for i, (weight, norm) in enumerate((expand, depthwise, project)):
            parameters[f"{3 * i}.weight"] = weight
            for field in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(norm, field)
                parameters[f"{3 * i + 1}.{field}"] = value.clone() if "running" in field else value
        module = block(inputs, wide, outputs, stride, dilation, act, expand.norm.eps).train(training)
        y = functional_call(module, parameters, plain.nchw(x))
        rows = (x.shape[:3].numel(), *(y.numel() // outputs,) * 2)
        moments = [
            (parameters[f"{3 * i + 1}.running_mean"], parameters[f"{3 * i + 1}.running_var"] * (n - 1) / n)
            for i, n in enumerate(rows)
        ]
        y = plain.nhwc(y)
        return (y + x if skip is not False and stride == 1 and inputs == outputs else y), moments if training else None

    @staticmethod
    def raw(x, expand, depthwise, project, stride, dilation, act, skip):
        flat = [t for weight, norm in (expand, depthwise, project) for t in (weight, *norm)]
        return x, *flat, stride, dilation, ACTIVATIONS.index(act), skip

    def test_one_value_after_the_stride(self):
        with pytest.raises(ValueError, match=r"depthwise\.norm\.training needs more than 1 value"):
            inverted_residual(**self.arguments(Draw(), batch=1, height=2, width=2, stride=2))

    def test_skip_needs_a_map_of_the_same_shape(self):
        for case in ({"stride": 2}, {"outputs": 2}):
            with pytest.raises(ValueError, match="skip needs stride 1 and equal widths, got stride"):
                inverted_residual(**self.arguments(Draw(), **case, skip=True))

    def test_norms_need_not_agree_on_training(self):
        """A frozen norm between trained ones gives no moments."""
        arguments = self.make("skip", grad=False)
        frozen = arguments["depthwise"]._replace(norm=arguments["depthwise"].norm._replace(training=False))
        y, moments = inverted_residual(**{**arguments, "depthwise": frozen})
        assert [m is None for m in moments] == [False, True, False]
        assert not torch.allclose(y, inverted_residual(**arguments)[0])

    def test_a_convolution_must_come_with_its_norm(self):
        for name in ("expand", "depthwise", "project"):
            arguments = self.make("skip")
            with pytest.raises(TypeError, match=f"{name} must be a ConvNorm, got Tensor"):
                inverted_residual(**{**arguments, name: arguments[name].weight})
