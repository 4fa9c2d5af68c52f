"""Measurements that claims about a GPU rest on: ceilings of the device, single ops, whole networks; eager and compiled peers beside ours.

    python benchmarks/gpu_baselines.py ceilings
    python benchmarks/gpu_baselines.py ops [--sweep]
    python benchmarks/gpu_baselines.py train --model mobilevitv3_s --batches 128 256
    python benchmarks/gpu_baselines.py infer --model mobilevitv3_s --batches 1 32 256

Candidates of one table run interleaved in one process, timed by CUDA events; a number is the median over rounds. Results are written
after every row (benchmarks/results/gpu_<piece>.json, for networks gpu_<piece>_<model>_b<batches>.json, and $OUT if that is set), so a run
that is cut short loses only its last row. `--device cpu --tiny` runs the same code in seconds, to test it; its times mean nothing.

The eager and the compiled peer of a network are the same network in plain PyTorch modules (benchmarks/peers.py). For the names that timm
has too, timm's own network stands beside it, its candidates prefixed "timm_".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.peers import plain
from mvit3_kernels.ops import BatchNorm, batch_norm_act

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

# Maps of mobilevitv3_s at 256x256: (H, C) of the stem, the local representations, the head.
MAPS = ((128, 16), (64, 64), (32, 128), (16, 256), (8, 320), (8, 640))
SWEEP = {"TILE_BYTES": (8192, 16384, 32768), "PROGRAMS_PER_SM": (1, 2, 4), "num_warps": (4, 8, 16), "BLOCK_C": (32, 64)}


def _op_steps(op: Callable, x: Tensor, norm: BatchNorm, dy: Tensor | None) -> Step:
    if dy is None:

        def forward() -> Any:
            with torch.no_grad():
                return op(x, norm)

        return forward
    return lambda: torch.autograd.grad(op(x, norm)[0], (x, norm.weight, norm.bias), dy)


def _on(backend: str, function: Callable) -> Callable:
    """`function` with the ops on one backend; "free" leaves the choice to the library."""
    if backend == "free":
        return function

    def call(*args: Any) -> Any:
        with mvit3_kernels.backend(backend):
            return function(*args)

    return call


def ops(options: argparse.Namespace, report: Report) -> None:
    """batch_norm_act: what the GPU takes (graph replay), what a call takes, and bytes over time against the copy bandwidth."""
    from mvit3_kernels.ops.batch_norm_act.triton import bytes_moved

    bandwidth = ceilings(options, report)["copy"]
    gpu = options.device == "cuda"
    ours = "triton" if gpu else "free"
    batches = (2,) if options.tiny else (1, 128)
    for batch in batches:
        for side, channels in MAPS[-1:] if options.tiny else MAPS:
            x = torch.randn(batch, side, side, channels, device=options.device).to(torch.bfloat16).requires_grad_()
            parameters = [torch.rand(channels, device=options.device) + 0.5 for _ in range(4)]
            for p in parameters[:2]:
                p.requires_grad_()
            # One pass of a training step, the forward pass alone in training, and evaluation.
            for mode, training, backward in (("step", True, True), ("forward", True, False), ("evaluation", False, False)):
                norm, dy = BatchNorm(*parameters, training), torch.randn_like(x) if backward else None

                def silu(x: Tensor, norm: BatchNorm) -> Any:
                    return batch_norm_act(x, norm, "silu")

                torch._dynamo.reset()
                compiled = torch.compile(silu, dynamic=False, backend="inductor" if gpu else "eager")
                operations = {"eager": _on("reference", silu), "compile": _on("reference", compiled), "ours": _on(ours, silu)}
                calls = {name: _op_steps(op, x, norm, dy) for name, op in operations.items()}
                for call in calls.values():
                    call()
                gpu_times = interleaved({name: graphed(call, options) for name, call in calls.items()}, options, 0.02)
                call_times = interleaved(calls, options, 0.02)
                moved = bytes_moved(x, training, False)
                size = sum(moved) if backward else moved[0]
                for name in calls:
                    seconds = gpu_times[name]["seconds"]
                    report.add(
                        op="batch_norm_act", mode=mode, shape=list(x.shape), candidate=name,
                        gpu_us=seconds * 1e6, call_us=call_times[name]["seconds"] * 1e6,
                        bytes=size, of_copy_bandwidth=size / seconds / bandwidth,
                    )  # fmt: skip
    if options.sweep and gpu:
        sweep(options, report, bandwidth)


def sweep(options: argparse.Namespace, report: Report, bandwidth: float) -> None:
    """The configuration of batch_norm_act's kernels, one constant changed at a time from the shipped ones."""
    from mvit3_kernels.ops.batch_norm_act import triton as kernels

    shipped = {name: getattr(kernels, name) for name in SWEEP if name != "num_warps"} | {"num_warps": kernels.LAUNCH_OPTIONS["num_warps"]}

    def configure(values: Row) -> None:
        for name, value in values.items():
            if name == "num_warps":
                kernels.LAUNCH_OPTIONS["num_warps"] = value
            else:
                setattr(kernels, name, value)

    variants = [shipped] + [{**shipped, name: value} for name, values in SWEEP.items() for value in values if value != shipped[name]]
    for side, channels in ((128, 16), (64, 64), (16, 256)):
        x = torch.randn(128, side, side, channels, device="cuda").bfloat16().requires_grad_()
        parameters = [(torch.rand(channels, device="cuda") + 0.5).requires_grad_() for _ in range(2)]
        steps = {}
        for variant in variants:
            configure(variant)
            call = _op_steps(
                lambda x, norm: batch_norm_act(x, norm, "silu"), x, BatchNorm(*parameters, None, None, True), torch.randn_like(x)
            )
            steps[json.dumps(variant)] = graphed(call, options)
        for variant, timing in interleaved(steps, options, 0.02).items():
            share = sum(kernels.bytes_moved(x, True, False)) / timing["seconds"] / bandwidth
            report.add(sweep=json.loads(variant), shape=list(x.shape), gpu_us=timing["seconds"] * 1e6, of_copy_bandwidth=share)
    configure(shipped)


