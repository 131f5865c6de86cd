"""The language model as a sampler uses it: whole prompts into key-value blocks, then a token at a time for all rows at once.

Layers are called past the hooks of FSDP and of activation checkpointing, which would cost as much as a layer does for a single token, so
sharded weights must be gathered. On CUDA the decoding of a number of rows is recorded once as a graph and replayed; numbers in between are
filled up with rows that nobody reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from actial_fast.model.attention import IMPLEMENTATION, use_packed_attention
from actial_fast.model.paged import Pages, Reads
from actial_fast.model.policy import ImageBatch, Policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Group, PackedBatch, Sequence, pack
from actial_fast.packing.packed_ops import collect, embed

DRAWN_AT_ONCE = 2**25  # elements of logits: what drawing holds beside them is 30 bytes for each


@dataclass(frozen=True)
class Rows:
    """What one step decodes, on the host: R rows, the next tokens of replies to G prompts.

    tokens, positions, slots (R,) int64: the last token each has, its place in the sequence, and where its keys go; uniforms (R,) float64,
    None for greedy. own_table (R, C) int32 and own_tokens (R,): a reply's blocks and how many tokens it reads there, the new one among
    them. members (G, M) int32: the rows of a prompt's replies, -1 where it has fewer; place (R,): where a row stands in the flattened
    members; prefix_table (G, D) int32 and prefix_tokens (G,): the prompts'.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    uniforms: np.ndarray | None
    own_table: np.ndarray
    own_tokens: np.ndarray
    members: np.ndarray
    place: np.ndarray
    prefix_table: np.ndarray
    prefix_tokens: np.ndarray


