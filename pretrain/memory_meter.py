"""Bytes that tensors hold, by part, over a piece of work: measured on real tensors or on fake ones.

A storage counts from the operation that returned it to the moment that nothing refers to it, so
the figure is that of an allocator without overhead. What a kernel takes and gives back inside one
operation is not seen.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVE_NAMESPACES = ("c10d", "fsdp")
"""Of operators that move tensors between ranks, or pack them for it."""


@dataclass
class _Held:
    """One storage; its label may be given later than its bytes."""

    label: str
    is_firm: bool = False
    """Whether somebody said what it is."""


@dataclass(frozen=True)
class _Change:
    """Of the bytes of one storage."""

    held: _Held
    change: int
    part: str
    """What was going on."""


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes were held."""

    part: str
    """What was going on."""
    labels: dict[str, int]
    """Bytes by label, at that moment."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.labels.values())


@dataclass
class MemoryMeter(TorchDispatchMode):
    """Follows every storage that operations return while it is entered.

    It is a `launch.stopwatch.Watch`: what an operation returns gets the running part for its label,
    unless `label` gives it another one.
    """

    resized: str = "resized"
    """Label of storages that changed their size."""

    label_of: Callable[[Any, tuple[Any, ...], str], str] | None = None
    """(operator, its arguments, running part) → label of what it returns."""
    _part: str = ""
    _live: dict[int, tuple["weakref.ref[torch.UntypedStorage]", _Held, int]] = field(
        default_factory=dict
    )
    _changes: list[_Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "MemoryMeter":
        """Follows storages that change their size by themselves, too (FSDP's do)."""
        meter, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            meter._see(storage, meter._part)
            held = meter._live[storage._cdata][1]
            held.label, held.is_firm = meter.resized, True
            return out

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops following."""
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and looks at what it returns."""
        out = func(*args, **(kwargs or {}))
        label = self._part if self.label_of is None else self.label_of(func, args, self._part)
        if label != self._part and func.namespace in COLLECTIVE_NAMESPACES:
            self._relabel((args, kwargs), label)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    self._see(storage, label)
        return out

    def switch(self, part: str) -> str:
        """See `launch.stopwatch.Watch`."""
        before, self._part = self._part, part
        return before

    def stop(self) -> None:
        """See `launch.stopwatch.Watch`."""
        self._part = ""

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Says what the tensors are, from their beginning on; counts those not seen before."""
        for tensor in tensors:
            for storage in storages(tensor):
                self._see(storage, label)
                held = self._live[storage._cdata][1]
                held.label, held.is_firm = label, True

    def forget(self) -> None:
        """What happened so far: the highest moment is looked for from here on."""
        self._changes = [_Change(held, size, "") for _, held, size in self._live.values()]

    def held(self) -> dict[str, int]:
        """Bytes by label that are held now."""
        now: dict[str, int] = {}
        for _, held, size in self._live.values():
            now[held.label] = now.get(held.label, 0) + size
        return now

    def peak(self, parts: Iterable[str] | None = None) -> Peak:
        """The highest moment of all, or of the given parts.

        Raises:
            ValueError: nothing was held in these parts.
        """
        wanted = None if parts is None else set(parts)
        total, highest, at = 0, -1, -1
        for index, change in enumerate(self._changes):
            total += change.change
            if total > highest and (wanted is None or change.part in wanted):
                highest, at = total, index
        if at < 0:
            raise ValueError("no operation was seen")
        labels: dict[str, int] = {}
        for change in self._changes[: at + 1]:
            name = change.held.label
            labels[name] = labels.get(name, 0) + change.change
        return Peak(self._changes[at].part, {name: n for name, n in labels.items() if n})

    def _relabel(self, arguments: Any, label: str) -> None:
        """What a collective reads or writes, where nobody said what it is."""
        for leaf in tree_leaves(arguments):
            for storage in storages(leaf) if isinstance(leaf, Tensor) else ():
                self._see(storage, label)
                if not (held := self._live[storage._cdata][1]).is_firm:
                    held.label = label

    def _see(self, storage: torch.UntypedStorage, label: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            reference, held, before = known
            if size != before:
                self._live[key] = (reference, held, size)
                self._changes.append(_Change(held, size - before, self._part))
            return
        held = _Held(label)

        def gone(_: "weakref.ref[torch.UntypedStorage]") -> None:
            _, mine, last = self._live.pop(key)
            self._changes.append(_Change(mine, -last, self._part))

        self._live[key] = (weakref.ref(storage, gone), held, size)
        self._changes.append(_Change(held, size, self._part))


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory behind a tensor; of a sharded one, that of this rank's part."""
    local = getattr(tensor, "_local_tensor", None)
    tensor = tensor if local is None else local
    return [] if tensor.layout != torch.strided else [tensor.untyped_storage()]
