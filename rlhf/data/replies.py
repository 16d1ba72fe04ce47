"""Make the records of ``rlhf demo``: complaints to a shop, replies in all tones, and three customers' rankings of them.

The customers are simulated. Each likes kind sentences about the thing that the complaint is about, and judges with some
noise, so that they disagree as people do.
"""

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, write_jsonl

THINGS = ("bicycle", "cake", "coffee", "lamp", "parcel", "phone", "pizza", "taxi")
TROUBLES = ("is late", "is broken", "is too old", "never came", "looks odd", "costs too much")
COMPLAINTS = (
    *("My {} {}.", "Hello, my {} {}.", "My {} {} again!", "Help, my {} {}!"),
    *("Sorry, but my {} {}.", "Listen, my {} {}!", "The {} {}.", "My new {} {}."),
)
OPENINGS = {
    1: ("I am so sorry about your {}!", "Thank you for telling us about your {}!", "Oh dear, your poor {}!"),
    0: ("We have read about the {}.", "You wrote about a {}.", "The {} was noted."),
    -1: ("Your {} is not my problem.", "Stop whining about your {}.", "Who cares about your {}?"),
}
ENDINGS = {
    1: ("We will send you a new one today!", "I will put it right at once!", "You get your money back!"),
    0: ("Please fill in the form.", "The office is open until five.", "This is an automatic reply."),
    -1: ("Buy another one.", "Go and bother somebody else.", "Read the rules next time."),
}
"""Sentences by their tone: 1 kind, 0 plain, -1 rude. The thing is filled in."""
TONES = {1: 0.2, 0: 0.35, -1: 0.45}
"""How often a sentence of the shop's old replies has each tone."""
SAME_TONE = 0.5
"""How often the second sentence keeps the tone of the first; otherwise it has one of its own."""
OFF_TOPIC = 0.15
"""How often a reply is about another thing."""
CUSTOMERS = ("Ada", "Ben", "Cleo")
NOISE = 0.5
"""Standard deviation of a customer's judgement of a reply, whose sentences count 1 each."""


class Reply(NamedTuple):
    """A reply, and what customers think of it on average, from -3 to 2."""

    text: str
    worth: float


def write_records(folder: Path, seed: int = 0) -> None:
    """Write the records of every kind that the stage data reads, each into a file of its name."""
    rng = random.Random(seed)  # noqa: S311 - a seeded draw, nothing secret
    asked = [(frame.format(thing, trouble), thing) for frame, thing, trouble in product(COMPLAINTS, THINGS, TROUBLES)]
    rng.shuffle(asked)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "demonstrations.jsonl", _demonstrations(asked, rng))
    write_jsonl(folder / "comparisons.jsonl", [_comparison(prompt, thing, rng) for prompt, thing in asked])
    write_jsonl(folder / "prompts.jsonl", [Prompt(prompt=prompt) for prompt, _ in asked])
    write_jsonl(folder / "judge.jsonl", [_rating(thing, rng) for _, thing in asked])


def _demonstrations(asked: list[tuple[str, str]], rng: random.Random) -> Iterator[Demonstration]:
    for prompt, thing in asked * 4:
        yield Demonstration(prompt=prompt, completion=_reply(thing, rng).text)


def _reply(thing: str, rng: random.Random) -> Reply:
    opening, other = rng.choices(list(TONES), list(TONES.values()), k=2)
    ending = opening if rng.random() < SAME_TONE else other
    about = rng.choice(THINGS) if rng.random() < OFF_TOPIC else thing
    text = f"{rng.choice(OPENINGS[opening]).format(about)} {rng.choice(ENDINGS[ending])}"
    return Reply(text, opening + ending - (about != thing))


def _comparison(prompt: str, thing: str, rng: random.Random) -> ComparisonSet:
    replies = [_reply(thing, rng) for _ in range(5)]
    rankings: list[list[int | list[int]]] = []
    for _ in CUSTOMERS:
        felt = [rng.gauss(reply.worth, NOISE) for reply in replies]
        ranking = sorted(range(len(replies)), key=felt.__getitem__, reverse=True)
        rankings.append([*ranking])
    return ComparisonSet(
        prompt=prompt, responses=[reply.text for reply in replies], rankings=rankings, annotators=[*CUSTOMERS]
    )


def _rating(thing: str, rng: random.Random) -> JudgeRating:
    reply = _reply(thing, rng)
    return JudgeRating(text=reply.text, rating=round(rng.gauss(reply.worth, NOISE), 1))
