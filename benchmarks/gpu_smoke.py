"""Whether every op computes the right thing on every backend that a GPU has, in a minute: one small call of each, every
result and gradient against float64, beside the reference's error. And where the time of a step goes: PyTorch's
profiler."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Report
from benchmarks.gpu_cases import OpCase, on_backend, op_cases
from benchmarks.gpu_networks import errors, task_of, wrong

ROWS = 25  # of a profiler's table


def smoke(options: argparse.Namespace, report: Report) -> None:
    """Every op at batch 2: a row for each backend, with the tensors that are wrong. The last row says how many calls
    failed."""
    bad, seen = 0, set()
    for case in op_cases(2, options.device, options.tiny):
        if (case.op, case.mode) in seen or (options.ops and case.op not in options.ops):
            continue
        seen.add((case.op, case.mode))
        truth = evidence(case, "reference", torch.float64)
        allowed = errors(evidence(case, "reference"), truth)
        for backend in case.backends if options.device == "cuda" else ("free",):
            row = {"op": case.op, "mode": case.mode, "candidate": backend}
            try:
                found = errors(evidence(case, backend), truth)
                names = wrong(found, allowed)
                report.add(**row, correct=not names, wrong=names, error=found["all"])
                bad += bool(names)
            except Exception as failure:  # one op that fails says nothing of the next
                report.add(**row, failure=f"{type(failure).__name__}: {failure}"[:300])
                bad += 1
    report.add(smoke=len(seen), bad=bad)


def evidence(case: OpCase, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y of a case and, where it has a backward pass, the gradient of each leaf."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in case.leaves]
    call = on_backend(backend, case.call)
    if case.mode != "step":
        with torch.no_grad():
            return {"y": call(*leaves).double()}  # labels too: another class is an error
    y = call(*leaves)
    draw = torch.Generator().manual_seed(0)
    dy = torch.randn(y.shape, generator=draw).to(y.device, case.leaves[0].dtype).to(y.dtype)
    return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(y, leaves, dy))}


def tables(options: argparse.Namespace, report: Report) -> None:
    """The kernels of a training step and of an inference call: eager, compiled, ours, and ours with Triton alone."""
    task, gpu = task_of(options.model), options.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    side = 64 if options.tiny else task.side
    for name, training in ((n, t) for n in _STEPS for t in (True, False)):
        row = {"candidate": name, "mode": "training" if training else "inference", "batch": options.batches[0]}
        try:
            step = _STEPS[name](task, training, options)
            images = torch.randn(options.batches[0], 3, side, side, device=options.device)
            images = images.contiguous(memory_format=torch.channels_last)
            for _ in range(1 if options.tiny else 5):
                step(images)
            with profile(activities=activities) as recorded:
                step(images)
                if gpu:
                    torch.cuda.synchronize()
            table = recorded.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
            for folder in report.folders:
                (folder / f"gpu_profile_{name}_{row['mode']}.txt").write_text(table)
            kernels = [e for e in recorded.events() if e.device_type.name == ("CUDA" if gpu else "CPU")]
            report.add(**row, kernels=len(kernels))
        except Exception as failure:  # the other tables are worth having
            report.add(**row, failure=f"{type(failure).__name__}: {failure}"[:300])


def _step(build: Callable, backend: str | None, compiled: bool) -> Callable:
    def make(task: object, training: bool, options: argparse.Namespace) -> Callable[[Tensor], None]:
        model = build(task).to(options.device, memory_format=torch.channels_last).train(training)
        called = torch.compile(model, backend="eager" if options.tiny else "inductor") if compiled else model

        def step(images: Tensor) -> None:
            with torch.autocast(options.device, torch.bfloat16), torch.set_grad_enabled(training):
                outputs = called(images)
            if training:
                target = torch.arange(len(images), device=images.device) % outputs.shape[1]
                F.cross_entropy(outputs.float(), target).backward()

        return step if backend is None else on_backend(backend, step)

    return make


_STEPS = {
    "eager": _step(lambda task: task.plain(), None, False),
    "compile": _step(lambda task: task.plain(), None, True),
    "ours": _step(lambda task: task.ours(), None, False),
    "ours_triton": _step(lambda task: task.ours(), "triton" if torch.cuda.is_available() else None, False),
}
