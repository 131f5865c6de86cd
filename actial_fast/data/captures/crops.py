"""Pictures that a panned camera would have taken, cut out of photographs.

A camera that turns about its own centre sees nothing new: what it would have taken stands in the photograph, at the place that a homography
tells, or with a lens's distortion the camera's own model. So a crop is a photograph from the same place with a narrower view, whose pan,
tilt and roll are known exactly; among crops of an ordinary walk there are pans without a move, moves without a turn, and all the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from PIL import Image

from actial_fast.data.captures.capture import Capture
from actial_fast.data.captures.frame import azimuth_elevation
from actial_fast.data.captures.geometry import qvec
from actial_fast.data.captures.photos import pinhole
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.picture import decode, header

STEP = 3.0  # degrees from one pan to the next; each is taken twice, tilted and rolled otherwise
WIDEST = 45.0  # degrees that a crop may be panned from its photograph
TILT = 2.0  # degrees that each crop is tilted and rolled at random, at most
MOST_PHOTOGRAPHS = 40  # of a capture that are cut, spread evenly: of more, neighbours show the same
MIN_SIDE = 16  # pixels; smaller crops show nothing
EDGE = 9  # points along each side of a crop that must lie in the photograph
RECORD = "cameras.json"


@dataclass(frozen=True, eq=False)
class Crops:
    """M crops of a capture's photographs. capture: as if these were its pictures. photograph (M,): the number of each one's own. sources,
    intrinsics (N,): the photographs' cameras for their files' sizes, and their crops' cameras."""

    capture: Capture
    photograph: np.ndarray
    sources: tuple[pycolmap.Camera, ...]
    intrinsics: tuple[pycolmap.Camera, ...]

    def cameras(self, names: list[str]) -> list[dict[str, Any]]:
        """What rows say of these crops' cameras: COLMAP's model and its parameters, in pixels, the first pixel's centre at 0.5."""
        return [_told(self.intrinsics[self.photograph[self.capture.names.index(name)]]) for name in names]


def crops(capture: Capture, share: float, folder: Path, seed: int) -> Crops:
    """All crops, of `share` of a photograph's width and height, that lie in their photographs; none where they would be too small. Their
    files are to be in `folder`."""
    rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(capture.object.encode()).digest()[:4])])
    names, rotations, photograph = [], [], []
    sources = [_to_size(capture.cameras[k], capture.image(k)) for k in range(len(capture.names))]
    intrinsics = [_narrow(camera, capture.turns[k], share) for k, camera in enumerate(sources)]
    pans = np.repeat(np.arange(-WIDEST, WIDEST + STEP / 2, STEP), 2)
    panned = np.stack([_about(capture.up, -pan) for pan in pans])
    kept = np.unique(np.linspace(0, len(sources) - 1, MOST_PHOTOGRAPHS).round().astype(int))
    for k in kept.tolist():
        if min(intrinsics[k].width, intrinsics[k].height) < MIN_SIDE:
            continue
        tilts, rolls = rng.uniform(-TILT, TILT, (2, len(pans)))
        spins = np.stack([_spin(tilt, 0) @ _spin(roll, 2) for tilt, roll in zip(tilts, rolls, strict=True)])
        shown = spins @ capture.rotations[k] @ panned
        inside = _inside(sources[k], capture.turns[k].T @ capture.rotations[k] @ shown.transpose(0, 2, 1), intrinsics[k])
        for n in np.flatnonzero(inside):
            mark = hashlib.sha256(f"{capture.names[k]} {pans[n]} {tilts[n]} {rolls[n]} {share}".encode()).hexdigest()[:12]
            names.append(f"{mark}.jpg")
            rotations.append(shown[n])
            photograph.append(k)
    order = np.argsort(names)
    of = np.array(photograph, int)[order]
    turned = np.array(rotations).reshape(-1, 3, 3)[order]
    centers = capture.centers[of]
    azimuth, elevation = azimuth_elevation(centers, capture.center, capture.up) if len(of) else (np.zeros(0), np.zeros(0))
    as_capture = replace(
        capture,
        folder=folder,
        names=tuple(names[n] for n in order),
        rotations=turned,
        translations=-np.einsum("nij,nj->ni", turned, centers),
        centers=centers,
        azimuth=azimuth,
        elevation=elevation,
        cameras=tuple(intrinsics[k] for k in of),
        turns=np.broadcast_to(np.eye(3), turned.shape),
    )
    return Crops(as_capture, of, tuple(sources), tuple(intrinsics))


def write_crops(capture: Capture, made: Crops, wanted: set[str]) -> None:
    """Write the wanted ones of a capture's crops and their cameras, each file under its name only when it is complete; what else is
    there, of an earlier build, is removed."""
    folder = made.capture.folder
    folder.mkdir(parents=True, exist_ok=True)
    record = {}
    pixels: dict[int, np.ndarray] = {}
    chosen = [n for n, name in enumerate(made.capture.names) if name in wanted]
    for n in sorted(chosen, key=lambda n: int(made.photograph[n])):
        k, name, shown = int(made.photograph[n]), made.capture.names[n], made.capture.rotations[n]
        pose = {"qvec": qvec(shown).tolist(), "tvec": made.capture.translations[n].tolist()}
        record[name] = {"of": capture.names[k], **pose, "camera": _told(made.intrinsics[k])}
        if not (folder / name).is_file():
            pixels = pixels if k in pixels else {k: _pixels(capture, k)}  # one photograph at a time
            rotation = capture.turns[k].T @ capture.rotations[k] @ shown.T
            _save(Image.fromarray(taken(pixels[k], made.sources[k], rotation, made.intrinsics[k])), folder / name)
    temporary = folder / f"{RECORD}.tmp"
    with writing(temporary):
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(temporary, folder / RECORD)
    for file in folder.glob("*.jpg"):
        if file.name not in record:
            file.unlink()


