# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""What every op is held to, written once. A test class names the op, its cases and its plain meaning; the tests below
do the rest."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_unflatten

import mvit3_kernels
from mvit3_kernels.ops.dispatch import BACKENDS

from ..bounds import assert_bound, half_a_rounding, relative_errors
from .inputs import DTYPES, Arguments, Bad, Draw, mapped, named, replaced
from .measure import Call, assert_same, evaluate, tensors

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))


class Contract:
    op: Callable  # the public function
    maps: tuple[str, ...] = ("x",)  # the arguments that are feature maps
    cases: dict[str, Arguments]  # options of `arguments`
    batch_norms: tuple[str, ...] = ()
    compilers: tuple[str, ...] = ("aot_eager",)
    # of a case's arguments, in the test of precision, where one is not enough: their errors are pooled
    draws: dict[str, int] = {}
    roundings = 16  # how many relative roundings the reference may err by
    symbolic = True  # whether tracing with symbolic height and width takes seconds; with patches it takes a minute
    autocast_dtype = torch.bfloat16
    bad_case: Arguments = {}  # options that make every argument present
    bad: tuple[Bad, ...] = ()

    # (draw, batch=2, height=..., width=..., **options): arguments of the public function
    arguments: Callable[..., Arguments]
    plain: Callable  # the meaning, written independently, with the public function's parameters
    raw: Callable[..., tuple]  # the public function's arguments as those of torch.ops.mvit3.<op>

    def pytest_generate_tests(self, metafunc):
        values = {"case": self.cases, "dtype": DTYPES, "device": DEVICES, "compiler": self.compilers, "bad": self.bad}
        for name in (name for name in values if name in metafunc.fixturenames):
            ids = [f"{b.name}-{i}" for i, b in enumerate(self.bad)] if name == "bad" else str
            metafunc.parametrize(name, list(values[name]), ids=ids)

    @property
    def name(self) -> str:
        return self.op.__name__

    @property
    def first(self) -> str:
        return next(iter(self.cases))

    def make(self, case: str, grad: bool = True, seed: int = 0, **size: int) -> Arguments:
        def leaf(name: str, t: Tensor) -> Tensor:
            return t.requires_grad_(grad and t.is_floating_point() and "running" not in name)

        return mapped(self.arguments(Draw(seed), **{**self.cases[case], **size}), leaf)

    def cast(self, arguments: Arguments, maps: torch.dtype, parameters: torch.dtype, device: str = "cpu") -> Arguments:
        def leaf(name: str, t: Tensor) -> Tensor:
            if t.is_floating_point():
                return t.detach().to(device, maps if name in self.maps else parameters).requires_grad_(t.requires_grad)
            return t.to(device)

        return mapped(arguments, leaf)

    def test_meaning(self, case):
        assert_same(evaluate(self.op, self.make(case)), evaluate(self.plain, self.make(case)), 1e-12)

    def test_batch_of_one_sample(self, case):
        assert_same(evaluate(self.op, self.make(case, batch=1)), evaluate(self.plain, self.make(case, batch=1)), 1e-12)

    def test_batch_of_no_sample(self, case):
        got, one = evaluate(self.op, self.make(case, batch=0)), evaluate(self.op, self.make(case, batch=1))
        assert got.keys() == one.keys()
        assert got["y[0]"].shape == (0, *one["y[0]"].shape[1:])
        for name, t in got.items():
            assert not t.any() and t.dtype == one[name].dtype, name

    def test_gradcheck(self, case):
        leaves, spec = tree_flatten(self.make(case))
        assert gradcheck(lambda *leaves: tensors(self.op(**tree_unflatten(leaves, spec))), leaves, fast_mode=True)

    def test_second_derivative(self, case):
        """By what a kernel's refusal advises; the gradient's own tangents, which a product with the Hessian needs, are
        checked too."""
        function, leaves = self.of_leaves(self.make(case))
        with mvit3_kernels.backend("reference"):
            assert gradgradcheck(lambda *leaves: function(*leaves)[0], leaves, fast_mode=True, check_fwd_over_rev=True)

    def of_leaves(self, arguments: Arguments) -> tuple[Callable, list[Tensor]]:
        """The op as a function of those tensors alone that are differentiated, and these."""
        leaves, spec = tree_flatten(arguments)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

        def function(*given: Tensor) -> list[Tensor]:
            filled = dict(zip(places, given, strict=True))
            return tensors(self.op(**tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], spec)))

        return function, [leaves[i] for i in places]

    @pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
    def test_transforms(self, case, precision):
        """torch.func's gradient, product with a tangent and map over samples, and forward-mode AD alone, against
        float64's gradients."""
        given = self.cast(self.make(case), precision, precision)
        function, leaves = self.of_leaves(given)
        plain = [leaf.detach() for leaf in leaves]
        truth, exact = self.of_leaves(self.cast(given, torch.float64, torch.float64))
        y = truth(*exact)[0]
        draw, tolerance = Draw(2), self.roundings * torch.finfo(precision).eps
        cotangent, tangents = draw(*y.shape), [draw(*leaf.shape).to(precision) for leaf in leaves]
        want = torch.autograd.grad(y, exact, cotangent)
        products = torch.cat([(t.double() * g).flatten() for t, g in zip(tangents, want, strict=True)])

        def scalar(*leaves: Tensor) -> Tensor:
            return (function(*leaves)[0] * cotangent.to(precision)).sum()

        def close(got: Tensor, want: Tensor) -> bool:
            return bool(
                (got.double() - want).square().mean().sqrt() <= tolerance * want.square().mean().sqrt().clamp(min=1)
            )

        for got in (
            torch.func.grad(scalar, tuple(range(len(plain))))(*plain),
            torch.func.vjp(lambda *leaves: function(*leaves)[0], *plain)[1](cotangent.to(precision)),
        ):
            assert all(close(a, b) for a, b in zip(got, want, strict=True))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(scalar(*map(forward_ad.make_dual, plain, tangents))).tangent
        for got in (torch.func.jvp(scalar, tuple(plain), tuple(tangents))[1], dual):
            assert abs(got.double() - products.sum()) <= tolerance * products.abs().sum().clamp(min=1)

    def test_map_over_calls(self, case):
        """torch.func.vmap over maps of several calls, and over their gradients."""
        first, second = (self.make(case, grad=False, seed=seed) for seed in (0, 1))
        second = {name: second[name] if name in self.maps else value for name, value in first.items()}
        present = [name for name in self.maps if first.get(name) is not None]
        stacked = [torch.stack((first[name], second[name])) for name in present]

        def scalar(*maps: Tensor) -> Tensor:
            return tensors(self.op(**{**first, **dict(zip(present, maps, strict=True))}))[0].square().sum()

        for function in (scalar, torch.func.grad(scalar, tuple(range(len(present))))):
            got = tensors(torch.func.vmap(function)(*stacked))
            for i, arguments in enumerate((first, second)):
                want = tensors(function(*(arguments[name] for name in present)))
                torch.testing.assert_close([t[i] for t in got], want, rtol=1e-9, atol=1e-9)

    def test_forced_backend_under_a_transform(self):
        arguments = self.cast(self.make(self.first), torch.float32, torch.float32)
        function, leaves = self.of_leaves(arguments)
        plain = tuple(leaf.detach() for leaf in leaves)
        for backend in BACKENDS[1:]:
            with mvit3_kernels.backend(backend):
                with pytest.raises(
                    mvit3_kernels.BackendError,
                    match=f"{self.name} cannot run on backend '{backend}': a transform of torch",
                ):
                    torch.func.jvp(lambda *leaves: function(*leaves)[0], plain, plain)
                with pytest.raises(mvit3_kernels.BackendError, match="forward-mode AD"), forward_ad.dual_level():
                    function(*map(forward_ad.make_dual, plain, plain))

    def test_compiled_transform(self):
        """dynamo traces a transform inside of what it compiles; the op follows it there."""
        function, leaves = self.of_leaves(self.cast(self.make(self.first), torch.float32, torch.float32))
        plain = [leaf.detach() for leaf in leaves]

        def scalar(*leaves: Tensor) -> Tensor:
            return function(*leaves)[0].square().sum()

        transforms = (
            torch.func.grad(scalar, tuple(range(len(plain)))),
            lambda *leaves: torch.func.jvp(scalar, leaves, leaves)[1],
        )
        for transform in transforms:
            torch._dynamo.reset()
            compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(*plain), transform(*plain), rtol=1e-4, atol=1e-4)

    def test_registration(self, case):
        op = getattr(torch.ops.mvit3, self.name).default
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        traced = "test_aot_dispatch_dynamic" if self.symbolic else "test_aot_dispatch_static"
        torch.library.opcheck(
            op, self.raw(**self.cast(self.make(case), torch.float32, torch.float32)), test_utils=(*tests, traced)
        )
        torch.library.opcheck(
            op, self.raw(**self.cast(self.make(case), torch.bfloat16, torch.float32)), test_utils=tests
        )

    def test_registered_op_is_the_public_function(self, case):
        arguments = self.cast(self.make(case), torch.float32, torch.float32)
        got = getattr(torch.ops.mvit3, self.name)(*self.raw(**arguments))
        got = [t for t in tensors(got) if t.numel()]  # the op returns empty moments where there are none
        torch.testing.assert_close(got, tensors(self.op(**arguments)), rtol=0, atol=1e-6)

    def test_compile(self, compiler):
        torch._dynamo.reset()
        compiled = torch.compile(self.op, fullgraph=True, dynamic=self.symbolic, backend=compiler)
        # No size equals another one, or dynamo would take them for the same.
        shapes = ({"batch": 7, "height": 16, "width": 20}, {"batch": 11, "height": 12, "width": 22})
        for i, shape in enumerate((*shapes, *shapes)):
            # Neither a second call nor, where sizes are symbolic, another batch, height and width may compile again.
            with torch.compiler.set_stance("fail_on_recompile") if i >= (1 if self.symbolic else 2) else nullcontext():
                got = evaluate(compiled, self.make(self.first, **shape))
            assert_same(got, evaluate(self.op, self.make(self.first, **shape)), 1e-10)
        # Float64 runs on no kernel, so a forced one is refused: the compiled code notices the change of backend.
        with mvit3_kernels.backend("cuda"), pytest.raises(RuntimeError, match=f"{self.name} cannot run on backend"):
            compiled(**self.make(self.first))
        with mvit3_kernels.backend("reference"):
            assert_same(evaluate(compiled, self.make(self.first)), evaluate(self.op, self.make(self.first)), 1e-10)

    def test_export_is_aten(self, case):
        arguments = self.cast(self.make(case, grad=False), torch.float32, torch.float32)
        inputs = tuple(t for name, t in named(arguments).items() if name in self.maps)
        batch = tuple({0: torch.export.Dim("batch")} for _ in inputs)
        program = torch.export.export(Call(self.op, self.maps, arguments), inputs, dynamic_shapes=(batch,))
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert {getattr(target, "namespace", "builtin") for target in calls} <= {"aten", "builtin", "_operator"}
        for given in (inputs, tuple(torch.cat((t, t[:1], t)) for t in inputs)):
            mapped_to = dict(zip((name for name in self.maps if arguments.get(name) is not None), given, strict=True))
            with mvit3_kernels.backend("reference"):
                want = self.op(**{**arguments, **mapped_to})
            torch.testing.assert_close(tensors(program.module()(*given)), tensors(want))

    @pytest.mark.parametrize("layout", ["nchw", "sliced"])
    def test_strides(self, case, layout):
        def leaf(name: str, t: Tensor) -> Tensor:
            if name not in self.maps:
                return t
            if layout == "nchw":
                return t.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
            batch, height, width, channels = t.shape
            wide = torch.full((batch, height + 1, 2 * width, channels + 2), float("nan"), dtype=t.dtype)
            wide[:, 1:, ::2, 1:-1] = t.detach()
            return wide[:, 1:, ::2, 1:-1].requires_grad_()

        assert_same(evaluate(self.op, mapped(self.make(case), leaf)), evaluate(self.op, self.make(case)), 1e-12)

    @pytest.mark.parametrize("parameters", ["same", "float32"])
    def test_precision(self, case, dtype, parameters, device):
        """Every backend that can run the call errs at most twice as much as the reference, which errs by a few
        roundings."""
        allowed: dict[str, Tensor] = {}
        exact: dict[str, Tensor] = {}
        found: dict[str | None, dict[str, Tensor]] = {}
        for seed in range(self.draws.get(case, 1)):
            given = self.cast(
                self.make(case, seed=seed), dtype, torch.float32 if parameters == "float32" else dtype, device
            )
            truth = evaluate(self.op, self.cast(given, torch.float64, torch.float64, device))
            with mvit3_kernels.backend("reference"):
                reference = evaluate(self.op, given)
            assert reference["y[0]"].dtype == dtype
            assert all(reference[f"d {name}"].dtype == t.dtype for name, t in named(given).items() if t.requires_grad)
            errors = relative_errors(reference, truth)
            assert all(error <= self.roundings * torch.finfo(dtype).eps for error in errors.values()), errors

            def of_draw(results: dict[str, Tensor], seed: int = seed) -> dict[str, Tensor]:
                return {f"{name} of draw {seed}": t for name, t in results.items()}

            allowed |= of_draw(reference)
            exact |= of_draw(truth)
            for backend in (None, *self.runnable(given)):
                with nullcontext() if backend is None else mvit3_kernels.backend(backend):
                    found.setdefault(backend, {}).update(of_draw(evaluate(self.op, given)))
        for results in found.values():
            assert_bound(results, allowed, exact, half_a_rounding(dtype))

    def runnable(self, arguments: Arguments) -> list[str]:
        return [b for b in BACKENDS[1:] if self.refusal(b, arguments) is None]

    def refusal(self, backend: str, arguments: Arguments) -> str | None:
        try:
            with mvit3_kernels.backend(backend):
                self.op(**arguments)
        except mvit3_kernels.BackendError as error:
            return str(error)
        return None

    def test_forced_backend(self):
        """Float64 is refused by every kernel, and other dtypes where there is no kernel, with the reason."""
        kernels = {kernel.backend for kernel in importlib.import_module(f"mvit3_kernels.ops.{self.name}").KERNELS}
        with mvit3_kernels.backend("reference"):
            assert_same(evaluate(self.op, self.make(self.first)), evaluate(self.plain, self.make(self.first)), 1e-12)
        for backend in BACKENDS[1:]:
            head, _, reason = self.refusal(backend, self.make(self.first)).partition(": ")
            assert head == f"{self.name} cannot run on backend {backend!r}"
            assert reason
            if backend not in kernels:
                assert reason == "the op has no kernel for this backend"
                assert self.refusal(backend, self.cast(self.make(self.first), torch.float32, torch.float32))

    def test_autocast(self, case):
        arguments = self.cast(self.make(case), torch.float32, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(self.op, arguments)
        assert got.pop("y[0]").dtype == self.autocast_dtype
        assert {t.dtype for t in got.values()} <= {torch.float32}
        truth = evaluate(self.op, self.cast(arguments, torch.float64, torch.float64))
        errors = relative_errors(got, {name: truth[name] for name in got})
        assert all(error <= self.roundings * torch.finfo(torch.bfloat16).eps for error in errors.values()), errors

    def test_purity(self, case):
        for dtype in (torch.float64, *DTYPES):
            arguments = self.cast(self.make(case), dtype, dtype)
            before = [(t.clone(), t._version) for t in tensors(arguments)]
            y, *moments = tensors(self.op(**arguments))
            y.sum().backward()
            assert not any(t.requires_grad for t in moments)
            for t, (copy, version) in zip(tensors(arguments), before, strict=True):
                assert torch.equal(t, copy) and t._version == version

    def test_bad_argument(self, bad):
        arguments = mapped(self.arguments(Draw(), **self.bad_case), lambda _, t: t)
        self.op(**arguments)
        before = [t.clone() for t in tensors(arguments)]
        changed, came = bad.apply(arguments)
        with pytest.raises(bad.error) as info:
            self.op(**changed)
        assert type(info.value) is bad.error
        for word in (bad.name, came, bad.allowed):
            assert word in str(info.value)
        torch.testing.assert_close(tensors(arguments), before, rtol=0, atol=0)

    def test_meta_device(self, case):
        """Shapes and dtypes without any data, as tools that count operations ask for them."""
        arguments = self.cast(self.make(case), torch.float32, torch.float32)
        got = evaluate(self.op, self.cast(arguments, torch.float32, torch.float32, "meta"))
        want = evaluate(self.op, arguments)
        assert {name: (t.shape, t.dtype) for name, t in got.items()} == {
            name: (t.shape, t.dtype) for name, t in want.items()
        }

    def test_one_value_per_channel(self):
        for norm in self.batch_norms:
            alone = self.arguments(Draw(), batch=1, height=1, width=1, training=False)
            self.op(**alone)
            with pytest.raises(ValueError, match=rf"{norm}\.training needs more than 1 value per channel, got 1"):
                self.op(**replaced(alone, f"{norm}.training", lambda _: True)[0])
