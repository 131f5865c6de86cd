"""Captures: find them, read them, and refuse those whose left and right cannot be trusted.

A capture is a folder of photographs of one object with their cameras (colmap.py, transforms.py and co3d.py have the layouts). Its object id
is the folder's path: CAPTURES/car/0001 is "car/0001".

Every capture is checked against what its pictures show (tracks.py, matches.py). Left and right are those of the picture as it is shown:
where EXIF turns it, the camera is turned with it if that can be proven (turned.py), else the picture is not used. Photographs that lie on
their side without saying so show by cameras whose tops disagree, or that seem to climb more than to walk round.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycolmap

from actial_fast.data.captures import co3d, colmap, transforms
from actial_fast.data.captures.frame import Frame, azimuth_elevation, estimate_frame
from actial_fast.data.captures.geometry import horizontal, unit
from actial_fast.data.captures.matches import matched_errors
from actial_fast.data.captures.photos import (
    BROKEN,
    DAMAGED,
    EXIF_MIRROR,
    MISSING,
    NEAR_VERTICAL,
    NO_MODEL,
    OFF_AXIS,
    ROLLED,
    SHAPE,
    SIDEWAYS,
    TOO_FEW,
    TWICE,
    UNPROVEN,
    UNREADABLE,
    UNVERIFIED,
    BadCapture,
    Photos,
)
from actial_fast.data.captures.tracks import MAX_REPROJECTION, reprojection_errors
from actial_fast.data.captures.turned import turns

READERS = (colmap.photos, transforms.photos, co3d.photos)  # in this order: what has tracks proves more
MAX_OFF_AXIS = np.radians(40)  # the object is outside the picture beyond this
MAX_ROLL = np.radians(45)  # the picture's right is no longer the viewer's right beyond this
MAX_DISAGREEING = 0.25  # share of the pictures that may be rolled: with more of them nobody knows which way is up


@dataclass(frozen=True, eq=False)
class Capture:
    """One object's usable images and where they were taken from. N images, P points; float64, world units and frame as in the files.

    object: id, the folder's path below the captures' root. path: the folder. names: of the images below `folder`, sorted.
    rotations (N, 3, 3), translations (N, 3): cam_from_world. centers (N, 3): camera centres. points (P, 3): what the pictures were seen to
    show, or the files' cloud. frame: up and the object's middle. azimuth (N,): radians about the vertical axis through that,
    counterclockwise seen from above, zero at the first image. elevation (N,): radians above its horizontal plane.
    cameras (N,): their intrinsics, of the pictures that the model was made from. turns (N, 3, 3): from the axes of these to those of the
    pictures as they are shown. left_out: images with a camera that are not used, counted by reason.
    """

    object: str
    path: Path
    folder: Path
    names: tuple[str, ...]
    rotations: np.ndarray
    translations: np.ndarray
    centers: np.ndarray
    points: np.ndarray
    frame: Frame
    azimuth: np.ndarray
    elevation: np.ndarray
    cameras: tuple[pycolmap.Camera, ...]
    turns: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def up(self) -> np.ndarray:
        """Unit (3,)."""
        return self.frame.up

    @property
    def center(self) -> np.ndarray:
        """Of the object (3,)."""
        return self.frame.center

    def image(self, i: int) -> Path:
        """The file of image `i`."""
        return self.folder / self.names[i]


def find_captures(root: Path) -> list[Path]:
    """All capture folders at or below `root`, sorted; ValueError when `root` is no folder.

    A folder with images/ or sparse/ and no cameras is listed too, so that read_capture can say what it lacks."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"captures folder {root} does not exist; give the folder that holds <class>/<object>/images and sparse/0")
    found, seen = [], set()
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # unfinished work, not captures
        here, parts = Path(folder), {"images", "sparse"} & set(subfolders)
        whole = len(parts) == 2 or bool(transforms.files(here)) or ("images" in parts and (here / colmap.FOLDERS[1]).is_dir())
        if parts or whole:
            found.append(here)
            subfolders[:] = [] if whole else [s for s in subfolders if s not in parts]
    return sorted(found)


def object_id(path: Path, root: Path) -> str:
    """The capture's path below `root` with forward slashes; the folder's own name when it is the root."""
    relative = Path(path).relative_to(root).as_posix()
    return Path(path).resolve().name if relative == "." else relative


def state(path: Path) -> list[tuple[str, int, int]]:
    """What changes when a capture's cameras or its list of images do: names, sizes and times of files."""
    models = [file for folder in colmap.FOLDERS for file in sorted((path / folder).rglob("*"))]
    files = [*models, *transforms.files(path), co3d.annotation_file(path), path / "images"]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]


