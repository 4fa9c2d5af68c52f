"""Networks of timm and transformers, fused by one line, beside the best that their users could run instead.

    python benchmarks/bench_hosts.py [--json] [--quick] [--networks timm/mobilevit_s ...] [--modes inference ...]

float32 at 256 pixels on two threads, candidates in turns as in bench_models.py, whose peers these are: the host itself
in both layouts, under torch.compile, in ONNX Runtime and in OpenVINO. `fused` is `fuse(host)`, in training
`fuse(host, mode="training")`, and `own` this library's network of that name. Dropouts are off. The host's results are
compared with all but those of `own`, which has other weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.bench_models import BOUND, CANDIDATES, INFERENCE_ONLY, NCHW, Run, Work, missing
from benchmarks.bench_models import Candidate as Network
from benchmarks.common import Row, interleaved, line, machine, write

SIDE = 256
WORK = (Work("inference", 1, SIDE, (), 12, 5), Work("training", 8, SIDE, (), 4, 2))
PEERS = ("eager_nchw", "eager_channels_last", "compile", "onnxruntime", "openvino")


class Logits(nn.Module):
    """A classifier of transformers as one that returns its logits."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x).logits


def timm_network(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def mobilevit_small() -> nn.Module:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    config = MobileViTConfig(
        num_labels=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0
    )
    network = MobileViTForImageClassification(config)
    for module in network.modules():  # its own initial weights are so small that activations become denormal
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return Logits(network)


# Each host, and the name of this library's network.
HOSTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm/mobilevit_s": (lambda: timm_network("mobilevit_s"), "mobilevit_s"),
    "timm/mobilevitv2_100": (lambda: timm_network("mobilevitv2_100"), "mobilevitv2_100"),
    "transformers/mobilevit-small": (mobilevit_small, "mobilevit_s"),
}


class Candidate(Network):
    """A host, or what stands beside it, on one work."""

    def __init__(self, candidate: str, host: str, work: Work) -> None:
        torch.manual_seed(0)
        make, own = HOSTS[host]
        mode, layout = work.name, torch.contiguous_format if candidate in NCHW else torch.channels_last
        network = make()
        if candidate == "own":
            network = mvit3_kernels.create_model(own, drop_rate=0.0, proj_drop_rate=0.0)
        network = network.train(work.training).to(memory_format=layout)
        self.network, self.training = network, work.training
        self.x = torch.randn(work.batch, 3, SIDE, SIDE).contiguous(memory_format=layout)
        self.target = torch.arange(work.batch)
        with torch.set_grad_enabled(self.training):
            self.run = self._prepared(candidate, mode)
        if self.training:
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def _prepared(self, candidate: str, mode: str) -> Run:
        if candidate in PEERS:
            return CANDIDATES[candidate](self.network, self.x)
        if candidate == "own" and self.training:
            return self.network
        return mvit3_kernels.fuse(self.network, mode=mode)


def measure(host: str, work: Work, quick: bool) -> Row:
    torch._dynamo.reset()
    names = [c for c in PEERS if missing(c) is None and not (work.training and c in INFERENCE_ONLY)] + ["fused", "own"]
    found = {c: Candidate(c, host, work) for c in names}
    results = {c: candidate.evidence() for c, candidate in found.items()}
    truth = results["eager_nchw"]
    errors = {c: float((result - truth).norm() / truth.norm()) for c, result in results.items() if c != "own"}
    if wrong := {c: error for c, error in errors.items() if not error < BOUND}:
        raise AssertionError(f"{host} {work}: results differ by too much of the norm: {wrong}")
    rounds = max(3, work.rounds // 3) if quick else work.rounds
    times = interleaved({c: one.step for c, one in found.items()}, rounds, warmup=1, burst=work.burst)
    times = {c: t["median_ms"] for c, t in times.items()}
    best = {kind: min(t for c, t in times.items() if c.startswith(kind)) for kind in ("eager", "compile")}
    runtimes = [t for c, t in times.items() if c in ("onnxruntime", "openvino")]
    ratios = {"against_eager": best["eager"], "against_compile": best["compile"], "against_own": times["own"]}
    ratios |= {"against_runtimes": min(runtimes)} if runtimes else {}
    row: Row = {"network": host, "work": work.name, "batch": work.batch, "side": SIDE, "error": max(errors.values())}
    return row | {f"{c}_ms": t for c, t in times.items()} | {c: t / times["fused"] for c, t in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="record in results/hosts_cpu.json, when all are measured")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--modes", nargs="+", choices=[w.name for w in WORK], default=[w.name for w in WORK])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for work in WORK:
        for host in options.networks if work.name in options.modes else ():
            rows.append(measure(host, work, options.quick))
            print(line(rows[-1]), flush=True)
    if options.json and len(rows) == len(WORK) * len(HOSTS):
        write("hosts", rows, machine(), "hosts_cpu")


if __name__ == "__main__":
    main()
