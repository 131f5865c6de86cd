"""From a checkpoint of a run to the folders that everybody opens: a Hugging Face model, and an adapter of PEFT.

Tensor after tensor is put together from the ranks' rows, or read from model.path where it was not trained, and written behind a header
known beforehand: nobody holds more than one tensor and what it is made of. Several ranks write a file each.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from actial_fast.model.families.known import FAMILIES, family_of
from actial_fast.model.nf4 import as_held, nf4_problem, quantized
from actial_fast.model.policy import Policy
from actial_fast.model.tensors import Stored, sync, write
from actial_fast.model.weights import HEAD, INDEX, SINGLE, base_name, kind_of, module_name, open_weights, resolve

FILE_BYTES = 5_000_000_000  # as transformers cuts them
PEFT_FILE = "adapter_model.safetensors"
Base: TypeAlias = Literal["trained", "original"]


def facts(policy: Policy) -> dict[str, Any]:
    """What an export must know beside the trained weights; it goes into state.json."""
    config, held = policy.config, quantized(policy)
    path = str(Path(config.path).resolve()) if Path(config.path).is_dir() else config.path
    whole = all(parameter.requires_grad for parameter in policy.parameters())
    # merged in 16 bits, an adapter's small changes would be rounded away
    dtype = "float32" if policy.adapted else config.dtype
    return {
        "base": "" if whole else path,
        "frozen_dtype": config.frozen_dtype,
        "dtype": dtype,
        "adapter_scale": config.lora.scale,
        "nf4": [family_of(policy.base).file_name(name) for name in held],
        "nf4_twice": config.quantize_twice,
    }


def open_ranks(source: Path) -> Stored:
    """What the ranks have written into a checkpoint. ValueError where a file is missing or broken."""
    ranks, files = json.loads((source / "state.json").read_text(encoding="utf-8"))["ranks"], sorted(source.glob("rank-*.safetensors"))
    if len(files) != ranks:
        raise ValueError(f"{source}: {ranks} ranks wrote it, files of {len(files)} are there; a file of the folder was lost or added")
    return Stored(files)


@dataclass(frozen=True)
class Exported:
    """dtype: of the weights written. rounding: |rounded - exact| over |the adapters' change|, over the weights that this rank merged; 0 in
    float32, None without adapters. held: how many weights were in NF4 while their adapters were trained.
    """

    dtype: str
    rounding: float | None
    held: int


def export_to(source: Path, out: Path, *, dtype: str = "", base: Base = "trained") -> Exported:
    """Write the checkpoint `source` as a Hugging Face folder `out`, its adapters into out/adapter; `out` is whole or absent.

    base: as `export` has it. ValueError where `out` is not empty, and as `export`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: there is something already; name a folder that is new or empty")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        done = export(source, temporary, temporary / "adapter", dtype=dtype, base=base)
        sync(temporary)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return done


