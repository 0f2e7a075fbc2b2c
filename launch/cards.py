"""GPUs by name: what the makers say of them, for plans."""

import os
from dataclasses import dataclass

from eosin.configs.errors import ConfigError
from eosin.launch.peak import peak_of


@dataclass(frozen=True)
class Card:
    """One GPU, or this machine's CPU."""

    name: str
    memory_gib: float
    """As torch reports it."""
    watts: float
    """Of the board."""
    link_gbs: float
    """GB/s to other GPUs of a node, in each direction: NVLink, else PCIe."""
    tflops: float = 0.0
    """Dense bf16 at most (`launch.peak`); of a CPU core in fp32."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is none."""
        return self.name == "cpu"


CARDS = (
    Card("B200", 178, 1000, 900),
    Card("H200", 139.8, 700, 450),
    Card("GH200", 94.5, 700, 450),
    Card("H100", 79.1, 700, 450),
    Card("H100 NVL", 93.1, 400, 300),
    Card("H100 PCIe", 79.1, 350, 63),
    Card("A100", 79.3, 400, 300),
    Card("A100 40GB", 39.5, 400, 300),
    Card("L40S", 44.4, 350, 32),
    Card("L4", 22.0, 72, 32),
    Card("A10", 22.0, 150, 32),
    Card("A10G", 22.0, 300, 32),
    Card("RTX 6000 Ada", 47.4, 300, 32),
    Card("RTX A6000", 47.4, 300, 56),
    Card("RTX 4090", 23.5, 450, 32),
    Card("RTX 3090", 23.6, 350, 32),
)
"""By the data sheets; whole words of a name decide, as in `launch.peak`."""

CORE_TFLOPS = 0.065
"""fp32 of a CPU core with AVX2, measured on products of a training step."""


def card_called(name: str) -> Card:
    """The card of that name, e.g. ``H100``, or as a driver says it.

    Raises:
        ConfigError: there is none; those that there are are named.
    """
    if name.lower() == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return Card("cpu", round(memory, 1), 15, 10, CORE_TFLOPS)
    words = set(name.replace("-", " ").split())
    known = [card for card in CARDS if set(card.name.split()) <= words]
    peak = peak_of(name)
    if not known or peak is None:
        names = ", ".join(card.name for card in CARDS)
        raise ConfigError(f"no figures for gpu={name}; there are {names}, and cpu")
    best = max(known, key=lambda card: len(card.name.split()))
    return Card(best.name, best.memory_gib, best.watts, best.link_gbs, peak / 1e12)
