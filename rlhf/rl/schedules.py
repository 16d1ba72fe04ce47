"""The learning rate as a share of its peak: a function of how many updates are done."""

import math
from typing import Literal


def learning_rate_share(
    done: int, total: int, schedule: Literal["linear", "cosine", "constant"], warmup_fraction: float = 0.0
) -> float:
    """The share in (0, 1] for update number ``done``, counted from 0, of ``total``.

    Over the first ``warmup_fraction`` of the updates it rises along a line, and the first update already moves. Then it
    falls towards 0, which only an update after the last would have: along a line, along half a cosine (Loshchilov and
    Hutter 2016, arXiv:1608.03983, eq. 5), or not at all.
    """
    warmup = math.ceil(warmup_fraction * total)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    progress = (done - warmup) / (total - warmup)
    match schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "constant":
            return 1.0
