"""How the fields of a record become those of a row, for every format alike.

Null, NaN and empty are absent. Text is text or refused: nothing else is ever turned into words. Keys that change what a row means (a
weight, tools, a rejected answer, a video) are refused where they say something, because nothing here obeys them; what is only unknown is
told once.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import numbers
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Turn, check_characters, shortened
from actial_fast.data.sources.tags import ANSWER_TAG, tagged_answer
from actial_fast.data.sources.told import told

Image = Path | bytes

ROLE_OF = {"human": "user", "gpt": "assistant", "developer": "system"}
SPELLINGS = (("role", "content"), ("from", "value"))
IMAGE_KEYS = ("images", "image")
# Keys of a record or a message that no reader here obeys, and the values with which they say nothing.
MEANING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("videos", "video", "audios", "audio", "tools", "functions", "tool_calls", "tool_call_id", "function_call"), ()),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag", "objects", "refusal"), ()
    ),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "completion"), ()),
    **dict.fromkeys(("weight", "sample_weight", "loss", "loss_weight", "loss_scale", "train", "trainable"), (1, True)),
    **dict.fromkeys(("mask", "masked", "loss_mask", "ignore", "skip", "exclude", "prefix"), (0, False)),
    **dict.fromkeys(("need_tools_kwargs", "tools_kwargs", "interaction_kwargs"), (False,)),
}
UNDESIRED = "label"  # as KTO's rows have it: false for an answer that is not to be learned; other values are someone's classes
TEXTS, PICTURED = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")  # types of a content's parts
MEDIA_KEYS = ("videos", "video", "audios", "audio")
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


def absent(value: Any) -> bool:
    """Whether a field says nothing: null, NaN, pandas' NA and NaT, white space, an empty list or object."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping | list | tuple | bytes):
        return not len(value)
    return isinstance(value, numbers.Number) and not isinstance(value, complex) and bool(value != value)


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    names = (
        (bool, "true or false"),
        (numbers.Number, "a number"),
        (str, "text"),
        (bytes, "bytes"),
        (Mapping, "an object"),
        (list, "a list"),
    )
    return next((name for cls, name in names if isinstance(value, cls)), f"a {type(value).__name__}")


def text(value: Any, what: str, where: str) -> str:
    """A field of text as it is, '' when it is absent; BadRow for anything else, named `what`."""
    if absent(value):
        return ""
    if not isinstance(value, str):
        raise BadRow(where, f"{what} is {kind_of(value)}, not text: {shortened(repr(value), 80)}")
    check_characters(value, what, where)
    return value


def name_of(value: Any, what: str, where: str) -> str:
    """As text, for ids, which may be whole numbers as well."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value, what, where)


def parsed(value: Any, what: str, where: str) -> Any:
    """A list or object, also where it was stored as JSON text; other values as they are. BadRow for text that only begins as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(where, f"{what} is text that begins as JSON and is none: {shortened(value, 80)}") from None
    return value


def texts(value: Any, what: str, where: str) -> tuple[str, ...]:
    """A list of texts, () when it is absent; BadRow for anything else, an absent one among them included."""
    value = parsed(value, what, where)
    if absent(value):
        return ()
    if not isinstance(value, list | tuple):
        raise BadRow(where, f"{what} is {kind_of(value)}, not a list")
    found = tuple(text(each, f"{what}: number {n}", where).strip() for n, each in enumerate(value, 1))
    if not all(found):
        raise BadRow(where, f"{what}: number {found.index('') + 1} is empty")
    return found