# Networks


def _networks(name: str, seed: int = 0) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Builders of the same network with the same weights: ours, and timm's where it has one of that name."""

    def ours() -> nn.Module:
        torch.manual_seed(seed)
        # Dropout off: candidates then compute the same function. It would cost the peers more than ours.
        return mvit3_kernels.create_model(name, num_classes=1000, drop_rate=0.0, proj_drop_rate=0.0)

    yield "", ours
    with contextlib.suppress(ImportError):
        import timm

        if timm.is_model(name):

            def theirs() -> nn.Module:
                torch.manual_seed(seed)
                return timm.create_model(name, num_classes=1000)

            yield "timm_", theirs


# (name, channels_last, torch.compile's mode); the names that begin with "ours" are our network, the others its plain peer.
VARIANTS = (
    ("eager_nchw", False, None),
    ("eager_channels_last", True, None),
    ("ours", True, None),
    ("compile", True, "default"),
    ("ours_compile", True, "default"),
    ("max_autotune", True, "max-autotune"),
)


class Candidate:
    """A network, its input and one step: forward, or forward, backward and AdamW."""

    def __init__(self, build: Callable, channels_last: bool, mode: str | None, x: Tensor, options: argparse.Namespace) -> None:
        self.training, self.device = options.piece == "train", options.device
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = build().to(options.device, memory_format=layout).train(self.training)
        self.x, self.target = x.contiguous(memory_format=layout), torch.arange(x.shape[0], device=x.device) % 1000
        self.run = self.model
        if mode is not None:
            settings = {"backend": "eager"} if options.tiny else {"mode": None if mode == "default" else mode}
            self.run = torch.compile(self.model, dynamic=False, **settings)
        if self.training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=options.device == "cuda")

    def forward(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
            return self.run(self.x)

    def step(self) -> None:
        if not self.training:
            with torch.inference_mode():
                self.forward()
            return
        F.cross_entropy(self.forward().float(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evidence(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What candidates are compared by: the logits and, in training, the gradients of all parameters."""
        if not self.training:
            with torch.inference_mode():
                return self.forward(dtype).float().flatten().clone()
        logits = self.forward(dtype).float()
        F.cross_entropy(logits, self.target).backward()
        gradients = [p.grad.float().flatten() for p in self.model.parameters()]
        self.optimizer.zero_grad()
        return torch.cat([logits.detach().flatten(), *gradients])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def networks(options: argparse.Namespace, report: Report) -> None:
    """Whole networks at 256x256 in bf16: images per second, peak memory and error of each candidate against float32 eager."""
    side = 64 if options.tiny else 256
    for batch in options.batches:
        x = torch.randn(batch, 3, side, side, device=options.device)
        for prefix, build in _networks(options.model):
            torch._dynamo.reset()
            steps: dict[str, Step] = {}
            rows: dict[str, Row] = {}
            peer = build if prefix else lambda build=build: plain(build())
            exact = Candidate(peer, True, None, x, options).evidence(torch.float32)
            for name, channels_last, mode in VARIANTS:
                is_ours = name.startswith("ours")
                if (prefix and is_ours) or (options.candidates and name not in options.candidates):
                    continue
                name = prefix + name
                row = {"model": options.model, "batch": batch, "candidate": name}
                try:
                    start = time.perf_counter()
                    candidate = Candidate(build if is_ours else peer, channels_last, mode, x, options)
                    row["error"] = _error(candidate.evidence(), exact)
                    for _ in range(1 if options.tiny else 4):
                        candidate.step()
                    row["first_call_s"] = time.perf_counter() - start
                    row["peak_bytes"] = peak_memory(candidate.step, options.device)
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


PIECES = {"ceilings": ceilings, "ops": ops, "train": networks, "infer": networks}


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--model", default="mobilevitv3_s")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 128 256 to train, 1 32 256 to infer")
    parser.add_argument("--candidates", nargs="+", help="only these, e.g. eager_channels_last ours")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="ops: also vary the kernels' configuration")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes and nothing compiled for real: tests this script")
    parser.add_argument("--out", help="folder of the results, by default benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny tests the script without one")
    options.batches = options.batches or ([2] if options.tiny else [128, 256] if options.piece == "train" else [1, 32, 256])
    torch.manual_seed(0)
    piece = options.piece
    if PIECES[piece] is networks:
        piece += f"_{options.model}_b" + "_".join(map(str, options.batches))
    report = Report("sweep" if options.sweep else piece, options)
    PIECES[options.piece](options, report)
    return report


if __name__ == "__main__":
    main()