def export(source: Path, model: Path, adapter: Path, *, dtype: str = "", base: Base = "trained", rank: int = 0, ranks: int = 1) -> Exported:
    """Write the checkpoint `source` as a Hugging Face folder `model` and, where adapters were trained, as PEFT's folder `adapter`.

    dtype: of the weights in `model` (empty: as trained; float32 where adapters are merged, or where the optimizer kept masters, which are
    what is written). base: what was not trained is written, and adapters are merged into it, as it was in training, that is rounded to
    model.frozen_dtype and to NF4 where it was held so, which gives the model that was trained; or as it is in model.path, which gives
    another one. With several ranks each calls and writes its files. ValueError where model.path is needed and gone, OSError where
    something cannot be written.
    """
    weights = _Weights(source, dtype, base)
    files = weights.files()
    model.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        shutil.copytree(source / "model", model, dirs_exist_ok=True)
        _note_dtype(model / "config.json", _said(weights.dtype))
        if len(files) > 1:
            size = sum(map(weights.bytes, weights.names))
            index = {"metadata": {"total_size": size}, "weight_map": {name: file for file, names in files.items() for name in names}}
            (model / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        if weights.adapters:
            shutil.copytree(source / "adapter", adapter)
            layout = {name: (weights.stored.dtype(key), weights.stored.shape(key)) for name, key in weights.adapters.items()}
            write(adapter / PEFT_FILE, layout, lambda name: weights.stored.rows(weights.adapters[name]))
    for file, names in list(files.items())[rank::ranks]:
        write(model / file, {name: (weights.dtype, weights.shape(name)) for name in names}, weights.tensor)
    return Exported(_said(weights.dtype), weights.rounding, len(weights.held))


class _Weights:
    """The model that a checkpoint makes, weight by weight, under the names of a file.

    adapters: PEFT's names of the adapters' weights, each with its name in the checkpoint; empty where there are none.
    """

    def __init__(self, source: Path, dtype: str, base: Base):
        about = json.loads((source / "state.json").read_text(encoding="utf-8"))["model"]
        self.stored = open_ranks(source)
        masters = {name.removeprefix("master/") for name in self.stored.names if name.startswith("master/")}
        self.dtype: torch.dtype = getattr(torch, dtype or ("float32" if masters else about["dtype"]))
        self._frozen_dtype: torch.dtype = getattr(torch, about["frozen_dtype"])
        self.held, self._twice, self._as_trained = frozenset(about.get("nf4", ())), about.get("nf4_twice", True), base == "trained"
        if self.held and self._as_trained and (problem := nf4_problem()):
            raise ValueError(problem.replace("set it to none", "use --base original"))
        self._scale: float = about["adapter_scale"]
        self._changed = self._lost = 0.0
        trained = [name.removeprefix("weight/") for name in self.stored.names if name.startswith("weight/")]
        names = {f"master/{n}" if n in masters else f"weight/{n}": base_name(n) for n in trained}
        file_name = FAMILIES[kind_of(source / "model")].file_name
        self._trained = {file_name(name): key for key, name in names.items() if ".lora_" not in name}
        self._down = {file_name(_adapted(name)): key for key, name in names.items() if ".lora_A." in name}
        self._up = {file_name(_adapted(name)): key for key, name in names.items() if ".lora_B." in name}
        self._lengths = {file_name(_adapted(name)): key for key, name in names.items() if ".lora_magnitude_vector." in name}
        self.adapters = {adapter_name(n): key for key, n in names.items() if ".lora_" in n}
        self._base, self._frozen = None, {}
        if about["base"]:
            try:
                self._base = open_weights(resolve(about["base"]))
            except (ValueError, OSError) as error:
                raise ValueError(f"{source}: what was not trained is read from {about['base']} again, and that fails: {error}") from None
            tied = json.loads((source / "model" / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
            self._frozen = {file_name(module_name(name)): name for name in self._base.names if not name.endswith("rotary_emb.inv_freq")}
            self._frozen = {name: key for name, key in self._frozen.items() if not (tied and name == HEAD)}
        self.names = sorted(self._frozen.keys() | self._trained.keys())

    @property
    def rounding(self) -> float | None:
        """|rounded - exact| over |the adapters' change|, of the weights asked for so far; None without adapters."""
        return math.sqrt(self._lost / self._changed) if self._changed else 0.0 if self._down else None

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's shape."""
        if name in self._trained:
            return self.stored.shape(self._trained[name])
        assert self._base is not None
        return self._base.shape(self._frozen[name])

    def bytes(self, name: str) -> int:
        """A weight's size in the file."""
        return math.prod(self.shape(name)) * self.dtype.itemsize

    def files(self) -> dict[str, list[str]]:
        """File names and the weights that go into each."""
        groups: list[list[str]] = [[]]
        size = 0
        for name in self.names:
            if groups[-1] and size + self.bytes(name) > FILE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += self.bytes(name)
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}

    def tensor(self, name: str) -> Tensor:
        """A weight in its dtype, with its adapter merged in float32."""
        value = self.stored.rows(self._trained[name]) if name in self._trained else self._untrained(name)
        if name not in self._down:
            return value.to(self.dtype)
        down, up = (self.stored.rows(keys[name]).float() for keys in (self._down, self._up))
        exact = torch.addmm(value.float(), up, down, alpha=self._scale)
        if name in self._lengths:  # DoRA
            exact *= (self.stored.rows(self._lengths[name]).float() / torch.linalg.norm(exact, dim=1))[:, None]
            self._changed += float((exact - value.float()).square_().sum())
        else:
            self._changed += self._scale**2 * float(((up.T @ up) * (down @ down.T)).sum())  # the square of |scale up @ down|
        rounded = exact.to(self.dtype)
        self._lost += float((exact - rounded).square_().sum())
        return rounded

    def _untrained(self, name: str) -> Tensor:
        """A weight that was not trained."""
        assert self._base is not None
        value = self._base.rows(self._frozen[name])
        if not self._as_trained:
            return value
        value = value.to(self._frozen_dtype)
        return as_held(value.to(_device()), twice=self._twice).cpu() if name in self.held else value


def _device() -> torch.device:
    """Where weights are quantised again: on the kind of device that training did it on, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adapter_name(name: str) -> str:
    """PEFT's name in a file of a part of an adapter, from transformers' with the adapter's in it."""
    return f"base_model.model.{name.removesuffix('.weight') if '.lora_magnitude_vector.' in name else name}".replace(".default", "")


def _adapted(name: str) -> str:
    """The name in transformers' model of the weight that a part of an adapter belongs to."""
    return re.sub(r"\.lora_(A|B|magnitude_vector)\.default", "", name)


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _note_dtype(config: Path, dtype: str) -> None:
    """Say in a config.json what its weights are stored in."""

    def noted(value: Any) -> Any:
        return {k: dtype if k in ("dtype", "torch_dtype") else noted(v) for k, v in value.items()} if isinstance(value, dict) else value

    config.write_text(json.dumps(noted(json.loads(config.read_text(encoding="utf-8"))), indent=2) + "\n")
