"""UNI's linear probe as its code has it, ``linear/uni-torch@1``.

One linear layer, started at zero, on features as they are, by torch's own full-batch L-BFGS (1,000
iterations, strong Wolfe) on train and val together. What is minimised is the mean cross-entropy
plus ``½ ‖W‖ / C`` with ``C = D · classes / 100``, whose norm is NOT squared: neither the textbook's
L2 penalty nor, at the same C, scikit-learn's (mahmoodlab/UNI 42715ef, ``logistic_regression.py``).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.eval.linear import outcome_of
from eosin.eval.probe import Family, Labelled, Outcome

PROTOCOL = "linear/uni-torch@1"
MAX_ITERATIONS = 1000


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """See `Family`; `seed` is not used: the start is zero."""
    dim = labelled.features.shape[1]
    c = dim * n_classes / 100
    x = torch.from_numpy(labelled.features).to(labelled.device)
    y = torch.from_numpy(labelled.labels).to(labelled.device)
    layer = torch.nn.Linear(dim, n_classes, device=labelled.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.LBFGS(
        layer.parameters(), max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss: Tensor = F.cross_entropy(layer(x), y) + 0.5 / c * layer.weight.norm(p=2)
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)
    with torch.no_grad():
        logits = layer(torch.from_numpy(test_features).to(labelled.device))
    probabilities = torch.softmax(logits.double(), dim=1).cpu().numpy()
    return {PROTOCOL: outcome_of(probabilities, {"C": c})}


FAMILY = Family(
    protocols={
        PROTOCOL: "UNI's torch probe: L-BFGS on mean cross-entropy + ½ ‖W‖ / C, norm not squared, "
        "C = features · classes / 100, on train and val"
    },
    run=run,
)
