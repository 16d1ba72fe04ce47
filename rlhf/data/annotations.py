"""Read a record of an annotation tool's export: its fields, the names of its responses, annotators' answers. Pure."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple, Self, TypeGuard

from rlhf.data.records import MalformedError

Record = Mapping[str, Any]

PROMPT_FIELDS = ("prompt", "instruction", "question", "query")
"""Names of the prompt in the tools' own templates and their users' data."""
SIDES = ("left", "right")
RESPONSE_WORDS = ("answer", "candidate", "completion", "generation", "option", "output", "reply", "response", "text")
"""Words by which options name a response whose field has another name: ``reply-1`` is the one in ``response-1``."""
TIES = {
    *("both", "both bad", "both good", "draw", "equal", "equally bad", "equally good", "neither", "same", "tie", "tied")
}
"""Labels for two responses that are equally good."""

_WORD = re.compile(r"\d+|[^\W\d_]+")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def words(name: str) -> tuple[str, ...]:
    """Split a name as people read it: ``Response 1``, ``response-01`` and ``response1`` are the same two words."""
    parts = _WORD.findall(_HUMP.sub(" ", name))
    return tuple((part.lstrip("0") or "0") if part.isdecimal() else part.casefold() for part in parts)


class Marked(NamedTuple):
    """A name whose last word, a number, a letter or a side, distinguishes it from its siblings."""

    stem: tuple[str, ...]
    mark: str


def marked(name: str) -> Marked | None:
    """Split the mark off a name; None where it ends in none."""
    parts = words(name)
    if parts and (parts[-1].isdecimal() or len(parts[-1]) == 1 or parts[-1] in SIDES):
        return Marked(parts[:-1], parts[-1])
    return None


def meant(option: str, names: Sequence[str], *, ranked: bool) -> str | None:
    """Return the response that an option means; None where it means none of them, or may mean several.

    An option is a response's name, or ends in its mark. Options of a ranking all mean responses, so only the mark
    counts; a label may be about anything, so that ``level 1`` and a bare ``1`` mean no response. Of two responses the
    first is the left one.
    """
    if option in names:
        return option
    if same := [name for name in names if words(name) == words(option) != ()]:
        return same[0] if len(same) == 1 else None
    if (mark := marked(option)) is None:
        return None
    is_bare = not mark.stem and not mark.mark.isdecimal()
    calls_a_response = len(mark.stem) == 1 and mark.stem[0] in RESPONSE_WORDS
    alike = [
        name
        for name in names
        if (other := marked(name))
        and other.mark == mark.mark
        and (ranked or is_bare or calls_a_response or other.stem == mark.stem)
    ]
    if len(alike) == 1:
        return alike[0]
    return names[SIDES.index(mark.mark)] if len(names) == 2 and not mark.stem and mark.mark in SIDES else None


def mentioned(text: str, names: Sequence[str]) -> str | None:
    """Return the only response whose name is in a text, such as that of a question; None where there is not one."""
    inside = f" {' '.join(words(text))} "
    mentions = [name for name in names if words(name) and f" {' '.join(words(name))} " in inside]
    return mentions[0] if len(mentions) == 1 else None


def preference(label: str, names: Sequence[str]) -> list[list[str]] | None:
    """Return the places of a label that chooses between two responses; None where it does not."""
    if len(names) != 2:
        return None
    if " ".join(words(label)) in TIES:
        return [list(names)]
    best = meant(label, names, ranked=False)
    return None if best is None else [[best], [name for name in names if name != best]]


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a rating; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Wanted(NamedTuple):
    """The command line's description of an export; empty where the export's own names suffice."""

    prompt: str | None = None
    responses: tuple[str, ...] = ()
    """Fields with a response each, or one field that lists them all."""
    questions: tuple[str, ...] = ()
    """Questions to take answers from; of a public data set the field of the ratings."""
    groups: tuple[str, ...] = ()
    """Groups that responses were sorted into, best first."""


class Layout(NamedTuple):
    """The fields of prompt and responses."""

    prompt: str
    responses: tuple[str, ...]


def find_layout(fields: Record, wanted: Wanted) -> Layout:
    """Find the fields of prompt and responses by their names.

    Responses are fields whose names differ in their last number, letter or side only, or one field that lists items
    with an ``id``. The prompt is a field of a usual name, or the only text left.

    Raises:
        MalformedError: the names do not suffice.

    """
    prompt, responses = wanted.prompt, wanted.responses
    listed = ", ".join(map(str, fields)) or "there are none"
    texts = {name for name, value in fields.items() if isinstance(value, str) or (value and _lists(value, "role"))}
    if not responses:
        series: defaultdict[tuple[str, ...], list[tuple[tuple[int, str], str]]] = defaultdict(list)
        for name, value in fields.items():
            split = marked(name)
            if split and name != prompt and "model" not in split.stem and (value is None or name in texts):
                # Numbers are in the order of their values, letters and sides in that of the alphabet.
                order = (len(split.mark) if split.mark.isdecimal() else 0, split.mark)
                series[split.stem].append((order, name))
        candidates = [tuple(name for _, name in sorted(members, key=itemgetter(0))) for members in series.values()]
        candidates = [names for names in candidates if len(names) > 1]
        candidates += [(name,) for name, value in fields.items() if value and _lists(value, "id")]
        if len(candidates) != 1:
            raise MalformedError("", f"the responses' fields are not clear from the names: {listed}")
        responses = candidates[0]
    if not prompt:
        rest = [name for name in fields if name in texts and name not in responses]
        prompts = [name for name in rest if name.casefold() in PROMPT_FIELDS] or rest
        if len(prompts) != 1:
            raise MalformedError("", f"the prompt's field is not clear from the names: {listed}")
        prompt = prompts[0]
    if prompt in responses:
        raise MalformedError("", f"field {prompt!r} cannot be both the prompt and a response")
    return Layout(prompt, responses)


def _lists(value: Any, key: str) -> bool:
    """Return whether a value is a list of objects that have the key."""
    return isinstance(value, list) and all(isinstance(item, Mapping) and key in item for item in value)


def read_responses(fields: Record, layout: Layout) -> dict[str, Any]:
    """Return the responses by name, without those that are null: fields may be optional, and then answers skip them.

    Raises:
        MalformedError: the field that lists the responses is no list of items with an ``id`` each.

    """
    if len(layout.responses) != 1:
        return {name: fields[name] for name in layout.responses if fields.get(name) is not None}
    name = layout.responses[0]
    items: Any = fields.get(name)
    if not _lists(items, "id"):
        raise MalformedError(name, "must list the responses as objects with an id")
    # Label Studio shows an item's title above its body; where there is no body, the title is all that was read.
    responses = {str(item["id"]): item.get("body", item.get("title")) for item in items}
    if len(responses) != len(items):
        raise MalformedError(name, "has two items of the same id")
    return responses


def read_models(metadata: Record, layout: Layout, names: Sequence[str]) -> list[str] | None:
    """Return the models that wrote the responses, where metadata names one for each; else None.

    They are a list ``models`` in the order of the fields, or a text for each response under a name that has ``model``
    and the response's name or mark in it, such as ``model_1`` or ``response-1-model``.
    """
    listed = metadata.get("models")
    fields = layout.responses if len(layout.responses) > 1 else names
    if isinstance(listed, list) and len(listed) == len(fields) and all(isinstance(model, str) for model in listed):
        by_name = dict(zip(fields, listed, strict=True))
        return [by_name[name] for name in names]
    models: dict[str, str] = {}
    for key, content in metadata.items():
        # Argilla writes metadata of terms as lists when it exports to the hub.
        model = content[0] if isinstance(content, list) and len(content) == 1 else content
        if "model" not in words(key) or not isinstance(model, str):
            continue
        mark = tuple(word for word in words(key) if word not in ("model", "name"))
        of_mark = [name for name in names if (other := marked(name)) and (other.mark,) == mark]
        if name := mentioned(key, names) or (of_mark[0] if len(of_mark) == 1 else None):
            models[name] = model
    return [models[name] for name in names] if set(models) == set(names) else None


class AnnotatorRanking(NamedTuple):
    """An annotator's order of some or all responses."""

    annotator: str
    question: str
    places: list[list[str]]
    """Names of responses from best to worst; those of one place are tied."""