def taken(pixels: np.ndarray, camera: pycolmap.Camera, rotation: np.ndarray, crop: pycolmap.Camera) -> np.ndarray:
    """What a camera `crop` (a pinhole), turned from `camera` on the spot, takes of what that took: uint8 (H, W, 3).

    pixels: uint8 (H, W, 3), of `camera`'s size. rotation (3, 3): from the crop's axes to those of `camera`. Bilinear, since there are as
    many pixels to a degree here as there."""
    from scipy.ndimage import map_coordinates

    x, y = np.meshgrid(np.arange(crop.width) + 0.5, np.arange(crop.height) + 0.5)
    rays = _rays(crop, x, y).reshape(-1, 3) @ rotation.T
    at = (camera.img_from_cam(rays) - 0.5).T[::-1]  # rows, columns
    channels = [map_coordinates(pixels[..., c].astype(np.float32), at, order=1, mode="nearest") for c in range(3)]
    return np.clip(np.stack(channels, -1) + 0.5, 0, 255).astype(np.uint8).reshape(crop.height, crop.width, 3)


def _spin(degrees: float, axis: int) -> np.ndarray:
    """The rotation (3, 3) by an angle about one of a camera's own axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = [k for k in range(3) if k != axis]
    out = np.eye(3)
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def _about(up: np.ndarray, degrees: float) -> np.ndarray:
    """The rotation (3, 3) about a unit vector (3,), counterclockwise +, by Rodrigues' formula."""
    angle = np.radians(degrees)
    cross = np.cross(np.eye(3), -up)  # cross @ v is up x v
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _told(camera: pycolmap.Camera) -> dict[str, Any]:
    params = [round(float(p), 4) for p in camera.params]
    return {"model": camera.model.name, "width": camera.width, "height": camera.height, "params": params}


def _narrow(camera: pycolmap.Camera, turn: np.ndarray, share: float) -> pycolmap.Camera:
    """The camera of crops of that share of a photograph that is shown as `turn` (3, 3) says."""
    quarter = abs(turn[0, 1]) > 0.5
    width, height = (camera.height, camera.width) if quarter else (camera.width, camera.height)
    size, focal = (max(1, round(share * width)), max(1, round(share * height))), camera.mean_focal_length()
    return pinhole(*size, (focal, focal), (size[0] / 2, size[1] / 2))


def _to_size(camera: pycolmap.Camera, file: Path) -> pycolmap.Camera:
    """The camera for the file's own size, which may be another than the model was made from; a file that is shown turned by a quarter was
    read so or not, which the camera's shape tells."""
    width, height, tag = header(file)
    if tag > 4 and (width > height) != (camera.width > camera.height):
        width, height = height, width
    scaled = pycolmap.Camera(model=camera.model, width=camera.width, height=camera.height, params=camera.params)
    scaled.rescale(width, height)
    return scaled


def _pixels(capture: Capture, k: int) -> np.ndarray:
    """A photograph as its camera has it: as it is shown, or as it is stored where the model was made from that. uint8 (H, W, 3)."""
    if np.array_equal(capture.turns[k], np.eye(3)):
        return decode(capture.image(k), str(capture.image(k)))
    with Image.open(capture.image(k)) as picture:
        return np.asarray(picture.convert("RGB"))


def _save(picture: Image.Image, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with writing(temporary):
        picture.save(temporary, format="JPEG", quality=95)
    os.replace(temporary, path)


def _rays(camera: pycolmap.Camera, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Directions (..., 3) in a pinhole camera of pixels."""
    fx, fy, cx, cy = camera.params
    return np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(np.shape(x))], -1)


def _inside(camera: pycolmap.Camera, rotations: np.ndarray, crop: pycolmap.Camera) -> np.ndarray:
    """Which crops lie in their photograph with their whole edge, bool (P,). rotations (P, 3, 3): from a crop's axes to the photograph's."""
    along = np.linspace(0, 1, EDGE)
    x, y = np.concatenate([along, along, 0 * along, 0 * along + 1]), np.concatenate([0 * along, 0 * along + 1, along, along])
    rays = _rays(crop, x * crop.width, y * crop.height) @ rotations.transpose(0, 2, 1)  # (P, 4 * EDGE, 3)
    ahead = rays[..., 2:] >= 0.2  # beyond a lens's view its model may fold back
    flat = np.where(ahead, rays[..., :2] / np.where(ahead, rays[..., 2:], 1), np.inf)
    size = np.array([camera.width, camera.height])
    seen = (np.abs(flat) * camera.mean_focal_length() <= 0.75 * size).all(-1)
    pixels = camera.img_from_cam(np.where(seen[..., None], rays, [0.0, 0, 1]).reshape(-1, 3)).reshape(flat.shape)
    return (seen & (pixels >= 0).all(-1) & (pixels <= size).all(-1)).all(1)
