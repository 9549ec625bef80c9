"""Draws a folder of small pictures: discs, squares and triangles, 48 x 40 pixels, in three class folders.

    python make_data.py shapes

Place, size, tilt and colours differ from picture to picture, and all are noisy; a small network tells nearly all apart.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 48, 40
CLASSES = ("disc", "square", "triangle")
SCALE = 4
"""Drawn larger and reduced, so that edges are smooth."""


def draw(kind: str, random: np.random.Generator) -> Image.Image:
    """One picture: RGB, HEIGHT x WIDTH."""
    back, front = random.integers(0, 80, 3), random.integers(170, 256, 3)
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), tuple(int(v) for v in back))
    radius = random.uniform(11, 16) * SCALE
    x, y = random.uniform(radius, WIDTH * SCALE - radius), random.uniform(radius, HEIGHT * SCALE - radius)
    colour = tuple(int(v) for v in front)
    pen = ImageDraw.Draw(image)
    if kind == "disc":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        corners = 4 if kind == "square" else 3
        turn = random.uniform(-0.2, 0.2) + (math.pi / 4 if kind == "square" else -math.pi / 2)
        angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
        pen.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=colour)
    small = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX), np.float64)
    noisy = small + random.normal(0, 12, small.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write(folder: Path, per_class: int = 150, seed: int = 0) -> None:
    """Writes `per_class` pictures of each class."""
    random = np.random.default_rng(seed)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            draw(kind, random).save(folder / kind / f"{index:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.per_class, arguments.seed)
    print(f"{3 * arguments.per_class} pictures in {arguments.folder}")
