"""How a head is fitted: a few numbers that are part of its protocol."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW at a constant rate, stopped on val."""

    rate: float = 2e-4
    weight_decay: float = 1e-5
    epochs: int = 50
    """At most."""
    patience: int = 10
    """Epochs without a better one on val, after which a head is done."""
    bags_a_step: int = 4
    tiles_a_step: int = 100_000
    """A batch ends before the bag that would go beyond; a larger bag is a batch of its own."""
    runs: int = 3
    """Heads that differ in their start and draws; what they say is averaged."""

    @property
    def description(self) -> str:
        """In words."""
        bags = "a bag" if self.bags_a_step == 1 else f"{self.bags_a_step} bags"
        return (
            f"AdamW {self.rate:g}, {bags} a step, whole bags, stopped by AUROC on val; "
            f"{self.runs} runs"
        )
