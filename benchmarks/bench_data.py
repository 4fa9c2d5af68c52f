"""Images per second and core of each decoder, alone and with the recipes' whole pipelines, and of loading processes
together.

    python benchmarks/bench_data.py --json

Images are generated (make_images.py), 500x375 unless told otherwise; one thread per candidate, candidates in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from benchmarks import common, make_images
from mvit3 import recipes
from mvit3.config import TrainConfig
from mvit3.data import loaders
from mvit3.data.decode import Decoder
from mvit3.data.transforms import EvaluationTransform, TrainTransform

# crops and flips, by OpenCV's resizing; RandAugment and erasing, by PIL's
RECIPES = ("mobilevitv3_s", "mobilevitv3_100")
DECODERS = ("pil", "cv2", "simplejpeg")


def load(recipe: str, **data: object) -> TrainConfig:
    """A recipe with other values in its section data."""
    values = yaml.safe_load(recipes.path(recipe).read_text())
    values["data"] |= data
    return TrainConfig.from_dict(values)


def pipelines(encoded: Sequence[bytes], decoder: str) -> dict[str, Callable[[], object]]:
    """What is timed with a decoder, each on all images."""
    alone = Decoder(decoder)
    found: dict[str, Callable[[], object]] = {"decode": lambda: [alone.decode(data) for data in encoded]}
    for recipe in RECIPES:
        config = load(recipe, decoder=decoder)
        for scaled in (False, True) if recipe == RECIPES[0] else (False,):
            data = load(recipe, decoder=decoder, scaled_decoding=scaled).data
            train, name = TrainTransform(data, config.augment), f"train {recipe}{' scaled' if scaled else ''}"
            found[name] = lambda train=train: [train(data, 256, (0, 0, i)) for i, data in enumerate(encoded)]
        evaluation = EvaluationTransform(config.data)
        found[f"evaluate {recipe}"] = lambda evaluation=evaluation: [evaluation.pixels(data) for data in encoded]
    return found


def loader_row(root: Path, recipe: str, workers: int, decoder: str, device: str) -> dict[str, object]:
    """Images per second of one epoch after a first one that starts the loading processes; the consumer only takes
    batches."""
    train = loaders(load(recipe, root=str(root), workers=workers, batch_size=32, decoder=decoder), device=device).train
    for epoch in range(2):
        started = time.perf_counter()
        count = sum(len(labels) for _, labels in train.epoch(epoch))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {
        "decoder": decoder,
        "pipeline": f"loader {recipe} to {device}",
        "processes": workers,
        "images_per_s": round(count / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", action="store_true", help="write results/data_cpu.json, or data_gpu.json where there is a GPU"
    )
    parser.add_argument(
        "--images", type=int, default=320, help="generated images; 64 of them time the single pipelines"
    )
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="loading processes")
    options = parser.parse_args()
    facts = {**common.machine(), "image": f"{options.width}x{options.height}", "quality": 90}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images.make(root, options.images, 10, options.width, options.height)
        encoded = [path.read_bytes() for path in sorted((root / "train").rglob("*.jpg"))[:64]]
        decoders = [name for name in DECODERS if name == "pil" or importlib.util.find_spec(name)]
        candidates = {(name, what): run for name in decoders for what, run in pipelines(encoded, name).items()}
        for (decoder, what), found in common.interleaved(candidates, rounds=options.rounds, warmup=1).items():
            rate = len(encoded) / found["median_ms"] * 1e3
            rows.append({"decoder": decoder, "pipeline": what, "processes": 1, "images_per_s": round(rate, 1)})
        places = [("auto", "cpu")] + [(decoder, "cuda") for decoder in ("auto", "nvjpeg") if torch.cuda.is_available()]
        rows += [
            loader_row(root, recipe, workers, *place)
            for place in places
            for recipe in RECIPES
            for workers in options.workers
        ]
    print(common.table(rows))
    if options.json:
        print(common.write("data", rows, facts, "data_gpu" if torch.cuda.is_available() else "data_cpu"))


if __name__ == "__main__":
    main()
