"""Calls every op of the CPU kernels with one wrong argument at a time, in a process of its own: none may end it. Prints
a line before and one after each call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import mvit3_kernels.ops  # noqa: F401 -- registers them

OPS = torch.ops.mvit3


def parts(inputs: int, wide: int, outputs: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for shape in ((wide, inputs, 1, 1), (wide, 1, 3, 3), (outputs, wide, 1, 1)):
        yield torch.randn(shape), torch.ones(shape[0]), torch.zeros(shape[0])


def calls() -> Iterator[tuple[str, list]]:
    """Every op with arguments that it takes; a backward op with what its forward pass returned."""
    torch.manual_seed(0)
    x, seed, eps = torch.randn(2, 4, 6, 5), torch.tensor(7), 1e-5
    one, zero = torch.ones(5), torch.zeros(5)
    norm = [one, zero, zero, one]

    y, mean, var = OPS.batch_norm_act_forward(x, one, zero, None, None, True, eps, 1, x)
    yield "batch_norm_act_forward", [x, *norm, False, eps, 1, x]
    yield "batch_norm_act_backward", [y, x, one, zero, mean, var, True, eps, 1]

    taps = torch.randn(5, 1, 3, 3)
    y, mean, var = OPS.depthwise_conv_forward(x, taps, one, zero, None, None, True, eps, 1, 2, 1)
    yield "depthwise_conv_forward", [x, taps, *norm, False, eps, 1, 2, 1]
    yield "depthwise_conv_forward", [x, taps, one, zero, None, None, True, eps, 1, 1, 2]
    yield "depthwise_conv_backward", [y, x, taps, one, zero, mean, var, True, eps, 1, 2, 1]

    dense = torch.randn(6, 5, 3, 3)
    of_six = torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6)
    yield "conv3x3_inference", [x, dense, *of_six, eps, 1, 2]
    yield "conv3x3_forward", [x, dense, 2]
    yield "conv3x3_backward", [OPS.conv3x3_forward(x, dense, 2), x, dense, 2]

    layers = list(parts(5, 9, 7))
    learned = [v for layer in layers for v in (*layer, eps)]
    for store in (False, True):
        y, *kept = OPS.inverted_residual_forward(x, *learned, 2, 1, 1, store)
        fixed = [v for i, layer in enumerate(layers) for v in (*layer, *kept[2 * i : 2 * i + 2], eps)]
        yield "inverted_residual_forward", [x, *learned, 2, 1, 1, store]
        yield "inverted_residual_backward", [y, x, *fixed, *kept[6:], 2, 1, 1]
    yield "inverted_residual_inference", [x, *fixed, 2, 1, 1]

    weight, bias = torch.randn(7, 5), torch.randn(7)
    w2, b2 = torch.randn(5, 7), torch.randn(5)
    qkv, qkv_bias, out = torch.randn(11, 5), torch.randn(11), torch.randn(5, 5)
    for per_sample in (False, True):
        y, mean, rstd = OPS.norm_linear_forward(x, one, zero, eps, per_sample, weight, bias)
        yield "norm_linear_forward", [x, one, zero, eps, per_sample, weight, bias]
        yield "norm_linear_backward", [y, x, one, zero, per_sample, weight, bias, mean, rstd]
        linears = [weight, bias, w2, b2, 0.1, 0.1, seed]
        y, mean, rstd, hidden = OPS.feed_forward_forward(x, one, zero, eps, per_sample, *linears, True)
        yield "feed_forward_forward", [x, one, zero, eps, per_sample, *linears, True]
        yield "feed_forward_backward", [y, x, one, zero, per_sample, *linears, mean, rstd, hidden]
        linears = [qkv, qkv_bias, out, b2]
        y, *kept = OPS.separable_attention_forward(x, one, zero, eps, per_sample, *linears, 2, 2, 0.1, 0.1, seed)
        yield "separable_attention_inference", [x, one, zero, eps, per_sample, *linears, 2, 2]
        yield "separable_attention_forward", [x, one, zero, eps, per_sample, *linears, 2, 2, 0.1, 0.1, seed]
        yield "separable_attention_backward", [y, x, one, zero, per_sample, *linears, *kept, 2, 2, 0.1, 0.1, seed]

    yield "dropout_forward", [x, 0.1, seed, x]
    yield "dropout_backward", [x, 0.1, seed]

    maps = torch.randn(2, 4, 6, 12)
    y, lse = OPS.patch_attention_forward(maps, 2, 2, 2, 0.1, seed)
    yield "patch_attention_forward", [maps, 2, 2, 2, 0.1, seed]
    yield "patch_attention_backward", [y, maps, y, lse, 2, 2, 2, 0.1, seed]

    both, residual = torch.randn(7, 10), torch.randn(2, 4, 6, 7)
    wide = [torch.ones(7), torch.zeros(7)]
    statistics = [torch.zeros(7), torch.ones(7)]
    y, mean, var, p = OPS.pointwise_conv_forward(x, x, both, bias, *wide, None, None, True, eps, 1, 0.1, seed, residual)
    yield "pointwise_conv_inference", [x, x, both, bias, *wide, *statistics, eps, 1, residual]
    yield "pointwise_conv_forward", [x, x, both, bias, *wide, *statistics, False, eps, 1, 0.1, seed, residual]
    yield "pointwise_conv_backward", [y, x, x, both, bias, *wide, mean, var, p, True, eps, 1, 0.1, seed]

    labels = torch.randint(0, 4, (2, 7, 9))
    loss, total, gradient = OPS.upsample_cross_entropy_forward(x, labels, True, 255, one, 0.1, True)
    yield "upsample_cross_entropy_forward", [x, labels, True, 255, one, 0.1, True]
    yield "upsample_cross_entropy_backward", [loss, x, total, gradient]
    yield "upsample_argmax_inference", [x, 7, 9, False, labels]
    yield "upsample_argmax_inference", [x, 7, 9, False, None]


def wrong_values(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Values of the argument `name` that no op takes, beside a good one."""
    if isinstance(value, Tensor) and name == "seed":
        yield from (("float", value.float()), ("two", torch.tensor([1, 2])), ("none", None))
    elif isinstance(value, Tensor):
        if value.ndim:
            yield "scalar", value.new_zeros(())
        yield from (
            ("one more dimension", value[..., None]),
            ("integers", value.long()),
        )
        yield from (("bool", value.bool()), ("complex", value.to(torch.complex64)))
        if value.numel() and value.ndim:
            yield from (
                ("flat", value.flatten() if value.ndim > 1 else value[:, None]),
                ("longer", torch.cat((value, value[:1]))),
            )
            yield from (
                ("none of it", value[:0]),
                ("shorter rows", value[..., :-1]),
                ("one value", value.flatten()[:1]),
            )
    elif isinstance(value, bool):
        return
    elif name == "dilation":
        yield from ((str(bad), bad) for bad in (0, -1, -(2**40)))
    elif isinstance(value, int):
        yield from ((str(bad), bad) for bad in (0, -1, 5, 2**40, 2**62, -(2**62)) if not (name == "act" and bad == 0))
    elif isinstance(value, float):
        yield from ((str(bad), bad) for bad in (-0.5, float("nan"), *((1.0,) if "dropout" in name else ())))