class Decoder:
    """A policy's language model over `blocks` blocks of `size` tokens, and block 0.

    temperature 0 is greedy. The policy is in eval mode, its weights whole, and autocast on where it computes in 16 bits: `serving`.
    """

    def __init__(self, policy: Policy, processor: Processor, *, blocks: int, size: int, temperature: float):
        config = policy.base.config.get_text_config()
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, blocks + 1, size, heads, width)
        keys, values = (torch.zeros(shape, dtype=policy.compute_dtype, device=policy.device) for _ in range(2))
        self._policy, self._processor, self._temperature = policy, processor, temperature
        self._pages = Pages(keys, values, torch.empty(0, dtype=torch.int64))
        self._stop = torch.tensor(processor.stop_tokens, device=policy.device)
        self._banned = torch.tensor(processor.never_sampled(policy.base.lm_head.weight.shape[0]), device=policy.device)
        self._features: dict[str, Tensor] = {}

    def read(self, sequences: Many[Sequence], slots: np.ndarray, keep: Many[str]) -> None:
        """Keys and values of sequences, one behind the other, into slots (rows,). keep: images whose features will be needed again."""
        pieces = [(Group((i,), len(s)), 0, 1) for i, s in enumerate(sequences)]
        # a last token that is only a target has no row
        ended = [s.extended(np.array([self._processor.pad])) for s in sequences]
        batch, _ = pack(ended, pieces, self._processor.image_token, self._processor.merge)
        device = self._policy.device
        batch = replace(batch.to(device), features=self._image_features(batch.images, keep))
        weight = self._policy.base.model.get_input_embeddings().weight
        embeds = embed(batch.input_ids, weight, batch.features, batch.image_slots, batch.image_rows)
        self._layers(embeds, batch.position_ids, self._pages.at(torch.from_numpy(slots).to(device)), batch)

    def step(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next token (R,) int64 of each row, its log-prob (R,) float32, and whether it ends the reply (R,) bool."""
        token, logp, ends = self._step(*self._inputs(rows))
        return token.cpu().numpy(), logp.cpu().numpy(), ends.cpu().numpy()

    def _step(self, tokens: Tensor, positions: Tensor, uniforms: Tensor | None, pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
        base = self._policy.base
        embeds = torch.nn.functional.embedding(tokens, base.model.get_input_embeddings().weight)
        hidden = self._layers(embeds, positions.expand(3, -1), pages)
        drawn = []
        part = max(1, DRAWN_AT_ONCE // base.lm_head.weight.shape[0])
        for start in range(0, len(hidden), part):
            logits = (hidden[start : start + part] @ base.lm_head.weight.T).float()
            numbers = None if uniforms is None else uniforms[start : start + part]
            drawn.append(draw(logits, numbers, self._temperature, self._banned))
        token, logp = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return token, logp, torch.isin(token, self._stop)

    def _inputs(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None, Pages]:
        def there(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(self._policy.device, dtype)

        R = len(rows.tokens)
        own = Reads(
            rows=there(np.arange(R)[:, None], torch.int32),
            table=there(rows.own_table, torch.int32),
            tokens=there(rows.own_tokens, torch.int32),
            place=there(np.arange(R)),
        )
        prefix = Reads(
            rows=there(rows.members, torch.int32),
            table=there(rows.prefix_table, torch.int32),
            tokens=there(rows.prefix_tokens, torch.int32),
            place=there(rows.place),
        )
        uniforms = None if rows.uniforms is None else there(rows.uniforms, torch.float64)
        return there(rows.tokens), there(rows.positions), uniforms, self._pages.at(there(rows.slots), own, prefix)

    def _layers(self, embeds: Tensor, positions: Tensor, pages: Pages, packed: PackedBatch | None = None) -> Tensor:
        """Hidden states (L, H) of embeds (L, H) at positions (3, L)."""
        model = self._policy.base.model.language_model
        hidden = embeds[None]
        rotary = model.rotary_emb(hidden, positions[:, None])
        for layer in model.layers:
            hidden = layer.forward(hidden, position_embeddings=rotary, packed=packed, pages=pages)
        return model.norm(hidden)[0]

    def _image_features(self, images: Many[str], keep: Many[str]) -> Tensor | None:
        """The features of images, one behind the other; the tower sees those that are not there yet."""
        if new := [key for key in images if key not in self._features]:
            policy = self._policy
            pixels = collect(self._processor.store, new, pin=policy.device.type == "cuda")
            batch = ImageBatch.of(pixels, policy.base.config.vision_config).to(policy.device)
            self._features |= zip(new, policy(batch).split(batch.arguments.rows), strict=True)
        found = [self._features[key] for key in images]
        self._features = {key: self._features[key] for key in keep if key in self._features}
        return torch.cat(found) if found else None


def rows_of_graph(rows: int) -> int:
    """Rows of the graph that decodes so many on CUDA: a few numbers, so that few graphs are recorded, and little is computed for nobody."""
    step = 16 if rows <= 256 else 64
    return -(-rows // step) * step if rows > 8 else 1 << (rows - 1).bit_length()


@contextlib.contextmanager
def serving(policy: Policy) -> Iterator[None]:
    """The policy as `Decoder` needs it, and afterwards as it was."""
    was_training, low = policy.training, policy.compute_dtype != torch.float32
    policy.eval()
    restore = use_packed_attention(policy.base) if policy.base.config._attn_implementation != IMPLEMENTATION else None
    try:
        # one autocast for all steps: weights in 32 bits are cast once, not for every token
        with torch.no_grad(), torch.autocast(policy.device.type, policy.compute_dtype, enabled=low):
            yield
    finally:
        if restore:
            restore()
        policy.train(was_training)


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, banned: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: logits (R, V) float32, uniform (R,) float64 or None for greedy -> (R,) int64, (R,) float32.

    A token is where the cumulative probability of those that are not banned passes the row's uniform number.
    """
    scaled = logits / (temperature or 1.0)
    logp = scaled.log_softmax(-1)
    allowed = logp.index_fill(-1, banned, -torch.inf)
    if uniform is None:
        token = allowed.argmax(-1)
    else:
        total = allowed.double().exp().cumsum(-1)  # float64: a float32 sum over 150,000 tokens would lose the rare ones
        whole = total[:, -1:]
        # below the sum, however it rounds: the token that passes it has a probability, and so is not banned
        wanted = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
        token = torch.searchsorted(total, wanted, right=True).squeeze(1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)
