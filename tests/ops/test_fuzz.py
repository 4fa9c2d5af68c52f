"""Random calls of every op, on whatever kernels take them, held to the reference: shapes, strides, dtypes, options,
non-finite values.

Built on the arguments of the contract tests. MVIT3_FUZZ=1000 tries that many new random calls of each op; without it
the calls are few and the same in every run.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

import mvit3_kernels
from mvit3_kernels.ops.types import ACTIVATIONS

from ..bounds import pooled, relative_errors
from .contract import Contract
from .inputs import DTYPES, Arguments, Draw, mapped, named
from .measure import evaluate, tensors

EXAMPLES = int(os.environ.get("MVIT3_FUZZ", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

flags = st.booleans()
acts = st.sampled_from(ACTIVATIONS)
eps = st.sampled_from((1e-5, 1e-3, 0.1))
# Around the sizes of a vector, a panel and a tile, and anything.
channels = st.one_of(st.sampled_from((1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65)), st.integers(1, 80))
probability = st.sampled_from((0.0, 0.0, 0.3))
patches = st.tuples(st.integers(1, 3), st.integers(1, 3))
heads = st.integers(1, 4)
linear = {"bias": flags, "conv": flags}

OPTIONS: dict[str, dict[str, st.SearchStrategy]] = {
    "batch_norm_act": {
        "channels": channels,
        "training": flags,
        "act": acts,
        "residual": flags,
        "eps": eps,
        "mean": st.sampled_from((0, 6)),
    },
    "depthwise_conv": {
        "channels": channels,
        "training": flags,
        "act": acts,
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 4),
        "eps": eps,
    },
    "feed_forward": {
        "channels": channels,
        "hidden": channels,
        "per_sample": flags,
        **linear,
        "hidden_dropout": probability,
        "output_dropout": probability,
    },
    "global_representation": {
        "channels": channels,
        "hidden": channels,
        "layers": st.integers(0, 2),
        "num_heads": st.one_of(st.none(), heads),
        "per_sample": flags,
        **linear,
        "final": flags,
        "patch_size": patches,
        "dropouts": st.tuples(probability, probability, probability),
        "ffn_dropout": st.one_of(st.none(), probability),
    },
    "inverted_residual": {
        "channels": channels,
        "wide": channels,
        "outputs": channels,
        "training": flags,
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 3),
        "act": acts,
        "eps": eps,
    },
    "norm_linear": {
        "channels": channels,
        "outputs": channels,
        "per_sample": flags,
        **linear,
        "eps": eps,
        "mean": st.sampled_from((0, 6)),
    },
    "patch_attention": {
        "num_heads": heads,
        "head_dim": st.integers(1, 40),
        "patch_size": patches,
        "dropout": probability,
    },
    "pointwise_conv": {
        "channels": channels,
        "outputs": channels,
        **linear,
        "norm": flags,
        "training": flags,
        "act": acts,
        "residual": flags,
        "eps": eps,
    },
    "pointwise_fusion": {
        "first": channels,
        "second": channels,
        "outputs": channels,
        "conv": flags,
        "training": flags,
        "act": acts,
        "residual": flags,
        "eps": eps,
    },
    "separable_attention": {
        "channels": channels,
        "per_sample": flags,
        **linear,
        "patch_size": patches,
        "attention_dropout": probability,
        "output_dropout": probability,
    },
}

RELU_INSIDE = ("separable_attention", "global_representation")
LAYOUTS = ("dense", "dense", "nchw", "transposed", "sliced", "same in all samples", "same in all channels")


def contract(op: str) -> Contract:
    """The contract test of an op; the first one of its file where more hold it."""
    module = importlib.import_module(f"{__package__}.test_{op}")
    found, *_ = [
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Contract) and getattr(c, "op", None)
    ]
    return found()


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Equal values (in the "same" layouts: those of the first sample or channel) with other strides, amid NaN where
    there is an amid."""
    if layout == "dense" or t.ndim == 0:
        return t
    if layout == "same in all samples":
        return t[:1].expand_as(t)
    if layout == "same in all channels":
        return t[..., :1].expand_as(t)
    if layout == "sliced" or t.ndim < 2:
        around = torch.full([2 * size + 1 for size in t.shape], float("nan"), dtype=t.dtype)
        inner = around[tuple(slice(1, None, 2) if size else slice(0, 0) for size in t.shape)]
        inner.copy_(t)
        return inner
    if layout == "nchw" and t.ndim == 4:
        return t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@st.composite
