"""Work beside the main stream of a GPU: collectives of the targets while the student runs."""

from typing import Self

import torch


class Aside:
    """A context whose work the device does beside what comes after it, until `join`.

    Memory is safe without further marks: what is made inside is read after `join` alone, what it
    reads is held until then, and the next entry waits for all that came before it.

    Args:
        device: where the work is done; on a CPU, or for None, it is done at once.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> Self:
        if self._device is not None:
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._context.__exit__(*error)

    def join(self) -> None:
        """What the main stream does from here on comes after the work; nothing else waits."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._stream = None
