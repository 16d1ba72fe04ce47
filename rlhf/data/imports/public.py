"""Public data sets whose ratings and rankings become comparison sets.

    HelpSteer, HelpSteer2   a row per response, five attributes rated       ratings of one attribute
    SHP                     two replies, and which of them was voted up     winners
    OASST                   trees of messages, or a row per message         rankings of the answers to each message
    UltraFeedback           four responses rated                            ratings of one field
    UltraFeedback binarized two of them with their scores                   ratings

The sources are Wang et al. 2024 (arXiv:2406.08673), Ethayarajh et al. 2022 (arXiv:2110.08420), Köpf et al. 2023
(arXiv:2304.07327) and Cui et al. 2023 (arXiv:2310.01377). Rows of one prompt, and messages of one tree, may stand
anywhere in the file, so that HelpSteer's and OASST's are held in memory.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from rlhf.data.forms import FormReader
from rlhf.data.imports.naming import MalformedError, is_number
from rlhf.data.records import ComparisonSet

Record = Mapping[str, Any]


class Place(NamedTuple):
    """Where a record stands, for messages."""

    record: int
    """Its number among all records of the source, from 1."""
    shown: str
    """File, line and number, as a reader looks for it."""


Placed = tuple[Place, Record]
Made = tuple[Place, dict[str, Any] | MalformedError]
"""A row of comparisons, or why there is none, and the place of the record it was made of."""

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("overall_score", "fine-grained_score")

_ROLES = {"prompter": "user", "assistant": "assistant"}


class PublicSet(NamedTuple):
    """How the records of one data set are read."""

    title: str
    recognises: Callable[[Record], bool]
    questions: tuple[str, ...]
    """What was rated, by the name of its field; the first is taken unless another is asked for."""
    sets: Callable[[Iterable[Placed], str, Counter[str]], Iterator[Made]]
    """Of the records, the question, and a count of what is left out."""


def _helpsteer(records: Iterable[Placed], attribute: str, left_out: Counter[str]) -> Iterator[Made]:
    groups: defaultdict[str, list[Placed]] = defaultdict(list)
    for place, record in records:
        groups[json.dumps(record["prompt"])].append((place, record))
    for group in groups.values():
        place = group[0][0]
        if len(group) < 2:
            left_out["prompts with one response"] += 1
            continue
        ratings = [[record.get(attribute)] for _, record in group]
        responses = [record["response"] for _, record in group]
        yield place, {"prompt": _helpsteer_prompt(group[0][1]["prompt"]), "responses": responses, "ratings": ratings}


def _helpsteer_prompt(prompt: Any) -> Any:
    """Split a prompt of several turns, which HelpSteer2 joins by ``<extra_id_1>Assistant`` and ``<extra_id_1>User``."""
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        return prompt
    first, *parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    turns = [("User", first), *zip(parts[::2], parts[1::2], strict=True)]
    # A prompt ends where the assistant's turn begins.
    turns = turns[:-1] if turns[-1] == ("Assistant", "") else turns
    return [{"role": role.casefold(), "content": text} for role, text in turns]


def _shp(records: Iterable[Placed], _: str, left_out: Counter[str]) -> Iterator[Made]:
    del left_out
    for place, record in records:
        label = record["labels"]
        if label not in (0, 1):
            yield place, MalformedError("labels", f"is {label!r}; it must be 1 where A is preferred, 0 where B is")
            continue
        responses = [record["human_ref_A"], record["human_ref_B"]]
        yield place, {"prompt": record["history"], "responses": responses, "winners": [[0, 1, label]]}


def _oasst(records: Iterable[Placed], _: str, left_out: Counter[str]) -> Iterator[Made]:
    replies: defaultdict[str, list[Record]] = defaultdict(list)
    roots: list[Placed] = []
    for place, record in records:
        if isinstance(record.get("prompt"), Mapping):
            roots.append((place, record["prompt"]))
        elif record.get("parent_id") is None:
            roots.append((place, record))
        else:
            replies[str(record["parent_id"])].append(record)

    def children(message: Record) -> list[Record]:
        return [*(message.get("replies") or []), *replies.get(str(message.get("message_id")), [])]

    known = {str(message.get("message_id")) for message in (*(root for _, root in roots), *chain(*replies.values()))}
    if lost := sum(len(some) for parent, some in replies.items() if parent not in known):
        left_out["messages whose parent is not in the file"] = lost

    def walk(place: Place, message: Record, before: list[dict[str, Any]]) -> Iterator[Made]:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            yield place, MalformedError("role", f"is {role!r}; known: {', '.join(_ROLES)}")
            return
        so_far = [*before, {"role": _ROLES[role], "content": message.get("text")}]
        below = [one for one in children(message) if not one.get("deleted")]
        ranked = [one for one in below if one.get("role") == "assistant" and is_number(one.get("rank"))]
        if len(ranked) > 1:
            ranks = sorted({one["rank"] for one in ranked})
            places = [[number for number, one in enumerate(ranked) if one["rank"] == rank] for rank in ranks]
            yield (
                place,
                {
                    "prompt": so_far,
                    "responses": [one.get("text") for one in ranked],
                    "rankings": [[numbers[0] if len(numbers) == 1 else numbers for numbers in places]],
                },
            )
        elif _ROLES[role] == "user":
            left_out["messages with fewer than two ranked answers"] += 1
        for one in below:
            yield from walk(place, one, so_far)

    for place, root in roots:
        yield from walk(place, root, [])


def _ultrafeedback(records: Iterable[Placed], score: str, left_out: Counter[str]) -> Iterator[Made]:
    del left_out
    for place, record in records:
        completions: list[Record] = record["completions"]
        row = {
            "prompt": record["instruction"],
            "responses": [one.get("response") for one in completions],
            "ratings": [[one.get(score)] for one in completions],
        }
        models = [one.get("model") for one in completions]
        yield place, row | ({"models": models} if all(isinstance(one, str) for one in models) else {})


def _scored_pairs(records: Iterable[Placed], _: str, left_out: Counter[str]) -> Iterator[Made]:
    del left_out
    for place, record in records:
        pair = {name: record[name] for name in ("prompt", "chosen", "rejected") if name in record}
        found = FormReader().parse(pair, ComparisonSet)
        if isinstance(found, list):
            yield place, MalformedError(*found[0])
            continue
        ratings = [[record["score_chosen"]], [record["score_rejected"]]]
        yield place, found.model_dump(include={"prompt", "responses"}) | {"ratings": ratings}


def _is_oasst(record: Record) -> bool:
    return "message_tree_id" in record and (
        isinstance(record.get("prompt"), Mapping) or {"message_id", "text", "role"} <= record.keys()
    )


def _is_ultrafeedback(record: Record) -> bool:
    completions = record.get("completions")
    rated = isinstance(completions, list) and all(isinstance(one, Mapping) for one in completions)
    return "instruction" in record and rated


PUBLIC_SETS = {
    "helpsteer": PublicSet(
        "HelpSteer", lambda record: {"prompt", "response", "helpfulness"} <= set(record), HELPSTEER, _helpsteer
    ),
    "shp": PublicSet(
        "SHP", lambda record: {"history", "human_ref_A", "human_ref_B", "labels"} <= set(record), (), _shp
    ),
    "oasst": PublicSet("OASST", _is_oasst, (), _oasst),
    "ultrafeedback": PublicSet("UltraFeedback", _is_ultrafeedback, ULTRAFEEDBACK, _ultrafeedback),
    "ultrafeedback-binarized": PublicSet(
        "UltraFeedback binarized",
        lambda record: {"chosen", "rejected", "score_chosen", "score_rejected"} <= set(record),
        (),
        _scored_pairs,
    ),
}
