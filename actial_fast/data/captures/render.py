"""Captures from meshes: photographs of an object from a ring of cameras, with the COLMAP model that belongs to them.

    OUT/<family>/<0001>/images/000.png ...          the photographs (a mesh: OUT/<its folder>/<its name>/images/...)
                        sparse/0/*.bin              cameras, poses, surface points with their observations (written by pycolmap)
                        scene.json                  what is known besides: front, up, centre, every camera's azimuth about the front

This is the layout of a real object-centric data set (MVImgNet), so a capture rendered here goes through the same builder as one taken with
a telephone. As there, the COLMAP world is neither upright nor to scale: a random similarity per object lies between it and the object
frame (shapes.py). An object depends on the seed, its family and its index only, not on the number of workers or on what was rendered
before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from actial_fast.data.captures.geometry import rotation as quaternion_rotation
from actial_fast.data.captures.model import check_files
from actial_fast.data.captures.raycast import Cameras, Caster, Surroundings, photographs, surface_points, visible
from actial_fast.data.captures.shapes import FAMILIES, MESH_SUFFIXES, axis_frame, load_mesh, procedural
from actial_fast.data.sources.files import writing

if TYPE_CHECKING:
    from rich.progress import Progress

AZIMUTHS = ("ring", "front", "random")
BACKGROUNDS = ("ground", "plain")
FORMATS = ("png", "jpg")
PAN_JITTER = 0.8  # degrees by which two shots that look in one direction may each be off it


@dataclass(frozen=True)
class RenderConfig:
    """What `render` makes. Lengths are in radii of the object's bounding sphere, angles in degrees."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Procedural families to render: vehicle, chair, animal, pot. Ignored when `meshes` is given."""
    objects: int = 60
    """Objects per family."""
    views: int = 24
    """Photographs per object."""
    image_size: int = 28
    """Width and height of a photograph in pixels."""
    supersampling: int = 2
    """Rays per pixel along each axis: 2 casts 4 rays a pixel."""
    azimuths: str = "ring"
    """Where the cameras stand: ring (spread evenly round the object, jittered), front (the same over an arc about its front), random."""
    arc_deg: float = 180.0
    """Angle of that arc, of azimuths=front only."""
    shots: int = 1
    """Photographs from each place, of which there are views / shots. The first two look at the object, or nearly so; further ones are
    panned, to the one side and the other in turn."""
    pan_deg: float = 12.0
    """Angle from one direction to look in to the next. With several shots these are the same all along the walk, so that some pairs pan
    without moving, some move without turning, and some do neither."""
    elevation_deg: tuple[float, float] = (8.0, 32.0)
    """Lowest and highest elevation of a camera above the object's centre."""
    distance: tuple[float, float] = (2.8, 3.8)
    """Nearest and farthest distance of a camera from the object's centre."""
    aim_jitter: float = 0.08
    """How far the point a camera aims at may lie from the object's centre, along each axis."""
    roll_jitter_deg: float = 2.0
    """How far a camera may be tilted about its viewing direction, either way."""
    fov_deg: float = 44.0
    """Angle of view across the photograph."""
    background: str = "ground"
    """ground (textured ground, horizon and sky, other colours for every object) or plain (one colour)."""
    points: int = 64
    """Surface points sampled for the COLMAP model; those that fewer than two cameras see are left out."""
    meshes: str = ""
    """A folder of OBJ, glTF, GLB or PLY files, searched with its subfolders, rendered one capture each in place of the families."""
    mesh_up: str = "y"
    """The axis that points up in `meshes`: y (glTF's convention) or z, or -x and so on."""
    mesh_front: str = ""
    """The axis that the objects in `meshes` face (glTF's convention is z); empty: unknown, and no azimuth is written."""
    format: str = "png"
    """Image format: png, or jpg (quality 95)."""
    seed: int = 0
    """Seed of everything that is drawn at random."""
    workers: int = 0
    """Processes; 0 takes one per CPU core, 1 renders in this process."""

    def check(self) -> RenderConfig:
        """The config itself; ValueError naming the field that makes no sense."""
        for name in self.families:
            _one_of("families", name, tuple(FAMILIES))
        _one_of("azimuths", self.azimuths, AZIMUTHS)
        _one_of("background", self.background, BACKGROUNDS)
        _one_of("format", self.format, FORMATS)
        axis_frame(self.mesh_up, self.mesh_front)
        for field, low in (
            ("objects", 1),
            ("views", 2),
            ("image_size", 4),
            ("supersampling", 1),
            ("shots", 1),
            ("points", 8),
            ("workers", 0),
            ("seed", 0),
        ):
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at least {low}")
        if self.views % self.shots or self.views == self.shots:
            raise ValueError(f"views is {self.views}, shots {self.shots}: views has to be a multiple of shots, two places at least")
        if not 0 < self.arc_deg < 360 or (self.azimuths != "front" and self.arc_deg != 180):
            raise ValueError(f"arc_deg is {self.arc_deg}: give an angle below 360 degrees, with azimuths=front")
        if not 1 <= self.pan_deg <= 45 or (self.shots == 1 and self.pan_deg != RenderConfig.pan_deg):
            raise ValueError(f"pan_deg is {self.pan_deg}: give 1 to 45 degrees, with several shots")
        if self.shots > 2 and (widest := self.pan_deg * ((self.shots - 1) // 2 + 0.5)) > self.fov_deg / 2 + 10:
            raise ValueError(
                f"shots is {self.shots}, pan_deg {self.pan_deg}: cameras panned by {widest:g} degrees do not see the object; "
                "take fewer, smaller steps or a wider fov_deg"
            )
        if not 0 < self.elevation_deg[0] <= self.elevation_deg[1] < 90:
            raise ValueError(
                f"elevation_deg is {self.elevation_deg}: give (lowest, highest) between 0 and 90 degrees, both above the ground"
            )
        if not 1.1 <= self.distance[0] <= self.distance[1]:
            raise ValueError(
                f"distance is {self.distance}: give (nearest, farthest), at least 1.1 radii so that no camera is inside the object"
            )
        if not 5 <= self.fov_deg <= 120:
            raise ValueError(f"fov_deg is {self.fov_deg}: give an angle of view from 5 to 120 degrees")
        return self


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field}: {value!r} is not known; choose from {', '.join(known)}")


def _cameras(config: RenderConfig, center: np.ndarray, rng: np.random.Generator) -> Cameras:
    n, shots = config.views // config.shots, config.shots
    if config.azimuths == "random":
        azimuth = rng.uniform(0, 360, n)
    else:  # one camera somewhere in each of n equal slots
        span = 360 if config.azimuths == "ring" else config.arc_deg
        start = rng.uniform(0, 360) if config.azimuths == "ring" else -span / 2
        azimuth = start + span / n * (np.arange(n) + rng.uniform(0, 1, n))
    azimuth = (azimuth + 180) % 360 - 180
    theta, elevation = np.radians(azimuth), np.radians(rng.uniform(*config.elevation_deg, n))
    distance = rng.uniform(*config.distance, n)
    outward = np.stack([np.cos(theta) * np.cos(elevation), np.sin(theta) * np.cos(elevation), np.sin(elevation)], 1)
    centers = center + distance[:, None] * outward
    centers[:, 2] = np.maximum(centers[:, 2], 0.05)  # a flat object's low camera stays above the ground

    azimuth, centers = np.repeat(azimuth, shots), np.repeat(centers, shots, 0)
    n *= shots
    forward = center + rng.uniform(-1, 1, (n, 3)) * config.aim_jitter - centers
    if shots > 1:
        forward = _panned(forward, center - centers, config, rng)
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    roll = np.radians(rng.uniform(-1, 1, n) * config.roll_jitter_deg)[:, None]
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    focal = config.image_size / 2 / np.tan(np.radians(config.fov_deg) / 2)
    return Cameras(centers, np.stack([right, down, forward], 1), azimuth, focal, config.image_size)


def _panned(forward: np.ndarray, to_object: np.ndarray, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """The directions (N, 3) as steep as before, but towards the multiples of pan_deg that are nearest to where the object is: for the shots
    of a place the nearest one twice, then one step to the one side, one to the other, two ..."""
    step = np.radians(config.pan_deg)
    shot = np.arange(len(forward)) % config.shots
    nearest = np.round(np.arctan2(to_object[:, 1], to_object[:, 0]) / step)
    first_side = np.repeat(rng.choice((-1, 1), len(forward) // config.shots), config.shots)
    heading = step * (nearest + first_side * (shot // 2) * (-1) ** shot)
    heading += np.radians(PAN_JITTER) * rng.uniform(-1, 1, len(forward))
    level = np.linalg.norm(forward[:, :2], axis=1)
    return np.stack([level * np.cos(heading), level * np.sin(heading), forward[:, 2]], 1)


def _write_colmap(
    folder: Path,
    names: list[str],
    cameras: Cameras,
    world: tuple[np.ndarray, np.ndarray, float],
    points: np.ndarray,
    seen: np.ndarray,
    pixels: np.ndarray,
    colours: np.ndarray,
) -> None:
    """The COLMAP model. `world` is the similarity (rotation, translation, scale) from the object frame to the COLMAP world."""
    import pycolmap

    rotation, translation, scale = world
    model = pycolmap.Reconstruction()
    size, focal = cameras.size, cameras.focal
    camera = pycolmap.Camera(model="PINHOLE", width=size, height=size, params=[focal, focal, size / 2, size / 2], camera_id=1)
    model.add_camera_with_trivial_rig(camera)
    slots = np.cumsum(seen, 1) - 1  # (N, P) the row of a point among its photograph's observations
    for i, name in enumerate(names):
        turn = cameras.rotations[i] @ rotation.T
        center = scale * rotation @ cameras.centers[i] + translation
        image = pycolmap.Image(name=name, keypoints=pixels[i][seen[i]], camera_id=1, image_id=i + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(np.concatenate([turn, -(turn @ center)[:, None]], 1)))
    for p in range(len(points)):
        track = pycolmap.Track([pycolmap.TrackElement(int(i) + 1, int(slots[i, p])) for i in np.flatnonzero(seen[:, p])])
        model.add_point3D(scale * rotation @ points[p] + translation, track, (colours[p] * 255).astype(np.uint8))
    model.update_point_3d_errors()
    folder.mkdir(parents=True)
    model.write(folder)
    check_files(folder)  # it says nothing of a disk that was full


def _png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 (H, W, 3). Pillow's takes seven times as long for 28x28 pixels, more than the picture itself."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a leading 0: the row is not filtered
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 1)) + chunk(b"IEND", b"")


@dataclass(frozen=True)
class _Job:
    """One object to render, its capture's folder OUT/family/name. `mesh` (below config.meshes) is empty for a procedural one."""

    family: str
    name: str
    number: int
    mesh: str = ""


def _render_object(out: Path, config: RenderConfig, job: _Job) -> None:
    """Renders and writes one capture. It is built beside its place and moved there when complete."""
    rng = np.random.default_rng([config.seed, zlib.crc32(job.family.encode()), job.number])
    shape = load_mesh(Path(config.meshes) / job.mesh, config.mesh_up, config.mesh_front) if job.mesh else procedural(job.family, rng)
    cameras = _cameras(config, shape.center, rng)
    around = Surroundings.draw(config.background == "plain", rng)
    # A rotation uniform over all, a translation and a scale: where COLMAP happened to put its world.
    rotation, translation, scale = world = (
        quaternion_rotation(rng.normal(size=4)),
        rng.normal(size=3) * 3,
        float(np.exp(rng.uniform(-1, 1))),
    )
    cast = Caster(shape.triangles)

    points, colours = surface_points(shape, config.points, rng)
    pixels, seen = visible(cast, cameras, points)
    keep = seen.sum(0) >= 2
    points, colours, pixels, seen = points[keep], colours[keep], pixels[:, keep], seen[:, keep]

    partial = out / ".partial" / job.family / job.name
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    names = [f"{i:03d}.{config.format}" for i in range(config.views)]
    for name, photograph in zip(names, photographs(cast, shape, around, cameras, config.supersampling), strict=True):
        if config.format == "png":
            (partial / "images" / name).write_bytes(_png(photograph))
        else:
            Image.fromarray(photograph).save(partial / "images" / name, quality=95)
    _write_colmap(partial / "sparse" / "0", names, cameras, world, points, seen, pixels, colours)

    known = not job.mesh or bool(config.mesh_front)
    facts = {
        "family": job.family,
        "front": rotation[:, 0].tolist() if known else None,
        "up": rotation[:, 2].tolist(),
        "center": (scale * rotation @ shape.center + translation).tolist(),
        "radius": scale,
        "azimuth_deg": cameras.azimuth_deg.round(6).tolist() if known else None,
        "seed": config.seed,
        "mesh": job.mesh,
    }
    (partial / "scene.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (out / job.family).mkdir(parents=True, exist_ok=True)
    partial.rename(out / job.family / job.name)


def _jobs(config: RenderConfig) -> list[_Job]:
    """What is to be rendered. A mesh gives its capture its own folder and name, so that more files in the folder change nothing for it."""
    if not config.meshes:
        return [_Job(family, f"{i:04d}", i) for family in config.families for i in range(1, config.objects + 1)]
    root = Path(config.meshes)
    jobs: dict[tuple[str, str], _Job] = {}
    for file in sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in MESH_SUFFIXES and p.is_file()):
        family = root.resolve().name if file.parent == Path() else file.parent.as_posix()
        job = _Job(family, file.stem, zlib.crc32(file.stem.encode()), file.as_posix())
        if twin := jobs.get((family, file.stem)):
            raise ValueError(f"meshes: {root / twin.mesh} and {root / file} would both become {family}/{file.stem}; rename or move one")
        jobs[family, file.stem] = job
    if not jobs:
        raise ValueError(f"meshes: no {', '.join(MESH_SUFFIXES)} file in {root}")
    return list(jobs.values())


def _same_settings(out: Path, config: RenderConfig) -> None:
    """Captures of two configs are never mixed in one folder; more objects or families of the same config are welcome."""
    ours = {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in ("objects", "families", "workers")}
    record = out / "render.json"
    if record.exists():
        theirs = json.loads(record.read_text(encoding="utf-8"))
        theirs = asdict(RenderConfig()) | theirs  # a field that there was not yet had its default
        changed = [k for k in ours if json.loads(json.dumps(theirs[k])) != ours[k]]
        if changed:
            told = "; ".join(f"{k} was {theirs[k]!r}, now {ours[k]!r}" for k in changed)
            raise ValueError(f"{out} holds captures made with other settings ({told}): render into another folder, or remove this one")
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "render.json.partial").write_text(json.dumps(ours, indent=1), encoding="utf-8")
        (out / "render.json.partial").replace(record)


def _render_all(out: Path, config: RenderConfig, todo: list[_Job]) -> Iterator[None]:
    """Renders every job, here or in worker processes, and yields after each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, len(todo))
    if workers <= 1:
        for job in todo:
            _render_object(out, config, job)
            yield
        return
    # Spawned, since a fork of a process with threads (torch, BLAS) can hang. Ctrl-C is this process's to handle.
    with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        futures = [pool.submit(_render_object, out, config, job) for job in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def render(out: Path, config: RenderConfig, progress: bool = True) -> dict[str, float]:
    """Renders the captures that `config` asks for into `out`, leaving alone those that are there already.

    Returns {"captures", "images": in all; "rendered", "skipped": captures now and before; "seconds", "images_per_second": of this call}.
    ValueError: a field of the config makes no sense, `out` holds captures of another config, or a mesh file is unusable (named).
    """
    out = Path(out)
    jobs = _jobs(config.check())
    _same_settings(out, config)
    todo = [job for job in jobs if not (out / job.family / job.name).exists()]
    shutil.rmtree(out / ".partial", ignore_errors=True)  # what a killed run left
    started = time.perf_counter()
    try:
        with writing(out), _bar(progress) as bar:
            task = bar.add_task("rendering", total=len(jobs), completed=len(jobs) - len(todo))
            for _ in _render_all(out, config, todo):
                bar.advance(task)
    finally:
        shutil.rmtree(out / ".partial", ignore_errors=True)
    seconds = time.perf_counter() - started
    return {
        "captures": len(jobs),
        "images": len(jobs) * config.views,
        "rendered": len(todo),
        "skipped": len(jobs) - len(todo),
        "seconds": seconds,
        "images_per_second": len(todo) * config.views / seconds if todo else 0.0,
    }


def _bar(shown: bool) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not shown)
