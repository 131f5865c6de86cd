"""The machine that a plan is for: GPUs as one writes them, 8x80 or 4xL40S, those that there are, or the host alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

GB = 1e9
CONTEXT, CHANNELS = 0.6 * GB, 1.0 * GB  # assumed: CUDA's context and modules; NCCL's buffers, where there are several ranks
FRAGMENTS = 0.04  # assumed share of a GPU's memory that the allocator cannot use


@dataclass(frozen=True)
class Sheet:
    """What the maker says of a GPU. memory: GB; tflops: dense bf16 with float32 sums; bandwidth: of its memory, TB/s; link: GB/s to its
    neighbours in one direction; shown: how the driver names it."""

    name: str
    memory: float
    tflops: float
    bandwidth: float
    link: float
    shown: tuple[str, ...]


SHEETS = (
    Sheet("L4", 24, 121, 0.3, 32, ("L4",)),
    Sheet("A10", 24, 125, 0.6, 32, ("A10",)),
    Sheet("3090", 24, 71, 0.936, 32, ("3090",)),
    Sheet("4090", 24, 165, 1.008, 32, ("4090",)),
    Sheet("5090", 32, 209, 1.792, 64, ("5090",)),
    Sheet("A100-40", 40, 312, 1.555, 300, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    Sheet("A6000", 48, 155, 0.768, 32, ("RTX A6000",)),
    Sheet("L40S", 48, 362, 0.864, 32, ("L40S",)),
    Sheet("A100", 80, 312, 2.039, 300, ("A100",)),
    Sheet("H100", 80, 989, 3.35, 450, ("H100",)),
    Sheet("H200", 141, 989, 4.8, 450, ("H200",)),
    Sheet("B200", 180, 2250, 8.0, 900, ("B200",)),
)
TYPICAL = {24: "4090", 32: "5090", 40: "A100-40", 48: "L40S", 80: "H100", 141: "H200", 180: "B200"}  # for a size without a name
HOW = "--gpus: write how many and their memory in GB, like 8x80, 4x48 or 1x24, or their name, like 8xH100"


@dataclass(frozen=True)
class Machine:
    """count: GPUs, a rank each; memory: bytes of each; host: bytes of host memory, infinite where nobody said; sheet: what their
    speed is taken from, None where no datasheet is known; guessed: whether the sheet is that of a card of this size only; cuda: False
    for a machine without GPUs, whose ranks share the host's memory."""

    count: int
    memory: float
    host: float = float("inf")
    sheet: Sheet | None = None
    guessed: bool = False
    cuda: bool = True

    @property
    def usable(self) -> float:
        """Bytes of each GPU that a run can have."""
        if not self.cuda:
            return self.host / self.count
        return self.memory * (1 - FRAGMENTS) - CONTEXT - (CHANNELS if self.count > 1 else 0)

    @property
    def name(self) -> str:
        """As one would write it."""
        if not self.cuda:
            return f"{self.count} rank{'s' if self.count > 1 else ''} on the CPU"
        named = f"{self.sheet.name} of " if self.sheet and not self.guessed else ""
        return f"{self.count} x {named}{self.memory / GB:g} GB"


def parse(text: str) -> Machine:
    """The machine of a text like 8x80, 8x80GB, 8xH100. ValueError, saying how to write it, for anything else."""
    found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\S.*?)\s*", text, re.IGNORECASE)
    if found is None:
        only = re.fullmatch(r"\s*(\d+)\s*(GB|GiB)?\s*", text, re.IGNORECASE)
        hint = f"; one GPU of that size is 1x{only[1]}, {only[1]} GPUs of 80 GB are {only[1]}x80" if only else ""
        if starred := re.fullmatch(r"\s*(\d+)\s*[*,/: ]\s*(\S+)\s*", text):
            hint = f"; did you mean {starred[1]}x{starred[2]}?"
        raise ValueError(f"{HOW}; got {text!r}{hint}")
    count, what = int(found[1]), found[2]
    if count < 1:
        raise ValueError(f"{HOW}; got {text!r}, which is no GPU at all")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", what, re.IGNORECASE)
    if size:
        memory = float(size[1])
        if not 4 <= memory <= 1024:
            raise ValueError(f"{HOW}; got {text!r}, and {what} is no GPU's memory in GB")
        sheet = next((s for s in SHEETS if s.name == TYPICAL.get(int(memory)) and s.memory == memory), None)
        return Machine(count, memory * GB, sheet=sheet, guessed=True)
    sheet = _by_name(what)
    if sheet is None:
        raise ValueError(f"{HOW}; got {text!r}, and {what} is not among {', '.join(s.name for s in SHEETS)}: give its memory instead")
    return Machine(count, sheet.memory * GB, sheet=sheet)


def _by_name(text: str) -> Sheet | None:
    word = re.sub(r"[\s_]", "", text.upper())
    word = re.sub(r"^(NVIDIA|GEFORCE|RTX)+", "", word)
    word, _, size = word.partition("-") if re.search(r"-\d+(GB?)?$", word) else (word, "", "")
    size = size.removesuffix("B").removesuffix("G")
    for sheet in SHEETS:
        if sheet.name.partition("-")[0] == word and (not size or float(size) == sheet.memory) and (size or "-" not in sheet.name):
            return sheet
    return None


def found() -> Machine | None:
    """This machine's GPUs, those that CUDA_VISIBLE_DEVICES leaves; None where there are none. The smallest of unequal ones counts."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return None
    all_of = [torch.cuda.get_device_properties(i) for i in range(count)]
    least = min(all_of, key=lambda each: each.total_memory)
    sheet = next((s for s in SHEETS if any(word in least.name for word in s.shown)), None)
    return Machine(count, float(least.total_memory), sheet=sheet)


def with_host(machine: Machine, gigabytes: float | None) -> Machine:
    """The machine with so much host memory. ValueError for none."""
    if gigabytes is None:
        return machine
    if not gigabytes > 0:
        raise ValueError(f"--host: memory of the host in GB, like 256; got {gigabytes:g}")
    return replace(machine, host=gigabytes * GB)
