"""The records that stages exchange, and the JSONL files that hold them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlhf.config.base import suggestion


class _Record(BaseModel):
    # Strict: a number written as text, or true for 1, is a mistake in the file.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds bytes that are not UTF-8, or half a surrogate pair") from None
    return text


String = Annotated[str, AfterValidator(_encodable)]
"""A text that can be written as UTF-8, which JSON's escapes do not promise."""


class Message(_Record):
    """One message of a conversation."""

    role: Annotated[String, Field(min_length=1)]
    content: String


T = TypeVar("T", bound=str | list[Message])


def _not_blank(text: T) -> T:
    last = text if isinstance(text, str) else text[-1].content if text else ""
    if not last.strip():
        raise ValueError("is empty")
    return text


def _reply_text(value: Any) -> Any:
    # A reply written as a conversation of one assistant's message is its content; other values are left to be refused.
    match value:
        case [{"role": "assistant", "content": str() as content, **rest}] if not rest:
            return content
        case _:
            return value


Text = Annotated[
    Annotated[String, Tag("text")] | Annotated[list[Message], Tag("messages")],
    Discriminator(
        lambda value: "text" if isinstance(value, str) else "messages" if isinstance(value, list) else None,
        custom_error_type="text_or_messages",
        custom_error_message="must be a text or a list of messages",
    ),
    AfterValidator(_not_blank),
]
"""A text, or a conversation as messages; never blank."""

Response = Annotated[String, BeforeValidator(_reply_text)]
"""A response's text; a list of one assistant's message is read as its content. It may be empty, as a policy's may."""

Group = Annotated[String, Field(min_length=1)]
"""A name shared by rows that must stay together: either all of them are trained on, or none."""

Ratings = list[list[float | None]]
Rankings = list[list[int | list[int]]]
Winners = list[list[float]]


class Demonstration(_Record):
    """A prompt and the completion to be imitated: a text, or one message of the assistant's."""

    prompt: Text
    completion: Text
    group: Group | None = None

    @field_validator("completion")
    @classmethod
    def _completion_is_an_assistants(cls, completion: str | list[Message]) -> str | list[Message]:
        if isinstance(completion, str):
            return completion
        if completion[-1].role != "assistant":
            raise ValueError(f"ends with a message of the role {completion[-1].role!r}, and must end with 'assistant'")
        if len(completion) > 1:
            raise ValueError(
                f"has {len(completion)} messages, and must be one message of the assistant: put those before it "
                "into the prompt"
            )
        return completion


class Prompt(_Record):
    """A prompt alone."""

    prompt: Text
    group: Group | None = None


class JudgeRating(_Record):
    """A text and the rating people gave it."""

    text: Annotated[String, AfterValidator(_not_blank)]
    rating: float


def _number_of_responses(info: ValidationInfo) -> int | None:
    """Count the responses of the set; None where they are themselves malformed."""
    responses = info.data.get("responses")
    return None if responses is None else len(responses)


def _one_model_each(models: list[str] | None, info: ValidationInfo) -> list[str] | None:
    count = _number_of_responses(info)
    if models is not None and count is not None and len(models) != count:
        raise ValueError(f"has {len(models)} names for {count} responses")
    return models


class ResponseSet(_Record):
    """One prompt and its responses, before annotators compare them."""

    prompt: Text
    responses: list[Response] = Field(min_length=2)
    models: list[String] | None = None
    """The model that wrote each response."""

    _models_match_responses = field_validator("models")(_one_model_each)


