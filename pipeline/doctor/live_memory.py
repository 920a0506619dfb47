"""Count the bytes that fake tensors would occupy on a GPU.

Legend: a storage is the memory behind a tensor and all its views.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_GRANULARITY = 512  # bytes; torch's caching allocator rounds each allocation up to a multiple


class LiveMemory(TorchDispatchMode):
    """Context manager that follows every storage on cuda from its creation to its release.

    FSDP2 frees and restores gathered parameters by resizing their storages, so resizing is followed too. Storages that
    a kernel creates and releases inside one operation are not seen.

    Attributes:
        live: bytes of all storages that exist now.
        peaks: phase -> the most bytes that existed at once during the phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._sizes: dict[int, int] = {}  # address of a storage's implementation -> bytes
        self._releases: dict[int, weakref.finalize] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak inside the block as a peak of this phase. Phases can be nested and repeated."""
        before, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    def __enter__(self) -> "LiveMemory":
        resize = torch.UntypedStorage.resize_

        def follow(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._set_size(storage._cdata, _allocated(storage))
            return storage

        self._patch = patch.object(torch.UntypedStorage, "resize_", follow)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                for storage in _storages(leaf):
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            self._set_size(key, _allocated(storage))
            self._releases[key] = weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._set_size(key, 0)
        del self._sizes[key], self._releases[key]

    def _set_size(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self._note()

    def _note(self) -> None:
        if self._phase is not None:
            self.peaks[self._phase] = max(self.live, self.peaks.get(self._phase, 0))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Find the storages of a tensor. A tensor that consists of other tensors, like a DTensor, has none of its own."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # a DTensor also has a DeviceMesh
            yield from _storages(part)


def _allocated(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // _GRANULARITY) * _GRANULARITY
