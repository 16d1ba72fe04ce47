"""Independent streams of random numbers: each is named by its domain and seeded by numbers.

numpy's ``default_rng([s, t])`` is the same stream as ``default_rng([s, t, 0])``: further numbers beside a seed do not
suffice to separate two uses of it.
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
    "further prompts",
    "learning order",
    "lists",
    "minibatches",
    "mixture",
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
    "watched prompts",
]
"""Every use of random numbers that depends on a seed."""


def stream(domain: Domain, *seed: int) -> np.random.Generator:
    """Return the generator of a domain and seed: a function of the arguments alone, independent of all other streams.

    Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405) with 128 bits of a digest as its key.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(domain, seed)[:16])))


def seed_of(domain: Domain, *seed: int) -> int:
    """Return a seed below 2**32 for a library that takes one number, as torch does: a function of the arguments."""
    return int.from_bytes(_digest(domain, seed)[:4])


def _digest(domain: Domain, seed: tuple[int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([domain, *map(int, seed)]).encode()).digest()
