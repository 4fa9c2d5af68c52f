"""Rebuilds tests/data from a folder of golden values: `python tests/data/make.py GOLDEN_DIR`. Whole outputs keep every
8th channel."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def recipe_options(manifest: dict[str, dict]) -> dict[str, dict[str, object]]:
    """All that the published files set, of the entries of the manifest that have one."""
    return {name: entry["hyper_parameters"] for name, entry in manifest.items() if "hyper_parameters" in entry}


def main(golden: Path) -> None:
    for path in sorted(golden.glob("golden_*.npz")):
        kind = path.stem.removeprefix("golden_")
        data = {k: v[:, ::8] if v.ndim == 4 and v.shape[1] == 64 else v for k, v in np.load(path).items()}
        np.savez_compressed(HERE / "golden" / f"{kind}.npz", **data)
    for path in sorted((golden / "dense").glob("golden_*.npz")):
        np.savez_compressed(HERE / "golden" / f"{path.stem.removeprefix('golden_')}.npz", **np.load(path))
    lists = [*(golden / "state_dicts").glob("*.json"), *(golden / "dense" / "state_dicts").glob("*.json")]
    keys = {p.stem: [entry[:2] for entry in json.loads(p.read_text())] for p in sorted(lists)}
    with gzip.GzipFile(HERE / "golden" / "state_dicts.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(keys, separators=(",", ":")).encode())
    recipes = recipe_options(json.loads((golden / "manifest.json").read_text()))
    (HERE / "recipes.json").write_text(json.dumps(recipes, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
