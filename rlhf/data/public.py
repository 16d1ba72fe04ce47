"""Make comparison sets of the ratings and rankings of public data sets.

    HelpSteer, HelpSteer2   a row per response, five attributes rated       ratings of one attribute
    SHP                     two replies, and which of them was voted up     winners
    OASST                   trees of messages, or a row per message         rankings of the answers to each message
    UltraFeedback           four responses rated                            ratings of one field
    UltraFeedback binarized two of them with their scores                   ratings

The sources are Wang et al. 2024 (arXiv:2406.08673), Ethayarajh et al. 2022 (arXiv:2110.08420), Köpf et al. 2023
(arXiv:2304.07327) and Cui et al. 2023 (arXiv:2310.01377). Rows of one prompt, and messages of one tree, may be anywhere
in the file, so that HelpSteer's and OASST's are held in memory.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from rlhf.data.annotations import Record, is_number, tied
from rlhf.data.forms import FormReader
from rlhf.data.records import ComparisonSet, MalformedError


class RecordPlace(NamedTuple):
    """The place of a record in its source."""

    record: int
    """Its number among all records of the source, from 1."""
    shown: str
    """File, line and number, for messages."""


Placed = tuple[RecordPlace, Record]
Made = tuple[RecordPlace, dict[str, Any] | MalformedError]
"""The place of a record, and the row of comparisons made of it, or why there is none."""

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("overall_score", "fine-grained_score")

_ROLES = {"prompter": "user", "assistant": "assistant"}


class PublicSet(NamedTuple):
    """How the records of one data set are read."""

    title: str
    recognises: Callable[[Record], bool]
    questions: tuple[str, ...]
    """The fields of ratings; the first is taken unless another is asked for."""
    sets: Callable[[Iterable[Placed], str, Counter[str]], Iterator[Made]]
    """Takes the records, the question, and a count of the records left out, which it adds to."""


def _helpsteer(records: Iterable[Placed], attribute: str, left_out: Counter[str]) -> Iterator[Made]:
    groups: defaultdict[str, list[Placed]] = defaultdict(list)
    for place, record in records:
        groups[json.dumps(record["prompt"])].append((place, record))
    for group in groups.values():
        if len(group) < 2:
            left_out["prompts with one response"] += 1
            continue
        place, first = group[0]
        prompt = first["prompt"]
        if isinstance(prompt, str) and "<extra_id_1>" in prompt:
            # HelpSteer2 joins the turns of a prompt by ``<extra_id_1>Assistant`` and ``<extra_id_1>User``.
            text, *parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
            turns = [("User", text), *zip(parts[::2], parts[1::2], strict=True)]
            # A prompt ends where the assistant's turn begins.
            turns = turns[:-1] if turns[-1] == ("Assistant", "") else turns
            prompt = [{"role": role.casefold(), "content": content} for role, content in turns]
        ratings = [[record.get(attribute)] for _, record in group]
        yield place, {"prompt": prompt, "responses": [record["response"] for _, record in group], "ratings": ratings}


def _shp(records: Iterable[Placed], _: str, _left_out: Counter[str]) -> Iterator[Made]:
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
    known = {str(message.get("message_id")) for message in (*(root for _, root in roots), *chain(*replies.values()))}
    if lost := sum(len(messages) for parent, messages in replies.items() if parent not in known):
        left_out["messages whose parent is not in the file"] = lost

    def walk(place: RecordPlace, message: Record, before: list[dict[str, Any]]) -> Iterator[Made]:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            yield place, MalformedError("role", f"is {role!r}; known: {', '.join(_ROLES)}")
            return
        so_far = [*before, {"role": _ROLES[role], "content": message.get("text")}]
        children = [*(message.get("replies") or []), *replies.get(str(message.get("message_id")), [])]
        children = [child for child in children if not child.get("deleted")]
        ranked = [child for child in children if child.get("role") == "assistant" and is_number(child.get("rank"))]
        if len(ranked) > 1:
            ranks = sorted({child["rank"] for child in ranked})
            places = [[number for number, child in enumerate(ranked) if child["rank"] == rank] for rank in ranks]
            responses = [child.get("text") for child in ranked]
            yield place, {"prompt": so_far, "responses": responses, "rankings": [[tied(numbers) for numbers in places]]}
        elif _ROLES[role] == "user":
            left_out["messages with fewer than two ranked answers"] += 1
        for child in children:
            yield from walk(place, child, so_far)

    for place, root in roots:
        yield from walk(place, root, [])


def _ultrafeedback(records: Iterable[Placed], score: str, _left_out: Counter[str]) -> Iterator[Made]:
    for place, record in records:
        completions: list[Record] = record["completions"]
        row = {
            "prompt": record["instruction"],
            "responses": [completion.get("response") for completion in completions],
            "ratings": [[completion.get(score)] for completion in completions],
        }
        models = [completion.get("model") for completion in completions]
        yield place, row | ({"models": models} if all(isinstance(model, str) for model in models) else {})


def _scored_pairs(records: Iterable[Placed], _: str, _left_out: Counter[str]) -> Iterator[Made]:
    for place, record in records:
        fields = {name: record[name] for name in ("prompt", "chosen", "rejected") if name in record}
        pair = FormReader().parse(fields, ComparisonSet)
        if isinstance(pair, list):
            yield place, MalformedError(*pair[0])
            continue
        ratings = [[record["score_chosen"]], [record["score_rejected"]]]
        yield place, pair.model_dump(include={"prompt", "responses"}) | {"ratings": ratings}


def _is_oasst(record: Record) -> bool:
    return "message_tree_id" in record and (
        isinstance(record.get("prompt"), Mapping) or {"message_id", "text", "role"} <= record.keys()
    )


def _is_ultrafeedback(record: Record) -> bool:
    completions = record.get("completions")
    rated = isinstance(completions, list) and all(isinstance(completion, Mapping) for completion in completions)
    return "instruction" in record and rated


def _has(*fields: str) -> Callable[[Record], bool]:
    return lambda record: record.keys() >= {*fields}


PUBLIC_SETS = {
    "helpsteer": PublicSet("HelpSteer", _has("prompt", "response", "helpfulness"), HELPSTEER, _helpsteer),
    "shp": PublicSet("SHP", _has("history", "human_ref_A", "human_ref_B", "labels"), (), _shp),
    "oasst": PublicSet("OASST", _is_oasst, (), _oasst),
    "ultrafeedback": PublicSet("UltraFeedback", _is_ultrafeedback, ULTRAFEEDBACK, _ultrafeedback),
    "ultrafeedback-binarized": PublicSet(
        "UltraFeedback binarized", _has("chosen", "rejected", "score_chosen", "score_rejected"), (), _scored_pairs
    ),
}
