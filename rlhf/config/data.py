"""Settings of the stages without a model: data and rank."""

import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Tag, ValidationInfo, field_validator, model_validator

from rlhf.config.base import (
    KNOWN_WORDS,
    MOVIE_SNIPPETS,
    OTHER_SNIPPETS,
    Seed,
    Settings,
    is_local,
    parse_hub_dataset,
    runtime,
    semantic,
    source,
)
from rlhf.errors import SettingsError

SNIPPET_BLOCKS = 353
"""Blocks of 30 snippets in the movie-snippets data, each rated throughout by the same people."""


class SnippetSettings(Settings):
    """How the movie snippets are split: in whole blocks of 30, so that no rater and no snippet is in two parts."""

    demonstrations: int = semantic(32, ge=1)
    """Blocks whose snippets the SFT model learns to write."""
    demonstrations_heldout: int = semantic(3, ge=1)
    """Blocks behind the SFT model's ``eval/loss``."""
    comparisons: int = semantic(110, ge=1)
    """Blocks whose ratings the reward model learns from."""
    comparisons_heldout: int = semantic(40, ge=1)
    """Blocks behind the reward model's ``eval/accuracy``."""
    prompts: int = semantic(24, ge=1)
    """Blocks whose openings PPO continues."""
    prompts_heldout: int = semantic(8, ge=1)
    """Blocks whose openings the evaluation continues."""
    judge: int = semantic(135, ge=1)
    """Blocks whose mean ratings the judge of the evaluation is fitted on."""
    set_size: int = semantic(5, ge=2, le=30)
    """Snippets in a comparison set; a divisor of 30 leaves no smaller set over."""

    @model_validator(mode="after")
    def _blocks_suffice(self) -> "SnippetSettings":
        total = sum(self.model_dump(exclude={"set_size"}).values())
        if total > SNIPPET_BLOCKS:
            raise ValueError(f"{total} blocks are asked for, and the movie snippets have {SNIPPET_BLOCKS}")
        return self


class TaskSettings(Settings):
    """One of the tasks that ``data`` mixes."""

    source: str = source()
    """Its records: a source as any other."""
    weight: float = semantic(1.0, gt=0, allow_inf_nan=False)
    """How often each record is trained on in an epoch: 2 is twice; 0.5 is half of the records, drawn by the seed. Votes
    count once at any weight, and held-out records too."""


def _form_of_sources(value: Any) -> str | None:
    return "tasks" if isinstance(value, Mapping) else "source" if isinstance(value, str) else None


_by_form = Discriminator(
    _form_of_sources,
    custom_error_type="source_or_tasks",
    custom_error_message="must be a source, or a section with a name for each task",
)
Sources = Annotated[Annotated[str, Tag("source")] | Annotated[dict[str, TaskSettings], Tag("tasks")], _by_form]
"""A source, or several tasks by name."""

HeldoutSources = Annotated[Annotated[str, Tag("source")] | Annotated[dict[str, str], Tag("tasks")], _by_form]
"""The held-out records of a source, or of each of its tasks."""


class TaskSource(NamedTuple):
    """A source of one kind of records."""

    task: str | None
    """The task's name; None where there is one source."""
    source: str
    heldout: str | None
    """The source of its held-out records; None where a share of its own is held out."""
    weight: float = 1.0


