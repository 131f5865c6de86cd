"""What pictures look like: each kind of file that people have, in small, beside the pixels that a viewer shows."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from actial_fast.data.sources import picture
from actial_fast.data.sources.picture import decode, encoded
from actial_fast.data.sources.row import BadRow
from actial_fast.packing.images import ImageSettings, ImageStore
from actial_fast.report.pictures import picture_html

TURNS = {  # EXIF's orientation -> what a viewer does to the stored pixels (numpy, from the tag's definition)
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
STORED = np.zeros((16, 32, 3), np.uint8)  # four flat gray fields, so that JPEG changes little
STORED[:8, :16], STORED[:8, 16:], STORED[8:, :16], STORED[8:, 16:] = 250, 170, 90, 10


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def exif(value: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = value
    return tags


def close(pixels: np.ndarray, wanted: np.ndarray, most: int = 40) -> bool:
    return pixels.shape == wanted.shape and int(np.abs(pixels.astype(int) - wanted).max()) <= most


@pytest.mark.parametrize("form, options", [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})])
@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_is_applied_in_every_container(form, options, tag):
    image = Image.fromarray(STORED)
    if form == "MPO":
        options = {"save_all": True, "append_images": [image]}
    data = saved(image, form, exif=exif(tag), **options)
    assert close(decode(data, ""), TURNS.get(tag, TURNS[1])(STORED), 60)


def test_orientation_holds_wherever_a_picture_goes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(data := saved(Image.fromarray(STORED), "JPEG", quality=95, exif=exif(6)))
    upright = TURNS[6](STORED)
    settings = ImageSettings(14, 2, 2, 28 * 28 * 2, 28 * 28 * 4, 3, (0.5,) * 3, (0.5,) * 3)
    store = ImageStore(settings, tmp_path / "store")
    assert store.grid(store.put(tmp_path / "a.jpg")) == store.grid(store.put(data)) == (1, 4, 2)
    again, kind = encoded(data, "")  # what a server is sent needs no metadata to be right
    assert kind == "PNG" and close(np.asarray(Image.open(io.BytesIO(again)).convert("RGB")), upright)
    plain = saved(Image.fromarray(STORED), "JPEG")
    assert encoded(plain, "") == (plain, "JPEG")
    shown = picture_html("data:image/jpeg;base64," + base64.b64encode(data + b"\0" * 70_000).decode())
    card = Image.open(io.BytesIO(base64.b64decode(shown.partition("base64,")[2].partition('"')[0])))
    assert card.size == (16, 32)


def test_a_damaged_exif_block_says_nothing():
    data = saved(Image.fromarray(STORED), "JPEG", quality=95, exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + b"\x07" * 30)
    assert close(decode(data, ""), STORED)


DRAWN = np.zeros((4, 8), bool)
DRAWN[:, 2:4] = True


def drawing(mode: str) -> bytes:
    """A black stroke on nothing."""
    alpha = np.where(DRAWN, 255, 0).astype(np.uint8)
    rgba = np.dstack([np.zeros((4, 8, 3), np.uint8), alpha])
    if mode == "RGBA":
        return saved(Image.fromarray(rgba))
    if mode == "hidden colours":  # what is under full transparency is not shown
        rgba[~DRAWN, :3] = (200, 30, 120)
        return saved(Image.fromarray(rgba))
    if mode == "WEBP":
        return saved(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    if mode == "LA":
        return saved(Image.fromarray(np.dstack([np.zeros((4, 8), np.uint8), alpha])))
    if mode in ("P", "GIF"):
        image = Image.fromarray(np.where(DRAWN, 1, 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 255, 0, 0, 0, 0] + [0] * 762)
        return saved(image, "GIF" if mode == "GIF" else "PNG", transparency=0)
    gray = np.where(DRAWN, 0, 90).astype(np.uint8)
    if mode == "L and a transparent value":
        return saved(Image.fromarray(gray), transparency=90)
    return saved(Image.fromarray(np.dstack([gray] * 3)), transparency=(90, 90, 90))


@pytest.mark.parametrize(
    "mode", ["RGBA", "hidden colours", "WEBP", "LA", "P", "GIF", "L and a transparent value", "RGB and a transparent value"]
)
def test_transparency_is_laid_over_white(mode):
    assert (decode(drawing(mode), "") == np.where(DRAWN, 0, 255)[..., None]).all()


def test_half_transparent_is_mixed():
    data = saved(Image.fromarray(np.full((2, 2, 4), (0, 0, 0, 128), np.uint8)))
    assert set(decode(data, "").ravel().tolist()) <= {126, 127, 128}


RAMP = np.linspace(0, 65535, 256).reshape(16, 16).round()


@pytest.mark.parametrize("form, dtype", [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("float TIFF", "f4"), ("PGM", "<u2")])
def test_ranges_are_scaled(form, dtype):
    if form == "PGM":
        data = b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes()
    elif form == "float TIFF":
        data = saved(Image.fromarray((RAMP / 65535).astype("f4")), "TIFF")
    else:
        data = saved(Image.fromarray(RAMP.astype(dtype)), form)
    assert np.abs(decode(data, "")[..., 0].astype(float) - RAMP / 257).max() <= 0.51


@pytest.mark.parametrize("values", [np.array([[0.0, 3.5]]), np.array([[np.nan, 0.5]]), np.array([[-1.0, 1.0]])])
def test_floats_without_a_known_range_are_refused(values):
    with pytest.raises(BadRow, match="values are floats from"):
        decode(saved(Image.fromarray(values.astype("f4")), "TIFF"), "f:1")


def test_integers_of_32_bits_are_refused():
    with pytest.raises(BadRow, match="32-bit integers"):
        decode(saved(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"), "f:1")


@pytest.mark.parametrize(
    "image, wanted",
    [
        (Image.fromarray(DRAWN), np.where(DRAWN, 255, 0)[..., None]),
        (Image.fromarray(np.where(DRAWN, 9, 200).astype(np.uint8)), np.where(DRAWN, 9, 200)[..., None]),
        (Image.new("CMYK", (3, 3), (0, 255, 255, 0)), np.full((3, 3, 3), (255, 0, 0))),
        (Image.new("P", (3, 3), 0), np.zeros((3, 3, 3))),
    ],
    ids=["1", "L", "CMYK", "P"],
)
def test_other_modes(image, wanted):
    assert close(decode(saved(image, "TIFF"), ""), np.broadcast_to(wanted, decode(saved(image, "TIFF"), "").shape), 1)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_shows_its_first_frame_and_is_told(form, caplog, monkeypatch):
    monkeypatch.setattr(picture, "told", picture.told.__class__())
    frames = [Image.new("RGB", (9, 9), color) for color in ((250, 0, 0), (0, 0, 250))]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {}))
    for where in ("f:1", "f:2"):
        assert close(decode(data, where), np.full((9, 9, 3), (250, 0, 0)), 6)
    assert next(text for record in caplog.records if "first is shown" in (text := record.getMessage())).startswith("f:1: an animation")
    picture.told.close()
    assert "2 times: an animation" in caplog.text and caplog.text.count("f:") == 1


PHOTO = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)), "JPEG")
NO_PICTURES = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><head><title>404</title>", "HTML page"),
    "html without a type": (b"<html lang='en'>", "HTML page"),
    "html with a comment": (b"<!-- page -->\n<HTML>", "HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML text"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "svg in xml": (b"<?xml version='1.0'?>\n<!-- x -->\n<svg/>", "SVG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; pip install pillow-heif"),
    "mp4": (b"\0\0\0\x18ftypmp42\0\0\0\0", "video"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "zip": (b"PK\x03\x04....", "archive"),
    "json": (b'{"detail": "not found"}', "JSON text"),
    "text": (b"Too many requests", "text, not a picture"),
    "data url": (b"data:image/png;base64,iVBORw0", "data URL as text"),
    "numpy": (b"\x93NUMPY\x01\0", "NumPy"),
    "noise": (bytes(range(128, 256)), "no picture"),
    "cut jpeg": (PHOTO[: len(PHOTO) // 2], "cannot be decoded"),
    "only a header": (saved(Image.new("RGB", (9, 9)))[:20], "."),
    "broken png": (
        saved(Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 30, 3), np.uint8)))[:90] + b"\0" * 200,
        "cannot be decoded|no picture",
    ),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_named(name, tmp_path):
    data, reason = NO_PICTURES[name]
    (tmp_path / "a.jpg").write_bytes(data)
    said = []
    for image in (data, tmp_path / "a.jpg"):
        with pytest.raises(BadRow, match=reason) as raised:
            decode(image, "f:3")
        said.append(str(raised.value))
    assert "0x" not in "".join(said) and max(map(len, said)) < 500 and "a.jpg" in said[1]
    store = ImageStore(ImageSettings(14, 2, 2, 784, 3136, 3, (0.5,) * 3, (0.5,) * 3), tmp_path / "store")
    with pytest.raises(BadRow) as raised:  # training says the same words
        store.put(tmp_path / "a.jpg", "f:3")
    assert str(raised.value) == said[1]


def test_missing_files(tmp_path):
    for path, reason in ((tmp_path / "no.png", "does not exist"), (tmp_path, "cannot be read"), (Path("a\0b.png"), "cannot be read")):
        with pytest.raises(BadRow, match=reason):
            decode(path, "f:1")
    with pytest.raises(BadRow, match=r"\d+ characters") as raised:
        decode(Path("x" * 100_000), "f:1")
    assert len(str(raised.value)) < 1000


def header(width: int, height: int) -> bytes:
    """A PNG that ends after its header, as much as the limit looks at."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 0)
        + b"IDAT"
        + b"\0" * 4
    )


