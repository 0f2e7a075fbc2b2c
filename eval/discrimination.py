"""Whether a task tells encoders from floors at all.

A task on which colour alone, or the same network at random weights, does as well as the best
encoder says nothing of encoders: it is marked, and left out of means.
"""

from collections.abc import Sequence

from eosin.eval.results import Results, Score

FLOOR_KINDS = ("floor", "random")


def is_discriminative(results: Sequence[Results]) -> dict[str, bool]:
    """Of each protocol: whether the best floor lies below the interval of the best encoder.

    Args:
        results: of one task, of one or several encoders; balanced accuracy is looked at.
    """
    kinds = {(id(r), e.name): e.kind for r in results for e in r.encoders}
    told = {}
    for protocol in dict.fromkeys(p for r in results for p in r.protocols):
        of_floors, of_encoders = list[Score](), list[Score]()
        for r in results:
            for s in r.scores:
                if (s.protocol, s.metric) != (protocol, "balanced_accuracy"):
                    continue
                is_floor = kinds[id(r), s.encoder] in FLOOR_KINDS
                (of_floors if is_floor else of_encoders).append(s)
        best = max(of_encoders, key=lambda s: s.value, default=None)
        told[protocol] = best is not None and all(s.value < best.low for s in of_floors)
    return told
