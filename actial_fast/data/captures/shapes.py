"""Objects to render: four procedural families with a clear front, and users' mesh files.

The object frame is right-handed: +x is the front, +y the object's own left, +z up, the ground is z = 0. Every object is scaled so that the
sphere about the centre of its bounding box that holds all of it has radius 1.

Procedural objects carry a colour code: a face's hue tells which way it looks (front about red, left about green, back about cyan, right
about violet, jittered per object), so that a model far too small to know what a headlight is can still learn which side it sees.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDES = ("front", "left", "back", "right")  # counterclockwise seen from above, every 90 degrees from the front
MESH_SUFFIXES = (".obj", ".gltf", ".glb", ".ply")
_AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
_NORMALS = np.array([(1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)], float)  # SIDES, then top and bottom
# A unit cube's faces in the order of _NORMALS, each a quadrilateral that winds counterclockwise seen from outside.
_CUBE = 0.5 * np.array(
    [
        [(1, -1, -1), (1, 1, -1), (1, 1, 1), (1, -1, 1)],
        [(1, 1, -1), (-1, 1, -1), (-1, 1, 1), (1, 1, 1)],
        [(-1, 1, -1), (-1, -1, -1), (-1, -1, 1), (-1, 1, 1)],
        [(-1, -1, -1), (1, -1, -1), (1, -1, 1), (-1, -1, 1)],
        [(-1, -1, 1), (1, -1, 1), (1, 1, 1), (-1, 1, 1)],
        [(-1, 1, -1), (1, 1, -1), (1, -1, -1), (-1, -1, -1)],
    ],
    float,
)

DARK = (0.13, 0.13, 0.15)
GLASS = (0.22, 0.27, 0.33)
PALE = (0.97, 0.95, 0.85)
Colour = tuple[float, float, float]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Shape:
    """Coloured triangles in the object frame. triangles: float64 (F, 3, 3), corners wound counterclockwise seen from outside where the
    source is; colours: float64 (F, 3, 3), RGB in [0, 1] per corner."""

    triangles: np.ndarray
    colours: np.ndarray

    @property
    def center(self) -> np.ndarray:
        """The centre of the bounding box, float64 (3,)."""
        corners = self.triangles.reshape(-1, 3)
        return (corners.min(0) + corners.max(0)) / 2


class _Builder:
    """Collects painted primitives of one object. `palette` (6, 3) holds one colour per entry of _NORMALS."""

    def __init__(self, rng: np.random.Generator):
        shift = rng.uniform(-12, 12)  # the object's own tint, on top of which each side strays a little
        sides = [
            colorsys.hsv_to_rgb((90 * k + shift + rng.uniform(-6, 6)) / 360 % 1, rng.uniform(0.65, 0.9), rng.uniform(0.75, 1.0))
            for k in range(len(SIDES))
        ]
        top = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.0, 0.12), rng.uniform(0.6, 0.85))
        self.palette = np.array([*sides, top, DARK])
        self.triangles: list[np.ndarray] = []
        self.colours: list[np.ndarray] = []

    def _add(self, quads: np.ndarray, colours: np.ndarray) -> None:
        """quads (Q, 4, 3), colours (Q, 3)."""
        self.triangles.append(quads[:, [[0, 1, 2], [0, 2, 3]]].reshape(-1, 3, 3))
        self.colours.append(np.repeat(colours, 2, 0)[:, None].repeat(3, 1))

    def box(self, center: Vector, size: Vector, pitch: float = 0.0, colour: Colour | None = None) -> None:
        """A box; `pitch` radians raises its +x end. Without `colour` each face has the colour of the side it looks to before the pitch."""
        c, s = np.cos(pitch), np.sin(pitch)
        quads = (_CUBE * np.array(size)) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]).T + np.array(center)
        self._add(quads, self.palette if colour is None else np.tile(colour, (6, 1)))

    def cylinder(
        self, center: Vector, radii: tuple[float, float], height: float, axis: str = "z", colour: Colour | None = None, n: int = 24
    ) -> None:
        """A truncated cone of radii (lower end, upper end) along `axis` ("z", or "y" for a wheel), its faces painted like a box's."""
        angle = 2 * np.pi * np.arange(n + 1) / n
        ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(n + 1)], 1)
        low, high = ring * radii[0], ring * radii[1]
        low[:, 2], high[:, 2] = -height / 2, height / 2
        poles = np.zeros((2, n, 3))
        poles[0, :, 2], poles[1, :, 2] = -height / 2, height / 2
        wall = np.stack([low[:-1], low[1:], high[1:], high[:-1]], 1)
        caps = [np.stack([poles[1], high[:-1], high[1:], poles[1]], 1), np.stack([poles[0], low[1:], low[:-1], poles[0]], 1)]
        quads = np.concatenate([wall, *caps])
        normals = np.repeat([(0, 0, 1), (0, 0, -1)], n, 0)
        normals = np.concatenate([(ring[:-1] + ring[1:]) / 2, normals])
        if axis == "y":  # (x, y, z) -> (x, -z, y): a proper rotation
            quads, normals = (np.stack([p[..., 0], -p[..., 2], p[..., 1]], -1) for p in (quads, normals))
        painted = self.palette[np.argmax(normals @ _NORMALS.T, 1)] if colour is None else np.tile(colour, (len(quads), 1))
        self._add(quads + np.array(center), painted)


