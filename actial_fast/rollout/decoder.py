"""The language model as a sampler uses it: whole prompts into key-value blocks, then a token at a time for all rows at once.

On CUDA the decoding of a number of rows is recorded once as a graph and replayed; numbers in between are filled up with rows that nobody
reads. The layers are model/trunk.py's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from actial_fast.model.attention import is_packed, use_packed_attention
from actial_fast.model.paged import Pages, Reads, on_host
from actial_fast.model.policy import ImageBatch, Policy
from actial_fast.model.processor import Processor
from actial_fast.model.trunk import Trunk
from actial_fast.packing import native
from actial_fast.packing.batch import Group, Sequence, pack
from actial_fast.packing.packed_ops import collect, embed
from actial_fast.rollout.graphs import Graphs, rows_of_graph
from actial_fast.rollout.memory import kv_shape

DRAWN_AT_ONCE = 2**25  # elements of logits: what drawing holds beside them is 30 bytes for each


@dataclass(frozen=True)
class Rows:
    """What one step decodes, on the host: W replies to G prompts in R rows, up to M of a prompt.

    Replies to a prompt that are the same so far may share a row; what they are drawn by, and where their keys go, is each one's own. row,
    slots (W,) int64: a reply's row, and where its keys go; uniforms (W,) float64, zeros for greedy. tokens, positions (R,) int64: a row's
    last token and its place in the sequence. own_table (R, C) int32 and own_tokens (R,): the blocks of one of its replies and how many
    tokens it reads there, the new one among them. members (G, M) int32: the rows of a prompt's replies, -1 where it has fewer; place (R,):
    where a row stands in the flattened members; prefix_table (G, D) int32 and prefix_tokens (G,): the prompts'.
    """

    row: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    uniforms: np.ndarray
    own_table: np.ndarray
    own_tokens: np.ndarray
    members: np.ndarray
    place: np.ndarray
    prefix_table: np.ndarray
    prefix_tokens: np.ndarray

    def filled(self, rows: int, members: int, own: int, prefix: int) -> Rows:
        """So many rows, and as many prompts, each with so many members and blocks: those that are added read and write block 0. A reply is
        a row here."""
        have, groups = len(self.tokens), len(self.members)
        assert len(self.row) == have

        def grown(x: np.ndarray, *shape: int, fill: int = 0) -> np.ndarray:
            out = np.full(shape, fill, x.dtype)
            out[tuple(slice(n) for n in x.shape)] = x
            return out

        table = grown(self.members, rows, members, fill=-1)
        place = self.place // self.members.shape[1] * members + self.place % self.members.shape[1]
        extra = groups * members + np.arange(rows - have)  # behind the prompts there are, as many to each as it takes
        table.reshape(-1)[extra] = np.arange(have, rows)
        return Rows(
            row=np.arange(rows),
            tokens=grown(self.tokens, rows),
            positions=grown(self.positions, rows),
            slots=grown(self.slots, rows),
            uniforms=grown(self.uniforms, rows),
            own_table=grown(self.own_table, rows, own),
            own_tokens=grown(self.own_tokens, rows, fill=1),
            members=table,
            place=np.concatenate([place, extra]),
            prefix_table=grown(self.prefix_table, rows, prefix),
            prefix_tokens=grown(self.prefix_tokens, rows, fill=1),
        )


class Decoder:
    """A policy's language model over `blocks` blocks of `size` tokens, and block 0.

    temperature 0 is greedy. most: members of a prompt, blocks of a reply, blocks of a prompt, in any `Rows`; positions: how many from 0 on
    their tokens may stand at. The policy is in eval mode, its weights whole, and autocast on where it computes in 16 bits: `serving`.
    """

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        *,
        blocks: int,
        size: int,
        temperature: float,
        most: tuple[int, int, int],
        positions: int,
    ):
        layers, heads, width = kv_shape(policy.base.config)
        self._policy, self._processor, self._temperature, self._device = policy, processor, temperature, policy.device
        self._pages = Pages.empty((layers, blocks + 1, size, heads, width), policy.hidden_dtype, policy.device)
        self._stop = torch.tensor(processor.stop_tokens).to(policy.device, non_blocking=True)
        never = processor.never_sampled(len(policy.base.lm_head.weight))
        self._banned = torch.tensor(never).to(policy.device, non_blocking=True)
        self._embedding = policy.base.model.get_input_embeddings().weight
        self._head = policy.base.lm_head.weight.detach().to(policy.compute_dtype)
        self._trunk = Trunk(policy.base.model.language_model, positions)
        self._features: dict[str, Tensor] = {}
        self._most, self._graphs = most, Graphs(self._step) if policy.device.type == "cuda" else None

    def read(self, sequences: Many[Sequence], slots: np.ndarray, keep: Many[str]) -> None:
        """Keys and values of sequences, one behind the other, into slots (rows,). keep: images whose features will be needed again."""
        pieces = [(Group((i,), len(s)), 0, 1) for i, s in enumerate(sequences)]
        # a last token that is only a target has no row
        ended = [s.extended(np.array([self._processor.pad])) for s in sequences]
        batch, _ = pack(ended, pieces, self._processor.image_token, self._processor.merge)
        batch = replace(batch.to(self._device), features=self._image_features(batch.images, keep)).split(self._embedding.shape[1])
        embeds = embed(batch.input_ids, self._embedding, batch.features, batch.image_slots, batch.image_rows)
        pages = self._pages.at(torch.from_numpy(slots).to(self._device, non_blocking=True), *self._trunk.turns(batch.position_ids))
        self._trunk.read(embeds, pages, batch)

    @property
    def shares(self) -> bool:
        """Whether the rows of a step may have several replies: not where steps are recorded, whose shapes are few."""
        return self._graphs is None

    def step(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next token (W,) int64 of each reply, its log-prob (W,) float32, and whether it ends the reply (W,) bool."""
        have = len(rows.row)
        if self._graphs is None:
            made: tuple[Tensor, ...] = self._step(*tensors_of(rows))
        else:
            rows = rows.filled(rows_of_graph(have), *self._most)
            made = self._graphs(len(rows.tokens), tensors_of(rows), self._device)
        token, logp, ends = (x[:have].cpu().numpy() for x in made)
        return token, logp, ends

    def _step(
        self,
        row: Tensor,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        uniforms: Tensor,
        own_table: Tensor,
        own_tokens: Tensor,
        members: Tensor,
        place: Tensor,
        prefix_table: Tensor,
        prefix_tokens: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        embeds = nn.functional.embedding(tokens, self._embedding)
        alone = torch.arange(len(tokens), device=tokens.device)
        own = Reads(alone.to(torch.int32)[:, None], own_table, own_tokens, alone)
        prefix = Reads(members, prefix_table, prefix_tokens, place)
        pages = self._pages.at(slots, *self._trunk.turns(positions), own, prefix, row if self.shares else None)
        hidden = self._trunk.step(embeds, pages)
        token, logp = torch.empty_like(slots), torch.empty(slots.shape, device=slots.device)
        part = max(1, DRAWN_AT_ONCE // len(self._head))
        for start in range(0, len(hidden), part):
            logits, end = self._logits(hidden[start : start + part]), start + part
            of = ((row >= start) & (row < end)).nonzero()[:, 0] if self.shares else slice(start, end)
            uniform = uniforms[of] if self._temperature else None
            token[of], logp[of] = draw(logits, uniform, self._temperature, self._banned, row[of] - start if self.shares else None)
        return token, logp, torch.isin(token, self._stop)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) in float32 of hidden states (R, H). On CUDA from the product's own accumulators, as the trainer's log-probs are:
        rounded to 16 bits first, one of 20 would be up to 0.06 off."""
        if self._head.dtype == torch.float32:
            return hidden.float() @ self._head.T
        with torch.autocast(self._device.type, enabled=False):
            return torch.mm(hidden.to(self._head.dtype), self._head.T, out_dtype=torch.float32)

    def _image_features(self, images: Many[str], keep: Many[str]) -> Tensor | None:
        """The features of images, one behind the other; the tower sees those that are not there yet."""
        if new := [key for key in images if key not in self._features]:
            policy = self._policy
            pixels = collect(self._processor.store, new, pin=self._device.type == "cuda")
            batch = ImageBatch.of(pixels, policy.base.config.vision_config).to(self._device)
            self._features |= zip(new, policy(batch).split(batch.arguments.rows), strict=True)
        found = [self._features[key] for key in images]
        self._features = {key: self._features[key] for key in keep if key in self._features}
        return torch.cat(found) if found else None


def tensors_of(rows: Rows) -> tuple[Tensor, ...]:
    """A `Rows` as `Decoder._step` takes it, on the host."""
    wide = {"row", "tokens", "positions", "slots", "place"}
    types = {"uniforms": np.float64} | dict.fromkeys(wide, np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(getattr(rows, f.name), types.get(f.name, np.int32))) for f in fields(rows))


@contextlib.contextmanager
def serving(policy: Policy) -> Iterator[None]:
    """The policy as `Decoder` needs it, and afterwards as it was."""
    was_training, low = policy.training, policy.compute_dtype != torch.float32
    policy.eval()
    restore = None if is_packed(policy.base) else use_packed_attention(policy.base)
    try:
        # one autocast for all steps: weights in 32 bits are cast once, not for every token
        with torch.no_grad(), torch.autocast(policy.device.type, policy.compute_dtype, enabled=low):
            yield
    finally:
        if restore:
            restore()
        policy.train(was_training)


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, banned: Tensor, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token for each of W replies and its log-prob: logits (R, V) float32, row (W,) int64 a reply's row of them, None where each has
    its own, uniform (W,) float64 or None for greedy -> (W,) int64, (W,) float32.

    A token is where the cumulative probability of those that are not banned passes the reply's uniform number.
    """
    if on_host(logits):
        row = torch.arange(len(logits)) if row is None else row
        numbers = None if uniform is None else uniform.numpy()
        made = native.draw(logits.contiguous().numpy(), row.numpy(), numbers, temperature or 1.0, banned.numpy())
        return torch.from_numpy(made[0]), torch.from_numpy(made[1])
    logits = logits if row is None else logits[row]
    scaled = logits / (temperature or 1.0)
    logp = scaled.log_softmax(-1)
    allowed = logp.index_fill(-1, banned, -torch.inf)
    if uniform is None:
        token = allowed.argmax(-1)
    else:
        total = allowed.exp().cumsum(-1, dtype=torch.float64)  # a float32 sum over 150,000 tokens would lose the rare ones
        whole = total[:, -1:]
        # below the sum, however it rounds: the token that passes it has a probability, and so is not banned
        wanted = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
        token = torch.searchsorted(total, wanted, right=True).squeeze(1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)
