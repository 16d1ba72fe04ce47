"""Secrets that were written into settings, where they do not belong: settings are kept in the store and shown.

What has a form that only secrets have is found: not every one, and no value that could be anything else.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.config.problems import Problem, raise_problems
from rlhf.config.yaml_tree import KeyPath, Tree, dotted

_FORMS = (
    ("a Hugging Face token", r"\bhf_[A-Za-z0-9]{20,}\b"),
    ("a Weights & Biases key", r"\b(?:wandb_v[0-9]+_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40})\b"),
    ("an access key of Amazon's", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("a key of an API", r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"),
    ("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})\b"),
    ("a signed token", r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    ("an address with a password", r"://[^/\s:@]*:[^/\s@]+@"),
    (
        "an address with a key in its query",
        r"(?i)[?&](?:[\w.-]*[_.-])?(?:token|secret|password|api[_-]?key|access[_-]?key|signature|sig|credential)=[^&\s]+",
    ),
)


def kind_of_secret(text: str) -> str | None:
    """What kind of secret a text looks like or holds; None where it looks like none."""
    return next((kind for kind, form in _FORMS if re.search(form, text)), None)


def refuse_secrets(tree: Tree) -> None:
    """Raise SettingsError where a setting's value or name looks like a secret; the message does not repeat it."""
    raise_problems([_problem(named, kind, place) for named, kind, place in _found(tree, tree.values, ())])


def refuse_secret_overrides(overrides: Sequence[str]) -> None:
    """The same of overrides, whether or not they can be applied."""
    split = [text.partition("=") for text in overrides]
    kinds = [(name, kind) for name, _, value in split if (kind := kind_of_secret(value)) is not None]
    raise_problems([_problem(name, kind, f"override {name}") for name, kind in kinds])


def _problem(named: str, kind: str, place: str) -> Problem:
    hint = (
        "put it into an environment variable: WANDB_API_KEY, HF_TOKEN, or one that an endpoint's token_variable names"
    )
    return Problem(f"{named} holds what looks like {kind}, and settings are stored and shown", place, hint)


def _found(tree: Tree, value: Any, path: KeyPath) -> Iterator[tuple[str, str, str]]:
    """Of every secret: where it stands by name, its kind, and the line."""
    if isinstance(value, dict):
        for name, inner in value.items():
            # A secret as a name is not repeated either.
            if (kind := kind_of_secret(name)) is not None:
                yield f"a setting's name in {dotted(path) or 'the pipeline'}", kind, tree.place(path)
            else:
                yield from _found(tree, inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _found(tree, inner, (*path, index))
    elif isinstance(value, str) and (kind := kind_of_secret(value)) is not None:
        yield dotted(path), kind, tree.place(path)