class HeldoutSettings(Settings):
    """Records that you hold out yourself: a file, a folder or a hub dataset each, as for the setting of the same name,
    and for several tasks a section with one for each. All of that source is then trained on, and no share of it is held
    out.
    """

    demonstrations: HeldoutSources | None = source(None)
    """Prompts with completions, behind the SFT model's ``eval/loss``; null holds out a share of the source."""
    comparisons: HeldoutSources | None = source(None)
    """Comparison sets, behind the reward model's ``eval/accuracy``; null holds out a share of the source."""
    prompts: HeldoutSources | None = source(None)
    """Prompts that the evaluation has answered; null holds out a share of the source."""

    @field_validator("*")
    @classmethod
    def _source_is_readable(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for named in value.values() if isinstance(value, dict) else (value,):
            if named is not None and not is_local(named):
                parse_hub_dataset(named)
        return value


class DataSettings(Settings):
    """Where the records come from. Each source is a JSONL, JSON, Parquet or Arrow file, a folder of those, a hub
    dataset ``name@revision`` or ``name@revision#split``, or the word ``movie-snippets``. Demonstrations, comparisons
    and prompts may also be of several tasks: ``{reviews: {source: FILE}, recipes: {source: FILE, weight: 0.5}}``.
    """

    seed: Seed = semantic(0)
    """Seeds what is held out."""
    demonstrations: Sources = source(MOVIE_SNIPPETS)
    """Prompts with completions, for sft."""
    comparisons: Sources = source(MOVIE_SNIPPETS)
    """Prompts with responses and annotators' preferences, for rank and rm. It may also be ``other-snippets``: product
    reviews and editorials, rated like the movie reviews, for a reward model to start from."""
    prompts: Sources = source(MOVIE_SNIPPETS)
    """Prompts alone, for ppo and evaluate."""
    judge: str | None = source(MOVIE_SNIPPETS)
    """Texts with ratings, ``{"text", "rating"}``, that a judge independent of the reward model is fitted on; null for
    none. Set it to null or to ratings of your own when the other sources are yours."""
    heldout_fraction: float = semantic(0.05, ge=0, lt=1)
    """Share of the distinct prompts of each source of your own that is held out; at least one unless 0. Where rows name
    a ``group``, of the groups; where all share one prompt, of the rows that share no response with others."""
    heldout: HeldoutSettings = semantic(HeldoutSettings())
    """Records that you hold out yourself."""
    max_bad_fraction: float = semantic(0.0, ge=0, lt=1)
    """Share of malformed rows of a source above which the stage stops; those below it are left out."""
    snippets: SnippetSettings = semantic(SnippetSettings())
    """How ``movie-snippets`` is split."""
    downloads: Path | None = runtime(None)
    """A folder that is searched before any package index."""

    @field_validator("demonstrations", "comparisons", "prompts", "judge")
    @classmethod
    def _sources_are_readable(
        cls, value: str | dict[str, TaskSettings] | None, info: ValidationInfo
    ) -> str | dict[str, TaskSettings] | None:
        if isinstance(value, dict):
            _check_tasks(value)
        for named in [task.source for task in value.values()] if isinstance(value, dict) else [value]:
            words = (MOVIE_SNIPPETS, OTHER_SNIPPETS) if info.field_name == "comparisons" else (MOVIE_SNIPPETS,)
            if named is not None and named not in words and not is_local(named):
                if named == OTHER_SNIPPETS:
                    raise ValueError(f"{named!r} are comparisons, and no {info.field_name}")
                if named in KNOWN_WORDS:
                    raise ValueError(f"{named!r} names a model, not data")
                parse_hub_dataset(named)
        return value

    @model_validator(mode="after")
    def _held_out_records_belong_to_own_sources(self) -> "DataSettings":
        for kind in ("demonstrations", "comparisons", "prompts"):
            _check_same_tasks(kind, getattr(self, kind), getattr(self.heldout, kind))
        for kind, tasks in self.by_kind().items():
            for task in tasks:
                if task.heldout is not None and task.source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
                    raise ValueError(
                        f"heldout.{dotted(kind, task)} is for {kind} of your own; of {task.source} a part is held out "
                        "already"
                    )
        return self

    def by_kind(self) -> dict[str, list[TaskSource]]:
        """Return each kind's sources, in the order of their tasks' names; none for a judge that is null."""
        kinds: dict[str, list[TaskSource]] = {}
        for kind in ("demonstrations", "comparisons", "prompts"):
            given, heldout = getattr(self, kind), getattr(self.heldout, kind)
            if isinstance(given, dict):
                # Sorted: a key does not tell in which order a section was written.
                kinds[kind] = [
                    TaskSource(name, given[name].source, (heldout or {}).get(name), given[name].weight)
                    for name in sorted(given)
                ]
            else:
                kinds[kind] = [TaskSource(None, given, heldout)]
        return kinds | {"judge": [] if self.judge is None else [TaskSource(None, self.judge, None)]}


def _check_tasks(tasks: Mapping[str, TaskSettings]) -> None:
    """Refuse a mixture without tasks, names that do not fit metrics and files, and a source that is named twice."""
    if not tasks:
        raise ValueError("names no task: name one, as in {reviews: {source: reviews.jsonl}}, or give a source alone")
    for name in tasks:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"the name of a task has letters, digits, - and _ alone, and {name!r} is none")
    for (first, one), (second, other) in combinations(tasks.items(), 2):
        if _overlap(one.source, other.source):
            raise ValueError(
                f"the tasks {first} and {second} would read the same records, of {other.source}: give one task a "
                "weight of 2 to train on them twice"
            )


def _overlap(first: str, second: str) -> bool:
    if not (is_local(first) and is_local(second)):
        return first == second
    one, other = (Path(source).expanduser().resolve() for source in (first, second))
    return one.is_relative_to(other) or other.is_relative_to(one)


