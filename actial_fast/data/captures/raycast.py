"""Photographs of a shape from pinhole cameras, by casting rays with embree. Everything here is in the object frame (shapes.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from actial_fast.data.captures.shapes import Shape

RAYS = 1 << 17  # rays cast at once: keeps the arrays in the cache, and the memory bounded whatever the image size
AMBIENT = 0.55  # of the light; the rest comes from one direction


@dataclass(frozen=True)
class Cameras:
    """Pinhole cameras in the object frame, one per photograph.

    centers (N, 3); rotations (N, 3, 3), rows right, down, forward (COLMAP's camera axes); focal in pixels; size in pixels.
    """

    centers: np.ndarray
    rotations: np.ndarray
    azimuth_deg: np.ndarray
    focal: float
    size: int

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, P, 2), the first pixel's centre at 0.5, and depths (N, P) of points (P, 3)."""
        local = np.einsum("nij,npj->npi", self.rotations, points[None] - self.centers[:, None])
        return self.focal * local[..., :2] / local[..., 2:] + self.size / 2, local[..., 2]


@dataclass(frozen=True)
class Surroundings:
    """Light, ground and sky of one object, drawn independently of its front so that they say nothing about the azimuth."""

    light: np.ndarray  # (3,) unit, towards the light
    ground: np.ndarray  # (3,) RGB
    sky: np.ndarray  # (2, 3) RGB at the horizon and overhead
    waves: np.ndarray  # (2, 3): two wave vectors and phases of the ground's texture
    plain: bool

    @staticmethod
    def draw(plain: bool, rng: np.random.Generator) -> Surroundings:
        azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(40, 70))
        light = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
        ground = rng.uniform(0.3, 0.6) + rng.uniform(-0.06, 0.06, 3)
        horizon = rng.uniform(0.75, 0.9) + rng.uniform(-0.05, 0.05, 3)
        turn, pitch = rng.uniform(0, np.pi), rng.uniform(2.5, 6.0)
        waves = np.array([[np.cos(turn), np.sin(turn), 0.0], [-np.sin(turn), np.cos(turn), 0.0]]) * pitch
        waves[:, 2] = rng.uniform(0, 2 * np.pi, 2)
        return Surroundings(light, ground, np.stack([horizon, horizon * (0.7, 0.82, 1.0)]), waves, plain)

    def colours(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """What float32 rays (R, 3) that miss the object see, RGB float32 (R, 3)."""
        ground, sky, waves = (a.astype(np.float32) for a in (self.ground, self.sky, self.waves))
        if self.plain:
            return np.broadcast_to(sky[0], origins.shape)
        x, y, z = directions.T
        slope = z / np.sqrt(x * x + y * y)
        out = sky[0] + np.clip(slope, 0, 1)[:, None] * (sky[1] - sky[0])
        below = np.flatnonzero(slope < -1e-3)
        reach = -origins[below, 2] / z[below]
        px, py = origins[below, 0] + reach * x[below], origins[below, 1] + reach * y[below]
        (ax, ay, a), (bx, by, b) = waves
        texture = np.sin(ax * px + ay * py + a) * np.sin(bx * px + by * py + b)
        far = np.sqrt(px * px + py * py)
        near = 1 + 0.3 * np.exp(-0.5 * far) * texture  # the texture fades before it gets finer than a pixel
        haze = np.exp(-0.06 * far)[:, None]
        out[below] = haze * (ground * near[:, None]) + (1 - haze) * sky[0]
        return out


class Caster:
    """Casts rays at triangles (F, 3, 3)."""

    def __init__(self, triangles: np.ndarray):
        self.scene = EmbreeScene()
        self.mesh = TriangleMesh(self.scene, np.ascontiguousarray(triangles, np.float32))  # has to live as long as the scene

    def __call__(self, origins: np.ndarray, directions: np.ndarray) -> dict[str, np.ndarray]:
        """First hits of rays (R, 3): primID (R,), -1 for none; tfar (R,) in lengths of the direction; u, v (R,), the weights of corners 1
        and 2 in the triangle."""
        return self.scene.run(np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32), output=True)


