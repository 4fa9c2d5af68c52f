"""Launches found by their keys are those that Triton would make, for any arguments; nothing runs and nothing is
compiled."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import random
import weakref
from types import SimpleNamespace

import pytest
import torch

from mvit3_kernels import ops

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
launching = pytest.importorskip("mvit3_kernels.ops.triton_launch")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, KernelInterface  # noqa: E402

KEYS = [launching.launch_key_python, launching.launch_key]


def plain(a, b, pair, n, rows, scale, WIDTH: tl.constexpr, ACT: tl.constexpr = None, FLAG: tl.constexpr = False):
    pass


class Recorder:
    """A driver whose launches are noted. Kernels stand for what Triton compiles: one for each of its own keys."""

    def __init__(self, monkeypatch):
        self.device, self.backend, self.compiled, self.launches = 0, "cuda", [], []
        monkeypatch.setattr(driver, "_active", self)
        monkeypatch.setattr(JITFunction, "_do_compile", self.compile)
        monkeypatch.setattr(CompiledKernel, "_init_handles", lambda kernel: None)  # it is on no GPU

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def compile(self, key, *_):
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.__dict__.update(module=None, name=key, function=len(self.compiled), packed_metadata=(4, 1, 0), src=None)
        kernel.metadata = SimpleNamespace(target=SimpleNamespace(backend=self.backend))
        kernel._run = lambda *arguments: self.launches.append(arguments)
        self.compiled.append(kernel)
        self.function.device_caches[self.device][0][key] = kernel
        return kernel

    def kernel(self, function=plain, **options):
        self.function = launching.Kernel(function, **options)
        return self.function

    def last(self):
        """The last launch, but for what only hooks see."""
        x, y, z, stream, function, metadata, _, _, _, *arguments = self.launches[-1]
        return (x, y, z, stream, function, metadata), [
            id(a) if isinstance(a, torch.Tensor) else repr(a) for a in arguments
        ]


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


@pytest.fixture
def by_key(monkeypatch):
    """What Triton was asked to launch."""
    asked, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **o: asked.append(a) or run(self, *a, **o))
    return asked


MEMORY = torch.zeros(256, dtype=torch.uint8)
TENSORS = [MEMORY[8 * i : 8 * i + 8].view(dtype) for i in range(5) for dtype in (torch.float32, torch.bfloat16)]
TENSORS += [torch.nn.Parameter(torch.ones(4)), torch.ones(4)[1:], torch.zeros(3, dtype=torch.int64)]
INTEGERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31) - 16, 2**62, True, False]
SCALES = [0.0, -0.0, 1.0, 0.5, float("nan"), 1, 16, None]


PAIRS = [None, 1, (), (TENSORS[0], 1), (TENSORS[1], 1), (TENSORS[2], 16), (TENSORS[0], True), (None,), ((), 1)]
VALUES = [[*TENSORS, None], [*TENSORS, None], PAIRS, INTEGERS, INTEGERS, SCALES]
OPTIONS = {"WIDTH": [1, True, 1.0, 16, "16", None], "FLAG": [False, 0, True], "num_warps": [1, 4, 8]}


def drawn(count):
    """Arguments and options of launches: most are those of an earlier one, or differ from them in one value."""
    draw, earlier = random.Random(3), []
    for _ in range(count):
        if draw.random() < 0.05 or not earlier:
            arguments = tuple(draw.choice(values) for values in VALUES)
            given = draw.sample([name for name in OPTIONS if name != "WIDTH"], draw.randrange(3))
            options = {name: draw.choice(OPTIONS[name]) for name in draw.sample(["WIDTH", *given], 1 + len(given))}
            if draw.random() < 0.2:  # a constant by position
                arguments += (options.pop("WIDTH"),)
            earlier.append((arguments, options))
        arguments, options = draw.choice(earlier)
        if draw.random() < 0.4:
            i = draw.randrange(len(VALUES))
            arguments = (*arguments[:i], draw.choice(VALUES[i]), *arguments[i + 1 :])
        elif options and draw.random() < 0.4:
            name = draw.choice(list(options))
            options = options | {name: draw.choice(OPTIONS[name])}
        yield draw, arguments, options


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("left", [(), ("rows", "scale")], ids=["specialised", "not specialised"])
def test_is_the_launch_that_triton_would_make(key, left, recorder, by_key, monkeypatch):
    monkeypatch.setattr(launching, "launch_key", key)
    kernel, count = recorder.kernel(do_not_specialize=left), 0
    for draw, arguments, options in drawn(1000):
        recorder.device, grid = draw.choice([0, 0, 0, 1]), draw.choice([(3,), (3, 5), (3, 5, 2)])
        found, ours = kernel[grid](*arguments, **options), recorder.last()
        count += len(by_key)
        expected = JITFunction.run(kernel, *arguments, grid=grid, warmup=False, **options)
        by_key.clear()
        assert found is expected and ours == recorder.last(), (arguments, options)
    assert count < 800 and len(recorder.compiled) > 150

    by_key.clear()
    for _ in range(2):
        kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16)
    assert len(by_key) <= 1


def test_keys_of_both_languages_divide_alike():
    launches = [(arguments, options) for _, arguments, options in drawn(400)]
    keys = [[key(torch.Tensor, *launch) for launch in launches] for key in KEYS]
    for i, j in itertools.combinations(range(len(launches)), 2):
        assert (keys[0][i] == keys[0][j]) == (keys[1][i] == keys[1][j]), (launches[i], launches[j])
    assert 100 < len(set(keys[0])) == len(set(keys[1])) < 300


@pytest.mark.skipif(launching.launch_key is launching.launch_key_python, reason="the extension is not built")
@pytest.mark.parametrize("arguments", [(), (torch.Tensor, (), {}, 1), ("Tensor", (), {}), (torch.Tensor, [], {})])
def test_wrong_questions(arguments):
    with pytest.raises(TypeError, match="launch_key takes a class, a tuple and a dictionary"):
        launching.launch_key(*arguments)


class Whole(int):
    pass


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [2**63, Whole(3), tl.constexpr(3), tl.float32, 3j, [1], b"1"], ids=repr)
def test_kinds_that_are_not_known(key, value):
    for arguments, options in (((value,), {}), (((1, value),), {}), ((), {"A": value})):
        if value == 2**63 and key is launching.launch_key_python:
            assert key(torch.Tensor, arguments, options) != key(torch.Tensor, (2**63 + 1,), {})
        else:
            assert key(torch.Tensor, arguments, options) is None


def test_what_is_not_known_is_launched_by_triton(recorder, by_key):
    kernel = recorder.kernel()
    for _ in range(2):
        kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=tl.float32)
        kernel[lambda bound: (bound["n"],)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16)
    assert len(by_key) == len(recorder.launches) == 4
    assert recorder.launches[-1][0] == 5


def test_a_parameter_by_name_is_no_constant(recorder, by_key):
    kernel = recorder.kernel()
    for n in (5, 7, 5):
        kernel[(1,)](TENSORS[0], None, None, scale=0.5, n=n, rows=9, WIDTH=16)
        assert recorder.launches[-1][9:][3:6] == (n, 9, 0.5)
    assert len(by_key) == 3


def test_other_gpus_are_left_to_triton(recorder, by_key):
    recorder.backend = "hip"
    kernel = recorder.kernel()
    for _ in range(3):
        kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16)
    assert len(by_key) == 3


def test_wrong_arguments_are_told_by_triton(recorder):
    kernel = recorder.kernel()
    with pytest.raises(TypeError, match="missing"):
        kernel[(1,)](TENSORS[0], WIDTH=16)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_launches(hook, recorder, by_key, monkeypatch):
    kernel = recorder.kernel()
    launch = lambda: kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16)  # noqa: E731
    launch()
    launch()
    assert len(by_key) == 1 and recorder.launches[-1][6:9] == (None, None, None)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(knobs.runtime, hook), "calls", [print])
        launch()
    assert len(by_key) == 2 and getattr(knobs.runtime, hook) in recorder.launches[-1][7:9]
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, hook, print)
        launch()
    assert len(by_key) == 3 and print in recorder.launches[-1][7:9]
    launch()
    assert len(by_key) == 3


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "fpsan"),
        (knobs.compilation, "fpsan_homomorphic_casts", True),
        (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash")),
        (launching, "WHY_NEVER", "a version that is not known"),
    ],
    ids=["debug", "instrumentation", "casts", "inspection", "version"],
)
def test_other_settings_are_left_to_triton(owner, name, value, recorder, by_key, monkeypatch):
    kernel = recorder.kernel()
    ordinary = kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value, raising=name != "fpsan_homomorphic_casts")  # since 3.9
        special = [kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16) for _ in range(2)]
        expected = JITFunction.run(kernel, TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16, grid=(1,), warmup=True)
    assert len(by_key) == 4 and special[0] is special[1] is expected
    assert kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16) is ordinary
    assert len(by_key) == 4


def test_pre_run_hooks_see_launches(recorder, by_key):
    kernel, seen = recorder.kernel(), []
    kernel.add_pre_run_hook(lambda *a, **o: seen.append(a))
    for _ in range(2):
        kernel[(1,)](TENSORS[0], None, None, 5, 5, 0.5, WIDTH=16)
    assert len(seen) == 2


def test_who_notes_launches_gets_them(recorder, monkeypatch):
    kernel, seen = recorder.kernel(), []
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *a: seen.append((kernel, grid, a)))
    kernel[(2,)](1)
    assert seen == [(kernel, (2,), (1,))] and not recorder.launches


def test_nothing_is_kept_but_constants(recorder, monkeypatch):
    monkeypatch.setattr(launching, "MOST_LAUNCHES", 8)
    kernel, gone = recorder.kernel(), []
    for n in range(40):
        x = torch.zeros(4)
        gone.append(weakref.ref(x))
        kernel[(1,)](x, None, (x, 2), n, 5, 0.5, WIDTH=16)
        assert len(kernel._launches[0]) <= 8
    recorder.launches.clear()
    del x
    assert all(reference() is None for reference in gone)


def test_version_is_known():
    """A new version of Triton: compare its rules (triton.runtime.jit, its native_specialize_impl) with the key's, then
    name it in KNOWN_VERSIONS."""
    assert launching.WHY_NEVER is None
    assert launching.LAUNCH_OF_TRITON is not None
    assert list(inspect.signature(JITFunction.run).parameters) == ["self", "args", "grid", "warmup", "kwargs"]


def test_every_kernel_is_launched_so():
    modules = [
        importlib.import_module(package.name) for package in pkgutil.walk_packages(ops.__path__, "mvit3_kernels.ops.")
    ]
    found = {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    kernels = {f for f in found if f.__name__.endswith("_kernel")}
    assert len(kernels) > 50 and all(type(f) is launching.Kernel for f in kernels)
    assert not any(type(f) is launching.Kernel for f in found - kernels)
