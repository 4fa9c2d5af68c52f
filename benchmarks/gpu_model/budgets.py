"""What a shipped kernel may use, and why some use more.

A kernel over a budget without a reason fails the tests; so does a reason that no kernel needs any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple

REGISTERS = 32768  # of a block: half of a multiprocessor's
LEAST_BLOCKS, MOST_MICROSECONDS = 64, 5.0  # of a launch that leaves most of the GPU idle
MOST_FLOORS, LEAST_SHARE = 2.5, 0.01  # of a kernel's own floor, where it is at least this share of its network's time


Kernels = Mapping[str, Mapping[str, Any]]  # of benchmarks/results/gpu_kernels.json
Rows = Iterable[Mapping[str, Any]]  # of benchmarks/results/gpu_model.json


class Excess(NamedTuple):
    """A kernel over a budget."""

    budget: str
    kernel: str
    found: str


def excesses(kernels: Kernels, rows: Rows = ()) -> Iterator[Excess]:
    """Of the recorded kernels, and of them in the predictions of networks."""
    yield from far_from_floor(rows)
    for name, k in kernels.items():
        registers = k["registers"] * k["warps"] * 32
        if registers > REGISTERS:
            yield Excess("registers", name, f"{registers} registers a block, {REGISTERS} allowed")
        if k["stack"]:
            yield Excess("spill", name, f"{k['stack']} bytes of stack a thread")
        waiting = [loop for loop in k["loops"] if loop.get("loads", 0) and not loop.get("copies", 0)]
        if waiting:
            sizes = ", ".join(f"{loop['loads']} of {loop['all']}" for loop in waiting)
            yield Excess("pipeline", name, f"loads that a loop waits for, of its instructions: {sizes}")
        if few := k.get("few"):
            yield Excess("blocks", name, f"{few['us']} us in {few['blocks']} blocks ({few['where']})")


def far_from_floor(rows: Rows) -> Iterator[Excess]:
    """Our kernels that take more than MOST_FLOORS times what their bytes, their products and their start take, for each
    the network where that is worst."""
    worst: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["candidate"] != "ours":
            continue
        for k in row["kernels"]:
            ratio = k["ms"] / k["floor_ms"]
            if ratio > MOST_FLOORS and k["ms"] > LEAST_SHARE * row["gpu_ms"] and "." in k["kernel"]:
                found = f"{ratio:.1f} times its floor ({row['network']} {row['mode']} {row['batch']}, {k['ms']:.2f} ms)"
                worst[k["kernel"]] = max(worst.get(k["kernel"], (0.0, "")), (ratio, found))
    for kernel, (_, found) in worst.items():
        yield Excess("floor", kernel, found)


def unexplained(kernels: Kernels, rows: Rows = ()) -> list[Excess]:
    return [excess for excess in excesses(kernels, rows) if reason(excess) is None]


def reason(excess: Excess) -> str | None:
    for (budget, pattern), sentence in REASONS.items():
        if budget == excess.budget and fnmatch(excess.kernel.partition("[")[0], pattern):
            return sentence
    return None


def unused(kernels: Kernels, rows: Rows = ()) -> list[tuple[str, str]]:
    """Reasons that no kernel needs."""
    found = {(e.budget, e.kernel.partition("[")[0]) for e in excesses(kernels, rows)}
    return [
        (budget, pattern)
        for budget, pattern in REASONS
        if not any(other == budget and fnmatch(kernel, pattern) for other, kernel in found)
    ]


_WHOLE_ROWS = (
    "keeps the sums of whole rows in registers; half as many rows would ask the second-level cache for the weights"
    " twice as often, and `benchmarks/tune.py` has the other tiles to try on a GPU"
)
_NO_PRODUCT = (
    "Triton copies ahead in loops around a product only; instead 2 to 8 blocks share a multiprocessor, each with"
    " several loads of 16 bytes on their way"
)
_PARTS = (
    "adds up a few hundred parts that the kernel before it left in the second-level cache; its loop is unrolled, so"
    " that several loads are on their way at once"
)
_ONE_STAGE = (
    "the weights of two products at a time, in one stage; two stages are among the configurations that"
    " `benchmarks/tune.py` tries on a GPU"
)
_SMALL_MAP = (
    "at batch 1, on a map of 8x8 to 32x32, has no more tiles to divide; dividing its inner dimension would take a"
    " second launch"
)
_SAMPLE = "has a block for each sample, whose statistics are of all its rows; at batch 1 that is one"
_PREPARES = (
    "reads one weight of a few hundred kilobytes once a call, in few blocks: it takes about 5 us beside the hundreds of"
    " the product that it prepares"
)
_SPREAD = "is for maps of fewer blocks than multiprocessors, and divides 16 tokens among 16 warps to end sooner"
_CHAIN = "is a chain of products for a block of pixels, and at batch 1 no other block works while it waits"
_BEHIND = "its second loop, behind that over rows, reads once what the block has just written"
_PARAMETERS = "has as many blocks as tiles of its parameters, whatever the batch"

_FEW_BLOCKS = (
    "at batch 1 and 32 has few blocks, each a chain of loads, products and sums that takes longer than its bytes would"
)
_AGAIN = (
    "computes the expanded map anew instead of reading it: 20 to 50 instructions for each of its numbers, activations"
    " and roundings above all, which limit it where its bytes, that are few, would not"
)
_SOFTMAX = "has some 15 instructions a score, in its gradient 30, that are no products: exponents, sums and roundings"
_SILU = (
    "has some 20 instructions a hidden value that are no products, activation and rounding above all; and few blocks at"
    " batch 1 and 32"
)
_OF_PARAMETERS = "is of parameters alone, whose bytes are next to nothing: it waits for sums over both of their sides"
_WIDE_AGAIN = (
    "asks the second-level cache for the wide map once for each block of outputs; larger blocks spill 24 to 32 bytes"
)

REASONS: dict[tuple[str, str], str] = {
    ("registers", "feed_forward.*"): _WHOLE_ROWS,
    ("registers", "norm_linear.*"): (
        "takes up to 256 rows in a block of 16 warps, which fills a multiprocessor: weights are asked for half as often"
    ),
    ("registers", "row_gradients.input_bwd"): _WHOLE_ROWS,
    ("registers", "separable_attention.*"): _WHOLE_ROWS,
    ("registers", "pointwise_conv.pointwise_held_fwd"): (
        "holds the weights of 64 to 192 outputs, which leave no shared memory for a second block; 8 warps then have all"
        " registers, and the next rows of the inputs are copied while these are multiplied"
    ),
    ("registers", "pointwise_conv.pointwise_fwd"): (
        "multiplies 128 rows by 128 outputs in 16 warps of 128 registers, as many warps as two blocks of half the"
        " outputs, which would read the inputs twice as often"
    ),
    ("registers", "pointwise_conv.inputs_bwd"): (
        "keeps the gradient of 128 or 256 rows of all outputs in shared memory, which leaves none for a second block:"
        " the weight is asked for once for these rows"
    ),
    ("registers", "global_representation.layer_fwd"): _SPREAD,
    ("registers", "global_representation.attend_fwd"): _SPREAD,
    ("registers", "global_representation.feed_fwd"): _SPREAD,
    ("registers", "separable_attention.values_bwd"): _SPREAD,
    ("registers", "inverted_residual.expanded_moments"): (
        "has fewer blocks than a GPU multiprocessors, whatever the batch, and divides each among 16 warps to end sooner"
    ),
    ("registers", "inverted_residual.*filter_project"): (
        "is for maps of fewer blocks than multiprocessors, and divides 16 or 32 pixels among 16 warps to end sooner"
    ),
    ("registers", "patch_attention.attention_*"): (
        "takes a whole group of up to 256 tokens in one block of 16 warps, which fills a multiprocessor: scores are"
        " computed once and everything is read once; shorter groups and heads need less"
    ),
    ("registers", "cuda.DepthwiseBackward"): (
        "keeps nine taps and nine sums of their gradients for four channels, and the rows that it loads ahead"
    ),
    ("pipeline", "batch_norm_act.*"): _NO_PRODUCT,
    ("pipeline", "depthwise_conv.depthwise_*"): _NO_PRODUCT,
    ("pipeline", "depthwise_conv.taps_bwd"): _PARTS,
    ("pipeline", "inverted_residual.add_parts"): _PARTS,
    ("pipeline", "inverted_residual.prepare_project"): _PREPARES,
    ("pipeline", "pointwise_conv.inputs_bwd"): _PARTS,
    ("pipeline", "patch_attention.attention_fwd"): (
        "the second loop takes the keys that are no whole step: once, or never as in all maps of 256x256 images"
    ),
    ("pipeline", "patch_attention.attention_bwd"): (
        "a group of at most 16 tokens is one step, whose loads have nothing to wait behind; a second stage costs"
        " instructions"
    ),
    ("pipeline", "inverted_residual.project_gradient"): _PARTS,
    ("pipeline", "inverted_residual.correct_bwd"): (
        "reads the correction's matrix, or makes it, once in front of its walk over rows, whose loads are copied ahead"
    ),
    ("pipeline", "row_gradients.input_bwd"): (
        "its second loop reads back, a few rows at a time, the product that it has just left in the caches: product, x"
        " and a residual of all rows at once would be more than its registers"
    ),
    ("pipeline", "row_gradients.normalised_products"): _BEHIND,
    ("pipeline", "row_kernels.*_statistics"): _NO_PRODUCT,
    ("pipeline", "separable_attention.pool_fwd"): _NO_PRODUCT,
    ("pipeline", "row_gradients.dropped_products"): (
        "of float32 maps, of which separable attention has a row a sample: products are made in registers, in one stage"
    ),
    ("pipeline", "separable_attention.context_*"): (
        "reads a sample's scores and sums, which the kernel before it left in the second-level cache"
    ),
    ("pipeline", "separable_attention.input_bwd"): (
        "its last loop reads back, a few rows at a time, the product that it has just left in the caches: product, x"
        " and a residual of all rows at once would be more than its registers"
    ),
    ("pipeline", "separable_attention.values_bwd"): _ONE_STAGE,
    ("pipeline", "separable_attention.attend_fwd"): _ONE_STAGE,
    ("pipeline", "feed_forward.*"): _ONE_STAGE,
    ("pipeline", "cuda.Depthwise*"): "loads rows of the map into registers two rows ahead of their use",
    ("pipeline", "cuda.Finish*"): _PARTS,
    ("pipeline", "cuda.PackBackward"): _PARTS,
    ("pipeline", "cuda.Filter"): (
        "loads the numbers of a map whose pixels are not whole, aligned 16 bytes one by one; others are copied ahead"
    ),
    ("pipeline", "cuda.Inference"): (
        "its loop over tiles adds the residual, which the tile's first product read: it lies in the second-level cache"
    ),
    ("pipeline", "global_representation.norm_bwd"): _NO_PRODUCT,
    ("pipeline", "global_representation.norm_gradient"): _PARTS,
    ("floor", "inverted_residual.filter"): _AGAIN,
    ("floor", "inverted_residual.filter_backward"): _AGAIN,
    ("floor", "inverted_residual.inference"): _AGAIN,
    ("floor", "inverted_residual.filtered_bwd"): _WIDE_AGAIN,
    ("floor", "inverted_residual.project_sums_bwd"): _WIDE_AGAIN,
    ("floor", "inverted_residual.correction_bwd"): _OF_PARAMETERS,
    ("floor", "inverted_residual.correct_bwd"): _FEW_BLOCKS,
    ("floor", "inverted_residual.prepare_project"): _OF_PARAMETERS,
    ("floor", "inverted_residual.expand_gradient"): _OF_PARAMETERS,
    ("floor", "inverted_residual.expanded_moments"): _OF_PARAMETERS,
    ("floor", "patch_attention.*"): _SOFTMAX,
    ("floor", "feed_forward.*"): _SILU,
    ("floor", "depthwise_conv.*"): _FEW_BLOCKS,
    ("floor", "conv3x3.image_fwd"): (
        "gathers nine times three numbers of an image for each output pixel, one by one with their conditions: three"
        " channels are no whole load"
    ),
    ("floor", "row_gradients.*"): _FEW_BLOCKS,
    ("floor", "separable_attention.*"): _FEW_BLOCKS,
    ("floor", "global_representation.*_gradient"): _OF_PARAMETERS,
    ("floor", "global_representation.feed_fwd"): _CHAIN,
    ("floor", "global_representation.qkv_fwd"): _CHAIN,
    ("floor", "row_kernels.sample_statistics"): _SAMPLE,
    ("floor", "global_representation.attend_fwd"): _CHAIN,
    ("floor", "global_representation.layer_fwd"): _CHAIN,
    ("floor", "inverted_residual.*filter_project"): _CHAIN,
    ("pipeline", "global_representation.attend_fwd"): (
        "reads the tokens of a group in one to four steps, for sums that no product makes"
    ),
    ("pipeline", "global_representation.layer_gradient"): _PARTS,
    ("pipeline", "global_representation.layer_products"): _BEHIND,
    ("pipeline", "global_representation.separable_gradient"): _PARTS,
    ("pipeline", "global_representation.pack"): (
        "reads the weights of a layer once, in short loops of blocks that run at once: it takes 3 us"
    ),
    ("blocks", "global_representation.layer_fwd"): (
        "has a block for 16 tokens and 64 hidden channels: at 8x8 and batch 1 there are 32 of them"
    ),
    ("blocks", "feed_forward.*"): _SMALL_MAP,
    ("blocks", "inverted_residual.project_*"): _SMALL_MAP,
    ("blocks", "inverted_residual.filter_project"): _SMALL_MAP,
    ("blocks", "inverted_residual.correct_bwd"): _SMALL_MAP,
    ("blocks", "inverted_residual.expanded_bwd"): _SMALL_MAP,
    ("blocks", "patch_attention.*"): _SMALL_MAP,
    ("blocks", "pointwise_conv.*"): _SMALL_MAP,
    ("blocks", "row_gradients.input_bwd"): _SMALL_MAP,
    ("blocks", "row_kernels.sample_statistics"): _SAMPLE,
    ("blocks", "separable_attention.*"): _SMALL_MAP,
    ("blocks", "row_gradients.normalised_products"): (
        "divides the rows of a map of batch 1 among few parts: the launch that adds them up would have more to read"
    ),
    ("blocks", "inverted_residual.expanded_moments"): _PARAMETERS,
}
