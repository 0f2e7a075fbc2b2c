"""The bags of a training, with the vectors and labels that belong to them."""

from dataclasses import dataclass

import numpy as np

from eosin.configs.errors import InputError
from eosin.pretrain.slide.config import SlideConfig
from eosin.pretrain.slide.labels import Labels, read_labels
from eosin.pretrain.slide.paired import Paired, read_paired
from eosin.pretrain.slide.sources import Sources


@dataclass(frozen=True)
class SlideData:
    """What a training reads."""

    sources: Sources
    paired: Paired | None
    labels: Labels | None

    @property
    def summary(self) -> str:
        """In words, for people."""
        s = self.sources
        tiles = sum(len(source.store.store.features) for source in s.sources)
        names = "; ".join(f"{source.name} ({source.dim} features)" for source in s.sources)
        lines = [
            f"{len(s.samples)} samples of {len({x.group for x in s.samples})} groups, {tiles:,} "
            f"tiles of {names}"
        ]
        if s.left_out:
            lines.append(f"{s.left_out} samples are left out: no stains, vectors or labels")
        if self.paired is not None:
            counts = (f"{m.name} of {(m.row >= 0).sum()}" for m in self.paired.modalities)
            lines.append(f"paired vectors: {', '.join(counts)} samples")
        if self.labels is not None:
            counts = (f"{t.name} of {(t.target >= 0).sum()}" for t in self.labels.tasks)
            lines.append(f"labels: {', '.join(counts)} samples")
        return "\n".join(lines)


def open_data(config: SlideConfig) -> SlideData:
    """Opens bags, vectors and labels; samples that no term could learn from are left out.

    Raises:
        InputError: something cannot be read, or nothing is left.
    """
    o, bags = config.objective, config.bags
    stains = 2 if "stain" in config.views.apart else 1
    sources = Sources(bags.stores, bags.table, bags.unit, stains)
    paired, labels = _belongings(config, sources)
    if o.distil is None and o.regress is None and o.contrast is None:
        useful = np.zeros(len(sources.samples), np.bool_)
        if paired is not None:
            useful |= ~paired.missing()
        if labels is not None:
            for task in labels.tasks:
                useful |= task.target >= 0
        if not useful.all():
            keys = (s.key for s, use in zip(sources.samples, useful, strict=True) if use)
            sources = sources.only(frozenset(keys))
            paired, labels = _belongings(config, sources)
    if config.bags.unit == "slide" and "slide" in config.views.apart:
        raise InputError("views.apart=[slide] needs bags.unit=group: a sample has one slide")
    return SlideData(sources, paired, labels)


def _belongings(config: SlideConfig, sources: Sources) -> tuple[Paired | None, Labels | None]:
    o, keys = config.objective, [sample.key for sample in sources.samples]
    paired = None if o.align is None else read_paired(o.align.table, keys)
    labels = None if o.labels is None else read_labels(o.labels, config.bags.unit, keys)
    return paired, labels
