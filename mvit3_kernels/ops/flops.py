"""Floating-point operations of the ops, as `torch.utils.flop_counter` counts them.

Only products count, two operations each; what a kernel computes again in backward does not. So the forms of an op, for
training, for inference and of every backend, count alike, and a backward form counts the two products that belong to
each product of forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Call = Any  # a named tuple of the arguments of a form


def _linear(rows: int, *weights: Tensor) -> int:
    """Products of `rows` rows with weights (out, in, ...)."""
    return sum(2 * rows * math.prod(weight.shape) for weight in weights)


def _rows(x: Tensor, stride: int = 1) -> int:
    """Rows of a map (B, H, W, C), or of what a convolution of a stride makes of it."""
    return x.shape[0] * -(-x.shape[1] // stride) * -(-x.shape[2] // stride)


def _inverted_residual(call: Call) -> int:
    return _expand_and_filter(call) + _linear(_rows(call.x, call.stride), call.project)


def _expand_and_filter(call: Call) -> int:
    return _linear(_rows(call.x), call.expand) + _linear(_rows(call.x, call.stride), call.depthwise)


def _attention(batch: int, height: int, width: int, channels: int, patch: tuple[int, int]) -> int:
    """Scores, and the values that they weigh, of all heads."""
    positions = math.prod(patch)
    patches = height // patch[0] * (width // patch[1])
    return 4 * batch * positions * patches**2 * channels


def _patch_attention(call: Call) -> int:
    *size, channels = call.qkv.shape
    return _attention(*size, channels // 3, (call.patch_height, call.patch_width))


def _global_representation(call: Call) -> int:
    """`call.layers` holds weight and bias of the six parts of each layer, of which two are norms."""
    x, patch = call.x, (call.patch_height, call.patch_width)
    weights = [weight for i, weight in enumerate(call.layers[::2]) if i % 6 not in (0, 3)]
    attention = 0 if call.num_heads is None else len(weights) // 4 * _attention(*x.shape, patch)
    return _linear(_rows(x), *weights) + attention


def _filter_and_project(call: Call) -> int:
    return _linear(_rows(call.e, call.stride), call.depthwise, call.project)


def _layer(call: Call) -> int:
    weights = (call.qkv_weight, call.out_weight, call.weight1, call.weight2)
    return _linear(_rows(call.x), *weights) + _attention(*call.x.shape, (call.patch_height, call.patch_width))


# By the name of a form without "_forward", "_inference", "_backward", the backend and "_rounded".
FORMULAS: dict[str, Callable[[Call], int]] = {
    "batch_norm_act": lambda call: 0,
    "conv3x3": lambda call: _linear(_rows(call.x), call.weight),
    "conv3x3_image": lambda call: _linear(_rows(call.x, call.stride), call.weight),
    "depthwise_conv": lambda call: _linear(_rows(call.x, call.stride), call.weight),
    "depthwise_conv_filter": lambda call: _linear(_rows(call.x, call.stride), call.weight),
    "dropout": lambda call: 0,
    "feed_forward": lambda call: _linear(_rows(call.x), call.weight1, call.weight2),
    "global_representation": _global_representation,
    "global_representation_spread": _global_representation,
    "global_representation_layer": _layer,
    "global_representation_separable_layer": lambda call: _linear(
        _rows(call.x), call.qkv_weight, call.out_weight, call.weight1, call.weight2
    ),
    "global_representation_norm": lambda call: 0,
    "inverted_residual": _inverted_residual,
    "inverted_residual_filter": _expand_and_filter,
    "inverted_residual_project": _filter_and_project,
    "inverted_residual_tile": _inverted_residual,
    "norm_linear": lambda call: _linear(_rows(call.x), call.weight),
    "patch_attention": _patch_attention,
    "pointwise_conv": lambda call: _linear(_rows(call.a), call.weight),
    "pointwise_conv_twice": lambda call: _linear(_rows(call.x), call.weight),
    "separable_attention": lambda call: _linear(_rows(call.x), call.qkv_weight, call.out_weight),
    "upsample_argmax": lambda call: 0,
    "upsample_cross_entropy": lambda call: 0,
}


def formula_of(form: str) -> Callable[[Call], int] | None:
    """What a call of a form counts; None where nobody has said it."""
    form = form.removesuffix("_cuda").removesuffix("_rounded")
    name = form
    for ending in ("_forward", "_inference", "_backward"):
        name = name.removesuffix(ending)
    forward = FORMULAS.get(name)
    if forward is None or not form.endswith("_backward"):
        return forward
    if name == "inverted_residual_filter":  # of the projection it takes the gradient of the filtered map alone
        return lambda call: 2 * forward(call) + _linear(_rows(call.dp), call.project)
    return lambda call: 2 * forward(call)


def register(form: str, op: object, call: type) -> None:
    """Tells PyTorch's counter about a form, `torch.ops.mvit3.<form>`, whose arguments are those of `call`."""
    formula = formula_of(form)
    if formula is None:
        return

    @register_flop_formula(op, get_raw=True)
    def count(*args: object, out_val: object = None, **kwargs: object) -> int:
        return formula(call(*args, **kwargs))
