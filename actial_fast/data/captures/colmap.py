"""COLMAP captures: find them, read them, and refuse those whose left and right cannot be trusted.

A capture is a folder with `images/` and `sparse/0/` (cameras, images, points3D; binary or text), as MVImgNet ships one per object:

    CAPTURES/car/0001/images/000.jpg ...
    CAPTURES/car/0001/sparse/0/{cameras,images,points3D}.bin        -> object id "car/0001"

A reconstruction is only known up to rotation, translation and scale, and a mirrored one looks just as consistent by its poses alone:
cameras that walk clockwise around the object become cameras that walk counterclockwise. What tells them apart are the tracks, the pixels
at which each 3D point was seen. Every capture is therefore checked against its own tracks, and against the two ways of mirroring it.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycolmap
from PIL import Image

from actial_fast.data.captures.geometry import azimuth_elevation, estimate_center, estimate_up, horizontal, unit

MAX_REPROJECTION = 0.01  # median reprojection error over the image diagonal; COLMAP's own is about 0.0005
MAX_OFF_AXIS = np.radians(40)  # the object is outside the picture beyond this
MAX_ROLL = np.radians(45)  # the picture's right is no longer the viewer's right beyond this
OBSERVATIONS = 50  # tracks checked per image: enough for a median, and reading them is what a capture costs
MIN_OBSERVATIONS = 5

# Why a capture is rejected or an image left out; build.json counts under exactly these words.
NO_MODEL = "no sparse/0 model"
UNREADABLE = "unreadable model"
UNVERIFIED = "no tracks to verify the pose with"
BEHIND = "points behind the cameras"
MIRRORED_X = "mirrored: tracks fit the images only when flipped left to right"
MIRRORED_Z = "mirrored: tracks fit the images only with near and far swapped"
BROKEN = "tracks do not reproject to where they were seen"
AMBIGUOUS = "tracks fit a mirrored world as well"
TOO_FEW = "too few images"
SHAPE = "images do not have the shape the model's camera has"
MISSING = "image file missing"
NEAR_VERTICAL = "near-vertical view"
ROLLED = "rolled camera"
OFF_AXIS = "object outside the view"


class BadCapture(ValueError):
    """A capture that cannot be used. `reason` is one of this module's constants, `detail` the figures."""

    def __init__(self, path: Path, reason: str, detail: str = ""):
        super().__init__(f"{path}: {reason}" + (f" ({detail})" if detail else ""))
        self.path, self.reason, self.detail = path, reason, detail

    def __reduce__(self) -> tuple[type[BadCapture], tuple[Path, str, str]]:
        return BadCapture, (self.path, self.reason, self.detail)


@dataclass(frozen=True, eq=False)
class Capture:
    """One object's usable images and where they were taken from. N images, P points; float64, world units and frame as in the model.

    object: id, the folder's path below the captures' root. path: the folder.
    names: image names below images/, sorted. rotations (N, 3, 3), translations (N, 3): cam_from_world. centers (N, 3): camera centres.
    points (P, 3): sparse points, those the tracks were checked with (all of them when they were not). up (3,): unit. center (3,): of the
    object. azimuth (N,): radians about the vertical axis through the centre, counterclockwise seen from above, zero at the first image.
    elevation (N,): radians above the centre's horizontal plane.
    left_out: registered images that are not used, counted by reason.
    """

    object: str
    path: Path
    names: tuple[str, ...]
    rotations: np.ndarray
    translations: np.ndarray
    centers: np.ndarray
    points: np.ndarray
    up: np.ndarray
    center: np.ndarray
    azimuth: np.ndarray
    elevation: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict)

    def image(self, i: int) -> Path:
        """The file of image `i`."""
        return self.path / "images" / self.names[i]


def find_captures(root: Path) -> list[Path]:
    """All capture folders at or below `root`, sorted; ValueError when `root` is no folder.

    A folder with only one of images/ and sparse/ is listed too, so that read_capture can say what it lacks."""
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
        if parts := {"images", "sparse"} & set(subfolders):
            found.append(Path(folder))
            subfolders[:] = [] if len(parts) == 2 else [s for s in subfolders if s not in parts]
    return sorted(found)


def object_id(path: Path, root: Path) -> str:
    """The capture's path below `root` with forward slashes; the folder's own name when it is the root."""
    relative = Path(path).relative_to(root).as_posix()
    return Path(path).resolve().name if relative == "." else relative


