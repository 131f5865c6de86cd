"""Photographs of objects by our renderer, as a telephone stores them."""

from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from actial_fast.cli.main import main

FOCAL_35MM = 44  # of the renderer's 44 degrees: 36 / 2 / tan(22 degrees)
STORED = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def photograph(pixels: Image.Image, path: Path, orientation: int = 1) -> None:
    """A telephone's JPEG: stored as EXIF says that it has to be turned."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112] = "Maker", "Phone", orientation
    exif.get_ifd(0x8769)[0xA405] = FOCAL_35MM
    path.parent.mkdir(parents=True, exist_ok=True)
    turn = STORED[orientation]
    (pixels if turn is None else pixels.transpose(turn)).save(path, quality=95, exif=exif)


def walk_round(folder: Path) -> None:
    """Two textured boxes from all sides: FOLDER/photos, and their true captures in FOLDER/true/meshes."""
    (folder / "meshes").mkdir()
    for name, sides in (("box", (1.6, 1.0, 1.2)), ("tower", (1.0, 1.0, 1.8))):
        mesh = trimesh.creation.box(sides)
        for _ in range(5):
            mesh = mesh.subdivide()
        rng = np.random.default_rng(len(name))
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=rng.integers(0, 256, (len(mesh.vertices), 4)) | [0, 0, 0, 255])
        mesh.export(folder / "meshes" / f"{name}.ply")
    words = [f"{key}={value}" for key, value in (("views", 28), ("image_size", 400), ("elevation_deg", "[15,35]"), ("format", "png"))]
    assert main(["data", "render", "-o", str(folder / "true"), "--meshes", str(folder / "meshes"), *words, "workers=1"]) == 0
    for capture in (folder / "true" / "meshes").iterdir():
        for n, path in enumerate(sorted((capture / "images").glob("*.png"))):
            photograph(Image.open(path), folder / "photos" / capture.name / f"{path.stem}.jpg", (1, 6, 8, 3)[n % 4])
