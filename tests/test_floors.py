"""The direction of imports: a module imports its own folder and lower floors, so each floor is understood alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors", "randomness"),
    ("config", "store", "tracking", "textstats"),
    ("attempt", "rl", "data"),
    ("ranking", "zero"),
    ("cluster", "models"),
    ("pipeline", "rewards", "rollout"),
    ("collect", "history", "terminal", "training"),
    ("narration", "report", "stages", "watching"),
    ("cli",),
    ("__main__",),
)
"""Folders and modules of ``rlhf/``, and ``stages``, the lowest first; those of one floor do not import each other."""
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted([*ROOT.glob("rlhf/**/*.py"), *ROOT.glob("stages/*.py")])


def part_of(module: str) -> str | None:
    """The folder or module of ``rlhf/`` that a dotted name is of, or ``stages``; None for other packages."""
    first, *rest = module.split(".")
    return first if first == "stages" else rest[0] if first == "rlhf" and rest else None


def imported(file: Path) -> set[str]:
    """The parts that a file imports, at its top or within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = node.module == "rlhf"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if below else {node.module}
    return {part for name in names if (part := part_of(name)) is not None}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_lead_downstairs(file: Path) -> None:
    """To a lower floor, or to the same folder."""
    own = part_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if own in (None, "__init__"):
        return
    wrong = {part for part in imported(file) - {own} if FLOOR_OF[part] >= FLOOR_OF[own]}
    assert not wrong, f"{own} may not import {sorted(wrong)}"


def test_every_folder_has_a_floor() -> None:
    """What is added needs a place in the house."""
    parts = {part_of(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in FILES}
    assert parts - {None, "__init__"} == FLOOR_OF.keys()
