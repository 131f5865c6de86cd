"""What lies on the device and is not needed while an engine samples, kept on the host for that time."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from actial_fast.model.weights import local

SMALL = 1 << 16  # bytes; what is smaller stays, since it would cost time and free nothing


class Offload:
    """Optimizer states and frozen models that can leave the device and come back, in place: whoever holds the tensors keeps them.

    Their memory is given up storage by storage and is the same number of bytes on the host, pinned, allocated once and used again. Reading
    a tensor that has left is an error of PyTorch's. A disabled one does nothing. On a CPU what came from a file stays: NumPy has seen
    its memory, and PyTorch gives that up no more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, *models: nn.Module, enabled: bool = True):
        self._optimizer, self._models, self._enabled = optimizer, models, enabled
        self._host: dict[int, Tensor] = {}  # by how many storages came before, so that the buffers are used again
        self._gone: list[tuple[torch.UntypedStorage, Tensor]] = []

    def out(self) -> None:
        """To the host; nothing where it is there already."""
        if not self._enabled or self._gone:
            return
        gone = []
        for number, storage in enumerate(self._storages()):
            host = self._host.get(number)
            if host is None or host.nbytes != storage.nbytes():
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._host[number] = host
            host.copy_(_bytes(storage), non_blocking=True)
            gone.append((storage, host))
        _settle()  # before the memory that is being copied is given up
        for storage, _ in gone:
            storage.resize_(0)
        self._gone = gone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for whoever does not ask PyTorch's allocator

    def back(self) -> None:
        """To the device."""
        for storage, host in self._gone:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
        self._gone = []

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """The storages of all tensors, each once, in a fixed order."""
        seen: set[int] = set()
        for tensor in self._tensors():
            storage = local(tensor).untyped_storage()
            if storage.nbytes() >= SMALL and storage.resizable() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _tensors(self) -> Iterator[Tensor]:
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    yield from (v for v in self._optimizer.state.get(parameter, {}).values() if isinstance(v, Tensor))
        for model in self._models:
            yield from model.parameters()


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the host in page-locked memory of no more than their size, for as long as they are used: PyTorch's own allocator takes the
    next power of two. OSError where the system locks no more."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.zeros(shape, dtype=dtype)
    pages = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    address, cuda = pages.ctypes.data, torch.cuda.cudart()
    if code := int(cuda.cudaHostRegister(address, nbytes, 1)):  # 1: for all devices
        raise OSError(f"{nbytes / 1e9:.1f} GB of the host's memory could not be locked (CUDA error {code}); set optim.offload to none")
    weakref.finalize(pages, cuda.cudaHostUnregister, address).atexit = False  # the tensor holds them
    return torch.from_numpy(pages).view(dtype).view(shape)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
