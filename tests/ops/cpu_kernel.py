"""What a CPU kernel is held to beside what every kernel is: threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from mvit3_kernels import _native

from .inputs import mapped
from .kernel import KernelTester, in_float32

__all__ = ["CpuKernel", "in_float32", "needs_the_kernels"]

needs_the_kernels = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))


class CpuKernel(KernelTester):
    backend = "cpu"
    hostile = (torch.float32, torch.bfloat16)
    threaded: tuple[tuple[int, ...], ...]  # sizes that several threads share
    cuts_sums = True  # among the threads, so that results depend on their number by a rounding

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "large" in metafunc.fixturenames:
            metafunc.parametrize("large", list(self.threaded), ids=str)

    def test_results_repeat_and_threads_agree(self, large, option):
        arguments, threads, found = self.make(large, option), torch.get_num_threads(), {}
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found[n] = self.results(self.backend, arguments)
                again = self.results(self.backend, arguments)
                assert all(torch.equal(t, again[name]) for name, t in found[n].items())
        finally:
            torch.set_num_threads(threads)
        for n in (2, 3):
            for name, t in found[1].items():
                rounding = (
                    {"rtol": 1e-4, "atol": 1e-5 * t.abs().max().item()}
                    if self.cuts_sums
                    else {"rtol": 0.0, "atol": 0.0}
                )
                assert torch.allclose(t, found[n][name], **rounding), name

    @pytest.mark.parametrize("layout", ["nchw", "sliced"])
    def test_layouts_of_maps_do_not_matter(self, layout, option):
        """Of other strides than the ones that all tensors have in test_strides_do_not_matter; between NaN."""
        arguments = self.make(self.shapes[0], option)

        def laid_out(name: str, t: Tensor) -> Tensor:
            if name not in self.maps:
                return t
            if layout == "nchw":
                return t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            batch, height, width, channels = t.shape
            around = torch.full((batch + 1, height, 2 * width, channels + 3), float("nan"), dtype=t.dtype)
            around[1:, :, ::2, 1:-2] = t
            return around[1:, :, ::2, 1:-2]

        want = self.results(self.backend, arguments)
        for name, t in self.results(self.backend, mapped(arguments, laid_out)).items():
            assert torch.equal(t, want[name]), name

    def test_python_threads_do_not_disturb_each_other(self):
        jobs = [self.make(shape, option) for shape in self.threaded for option in self.options]
        want = [self.results(self.backend, job) for job in jobs]
        wrong: list[str] = []

        def work(i: int) -> None:
            for _ in range(3):
                got = self.results(self.backend, jobs[i])
                wrong.extend(
                    f"{i} {name}"
                    for name, t in got.items()
                    if not torch.allclose(t, want[i][name], rtol=1e-4, atol=1e-4)
                )

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        [w.start() for w in workers], [w.join() for w in workers]
        assert not wrong
