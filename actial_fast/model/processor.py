"""The one owner of preprocessing: rows to token ids and image patches, and ids back to text.

Composed of the checkpoint's tokenizer (with its chat template) and its image processor's settings. The families' processor classes
themselves are not used: they want a video processor and with it torchvision, which this project has no need of.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from actial_fast.data.sources.picture import MAX_PIXELS, size
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Turn
from actial_fast.data.sources.stats import Lengths
from actial_fast.data.sources.stream import Example
from actial_fast.data.sources.tags import TAG
from actial_fast.packing.batch import Sequence, mrope_positions
from actial_fast.packing.images import GB, MOST, ImageSettings, ImageStore

IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def pixel_limits(path: str, min_pixels: int = 0, max_pixels: int = 0) -> tuple[int, int]:
    """Fewest and most pixels of a resized image: these, where they are not 0, or else those of the checkpoint."""
    return _limits(Qwen2VLImageProcessorPil.from_pretrained(path), min_pixels, max_pixels)


def _limits(images: Qwen2VLImageProcessorPil, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    size = dict(images.size)
    return min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]


@dataclass(frozen=True)
class Processor:
    """Tokenizer and image processor of one checkpoint.

    store: where images go, decoded and resized once. Row-level errors are prompts of more than max_prompt tokens, and, where these are not
    0, sequences of more than max_tokens, room for a reply of `room` tokens behind a prompt included, and images of more than max_patches
    patches. ends: further tokens that end a reply.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    store: ImageStore
    max_prompt: int = 16000
    max_tokens: int = 0
    room: int = 0
    max_patches: int = 0
    ends: tuple[int, ...] = ()

    @staticmethod
    def load(
        path: str,
        *,
        min_pixels: int = 0,
        max_pixels: int = 0,
        max_prompt: int = 16000,
        max_tokens: int = 0,
        room: int = 0,
        max_patches: int = 0,
        image_cache: str = "",
        image_cache_gb: float = MOST / GB,
        max_image_pixels: int = MAX_PIXELS,
    ) -> Processor:
        """From a checkpoint folder or hub name; the pixel limits replace the checkpoint's where they are not 0.

        image_cache: folder of the ImageStore, empty for its default; image_cache_gb: what it may take, 0 for any; max_image_pixels: of an
        image before it is resized. ValueError for a chat template that writes what a reply has to begin with.
        """
        images = Qwen2VLImageProcessorPil.from_pretrained(path)
        images.size = dict(zip(("shortest_edge", "longest_edge"), _limits(images, min_pixels, max_pixels), strict=True))
        folder = Path(image_cache).expanduser() if image_cache else None
        store = ImageStore(ImageSettings.of(images), folder, max_image_pixels, round(image_cache_gb * GB))
        tokenizer = load_tokenizer(path)
        processor = Processor(tokenizer, images, store, max_prompt, max_tokens, room, max_patches, _ends(path, len(tokenizer)))
        if TAG.search(opening := processor._render([{"role": "user", "content": "-"}], open_reply=True)):
            raise ValueError(
                f"its chat template opens replies with {opening[-24:]!r}: replies would hold half a pair of tags and answers to train on "
                "two; take the tag out of chat_template"
            )
        return processor

    def save(self, folder: Path) -> None:
        """Into a checkpoint folder, where AutoTokenizer and the Qwen2-VL image processors of plain transformers find it.

        A generation_config.json there names `stop_tokens` then: an engine that knew fewer would go on where replies ended in training."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        if (file := folder / "generation_config.json").exists():
            about = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(about | {"eos_token_id": list(self.stop_tokens)}, indent=2) + "\n", encoding="utf-8")

    @property
    def merge(self) -> int:
        """Patches along a side of a merged image token."""
        return self.store.settings.merge

    @functools.cached_property
    def image_token(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    @functools.cached_property
    def eos(self) -> int:
        """The token that ends a turn."""
        return self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    @functools.cached_property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @functools.cached_property
    def text_end(self) -> int | None:
        """The token that ends a text, and with it a conversation."""
        return self.tokenizer.convert_tokens_to_ids("<|endoftext|>")

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a sampled reply."""
        known = (self.eos, self.text_end, *self.ends)
        return tuple(sorted({token for token in known if token is not None}))

    @functools.cached_property
    def banned_tokens(self) -> tuple[int, ...]:
        """Never sampled: a vision token in a reply has no image behind it and breaks the log-prob forward pass."""
        return tuple(self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))

    def never_sampled(self, vocabulary: int) -> tuple[int, ...]:
        """`banned_tokens`, and the ids of a head of so many rows that the tokenizer does not know: they have no text."""
        return (*self.banned_tokens, *range(len(self.tokenizer), vocabulary))

    def encode(self, example: Example) -> Sequence:
        """A row to train on: every assistant turn (and the token that ends it) is a target. BadRow when it does not end with one or is too
        long."""
        turns = example.row.turns
        if not any(t.role == "assistant" for t in turns):
            raise BadRow(example.row.where, "no assistant turn to train on")
        if turns[-1].role != "assistant":
            raise BadRow(example.row.where, "it ends with a user message that nothing answers")
        return self._sequence(turns, example.row.images, example.row.where)

    def encode_prompt(self, example: Example) -> Sequence:
        """A row to reply to: the turns before its last answer, and the opening of the assistant's turn."""
        return self._sequence(example.row.prompt, example.row.images, example.row.where)

    def heard(self, text: str, images: Many[Path | bytes | np.ndarray], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """What an environment says between two replies, with `<image>` tags: the ids (n,) int64 from the end of the one to the opening of
        the other, and the keys of its images. ValueError for a text that cannot stand there, BadRow for an image that cannot be decoded."""
        said, answer, heard = (
            {"role": role, "content": content.replace(IMAGE_TAG, IMAGE_TEXT)}
            for role, content in (("user", "-"), ("assistant", "-"), ("user", text))
        )
        if found := next((s for s in self._special if s in text), None):
            raise ValueError(f"the text contains the special token {found}")
        before = self._render([said], open_reply=True) + "-" + self.tokenizer.convert_ids_to_tokens(self.eos)
        rendered = self._render([said, answer, heard], open_reply=True)
        if not rendered.startswith(before):
            raise ValueError("the chat template rewrites earlier turns, so that nothing can be said between replies")
        ids = np.array(self._tokens(rendered[len(before) :]), np.int64)
        keys = tuple(self.store.put(image, where) for image in images)
        return self._expanded(ids, tuple(map(self.store.grid, keys)), where)[0], keys

    def measure(self, example: Example, turns: tuple[Turn, ...]) -> Lengths:
        """How long these turns of a row become, by the headers of its images: nothing is decoded or kept. BadRow as `encode`."""
        where, settings = example.row.where, self.store.settings
        ids, trained = self._known(turns, where)
        images = example.row.images[: sum(t.content.count(IMAGE_TAG) for t in turns)]
        sides = [settings.size(*size(image, where, self.store.limit)) for image in images]
        grids = tuple((1, height // settings.patch, width // settings.patch) for height, width in sides)
        ids, repeats = self._expanded(ids, grids, where)
        trained = np.repeat(trained, repeats)
        patches = sum(map(math.prod, dict(zip(images, grids, strict=True)).values()))
        self._check(trained, patches, where)
        reply = int(trained.sum())
        return Lengths(len(ids) - reply, int((ids == self.image_token).sum()), reply, patches)

    def overfull(self, conversation: Sequence, reply: int) -> bool:
        """Whether a conversation with a reply of so many tokens is more than a row may be, in tokens or patches."""
        tokens = len(conversation)
        return tokens > self.max_prompt or 0 < self.max_tokens < tokens + reply or 0 < self.max_patches < conversation.patches

    def decode(self, ids: np.ndarray) -> str:
        """The text of a reply's token ids (n,), without the token that ends it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _sequence(self, turns: tuple[Turn, ...], images: Many[Path | bytes | np.ndarray], where: str) -> Sequence:
        ids, trained = self._known(turns, where)
        shown = images[: sum(t.content.count(IMAGE_TAG) for t in turns)]
        keys = tuple(self.store.put(image, where) for image in shown)
        grids = tuple(map(self.store.grid, keys))
        ids, repeats = self._expanded(ids, grids, where)
        trained = np.repeat(trained, repeats)
        self._check(trained, sum(map(math.prod, dict(zip(keys, grids, strict=True)).values())), where)
        return Sequence(ids, trained, mrope_positions(ids, grids, self.image_token, self.merge), keys, grids, where)

    def _known(self, turns: tuple[Turn, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
        """As _tokenised; BadRow where the text cannot be."""
        try:
            return self._tokenised(turns)
        except ValueError as error:
            raise BadRow(where, str(error)) from None
        except Exception as error:  # the template's or the tokenizer's: whatever it is, this text brought it about
            raise BadRow(where, f"the text cannot be tokenised ({type(error).__name__}: {error})") from None

    def _check(self, trained: np.ndarray, patches: int, where: str) -> None:
        """BadRow for a row of so many tokens, and patches, that it does not fit."""
        if (prompt := int((~trained).sum())) > self.max_prompt:
            raise BadRow(where, f"prompt of {prompt} tokens, over max_prompt_tokens={self.max_prompt}; use fewer or smaller images")
        answers = bool(trained.any())
        reply = 0 if answers else self.room
        if self.max_tokens and len(trained) + reply > self.max_tokens:
            what = f"{len(trained)} tokens with its answers" if answers else f"prompt of {len(trained)} tokens, and {reply} for a reply"
            raise BadRow(where, f"{what}, over pack_tokens={self.max_tokens}; raise it or leave the row out")
        if 0 < self.max_patches < patches:
            raise BadRow(where, f"images of {patches} patches, over pack_patches={self.max_patches}; raise it or lower model.max_pixels")

    def _expanded(self, ids: np.ndarray, grids: tuple[tuple[int, int, int], ...], where: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) with as many image tokens as each image needs, and how often each of the n stands there."""
        repeats = np.ones(len(ids), np.int64)
        if (places := int((ids == self.image_token).sum())) != len(grids):
            raise BadRow(where, f"the chat template leaves {places} of its {len(grids)} images")
        repeats[ids == self.image_token] = [math.prod(grid) // self.merge**2 for grid in grids]
        return np.repeat(ids, repeats), repeats

    @functools.cached_property
    def _tokenised(self) -> Callable[[tuple[Turn, ...]], tuple[np.ndarray, np.ndarray]]:
        """A conversation's ids and what is trained, images still one token each; remembered, since wordings recur over a data set."""
        return functools.lru_cache(maxsize=8192)(self._tokenise)

    def _tokenise(self, turns: tuple[Turn, ...]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [(self._tokens(text), trained) for text, trained in self._pieces(turns)]
        ids = np.array([i for piece, _ in pieces for i in piece], np.int64)
        trained = np.array([t for piece, t in pieces for _ in piece], bool)
        return ids, trained

    def _pieces(self, turns: tuple[Turn, ...]) -> list[tuple[str, bool]]:
        """The rendered conversation cut into (text, trained); prompts and answers are tokenised apart, as in sampling."""
        for turn in turns:
            if found := next((s for s in self._special if s in turn.content), None):
                raise ValueError(f"the text contains the special token {found}")
        messages = [{"role": t.role, "content": t.content.replace(IMAGE_TAG, IMAGE_TEXT)} for t in turns]
        pieces, done = [], ""
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            opened = self._after(done, messages[:i])
            answer = turn.content + self.tokenizer.convert_ids_to_tokens(self.eos)
            pieces += [(opened, False), (answer, True)]
            done += opened + answer
        if not pieces or turns[-1].role != "assistant":
            pieces.append((self._after(done, messages), False))
        return pieces

    def _after(self, done: str, messages: list[dict[str, str]]) -> str:
        """What the template writes behind `done`, up to where the next reply begins."""
        opened = self._render(messages, open_reply=True)
        if not opened.startswith(done):
            raise ValueError("the chat template rewrites earlier turns (it drops their reasoning, say), so that they cannot be trained on")
        return opened[len(done) :]

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.all_special_tokens)

    def _render(self, messages: list[dict[str, str]], *, open_reply: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_reply)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub name, with its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = tokenizer.chat_template or _template(path)
    return tokenizer


def _template(path: str) -> str | None:
    """The chat template in the file that processors have it in, and tokenizers do not look into; None where there is none."""
    file = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text())["chat_template"] if file else None


def _ends(path: str, known: int) -> tuple[int, ...]:
    """The tokens that end a reply by the checkpoint's generation_config.json, of those that the tokenizer knows."""
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # it has none
        return ()
    return tuple(token for token in (ends if isinstance(ends, list) else [ends]) if token is not None and token < known)


def dummy(processor: Processor, *, image: bool = True) -> Sequence:
    """A shortest sequence with something to predict, and with one image or none."""
    side = processor.store.settings.patch * processor.merge
    turns = (Turn("user", IMAGE_TAG if image else "-"), Turn("assistant", "-"))
    return processor._sequence(turns, (np.zeros((side, side, 3), np.uint8),) * image, "dummy")
