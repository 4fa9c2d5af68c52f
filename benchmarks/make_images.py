"""Makes a folder of generated JPEGs for training, one folder per class: coloured noise, each class with its own colours
and texture.

    python benchmarks/make_images.py --output images --images 2000

One fifth of each class is the validation part. Same arguments, same files.
"""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw(label: int, classes: int, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """An image of a class: stripes of a direction and two colours that its class decides, of random phase, over smooth
    and fine noise."""
    angle = np.pi * label / classes + rng.normal(0, 0.05)
    wavelength = 0.05 * max(width, height) * (1 + label % 3) * rng.uniform(0.8, 1.25)
    y, x = np.mgrid[:height, :width]
    wave = 0.5 + 0.5 * np.sin(
        2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + rng.uniform(0, 2 * np.pi)
    )
    hues = label / classes, (label / classes + 0.35) % 1
    low, high = (np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.9), rng.uniform(0.5, 1))) for hue in hues)
    pixels = low + (high - low) * wave[..., None]
    coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = 0.7 * pixels * 255 + 0.3 * np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make(output: Path, images: int, classes: int, width: int, height: int, quality: int = 90, seed: int = 0) -> None:
    """Writes output/{train,val}/class_NN/NNNNNN.jpg; every fifth image of a class goes to val."""
    for i in range(images):
        label, number = i % classes, i // classes
        part = "val" if number % 5 == 4 else "train"
        folder = output / part / f"class_{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        image = draw(label, classes, width, height, np.random.default_rng((seed, i)))
        image.save(folder / f"{number:06d}.jpg", quality=quality)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets train/ and val/")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--quality", type=int, default=90, help="of JPEG")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    make(options.output, options.images, options.classes, options.width, options.height, options.quality, options.seed)
    print(f"{options.images} images of {options.classes} classes in {options.output}")


if __name__ == "__main__":
    main()
