"""Whole networks on the CPU, training steps and inference, beside the same networks in plain PyTorch (benchmarks/peers.py).

    python benchmarks/bench_models.py [--json] [--compile] [--threads 2] [--models mobilevitv3_s ...]

float32, 256x256, channels_last. A training step is forward, cross-entropy, backward and AdamW, with dropout off so that all candidates
compute the same function; their gradients are checked against each other before they are timed. `--compile` adds torch.compile of the
plain network (frozen for inference), which takes minutes to compile. Memory is what a first step (gradients
and optimiser state included) adds to the resident set at its peak.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain peers are a module of the benchmarks

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.common import interleaved, machine, peak_memory, table, write
from benchmarks.peers import plain

MODELS = ("mobilevitv3_s", "mobilevitv3_100", "mobilevitv3_xxs")
# (work, batch, side)
WORK = (("training", 8, 256), ("inference", 1, 256), ("inference", 32, 256))
BOUND = 2e-3  # of the gradients' norm: float32 through 50 layers, in another order

SETUP = """
import sys; sys.path.insert(0, {root!r})
import torch
from benchmarks.bench_models import build
torch.set_num_threads({threads})
build({candidate!r}, {name!r}, {work!r}, 2, 64).step()  # whatever is loaded at a first call; so small that it leaves no room behind
step = build({candidate!r}, {name!r}, {work!r}, {batch}, {side}).step
"""


class Candidate:
    """A network on one work: `step` does it once, `evidence` returns what candidates are compared by."""

    def __init__(self, network: nn.Module, work: str, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.network, self.training, self.x = network, work == "training", x
        self.run = run or network
        self.target = torch.arange(len(x)) % 1000
        if self.training:
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, foreach=True)

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
                return self.run(self.x).flatten()
        F.cross_entropy(self.run(self.x), self.target).backward()
        gradients = torch.cat([p.grad.flatten() for p in self.network.parameters()])
        self.optimizer.zero_grad()
        return gradients


def build(candidate: str, name: str, work: str, batch: int, side: int) -> Candidate:
    torch.manual_seed(0)
    network = mvit3_kernels.create_model(name, drop_rate=0.0, proj_drop_rate=0.0).train(work == "training")
    if candidate != "ours":
        network = plain(network)
    layout = torch.contiguous_format if candidate == "eager_nchw" else torch.channels_last
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=layout)
    network = network.to(memory_format=layout)
    if candidate != "compile":
        return Candidate(network, work, x)
    if work == "training":
        return Candidate(network, work, x, torch.compile(network, dynamic=False))
    import torch._inductor.config as inductor

    inductor.freezing = True
    return Candidate(network, work, x, torch.compile(network, dynamic=False))


def measure(name: str, work: str, batch: int, side: int, options: argparse.Namespace) -> dict[str, object]:
    torch._dynamo.reset()
    names = ["eager_nchw", "eager_channels_last", "ours", *(["compile"] if options.compile else [])]
    candidates = {c: build(c, name, work, batch, side) for c in names}
    truth = candidates["eager_channels_last"].evidence()
    error = float((candidates["ours"].evidence() - truth).norm() / truth.norm())
    if not error < BOUND:
        raise AssertionError(f"{name} {work}: ours differs from eager by {error:.1e} of the norm")
    rounds = options.rounds or (5 if work == "training" else 9)
    times = {c: t["median_ms"] for c, t in interleaved({c: k.step for c, k in candidates.items()}, rounds).items()}
    eager = min(times["eager_nchw"], times["eager_channels_last"])
    row: dict[str, object] = {"model": name, "work": work, "batch": batch, **{f"{c}_ms": t for c, t in times.items()}}
    row["against_eager"] = eager / times["ours"]
    if options.compile:
        row["against_compile"] = times["compile"] / times["ours"]
    if work == "training":
        for c in ("eager_channels_last", "ours"):
            root = str(Path(__file__).resolve().parents[1])
            setup = SETUP.format(root=root, threads=options.threads, candidate=c, name=name, work=work, batch=batch, side=side)
            row[f"{c}_mib"] = peak_memory(setup, "step()")
    return {**row, "error": f"{error:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/models_cpu.json")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the plain network too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--work", nargs="+", choices=("training", "inference"), default=("training", "inference"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    for name in options.models:
        for work, batch, side in WORK:
            if work in options.work:
                rows.append(measure(name, work, batch, side, options))
                print(table(rows[-1:]), flush=True)
                if options.json:  # row by row: a run that is cut short loses its last row only
                    with contextlib.suppress(OSError):
                        write("models", rows, facts, "models_cpu")


if __name__ == "__main__":
    main()
