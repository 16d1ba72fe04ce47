from collections import deque
from itertools import pairwise

import numpy as np

from benchmarks import walks


def slow_shortest(start: int) -> str:
    """Breadth-first search, walk by walk."""
    edges, _ = walks.task()
    waiting = deque([[start]])
    while True:
        walk = waiting.popleft()
        if walk[-1] == walks.GOAL:
            return "".join(walks.LETTERS[node] for node in walk)
        waiting.extend([*walk, int(node)] for node in np.flatnonzero(edges[walk[-1]]) if node not in walk)


def test_a_shortest_walk_is_worth_1() -> None:
    """From every start, by an oracle of its own; and one more node costs what the definition says."""
    for start in walks.STARTS:
        best = slow_shortest(walks.LETTERS.index(start))
        assert walks.optimality(best) == 1
        assert walks.length_to_goal(best) == walks.shortest()[walks.LETTERS.index(start)]


def test_the_known_walks_are_random_walks() -> None:
    """A thousand along edges, from every start but the goal; they stop at the goal or after ten nodes."""
    edges, known = walks.task()
    assert len(known) == 1000
    assert {walk[0] for walk in known} == set(walks.STARTS)
    for walk in known:
        nodes = [walks.LETTERS.index(letter) for letter in walk]
        assert all(edges[pair] for pair in pairwise(nodes))
        assert walks.ends_at_goal(walk) or (len(walk) == walks.LIMIT and walks.GOAL not in nodes)


def test_a_walk_that_leaves_the_graph_is_worth_nothing() -> None:
    """A missing edge, an unknown sign or no goal: as if it never arrived."""
    edges, _ = walks.task()
    start = next(letter for node, letter in enumerate(walks.LETTERS) if letter != "a" and not edges[node, walks.GOAL])
    for walk in (f"{start}a", f"{start} a", f"{start}?a", start):
        assert walks.reward([walk[0]], [walk[1:]]) == [0]


def test_stopping_means_nothing_after_the_goal() -> None:
    """What follows the goal costs nothing, unless stopping is asked for."""
    best = slow_shortest(5)
    assert walks.reward([best[0]] * 2, [best[1:], best[1:] + "b"]) == [1, 1]
    assert walks.reward_for_stopping([best[0]] * 2, [best[1:], best[1:] + "b"]) == [1, 0]
