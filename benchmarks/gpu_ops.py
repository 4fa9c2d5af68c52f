"""The ceilings of a device, and single ops beside eager and compiled PyTorch, against them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Report, Row, Run, graphed, interleaved_bursts
from benchmarks.gpu_cases import OpCase, on_backend, op_cases


def ceilings(options: argparse.Namespace, report: Report) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written) and matrix rates on random data."""
    size, side = (2**20, 128) if options.tiny else (2**32, 8192)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    steps: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    work = {"copy": ("bytes_per_s", 2 * size)}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))

        def product(a: Tensor = a, b: Tensor = b, tf32: bool = tf32) -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(a, b)

        steps[name], work[name] = product, ("flop_per_s", 2 * side**3)
    for step in steps.values():
        step()
    found = {}
    for name, timing in interleaved_bursts(steps, options).items():
        unit, amount = work[name]
        found[name] = amount / timing["seconds"]
        report.add(ceiling=name, **{unit: found[name]}, **timing)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def time_ops(options: argparse.Namespace, report: Report) -> None:
    """Every op: what the GPU takes (graph replay), what a call takes, and bytes over time against the copy
    bandwidth."""
    bandwidth = ceilings(options, report)["copy"]
    # All batches of a shape before the next shape: where time runs out, none of them is missing altogether.
    batches = (2,) if options.tiny else (128, 1)
    for cases in zip(*(op_cases(batch, options.device, options.tiny) for batch in batches), strict=True):
        for case in cases:
            if not options.ops or case.op in options.ops:
                _time_op(case, options, report, bandwidth)


def _time_op(case: OpCase, options: argparse.Namespace, report: Report, bandwidth: float) -> None:
    row: Row = {"op": case.op, "mode": case.mode, "shape": list(case.leaves[0].shape)}
    steps: dict[str, Run] = {}
    replays: dict[str, Run] = {}
    for name, call in _candidates(case, options.device).items():
        try:
            step = case.step(call)
            step()
            replays[name] = graphed(step, options.device)
            steps[name] = step
        except Exception as failure:  # a forced backend may not take the call, a candidate may not be recorded
            report.add(**row, candidate=name, failure=f"{type(failure).__name__}: {failure}"[:300])
    gpu_times, call_times = (interleaved_bursts(calls, options, 0.02) for calls in (replays, steps))
    for name in steps:
        seconds = gpu_times[name]["seconds"]
        rate = case.bytes / seconds
        report.add(
            **row,
            candidate=name,
            gpu_us=seconds * 1e6,
            call_us=call_times[name]["seconds"] * 1e6,
            bytes=case.bytes,
            gb_per_s=rate / 1e9,
            of_copy_bandwidth=rate / bandwidth,
        )


def _candidates(case: OpCase, device: str) -> dict[str, Callable[..., Tensor]]:
    gpu = device == "cuda"
    torch._dynamo.reset()
    compiled = torch.compile(case.call, dynamic=False, backend="inductor" if gpu else "eager")
    calls = {"eager": on_backend("reference", case.call), "compile": on_backend("reference", compiled)}
    if not gpu:
        return {**calls, "ours": case.call}
    first, *others = case.backends
    return {
        **calls,
        "ours": on_backend(first, case.call),
        **{f"ours_{other}": on_backend(other, case.call) for other in others},
    }
