"""Many Python threads at once, each with its own number of torch threads: every result is the one of the same call made
alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native
from tests.ops.inputs import DTYPES
from tests.ops.measure import evaluate
from tests.ops.test_fuzz import OPTIONS, contract

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))

REPEATS, NETWORK_REPEATS, WORKERS = 50, 4, 4
Results = dict[str, Tensor]
Job = tuple[str, int, Callable[[], Results]]  # name, torch threads, what to run


def op_job(name: str, index: int) -> Job:
    held = contract(name)
    dtype = DTYPES[index % len(DTYPES)]
    arguments = held.cast(held.make(held.first, batch=3, height=12, width=12), dtype, torch.float32)
    return name, 1 + index % 2, lambda: evaluate(held.op, arguments)


def training_job(name: str, threads: int) -> Job:
    """Forward and backward of a network. Each call has a copy, since gradients and running statistics belong to a
    module."""
    torch.manual_seed(0)
    model = mvit3_kernels.create_model(name, num_classes=7, drop_rate=0.0, proj_drop_rate=0.0).to(
        memory_format=torch.channels_last
    )
    state, x, target = model.state_dict(), torch.randn(2, 3, 64, 96), torch.tensor([3, 5])
    free: list[torch.nn.Module] = []

    def run() -> Results:
        copy = (
            free.pop() if free else mvit3_kernels.create_model(name, num_classes=7, drop_rate=0.0, proj_drop_rate=0.0)
        )
        copy.load_state_dict(state)
        F.cross_entropy(copy(x.contiguous(memory_format=torch.channels_last)), target).backward()
        results = {n: p.grad for n, p in copy.named_parameters()} | {n: b.clone() for n, b in copy.named_buffers()}
        copy.zero_grad()
        free.append(copy)
        return results

    state = {n: t.clone() for n, t in state.items()}
    return f"{name} training", threads, run


def fused_job(threads: int) -> Job:
    """One fused network that all threads call."""
    torch.manual_seed(0)
    model = mvit3_kernels.fuse(mvit3_kernels.create_model("mobilevitv3_xxs", num_classes=7).eval())
    x = torch.randn(2, 3, 96, 64)

    def run() -> Results:
        with torch.inference_mode():
            return {"y": model(x)}

    return "fused", threads, run


def on(threads: int, run: Callable[[], Results]) -> Results:
    torch.set_num_threads(threads)
    return run()


def test_threads_of_python_do_not_disturb_each_other():
    jobs = [op_job(name, i) for i, name in enumerate(OPTIONS)]
    jobs += [training_job("mobilevitv3_xxs", 2), training_job("mobilevitv2_050", 1), fused_job(1), fused_job(2)]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as alone:
            want = [alone.submit(on, threads, run).result() for _, threads, run in jobs]
        order = [i for i, job in enumerate(jobs) for _ in range(NETWORK_REPEATS if "training" in job[0] else REPEATS)]
        random.Random(0).shuffle(order)
        # A thread's first look at the number takes over the one that any thread set last: it must not come between
        # `on` and what it runs.
        with ThreadPoolExecutor(WORKERS, initializer=torch.get_num_threads) as together:
            found = list(together.map(lambda i: on(*jobs[i][1:]), order))
    finally:
        torch.set_num_threads(before)
    for i, got in zip(order, found, strict=True):
        assert got.keys() == want[i].keys()
        for name, t in got.items():
            # Kernels cut work by the number of threads alone; PyTorch's own operators beside them in a network may not.
            tolerance = 0.0 if jobs[i][0] in OPTIONS or jobs[i][0] == "fused" else 1e-4
            scale = want[i][name].abs().max().item() if t.numel() else 0.0
            torch.testing.assert_close(
                t, want[i][name], rtol=0, atol=tolerance * scale, msg=lambda m, i=i, n=name: f"{jobs[i][0]} {n}: {m}"
            )


def test_number_of_threads_belongs_to_the_python_thread():
    """What the test above relies on: torch.set_num_threads acts on the calling thread, and on threads that have not run
    anything yet."""
    before = torch.get_num_threads()
    ready, go = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        seen.append(torch.get_num_threads())
        ready.set()
        go.wait()
        seen.append(torch.get_num_threads())

    try:
        torch.set_num_threads(3)
        worker = threading.Thread(target=other)
        worker.start()
        ready.wait()
        torch.set_num_threads(1)
        go.set()
        worker.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 3]