def _vehicle(b: _Builder, rng: np.random.Generator) -> None:
    length, width, body, wheel = rng.uniform(1.7, 2.3), rng.uniform(0.85, 1.05), rng.uniform(0.32, 0.45), rng.uniform(0.17, 0.23)
    cabin, roof = length * rng.uniform(0.35, 0.55), rng.uniform(0.35, 0.55)
    back = rng.uniform(0.0, 0.15) * length  # the cabin sits towards the back: the bonnet is in front
    base = wheel * 1.1
    b.box((0, 0, base + body / 2), (length, width, body))
    x = -length / 2 + back + cabin / 2
    b.box((x, 0, base + body + roof / 2), (cabin, width * 0.88, roof))
    for sign in (1, -1):  # windows, set into each side of the cabin
        b.box((x, sign * width * 0.44, base + body + roof * 0.5), (cabin * 0.8, 0.02, roof * 0.5), colour=GLASS)
        b.box((x + sign * cabin / 2, 0, base + body + roof * 0.5), (0.02, width * 0.7, roof * 0.5), colour=GLASS)
        b.box((length / 2, sign * width * 0.36, base + body * 0.62), (0.04, width * 0.18, body * 0.35), colour=PALE)
        for end in (0.31, -0.31):
            b.cylinder((end * length, sign * width / 2, wheel), (wheel, wheel), 0.16, axis="y", colour=DARK, n=16)


def _chair(b: _Builder, rng: np.random.Generator) -> None:
    depth, width = rng.uniform(0.75, 0.95), rng.uniform(0.8, 1.0)
    seat, rest, leg, thick = rng.uniform(0.55, 0.8), rng.uniform(0.7, 1.0), rng.uniform(0.09, 0.14), rng.uniform(0.12, 0.2)
    for x in (1, -1):
        for y in (1, -1):
            b.box((x * (depth - leg) / 2, y * (width - leg) / 2, seat / 2), (leg, leg, seat))
    b.box((0, 0, seat + thick / 2), (depth, width, thick))
    b.box((-depth / 2 + thick / 2, 0, seat + thick + rest / 2), (thick, width, rest), pitch=rng.uniform(-0.02, 0.12))
    if rng.random() < 0.5:
        for y in (1, -1):
            b.box((0.0, y * (width - leg) / 2, seat + thick + 0.3), (depth * 0.9, leg, leg))
            b.box((depth * 0.38, y * (width - leg) / 2, seat + thick + 0.15), (leg, leg, 0.3))


def _animal(b: _Builder, rng: np.random.Generator) -> None:
    length, width, body = rng.uniform(1.0, 1.4), rng.uniform(0.45, 0.65), rng.uniform(0.4, 0.6)
    leg, thick, head = rng.uniform(0.4, 0.75), rng.uniform(0.13, 0.19), rng.uniform(0.36, 0.5)
    neck = rng.uniform(0.0, 0.45)
    for end in (1, -1):
        for y in (1, -1):
            b.box((end * (length / 2 - thick), y * (width - thick) / 2, leg / 2), (thick, thick, leg))
    b.box((0, 0, leg + body / 2), (length, width, body))
    x, z = length / 2 + head * 0.25, leg + body + neck
    b.box((length / 2 - 0.08, 0, leg + body * 0.7 + neck / 2), (0.24, width * 0.5, body * 0.5 + neck))
    b.box((x, 0, z), (head, head * 0.9, head))
    b.box((x + head * 0.7, 0, z - head * 0.15), (head * 0.45, head * 0.5, head * 0.45))
    b.box((x + head * 0.93, 0, z - head * 0.05), (0.02, head * 0.3, head * 0.2), colour=DARK)
    ear = rng.uniform(0.12, 0.35)
    for y in (1, -1):
        b.box((x - head * 0.3, y * head * 0.35, z + head / 2 + ear / 2), (0.1, head * 0.22, ear))
        b.box((x + head / 2, y * head * 0.27, z + head * 0.2), (0.02, head * 0.16, head * 0.16), colour=DARK)
    tail = rng.uniform(0.3, 0.55)
    b.box((-length / 2 - tail * 0.35, 0, leg + body * 0.85), (tail, 0.1, 0.1), pitch=rng.uniform(-0.7, 0.4))