def read_capture(
    path: Path, root: Path | None = None, *, min_images: int = 4, max_elevation_deg: float = 60.0, verify: str = "tracks"
) -> Capture:
    """The capture at `path`; its id is relative to `root` (default: the parent folder). BadCapture with a reason when it is not usable.

    min_images: images that must remain. max_elevation_deg: views from steeper, or looking steeper up or down, are left out: they have no
    azimuth and no yaw. verify: "tracks" rejects mirrored and broken worlds by their tracks and models without tracks; "off" trusts
    the poses (ValueError for anything else)."""
    if verify not in ("tracks", "off"):
        raise ValueError(f"verify={verify!r}; expected 'tracks' or 'off'")
    path = Path(path)
    name = object_id(path, path.parent if root is None else root)
    if not (path / "sparse" / "0").is_dir() or not (path / "images").is_dir():
        raise BadCapture(path, NO_MODEL, "expected images/ and sparse/0/")
    _check_counts(path)
    try:
        model = pycolmap.Reconstruction(str(path / "sparse" / "0"))
        images = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
    except Exception as error:  # pycolmap raises IndexError, ValueError or MemoryError on a truncated file
        raise BadCapture(path, UNREADABLE, f"{type(error).__name__}: {error}".splitlines()[0]) from None

    if not images:
        raise BadCapture(path, TOO_FEW, "the model has no registered image")
    rotations, translations = _poses(images)
    usable = np.ones(len(images), bool)
    left_out: Counter[str] = Counter()

    def narrow(good: np.ndarray, reason: str) -> None:
        nonlocal usable
        left_out[reason] += int((usable & ~good).sum())
        usable = usable & good
        if usable.sum() < min_images:
            common, count = left_out.most_common(1)[0]
            raise BadCapture(path, common if count else TOO_FEW, f"{usable.sum()} of {len(images)} images usable, {min_images} needed")

    narrow(np.array([(path / "images" / image.name).is_file() for image in images]), MISSING)
    _check_shape(path, model, images[int(np.argmax(usable))])
    hint: np.ndarray | None
    if verify == "tracks":
        errors, points, hint = _verify_tracks(path, model, images, rotations, translations)
        narrow(~np.isnan(errors), UNVERIFIED)
        narrow(errors <= MAX_REPROJECTION, BROKEN)
    else:
        points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
        hint = np.median(points, axis=0) if len(points) else None

    centers = -np.einsum("nji,nj->ni", rotations, translations)
    up = estimate_up(rotations[usable])
    center = estimate_center(rotations[usable], centers[usable], hint)
    forward, to_object = rotations[:, 2], unit(center - centers)
    steep = np.sin(np.radians(max_elevation_deg))
    narrow((np.abs(forward @ up) <= steep) & (np.abs(to_object @ up) <= steep), NEAR_VERTICAL)
    level = np.cross(unit(horizontal(forward, up)), up)  # where the camera's right would be without roll
    narrow((rotations[:, 0] * level).sum(-1) >= np.cos(MAX_ROLL), ROLLED)
    narrow((forward * to_object).sum(-1) >= np.cos(MAX_OFF_AXIS), OFF_AXIS)
    rotations, translations, centers = rotations[usable], translations[usable], centers[usable]
    azimuth, elevation = azimuth_elevation(centers, center, up)
    return Capture(
        object=name,
        path=path,
        names=tuple(image.name for image, ok in zip(images, usable, strict=True) if ok),
        rotations=rotations,
        translations=translations,
        centers=centers,
        points=points,
        up=up,
        center=center,
        azimuth=azimuth,
        elevation=elevation,
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _poses(images: list[pycolmap.Image]) -> tuple[np.ndarray, np.ndarray]:
    """cam_from_world as rotations (N, 3, 3) and translations (N, 3)."""
    poses = [image.cam_from_world() for image in images]
    return np.array([pose.rotation.matrix() for pose in poses]), np.array([pose.translation for pose in poses])


def _check_counts(path: Path) -> None:
    """A file that is cut short reads as a huge number of records, over which pycolmap would sit for minutes."""
    for name in ("cameras.bin", "images.bin", "points3D.bin"):
        file = path / "sparse" / "0" / name
        if file.is_file():
            with open(file, "rb") as handle:
                head, size = handle.read(8), file.stat().st_size
            if len(head) < 8 or int.from_bytes(head, "little") * 24 > size:  # no record of any kind is shorter than 24 bytes
                raise BadCapture(path, UNREADABLE, f"{name} is {size} bytes and cannot hold the records it announces")


def _check_shape(path: Path, model: pycolmap.Reconstruction, image: pycolmap.Image) -> None:
    """A picture turned by 90 degrees after the model was made would make up and right wrong: one header tells."""
    file, camera = path / "images" / image.name, model.cameras[image.camera_id]
    try:
        with Image.open(file) as picture:
            width, height = picture.size
    except OSError as error:
        raise BadCapture(path, UNREADABLE, f"{file.name}: {error}") from None
    if not 0.95 < (width * camera.height) / (height * camera.width) < 1.05:
        raise BadCapture(path, SHAPE, f"{file.name} is {width}x{height}, its camera {camera.width}x{camera.height}")


def _verify_tracks(
    path: Path, model: pycolmap.Reconstruction, images: list[pycolmap.Image], rotations: np.ndarray, translations: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image's median reprojection error over its diagonal, (N,), NaN without tracks; the points looked at, (P, 3); and the median (3,)
    of those seen in the middle of the pictures.

    BadCapture when the world as a whole is mirrored, broken, or fits its tracks no better than a mirror image of it does."""
    # Errors of the world as it is and of its two mirror images: left and right swapped, near and far swapped (what a reconstruction
    # falls into when perspective is weak: its cameras then orbit the wrong way round).
    errors = np.full(len(images), np.nan)
    everything, behind, middle, seen, ids = [], [], [], [], []
    for n, image in enumerate(images):
        camera, keypoints = model.cameras[image.camera_id], image.points2D
        index = image.get_observation_point2D_idxs()
        index = index[:: max(1, len(index) // OBSERVATIONS)]
        if len(index) < MIN_OBSERVATIONS:
            continue
        pixels = np.array([keypoints[i].xy for i in index])
        ids.append([keypoints[i].point3D_id for i in index])
        xyz = np.array([model.points3D[k].xyz for k in ids[-1]])
        local = xyz @ rotations[n].T + translations[n]
        swapped = local * [1, 1, -1] + [0, 0, 2 * np.median(local[:, 2])]
        size = np.array([camera.width, camera.height])
        per_point = np.stack([_error(camera, world, pixels) for world in (local, local * [-1, 1, 1], swapped)], 1) / np.linalg.norm(size)
        errors[n] = np.median(per_point[:, 0])
        everything.append(per_point)
        behind.append(local[:, 2] <= 0)
        seen.append(xyz)
        middle.append((np.abs(pixels / size - 0.5) < 0.25).all(1))
    if not everything:
        raise BadCapture(path, UNVERIFIED, f"no image has {MIN_OBSERVATIONS} observed points; verify='off' trusts the poses")
    if (share := np.concatenate(behind).mean()) > 0.1:
        raise BadCapture(path, BEHIND, f"{share:.0%} of the observations")
    real, flipped, swapped = np.median(np.concatenate(everything), axis=0)
    if real > MAX_REPROJECTION or real > 0.5 * min(flipped, swapped):
        detail = f"median error {real:.2%} of the diagonal; left and right swapped {flipped:.2%}, near and far swapped {swapped:.2%}"
        if flipped < 0.5 * real and flipped <= swapped:
            raise BadCapture(path, MIRRORED_X, detail)
        if swapped < 0.5 * real:
            raise BadCapture(path, MIRRORED_Z, detail)
        raise BadCapture(path, BROKEN if real > MAX_REPROJECTION else AMBIGUOUS, detail)
    observed, central = np.concatenate(seen), np.concatenate(middle)
    hint = np.median(observed[central] if central.sum() >= MIN_OBSERVATIONS else observed, axis=0)
    return errors, observed[np.unique(np.concatenate(ids), return_index=True)[1]], hint


def _error(camera: pycolmap.Camera, local: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Distance in pixels (M,) between where camera-space points (M, 3) fall and `pixels` (M, 2); infinite behind the camera."""
    front = local[:, 2] > 0
    error = np.full(len(local), np.inf)
    if front.any():
        error[front] = np.linalg.norm(camera.img_from_cam(local[front]) - pixels[front], axis=1)
    return error