def same(op: str, names: list[str], name: str, label: str) -> bool:
    """Whether the call with the wrong value is a right one: another batch of the only map that a call has, a label map
    of another size, another label to ignore, more outputs of a weight that nothing else fits."""
    if (op, name, label) == ("conv3x3_forward", "weight", "longer"):
        return True
    if op.startswith("upsample_"):
        right = {"logits": ("shorter rows",), "target": ("integers", "shorter rows"), "height": ("5",), "width": ("5",)}
        alone = op == "upsample_argmax_inference" and name == "logits" and label in ("longer", "none of it")
        return alone or name == "ignore_index" or label in right.get(name, ())
    if op == "dropout_backward":  # reads one map alone
        return name == "dy" and label in ("longer", "none of it", "shorter rows")
    alone = name == names[0] and not op.endswith("_backward") and not {"b", "residual"} & set(names)
    return alone and label in ("longer", "none of it")


V, W, TAPS, CONV = torch.ones(5), torch.randn(5, 5), torch.randn(5, 1, 3, 3), torch.randn(5, 3, 3, 5)
STEPS = {  # of the inference engine; kind: number of inputs, weights, integers, numbers
    "inverted_residual": (1, [W, V, V, TAPS, V, V, W, V, V], [1, 1, 1], []),
    "conv3x3": (1, [CONV, V, V], [1, 1, 1], []),
    "depthwise_conv": (1, [TAPS, V, V], [1, 1, 1], []),
    "pointwise_conv": (2, [W, V, V], [1, 1], []),
    "norm_linear": (1, [V, V, W, V], [1], [1e-5]),
    "feed_forward": (1, [V, V, W, V, W, V], [1], [1e-5]),
    "separable_attention": (1, [V, V, torch.randn(11, 5), torch.ones(11), W, V], [2, 2, 1], [1e-5]),
    "patch_attention": (1, [], [1, 2, 2], []),
    "global_pool": (1, [], [], []),
    "resize_to_patches": (1, [], [2, 2, 0], []),
    "resize_back": (2, [], [], []),
    "layer_norm": (1, [V, V], [1], [1e-5]),
    "norm_pool": (1, [V, V], [0], [1e-5]),
    "adaptive_pool": (1, [], [2], []),
    "pointwise_sum": (2, [W, V, V], [1], []),
    "spread_taps": (2, [], [1], []),
    "anchors": (1, [], [5], []),
}


