"""Measurements that claims about a GPU rest on: ceilings of the device, single ops, whole networks; eager and compiled peers beside ours.

    python benchmarks/gpu_baselines.py ceilings
    python benchmarks/gpu_baselines.py ops
    python benchmarks/gpu_baselines.py memory --model mobilevitv3_s
    python benchmarks/gpu_baselines.py train --model mobilevitv3_s --batches 128 256
    python benchmarks/gpu_baselines.py infer --model mobilevitv3_s --batches 1 32 256

Candidates of one table run interleaved in one process, timed by CUDA events; a number is the median over rounds. Results are written
after every row (benchmarks/results/gpu_<piece>.json, for networks gpu_<piece>_<model>_b<batches>.json, and $OUT if that is set), so a run
that is cut short loses only its last row. `--device cpu --tiny` runs the same code in seconds, to test it; its times mean nothing.

Candidates whose name ends in "_graph" run as a CUDA graph (mvit3_kernels.cuda_graph and cuda_graph_step); torch.compile's max-autotune
records graphs of its own. Where launches decide, at batch 1, the peers have graphs too.

The eager and the compiled peer of a network are the same network in plain PyTorch modules (benchmarks/peers.py). For the names that timm
has too, timm's own network is a peer as well (--host timm), its candidates prefixed "timm_".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.peers import plain
from mvit3_kernels import ops
from mvit3_kernels.ops import BatchNorm, LayerNorm, Linear, batch_norm_act

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]
Row = dict[str, Any]


# Facts and results


def _output_of(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def facts(device: str) -> Row:
    found: Row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": os.environ.get("GIT_REVISION") or _output_of("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        answer = _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0") or ""
        found["nvidia_smi"] = dict(zip(fields.split(","), answer.split(", "), strict=False))
    else:
        found["device"] = platform.processor() or platform.machine()
    return found


class Report:
    """Rows of one piece; every new row is printed and the whole file replaced at once."""

    def __init__(self, piece: str, options: argparse.Namespace) -> None:
        self.piece, self.rows, self.facts = piece, [], facts(options.device)
        self.folders = [Path(options.out or RESULTS)]
        if os.environ.get("OUT"):
            self.folders.append(Path(os.environ["OUT"]))

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)
        text = json.dumps({"piece": self.piece, "facts": self.facts, "rows": self.rows}, indent=1)
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"gpu_{self.piece}.json.part"
            part.write_text(text)
            part.replace(folder / f"gpu_{self.piece}.json")


# Timing


def _elapsed(step: Step, times: int, device: str) -> float:
    """Seconds per call of `times` calls back to back."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - start) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def interleaved(steps: dict[str, Step], options: argparse.Namespace, budget: float = 0.05) -> dict[str, Row]:
    """Times warm steps in turns, each about `budget` seconds per round: median and range in seconds by name."""
    rounds = 2 if options.tiny else options.rounds
    repeats = {name: 1 if options.tiny else max(1, round(budget / _elapsed(step, 2, options.device))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_elapsed(step, repeats[name], options.device))
    return {name: {"seconds": statistics.median(t), "fastest": min(t), "slowest": max(t)} for name, t in times.items()}


def graphed(step: Step, options: argparse.Namespace) -> Step:
    """A replay of `step` as a CUDA graph: what the GPU takes, without Python's share."""
    if options.device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_memory(step: Step, device: str) -> int | None:
    """Bytes that a step takes on top of what is there before it. A CUDA graph's own pool (max-autotune) is not in it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# Ceilings


def ceilings(options: argparse.Namespace, report: Report) -> Row:
    """Copy bandwidth (bytes read plus written) and matrix rates on random data."""
    size, side = (2**20, 128) if options.tiny else (2**32, 8192)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source)}
    work = {"copy": ("bytes_per_s", 2 * size)}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
        a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))

        def product(a: Tensor = a, b: Tensor = b, tf32: bool = tf32) -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(a, b)

        steps[name], work[name] = product, ("flop_per_s", 2 * side**3)
    for step in steps.values():
        step()
    found = {}
    for name, timing in interleaved(steps, options).items():
        unit, amount = work[name]
        found[name] = amount / timing["seconds"]
        report.add(ceiling=name, **{unit: found[name]}, **timing)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


# Ops

# Maps of mobilevitv3_s at 256x256: (H, C) of the stem, the local representations, the head; (H, D, C) of the global representations.
MAPS = ((128, 16), (64, 64), (32, 128), (16, 256), (8, 320), (8, 640))
TRANSFORMERS = ((32, 144, 128), (16, 192, 256), (8, 240, 320))
# Depth-wise convolutions: (H, C, stride); inverted residuals: (H, inputs, expanded, outputs, stride); separable attention: (H, C), of
# mobilevitv3_100; global representations: (H, D, hidden, layers, heads), None for separable attention.
DEPTHWISE = ((128, 64, 1), (128, 128, 2), (64, 256, 1), (64, 256, 2), (32, 512, 2), (16, 1024, 2), (32, 128, 1), (16, 256, 1), (8, 320, 1))
INVERTED = (
    (128, 16, 64, 32, 1), (128, 32, 128, 64, 2), (64, 64, 256, 64, 1),
    (64, 64, 256, 128, 2), (32, 128, 512, 256, 2), (16, 256, 1024, 320, 2),
)  # fmt: skip
SEPARABLE = ((32, 128), (16, 192), (8, 256))
STACKS = ((16, 192, 384, 4, 4), (8, 240, 480, 3, 4), (16, 192, 384, 4, None), (8, 256, 512, 3, None))


class OpCase(NamedTuple):
    """A call to time: `call(*leaves)` gives y. Backward follows where the mode is "step"; "evaluation" uses running statistics."""

    op: str
    mode: str
    call: Callable[..., Tensor]
    leaves: list[Tensor]
    bytes: int
    backends: tuple[str, ...] = ("triton",)


def _kernels(op: str) -> Any:
    """The module of an op's Triton kernels; None where it has none."""
    if importlib.util.find_spec(f"mvit3_kernels.ops.{op}.triton") is None:
        return None
    return importlib.import_module(f"mvit3_kernels.ops.{op}.triton")


def _step(call: Callable[..., Tensor], leaves: list[Tensor], backward: bool = True) -> Step:
    if backward:
        dy = torch.randn_like(call(*leaves))
        return lambda: torch.autograd.grad(call(*leaves), leaves, dy)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    return forward


def _op_cases(batch: int, options: argparse.Namespace) -> Iterator[OpCase]:
    from mvit3_kernels.ops.batch_norm_act import triton as norm_kernels
    from mvit3_kernels.ops.feed_forward import triton as feed_forward_kernels
    from mvit3_kernels.ops.norm_linear import triton as norm_linear_kernels
    from mvit3_kernels.ops.patch_attention import triton as attention_kernels
    from mvit3_kernels.ops.pointwise_conv import triton as pointwise_kernels

    def feature_map(side: int, channels: int) -> Tensor:
        return torch.randn(batch, side, side, channels, device=options.device).to(torch.bfloat16).requires_grad_()

    def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [(torch.rand(shape, device=options.device) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]

    for side, channels in MAPS[-1:] if options.tiny else MAPS:
        x, (weight, bias), running = feature_map(side, channels), parameters((channels,), (channels,)), parameters((channels,), (channels,))
        for mode in ("step", "forward", "evaluation"):
            statistics = [t.detach() for t in running] if mode == "evaluation" else (None, None)

            def norm(x: Tensor, weight: Tensor, bias: Tensor, statistics: Any = statistics) -> Tensor:
                return batch_norm_act(x, BatchNorm(weight, bias, *statistics, statistics[0] is None), "silu")[0]

            moved = norm_kernels.bytes_moved(x, mode != "evaluation", False)
            yield OpCase("batch_norm_act", mode, norm, [x, weight, bias], sum(moved) if mode == "step" else moved[0])

    def fusion(a: Tensor, b: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.pointwise_fusion(a, b, weight, BatchNorm(scale, shift, None, None, True), "silu", b)[0]

    def conv(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.pointwise_conv(x, Linear(weight), BatchNorm(scale, shift, None, None, True), "silu")[0]

    def norm_linear(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.norm_linear(x, LayerNorm(scale, shift), Linear(weight, bias))

    def feed_forward(x: Tensor, scale: Tensor, shift: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return ops.feed_forward(x, LayerNorm(scale, shift), Linear(weight1, bias1), Linear(weight2, bias2))

    def attention(qkv: Tensor) -> Tensor:
        return ops.patch_attention(qkv, 4)

    for side, width, channels in TRANSFORMERS[-1:] if options.tiny else TRANSFORMERS:
        x, y, qkv = feature_map(side, width), feature_map(side, channels), feature_map(side, 3 * width)
        norm_of = {c: parameters((c,), (c,)) for c in (width, channels)}
        linear = parameters((3 * width, width), (3 * width,))
        fc = parameters((2 * width, width), (2 * width,), (width, 2 * width), (width,))
        mixing, expanding = parameters((channels, width + channels), (channels, width))
        moved_by_conv = pointwise_kernels.bytes_moved(x, None, channels, True, True, False)
        moved_by_fusion = pointwise_kernels.bytes_moved(x, y, channels, True, True, True)
        cases = (
            ("patch_attention", attention, [qkv], attention_kernels.bytes_moved(qkv)),
            ("norm_linear", norm_linear, [x, *norm_of[width], *linear], norm_linear_kernels.bytes_moved(x, 3 * width, False)),
            ("feed_forward", feed_forward, [x, *norm_of[width], *fc], feed_forward_kernels.bytes_moved(x, 2 * width, False)),
            ("pointwise_conv", conv, [x, expanding, *norm_of[channels]], moved_by_conv),
            ("pointwise_fusion", fusion, [x, y, mixing, *norm_of[channels]], moved_by_fusion),
        )
        for name, call, leaves, moved in cases:
            yield OpCase(name, "step", call, leaves, sum(moved))
            yield OpCase(name, "forward", call, leaves, moved[0])


def _spatial_cases(batch: int, options: argparse.Namespace) -> Iterator[OpCase]:
    """Depth-wise convolutions, inverted residuals, separable attention and stacks of layers."""
    device = options.device

    def feature_map(side: int, channels: int) -> Tensor:
        return torch.randn(batch, side, side, channels, device=device).to(torch.bfloat16).requires_grad_()

    def weight(outputs: int, *inputs: int) -> Tensor:
        return (torch.randn(outputs, *inputs, device=device) / math.prod(inputs) ** 0.5).requires_grad_()

    def affine(channels: int) -> list[Tensor]:
        return [torch.ones(channels, device=device).requires_grad_(), torch.zeros(channels, device=device).requires_grad_()]

    def norm(scale: Tensor, shift: Tensor, training: bool) -> BatchNorm:
        running = (None, None) if training else (shift.detach(), scale.detach())
        return BatchNorm(scale, shift, *running, training)

    def some(cases: tuple) -> tuple:
        return cases[-1:] if options.tiny else cases

    if kernels := _kernels("depthwise_conv"):
        for side, channels, stride in some(DEPTHWISE):
            x, leaves = feature_map(side, channels), [weight(channels, 1, 3, 3), *affine(channels)]
            for mode in ("step", "forward", "evaluation"):

                def filtered(x: Tensor, w: Tensor, *p: Tensor, stride: int = stride, training: bool = mode != "evaluation") -> Tensor:
                    return ops.depthwise_conv(x, w, norm(*p, training), "silu", stride)[0]

                moved = kernels.bytes_moved(x, stride, mode != "evaluation")
                yield OpCase("depthwise_conv", mode, filtered, [x, *leaves], sum(moved) if mode == "step" else moved[0])
    if kernels := _kernels("inverted_residual"):
        for side, inputs, wide, outputs, stride in some(INVERTED):
            parts = ((wide, inputs), (wide, 1, 3, 3), (outputs, wide))
            leaves = [feature_map(side, inputs), *(t for shape in parts for t in (weight(*shape), *affine(shape[0])))]
            for mode in ("step", "forward", "evaluation"):

                def block(x: Tensor, *p: Tensor, stride: int = stride, training: bool = mode != "evaluation") -> Tensor:
                    three = (ops.ConvNorm(p[i], norm(p[i + 1], p[i + 2], training)) for i in (0, 3, 6))
                    return ops.inverted_residual(x, *three, stride=stride)[0]

                x = leaves[0]
                if mode == "evaluation":  # read x, write y
                    moved = (x.numel() + x.numel() // inputs // stride**2 * outputs) * x.element_size()
                else:
                    both = kernels.bytes_moved(x, wide, outputs, stride, False)
                    moved = sum(both) if mode == "step" else both[0]
                yield OpCase("inverted_residual", mode, block, leaves, moved, ("free", "triton", "cuda"))
    if kernels := _kernels("separable_attention"):
        for side, width in some(SEPARABLE):
            leaves = [feature_map(side, width), *affine(width)]
            for outputs in (1 + 2 * width, width):
                leaves += [weight(outputs, width), affine(outputs)[1]]

            def attend(x: Tensor, scale: Tensor, shift: Tensor, *p: Tensor) -> Tensor:
                return ops.separable_attention(x, LayerNorm(scale, shift, per_sample=True), Linear(*p[:2]), Linear(*p[2:]))

            moved, alone = kernels.bytes_moved(leaves[0], True), kernels.bytes_moved(leaves[0], False)
            yield OpCase("separable_attention", "step", attend, leaves, sum(moved))
            yield OpCase("separable_attention", "evaluation", attend, leaves, alone[0])
    if kernels := _kernels("global_representation"):
        for side, width, hidden, layers, heads in some(STACKS):
            separate = heads is None
            shapes = ((1 + 2 * width if separate else 3 * width, width), (width, width), (hidden, width), (width, hidden))

            def layer(shapes: tuple = shapes, width: int = width, separate: bool = separate) -> ops.Layer:
                qkv, out, fc1, fc2 = (Linear(weight(*shape), affine(shape[0])[1]) for shape in shapes)
                norms = [LayerNorm(*affine(width), per_sample=separate) for _ in range(2)]
                return ops.Layer(norms[0], qkv, out, norms[1], fc1, fc2)

            stack, last = [layer() for _ in range(layers)], LayerNorm(*affine(width), per_sample=separate)

            def represent(x: Tensor, stack: list = stack, last: LayerNorm = last, heads: int | None = heads) -> Tensor:
                return ops.global_representation(x, stack, last, heads, (2, 2))

            x = feature_map(side, width)
            yield OpCase("global_representation", "evaluation", represent, [x], kernels.bytes_moved(x, layers), ("free", "triton"))


def _on(backend: str, function: Callable) -> Callable:
    """`function` with the ops on one backend; "free" leaves the choice to the library."""
    if backend == "free":
        return function

    def call(*args: Any) -> Any:
        with mvit3_kernels.backend(backend):
            return function(*args)

    return call


def time_ops(options: argparse.Namespace, report: Report) -> None:
    """Every op: what the GPU takes (graph replay), what a call takes, and bytes over time against the copy bandwidth."""
    bandwidth = ceilings(options, report)["copy"]
    gpu = options.device == "cuda"
    for batch in (2,) if options.tiny else (1, 128):
        for case in itertools.chain(_op_cases(batch, options), _spatial_cases(batch, options)):
            if options.ops and case.op not in options.ops:
                continue
            torch._dynamo.reset()
            compiled = torch.compile(case.call, dynamic=False, backend="inductor" if gpu else "eager")
            calls = {"eager": _on("reference", case.call), "compile": _on("reference", compiled)}
            for backend in case.backends if gpu else ("free",):
                calls["ours" if backend == case.backends[0] or not gpu else f"ours_{backend}"] = _on(backend, case.call)
            row, steps = {"op": case.op, "mode": case.mode, "shape": list(case.leaves[0].shape)}, {}
            for name, call in calls.items():
                try:
                    steps[name] = _step(call, case.leaves, case.mode == "step")
                    steps[name]()
                except Exception as failure:  # a forced backend may not take the call
                    steps.pop(name, None)
                    report.add(**row, candidate=name, failure=f"{type(failure).__name__}: {failure}"[:300])
            gpu_times = interleaved({name: graphed(step, options) for name, step in steps.items()}, options, 0.02)
            call_times = interleaved(steps, options, 0.02)
            for name in steps:
                seconds = gpu_times[name]["seconds"]
                report.add(
                    **row, candidate=name, gpu_us=seconds * 1e6, call_us=call_times[name]["seconds"] * 1e6,
                    bytes=case.bytes, gb_per_s=case.bytes / seconds / 1e9, of_copy_bandwidth=case.bytes / seconds / bandwidth,
                )  # fmt: skip


# Networks


def _networks(name: str, seed: int = 0) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Builders by host: "plain", of our network, which plain modules are made from; "timm", of timm's where it has one of that name."""

    def ours() -> nn.Module:
        torch.manual_seed(seed)
        # Dropout off: candidates then compute the same function. It would cost the peers more than ours.
        return mvit3_kernels.create_model(name, num_classes=1000, drop_rate=0.0, proj_drop_rate=0.0)

    yield "plain", ours
    with contextlib.suppress(ImportError):
        import timm

        if timm.is_model(name):

            def theirs() -> nn.Module:
                torch.manual_seed(seed)
                return timm.create_model(name, num_classes=1000)

            yield "timm", theirs


class Variant(NamedTuple):
    """A way to run a network; the names that begin with "ours" are our network, the others its plain peer."""

    name: str
    channels_last: bool
    mode: str | None = None  # of torch.compile
    graph: bool = False


VARIANTS = (
    Variant("eager_nchw", False),
    Variant("eager_channels_last", True),
    Variant("ours", True),
    Variant("ours_graph", True, graph=True),
    Variant("compile", True, "default"),
    Variant("ours_compile", True, "default"),
    Variant("max_autotune", True, "max-autotune"),
)
# At batch 1 a CUDA graph on both sides.
PEER_GRAPHS = (Variant("eager_graph", True, graph=True), Variant("compile_graph", True, "default", graph=True))


class Candidate:
    """A network, its input and one step: forward, or forward, backward and AdamW."""

    def __init__(self, build: Callable, variant: Variant, x: Tensor, options: argparse.Namespace) -> None:
        self.training, self.device = options.piece == "train", options.device
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = build().to(options.device, memory_format=layout).train(self.training)
        self.x, self.target = x.contiguous(memory_format=layout), torch.arange(x.shape[0], device=x.device) % 1000
        self.run = self.model
        if variant.mode is not None:
            settings = {"backend": "eager"} if options.tiny else {"mode": None if variant.mode == "default" else variant.mode}
            self.run = torch.compile(self.model, dynamic=False, **settings)
        if self.training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=options.device == "cuda")
        self.graph = None
        if variant.graph and self.training:
            self.graph = mvit3_kernels.cuda_graph_step(self.run, _loss, self.optimizer, autocast=torch.bfloat16)
        elif variant.graph:
            self.graph = mvit3_kernels.cuda_graph(self.run, autocast=torch.bfloat16)

    def forward(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
            return self.run(self.x)

    def step(self) -> None:
        if self.graph is not None:
            self.graph(*((self.x, self.target) if self.training else (self.x,)))
            return
        if not self.training:
            with torch.inference_mode():
                self.forward()
            return
        _loss(self.forward(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evidence(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What candidates are compared by: the logits and, in training, the gradients of all parameters."""
        if not self.training:
            with torch.inference_mode():
                return (self.graph(self.x) if self.graph is not None else self.forward(dtype)).float().flatten().clone()
        logits = self.forward(dtype)
        _loss(logits, self.target).backward()
        gradients = [p.grad.float().flatten() for p in self.model.parameters()]
        self.optimizer.zero_grad()
        return torch.cat([logits.detach().float().flatten(), *gradients])


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def networks(options: argparse.Namespace, report: Report) -> None:
    """Whole networks at 256x256 in bf16: images per second, peak memory and error of each candidate against float32 eager."""
    side = 64 if options.tiny else 256
    for batch in options.batches:
        x = torch.randn(batch, 3, side, side, device=options.device)
        hosts = dict(_networks(options.model))
        for host, build in hosts.items():
            if options.host not in (None, host):
                continue
            torch._dynamo.reset()
            prefix = "" if host == "plain" else f"{host}_"
            steps: dict[str, Step] = {}
            rows: dict[str, Row] = {}
            ours = hosts["plain"]
            peer = build if prefix else lambda build=build: plain(build())
            exact = {  # of ours too by plain modules
                name: Candidate(make, Variant("exact", True), x, options).evidence(torch.float32)
                for name, make in {"peer": peer, "ours": lambda: plain(ours())}.items()  # noqa: B023 -- called at once
            }
            graphs = PEER_GRAPHS if batch == 1 and options.piece == "infer" else ()
            for variant in (*VARIANTS, *graphs):
                name, is_ours = variant.name, variant.name.startswith("ours")
                if (options.candidates and name not in options.candidates) or (variant.graph and options.device == "cpu"):
                    continue
                name = name if is_ours else prefix + name
                row = {"model": options.model, "batch": batch, "candidate": name}
                try:
                    start = time.perf_counter()
                    candidate = Candidate(ours if is_ours else peer, variant, x, options)
                    row["error"] = _error(candidate.evidence(), exact["ours" if is_ours else "peer"])
                    for _ in range(1 if options.tiny else 4):
                        candidate.step()
                    row["first_call_s"] = time.perf_counter() - start
                    # The pool of a graph is taken while it is recorded.
                    row["peak_bytes"] = None if variant.graph else peak_memory(candidate.step, options.device)
                except Exception as failure:  # one peer that cannot run must not cost the others their numbers
                    report.add(**row, failure=f"{type(failure).__name__}: {failure}"[:500])
                    continue
                eager = rows.get(f"{prefix}eager_channels_last", row)
                # The compiled peers round in other places than eager does; three times its distance from float32 is a wrong result.
                row["correct"] = row["error"] <= 3 * eager["error"] + 1e-3
                steps[name], rows[name] = candidate.step, row
                # A first number at once, from this candidate alone; the interleaved ones follow when all candidates are warm.
                report.add(**row, images_per_s_alone=batch / interleaved({name: candidate.step}, options)[name]["seconds"])
            for name, timing in interleaved(steps, options, 0.1).items():
                report.add(interleaved=True, **rows[name], images_per_s=batch / timing["seconds"], **timing)


# What training keeps for backward


def _blocks(model: nn.Module, plain_peer: bool) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network in the order in which they run."""
    names = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp")
    for name, stage in zip(names, model if plain_peer else (getattr(model, n) for n in names), strict=False):
        if name.startswith("layer"):
            yield from ((f"{name}[{i}]", block) for i, block in enumerate(stage))
        else:
            yield name, stage


def saved_memory(options: argparse.Namespace, report: Report) -> None:
    """Bytes that each block keeps for backward, its input among them where it is needed: ours and plain eager PyTorch in bf16."""
    [batch] = options.batches
    side = 64 if options.tiny else 256
    [_, ours] = next(_networks(options.model))
    for candidate, model in {"ours": ours(), "eager": plain(ours())}.items():
        model = model.to(options.device, memory_format=torch.channels_last).train()
        held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        x = torch.randn(batch, 3, side, side, device=options.device).contiguous(memory_format=torch.channels_last)
        for name, block in _blocks(model, candidate == "eager"):
            kept: dict[int, int] = {}

            def pack(t: Tensor, kept: dict[int, int] = kept, held: set[int] = held) -> Tensor:
                storage = t.untyped_storage()
                if storage.data_ptr() not in held:
                    kept[storage.data_ptr()] = storage.nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(options.device, torch.bfloat16):
                y = block(x.requires_grad_())
            report.add(model=options.model, batch=batch, candidate=candidate, block=name, saved_bytes=sum(kept.values()))
            x = y.detach()


PIECES = {"ceilings": ceilings, "ops": time_ops, "memory": saved_memory, "train": networks, "infer": networks}


BATCHES = {"tiny": [2], "memory": [32], "train": [128, 256], "infer": [1, 32, 256], "ceilings": [], "ops": []}


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--model", default="mobilevitv3_s")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 128 256 to train, 1 32 256 to infer")
    parser.add_argument("--candidates", nargs="+", help="only these, e.g. eager_channels_last ours")
    parser.add_argument("--ops", nargs="+", help="ops: only these, e.g. depthwise_conv inverted_residual")
    parser.add_argument("--host", choices=("plain", "timm"), help="the peers' modules; default: both")
    parser.add_argument("--name", help="of the file of results, beside piece, model and batches")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes and nothing compiled for real: tests this script")
    parser.add_argument("--out", help="folder of the results, by default benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny tests the script without one")
    options.batches = options.batches or BATCHES["tiny" if options.tiny else options.piece]
    torch.manual_seed(0)
    piece = options.piece
    if PIECES[piece] in (networks, saved_memory):
        piece += f"_{options.model}_b" + "_".join(map(str, options.batches)) + (f"_{options.name}" if options.name else "")
    report = Report(piece, options)
    PIECES[options.piece](options, report)
    return report


if __name__ == "__main__":
    main()
