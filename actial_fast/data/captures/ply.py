"""Point clouds of captures whose format keeps no tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MOST = 20_000  # points that say as much as all


def points_of(file: Path) -> np.ndarray:
    """The points of a PLY file in world units, float64 (P, 3), evenly thinned out to 20,000; ValueError for one that cannot be read."""
    import trimesh  # takes a second, which captures without a cloud need not wait for

    try:
        points = np.array(getattr(trimesh.load(file, process=False), "vertices", []), np.float64).reshape(-1, 3)
    except Exception as error:  # whatever its parser raises
        raise ValueError(f"{file.name} cannot be read ({type(error).__name__}: {error})") from None
    points = points[np.isfinite(points).all(1)]
    return points[:: max(1, -(-len(points) // MOST))]
