"""The command of the model: see `python -m benchmarks.gpu_model --help`."""

from __future__ import annotations

import argparse
import itertools
import time

import torch
import triton

import benchmarks.gpu_model
from benchmarks.gpu_model import configs, page, predict, record, single
from benchmarks.gpu_model.device import MULTIPROCESSORS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.gpu_model.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=predict.NETWORKS)
    parser.add_argument("--modes", nargs="+", default=predict.MODES, choices=predict.MODES)
    parser.add_argument("--batches", nargs="+", type=int, default=predict.BATCHES)
    parser.add_argument("--candidates", nargs="+", default=predict.CANDIDATES, choices=predict.CANDIDATES)
    parser.add_argument("--page", action="store_true", help="only write docs/gpu_model.md anew")
    parser.add_argument(
        "--configs", action="store_true", help="only print the predicted time of every configuration on offer"
    )
    parser.add_argument("--only", metavar="NAME", help="only print the launches of kernels with NAME in their names")
    options = parser.parse_args()
    steps = list(itertools.product(options.networks, options.modes, options.batches))
    if options.only:
        for network, mode, batch in steps:
            single.write(network, mode == "train", batch, options.only)
        return
    if options.configs:
        for network, mode, batch in steps:
            configs.write(network, mode == "train", batch)
        return
    if not options.page:
        run(options)
    page.write()


def run(options: argparse.Namespace) -> None:
    """Adds rows to what is recorded, in place of those of the same network, mode, batch and candidate."""
    rows = {identity(row): row for row in record.read(record.ROWS).get("rows", [])}
    kernels = {} if options.networks == predict.NETWORKS else record.read(record.KERNELS).get("kernels", {})
    kernels |= record.extension()
    for network in options.networks:
        for mode in options.modes:
            for batch in options.batches:
                for candidate in options.candidates:
                    start, training = time.perf_counter(), mode == "train"
                    if candidate == "ours":
                        made, launches = predict.ours(network, training, batch)
                        record.add(kernels, launches, made, f"{network} {mode} {batch}")
                    else:
                        made = predict.PEERS[candidate](network, training, batch)
                    row = predict.row(network, mode, batch, candidate, made)
                    rows[identity(row)] = row
                    seconds = time.perf_counter() - start
                    print(*identity(row), row["predicted_ms"], "ms", row["launches"], f"{seconds:.1f} s", flush=True)
        save(rows, kernels)


def save(rows: dict, kernels: dict) -> None:
    for key in record.changed(kernels):
        del kernels[key]
    head = {
        "what": "predicted, not measured",
        "device": f"NVIDIA H200, {MULTIPROCESSORS} multiprocessors",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    record.write(record.ROWS, head, "rows", sorted(rows.values(), key=lambda row: order(identity(row))))
    record.write(record.KERNELS, head, "kernels", kernels)


def identity(row: dict) -> tuple[str, str, int, str]:
    return row["network"], row["mode"], row["batch"], row["candidate"]


def order(at: tuple[str, str, int, str]) -> tuple:
    known = list(predict.NETWORKS)
    network = known.index(at[0]) if at[0] in known else len(known)
    return network, at[0], predict.MODES.index(at[1]), at[2], predict.CANDIDATES.index(at[3])


if __name__ == "__main__":
    main()
