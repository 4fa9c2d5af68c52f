"""Training as `mvit3 train` does it, with its engine, loader and recipe, on generated JPEGs: images per second with
reference ops and with fused ops, in turns, in one run; what clipping, the optimiser and the average take of a step; how
long a step waits for data.

    python benchmarks/bench_training.py --json                    on the CPU
    python benchmarks/bench_training.py --device cuda --json      on a GPU: eager, torch.compile, fused, fused as a CUDA
    graph; bf16

Each candidate trains `steps` steps after a warm-up turn (compiling, recording), a turn being an epoch of a fifth of
them. On a GPU the peak is that of PyTorch's allocator over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from benchmarks import common, make_images
from mvit3 import recipes
from mvit3.config import TrainConfig
from mvit3.data import loaders
from mvit3.distributed import World
from mvit3.runtime import autocast, prepare, use_ops
from mvit3.trainer import Trainer

TURNS = 5
# Options of `run` that make a candidate.
CPU = {"reference": {"ops": "reference"}, "fused": {"ops": "fused"}}
GPU = {
    "eager": {"ops": "reference"},
    "compile": {"ops": "reference", "compile": True},
    "fused": {"ops": "fused"},
    "fused_graph": {"ops": "fused", "cuda_graph": True},
}


class Candidate:
    """A training whose turns are timed."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        images = loaders(config, seed=0, device=device)
        self.trainer, self.device = Trainer(config, images, World(device)), device
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self.peak = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def turn(self) -> None:
        """An epoch of steps, without evaluation."""
        progress = self.trainer.progress
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        progress.wait_seconds, start = 0.0, self._now()
        self.trainer.train_epoch()
        self.seconds.append(self._now() - start)
        self.waited.append(progress.wait_seconds)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        progress.epoch, progress.batch = progress.epoch + 1, 0

    def parts(self, rounds: int = 20) -> dict[str, float]:
        """Median milliseconds of what a step does outside the network, on gradients of a real batch."""
        trainer = self.trainer
        images, labels = next(trainer.loaders.train.epoch(trainer.progress.epoch))
        with use_ops(trainer.config.run.ops), autocast(trainer.config.run, self.device):
            loss = F.cross_entropy(trainer.model(images), labels)
        loss.backward()

        def clip() -> None:
            norm = nn.utils.get_total_norm([p.grad for p in trainer.parameters], foreach=True)
            nn.utils.clip_grads_with_norm_(trainer.parameters, 10.0, norm, foreach=True)

        def median(run: Callable[[], object]) -> float:
            times = []
            for _ in range(rounds):
                start = self._now()
                run()
                times.append((self._now() - start) * 1e3)
            return statistics.median(times)

        found = {"clip": median(clip), "optimizer": median(trainer.optimizer.step)}
        if trainer.ema:
            found["ema"] = median(trainer.ema.update)
        trainer.optimizer.zero_grad()
        return found

    def row(self, name: str) -> dict[str, object]:
        seconds, waited = self.seconds[1:], self.waited[1:]  # without the warm-up
        steps, batch = self.trainer.steps_per_epoch, self.trainer.effective_batch
        step_ms = statistics.median(seconds) / steps * 1e3
        parts = self.parts()
        config = self.trainer.config
        return {
            "candidate": name,
            "model": config.model.name,
            "batch": batch,
            "side": config.sampler.size,
            "precision": config.run.amp,
            "steps": steps * len(seconds),
            "images_per_s": round(batch / step_ms * 1e3, 1),
            "step_ms": round(step_ms, 2),
            "data_wait": round(sum(waited) / sum(seconds), 4),
            **{f"{part}_share": round(ms / step_ms, 4) for part, ms in parts.items()},
            "first_turn_s": round(self.seconds[0], 1),
            "peak_mib": round(self.peak / 2**20) if self.peak else None,
        }


def measure(candidates: dict[str, Candidate]) -> list[dict[str, object]]:
    """The rows of candidates that take turns."""
    for _ in range(1 + TURNS):
        for candidate in candidates.values():
            candidate.turn()
    return [candidate.row(name) for name, candidate in candidates.items()]


def configure(options: argparse.Namespace, root: str, run: dict[str, object]) -> TrainConfig:
    """The network's recipe at one size, on the generated images."""
    values = yaml.safe_load(recipes.path(options.model).read_text())
    values["data"] |= {
        "root": root,
        "batch_size": options.batch,
        "workers": options.workers,
        "decoder": options.decoder,
    }
    values["data"]["limit_train"] = max(1, options.steps // TURNS) * options.batch
    values["sampler"] = {"size": options.side}
    values["run"] = {
        **values["run"],
        "device": options.device,
        "amp": options.amp,
        "resume": "never",
        "threads": options.threads,
        **run,
    }
    config = TrainConfig.from_dict(values)
    return replace(config, schedule=replace(config.schedule, epochs=TURNS + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", action="store_true", help="write results/training_cpu.json, or results/training_gpu.json"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="mobilevitv3_s", help="a recipe's name")
    parser.add_argument("--batch", type=int, help="default: 8 on a CPU, 256 on a GPU")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, help="of each candidate; default: 20 on a CPU, 200 on a GPU")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), help="default: none on a CPU, bf16 on a GPU")
    parser.add_argument("--candidates", nargs="+", help=f"of {', '.join(CPU)}; on a GPU of {', '.join(GPU)}")
    parser.add_argument(
        "--images", type=int, default=512, help="generated JPEGs of 500x375; used again until the steps are done"
    )
    parser.add_argument("--workers", type=int, default=-1, help="loading processes; -1: as the application chooses")
    parser.add_argument("--decoder", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.batch = options.batch or (256 if on_gpu else 8)
    options.steps = options.steps or (200 if on_gpu else 20)
    options.amp = options.amp or ("bf16" if on_gpu else "none")
    kinds = GPU if on_gpu else CPU
    names = options.candidates or list(kinds)
    if unknown := set(names) - set(kinds):
        parser.error(f"there is no candidate {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    facts = common.machine()
    if on_gpu:
        facts["gpu"] = torch.cuda.get_device_name()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder), options)

        def build(name: str) -> Candidate:
            config = configure(options, folder, kinds[name])
            return Candidate(config, prepare(config.run))

        if on_gpu:  # one after the other, so that a peak is one candidate's
            rows = [measure({name: build(name)})[0] for name in names]
        else:  # in turns, so that the machine's noise hits all alike
            rows = measure({name: build(name) for name in names})
    for row in rows:
        row["ratio"] = round(row["images_per_s"] / rows[0]["images_per_s"], 3)
        row["revision"] = facts["revision"]
    print(common.table(rows))
    if options.json:
        print(common.write("training", rows, facts, f"training_{'gpu' if on_gpu else 'cpu'}"))


def _make(folder: Path, options: argparse.Namespace) -> None:
    """Generated images, and links to them until there are enough for a turn."""
    make_images.make(folder, options.images, 10, 500, 375)
    files = sorted((folder / "train").rglob("*.jpg"))
    needed = max(1, options.steps // TURNS) * options.batch
    for i in range(len(files), needed):
        source = files[i % len(files)]
        source.with_name(f"again_{i:06d}.jpg").hardlink_to(source)


if __name__ == "__main__":
    main()
