"""Networks of timm and transformers, fused by one line, beside the best that their users could run instead.

    python benchmarks/bench_hosts.py [--json] [--quick] [--networks timm/mobilevit_s ...] [--modes inference ...]

float32 at 256 pixels on two threads, candidates in turns as in bench_models.py, whose peers these are: the host itself
in both layouts, under torch.compile, in ONNX Runtime and in OpenVINO. `fused` is `fuse(host)`, in training
`fuse(host, mode="training")`, and `own` this library's network of that name. Dropouts are off. All but
`own`, which has other weights, are compared with the host in float64.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Row, line, write
from mvit3.bench.candidates import Candidate, Subject, Work, missing, prepare
from mvit3.bench.measure import interleaved, machine

SIDE = 256
WORK = (Work("inference", 1, SIDE, 12, 5), Work("training", 8, SIDE, 4, 2))
PEERS = ("eager_nchw", "eager_channels_last", "compile", "onnxruntime", "openvino")
# Each host, and the name of this library's network.
HOSTS = {
    "timm/mobilevit_s": "mobilevit_s",
    "timm/mobilevitv2_100": "mobilevitv2_100",
    "transformers/mobilevit-small": "mobilevit_s",
}


def measure(host: str, work: Work, quick: bool) -> Row:
    package, name = host.split("/")
    names = [c for c in PEERS if missing(c) is None]
    found = prepare(Subject(name, package), work, [*names, "ours_fused"]).all_right()
    ready = {"fused" if c == "ours_fused" else c: candidate for c, candidate in found.right.items()}
    ready["own"] = Candidate("ours" if work.training else "ours_fused", Subject(HOSTS[host]), work)
    rounds = max(3, work.rounds // 3) if quick else work.rounds
    times = interleaved({c: one.step for c, one in ready.items()}, rounds, warmup=1, burst=work.burst)
    times = {c: t["median_ms"] for c, t in times.items()}
    best = {kind: min(t for c, t in times.items() if c.startswith(kind)) for kind in ("eager", "compile")}
    runtimes = [t for c, t in times.items() if c in ("onnxruntime", "openvino")]
    ratios = {"against_eager": best["eager"], "against_compile": best["compile"], "against_own": times["own"]}
    ratios |= {"against_runtimes": min(runtimes)} if runtimes else {}
    row: Row = {
        "network": host,
        "work": work.name,
        "batch": work.batch,
        "side": SIDE,
        "error": max(found.errors.values()),
    }
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
