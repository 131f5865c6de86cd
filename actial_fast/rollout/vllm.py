"""vLLM in the trainer's process: an engine on each rank, given the weights of every step tensor by tensor.

No server and no Ray: every rank has an engine of its own, or `rollout.tensor_parallel` neighbouring ranks have one together and answer all
their prompts in lock-step. In order: wake (the optimizer's states and the reference leave the device, weights get memory), sync (every
weight is put together from the ranks' rows, handed over under its name in a checkpoint and dropped again; caches are emptied; keys and
values get memory), generate, sleep (all of it is given up). On a CPU vLLM cannot sleep: it keeps its memory and its weights.

Log-probs are the trainer's: over the whole vocabulary at the sampling temperature. vLLM has two kinds. Its raw ones are those of
temperature 1; its processed ones follow the temperature, but banning tokens (logit_bias, bad_words, a logits processor) takes their share
away first, so that those of all others come out too high. So neither is used: the model's own `compute_logits` is made to return
log-probs at the temperature, with the banned ones at minus infinity, and vLLM samples from them at temperature 1 (its softmax restores the
share of the banned) and reports, as `raw_logits`, the value that it was given. Bans are exact, which logit_bias (at most -100) is not.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.handover import adapters, checkpoint_weights
from actial_fast.rollout.protocol import UNWATCHED, Draw, Reply, Watch
from actial_fast.rollout.vllm_inside import ADAPTER, View, shared_memory, take_adapters
from actial_fast.settings.recipe import RolloutConfig
from actial_fast.train.dist import World
from actial_fast.train.offload import Offload
from actial_fast.train.packages import vllm_problem

SEQUENCES = 256  # replies decoded together
CPU_CACHE = 1 << 30  # bytes of keys and values on a CPU
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM makes room for


@contextlib.contextmanager
def _untouched_random_numbers() -> Iterator[None]:
    """vLLM seeds every generator of the process when it starts, and draws from them; the trainer's go on from where they were. In a thread
    beside an update nothing is put back, which would take back the update's own draws: a recipe with any is refused."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class VLLM:
    """The engine that replies with a copy of the policy's weights in vLLM. Every rank makes one, at the same time.

    longest: tokens of a prompt with its reply; offload: what leaves the device while it is awake. ValueError where vLLM is missing, of an
    unsupported version or does not fit the recipe.
    """

    own = False

    def __init__(
        self, policy: Policy, processor: Processor, config: RolloutConfig, where: World, longest: int, offload: Offload | None = None
    ):
        if problem := vllm_problem():
            raise ValueError(problem)
        if where.size % config.tensor_parallel:
            raise ValueError(f"rollout.tensor_parallel: {config.tensor_parallel} does not divide the {where.size} ranks")
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if "expandable_segments:True" in os.environ.get(name, ""):
                raise ValueError(f"{name}: vLLM cannot sleep with expandable_segments:True; take it out")
        self.version = -1
        self._policy, self._processor, self._config, self._where = policy, processor, config, where
        self._cuda = where.device.type == "cuda"
        self._longest = min(longest, policy.base.config.get_text_config().max_position_embeddings)
        self._offload = offload or Offload(None, enabled=False)
        self._holds_base = False  # the weights that are not trained as well
        self._cached = True  # there is memory for keys and values
        self._view = View(torch.tensor(processor.never_sampled(policy.base.config.get_text_config().vocab_size)))
        with _untouched_random_numbers(), contextlib.nullcontext() if self._cuda else shared_memory(where, config.tensor_parallel):
            self._llm = self._open()
        self._llm.apply_model(self._view.put_on)
        self._peers = _peers(config.tensor_parallel)
        self._asleep = False
        self.sleep()

    def wake(self) -> None:
        """Memory for the weights; what is not needed meanwhile leaves."""
        self._offload.out()
        try:
            if self._cuda:
                self._llm.wake_up(tags=["weights"])
        except BaseException:
            self._offload.back()
            raise
        self._asleep = False

    def sync(self, version: int) -> None:
        """Every weight anew, tensor by tensor, or with adapters the adapters and whatever else was lost in sleep; no cache outlives it.

        reload_weights empties the worker's cache of image features but not the scheduler's books of it ("Encoder cache miss" later), so
        both are emptied here, also for a frozen tower.
        """
        if self.version != version:
            self.version = -1
            if not (self._policy.adapted and self._holds_base):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(self._policy)})
                self._holds_base = True
            if self._policy.adapted:
                self._llm.collective_rpc(take_adapters, args=(*adapters(self._policy), self._policy.config.lora))
            self._llm.llm_engine.reset_encoder_cache()
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept keys and values of older weights: a request is still running")
            self.version = version
        if self._cuda and not self._cached:
            self._llm.wake_up(tags=["kv_cache"])
            self._cached = True

    def sleep(self) -> None:
        """Weights, keys and values are given up on CUDA, and kept on a CPU."""
        if self._asleep:
            return
        if self._cuda:
            self._llm.sleep(level=2)
            self.version, self._holds_base, self._cached = -1, False, False
        self._offload.back()
        self._asleep = True

    def recover(self) -> None:
        """`generate` leaves no request behind; memory of a failed step goes back to the device."""
        if self._cuda:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Give up everything, vLLM's process groups included, but not the trainer's, which its own shutdown would end."""
        self._offload.back()
        client = self._llm.llm_engine.engine_core
        if self._where.mesh is None:
            client.shutdown()
        else:
            from vllm.distributed import parallel_state

            client._finalizer.detach()
            client.engine_core.model_executor.shutdown()
            client.engine_core.scheduler.shutdown()
            parallel_state.destroy_model_parallel()
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = parallel_state._NODE_COUNT = None
            gc.unfreeze()  # vLLM took all that there was for everlasting
        del self._llm, client
        gc.collect()

    @_untouched_random_numbers()
    def generate(self, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch = UNWATCHED) -> list[list[Reply]]:
        """As the protocol says. Replies depend on their keys, and where vLLM's arithmetic does, in the last bits, on what is drawn beside
        them. ValueError for a prompt that is too long, or that vLLM reads as other tokens than ours."""
        assert draw.temperature == 0 or len(keys) == len(prompts), "one key per prompt"
        have = watch.have or {}
        replies: list[list[Reply]] = [have.get(i, []) for i in range(len(prompts))]
        mine = [_Job(self._where.rank, i, s, keys[i] if keys else ()) for i, s in enumerate(prompts) if i not in have]
        for job in mine:
            if len(job.prompt) + draw.max_new_tokens > self._longest:
                raise ValueError(
                    f"prompt {job.index}: its {len(job.prompt)} tokens and {draw.max_new_tokens} of a reply are more than the "
                    f"{self._longest} that the engine was opened for; lower max_new_tokens or data.max_prompt_tokens"
                )
            if len(job.prompt.images) > self._config.max_images:
                raise ValueError(f"prompt {job.index}: {len(job.prompt.images)} images, over rollout.max_images={self._config.max_images}")
        waiting = [job for jobs in self._agree(mine) for job in jobs]
        running: dict[str, tuple[_Job, str]] = {}  # vLLM's name of a request in its results -> what it is for, and its name for an abort
        self._view.temperature = draw.temperature or 1.0
        try:
            while waiting or running:
                left = [*waiting, *(job for job, _ in running.values())]
                dropped = {job.name for job in left if self._own(job) and watch.dropped(job.index)}
                told = self._agree((watch.asked(), dropped))
                if any(asked for asked, _ in told):
                    break
                dropped = set().union(*(names for _, names in told))
                waiting = [job for job in waiting if job.name not in dropped]
                self._abort(running, [name for name, (job, _) in running.items() if job.name in dropped])
                while waiting and draw.n * len(running) < 2 * SEQUENCES:
                    job = waiting.pop(0)
                    (name,) = self._llm.enqueue(self._asked(job.prompt), self._sampling(draw, job.key), self._adapter(), use_tqdm=False)
                    running[name.split("-")[0]] = job, name
                done: dict[int, list[Reply]] = {}
                for output in self._llm.llm_engine.step() if running else ():
                    job, _ = running.pop(output.request_id)
                    _check(job, output.prompt_token_ids)
                    if self._own(job):
                        done[job.index] = [_reply(each) for each in output.outputs]
                for index, group in done.items():
                    replies[index] = group
                if done and watch.drawn:
                    watch.drawn(done)
        finally:
            self._abort(running, list(running))
        return replies

    def _own(self, job: _Job) -> bool:
        return job.rank == self._where.rank

    def _abort(self, running: dict[str, tuple[_Job, str]], names: Collection[str]) -> None:
        if names:
            self._llm.llm_engine.abort_request([running.pop(name)[1] for name in names], internal=True)

    def _agree(self, value: Any) -> list[Any]:
        """The values of all ranks that share an engine, in order."""
        if self._peers is None:
            return [value]
        values: list[Any] = [None] * self._config.tensor_parallel
        dist.all_gather_object(values, value, group=self._peers)
        return values

    def _asked(self, prompt: Sequence) -> dict[str, Any]:
        """A prompt as vLLM takes it: an image is one token, which it expands itself, and its pixels at their final size."""
        ids = _collapsed(prompt, self._processor)
        if not prompt.images:
            return {"prompt_token_ids": ids}
        pixels = [Image.fromarray(self._processor.store.pixels(key)) for key in prompt.images]
        return {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": pixels},
            "multi_modal_uuids": {"image": list(prompt.images)},  # the store's keys: equal for equal pixels
        }

    def _sampling(self, draw: Draw, key: tuple[int, ...]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=draw.n,
            temperature=float(draw.temperature > 0),  # the logits are at draw.temperature already
            max_tokens=draw.max_new_tokens,
            seed=None if draw.temperature == 0 else int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 2),
            stop_token_ids=list(self._processor.stop_tokens),
            ignore_eos=True,  # those of the checkpoint's generation config may be others
            logprobs=0,
            detokenize=False,
        )

    def _adapter(self) -> Any:
        if not self._policy.adapted:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", ADAPTER, "handed over in memory")

    def _open(self) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process: weights are handed over as tensors
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not self._cuda:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads are not vLLM's to bind
        from vllm import LLM

        config, settings, lora = self._config, self._processor.store.settings, self._policy.config.lora
        options: dict[str, Any] = {}
        if self._where.size > 1:
            options |= {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": config.tensor_parallel}
        if self._cuda:
            options |= {"gpu_memory_utilization": config.gpu_memory, "enable_sleep_mode": True}
        else:
            options |= {"kv_cache_memory_bytes": CPU_CACHE, "enforce_eager": True, "skip_mm_profiling": True}
            # a prompt in parts winds its random numbers back, which vLLM 0.32 can do on CUDA alone
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, self._longest)}
        if self._policy.adapted:
            room = next((rank for rank in RANKS if rank >= lora.rank), None)
            if room is None:
                raise ValueError(f"model.lora.rank: vLLM takes ranks up to {RANKS[-1]}, got {lora.rank}; set rollout.engine to embedded")
            options |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room}
        return LLM(
            self._policy.base.config.name_or_path,
            load_format="auto",  # "dummy" would draw the image normalisation's mean and deviation at random too, which no sync brings back
            dtype=str(self._policy.compute_dtype).removeprefix("torch."),
            max_model_len=self._longest,
            max_num_seqs=SEQUENCES,
            logprobs_mode="raw_logits",
            limit_mm_per_prompt={"image": config.max_images, "video": 0},
            # the store's pixels have their final size already: within its limits vLLM's image processor leaves them as they are
            mm_processor_kwargs={"size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}},
            enable_prefix_caching=True,
            **options,
        )


@dataclass(frozen=True)
class _Job:
    """A prompt to reply to, and whose."""

    rank: int
    index: int
    prompt: Sequence
    key: tuple[int, ...]

    @property
    def name(self) -> tuple[int, int]:
        return self.rank, self.index


def _collapsed(prompt: Sequence, processor: Processor) -> list[int]:
    """A prompt's ids with one token for each image."""
    keep = prompt.ids != processor.image_token
    sizes = [frames * rows * columns // processor.merge**2 for frames, rows, columns in prompt.grids]
    keep[np.flatnonzero(~keep)[np.cumsum([0, *sizes])[:-1]]] = True
    return prompt.ids[keep].tolist()


def _check(job: _Job, seen: Many[int] | None) -> None:
    ours, theirs = job.prompt.ids.tolist(), list(seen or ())
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
        raise ValueError(
            f"prompt {job.index} (key {job.key}): vLLM reads {len(theirs)} tokens where ours are {len(ours)}, and they part at token {at}: "
            "its image processor and ours disagree for this checkpoint; set rollout.engine to embedded"
        )


def _reply(output: Any) -> Reply:
    ids = np.array(output.token_ids, np.int64)
    logprobs = [each[token].logprob for each, token in zip(output.logprobs, output.token_ids, strict=True)]
    return Reply(ids, np.array(logprobs, np.float32), output.finish_reason == "stop")


def _peers(size: int) -> Any:
    """The group of ranks that share an engine; None where each has its own."""
    if size == 1:
        return None
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().cpu_group
