import re
from pathlib import Path
from typing import get_args

import rlhf
from rlhf.randomness import Domain, seed_of, stream

SEEDS = ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (10,), (1, 0, 1))


def test_no_two_streams_coincide() -> None:
    """Whatever their domains and seeds, one that goes on with a 0 included."""
    calls = [(domain, *seed) for domain in get_args(Domain) for seed in SEEDS]
    beginnings = {tuple(stream(*call).random(2)) for call in calls}
    assert len(beginnings) == len(calls)
    assert len({seed_of(*call) for call in calls}) == len(calls)


def test_a_stream_is_a_function_of_its_name_and_seed_alone() -> None:
    """On every machine: what was drawn for a result can be drawn again."""
    assert stream("prompts", 7, 1).integers(1000, size=4).tolist() == [668, 34, 496, 535]
    assert seed_of("value head", 7) == 2909937613


def test_all_that_a_seed_decides_is_drawn_from_a_named_stream() -> None:
    """No module seeds a generator of its own."""
    own = re.compile(r"default_rng\(|Philox\(|manual_seed\((?!seed_of)")
    package = Path(rlhf.__file__).parent
    modules = [*package.rglob("*.py"), *(package.parent / "stages").glob("*.py")]
    assert len(modules) > 100
    assert {path.name for path in modules if own.search(path.read_text(encoding="utf-8"))} == {"randomness.py"}
