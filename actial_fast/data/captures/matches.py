"""Does a world without tracks show what its photographs show? What two photographs have in common tells.

Details that are found in both of a pair lie on each other's epipolar lines, by the poses as they are; were left and right swapped, or near
and far, they would do so mirrored, or turned by half. A dozen pairs tell of the capture as a whole.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pycolmap
from PIL import Image, ImageOps

from actial_fast.data.captures.geometry import unit
from actial_fast.data.captures.photos import BROKEN, UNVERIFIED, BadCapture, Photos
from actial_fast.data.captures.tracks import MAX_REPROJECTION, judge
from actial_fast.data.captures.turned import fits

PAIRS = 12
APART = np.radians(15)  # between the cameras of a pair: nearer ones see the same in any world, others see little in common
NEAREST, FARTHEST = np.radians(4), np.radians(40)
LONGEST, FEATURES = 800, 3000  # side of a picture in pixels, details looked for in it
RATIO = 0.8  # of the second best match's distance: Lowe's test
ENOUGH = 40  # matches of all pairs
SHARE = 0.3  # of them that must fit one of the worlds
MIRRORED = np.array([[1.0, 1], [-1, 1], [-1, -1]])  # what the two kinds of swapped worlds do to a picture's x and y


def matched_errors(path: Path, photos: Photos, usable: np.ndarray) -> np.ndarray:
    """Each photograph's median distance of details from their epipolar lines over its diagonal, (N,); that of all for one not looked at.

    usable: bool (N,), photographs to look at. BadCapture as of tracks.reprojection_errors; UNVERIFIED where too little is found."""
    pairs = _pairs(photos, usable)
    looks = {n: _details(photos, n) for n in {n for pair in pairs for n in pair}}
    found = [(pair, _errors(photos, pair, *(looks[n] for n in pair))) for pair in pairs]
    total = sum(len(errors) for _, errors in found)
    if total < ENOUGH:
        shows = f"{len(pairs)} pairs of pictures have {total} details in common, and {ENOUGH} are needed"
        raise BadCapture(path, UNVERIFIED, f"{shows}; verify=off trusts the poses")
    everything = np.concatenate([errors for _, errors in found])
    fit = everything[everything.min(1) <= MAX_REPROJECTION]  # others are no matches
    if len(fit) < SHARE * total:
        raise BadCapture(path, BROKEN, f"{len(fit)} of {total} common details lie where the poses put them")
    judge(path, fit)
    out = np.full(len(photos.names), np.median(fit[:, 0]))
    for n in looks:
        own = np.concatenate([errors[:, 0] for pair, errors in found if n in pair])
        if len(own) >= ENOUGH and (own <= MAX_REPROJECTION).mean() < SHARE:
            out[n] = np.median(own)
    return out


def _pairs(photos: Photos, usable: np.ndarray) -> list[tuple[int, int]]:
    """Pairs spread over the photographs, their cameras about 15 degrees apart."""
    there = np.flatnonzero(usable)
    apart = np.arccos(np.clip(photos.rotations[there, 2] @ photos.rotations[there, 2].T, -1, 1))
    fit = (apart >= NEAREST) & (apart <= FARTHEST)
    best = np.where(fit, np.abs(apart - APART), np.inf).argmin(1)
    chosen = [(i, int(best[i])) for i in np.flatnonzero(fit.any(1))]
    unordered = sorted({(min(pair), max(pair)) for pair in chosen})
    picked = [unordered[i] for i in np.unique(np.linspace(0, len(unordered) - 1, PAIRS).astype(int))] if unordered else []
    return [(int(there[i]), int(there[j])) for i, j in picked]


def _details(photos: Photos, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a photograph has details, in pixels of its camera's size (M, 2), and what they look like, unit (M, 128)."""
    camera = photos.cameras[n]
    with Image.open(photos.folder / photos.names[n]) as handle:
        picture = handle if fits(*handle.size, camera) else ImageOps.exif_transpose(handle)
        gray = picture.convert("L")
    gray.thumbnail((LONGEST, LONGEST))
    found, looks = _sift().extract_from_uint8_array(np.ascontiguousarray(gray))
    places = np.array([(one.x, one.y) for one in found], float).reshape(-1, 2)
    scale = np.array([camera.width / gray.width, camera.height / gray.height])
    return places * scale, unit(np.asarray(looks.data, np.float32).reshape(-1, 128))


@functools.cache
def _sift() -> pycolmap.FeatureExtractor:
    options = pycolmap.FeatureExtractionOptions()
    options.sift.max_num_features = FEATURES
    before, pycolmap.logging.minloglevel = pycolmap.logging.minloglevel, pycolmap.logging.Level.WARNING.value  # it tells that it is made
    try:
        return pycolmap.FeatureExtractor.create(options, pycolmap.Device.cpu)
    finally:
        pycolmap.logging.minloglevel = before


def _errors(photos: Photos, pair: tuple[int, int], one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of the details that two photographs have in common: their distances from where each world has them, (M, 3), over the diagonal."""
    if min(len(one[0]), len(other[0])) < 2:
        return np.empty((0, 3))
    near = one[1] @ other[1].T  # cosines
    best = near.argmax(1)
    top = -np.sort(-near, axis=1)[:, :2]
    distance = np.sqrt(np.maximum(2 - 2 * top, 0))
    mutual = near.argmax(0)[best] == np.arange(len(best))
    kept = np.flatnonzero(mutual & (distance[:, 0] < RATIO * distance[:, 1]))
    if not len(kept):
        return np.empty((0, 3))
    i, j = pair
    rays = [photos.cameras[n].cam_from_img(where) for n, where in ((i, one[0][kept]), (j, other[0][best[kept]]))]
    rotation = photos.rotations[j] @ photos.rotations[i].T
    x, y, z = photos.translations[j] - rotation @ photos.translations[i]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation
    camera = photos.cameras[i]
    scale = camera.mean_focal_length() / np.hypot(camera.width, camera.height)
    return scale * np.stack([_sampson(essential, *(ray * signs for ray in rays)) for signs in MIRRORED], 1)


def _sampson(essential: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distance (M,) of normalised places (M, 2) in two pictures from ones on each other's epipolar lines, to first order."""
    a, b = (np.column_stack([ray, np.ones(len(ray))]) for ray in (one, other))
    line, back = a @ essential.T, b @ essential
    steep = np.sqrt((line[:, :2] ** 2).sum(1) + (back[:, :2] ** 2).sum(1))
    return np.abs((line * b).sum(1)) / np.maximum(steep, 1e-12)