def engine_calls() -> Iterator[tuple[str, list, str]]:
    """Calls of the inference engine that it must refuse, each with what the message must hold."""
    engine = OPS.engine_new(5)
    yield from wrong_steps(engine)
    yield "engine_add", [engine, "nothing", [0], [], [], []], "kind must be"
    yield "engine_new", [0], "channels must be"
    yield "engine_run", [engine, torch.ones(1, 5, 4, 4)], "engine_finish"
    yield "engine_regions", [engine, torch.ones(1, 5, 4, 4)], "engine_finish"
    for outputs in ([], [0], [-1], [99], [2**62]):
        yield "engine_finish", [engine, outputs], "outputs must"
    yield from wrong_images()


def wrong_steps(engine: int) -> Iterator[tuple[str, list, str]]:
    """A right step of each kind, then wrong ones."""
    for kind, (inputs, weights, integers, numbers) in STEPS.items():
        good = [engine, kind, [0] * inputs, weights, integers, numbers]
        OPS.engine_add(*good)

        def changed(i: int, value: object, good: list = good) -> list:
            return [*good[:i], value, *good[i + 1 :]]

        for bad in ([], [0] * 65, [-1] * inputs, [99] * inputs, [2**62] * inputs):
            yield "engine_add", changed(2, bad), "inputs must be"
        yield "engine_add", changed(3, [*weights, V]), "weights, got"
        yield "engine_add", changed(4, [*integers, 1]), "integers, got"
        yield "engine_add", changed(5, [*numbers, 1.0]), "numbers, got"
        if weights:
            yield "engine_add", changed(3, weights[:-1]), "weights, got"
        for i in range(len(weights)):
            for value in (
                weights[i][..., None],
                weights[i][:0],
                weights[i].long(),
                torch.tensor(1.0),
                torch.cat((weights[i], weights[i])),
            ):
                yield "engine_add", changed(3, [*weights[:i], value, *weights[i + 1 :]]), ""
        for i in range(len(integers)):
            for value in (-1, 2**40, -(2**62)):
                yield "engine_add", changed(4, [*integers[:i], value, *integers[i + 1 :]]), "must be"
        if integers:
            yield "engine_add", changed(4, integers[:-1]), "more integers"
        if numbers:
            yield "engine_add", changed(5, []), "more numbers"
            yield "engine_add", changed(5, [float("nan")]), "eps must be"