def read_capture(
    path: Path, root: Path | None = None, *, min_images: int = 4, max_elevation_deg: float = 60.0, verify: str = "tracks"
) -> Capture:
    """The capture at `path`; its id is relative to `root` (default: the parent folder). BadCapture with a reason when it is not usable.

    min_images: images that must remain. max_elevation_deg: views from steeper, or looking steeper up or down, are left out: they have no
    azimuth and no yaw. verify: "tracks" rejects mirrored and broken worlds by their tracks, where there are none by what their photographs
    have in common, and those of which neither tells; "off" trusts the poses (ValueError for anything else)."""
    if verify not in ("tracks", "off"):
        raise ValueError(f"verify={verify!r}; expected 'tracks' or 'off'")
    path = Path(path)
    try:
        return _read(path, path.parent if root is None else root, min_images, max_elevation_deg, verify)
    except BadCapture:
        raise
    except Exception as error:  # pycolmap's or the geometry's, on whatever a damaged model holds: it costs this capture, not the build
        raise BadCapture(path, UNREADABLE, f"{type(error).__name__}: {error}".splitlines()[0][:300]) from None


def _read(path: Path, root: Path, min_images: int, max_elevation_deg: float, verify: str) -> Capture:
    name = object_id(path, root)
    photos = next((found for reader in READERS if (found := reader(path)) is not None), None)
    if photos is None:
        raise BadCapture(path, NO_MODEL, "expected images/ and sparse/0/")
    usable = np.ones(len(photos.names), bool)
    left_out: Counter[str] = Counter()

    def narrow(good: np.ndarray, reason: str) -> None:
        nonlocal usable
        left_out[reason] += int((usable & ~good).sum())
        usable = usable & good
        if usable.sum() < min_images:
            common, count = left_out.most_common(1)[0]
            reason = common if count else TOO_FEW
            raise BadCapture(path, reason, f"{usable.sum()} of {len(photos.names)} images usable, {min_images} needed")

    names = Counter(photos.names)
    narrow(np.array([names[name] == 1 for name in photos.names], bool), TWICE)
    narrow(np.array([(photos.folder / name).is_file() for name in photos.names]), MISSING)
    files = [photos.folder / name if ok else None for name, ok in zip(photos.names, usable, strict=True)]
    turn, problems = turns(files, photos.cameras)
    for reason in (DAMAGED, SHAPE, EXIF_MIRROR, UNPROVEN):
        narrow(np.array([problem != reason for problem in problems]), reason)
    if verify == "tracks":
        tracked = any(len(track.ids) for track in photos.tracks)
        errors = reprojection_errors(path, photos) if tracked else matched_errors(path, photos, usable)
        narrow(~np.isnan(errors), UNVERIFIED)
        narrow(errors <= MAX_REPROJECTION, BROKEN)

    points, owner = _shown(photos, usable)
    rotations, translations = turn @ photos.rotations, np.einsum("nij,nj->ni", turn, photos.translations)
    centers = photos.centers
    frame = estimate_frame(rotations[usable], centers[usable], points, owner)
    forward, to_object = rotations[:, 2], unit(frame.center - centers)
    steep = np.sin(np.radians(max_elevation_deg))
    narrow((np.abs(forward @ frame.up) <= steep) & (np.abs(to_object @ frame.up) <= steep), NEAR_VERTICAL)
    level = np.cross(unit(horizontal(forward, frame.up)), frame.up)  # where the camera's right would be without roll
    upright = (rotations[:, 0] * level).sum(-1) >= np.cos(MAX_ROLL)
    if (rolled := (usable & ~upright).sum()) > MAX_DISAGREEING * usable.sum():
        raise BadCapture(path, SIDEWAYS, f"{rolled} of {usable.sum()} pictures are rolled by more than 45 degrees")
    narrow(upright, ROLLED)
    narrow((forward * to_object).sum(-1) >= np.cos(MAX_OFF_AXIS), OFF_AXIS)
    centers = centers[usable]
    azimuth, elevation = azimuth_elevation(centers, frame.center, frame.up)
    around = np.angle(np.exp(1j * azimuth) / np.exp(1j * azimuth).mean()).std()
    if elevation.std() > around:
        climbs, walks = np.degrees([elevation.std(), around])
        raise BadCapture(path, SIDEWAYS, f"the camera climbs by {climbs:.0f} degrees and walks by {walks:.0f} (standard deviations)")
    return Capture(
        object=name,
        path=path,
        folder=photos.folder,
        names=tuple(name for name, ok in zip(photos.names, usable, strict=True) if ok),
        rotations=rotations[usable],
        translations=translations[usable],
        centers=centers,
        points=np.unique(points, axis=0),
        frame=frame,
        azimuth=azimuth,
        elevation=elevation,
        cameras=tuple(camera for camera, ok in zip(photos.cameras, usable, strict=True) if ok),
        turns=turn[usable],
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _shown(photos: Photos, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that the usable pictures show (T, 3), and which of these pictures each (T,); -1 where only the cloud is known."""
    tracks = [track for track, ok in zip(photos.tracks, usable, strict=False) if ok]
    owner = np.repeat(np.arange(len(tracks)), [len(track.points) for track in tracks])
    if len(owner):
        return np.concatenate([track.points for track in tracks]), owner
    return photos.cloud, np.full(len(photos.cloud), -1)
