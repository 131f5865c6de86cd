"""COLMAP captures: find them, read them, and refuse those whose left and right cannot be trusted.

A capture is a folder with `images/` and `sparse/0/` (cameras, images, points3D; binary or text), as MVImgNet ships one per object; of
several models in `sparse/` the one with most images counts:

    CAPTURES/car/0001/images/000.jpg ...
    CAPTURES/car/0001/sparse/0/{cameras,images,points3D}.bin        -> object id "car/0001"

A reconstruction is only known up to rotation, translation and scale, and a mirrored one looks just as consistent by its poses alone:
cameras that walk clockwise around the object become cameras that walk counterclockwise. What tells them apart are the tracks, the pixels
at which each 3D point was seen. Every capture is therefore checked against its own tracks, and against the two ways of mirroring it.

Left and right are those of the picture as it is shown. A model may have been made from the stored pixels of photographs that their EXIF
orientation turns (COLMAP's default), or from turned ones: where the camera's shape proves which, poses are turned with their pictures;
where it does not, the picture is not used. Photographs that lie on their side without saying so show by cameras whose tops disagree, or
that seem to climb more than to walk round.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycolmap

from actial_fast.data.captures.geometry import azimuth_elevation, estimate_center, estimate_up, horizontal, unit
from actial_fast.data.captures.model import check_files, model_folder
from actial_fast.data.sources.picture import header

MAX_REPROJECTION = 0.01  # median reprojection error over the image diagonal; COLMAP's own is about 0.0005
MAX_OFF_AXIS = np.radians(40)  # the object is outside the picture beyond this
MAX_ROLL = np.radians(45)  # the picture's right is no longer the viewer's right beyond this
OBSERVATIONS = 50  # tracks checked per image: enough for a median, and reading them is what a capture costs
MIN_OBSERVATIONS = 5
MAX_DISAGREEING = 0.25  # share of the pictures that may be rolled: with more of them nobody knows which way is up
# EXIF's orientation -> the camera of the shown picture from that of the stored pixels; the other ones mirror
TURNED = {3: [[-1, 0, 0], [0, -1, 0], [0, 0, 1]], 6: [[0, -1, 0], [1, 0, 0], [0, 0, 1]], 8: [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]}

# Why a capture is rejected or an image left out; build.json counts under exactly these words.
NO_MODEL = "no model in sparse/"
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
DAMAGED = "image file cannot be read"
TWICE = "several images of one name"
UNPROVEN = "EXIF turns the picture, and it cannot be told whether the model's too"
EXIF_MIRROR = "EXIF mirrors the picture, and the model was made from stored pixels"
SIDEWAYS = "pictures lie on their side or disagree which way is up"
NEAR_VERTICAL = "near-vertical view"
ROLLED = "rolled camera"
OFF_AXIS = "object outside the view"


NO_HEADER = (0, 0, 1)  # of a picture that cannot be read


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
    try:
        return _read(path, path.parent if root is None else root, min_images, max_elevation_deg, verify)
    except BadCapture:
        raise
    except Exception as error:  # pycolmap's or the geometry's, on whatever a damaged model holds: it costs this capture, not the build
        raise BadCapture(path, UNREADABLE, f"{type(error).__name__}: {error}".splitlines()[0][:300]) from None


def _read(path: Path, root: Path, min_images: int, max_elevation_deg: float, verify: str) -> Capture:
    name = object_id(path, root)
    folder = model_folder(path / "sparse")
    if folder is None or not (path / "images").is_dir():
        raise BadCapture(path, NO_MODEL, "expected images/ and sparse/0/")
    check_files(folder)
    model = pycolmap.Reconstruction(str(folder))
    images = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
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

    names = Counter(image.name for image in images)
    narrow(np.array([names[image.name] == 1 for image in images]), TWICE)
    narrow(np.array([(path / "images" / image.name).is_file() for image in images]), MISSING)
    turns, problems = _turns(path, model, images, usable)
    for reason in (DAMAGED, SHAPE, EXIF_MIRROR, UNPROVEN):
        narrow(np.array([problem != reason for problem in problems]), reason)
    hint: np.ndarray | None
    if verify == "tracks":
        errors, points, hint = _verify_tracks(path, model, images, rotations, translations)
        narrow(~np.isnan(errors), UNVERIFIED)
        narrow(errors <= MAX_REPROJECTION, BROKEN)
    else:
        points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
        hint = np.median(points, axis=0) if len(points) else None

    rotations, translations = turns @ rotations, np.einsum("nij,nj->ni", turns, translations)
    centers = -np.einsum("nji,nj->ni", rotations, translations)
    up = estimate_up(rotations[usable])
    center = estimate_center(rotations[usable], centers[usable], hint)
    forward, to_object = rotations[:, 2], unit(center - centers)
    steep = np.sin(np.radians(max_elevation_deg))
    narrow((np.abs(forward @ up) <= steep) & (np.abs(to_object @ up) <= steep), NEAR_VERTICAL)
    level = np.cross(unit(horizontal(forward, up)), up)  # where the camera's right would be without roll
    upright = (rotations[:, 0] * level).sum(-1) >= np.cos(MAX_ROLL)
    if (rolled := (usable & ~upright).sum()) > MAX_DISAGREEING * usable.sum():
        raise BadCapture(path, SIDEWAYS, f"{rolled} of {usable.sum()} pictures are rolled by more than 45 degrees")
    narrow(upright, ROLLED)
    narrow((forward * to_object).sum(-1) >= np.cos(MAX_OFF_AXIS), OFF_AXIS)
    rotations, translations, centers = rotations[usable], translations[usable], centers[usable]
    azimuth, elevation = azimuth_elevation(centers, center, up)
    around = np.angle(np.exp(1j * azimuth) / np.exp(1j * azimuth).mean()).std()
    if elevation.std() > around:
        detail = (
            f"the camera climbs by {np.degrees(elevation.std()):.0f} degrees and walks by {np.degrees(around):.0f} (standard deviations)"
        )
        raise BadCapture(path, SIDEWAYS, detail)
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


def _turns(path: Path, model: pycolmap.Reconstruction, images: list[pycolmap.Image], usable: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What turns each camera with its picture, (N, 3, 3), and why a picture cannot be used, '' where it can.

    A picture that EXIF turns by a quarter shows by its camera's shape whether the model was made from stored or from shown pixels. One tool
    read all pictures of a model the same way, so that those tell of the ones whose shape does not."""
    heads = [_header(path / "images" / image.name) if ok else NO_HEADER for image, ok in zip(images, usable, strict=True)]
    cameras = [model.cameras[image.camera_id] for image in images]
    if any(min(camera.width, camera.height) < 1 for camera in cameras):
        raise BadCapture(path, UNREADABLE, "a camera without pixels")
    stored = [_fits(w, h, camera) for (w, h, _), camera in zip(heads, cameras, strict=True)]
    shown = [_fits(*((h, w) if tag > 4 else (w, h)), camera) for (w, h, tag), camera in zip(heads, cameras, strict=True)]
    told = {s for (_, _, tag), s, t, ok in zip(heads, stored, shown, usable, strict=True) if ok and tag > 1 and s != t}
    turns, problems = [], []
    for head, s, t in zip(heads, stored, shown, strict=True):
        tag = head[2]
        of_stored = s if s != t else told == {True} if len(told) == 1 else None  # None: not known
        turn, problem = np.eye(3), ""
        if not (s or t):
            problem = SHAPE if head != NO_HEADER else DAMAGED
        elif tag > 1 and of_stored is None:
            problem = UNPROVEN
        elif tag > 1 and of_stored:
            turn, problem = np.array(TURNED.get(tag, np.eye(3)), float), "" if tag in TURNED else EXIF_MIRROR
        turns.append(turn)
        problems.append(problem)
    return np.stack(turns), problems


def _header(file: Path) -> tuple[int, int, int]:
    try:
        return header(file)
    except (OSError, ValueError, SyntaxError):  # no picture
        return NO_HEADER


def _fits(width: int, height: int, camera: pycolmap.Camera) -> bool:
    return 0.95 * height * camera.width < width * camera.height < 1.05 * height * camera.width


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
