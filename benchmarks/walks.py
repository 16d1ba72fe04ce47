"""The random-walk task: find the shortest way to the goal of a directed graph, having seen random walks only.

The task is that of Chen et al. 2021 (arXiv:2106.01345), §3, posed to a language model: a node is a letter, a walk is a
word. This file stands alone because PPO imports it as its reward, and its content is then part of the result's key.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

NODES = 21
EDGE_PROBABILITY = 0.1
WALKS = 1000
LIMIT = 10
"""Longest walk, in nodes."""
GRAPH_SEED = 1000
GOAL = 0
LETTERS = "abcdefghijklmnopqrstu"
"""One for each node; the goal is ``a``."""
STARTS = LETTERS[1:]

Edges = NDArray[np.bool_]


@cache
def task() -> tuple[Edges, tuple[str, ...]]:
    """The graph as ``[from, to]``, and random walks on it from starts other than the goal; always the same ones."""
    random = np.random.RandomState(GRAPH_SEED)
    while True:
        edges = random.rand(NODES, NODES) > 1 - EDGE_PROBABILITY
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    walks: list[str] = []
    for _ in range(WALKS):
        walk = [int(random.randint(1, NODES))]
        while len(walk) < LIMIT and walk[-1] != GOAL:
            walk.append(int(random.choice(np.flatnonzero(edges[walk[-1]]))))
        walks.append("".join(LETTERS[node] for node in walk))
    return edges, tuple(walks)


@cache
def shortest() -> tuple[int, ...]:
    """For each node, the nodes of a shortest walk from it to the goal, both ends counted."""
    edges, _ = task()
    lengths = {GOAL: 1}
    for length in range(2, LIMIT + 1):
        before = np.isin(np.arange(NODES), list(lengths))
        for node in np.flatnonzero(edges[:, before].any(axis=1)):
            lengths.setdefault(int(node), length)
    return tuple(lengths[node] for node in range(NODES))


def length_to_goal(walk: str) -> int:
    """Nodes of a walk up to the goal; ``LIMIT`` where it never gets there, or not along edges."""
    edges, _ = task()
    nodes = [LETTERS.find(letter) for letter in walk[:LIMIT]]
    if GOAL not in nodes:
        return LIMIT
    nodes = nodes[: nodes.index(GOAL) + 1]
    along_edges = all(min(pair) >= 0 and edges[pair] for pair in pairwise(nodes))
    return len(nodes) if along_edges else LIMIT


def optimality(walk: str) -> float:
    """How short a walk is: 1 for a shortest one, 0 for one that does not reach the goal before the limit."""
    return (LIMIT - length_to_goal(walk)) / (LIMIT - shortest()[LETTERS.index(walk[0])])


def ends_at_goal(walk: str) -> bool:
    """Whether the goal is the walk's last node and no earlier one."""
    return walk.find(LETTERS[GOAL]) == len(walk) - 1


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Optimality of each walk; what follows the goal does not matter."""
    return [optimality(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def reward_for_stopping(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Optimality of the walks that go no further than the goal, 0 for others.

    That the response ended there shows in no text: the stage's ``missing_eos_score`` 0 sees to it.
    """
    walks = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return [optimality(walk) if ends_at_goal(walk) else 0.0 for walk in walks]


def judge(prompt: str, responses: Sequence[str]) -> list[float]:
    """Return the reward of several walks from one start, for the stage ``compare``."""
    return reward([prompt] * len(responses), responses)