def photographs(cast: Caster, shape: Shape, around: Surroundings, cameras: Cameras, supersampling: int) -> np.ndarray:
    """Photographs uint8 (N, S, S, 3): flat Lambert shading under one distant light, averaged over supersampling**2 rays a pixel."""
    size, sub, count = cameras.size, supersampling, len(cameras.centers)
    samples, pixels = sub * sub, size * size
    grid = np.arange(size) - size / 2
    fine = grid[None] + ((np.arange(sub) + 0.5) / sub)[:, None]  # (sub, S)

    def rays(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        y, x = np.broadcast_arrays(y, x)
        return np.stack([x.ravel(), y.ravel(), np.full(x.size, cameras.focal)], 1).astype(np.float32) / np.float32(cameras.focal)

    local = rays(fine[:, None, :, None], fine[None, :, None, :])  # (samples * pixels, 3), samples outermost
    middle = rays(grid[:, None] + 0.5, grid[None] + 0.5)  # (pixels, 3): the background is smooth, one look per pixel will do

    edges = shape.triangles[:, 1:] - shape.triangles[:, :1]
    normals = np.cross(edges[:, 0], edges[:, 1])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    lit, normals = (normals @ around.light).astype(np.float32), normals.astype(np.float32)
    first, second, third = np.moveaxis(shape.colours.astype(np.float32), 1, 0)

    out = np.empty((count, size, size, 3), np.uint8)
    step = max(1, RAYS // len(local))
    for start in range(0, count, step):
        rotations = cameras.rotations[start : start + step].astype(np.float32)
        centers = cameras.centers[start : start + step].astype(np.float32)
        n = len(rotations)
        directions = (local @ rotations).reshape(-1, 3)
        hit = cast(np.repeat(centers, len(local), 0), directions)
        at = np.flatnonzero(hit["primID"] >= 0)
        face, u, v = hit["primID"][at], hit["u"][at, None], hit["v"][at, None]
        colour = np.zeros((n * samples * pixels, 3), np.float32)
        away = (normals[face] * directions[at]).sum(1) > 0  # the back of the face is seen: it is lit like a front that looks here
        shade = AMBIENT + (1 - AMBIENT) * np.maximum(np.where(away, -lit[face], lit[face]), 0)
        colour[at] = ((1 - u - v) * first[face] + u * second[face] + v * third[face]) * shade[:, None]
        total = colour.reshape(n, samples, pixels, 3).sum(1).reshape(-1, 3)
        missed = samples - (hit["primID"] >= 0).reshape(n, samples, pixels).sum(1).reshape(-1)
        some = np.flatnonzero(missed)
        total[some] += missed[some, None] * around.colours(np.repeat(centers, pixels, 0)[some], (middle @ rotations).reshape(-1, 3)[some])
        out[start : start + n] = np.clip(total * np.float32(255 / samples) + np.float32(0.5), 0, 255).reshape(n, size, size, 3)
    return out


def surface_points(shape: Shape, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 3) spread evenly over the surface, and their colours (P, 3) in [0, 1]."""
    edges = shape.triangles[:, 1:] - shape.triangles[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    face = rng.choice(len(area), count, p=area / area.sum())
    weights = rng.dirichlet((1, 1, 1), count)[..., None]
    return (weights * shape.triangles[face]).sum(1), (weights * shape.colours[face]).sum(1)


def visible(cast: Caster, cameras: Cameras, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, P, 2) of points (P, 3) in every photograph, and bool (N, P): inside the frame with nothing in front."""
    pixels, depth = cameras.project(points)
    rays = (points[None] - cameras.centers[:, None]).reshape(-1, 3)
    first = cast(np.repeat(cameras.centers, len(points), 0), rays)["tfar"].reshape(depth.shape)  # 1 at the point itself
    inside = (depth > 0) & (pixels > 0).all(-1) & (pixels < cameras.size).all(-1)
    return pixels, inside & (np.abs(first - 1) < 1e-3)
