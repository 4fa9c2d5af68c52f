"""Makes docs/overlays.png, the picture of the README, by `mvit3 predict` on validation scenes of the embedded digits:

python docs/overlays.py runs/digits_segmentation/best.pt runs/digits_detection/best.pt
"""

from __future__ import annotations

import argparse
import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

from mvit3.cli import main as mvit3
from mvit3.data.scenes import Scenes, load_scenes

SHOWN = 2  # scenes of a task
CANDIDATES = 60  # scenes of which they are chosen
SIDE = 288  # of a scene, pixels
GAP = 12
LIMIT = 100_000  # bytes


def smooth_scenes(scenes: Scenes) -> list[Image.Image]:
    """The scenes on the calmest ground, whose picture is a small file."""
    least = scenes.layout.objects[0] + 2  # some of the fuller ones
    found = [Image.fromarray(scenes[i].pixels) for i in range(CANDIDATES) if len(scenes[i].labels) >= least]
    return sorted(found, key=lambda image: len(encoded(image)))[:SHOWN]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def panels(segmentation: str, detection: str) -> list[Image.Image]:
    """Masks and boxes of scenes of the two tasks, as `mvit3 predict` writes them, in the width that is shown."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for task, checkpoint in (("segmentation", segmentation), ("detection", detection)):
            out = Path(folder, task)
            images = [Path(folder, f"{task}_{i}.png") for i in range(SHOWN)]
            for path, image in zip(images, smooth_scenes(load_scenes("val", task)), strict=True):
                image.save(path)
            arguments = ["predict", "--checkpoint", checkpoint, *map(str, images), "--output", str(out), "--quiet"]
            with redirect_stdout(io.StringIO()):
                failed = mvit3(arguments)
            if failed:
                raise SystemExit(failed)
            found += [Image.open(out / f"{path.stem}_overlay.png").convert("RGB") for path in images]
    return [one.resize((SIDE, one.height * SIDE // one.width), Image.Resampling.LANCZOS) for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("segmentation", help="checkpoint of the recipe digits_segmentation")
    parser.add_argument("detection", help="checkpoint of the recipe digits_detection")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("overlays.png"))
    arguments = parser.parse_args()
    shown = panels(arguments.segmentation, arguments.detection)
    width = len(shown) * (SIDE + GAP) - GAP
    page = Image.new("RGB", (width, max(one.height for one in shown)), "white")
    for i, one in enumerate(shown):
        page.paste(one, (i * (SIDE + GAP), 0))
    sizes = (encoded(page.quantize(colors, dither=Image.Dither.NONE)) for colors in (128, 96, 64, 48, 32, 24, 16))
    data = next((data for data in sizes if len(data) < LIMIT), None)
    if data is None:
        raise SystemExit(f"the picture does not fit into {LIMIT} bytes")
    arguments.output.write_bytes(data)
    print(f"{arguments.output}: {page.width}x{page.height}, {len(data)} bytes")


if __name__ == "__main__":
    main()
