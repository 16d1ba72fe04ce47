"""Random numbers, each use's of its own: a stream is named by its domain and seeded by numbers.

numpy's own ``default_rng([s, t])`` is the stream of ``default_rng([s, t, 0])``, so that two uses of one seed are not
apart by having other numbers beside it.
"""

import hashlib
import json
from typing import Literal

import numpy as np

Domain = Literal[
    "adapters",
    "bridges",
    "collected prompts",
    "demonstrations in PPO",
    "learning order",
    "lists",
    "minibatches",
    "model from scratch",
    "online orders",
    "pairs",
    "probes",
    "prompts",
    "reward head",
    "reward model from scratch",
    "sampling",
    "sets left out",
    "trainer",
    "value head",
]
"""Every use of randomness that a seed decides."""


def stream(domain: Domain, *seed: int) -> np.random.Generator:
    """Return the generator of a use of randomness: a function of the arguments, unlike that of any others.

    Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405) with 128 bits of a digest as its key.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(domain, seed)[:16])))


def seed_of(domain: Domain, *seed: int) -> int:
    """Return a seed below 2**32 for a library that takes a single one, as torch does: a function of the arguments."""
    return int.from_bytes(_digest(domain, seed)[:4])


def _digest(domain: Domain, seed: tuple[int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([domain, *map(int, seed)]).encode()).digest()
