"""Rebuilds tests/data from a folder of golden values: `python tests/data/make.py GOLDEN_DIR`. Whole outputs keep every 8th channel."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def is_classifier(name: str) -> bool:
    return name.startswith("mobilevitv")


def recipe_options(entry: dict) -> dict[str, object]:
    """All that the published file of an entry of the manifest sets."""
    return entry["hyper_parameters"]


def main(golden: Path) -> None:
    for path in sorted(golden.glob("golden_*.npz")):
        kind = path.stem.removeprefix("golden_")
        if kind.startswith(("ssd", "deeplab", "pspnet")):
            continue
        data = {k: v[:, ::8] if v.ndim == 4 and v.shape[1] == 64 else v for k, v in np.load(path).items()}
        np.savez_compressed(HERE / "golden" / f"{kind}.npz", **data)
    keys = {p.stem: [entry[:2] for entry in json.loads(p.read_text())] for p in sorted((golden / "state_dicts").glob("*.json"))}
    with gzip.GzipFile(HERE / "golden" / "state_dicts.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(keys, separators=(",", ":")).encode())
    recipes = {
        name: recipe_options(entry) for name, entry in json.loads((golden / "manifest.json").read_text()).items() if is_classifier(name)
    }
    (HERE / "recipes.json").write_text(json.dumps(recipes, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