def _check_same_tasks(kind: str, given: Any, heldout: Any) -> None:
    """Refuse held-out records that are not those of the tasks of a kind, or of its only source."""
    if heldout is None:
        return
    if isinstance(given, dict) != isinstance(heldout, dict):
        names = ", ".join(sorted(given if isinstance(given, dict) else heldout))
        if isinstance(given, dict):
            raise ValueError(f"heldout.{kind} is one source, and {kind} has tasks: name a source for each of {names}")
        raise ValueError(f"heldout.{kind} names the tasks {names or 'none'}, and {kind} is one source: name one")
    if isinstance(given, dict) and (wrong := sorted(given.keys() ^ heldout.keys())):
        here, there = ("has", "has not") if wrong[0] in heldout else ("lacks", "has")
        raise ValueError(f"heldout.{kind} {here} the task {wrong[0]}, which {kind} {there}: both name the same tasks")


def dotted(kind: str, task: TaskSource) -> str:
    """Return the setting that names the source, below ``data``."""
    return kind if task.task is None else f"{kind}.{task.task}"


class RankSettings(Settings):
    """Strengths on the Elo scale from annotators' comparisons."""

    also: list[str] = runtime([])
    """Stages whose comparison sets are ranked together with those of the input ``comparisons``: ``[data/comparisons]``,
    or an earlier round's ``compare``. Their content is part of the key, their names are not."""
    model: Literal["bradley-terry", "plackett-luce", "elo"] = semantic("bradley-terry")
    """What the strengths explain: every comparison by itself; every annotator's ranking as a whole; or each comparison
    as it comes, by Elo's running update, averaged over orders."""
    prior_elo: float = semantic(200.0, gt=0)
    """Standard deviation, in Elo points, of the Gaussian prior on a strength within its set; larger is weaker. It keeps
    the strength of a response that never lost finite. On sets of five movie snippets, strengths from 3, 7 or all but 3
    of the raters predict the other raters' comparisons best with 100 to 150, and within 0.003 nats of that with 200."""
    ties: Literal["half", "rao-kupper", "davidson"] = semantic("half")
    """How a tie counts: as half a win for either response, or as an outcome with a probability of its own, by the
    model of Rao and Kupper (1967) or of Davidson (1970); their parameter is fitted to the training sets."""
    annotators: Literal["equal", "reliability"] = semantic("equal")
    """Whether all annotators count alike, or each by a reliability that is fitted together with the strengths
    (Chen et al. 2013). For the latter name them in the comparison sets' ``annotators``."""
    normalise: Literal["dataset", "prompt", "annotator", "probability"] = semantic("dataset")
    """What strengths are divided by: their deviation over the data set, or over the sets that share a prompt; or the
    deviation of each annotator's own, of which the mean is then taken: only where all annotators of a prompt compared
    the same responses (with bridges 0, those of a set). Or they become probabilities, of being preferred
    to a response of the mean strength."""
    k_factor: float = semantic(16.0, gt=0)
    """Most Elo points by which one comparison moves a rating; only with model elo."""
    orders: int = semantic(50, ge=2)
    """Orders of the comparisons over which Elo's ratings are averaged; only with model elo."""
    bridges: int = semantic(4, ge=0)
    """Rounds in which each rated response is compared, by ratings alone, with two of other sets that share its prompt.
    0 keeps sets apart, for ratings that mean something only within a set."""
    seed: Seed = semantic(0)
    """Seeds which responses of different sets are compared, and the orders of model elo."""

    @model_validator(mode="after")
    def _options_fit_the_model(self) -> "RankSettings":
        if self.model != "bradley-terry":
            for name, plain in (("ties", "half"), ("annotators", "equal")):
                if getattr(self, name) != plain:
                    raise ValueError(f"{name} {getattr(self, name)!r} is for model bradley-terry, not {self.model}")
            if self.normalise == "annotator":
                raise ValueError(f"normalise annotator is for model bradley-terry, not {self.model}")
        if self.normalise == "annotator" and self.annotators == "reliability":
            raise ValueError("normalise annotator fits each annotator alone, which leaves no reliability to find")
        return self


def ranked_inputs(settings: RankSettings) -> dict[str, str]:
    """Return the further inputs of rank: role to ``instance`` or ``instance/part``."""
    return {f"comparisons_{number}": name for number, name in enumerate(settings.also, start=2)}


def sources(settings: DataSettings) -> dict[str, Path]:
    """Return the local files and folders that the settings name, by field: their content belongs in the stage's key.

    Raises SettingsError for a missing one.
    """
    local: dict[str, Path] = {}
    for kind, tasks in settings.by_kind().items():
        for task in tasks:
            name = dotted(kind, task)
            for field, value in ((name, task.source), (f"heldout.{name}", task.heldout)):
                if value is not None and is_local(value):
                    local[field] = Path(value).expanduser()
                    if not local[field].exists():
                        what = f"there is no file or folder {value}"
                        raise SettingsError(what, f"data.{field}", f"correct data.{field}")
    return local
