"""Measurements that claims about a GPU rest on: ceilings of the device, single ops, whole networks; eager and compiled
peers beside ours.

    python benchmarks/gpu_baselines.py ceilings
    python benchmarks/gpu_baselines.py smoke
    python benchmarks/gpu_baselines.py ops
    python benchmarks/gpu_baselines.py profile --model mobilevitv3_s
    python benchmarks/gpu_baselines.py memory --model mobilevitv3_s
    python benchmarks/gpu_baselines.py train --model mobilevitv3_s --batches 128 256
    python benchmarks/gpu_baselines.py train --model deeplabv3_mobilevitv3_s --batches 16
    python benchmarks/gpu_baselines.py infer --model mobilevitv3_s --batches 1 32 256

Candidates of one table run interleaved in one process, timed by CUDA events; a number is the median over rounds.
Results are written after every row (benchmarks/results/gpu_<piece>.json, for networks
gpu_<piece>_<model>_b<batches>.json, and $OUT if that is set), so a run that is cut short loses only its last row.
`--device cpu --tiny` runs the same code in seconds, to test it; its times mean nothing.

Candidates whose name ends in "_graph" run as a CUDA graph (mvit3_kernels.cuda_graph and cuda_graph_step);
torch.compile's max-autotune records graphs of its own. Where launches decide, at batch 1, the peers have graphs too.

The eager and the compiled peer of a network are the same network in plain PyTorch modules (mvit3.bench.plain). For
the names that timm has too, timm's own network is a peer as well (--host timm), its candidates prefixed "timm_".
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import Report
from benchmarks.gpu_networks import networks, saved_memory
from benchmarks.gpu_ops import ceilings, time_ops
from benchmarks.gpu_smoke import smoke, tables

PIECES = {
    "ceilings": ceilings,
    "smoke": smoke,
    "ops": time_ops,
    "profile": tables,
    "memory": saved_memory,
    "train": networks,
    "infer": networks,
}
BATCHES = {"tiny": [2], "memory": [32], "profile": [256], "train": [128, 256], "infer": [1, 32, 256]}


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
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes and nothing compiled for real: tests this script"
    )
    parser.add_argument("--out", help="folder of the results, by default benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny tests the script without one")
    options.batches = options.batches or BATCHES.get("tiny" if options.tiny else options.piece, [])
    torch.manual_seed(0)
    piece = options.piece
    if PIECES[piece] in (networks, saved_memory):
        piece += (
            f"_{options.model}_b" + "_".join(map(str, options.batches)) + (f"_{options.name}" if options.name else "")
        )
    report = Report(piece, options.device, options.out)
    PIECES[options.piece](options, report)
    return report


if __name__ == "__main__":
    main()
