"""What an image looks like: the one place where encoded bytes become pixels.

They are what a viewer shows. An orientation in the metadata is applied, whatever the container; transparency is laid over white; 16 bits
are scaled by their range; of an animation the first frame is taken. The image store, a server's questions, contact sheets and reports all
come here, so that a picture is the same wherever it goes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from actial_fast.data.sources.row import BadRow, shortened
from actial_fast.data.sources.told import told

MAX_PIXELS = 128_000_000  # by default: above the largest ordinary camera (108 megapixels), below what fills memory
MAX_ASPECT = 200  # longer side over shorter, as Qwen2-VL's image processor has it
BACKGROUND = (255, 255, 255)  # behind what is transparent
HEAD = 1024  # bytes that tell what a file is
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
ALIKE = ("JPEG", "PNG", "WEBP")  # formats that every viewer and server reads
ORIENTATION = 0x0112  # of EXIF

NO_PICTURES = (  # beginnings of what is taken for a picture and is none, and what it is
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture: run `git lfs pull`"),
    (rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg\b", "an SVG drawing; convert it to PNG"),
    (rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", "an HTML page, as a failed download leaves it"),
    (rb"(?i)\s*<(\?xml|error)\b", "XML text, as a failed download leaves it"),
    (rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", "HEIC; pip install pillow-heif, or convert it to JPEG"),
    (rb"....ftypavi[fs]", "AVIF; pip install pillow-avif-plugin, or convert it to PNG"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video; only pictures are read"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL; pip install pillow-jxl-plugin, or convert it to PNG"),
    (rb"%PDF-", "a PDF document; render its page to PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "an archive; unpack it"),
    (rb"\x93NUMPY", "a NumPy array; save it as PNG"),
    (rb"PAR1", "a parquet file"),
    (rb"\s*data:", "a data URL as text"),
    (rb"\s*[\[{]", "JSON text"),
)


def decode(image: Path | bytes, where: str, limit: int = MAX_PIXELS, *, file: Path | None = None) -> np.ndarray:
    """The pixels of one image, uint8 (H, W, 3), as a viewer shows it. file: the one that these bytes were read from.

    Raises BadRow, naming `where`, for one that is missing, is no picture, is damaged, has more than `limit` pixels or one side more than
    200 times the other, or holds values whose range is not known.
    """
    return np.asarray(_opened(image, where, limit, file)[0])


def encoded(image: Path | bytes, where: str, limit: int = MAX_PIXELS) -> tuple[bytes, str]:
    """The image in a format that whoever gets it shows as `decode` does, and the format's name: its own bytes if they are that, else PNG.

    Raises BadRow as decode does."""
    picture, plain = _opened(image, where, limit, None)
    if plain:
        return (image if isinstance(image, bytes) else image.read_bytes()), plain
    picture.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue(), "PNG"


def glance(image: Path | bytes, where: str) -> None:
    """BadRow, as decode raises it, for one that is missing or whose beginning is no picture's; damage further on is not looked for."""
    _more_formats()
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)):
            pass
    except Exception:  # decode says what it is
        decode(image, where)


def thumbnail(image: Path, where: str, side: int) -> np.ndarray:
    """The picture squeezed to a square, uint8 (side, side, 3); of a JPEG no more is decoded than that takes. BadRow as decode raises it."""
    _more_formats()
    try:
        with Image.open(image) as handle:
            handle.draft("RGB", (2 * side, 2 * side))
            return np.asarray(shown(handle, where).resize((side, side), Image.Resampling.BOX))
    except Exception:  # decode says what it is, unless it is only larger than PIL likes
        return np.asarray(_opened(image, where, MAX_PIXELS, None)[0].resize((side, side), Image.Resampling.BOX))


def smaller(image: Path | bytes, where: str, pixels: int) -> bytes | None:
    """A JPEG of the image with about so many pixels, sides in proportion, for sending it away; None where it has no more. BadRow as decode
    raises it."""
    picture, _ = _opened(image, where, MAX_PIXELS, None)
    width, height = picture.size
    if width * height <= pixels:
        return None
    scale = (pixels / (width * height)) ** 0.5
    picture = picture.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
    picture.save(buffer := io.BytesIO(), "JPEG", quality=92)
    return buffer.getvalue()


def read(file: Path, where: str) -> bytes:
    """The bytes of an image's file; BadRow, naming `where`, when it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise BadRow(where, f"image {shortened(file)} does not exist") from None
    except UnicodeEncodeError:
        spelled = sys.getfilesystemencoding()
        raise BadRow(where, f"image {shortened(file)} has a name that {spelled}, this locale's, cannot spell; set PYTHONUTF8=1") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRow(where, f"image {shortened(file)} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def orientation(picture: Image.Image) -> int:
    """How the picture is to be turned for a viewer: EXIF's 1 (not at all) to 8; 1 where nothing, or nonsense, is said."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):  # damaged metadata say nothing
        return 1
    return value if value in range(1, 9) else 1