def wrong_images() -> Iterator[tuple[str, list, str]]:
    """Images that an engine does not take, and engines that are finished or freed."""

    def engine_of(*added: tuple) -> int:
        number = OPS.engine_new(5)
        for kind, maps, *rest in added:
            OPS.engine_add(number, kind, maps, *rest)
        OPS.engine_finish(number, [len(added)])
        return number

    pool = engine_of(("global_pool", [0], [], [], []))
    for ending in (-1, 1, 2**62):
        yield "engine_run", [pool, torch.ones(1, 5, 4, 4), ending], "ending must be"
        yield "engine_regions", [pool, torch.ones(1, 5, 4, 4), ending], "ending must be"
    yield "engine_add", [pool, "global_pool", [0], [], [], []], "finished"
    x = torch.ones(1, 5, 4, 4)
    for bad in (
        x[:, :4],
        x[0],
        x.double(),
        x.long(),
        torch.tensor(1.0),
        x[..., None],
        x[:, :, :0],
        x[..., :0],
        x[:0, :, :0],
    ):
        yield "engine_run", [pool, bad], "x must"
        yield "engine_regions", [pool, bad], "x must"
    yield "engine_run", [pool, x.to_sparse()], ""
    # maps of other sizes than a step takes
    half = ("depthwise_conv", [0], [TAPS, V, V], [2, 1, 1], [])
    yield "engine_run", [engine_of(half, ("pointwise_conv", [0, 1], [W, V, V], [1, 1], [])), x], "maps of one size"
    yield (
        "engine_run",
        [engine_of(half, ("conv3x3", [0, 1], [torch.randn(5, 3, 3, 10), V, V], [1, 1, 1], [])), x],
        "maps of one size",
    )
    yield (
        "engine_run",
        [engine_of(("conv3x3", [0], [torch.randn(5, 3, 3, 4), V, V], [1, 1, 1], [])), x],
        "takes 4 channels, got 5",
    )
    yield "engine_run", [engine_of(("patch_attention", [0], [], [2, 2, 2], [])), x], "heads"
    yield (
        "engine_run",
        [engine_of(("separable_attention", [0], *STEPS["separable_attention"][1:])), x[..., :3]],
        "whole patches",
    )
    OPS.engine_free(pool)
    for number in (pool, 0, -1, 2**62):
        for op, rest in {
            "engine_free": [],
            "engine_run": [x],
            "engine_finish": [[1]],
            "engine_add": ["global_pool", [0], [], [], []],
        }.items():
            yield op, [number, *rest], "engine must be"


def main() -> None:
    for i, (op, arguments, message) in enumerate(engine_calls()):
        case = f"{op}: {i}: {str(arguments[1:2])[:40]}".replace("\n", " ")
        print("call", case, flush=True)
        try:
            getattr(OPS, op)(*arguments)
            outcome = "TAKEN"
        except Exception as error:
            outcome = "refused" if message in str(error) else f"UNNAMED {str(error).splitlines()[0]}"
        print("done", case, outcome, flush=True)
    for op, arguments in calls():
        schema = getattr(OPS, op).default._schema
        names = [argument.name for argument in schema.arguments]
        getattr(OPS, op)(*arguments)
        for i, name in enumerate(names):
            for label, value in wrong_values(name, arguments[i]):
                case = f"{op}: {name}: {label}"
                print("call", case, flush=True)
                try:
                    getattr(OPS, op)(*arguments[:i], value, *arguments[i + 1 :])
                    outcome = "right" if same(op, names, name, label) else "TAKEN"
                except Exception as error:
                    first = str(error).splitlines()[0]
                    outcome = "refused" if any(other in first for other in names) else f"UNNAMED {first}"
                print("done", case, outcome, flush=True)


if __name__ == "__main__":
    main()
