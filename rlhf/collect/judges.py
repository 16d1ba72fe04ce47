"""Who compares collected responses: people's answers in a file, a Python function, or a language model."""

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
    """Who says which responses are better."""

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """The sets with what the judge says of them; those it says nothing of are left out.

        context  the stage's: earlier attempts at its key know what was said before and need not be asked again
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What the stage reports of the judge, once it has compared everything."""
        ...


def judge_of(settings: CompareSettings) -> Judge:
    """The judge that the settings name.

    Raises:
        PreflightError: the function cannot be loaded, or the token of the language model's service is not there.
    """
    if settings.function is not None:
        return FunctionJudge(settings.function)
    if settings.chat is not None:
        return ChatJudge(settings.chat)
    assert settings.file is not None, "the settings name one of the three"
    return People(settings.file)


class FunctionJudge:
    """The function ``name`` of a Python file, ``file.py:name``: one number a response, all of a prompt at once."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._function = load_function(named, "judge", "prompt, responses")

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Ratings by one annotator, called as the function is.

        Raises:
            RewardError: the function raised, or did not answer one finite number a response.
        """
        name = self._named.rpartition(":")[2]
        for number, one in enumerate(sets, start=1):
            responses = list(one.responses)
            prompt = one.model_dump()["prompt"]
            ratings = checked_scores(
                lambda prompt=prompt, responses=responses: self._function(prompt, responses),
                f"{self._named}, set {number}",
                len(responses),
                name="the judge",
            )
            context.progress(f"set {number} of {len(sets)}", number, len(sets))
            yield ComparisonSet(**dict(one), ratings=[[rating] for rating in ratings], annotators=[name])

    def metrics(self) -> dict[str, float]:
        """Nothing: the function is the user's own."""
        return {}


class People:
    """What people said, in a file of comparison sets with the collected prompts and responses."""

    def __init__(self, source: str) -> None:
        self._source = source

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Every row of the file that is about one of the sets; who wrote the responses is taken from the sets.

        Raises:
            RecordError: a row is malformed.
        """
        models = {name_of(one): one.models for one in sets}
        for said in RecordReader(self._source, ComparisonSet, context.folder.quarantine("compare")):
            name = name_of(said)
            if name in models:
                yield said.model_copy(update={"models": models[name]})

    def metrics(self) -> dict[str, float]:
        """Nothing: rank reports on what people said."""
        return {}