def size(image: Path | bytes, where: str, limit: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width as a viewer shows the image, by its header alone; BadRow as `decode` raises it, but for damage further on."""
    _more_formats()
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as picture:
            width, height = picture.size[::-1] if orientation(picture) > 4 else picture.size  # these lie on their side
    except Exception:  # decode says what it is
        width = height = 0
    if not 0 < width * height <= limit:
        height, width, _ = decode(image, where, limit).shape
    check_aspect(height, width, where)
    return height, width


def header(file: Path) -> tuple[int, int, int]:
    """Width and height of the stored pixels, and how a viewer turns these (see orientation); OSError or ValueError for no picture."""
    _more_formats()
    with Image.open(file) as picture:
        return *picture.size, orientation(picture)


def shown(picture: Image.Image, where: str = "") -> Image.Image:
    """A picture as a viewer shows it, in RGB. ValueError for values whose range is not known."""
    container = picture.format
    if orientation(picture) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in SIXTEEN or (picture.mode == "I" and container in ("PNG", "PPM")):  # which have no more than 16
        told("a picture of 16 bits: 0 to 65535 becomes 0 to 255", where)
        return _gray(np.asarray(picture).astype(np.float64) / 257)
    if picture.mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            low, high = values.min(), values.max()
            raise ValueError(f"its values are floats from {low:g} to {high:g}, and black and white are not told; save it with 8 or 16 bits")
        return _gray(255.0 * values)
    if picture.mode == "I":
        raise ValueError("its values are 32-bit integers, and black and white are not told; save it with 8 or 16 bits")
    if _transparent(picture):
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (*BACKGROUND, 255)), over).convert("RGB")
    return picture.convert("RGB")


def what_it_is(data: bytes) -> str:
    """What bytes that no decoder knows seem to be."""
    if not data:
        return "empty (0 bytes)"
    for pattern, name in NO_PICTURES:
        if re.match(pattern, data[:HEAD], re.DOTALL):
            return name
    text = data[:HEAD].decode("latin-1")
    return (
        "text, not a picture"
        if text.isascii() and text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
        else "no picture"
    )


def _opened(image: Path | bytes, where: str, limit: int, file: Path | None) -> tuple[Image.Image, str]:
    """The picture as it is shown, and the format of its bytes if these show the same in every viewer, else ''."""
    data = read(image, where) if isinstance(image, Path) else image
    file = image if isinstance(image, Path) else file
    name = f"image {shortened(file)}" if file else f"image of {len(data)} embedded bytes"
    _more_formats()
    if 2 * limit > (Image.MAX_IMAGE_PIXELS or 2 * limit):
        Image.MAX_IMAGE_PIXELS = 2 * limit  # PIL warns above its own limit and refuses twice that: ours is the one that counts
    try:
        with Image.open(io.BytesIO(data)) as handle:
            width, height = handle.size
            if width * height > limit:  # before decoding: the header alone tells
                raise BadRow(where, f"{name} is {width}x{height}, over {limit} pixels; data.max_image_pixels is the limit")
            check_aspect(height, width, where)
            if getattr(handle, "n_frames", 1) > 1 and handle.format not in ("MPO", "ICO"):  # MPO: a photograph and its previews
                told("an animation or several pages: the first is shown", where)
            handle.load()
            plain = handle.mode in ("RGB", "L") and not _transparent(handle) and orientation(handle) == 1
            alike = handle.format if plain and handle.format in ALIKE and getattr(handle, "n_frames", 1) == 1 else ""
            return shown(handle, where), alike or ""
    except BadRow:
        raise
    except UnidentifiedImageError:
        raise BadRow(where, f"{name} is {what_it_is(data)}") from None
    except Exception as error:  # a decoder's, on whatever bytes: it is the picture's fault, and never the run's
        known = "" if isinstance(error, OSError | ValueError | SyntaxError) else f"{type(error).__name__}: "
        raise BadRow(where, f"{name} cannot be decoded ({known}{error})") from None


def check_aspect(height: int, width: int, where: str) -> None:
    """BadRow for an image more than 200 times as long as wide, or empty."""
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise BadRow(where, f"image of {width}x{height} pixels: one side must not be more than {MAX_ASPECT} times the other; crop it")


def _transparent(picture: Image.Image) -> bool:
    palette = picture.palette.mode if picture.mode == "P" and picture.palette else ""
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info or palette.endswith("A")


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values).astype(np.uint8)).convert("RGB")


@functools.cache
def _more_formats() -> None:
    """HEIC where its package is installed."""
    if importlib.util.find_spec("pillow_heif"):
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
