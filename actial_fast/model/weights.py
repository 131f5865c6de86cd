"""From a Hugging Face checkpoint onto a model, row by row: a model is built without memory, cut over the ranks, and then filled.

No rank and no host ever holds a second copy of the weights: parameters are made on the meta device, `fill` gives each rank memory for its
rows alone and reads those rows alone. What does not fit the model is an error; nothing is ever left at a random value.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.utils import cached_file

from actial_fast.model.families.known import FAMILIES, NAMES, family_of
from actial_fast.model.tensors import Stored

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def check_checkpoint(path: str) -> list[str]:
    """Why a checkpoint cannot be trained, in words for the user; empty where it can. From its configuration and its files' headers alone.

    path: a folder or a hub name, whose files are downloaded as a run would.
    """
    try:
        folder = resolve(path)
        stored = open_weights(folder)
    except (ValueError, OSError) as error:
        return [str(error)]
    return misfits(skeleton(folder, torch.float32), stored, path)


def resolve(path: str) -> Path:
    """The folder of a checkpoint, downloaded where `path` is a hub name. ValueError where there is none or it is of another family."""
    if not path:
        raise ValueError("model.path: a checkpoint folder or hub name is needed")
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"model.path: {path} holds PEFT adapters, not a model (its base is {base or 'not told'}); merge them into the base with PEFT's "
            "merge_and_unload and save_pretrained, and give that folder"
        )
    if not folder.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ValueError(f"model.path: {path} is neither a folder nor a hub name like Qwen/Qwen2.5-VL-7B-Instruct")
        check_family(path, Path(str(cached_file(path, "config.json"))).parent)  # before gigabytes are downloaded
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    check_family(path, folder)
    return folder


def open_weights(folder: Path) -> Stored:
    """The checkpoint's tensors, by the names its files have. ValueError where files are missing or broken."""
    if (index := folder / INDEX).exists():
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        files = [folder / SINGLE]
    if lacking := [path.name for path in files if not path.exists()]:
        more = "" if index.exists() else f", nor {INDEX}; weights in another format are not read"
        raise ValueError(f"model.path: {folder} has no {', '.join(lacking[:5])}{more}")
    try:
        return Stored(files)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def skeleton(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The checkpoint's model as from_pretrained makes it, buffers included, but its parameters on the meta device."""
    config = config_at(folder)
    config.name_or_path = str(folder)
    with parameters_on_meta():
        model = family_of(config).model._from_config(config, dtype=dtype, attn_implementation=attention)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in a with block get parameters without memory; their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def module_name(stored: str) -> str:
    """A weight's name in transformers' model, from the name in a file: hub checkpoints have the names of older versions."""
    if stored.startswith("visual."):
        return f"model.{stored}"
    if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{stored.removeprefix('model.')}"
    return stored


def base_name(policy: str) -> str:
    """A weight's name in transformers' model, from the name in the policy, where adapters may be around it."""
    return policy.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer.", ".")


def misfits(model: nn.Module, stored: Stored, path: str) -> list[str]:
    """What the checkpoint at `path` lacks, has too much, or has in another shape than the model; up to five names of each."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is not among them
    got = {module_name(name): stored.shape(name) for name in stored.names}
    useless = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {n for n in got if n.endswith("rotary_emb.inv_freq")}
    shapes = {n: f"{n} {got[n]} where the model has {shape}" for n, shape in expected.items() if n in got and got[n] != shape}
    said = []
    for what, names in (
        ("lacks", expected.keys() - got.keys()),
        ("has what the model does not have:", got.keys() - expected.keys() - useless),
        ("has weights of another shape than its config.json says:", {shapes[n] for n in shapes}),
    ):
        if names:
            said.append(f"model.path: {path} {what} {_some(names)}")
    return said


def fill(model: nn.Module, stored: Stored, device: torch.device) -> None:
    """Give a model on the meta device, sharded or not, its memory on `device` and its weights from a checkpoint that fits it, converted to
    each parameter's dtype. Adapters stay undefined. Every rank reads its own rows, one parameter at a time; no rank waits for another.
    ValueError where a head that should be the embedding is not.
    """
    materialise(model, device)
    names = {module_name(name): name for name in stored.names}
    own = {base_name(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            start, stop = rows_of(parameter)
            stored.into(local(parameter), names[base_name(name)], start)
            if base_name(name) == EMBEDDING and HEAD in names and HEAD not in own:  # tied, and there all the same
                if not torch.equal(*(stored.rows(names[each], start, stop) for each in (EMBEDDING, HEAD))):
                    raise ValueError(f"model.path: config.json says that {HEAD} is the embedding, but the files have another one")


def materialise(model: nn.Module, device: torch.device) -> None:
    """Memory on `device` for parameters on the meta device, undefined; buffers are moved, and weights that were one stay one."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items() if value is not None]
    for module in model.modules():
        for name, parameter in module._parameters.items():
            homes.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for module, name, value in buffers:
        module._buffers[name] = value.to(device)
    for (module, name), *others in homes.values():
        for other, alias in others:
            setattr(other, alias, getattr(module, name))


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, itself where it is not sharded; without a graph."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Which rows of the whole tensor this rank has: start, stop (0 to 1 for a scalar)."""
    if not isinstance(tensor, DTensor):
        return (0, tensor.shape[0]) if tensor.ndim else (0, 1)
    (along,) = [i for i, placement in enumerate(tensor.placements) if placement.is_shard()]
    assert tensor.placements[along].is_shard(0), f"sharded by rows, not {tensor.placements}"
    return share(tensor.shape[0], tensor.device_mesh.get_local_rank(along), tensor.device_mesh.size(along))


def copy_of(tensor: Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """How many ranks hold the same rows of the tensor as this one, and which of them this is: number, count. rank, ranks: of all."""
    if not isinstance(tensor, DTensor):
        return rank, ranks
    copies = [i for i, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return (tensor.device_mesh.get_local_rank(copies[0]), tensor.device_mesh.size(copies[0])) if copies else (0, 1)


def share(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and stop of a rank's rows, cut as FSDP2 cuts them: equal parts, the last ones shorter or empty."""
    each = -(-rows // ranks)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def kind_of(folder: Path) -> str:
    """The model_type in a folder's config.json. OSError or ValueError where there is none to be read."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(said, dict):
        raise ValueError("it holds no object")
    return str(said.get("model_type"))


def config_at(folder: Path) -> Any:
    """The configuration of a checkpoint of a known family."""
    return FAMILIES[kind_of(folder)].config.from_pretrained(folder)


def check_family(path: str, folder: Path) -> None:
    """ValueError, naming `path`, where the folder's config.json is missing, broken, or that of a model not trained here."""
    try:
        kind = kind_of(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {path} is no checkpoint, its config.json cannot be read ({error})") from None
    if kind not in FAMILIES:
        raise ValueError(f"model.path: {path} has model_type {kind}; trained here are {NAMES} (model_type {', '.join(FAMILIES)})")


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:5]) + (f" ({len(found)} in all)" if len(found) > 5 else "")