def test_the_limit_is_above_cameras_and_a_key():
    phone = saved(Image.new("1", (8160, 6144)))  # 50,135,040 pixels
    assert decode(phone, "").shape == (6144, 8160, 3)
    with pytest.raises(BadRow, match=r"over 1000000 pixels; data\.max_image_pixels"):
        decode(phone, "", 1_000_000)
    for width, height in ((20_000, 10_000), (60_000, 60_000)):
        with pytest.raises(BadRow, match=f"{width}x{height}, over 128000000|DecompressionBomb"):
            decode(header(width, height), "")
    with pytest.raises(BadRow, match="one side must not be more than 200 times the other"):
        decode(saved(Image.new("L", (2010, 10))), "")


def test_mutated_pictures_decode_or_are_refused():
    """Bytes changed, cut and doubled at random: pixels or a BadRow, never another exception."""
    rng = np.random.default_rng(5)
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    whole = [saved(image, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000")]
    fine = 0
    for trial in range(400):
        data = bytearray(whole[trial % len(whole)])
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            pixels = decode(bytes(data[: rng.integers(1, len(data) + 1)] if trial % 3 == 0 else data), "f:1")
            assert pixels.dtype == np.uint8 and pixels.ndim == 3
            fine += 1
        except BadRow as error:
            assert len(str(error)) < 500 and " at 0x" not in str(error)
    assert 50 < fine < 400


def test_exif_transpose_is_what_this_agrees_with():
    """`datasets` and transformers use it."""
    for tag, turn in TURNS.items():
        data = saved(Image.fromarray(STORED), "PNG", exif=exif(tag))
        assert (np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) == turn(STORED)).all()
    assert json.dumps(sorted(TURNS)) == "[1, 2, 3, 4, 5, 6, 7, 8]"
