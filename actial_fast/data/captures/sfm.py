"""One object's photographs become a capture: upright pictures, and COLMAP's model of where they were taken from.

What COLMAP sees is what a viewer shows: every photograph goes through picture.py, an EXIF orientation is applied and gone, and only the
tags that COLMAP takes a focal length from stay. So a model never has other sides than its pictures.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pycolmap
from PIL import Image

from actial_fast.data.captures.model import check_files
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.sources.picture import decode, encoded
from actial_fast.data.sources.row import BadRow

# Why an object has no capture; reconstruct.json counts under exactly these words, or those of photos.py.
NO_PICTURE = "no picture in the folder"
FEW_PHOTOGRAPHS = "too few photographs"
UNMATCHED = "photographs do not match each other"
FEW_REGISTERED = "too few photographs found their camera"
CRASHED = "COLMAP ended without a result"

EXHAUSTIVE = 120  # photographs up to which matching=auto compares every two
FOCAL = (0x920A, 0xA405)  # of EXIF: the focal length, and that of the same view on a 35 mm film
CAMERA = (0x010F, 0x0110)  # maker and model, by which COLMAP knows the size of the sensor
EXIF_FOLDER = 0x8769
SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",)}  # of the pictures that are written
HINT = "photograph all round the object, about every 10 degrees, sharp, with texture on it or about it"


@dataclass(frozen=True)
class ReconstructConfig:
    """How `reconstruct` makes captures of photographs."""

    max_side: int = 2000
    """Longer side of the pictures that are written, in pixels; larger photographs are scaled down. 0 keeps every size."""
    features: int = 4096
    """Most points that are looked for in a picture."""
    matching: str = "auto"
    """Which pictures are compared: exhaustive (every two), sequential (each with the next `overlap` by name, and with some further on, as
    for the frames of a video), or auto: exhaustive up to 120 photographs."""
    overlap: int = 10
    """sequential: how many of the next pictures each one is compared with."""
    min_images: int = 8
    """Photographs that must find their camera; an object with fewer is left out."""
    min_share: float = 0.5
    """Share of an object's photographs that must find their camera in one model; an object with a smaller one is left out."""
    seed: int = 0
    """Seed of COLMAP's random numbers."""
    threads: int = 0
    """Threads of COLMAP; 0 = one per CPU core."""

    def check(self) -> ReconstructConfig:
        """The config itself; ValueError naming the field that makes no sense."""
        if self.matching not in ("auto", "exhaustive", "sequential"):
            raise ValueError(f"matching: {self.matching!r} is not known; choose from auto, exhaustive, sequential")
        for name, low in (("max_side", 0), ("features", 64), ("overlap", 1), ("min_images", 4), ("seed", 0), ("threads", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {low}")
        if 0 < self.max_side < 64:
            raise ValueError(f"max_side is {self.max_side}: give 64 pixels or more, or 0 to keep every size")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share is {self.min_share}: give a share from 0 to 1")
        return self


@dataclass(frozen=True)
class Solved:
    """What became of an object: photographs given, and registered in the model that was kept, its points and their mean error in pixels;
    the models there were, by their pictures; photographs that cannot be read, with the reason."""

    given: int
    registered: int
    points: int
    error: float
    models: tuple[int, ...]
    unread: dict[str, str] = field(default_factory=dict)


def solve(photographs: Sequence[Path], out: Path, config: ReconstructConfig, tell: Callable[[str], None] = lambda phase: None) -> Solved:
    """Write the capture of these photographs of one object: out/images and, of the model with most pictures, out/sparse/0.

    tell: called with each phase's name. BadCapture, with a reason of this module, where there is none to write."""
    tell("pictures")
    unread = _pictures(photographs, out / "images", config.max_side)
    names = sorted(path.name for path in (out / "images").iterdir())
    if len(names) < config.min_images:
        bad = "".join(f"; {name}: {why}" for name, why in list(unread.items())[:3])
        raise BadCapture(out, FEW_PHOTOGRAPHS, f"{len(names)} that can be read, {config.min_images} are needed{bad}")
    models = _models(out, names, config, tell)
    if not models:
        raise BadCapture(out, UNMATCHED, HINT)
    best = models[0]
    registered = best.num_reg_images()
    if registered < config.min_images or registered < config.min_share * len(names):
        parts = ", ".join(str(model.num_reg_images()) for model in models[:5])
        what = f"of {len(names)} photographs {registered} did" if len(models) == 1 else f"{len(names)} photographs fell apart: {parts}"
        raise BadCapture(out, FEW_REGISTERED, f"{what}; {HINT}")
    folder = out / "sparse" / "0"
    folder.mkdir(parents=True)
    best.write(folder)
    check_files(folder)  # it says nothing of a disk that was full
    sizes = tuple(model.num_reg_images() for model in models)
    return Solved(len(photographs), registered, best.num_points3D(), best.compute_mean_reprojection_error(), sizes, unread)


def _models(out: Path, names: list[str], config: ReconstructConfig, tell: Callable[[str], None]) -> list[pycolmap.Reconstruction]:
    """COLMAP's models of out/images, the one with most pictures first; of equal ones that with most points."""
    pycolmap.logging.minloglevel = 3  # its errors are told here, by their reason
    pycolmap.set_random_seed(config.seed)
    work, threads = out / "work", config.threads or -1
    work.mkdir()
    database, images = work / "database.db", out / "images"
    extraction, matching = pycolmap.FeatureExtractionOptions(), pycolmap.FeatureMatchingOptions()
    verification, mapping = pycolmap.TwoViewGeometryOptions(), pycolmap.IncrementalPipelineOptions()
    extraction.num_threads = matching.num_threads = mapping.num_threads = mapping.mapper.num_threads = threads
    extraction.sift.max_num_features = config.features
    verification.ransac.random_seed = mapping.random_seed = mapping.mapper.random_seed = config.seed
    mapping.triangulation.random_seed = config.seed
    mapping.min_model_size = config.min_images
    tell("points")
    for group in _cameras(images, names):
        pycolmap.extract_features(database, images, group, pycolmap.CameraMode.SINGLE, extraction_options=extraction)
    tell("matches")
    if config.matching == "sequential" or (config.matching == "auto" and len(names) > EXHAUSTIVE):
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap = config.overlap
        pycolmap.match_sequential(database, matching, pairing, verification)
    else:
        pycolmap.match_exhaustive(database, matching, verification_options=verification)
    tell("cameras")
    found = pycolmap.incremental_mapping(database, images, work, mapping)
    shutil.rmtree(work)
    return sorted(found.values(), key=lambda model: (-model.num_reg_images(), -model.num_points3D()))


def _cameras(folder: Path, names: list[str]) -> list[list[str]]:
    """The pictures that one camera took with one focal length, as far as sizes and EXIF tell."""
    groups = defaultdict(list)
    for name in names:
        with Image.open(folder / name) as picture:
            exif = picture.getexif()
            inner = exif.get_ifd(EXIF_FOLDER)
            tags = [exif.get(tag) for tag in CAMERA] + [inner.get(tag) for tag in FOCAL]
            groups[picture.size, str(tags)].append(name)
    return list(groups.values())


def _pictures(photographs: Sequence[Path], folder: Path, max_side: int) -> dict[str, str]:
    """Write what a viewer shows of each photograph, no larger than `max_side`; returns why some could not be read, by their names."""
    folder.mkdir(parents=True)
    unread: dict[str, str] = {}
    for photograph in photographs:
        try:
            data, suffix = _picture(photograph, max_side)
        except BadRow as error:
            unread[photograph.name] = error.reason
            continue
        name = photograph.name if photograph.suffix.lower() in suffix else f"{photograph.stem}{suffix[0]}"
        if (folder / name).exists():  # of IMG_1.HEIC and IMG_1.jpg
            name = f"{photograph.name}{suffix[0]}"
        (folder / name).write_bytes(data)
    return unread


def _picture(photograph: Path, max_side: int) -> tuple[bytes, tuple[str, ...]]:
    """An upright picture's bytes, and the suffixes that their format goes by. The photograph's own bytes where they are that already."""
    where = str(photograph)
    pixels = decode(photograph, where)
    tall, wide = pixels.shape[:2]
    scale = min(1.0, max_side / max(tall, wide)) if max_side else 1.0
    if scale == 1 and photograph.suffix.lower() in (".jpg", ".jpeg", ".png"):
        data, kind = encoded(photograph, where)
        if kind in SUFFIXES and (kind == "JPEG" or photograph.suffix.lower() == ".png"):
            return data, SUFFIXES[kind]
    picture = Image.fromarray(pixels)
    if scale < 1:
        picture = picture.resize((max(1, round(wide * scale)), max(1, round(tall * scale))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0, exif=_focal(photograph))
    return buffer.getvalue(), SUFFIXES["JPEG"]


def _focal(photograph: Path) -> Image.Exif:
    """The EXIF tags by which COLMAP knows a focal length whatever the size of the picture; none where there are none."""
    kept = Image.Exif()
    with contextlib.suppress(OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error), Image.open(photograph) as picture:
        exif = picture.getexif()
        kept.update({tag: exif[tag] for tag in CAMERA if tag in exif})
        inner = exif.get_ifd(EXIF_FOLDER)
        kept.get_ifd(EXIF_FOLDER).update({tag: inner[tag] for tag in FOCAL if tag in inner})
        kept.tobytes()  # damaged values fail here
        return kept
    return Image.Exif()