class ComparisonSet(_Record):
    """One prompt, its responses, and annotators' ratings, rankings, winners, or several of these."""

    prompt: Text
    responses: list[Response] = Field(min_length=2)
    ratings: Ratings | None = None
    """``[responses, annotators]``: the rating of each response by each annotator; null where there is none."""
    rankings: Rankings | None = None
    """Per annotator, indices of responses from best to worst; a list of indices is a tie. Responses may be left out."""
    winners: Winners | None = None
    """Entries ``[i, j, outcome]``: 1 where response i beat j, 0 where it lost, 0.5 for a tie."""
    annotators: list[Annotated[String, Field(min_length=1)]] | None = None
    """A name for each column of the ratings and for each entry of the rankings, the same in every set."""
    models: list[String] | None = None
    """The model that wrote each response."""
    margin: float | None = None
    """By how much the first of two responses is better, where the data has it; in the data's own units."""
    group: Group | None = None

    @field_validator("ratings")
    @classmethod
    def _ratings_match_responses(cls, ratings: Ratings | None, info: ValidationInfo) -> Ratings | None:
        count = _number_of_responses(info)
        if ratings is None or count is None:
            return ratings
        if len(ratings) != count:
            raise ValueError(f"has {len(ratings)} rows for {count} responses")
        widths = [len(row) for row in ratings]
        if len(set(widths)) > 1:
            raise ValueError(
                f"has rows of different lengths, {widths}: write null where an annotator gave a response no rating"
            )
        return ratings

    @field_validator("rankings")
    @classmethod
    def _rankings_name_responses(cls, rankings: Rankings | None, info: ValidationInfo) -> Rankings | None:
        count = _number_of_responses(info)
        for annotator, ranking in enumerate(rankings or []):
            seen: set[int] = set()
            for place in ranking:
                for index in place if isinstance(place, list) else [place]:
                    if count is not None and not 0 <= index < count:
                        raise ValueError(f"ranking {annotator} names response {index}, and there are 0 to {count - 1}")
                    if index in seen:
                        raise ValueError(f"ranking {annotator} names response {index} twice")
                    seen.add(index)
        return rankings

    @field_validator("winners")
    @classmethod
    def _winners_name_responses(cls, winners: Winners | None, info: ValidationInfo) -> Winners | None:
        count = _number_of_responses(info)
        for number, entry in enumerate(winners or []):
            if len(entry) != 3 or entry[2] not in (0, 0.5, 1):
                shown = ", ".join(f"{part:g}" for part in entry)
                raise ValueError(f"entry {number} is [{shown}]; it must be [i, j, 1, 0 or 0.5]")
            for index in entry[:2]:
                if index != int(index) or (count is not None and not 0 <= index < count):
                    known = "" if count is None else f", and there are 0 to {count - 1}"
                    raise ValueError(f"entry {number} names response {index:g}{known}")
            if entry[0] == entry[1]:
                raise ValueError(f"entry {number} compares response {entry[0]:g} with itself")
        return winners

    @field_validator("annotators")
    @classmethod
    def _annotators_match_columns(cls, annotators: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if annotators is None:
            return None
        if repeated := sorted({name for name in annotators if annotators.count(name) > 1}):
            raise ValueError(f"names {repeated[0]!r} twice")
        ratings, rankings = info.data.get("ratings"), info.data.get("rankings")
        for kind, count in (
            ("columns of ratings", len(ratings[0]) if ratings else None),
            ("rankings", None if rankings is None else len(rankings)),
        ):
            if count is not None and count != len(annotators):
                raise ValueError(
                    f"has {len(annotators)} names for {count} {kind}: one list serves ratings and rankings"
                )
        return annotators

    _models_match_responses = field_validator("models")(_one_model_each)

    @field_validator("margin")
    @classmethod
    def _margin_is_of_a_pair(cls, margin: float | None, info: ValidationInfo) -> float | None:
        count = _number_of_responses(info)
        if margin is not None and count is not None and count != 2:
            raise ValueError(f"is for two responses, and there are {count}")
        return margin

    @model_validator(mode="after")
    def _something_is_compared(self) -> "ComparisonSet":
        if self.ratings is self.rankings is self.winners is None:
            raise ValueError("has none of ratings, rankings and winners")
        if self.annotators is not None and self.ratings is self.rankings is None:
            raise ValueError("has annotators but neither ratings nor rankings: winners have no annotators")
        columns = zip(*(self.ratings or []), strict=True)
        rated = any(sum(rating is not None for rating in column) > 1 for column in columns)
        ranked = any(
            sum(len(place) if isinstance(place, list) else 1 for place in ranking) > 1
            for ranking in self.rankings or []
        )
        if not (rated or ranked or self.winners):
            raise ValueError("compares nothing: no annotator rated or ranked two of the responses")
        return self


class ComparisonRow(ComparisonSet):
    """A comparison set as the data stage writes it."""

    task: str | None = None
    weight: float | None = None


class PreferencePair(_Record):
    """TRL's form of a comparison: the better and the worse of two responses, and perhaps by how much."""

    prompt: Text
    chosen: Response
    rejected: Response
    margin: float | None = None
    group: Group | None = None


class Reason(NamedTuple):
    """Why a row is refused: the field, empty where the row as a whole is meant, and the problem."""

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


class MalformedError(Exception):
    """A row, or a record of an export, is refused for one reason."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.reason = Reason(field, problem)


R = TypeVar("R", bound=Demonstration | ComparisonSet | ResponseSet | Prompt | JudgeRating)


def without_nulls(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """Return a row without its null fields, those of its messages included: Parquet writes every absent field as null.

    A message keeps a null ``content`` (``value`` in ShareGPT's form), so that it is refused by name.
    """
    inside = ("content", "value")
    if isinstance(value, Mapping):
        fields = ((str(name), content) for name, content in value.items() if content is not None or name in kept)
        return {name: without_nulls(content, inside) for name, content in fields}
    return [without_nulls(item, inside) for item in value] if isinstance(value, list) else value


def record_type(row: Mapping[str, Any], model: type[BaseModel]) -> type[BaseModel]:
    """Return the type whose fields a row has: ``model``, or a pair where the row of a comparison is one."""
    is_pair = issubclass(model, ComparisonSet) and not row.keys().isdisjoint({"chosen", "rejected"})
    return PreferencePair if is_pair else model


def parse_record(value: Any, model: type[R]) -> R | list[Reason]:
    """Return a row's value as a record, or the reasons why it is none. A null field is an absent one.

    A pair becomes a set of two responses with one winner.
    """
    if not isinstance(value, Mapping):
        return [Reason("", f"a row must be an object with fields, not {type(value).__name__}")]
    row = without_nulls(value)
    form = record_type(row, model)
    try:
        record = form.model_validate(row)
    except ValidationError as error:
        return _reasons(error, form)
    if isinstance(record, PreferencePair):
        record = ComparisonSet(
            prompt=record.prompt,
            responses=[record.chosen, record.rejected],
            winners=[[0, 1, 1]],
            margin=record.margin,
            group=record.group,
        )
    return record  # type: ignore[return-value]


def _reasons(error: ValidationError, form: type[BaseModel]) -> list[Reason]:
    """Return one reason for each field, its path written as in ``prompt[0].content``."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        path, unknown = list(detail["loc"]), detail["type"] == "extra_forbidden"
        match detail["type"]:
            case "missing":
                problem = "is missing"
            case "extra_forbidden":
                known = (Message if len(path) > 1 else form).model_fields
                problem = f"is unknown; {suggestion(str(path[-1]), known)}"
            case "value_error":
                problem = str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
            case _:
                problem = detail["msg"][0].lower() + detail["msg"][1:]
        field = ""
        for depth, part in enumerate(path):
            if isinstance(part, int):
                field += f"[{part}]"
            elif depth == 0:
                field = part
            # pydantic's path also names the members of unions, which are left out.
            elif part in Message.model_fields or (unknown and depth == len(path) - 1):
                field += f".{part}"
        # pydantic reports a union once for each member: keep the first reason of a field.
        problems.setdefault(field, problem)
    return [Reason(field, problem) for field, problem in problems.items()]


def to_line(record: BaseModel, **more: Any) -> str:
    """Return a record, and further fields, as one line with its end."""
    return json.dumps(record.model_dump(exclude_none=True) | more, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, records: Iterable[BaseModel]) -> int:
    """Write one record a line, in a folder that is made when missing, and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(to_line(record))
            count += 1
    return count


M = TypeVar("M", bound=BaseModel)


def read_jsonl(path: Path, model: type[M]) -> Iterator[M]:
    """Yield the records of a file that the data stage wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield model.model_validate_json(line)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file that a stage wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