def refuse(record: Mapping[str, Any], known: Collection[str], where: str, what: str = "the row") -> None:
    """BadRow for a key that changes what a row means and is not obeyed; a key that is only not `known` is told once."""
    for key, value in record.items():
        if key in known:
            continue
        neutral = absent(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null", "None"))
        if key in MEDIA_KEYS and not neutral:
            raise BadRow(where, f"{what} has {key}; only images are supported")
        if key == UNDESIRED and value is False:
            raise BadRow(where, f"{what} has label false, an answer that is not to be learned, which is not supported; take such rows out")
        if key in MEANING and not (neutral or (isinstance(value, bool | int | float) and value in MEANING[key])):
            raise BadRow(where, f"{what} has {key}, which changes what it means and is not supported; take such rows out, or the key")
        if key not in MEANING and not neutral:
            of = "messages" if what.startswith("message") else what
            told(f"the key {shortened(key, 40)!r} of {of} is not read", where)


def rest(record: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """What a record has beside the keys that its format reads: what a reward, a metric or a task may need, for the row's meta.

    The keys of an object under `meta` or `extra_info`, which may be stored as JSON text, stand beside the others, and instead of them where
    both name the same. BadRow for a key that changes what a row means and is not obeyed, and for an extra_info that is no object."""
    read = {key for key, value in record.items() if key not in MEANING and not (key == UNDESIRED and value is False)}
    refuse(record, read | set(known), where)
    found = {key: value for key, value in record.items() if key not in known and key not in MEANING}
    found = {key: value for key, value in found.items() if isinstance(value, list) or not absent(value)}  # of no boxes a list is empty
    meta, extra = found.get("meta"), parsed(found.pop("extra_info", None), "extra_info", where)
    if isinstance(meta, str) and meta.lstrip().startswith("{"):
        meta = parsed(meta, "meta", where)
    if isinstance(meta, Mapping):
        del found["meta"]
        found |= meta
    if not absent(extra) and not isinstance(extra, Mapping):
        raise BadRow(where, "extra_info is not an object")
    return found | dict(extra or {})


def conversation(messages: Any, what: str, where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """The turns of a list of messages, and the images that stand in OpenAI's content parts, in order. BadRow for what is no message."""
    messages = parsed(messages, what, where)
    if not isinstance(messages, list):
        raise BadRow(where, f"`{what}` is not a list")
    turns, images = [], []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadRow(where, f"message {number} is {kind_of(message)}, not an object")
        spelling = next((keys for keys in SPELLINGS if message.keys() >= set(keys)), None)
        if spelling is None:
            raise BadRow(where, f"message {number} has no `role` and `content`, nor `from` and `value`")
        role_key, content_key = spelling
        refuse(message, (role_key, content_key), where, f"message {number}")
        role = text(message[role_key], f"message {number}'s `{role_key}`", where)
        content, found = contents(message[content_key], f"message {number}'s `{content_key}`", where)
        turns.append(Turn(ROLE_OF.get(role, role), content))
        images += found
    return tuple(turns), images


def contents(value: Any, what: str, where: str) -> tuple[str, list[Any]]:
    """A message's content as text with tags, and the images of its parts (null where a part only says that there is one).

    Parts are those of OpenAI's two interfaces: text, input_text, output_text; image_url, input_image, and image as transformers has it."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise BadRow(where, f"{what} is not text but {'null' if absent(value) else kind_of(value)}")
        check_characters(value, what, where)
        return value, []
    pieces, images = [], []
    for number, part in enumerate(value, 1):
        said = {key: each for key, each in part.items() if not absent(each)} if isinstance(part, Mapping) else {}
        form = said.get("type", "image" if "image" in said else "text" if "text" in said else None)
        if form in TEXTS and said.keys() <= {"type", "text", "annotations"}:
            piece = text(said.get("text"), f"{what}, part {number}", where)
            if IMAGE_TAG in piece:
                raise BadRow(where, f"{what}, part {number}: {IMAGE_TAG} in a text beside parts; make it a part of type image")
            pieces.append(piece)
        elif form in PICTURED:
            if "file_id" in said:
                raise BadRow(where, f"{what}, part {number} names a file on OpenAI's servers; download it and give the file's path")
            pieces.append(IMAGE_TAG)
            sources = [said[key] for key in ("image", "image_url", "url", "path") if key in said]
            images.append(sources[0] if sources else None)
        else:
            raise BadRow(where, f"{what}, part {number} is neither a text nor an image: {shortened(part, 80)}")
    return "".join(pieces), images


def inside(said: Any, where: str) -> tuple[str, ...]:
    """The images in the parts of a content, or of a list of messages, as they are written, to tell rows apart; () where there are none."""
    found: list[Any] = []
    for each in said if isinstance(said, list) else []:
        if isinstance(each, Mapping) and (
            parts := next((each[key] for key in ("content", "value") if isinstance(each.get(key), list)), None)
        ):
            found += contents(parts, "content", where)[1]
    if not found and isinstance(said, list) and any(isinstance(each, Mapping) and each.get("type") in PICTURED for each in said):
        found = contents(said, "content", where)[1]
    return as_written([_address(each) for each in found], where) if found and None not in found else ()


def _address(image: Any) -> Any:
    """An image as it is named, without what only asks for a resolution."""
    return image.get("url", image) if isinstance(image, Mapping) else image


def images_of(record: Mapping[str, Any], folder: Path, where: str, *, parts: list[Any] | None = None) -> tuple[Image, ...]:
    """The images of a record: those under `images` or `image` (the same, where it has both), or those in its messages' parts.

    Each is a path (relative to `folder`, a Windows path or a file URL among them), a data URL, base64 text, bytes, {"bytes", "path"} or
    {"url"}; a single one may stand without a list. BadRow for anything else, an absent one in a list included."""
    given = [listed(record[key], where) for key in IMAGE_KEYS if key in record and not absent(parsed(record[key], key, where))]
    inside = [each for each in parts or [] if each is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise BadRow(where, "`images` and `image` name different images")
    if inside and (given or len(inside) != len(parts or [])):
        raise BadRow(where, "images both in the messages' parts and beside them, so that their order is not told")
    return tuple(one_image(each, folder, where, n) for n, each in enumerate(inside or (given[0] if given else []), 1))


def listed(value: Any, where: str) -> list[Any]:
    """The images of a field, which may be one without a list, as they are written."""
    value = parsed(value, "images", where)
    return [] if absent(value) else value if isinstance(value, list) else [value]


def one_image(value: Any, folder: Path, where: str, number: int = 1) -> Image:
    """One image as a path or encoded bytes; see images_of."""
    if isinstance(value, Mapping):
        if (data := value.get("bytes")) is not None and not absent(data):
            value = _from_base64(data) if isinstance(data, str) else data
        else:
            value = next((value[key] for key in ("path", "url", "image", "image_url") if not absent(value.get(key))), None)
    if isinstance(value, bytes | bytearray | memoryview) and len(value):
        return bytes(value)
    if not isinstance(value, str) or absent(value):
        raise BadRow(
            where, f"image {number} is {'null' if absent(value) else kind_of(value)}; expected a path, bytes or {{'bytes', 'path'}}"
        )
    check_characters(value, f"the name of image {number}", where)
    if value[:5].lower() == "data:":
        return _from_data_url(value, where, number)
    if value[:5].lower() == "file:":
        return folder / unquote(urlsplit(value).path)
    if re.match(r"(?i)[a-z][a-z0-9+.-]+://", value):
        raise BadRow(where, f"image {number} is an address on a network, {shortened(value, 120)}; download it and give the file's path")
    if len(value) >= 64 and (picture := _from_base64(value)).startswith(PICTURES):
        return picture
    if len(value) > 4096:
        raise BadRow(where, f"image {number} is neither a path nor an encoded picture: {shortened(value, 120)}")
    return _path(value, folder, where, number)


def _path(value: str, folder: Path, where: str, number: int) -> Path:
    """A path as this system has it."""
    path = folder / Path(value).expanduser() if value.startswith("~/") else folder / value
    if "\\" not in value or path.exists():
        return path
    windows = PureWindowsPath(value)
    if windows.drive:
        raise BadRow(where, f"image {number} is on a drive of Windows, {shortened(value, 120)}; give its path on this machine")
    return folder / windows.as_posix()


def _from_data_url(value: str, where: str, number: int) -> bytes:
    head, comma, body = value.partition(",")
    data = b""
    if comma:
        data = _from_base64(body) if head.lower().rstrip().endswith(";base64") else unquote_to_bytes(body)
    if not data:
        raise BadRow(where, f"image {number} is a data URL without readable data: {shortened(value, 80)}")
    return data


def _from_base64(value: str) -> bytes:
    """The bytes of a base64 text; empty when it is none."""
    if not BASE64.fullmatch(value):
        return b""
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


def as_written(value: Any, where: str) -> tuple[str, ...]:
    """What tells a JSON field's images from those of another row: names and bytes as they are written; () when it has others or none."""
    values = listed(value, where)
    if not all(isinstance(each, str | dict) for each in values):
        return ()
    return tuple(each if isinstance(each, str) else json.dumps(each, sort_keys=True) for each in values)


def full_name(written: str, folder: Path) -> str:
    """The full name of the file that an image is written as, the same however it is spelled; other forms as they are."""
    if len(written) >= 4096 or written[:5].lower() == "data:":
        return written
    return os.path.normpath(folder / (unquote(urlsplit(written).path) if written[:5].lower() == "file:" else written))


def first_name(record: Mapping[str, Any], keys: Collection[str], where: str) -> str:
    """The first of these fields that says something, '' when none does."""
    found: Iterator[str] = (name_of(record[key], f"`{key}`", where).strip() for key in keys if not absent(record.get(key)))
    return next(found, "")


def truths(value: Any, what: str, where: str) -> tuple[str, tuple[str, ...]]:
    """The truth of a field and what else is as right: a text, or a list of texts; ('', ()) when it is absent.

    What stands in <answer> tags is the truth, as it is a reply's answer; BadRow for a text with such tags that are not one pair."""
    values = value if isinstance(value, list | tuple) else [value]
    if absent(value):
        return "", ()
    found = []
    for each in values:
        truth = text(each, what, where).strip()
        if not truth:
            raise BadRow(where, f"{what}: one of several accepted answers is empty")
        if (answer := tagged_answer(truth)) is None and ANSWER_TAG.search(truth):
            raise BadRow(where, f"{what} has <answer> tags that are not one pair: {shortened(truth, 80)}")
        found.append(truth if answer is None else answer)
    if not all(found):
        raise BadRow(where, f"{what} has nothing between its <answer> tags")
    return found[0], tuple(dict.fromkeys(each for each in found[1:] if each != found[0]))


def whole(value: Any) -> int | None:
    """A whole number, also where pandas made it a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        return None
    return int(value)
