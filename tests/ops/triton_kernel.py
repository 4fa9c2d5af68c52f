"""What an op's Triton kernels are held to where there is no GPU: the interpreter's results, and what the compiled
kernels need.

tests/ops/<op>_interpreted.py, run by test_interpreter in a process of its own, holds the interpreted kernels to
`kernel.KernelTester`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mvit3_kernels
from mvit3_kernels.ops.dispatch import HAS_TRITON
from mvit3_kernels.ops.registry import FORMS

from ..triton_tools import SHARED_MEMORY_LIMITS, Compiled, offline, resources, run_interpreted
from .inputs import Arguments, Draw, mapped
from .kernel import KernelTester, in_float32
from .measure import tensors
from .test_running_stats import Counted

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class TritonResults(KernelTester):
    """What the kernels compute, interpreted (shapes are tiny then, with every size that a kernel treats differently) or
    on a GPU."""

    backend = "triton"
    one_pixel: Arguments = {}  # noqa: RUF012 -- options that a map of one pixel needs
    # Tracing with open sizes meets the registration alone, which the CPU's kernels have in common; what it traces runs
    # in test_compiles_whole.
    registration_tests = KernelTester.registration_tests[:-1]

    @staticmethod
    def spoiled(name, t):
        # Moments of parts are joined by differences of means, which make NaN of an infinite one.
        return ~t.isfinite() if "moments" in name else t.isnan()

    def test_maps_that_are_too_large(self):
        arguments = in_float32(self.make((1, 1, 1, *self.shapes[0][3:])))
        for name in self.maps:
            if arguments[name] is not None:
                arguments[name] = arguments[name].expand(2**31, -1, -1, -1)
        with (
            mvit3_kernels.backend("triton"),
            pytest.raises(mvit3_kernels.BackendError, match=r"less than 2\^31 pixels"),
        ):
            self.op(**arguments | self.one_pixel)

    def test_runs_are_identical(self, option):
        arguments = self.make(self.shapes[0], option)
        first, second = (self.results("triton", arguments) for _ in range(2))
        for name, t in first.items():
            assert torch.equal(t, second[name]), name


class Case(NamedTuple):
    """A configuration to compile: for an architecture, with maps of a dtype, of `sizes` and with `options` of
    `arguments`."""

    architecture: int | str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    options: Arguments = {}  # noqa: RUF012 -- never changed
    load_bits: int = 0  # what the widest load must reach in each kernel


class TritonKernel:
    op: Callable  # the public function
    maps: tuple[str, ...] = ("x",)  # the arguments that are feature maps
    cases: tuple[Case, ...]
    pixels: tuple[str, ...] = ()  # the arguments that are as high and wide as these
    alone: tuple[int, ...] = ()  # architectures that have configurations of their own, which fit only them
    result: torch.dtype | None = None  # of the first output, by default that of the maps
    larger: tuple[int, ...]  # sizes that differ from the first case's in batch, height and width only

    arguments: Callable[..., Arguments]  # as in KernelTester
    registered: Callable[[Arguments], Iterator[tuple]]

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @property
    def name(self) -> str:
        return self.op.__name__

    def make(self, case: Case, device: str) -> Arguments:
        """The arguments in the case's dtype, parameters in float32."""

        def leaf(name: str, t: torch.Tensor) -> torch.Tensor:
            return t.to(device, (case.dtype if name in self.maps else F32) if t.is_floating_point() else t.dtype)

        return mapped(self.arguments(Draw(), *case.sizes, **case.options), leaf)

    def launched(self, case: Case, arguments: Arguments, compiling: bool = True) -> Compiled:
        """Every kernel that the op's launchers launch, in their configuration."""
        with offline(case.architecture, compiling) as kernels:
            for op, inputs in self.registered(arguments):
                name = op._schema.name.removeprefix("mvit3::")
                package = name.rpartition("_")[0]  # <op>_<pass>, or <op>_<part>_<pass>
                package = package.removesuffix("_layer").removesuffix("_norm").removesuffix("_separable")
                module = importlib.import_module(f"mvit3_kernels.ops.{package}.triton")
                getattr(module, name)(FORMS[name].call(*inputs))
        assert kernels.grids
        return kernels

    def casts(self, case: Case) -> int:
        """Launches beside the kernels that only change a dtype."""
        arguments = self.make(case, "meta")
        with Counted() as counted:
            self.launched(case, arguments, compiling=False)
        return counted.names.count("aten::_to_copy")

    def compiled(self, case: Case) -> Compiled:
        return self.launched(case, self.make(case, "meta"))

    def test_interpreter(self):
        run_interpreted(f"ops/{self.name}_interpreted.py")

    def test_kernels_fit(self, case):
        """No kernel spills, and each fits the smallest GPU that is supported and may run it."""
        limits = (
            [SHARED_MEMORY_LIMITS[case.architecture]]
            if case.architecture in self.alone
            else SHARED_MEMORY_LIMITS.values()
        )
        for kernel in self.compiled(case):
            name = kernel.metadata.name
            if isinstance(case.architecture, str):
                assert kernel.asm["hsaco"] and kernel.metadata.shared <= 65536, name
                continue
            used = resources(kernel)
            assert used.stack == 0, f"{name} spills: {used}"
            assert used.shared <= min(limits), f"{name}: {used}"
            assert used.load_bits >= case.load_bits, f"{name}: {used}"

    def test_one_binary_for_every_map_size(self):
        """Multi-scale training must not compile again: sizes are not specialised on."""
        first = self.cases[0]
        assert all(
            a is b for a, b in zip(self.compiled(first), self.compiled(first._replace(sizes=self.larger)), strict=True)
        )

    def test_large_maps_can_be_launched(self):
        """A grid has 2^31 programs in its first dimension and 65,535 in the others."""
        case = self.cases[0]

        def large(name: str, t: torch.Tensor) -> torch.Tensor:
            return t.new_empty((1, 2048, 2048, *t.shape[3:])) if name in (*self.maps, *self.pixels) else t

        grids = self.launched(case, mapped(self.make(case, "meta"), large), compiling=False).grids
        assert all(grid[0] < 2**31 and max(grid[1:], default=1) < 2**16 for grid in grids), grids

    def test_compiles_without_a_graph_break(self, monkeypatch):
        """torch.compile sees the op's own kernels, forward and backward, with CUDA tensors that exist in name only."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        torch._dynamo.reset()
        found = []

        def record(graph, inputs):
            found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        with FakeTensorMode() as mode:
            given = mapped(self.make(self.cases[0], "cpu"), lambda _, t: mode.from_tensor(t).cuda())
            y = tensors(torch.compile(self.op, fullgraph=True, backend=record)(**given))[0]
        assert y.dtype == (self.result or self.cases[0].dtype) and y.device.type == "cuda"
        assert sum("mvit3." in target for target in found) == 1, found
