"""What a CPU kernel is held to beside its op's contract: larger and odder shapes, threads, hostile values, its registration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native

from .inputs import Arguments, Draw, mapped, named
from .measure import pooled, relative_errors, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_the_kernels = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))


def in_float32(arguments: Arguments) -> Arguments:
    return mapped(arguments, lambda _, t: t.float() if t.is_floating_point() else t)


class CpuKernel:
    op: Callable  # the public function
    maps: tuple[str, ...] = ("x",)  # the arguments that are feature maps
    shapes: tuple[tuple[int, ...], ...]  # sizes of `arguments`, odd on purpose
    options: dict[str, Arguments]  # options of `arguments`
    threaded: tuple[tuple[int, ...], ...]  # sizes that several threads share
    cuts_sums = True  # among the threads, so that results depend on their number by a rounding

    arguments: Callable[..., Arguments]  # (draw, *sizes, **options): arguments of the public function in float64
    registered: Callable[[Arguments], Iterator[tuple]]  # the kernel's registered ops, each with its arguments

    def pytest_generate_tests(self, metafunc):
        for name, values in {"shape": self.shapes, "option": self.options, "dtype": DTYPES, "large": self.threaded}.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list(values), ids=str)

    def make(self, shape: tuple[int, ...], option: str | None = None, start: int = 0) -> Arguments:
        return self.arguments(Draw(start), *shape, **(self.options[option] if option else {}))

    def results(self, backend: str, arguments: Arguments, dtype=torch.float32, parameters=None) -> dict[str, Tensor]:
        """y, the moments where the op returns some, and the gradients of everything differentiable."""
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            t = t.to(dtype if name in self.maps else parameters or dtype)
            if "running" not in name:
                leaves[name] = t.requires_grad_()
            return t

        with mvit3_kernels.backend(backend):
            y, *moments = tensors(self.op(**mapped(arguments, leaf)))
            grads = torch.autograd.grad(y, list(leaves.values()), Draw(7)(*y.shape).to(dtype))
        found = {"y": y.detach()} | {f"moments[{i}]": t for i, t in enumerate(moments)}
        return found | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}

    def test_bound(self, shape, option, dtype):
        arguments = mapped(self.make(shape, option), lambda _, t: t.to(dtype).double() if t.is_floating_point() else t)
        truth = self.results("reference", arguments, torch.float64)
        allowed = relative_errors(self.results("reference", arguments, dtype), truth)
        for parameters in (dtype, torch.float32):
            found = self.results("cpu", arguments, dtype, parameters)
            maps = {"y", *(f"d {name}" for name in self.maps)}
            assert all(t.dtype == (dtype if name in maps else parameters) for name, t in found.items() if "moments" not in name)
            errors = relative_errors(found, truth)
            for gradients in (False, True):
                # Half a rounding is what storing the exact result costs.
                assert pooled(errors, gradients) <= 2 * pooled(allowed, gradients) + torch.finfo(dtype).eps / 2, (errors, allowed)

    @pytest.mark.parametrize("batch", [0, 1])
    def test_small_batches(self, batch, option):
        found = self.results("cpu", self.make((batch, *self.shapes[0][1:]), option))
        assert len(found["y"]) == batch
        assert batch or not any(t.any() for t in found.values())

    def test_strides_do_not_matter(self, option):
        arguments = self.make(self.shapes[0], option)
        want = self.results("cpu", arguments)

        def strided(_: str, t: Tensor) -> Tensor:
            return torch.stack((t, t), -1)[..., 0] if t.is_floating_point() else t

        for name, t in self.results("cpu", mapped(arguments, strided)).items():
            assert torch.equal(t, want[name]), name

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
    def test_nan_and_infinity_reach_the_results(self, option, value, stored):
        arguments = self.make((3, *self.shapes[0][1:]), option)
        arguments[self.maps[0]][1, -1, -1, -1] = value
        found, want = (self.results(backend, arguments, stored) for backend in ("cpu", "reference"))
        assert not want["y"].isfinite().all()
        for name, t in want.items():
            assert torch.equal(found[name].isnan(), t.isnan()), name

    def test_arguments_are_not_changed(self, option):
        arguments = in_float32(self.make(self.shapes[0], option))
        before = named(mapped(arguments, lambda _, t: t.clone()))
        self.results("cpu", arguments)
        assert all(torch.equal(t, before[name]) for name, t in named(arguments).items())

    def test_results_repeat_and_threads_agree(self, large, option):
        arguments, threads, found = self.make(large, option), torch.get_num_threads(), {}
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found[n] = self.results("cpu", arguments)
                again = self.results("cpu", arguments)
                assert all(torch.equal(t, again[name]) for name, t in found[n].items())
        finally:
            torch.set_num_threads(threads)
        for n in (2, 3):
            for name, t in found[1].items():
                rounding = {"rtol": 1e-4, "atol": 1e-5 * t.abs().max().item()} if self.cuts_sums else {"rtol": 0.0, "atol": 0.0}
                assert torch.allclose(t, found[n][name], **rounding), name

    def test_python_threads_do_not_disturb_each_other(self):
        jobs = [self.make(shape, option) for shape in self.threaded for option in self.options]
        want = [self.results("cpu", job) for job in jobs]
        wrong: list[str] = []

        def work(i: int) -> None:
            for _ in range(3):
                got = self.results("cpu", jobs[i])
                wrong.extend(f"{i} {name}" for name, t in got.items() if not torch.allclose(t, want[i][name], rtol=1e-4, atol=1e-4))

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        [w.start() for w in workers], [w.join() for w in workers]
        assert not wrong

    def test_registration_of_the_kernel(self, option):
        arguments = in_float32(self.make(self.shapes[0], option))
        for op, inputs in self.registered(arguments):
            plain = any(word in op.__name__ for word in ("_backward", "_inference"))
            leaves = (t.detach().requires_grad_(t.is_floating_point() and not plain) if isinstance(t, Tensor) else t for t in inputs)
            torch.library.opcheck(op, tuple(leaves))

    def test_compiles_whole(self, option):
        torch._dynamo.reset()
        arguments = mapped(self.make(self.shapes[0], option), lambda _, t: t.float().requires_grad_() if t.is_floating_point() else t)
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**arguments), self.op(**arguments), rtol=0, atol=0)

    def test_what_it_refuses(self):
        with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match=r"bfloat16 and float16, x is torch\.float64"):
            self.op(**self.make(self.shapes[0]))

    def test_second_derivative_is_refused(self):
        arguments = mapped(self.make(self.shapes[0]), lambda _, t: t.float().requires_grad_())
        y = tensors(self.op(**arguments))[0]
        (first,) = torch.autograd.grad(y.square().sum(), arguments[self.maps[0]], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
            first.sum().backward()