def _pot(b: _Builder, rng: np.random.Generator) -> None:
    low, high, height = rng.uniform(0.45, 0.6), rng.uniform(0.35, 0.55), rng.uniform(0.7, 1.0)
    b.cylinder((0, 0, height / 2), (low, high), height)
    b.cylinder((0, 0, height + 0.04), (high * 0.9, high * 0.75), 0.08)
    b.cylinder((0, 0, height + 0.14), (0.08, 0.1), 0.13, colour=DARK, n=12)
    wall = (low + high) / 2
    spout = rng.uniform(0.4, 0.6)
    b.box((wall + spout * 0.3, 0, height * 0.62), (spout, 0.2, 0.2), pitch=rng.uniform(0.5, 0.9))
    reach, thick = rng.uniform(0.25, 0.4), rng.uniform(0.1, 0.14)
    for z in (0.3, 0.75):
        b.box((-wall - reach / 2 + 0.05, 0, height * z), (reach + 0.1, thick, thick))
    b.box((-wall - reach, 0, height * 0.525), (thick, thick, height * 0.45 + thick))


FAMILIES: dict[str, Callable[[_Builder, np.random.Generator], None]] = {
    "vehicle": _vehicle,
    "chair": _chair,
    "animal": _animal,
    "pot": _pot,
}


def _normalised(triangles: np.ndarray, colours: np.ndarray) -> Shape:
    """On the ground, over the origin, inside a sphere of radius 1 about the centre of the bounding box."""
    corners = triangles.reshape(-1, 3)
    low, high = corners.min(0), corners.max(0)
    radius = np.linalg.norm(corners - (low + high) / 2, axis=1).max()
    origin = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    return Shape((triangles - origin) / radius, colours)


def procedural(family: str, rng: np.random.Generator) -> Shape:
    """A new object of `family` (a key of FAMILIES), its proportions and colours drawn from `rng`."""
    builder = _Builder(rng)
    FAMILIES[family](builder, rng)
    return _normalised(np.concatenate(builder.triangles), np.concatenate(builder.colours))


def axis_frame(up: str, front: str) -> np.ndarray:
    """The rotation (3, 3) into the object frame from a file whose up and front axes are named like "y" or "-z".

    An empty `front` takes any horizontal axis. ValueError when the two do not name two different axes.
    """

    def vector(name: str) -> np.ndarray:
        axis = name.lstrip("+-").lower()
        if axis not in _AXES or len(name) > len(axis) + 1:
            raise ValueError(f"axis {name!r}: write one of x, y, z, with a - in front for the opposite direction")
        return np.array(_AXES[axis], float) * (-1 if name.startswith("-") else 1)

    z = vector(up)
    x = vector(front) if front else np.roll(z, 1)
    if abs(x @ z) > 0.5:
        raise ValueError(f"mesh_front {front!r} and mesh_up {up!r} lie on the same axis: name two different ones")
    return np.stack([x, np.cross(z, x), z])


def load_mesh(path: Path, up: str = "y", front: str = "") -> Shape:
    """The object in a mesh file (OBJ, glTF, GLB, PLY) read by trimesh, normalised and turned from its `up` and `front` axes.

    Colours come from vertex or face colours, or from the texture sampled at the vertices; grey without any. ValueError names the file when
    it cannot be read or holds no surface.
    """
    import trimesh  # here, since procedural objects do without it

    try:
        mesh = trimesh.load_mesh(path)
        if isinstance(mesh, trimesh.Scene):
            mesh = mesh.to_mesh()
        triangles = np.asarray(mesh.triangles, float)
    except Exception as error:  # trimesh's readers raise whatever their format's parser raises
        raise ValueError(
            f"mesh {path} cannot be read ({type(error).__name__}: {error}); is it a complete OBJ, glTF, GLB or PLY file?"
        ) from None
    solid = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) > 0
    if not solid.any() or not np.isfinite(triangles).all():
        raise ValueError(f"mesh {path} has no surface to render ({len(triangles)} triangles, finite area: {bool(solid.any())})")
    visual = mesh.visual
    if isinstance(visual, trimesh.visual.TextureVisuals):
        visual = visual.to_color()
    assert isinstance(visual, trimesh.visual.ColorVisuals)  # every Trimesh has either
    if visual.kind == "face":
        colours = np.repeat(visual.face_colors[:, None, :3] / 255, 3, 1)
    elif visual.kind == "vertex":
        colours = visual.vertex_colors[mesh.faces][..., :3] / 255
    else:
        colours = np.full(triangles.shape, 0.6)
    return _normalised(triangles[solid] @ axis_frame(up, front).T, colours[solid])
