"""Every head by name. A new one is a file with a `Head`, and a place in `HEADS`."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.additive import Additive
from eosin.eval.heads.clam import Clam
from eosin.eval.heads.contrastive import Contrastive
from eosin.eval.heads.dsmil import Dsmil
from eosin.eval.heads.head import Head
from eosin.eval.heads.maxima import MaxPooling
from eosin.eval.heads.means import MeanPooling
from eosin.eval.heads.mhim import Mhim
from eosin.eval.heads.packmil import PackMil
from eosin.eval.heads.prototype_pooling import PrototypePooling
from eosin.eval.heads.recipe import Recipe
from eosin.eval.heads.spatial import Spatial
from eosin.eval.heads.transmil import TransMil


@dataclass(frozen=True, kw_only=True)
class HeadProtocol:
    """A head, and how it is fitted."""

    make: Callable[[int, int], Head]
    """(features, outputs) to the head."""
    what: str
    """One line that says exactly what is done, but for the recipe."""
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def description(self) -> str:
        """With the recipe."""
        return f"{self.what}; {self.recipe.description}"


HEADS: dict[str, HeadProtocol] = {
    "mean@1": HeadProtocol(make=MeanPooling, what="one layer (256), mean over the bag"),
    "max@1": HeadProtocol(make=MaxPooling, what="one layer (256), largest of each channel"),
    "abmil/gated@2": HeadProtocol(make=GatedAttention, what="gated attention (256, 128)"),
    "abmil/contrastive@1": HeadProtocol(
        make=Contrastive,
        what="gated attention (256, 128), from supervised contrast (0.1) to the classes' loss in a "
        "line (SC-MIL)",
        recipe=Recipe(bags_a_step=16, rate=5e-4),
    ),
    "clam/sb@1": HeadProtocol(
        make=Clam, what="gated attention (512, 256), 8 + 8 instances at 0.3 (CLAM-SB)"
    ),
    "dsmil@1": HeadProtocol(make=Dsmil, what="critical tile and tiles like it (DSMIL)"),
    "transmil/grid@2": HeadProtocol(
        make=TransMil,
        what="TransMIL (256, 8 heads) with tiles at their places",
        recipe=Recipe(bags_a_step=1, rate=1e-4),
    ),
    "spatial/alibi@1": HeadProtocol(
        make=Spatial,
        what="two blocks (128, 4 heads) of attention that falls with distance",
        recipe=Recipe(rate=5e-4),
    ),
    "mhim/v2@1": HeadProtocol(
        make=Mhim, what="gated attention taught by its average on bags without their easiest 3 %"
    ),
    "packmil@1": HeadProtocol(
        make=PackMil, what="gated attention on half of each bag, hyperslides of the others"
    ),
    "additive@1": HeadProtocol(make=Additive, what="mean of what every tile says (256, 64)"),
    "prototypes/soft@1": HeadProtocol(
        make=PrototypePooling, what="shares and mean tiles of 16 learnt prototypes"
    ),
}
"""Name and version → the head; the version rises when the same bags would get other numbers."""

CLASSES_ALONE = ("abmil/contrastive@1", "clam/sb@1", "packmil@1")
"""Whose training asks for classes."""
USUAL = ("abmil/gated@2", "transmil/grid@2")
"""What is run when nothing else is asked for; mean pooling stands beside it by tiles' protocols."""


def choose_heads(wanted: Sequence[str]) -> list[str]:
    """The heads that names, ``usual``, or patterns such as ``abmil/*`` stand for, in order.

    Raises:
        ValueError: one stands for none.
    """
    chosen: set[str] = set()
    for pattern in wanted:
        found = USUAL if pattern == "usual" else fnmatch.filter(HEADS, pattern)
        if not found:
            raise ValueError(f"heads: no head '{pattern}'; there are {', '.join(HEADS)}")
        chosen |= set(found)
    return [name for name in HEADS if name in chosen]
