"""Settings of the stages collect, compare and select: responses of several models, and what judges or picks them."""

from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from rlhf.config.base import Seed, Settings, is_local, runtime, semantic, source
from rlhf.config.rewards import RewardSettings, ServiceSettings, names_a_function, rewards_are_sound
from rlhf.config.stages import Precision, ShardedSettings


class WriterSettings(Settings):
    """A model that writes responses."""

    model: str = semantic(min_length=1)
    """Stage whose model writes: sft, ppo, or an instance of ``model`` for one from a folder or a hub."""
    temperature: float | None = semantic(None, gt=0)
    """Divides its logits; null takes the stage's."""
    responses: int = semantic(1, ge=1)
    """Responses to each prompt."""
    name: str | None = semantic(None, min_length=1)
    """Its name on the leaderboard; null is the stage's name, with the temperature where that is set."""

    @property
    def shown(self) -> str:
        """Its name on the leaderboard."""
        return self.name or (self.model if self.temperature is None else f"{self.model} at {self.temperature:g}")


class CollectSettings(ShardedSettings):
    """Responses to the same prompts by one model or several."""

    seed: Seed = semantic(0)
    """Seeds the choice of prompts and the sampling: give each round of a flywheel its own."""
    models: list[WriterSettings] = semantic([WriterSettings(model="sft", responses=4)], min_length=1)
    """The models that write."""
    prompts: int = semantic(256, ge=1)
    """Training prompts, drawn by the seed; all where there are fewer."""
    prompts_heldout: int = semantic(64, ge=0)
    """Held-out prompts, the first ones, behind the reward model's ``eval/accuracy``."""
    temperature: float = semantic(1.0, gt=0)
    """Divides the logits of models that set none of their own."""
    max_new_tokens: int = semantic(64, ge=1)
    """Longest response, in tokens."""
    max_prompt_length: int = semantic(256, ge=1)
    """Longest prompt in tokens; one longer stops the run."""
    precision: Precision = semantic("fp32")
    """Precision of the models while they generate; a CPU without instructions for bf16 takes fp32."""
    micro_batch_size: int = runtime(64, ge=1)
    """Responses that one rank writes at a time."""

    @model_validator(mode="after")
    def _sets_can_be_compared(self) -> "CollectSettings":
        names = [writer.shown for writer in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}; give each a name of its own")
        if sum(writer.responses for writer in self.models) < 2:
            raise ValueError("there is one response to a prompt, and nothing to compare it with; raise responses")
        return self


def writer_inputs(settings: CollectSettings) -> dict[str, str]:
    """Return the models of a stage that writes, role to instance. A model that writes twice is one input."""
    names = dict.fromkeys(writer.model for writer in settings.models)
    return {"model" if number == 1 else f"model_{number}": name for number, name in enumerate(names, start=1)}


class SelectSettings(ShardedSettings):
    """The best of the collected responses to each prompt, as demonstrations."""

    rewards: list[RewardSettings] = semantic([RewardSettings()], min_length=1)
    """What scores responses."""
    micro_batch_size: int = runtime(32, ge=1)
    """Responses of one forward pass of one rank."""

    @model_validator(mode="after")
    def _rewards_are_sound(self) -> "SelectSettings":
        rewards_are_sound(self.rewards)
        return self


INSTRUCTIONS = """\
You compare two answers to one request. Judge how well each does what was asked: correctness, helpfulness, clarity. \
Neither the order in which they stand nor their length counts.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Think briefly. Then end with your verdict in double brackets: [[A]] if A is better, [[B]] if B is better, [[C]] if \
they are equally good."""


class ChatSettings(ServiceSettings):
    """A language model as the judge, behind an endpoint of OpenAI's chat completions (``…/v1/chat/completions``)."""

    model: str = semantic(min_length=1)
    """The judge's name at the service."""
    instructions: str = semantic(INSTRUCTIONS)
    """The question about two responses: a text with ``{prompt}``, ``{first}`` and ``{second}``, whose answer ends in
    [[A]], [[B]] or [[C]] for a tie."""
    temperature: float = semantic(0.0, ge=0)
    """Temperature of the judge's own sampling."""
    max_tokens: int = semantic(512, ge=1)
    """Longest verdict, reasoning included."""
    max_bad_fraction: float = semantic(0.02, ge=0, lt=1)
    """Share of questions, two for each pair, that may go without a verdict; above it the stage stops. Such pairs are
    left out."""
    at_once: int = runtime(8, ge=1)
    """Concurrent requests."""

    @field_validator("instructions")
    @classmethod
    def _names_what_is_compared(cls, text: str) -> str:
        for name in ("{prompt}", "{first}", "{second}"):
            if name not in text:
                raise ValueError(f"must hold {name}")
        return text


class CompareSettings(Settings):
    """The judge of the collected responses: one of ``file``, ``function`` and ``chat``."""

    file: str | None = source(None)
    """People's judgements: comparison sets of the collected prompts and responses, as ``rlhf annotate`` writes them."""
    function: str | None = source(None)
    """``file.py:name`` of a Python function ``judge(prompt, responses) -> list[float]``; the higher number wins. Its
    file's content is part of the key."""
    chat: ChatSettings | None = semantic(None)
    """A language model, which is shown each pair in both orders."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> "CompareSettings":
        given = [name for name in ("file", "function", "chat") if getattr(self, name) is not None]
        if len(given) != 1:
            names = " and ".join(given) or "none of them"
            raise ValueError(f"responses are compared by one of file, function and chat, and there is {names}")
        if self.function is not None and not names_a_function(self.function):
            raise ValueError(f"function {self.function!r} is not of the form file.py:name")
        if self.file is not None and not is_local(self.file):
            raise ValueError(f"file {self.file!r} is no JSONL, JSON or Parquet file")
        return self


def compare_sources(settings: CompareSettings) -> dict[str, Any]:
    """Return the local files whose content is part of the key."""
    if settings.function is not None:
        return {"function": Path(settings.function.rpartition(":")[0])}
    return {"file": Path(settings.file)} if settings.file is not None else {}


def awaited(settings: CompareSettings) -> Path | None:
    """Return the path of people's answers while there is no such file; else None."""
    path = None if settings.file is None else Path(settings.file).expanduser()
    return None if path is None or path.exists() else path