def options_of(draw: st.DrawFn, op: str) -> Arguments:
    options = {name: draw(strategy, label=name) for name, strategy in OPTIONS[op].items()}
    if op == "global_representation" and options["num_heads"]:
        options["channels"] = options["num_heads"] * draw(st.integers(1, 20), label="head_dim")
    if op == "inverted_residual" and draw(flags, label="skip"):
        options["outputs"] = options["channels"]
    patch = options.get("patch_size", (1, 1))
    empty = draw(st.integers(0, 15), label="empty") == 15
    size = st.integers(0, 2) if empty else st.one_of(st.integers(1, 4), st.integers(1, 20 if patch == (1, 1) else 7))
    options["batch"] = draw(st.integers(0 if empty else 1, 3), label="batch")
    options["height"], options["width"] = (
        p * draw(size, label=side) for p, side in zip(patch, ("height", "width"), strict=True)
    )
    return options


class RandomCall(NamedTuple):
    arguments: Arguments
    finite: bool  # whether all values are
    threads: int

    def __repr__(self) -> str:
        """Without the values."""
        leaves = mapped(self.arguments, lambda _, t: f"{t.dtype} {tuple(t.shape)} by {t.stride()}")
        return f"finite={self.finite}, threads={self.threads}, {leaves}"


@st.composite
def calls(draw: st.DrawFn, op: str) -> RandomCall:
    held = contract(op)
    options = draw(options_of(op))
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    precise = draw(st.sampled_from(("same", "float32", "mixed")), label="parameters")
    values = Draw(draw(st.integers(0, 2**16), label="seed"))
    layouts = st.sampled_from(LAYOUTS)
    poison = draw(st.sampled_from((None, None, None, float("nan"), float("inf"), -float("inf"))), label="poison")
    arguments = held.arguments(values, **options)
    # Infinity in maps only: in a weight, folding it with a norm's scale may give NaN where the reference has infinity,
    # of no use either.
    victims = [n for n, t in named(arguments).items() if t.is_floating_point() and (n in held.maps or poison != poison)]
    victim = draw(st.sampled_from(victims), label="victim") if poison else None

    def leaf(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        if name == victim and t.numel():
            t.view(-1)[draw(st.integers(0, t.numel() - 1), label="position")] = poison
        wide = precise == "float32" or (precise == "mixed" and draw(flags, label=f"{name} in float32"))
        t = t.to(torch.float32 if wide and name not in held.maps else dtype)
        # With a constant channel or sample a norm divides by the root of eps alone: fair for the maps, not for a
        # running variance.
        return laid_out(t, draw(layouts, label=f"layout of {name}")).detach().requires_grad_("running" not in name)

    arguments = mapped(arguments, leaf)
    finite = all(t.isfinite().all() for t in tensors(arguments) if t.is_floating_point())
    return RandomCall(arguments, finite, draw(st.sampled_from((1, 1, 3)), label="threads"))


def to_double(arguments: Arguments, roundings: float = 0.0) -> Arguments:
    """In float64; with `roundings` each value moved by so many float32 roundings, up or down."""
    draw = Draw(5)

    def leaf(_: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        moved = t.detach().double() * (1 + roundings * torch.finfo(torch.float32).eps * draw(*t.shape).sign())
        return moved.requires_grad_(t.requires_grad)

    return mapped(arguments, leaf)


def groups(arguments: Arguments, field: str) -> list[Any]:
    """The field of every parameter group that has it."""
    leaves = tree_leaves(arguments, is_leaf=lambda leaf: hasattr(leaf, field))
    return [getattr(leaf, field) for leaf in leaves if hasattr(leaf, field)]


def check_values(op: Contract, arguments: Arguments, got: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Looser than the contract's bound: random calls may be ill-conditioned, so what a rounding of the inputs does is
    allowed too, and among thousands of calls the reference is sometimes lucky. A wrong index or a lane too many still
    stands out."""
    truth = evaluate(op.op, to_double(arguments))
    moved = relative_errors(evaluate(op.op, to_double(arguments, 1.0)), truth)
    # PyTorch (2.15) reads memory that it never wrote in the weight gradient of a 16-bit depth-wise convolution of a map
    # of width 1.
    allowed = {name: error for name, error in relative_errors(reference, truth).items() if error == error}
    errors = {name: error for name, error in relative_errors(got, truth).items() if name in allowed}
    dtype = next(t.dtype for name, t in named(arguments).items() if name in op.maps)
    times, slack = (20, 0.0) if dtype == torch.float32 else (3, 0.0)
    if dtype != torch.float32 and (arguments.get("act") == "relu" or op.name in RELU_INSIDE):
        # a 16-bit rounding between two layers may take a value over ReLU's kink, in one of the two computations alone
        slack = 0.5
    if dtype != torch.float32 and any(groups(arguments, "per_sample")) and arguments["x"].shape[1:].numel() < 3:
        # a norm of one or two values has no gradient: its parts cancel, but for 16-bit roundings times the root of 1 /
        # eps
        slack = 1.0
    reference_errs, inputs_move = pooled(allowed), pooled(moved)
    for group, error in pooled(errors).items():
        bound = times * reference_errs[group] + 8 * inputs_move[group] + max(torch.finfo(dtype).eps, 1e-6)
        bound += slack * (group == "gradients")
        assert error <= bound, {name: (errors[name], allowed[name], moved[name]) for name in errors}


def check_non_finite(op: Contract, arguments: Arguments, got: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """No value that is not finite in the reference's forward is lost, and none appears."""
    # Batch statistics may spread it inside of a channel. PyTorch's fused attention (2.15) gives 0 where all scores of a
    # query are NaN.
    may_appear = any(groups(arguments, "training")) or op.name in ("patch_attention", "global_representation")
    # PyTorch's bfloat16 products spread a NaN to other rows where the CPU has AMX (2.14): float64 says where one
    # belongs.
    truth = evaluate(op.op, to_double(arguments)) if got["y[0]"].dtype is torch.bfloat16 else reference
    for name, want in reference.items():
        if name.startswith("d "):
            continue
        lost, new = (
            got[name].isfinite() & ~want.isfinite() & ~truth[name].isfinite(),
            want.isfinite() & ~got[name].isfinite(),
        )
        assert not lost.any(), f"{name}: finite at {lost.nonzero()[:3].tolist()}, where the reference is not"
        assert may_appear or not new.any(), (
            f"{name}: not finite at {new.nonzero()[:3].tolist()}, where the reference is"
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_random_calls(name):
    op = contract(name)
    has_kernel = any(k.backend == "cpu" for k in importlib.import_module(f"mvit3_kernels.ops.{name}").KERNELS)
    taken = []

    @SETTINGS
    @given(calls(name))
    def check(call: RandomCall) -> None:
        arguments, finite, threads = call
        with mvit3_kernels.backend("reference"):
            try:
                reference = evaluate(op.op, arguments)
            # one value per channel, or a map of no size, which torch may refuse
            except (ValueError, RuntimeError) as error:
                reference = None
                assert isinstance(error, ValueError) or not all(t.numel() for t in tensors(arguments)), error
        if reference is None:
            with suppress(ValueError, RuntimeError):
                evaluate(op.op, arguments)
            return
        taken.append(op.refusal("cpu", arguments) is None)
        torch.set_num_threads(threads)
        got = evaluate(op.op, arguments)
        torch.set_num_threads(1)
        assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in reference.items()}
        if finite:
            check_values(op, arguments, got, reference)
        else:
            check_non_finite(op, arguments, got, reference)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the maps are small
    try:
        check()
    finally:
        torch.set_num_threads(before)
    if has_kernel and mvit3_kernels._native.why_not() is None:
        assert any(taken), "the kernel refused every call"
