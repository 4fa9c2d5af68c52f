"""Whole networks on the CPU, training steps and inference, beside the best that a user could run instead.

    python benchmarks/bench_models.py [--json] [--quick] [--dtype bfloat16] [--peers onnxruntime ...]
        [--models mobilevitv3_s ...] [--work training-8 ...]

float32, the same number of threads for all, one process, candidates in turns, medians. The peers are the same networks
in plain PyTorch (benchmarks/peers.py): eager in both layouts, torch.compile (frozen for inference; minutes to compile),
ONNX Runtime and OpenVINO. Those two are for inference only and optional (`pip install .[bench]`): one that is missing
is left out. What every candidate computes, outputs in inference and gradients in training, is compared with eager
before it is timed.

With `--dtype bfloat16`, inference alone: `fuse` with that dtype, beside float32 peers and beside eager autocast,
torch.compile under autocast and OpenVINO told to compute in bfloat16. Recorded in results/models_bfloat16_cpu.json.

A training step is forward, cross-entropy, backward and AdamW, with dropout off so that all compute the same function.
Its memory is what a first step (gradients and optimiser state included) adds to the resident set at its peak.
`<candidate>_built_ms` and `_first_ms` are what comes before the timed calls: making the candidate of a network
(exporting, loading, fusing) and its first call (compiling, packing weights). `--json` replaces the rows that it
measures and keeps the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain peers are a module of the benchmarks

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.common import RESULTS, interleaved, machine, peak_memory, timed, write
from benchmarks.peers import plain

ROOT = Path(__file__).resolve().parents[1]
BOUND = 2e-3  # of the norm of the output or of the gradients: float32 through 50 layers, in another order
HALF_BOUND = 7e-2  # the same for candidates that round to bfloat16: twice what eager autocast errs with fresh weights
Run = Callable[[Tensor], Tensor]


class Work(NamedTuple):
    name: str  # "training" or "inference"
    batch: int
    side: int
    models: tuple[str, ...]
    rounds: int
    burst: int = 1  # calls of a candidate in a row, in each round

    @property
    def training(self) -> bool:
        return self.name == "training"

    def __str__(self) -> str:
        return f"{self.name}-{self.batch}"


WORK = (
    Work("training", 8, 256, ("mobilevitv3_s", "mobilevitv3_100"), 7),
    Work("training", 32, 128, ("mobilevitv3_xxs",), 7),
    Work(
        "inference",
        1,
        256,
        ("mobilevitv3_s", "mobilevitv3_100", "mobilevitv3_xxs", "mobilevitv2_100", "mobilevit_s"),
        12,
        5,
    ),
    Work("inference", 32, 256, ("mobilevitv3_s", "mobilevitv3_100"), 7),
)


# What a candidate makes of a network in plain PyTorch and an example of its input, or of our network (the names that
# begin with "ours").
def as_it_is(network: nn.Module, _: Tensor) -> Run:
    return network


def fused(network: nn.Module, _: Tensor) -> Run:
    return mvit3_kernels.fuse(network, mode="inference")


def fused_bfloat16(network: nn.Module, _: Tensor) -> Run:
    return mvit3_kernels.fuse(network, mode="inference", dtype=torch.bfloat16)


def autocast(network: nn.Module, _: Tensor) -> Run:
    @torch.autocast("cpu", torch.bfloat16)
    def run(x: Tensor) -> Tensor:
        return network(x)

    return run


def compiled(network: nn.Module, _: Tensor) -> Run:
    import torch._inductor.config as inductor

    # Frozen, the C++ wrapper saves 6 % at batch 1. Autotuning picks the same products; the other layout is as fast.
    inductor.freezing = inductor.cpp_wrapper = not network.training
    return torch.compile(network, dynamic=False)


def compiled_autocast(network: nn.Module, x: Tensor) -> Run:
    return autocast(compiled(network, x), x)


def exported(network: nn.Module, x: Tensor, folder: str) -> str:
    """An ONNX file. The older exporter (dynamo=False) gave graphs that run as fast, within 2 % in both runtimes."""
    path = f"{folder}/network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), path, input_names=["x"], output_names=["y"], dynamo=True, verbose=False)
    return path


def onnxruntime(network: nn.Module, x: Tensor) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # as fast, and no thread spins while another candidate runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(exported(network, x, folder), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino(network: nn.Module, x: Tensor, precision: str = "f32") -> Run:
    import openvino as ov

    # One stream over all threads is the faster setting for one request at a time, at batch 32 too (THROUGHPUT gives it
    # one thread).
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = ov.Core().compile_model(exported(network, x, folder), "CPU", settings)
    assert model.get_property("INFERENCE_PRECISION_HINT") == getattr(ov.Type, precision)  # or it may choose bfloat16
    request = model.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def openvino_bfloat16(network: nn.Module, x: Tensor) -> Run:
    return openvino(network, x, "bf16")


CANDIDATES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager_nchw": as_it_is,
    "eager_channels_last": as_it_is,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ours": as_it_is,
    "ours_fused": fused,
}
# With --dtype bfloat16 these too; the names end with what they compute in.
HALF = {
    "eager_bfloat16": autocast,
    "compile_bfloat16": compiled_autocast,
    "openvino_bfloat16": openvino_bfloat16,
    "ours_fused_bfloat16": fused_bfloat16,
}
INFERENCE_ONLY = ("onnxruntime", "openvino", "ours_fused", *HALF)
# The layout of these candidates' input; the others take channels_last.
NCHW = ("eager_nchw", "onnxruntime", "openvino", "openvino_bfloat16")


def missing(candidate: str) -> str | None:
    """Why this candidate cannot run here, or None."""
    if candidate == "ours_fused":
        return None if hasattr(mvit3_kernels, "fuse") else "this version has no fuse()"
    runtime = candidate.removesuffix("_bfloat16")
    if runtime not in ("onnxruntime", "openvino"):
        return None
    absent = [m for m in (runtime, "onnx", "onnxscript") if importlib.util.find_spec(m) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Candidate:
    """A network on one work: `step` does it once, `evidence` returns what candidates are compared by."""

    def __init__(self, candidate: str, name: str, training: bool, batch: int, side: int) -> None:
        torch.manual_seed(0)
        network = mvit3_kernels.create_model(name, drop_rate=0.0, proj_drop_rate=0.0).train(training)
        layout = torch.contiguous_format if candidate in NCHW else torch.channels_last
        x = torch.randn(batch, 3, side, side).contiguous(memory_format=layout)
        network = (network if candidate.startswith("ours") else plain(network)).to(memory_format=layout)
        self.network, self.training, self.x, self.target = network, training, x, torch.arange(batch) % 1000
        with torch.set_grad_enabled(training):
            self.run = (CANDIDATES | HALF)[candidate](network, x)
        if training:
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        if not self.training:
            with torch.inference_mode():
                self.run(self.x)
            return
        F.cross_entropy(self.run(self.x), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evidence(self) -> Tensor:
        if not self.training:
            with torch.inference_mode():
                return self.run(self.x).flatten().clone()
        F.cross_entropy(self.run(self.x), self.target).backward()
        gradients = torch.cat([p.grad.flatten() for p in self.network.parameters()])
        self.optimizer.zero_grad()
        return gradients


def prepare(name: str, work: Work, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, object]]:
    """The candidates, ready to be timed after their results were compared, and the first columns of their row."""
    torch._dynamo.reset()
    row: dict[str, object] = {"model": name, "work": work.name, "batch": work.batch, "side": work.side}
    found, results = {}, {}
    for c in names:
        if work.training and c in INFERENCE_ONLY:
            continue
        built = timed(lambda c=c: found.update({c: Candidate(c, name, work.training, work.batch, work.side)}))
        first = timed(lambda c=c: results.update({c: found[c].evidence()}))
        row |= {f"{c}_built_ms": built, f"{c}_first_ms": first}
    truth = results[next(iter(results))]
    errors = {c: float((result.float() - truth).norm() / truth.norm()) for c, result in results.items()}
    if wrong := {c: error for c, error in errors.items() if not error < (HALF_BOUND if c in HALF else BOUND)}:
        raise AssertionError(f"{name} {work.name}: results differ by too much of the norm: {wrong}")
    halves = {"bfloat16_error": max(errors[c] for c in errors if c in HALF)} if HALF.keys() & errors.keys() else {}
    return found, {**row, "error": max(errors[c] for c in errors if c not in HALF), **halves}


def measure(work: Work, found: dict[str, Candidate], quick: bool) -> dict[str, object]:
    rounds = max(3, work.rounds // 3) if quick else work.rounds
    times = interleaved({c: candidate.step for c, candidate in found.items()}, rounds, warmup=1, burst=work.burst)
    return {f"{c}_ms": t["median_ms"] for c, t in times.items()}


MEMORY = """
import sys; sys.path.insert(0, {root!r})
import torch
from benchmarks.bench_models import Candidate
torch.set_num_threads({threads})
# whatever is loaded at a first call; so small that it leaves no room behind
Candidate({candidate!r}, {name!r}, True, 2, 64).step()
step = Candidate({candidate!r}, {name!r}, True, {batch}, {side}).step
"""


def step_memory(candidate: str, name: str, work: Work) -> float:
    root, threads = str(ROOT), torch.get_num_threads()
    return peak_memory(
        MEMORY.format(root=root, threads=threads, candidate=candidate, name=name, batch=work.batch, side=work.side),
        "step()",
    )


def with_ratios(row: dict[str, object]) -> dict[str, object]:
    """Adds the fastest peer, the faster of ours, and how many times as fast that is; of bfloat16, how many times as
    fast as the fastest peer of each dtype `fuse` is."""
    times = {c: row[f"{c}_ms"] for c in CANDIDATES if f"{c}_ms" in row}
    if "ours_fused_bfloat16_ms" in row:
        halves = {c: row[f"{c}_ms"] for c in HALF if f"{c}_ms" in row}
        ours = halves.pop("ours_fused_bfloat16")
        for dtype, peers in (
            ("float32", {c: t for c, t in times.items() if not c.startswith("ours")}),
            ("bfloat16", halves),
        ):
            if peers:
                best = min(peers, key=peers.get)
                row = {**row, f"best_{dtype}_peer": best, f"{dtype}_ratio": peers[best] / ours}
        return row
    peers, ours = ({c: t for c, t in times.items() if c.startswith("ours") == mine} for mine in (False, True))
    if not (peers and ours):
        return row
    peer, best = min(peers, key=peers.get), min(ours, key=ours.get)
    return {**row, "best_peer": peer, "best_ours": best, "ratio": peers[peer] / ours[best]}


def record(rows: list[dict[str, object]], facts: dict[str, object], name: str) -> None:
    """Writes the rows to results/<name>.json, beside the other rows there of what this benchmark still measures."""

    def key(row: dict[str, object]) -> tuple[object, ...]:
        return tuple(row.get(name) for name in ("model", "work", "batch", "side"))

    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    wanted = {(name, work.name, work.batch, work.side) for work in WORK for name in work.models}
    rest = wanted - {key(row) for row in rows}
    write("models", [*(row for row in kept if key(row) in rest), *rows], facts, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="record in results/models_cpu.json, or that of the dtype")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds, no memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=[c for c in CANDIDATES | HALF if not c.startswith("ours")],
        help="default: all that are installed",
    )
    parser.add_argument("--models", nargs="+", help="default: those of each work")
    parser.add_argument("--work", nargs="+", choices=[str(w) for w in WORK], default=[str(w) for w in WORK])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    half = options.dtype == "bfloat16"
    candidates = CANDIDATES | HALF if half else CANDIDATES
    names = [c for c in candidates if c.startswith("ours") or options.peers is None or c in options.peers]
    absent = {c: reason for c in names if (reason := missing(c))}
    facts = machine()
    facts["peers"] = {
        c: importlib.metadata.version(c) for c in ("onnxruntime", "openvino") if c in names and c not in absent
    }
    print(
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        *(f"without {c}: {reason}" for c, reason in absent.items()),
        sep="\n",
    )
    rows: list[dict[str, object]] = []
    for work in WORK:
        for name in work.models if str(work) in options.work and not (half and work.training) else ():
            if options.models and name not in options.models:
                continue
            found, row = prepare(name, work, [c for c in names if c not in absent])
            row |= measure(work, found, options.quick)
            del found
            if work.training and not options.quick:
                row |= {f"{c}_mib": step_memory(c, name, work) for c in ("eager_channels_last", "ours")}
            rows.append({**with_ratios(row), "revision": facts["revision"]})
            print(
                *(
                    f"{column}: {value:.4g}" if isinstance(value, float) else f"{column}: {value}"
                    for column, value in rows[-1].items()
                ),
                sep=", ",
            )
            if options.json:  # row by row: a run that is cut short loses its last row only
                record(rows[-1:], facts, "models_bfloat16_cpu" if half else "models_cpu")


if __name__ == "__main__":
    main()
