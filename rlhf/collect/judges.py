"""The judges of collected responses: people's answers in a file, a Python function, or a language model."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from rlhf.attempt.context import Context
from rlhf.collect.chat import ChatJudge
from rlhf.collect.collection import name_of
from rlhf.config.collect import CompareSettings
from rlhf.data.records import ComparisonSet, ResponseSet
from rlhf.data.validation import RecordReader
from rlhf.rewards.service import checked_scores
from rlhf.rewards.sources import load_function


class Judge(Protocol):
    """Decides which responses are better."""

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield the sets with the judge's comparisons; sets without any are left out.

        context  the stage's: verdicts of earlier attempts at its key are read from there and not asked for again
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return the stage's metrics of the judge, once it has compared everything; none by default."""
        return {}


def judge_of(settings: CompareSettings) -> Judge:
    """Return the judge that the settings name.

    Raises PreflightError if the function cannot be loaded, or the token of the language model's service is not set.
    """
    if settings.function is not None:
        return FunctionJudge(settings.function)
    if settings.chat is not None:
        return ChatJudge(settings.chat)
    assert settings.file is not None, "the settings name one of the three"
    return People(settings.file)


class FunctionJudge(Judge):
    """The function ``name`` of a Python file, ``file.py:name``: one number a response, all of a prompt at once."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._function = load_function(named, "judge", "prompt, responses")

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield the sets with ratings by one annotator, who has the function's name.

        Raises RewardError if the function raised, or did not answer one finite number a response.
        """
        name = self._named.rpartition(":")[2]
        for number, response_set in enumerate(sets, start=1):
            prompt, responses = response_set.model_dump()["prompt"], list(response_set.responses)
            ratings = checked_scores(
                lambda prompt=prompt, responses=responses: self._function(prompt, responses),
                f"{self._named}, set {number}",
                len(responses),
                name="the judge",
            )
            context.progress(f"set {number} of {len(sets)}", number, len(sets))
            yield ComparisonSet(**dict(response_set), ratings=[[rating] for rating in ratings], annotators=[name])


class People(Judge):
    """People's answers, in a file of comparison sets with the collected prompts and responses."""

    def __init__(self, source: str) -> None:
        self._source = source

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield every row of the file that is about one of the sets, with the models that the set names.

        Raises RecordError if a row is malformed.
        """
        models = {name_of(response_set): response_set.models for response_set in sets}
        for compared in RecordReader(self._source, ComparisonSet, context.attempt / "quarantine-compare.jsonl"):
            name = name_of(compared)
            if name in models:
                yield compared.model_copy(update={"models": models[name]})