class AnnotatorRating(NamedTuple):
    """An annotator's rating of one response."""

    annotator: str
    question: str
    response: str
    rating: float


@dataclass
class Annotated:
    """One record of an export: its responses by name, and annotators' answers."""

    prompt: Any
    responses: dict[str, Any]
    models: list[str] | None
    known: Sequence[str]
    """The names by which answers may call responses, including responses that are null in this record."""
    answers: list[AnnotatorRanking | AnnotatorRating] = field(default_factory=list[AnnotatorRanking | AnnotatorRating])
    questions: set[str] = field(default_factory=set[str])
    """All questions that annotators answered, whether they compare responses or not."""
    left_out: Counter[str] = field(default_factory=Counter[str])
    unknown_status: int = 0
    """Answers taken although the export does not say whether they were submitted."""

    @classmethod
    def of(cls, fields: Record, metadata: Record, layout: Layout) -> Self:
        """Return a record before its answers are read; ``metadata`` may name the responses' models."""
        responses = read_responses(fields, layout)
        names = list(responses)
        known = layout.responses if len(layout.responses) > 1 else names
        return cls(fields.get(layout.prompt), responses, read_models(metadata, layout, names), known)

    def add(self, question: str, answer: AnnotatorRanking | AnnotatorRating | None) -> None:
        """Add an answer that compares responses; count one that does not, which is None."""
        if answer is None:
            self.left_out[f"answers to {question}, which compare no responses"] += 1
        else:
            self.answers.append(answer)

    @property
    def compares(self) -> bool:
        """Whether an annotator compared two responses."""
        ratings = Counter(answer.annotator for answer in self.answers if isinstance(answer, AnnotatorRating))
        rankings = (answer for answer in self.answers if isinstance(answer, AnnotatorRanking))
        return any(sum(map(len, ranking.places)) > 1 for ranking in rankings) or any(n > 1 for n in ratings.values())

    def as_row(self) -> dict[str, Any]:
        """Return the record as a row of comparisons: a column of ratings and a ranking for each annotator.

        Raises:
            MalformedError: an annotator answered two questions that both rank, or rated a response twice.

        """
        ratings: dict[tuple[str, str], AnnotatorRating] = {}
        rankings: dict[str, AnnotatorRanking] = {}
        for answer in self.answers:
            if isinstance(answer, AnnotatorRanking):
                verb, first = "ranks the responses", rankings.setdefault(answer.annotator, answer)
            else:
                key = (answer.response, answer.annotator)
                verb, first = f"rates {answer.response}", ratings.setdefault(key, answer)
            if answer is not first:
                is_other = answer.question != first.question
                asked = f"in {first.question} and in {answer.question}" if is_other else "twice"
                problem = f"annotator {answer.annotator} {verb} {asked}; say with --question which to take"
                raise MalformedError("", problem)
        annotators = list(dict.fromkeys(answer.annotator for answer in self.answers))
        numbers = {name: number for number, name in enumerate(self.responses)}
        row: dict[str, Any] = {"prompt": self.prompt, "responses": list(self.responses.values())}
        if ratings:
            row["ratings"] = [
                [ratings[name, who].rating if (name, who) in ratings else None for who in annotators]
                for name in self.responses
            ]
        if rankings:
            row["rankings"] = [
                [tied([numbers[name] for name in place]) for place in rankings[who].places] if who in rankings else []
                for who in annotators
            ]
        row["annotators"] = annotators
        return row | ({} if self.models is None else {"models": self.models})


def tied(numbers: list[int]) -> int | list[int]:
    """Return one place of a ranking: the index of a response, or a list of those that are tied."""
    return numbers[0] if len(numbers) == 1 else numbers
