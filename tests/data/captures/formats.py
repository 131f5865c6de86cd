"""Captures of a COLMAP model written in other formats, as others write them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pycolmap

MIRROR = np.diag([-1.0, 1, 1])
OPENGL = np.diag([1.0, -1, -1])


def registered(capture: Path) -> tuple[pycolmap.Camera, list[tuple[str, np.ndarray, np.ndarray]]]:
    """The camera of a rendered capture, and name, rotation and translation (cam_from_world) of each image."""
    model = pycolmap.Reconstruction(str(capture / "sparse" / "0"))
    images = sorted(model.images.values(), key=lambda image: image.name)
    poses = [(image.name, image.cam_from_world().rotation.matrix(), image.cam_from_world().translation) for image in images]
    return model.cameras[1], poses


def cloud(capture: Path) -> np.ndarray:
    return np.array([point.xyz for point in pycolmap.Reconstruction(str(capture / "sparse" / "0")).points3D.values()])


def write_ply(file: Path, points: np.ndarray) -> None:
    head = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    file.write_text(head + "".join(" ".join(f"{v:.6f}" for v in point) + "\n" for point in points))


def mirrored(pose):
    name, rotation, translation = pose
    return name, MIRROR @ rotation @ MIRROR, MIRROR @ translation


def write_transforms(
    capture: Path, out: Path, *, opencv=False, mirror=False, applied=None, per_frame=False, images="images", shift=0, ply=True
):
    """nerfstudio's transforms.json of a rendered capture. shift: each picture gets the pose of the one so many further on."""
    camera, poses = registered(capture)
    shutil.copytree(capture / "images", out / images)
    world = np.eye(4)
    world[:3] = np.eye(4)[:3] if applied is None else applied
    where = dict(zip(("fl_x", "fl_y", "cx", "cy"), map(float, camera.params), strict=True)) | {"w": camera.width, "h": camera.height}
    frames = []
    for k, (name, _, _) in enumerate(poses):
        _, rotation, translation = mirrored(poses[(k + shift) % len(poses)]) if mirror else poses[(k + shift) % len(poses)]
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation.T @ (np.eye(3) if opencv else OPENGL), -rotation.T @ translation
        frames.append({"file_path": f"./images/{name}", "transform_matrix": (world @ pose).tolist(), **(where if per_frame else {})})
    about = {"camera_model": "OPENCV", **({} if per_frame else where), "frames": frames[::-1]}
    if applied is not None:
        about["applied_transform"] = world[:3].tolist()
    if ply:
        about["ply_file_path"] = "sparse_pc.ply"
        write_ply(out / "sparse_pc.ply", cloud(capture) @ world[:3, :3].T + world[:3, 3])
    (out / "transforms.json").write_text(json.dumps(about))


def write_co3d(capture: Path, out: Path, *, isotropic=False, mirror=False, ply=True):
    """CO3D's sequence of a rendered capture: `out` is CATEGORY/SEQUENCE, and the annotations of the category are made or added to."""
    camera, poses = registered(capture)
    shutil.copytree(capture / "images", out / "images")
    (out / "masks").mkdir()
    size = np.array([camera.width, camera.height])
    half = np.full(2, size.min() / 2) if isotropic else size / 2
    focal, middle = np.array(camera.params[:2]) / half, (size / 2 - camera.params[2:]) / half
    flip = np.diag([-1.0, -1, 1])
    frames = []
    for number, pose in enumerate(poses):
        name, rotation, translation = mirrored(pose) if mirror else pose
        view = {"R": (flip @ rotation).T.tolist(), "T": (flip @ translation).tolist(), "focal_length": focal.tolist()}
        view |= {"principal_point": middle.tolist()} | ({"intrinsics_format": "ndc_isotropic"} if isotropic else {})
        image = {"path": f"{out.parent.name}/{out.name}/images/{name}", "size": [camera.height, camera.width]}
        frames.append({"sequence_name": out.name, "frame_number": number, "image": image, "viewpoint": view})
    file = out.parent / "frame_annotations.jgz"
    others = json.loads(gzip.decompress(file.read_bytes())) if file.exists() else [{**frames[0], "sequence_name": "x", "viewpoint": None}]
    file.write_bytes(gzip.compress(json.dumps(others + frames).encode()))
    if ply:
        write_ply(out / "pointcloud.ply", cloud(capture))
