"""What a kernel of any backend is held to beside its op's contract: larger and odder shapes, hostile values, its
registration."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import mvit3_kernels

from ..bounds import assert_bound, half_a_rounding
from .inputs import DTYPES, Arguments, Draw, mapped, named
from .measure import tensors


def in_float32(arguments: Arguments) -> Arguments:
    return mapped(arguments, lambda _, t: t.float() if t.is_floating_point() else t)


class KernelTester:
    backend: str
    stored: torch.dtype | None = None  # what the gradient of y is rounded to, by default its own dtype
    op: Callable  # the public function
    maps: tuple[str, ...] = ("x",)  # the arguments that are feature maps
    shapes: tuple[tuple[int, ...], ...]  # sizes of `arguments`, odd on purpose
    options: dict[str, Arguments]  # options of `arguments`
    bound_options: dict[str, Arguments] = {}  # noqa: RUF012 -- never changed; more of them, for `test_bound` alone
    hostile: tuple[torch.dtype, ...] = (torch.float32,)  # dtypes of maps with a value that is not finite
    registration_tests: tuple[str, ...] = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )

    arguments: Callable[..., Arguments]  # (draw, *sizes, **options): arguments of the public function in float64
    registered: Callable[[Arguments], Iterator[tuple]]  # the kernel's registered ops, each with its arguments

    def pytest_generate_tests(self, metafunc):
        options = self.options | (self.bound_options if metafunc.function.__name__ == "test_bound" else {})
        for name, values in {
            "shape": self.shapes,
            "option": options,
            "dtype": DTYPES,
            "stored": self.hostile,
        }.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list(values), ids=str)

    def make(self, shape: tuple[int, ...], option: str | None = None, start: int = 0) -> Arguments:
        return self.arguments(Draw(start), *shape, **((self.options | self.bound_options)[option] if option else {}))

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
            dy = Draw(7)(*y.shape).to(self.stored or y.dtype).to(y)
            grads = torch.autograd.grad(y, list(leaves.values()), dy)
        found = {"y": y.detach()} | {f"moments[{i}]": t for i, t in enumerate(moments)}
        return found | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}

    def test_bound(self, shape, option, dtype):
        self.hold(self.make(shape, option), dtype)

    def hold(self, arguments: Arguments, dtype: torch.dtype) -> None:
        """Holds a call in this dtype, with parameters in it and in float32, to the bound."""
        arguments = mapped(arguments, lambda _, t: t.to(dtype).double() if t.is_floating_point() else t)
        self.stored = dtype
        truth = self.results("reference", arguments, torch.float64)
        for parameters in dict.fromkeys((dtype, torch.float32)):
            found = self.results(self.backend, arguments, dtype, parameters)
            maps = {"y", *(f"d {name}" for name in self.maps)}
            assert all(
                t.dtype == (dtype if name in maps else parameters) for name, t in found.items() if "moments" not in name
            )
            self.check(found, self.allowed(arguments, dtype, parameters), truth, dtype)

    def allowed(self, arguments: Arguments, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, Tensor]:
        """The reference's results, which a kernel's are held to."""
        return self.results("reference", arguments, dtype)

    def check(
        self, found: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Holds results to the reference's in the same dtype."""
        assert_bound(found, reference, truth, half_a_rounding(dtype))

    @pytest.mark.parametrize("batch", [0, 1])
    def test_small_batches(self, batch, option):
        found = self.results(self.backend, self.make((batch, *self.shapes[0][1:]), option))
        assert len(found["y"]) == batch
        assert batch or not any(t.any() for t in found.values())

    def test_strides_do_not_matter(self, option):
        arguments = self.make(self.shapes[0], option)
        want = self.results(self.backend, arguments)

        def strided(_: str, t: Tensor) -> Tensor:
            return torch.stack((t, t), -1)[..., 0] if t.is_floating_point() else t

        for name, t in self.results(self.backend, mapped(arguments, strided)).items():
            assert torch.equal(t, want[name]), name

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity_reach_the_results(self, option, value, stored):
        arguments = self.make((3, *self.shapes[0][1:]), option)
        arguments[self.maps[0]][1, -1, -1, -1] = value
        found = self.results(self.backend, arguments, stored)
        want = self.results("reference", arguments, self.spoiled_in or stored)
        assert not want["y"].isfinite().all()
        for name, t in want.items():
            assert torch.equal(self.spoiled(name, found[name]), self.spoiled(name, t)), name

    # the dtype in which the reference says what NaN and infinity reach, where it is not that of the maps
    spoiled_in: torch.dtype | None = None

    @staticmethod
    def spoiled(name: str, t: Tensor) -> Tensor:
        """Where a result must be as bad as the reference's."""
        return t.isnan()

    def test_arguments_are_not_changed(self, option):
        arguments = in_float32(self.make(self.shapes[0], option))
        before = named(mapped(arguments, lambda _, t: t.clone()))
        self.results(self.backend, arguments)
        assert all(torch.equal(t, before[name]) for name, t in named(arguments).items())

    def test_registration_of_the_kernel(self, option):
        arguments = in_float32(self.make(self.shapes[0], option))
        for op, inputs in self.registered(arguments):
            plain = any(word in op.__name__ for word in ("_backward", "_inference"))
            leaves = (
                t.detach().requires_grad_(t.is_floating_point() and not plain) if isinstance(t, Tensor) else t
                for t in inputs
            )
            torch.library.opcheck(op, tuple(leaves), test_utils=self.registration_tests)

    def test_compiles_whole(self, option):
        torch._dynamo.reset()
        arguments = mapped(
            self.make(self.shapes[0], option), lambda _, t: t.float().requires_grad_() if t.is_floating_point() else t
        )
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**arguments), self.op(**arguments), rtol=0, atol=0)

    def test_what_it_refuses(self):
        with (
            mvit3_kernels.backend(self.backend),
            pytest.raises(mvit3_kernels.BackendError, match=r"bfloat16 and float16, x is torch\.float64"),
        ):
            self.op(**self.make(self.shapes[0]))

    def test_second_derivative_is_refused(self):
        arguments = mapped(self.make(self.shapes[0]), lambda _, t: t.float().requires_grad_())
        y = tensors(self.op(**arguments))[0]
        (first,) = torch.autograd.grad(y.square().sum(), arguments[self.maps[0]], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
            first.sum().backward()
