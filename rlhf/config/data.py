"""Settings of the stages without a model: data and rank."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

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


class HeldoutSettings(Settings):
    """Records that you hold out yourself: a file, a folder or a hub dataset each, as for the setting of the same name.
    All of that source is then trained on, and no share of it is held out.
    """

    demonstrations: str | None = source(None)
    """Prompts with completions, behind the SFT model's ``eval/loss``; null holds out a share of the source."""
    comparisons: str | None = source(None)
    """Comparison sets, behind the reward model's ``eval/accuracy``; null holds out a share of the source."""
    prompts: str | None = source(None)
    """Prompts that the evaluation has answered; null holds out a share of the source."""

    @field_validator("*")
    @classmethod
    def _source_is_readable(cls, value: str | None) -> str | None:
        if value is not None and not is_local(value):
            parse_hub_dataset(value)
        return value


class DataSettings(Settings):
    """Where the records come from. Each source is a JSONL, JSON, Parquet or Arrow file, a folder of those, a hub
    dataset ``name@revision`` or ``name@revision#split``, or the word ``movie-snippets``.
    """

    seed: Seed = semantic(0)
    """Seeds what is held out."""
    demonstrations: str = source(MOVIE_SNIPPETS)
    """Prompts with completions, for sft."""
    comparisons: str = source(MOVIE_SNIPPETS)
    """Prompts with responses and annotators' preferences, for rank and rm. It may also be ``other-snippets``: product
    reviews and editorials, rated like the movie reviews, for a reward model to start from."""
    prompts: str = source(MOVIE_SNIPPETS)
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
    def _source_is_readable(cls, value: str | None, info: ValidationInfo) -> str | None:
        words = (MOVIE_SNIPPETS, OTHER_SNIPPETS) if info.field_name == "comparisons" else (MOVIE_SNIPPETS,)
        if value is not None and value not in words and not is_local(value):
            if value == OTHER_SNIPPETS:
                raise ValueError(f"{value!r} are comparisons, and no {info.field_name}")
            if value in KNOWN_WORDS:
                raise ValueError(f"{value!r} names a model, not data")
            parse_hub_dataset(value)
        return value

    @model_validator(mode="after")
    def _held_out_records_belong_to_own_sources(self) -> "DataSettings":
        for kind, (origin, heldout) in self.by_kind().items():
            if heldout is not None and origin in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
                raise ValueError(f"heldout.{kind} is for {kind} of your own; of {origin} a part is held out already")
        return self

    def by_kind(self) -> dict[str, tuple[str | None, str | None]]:
        """Return each kind's source and the source of its held-out records."""
        return {
            "demonstrations": (self.demonstrations, self.heldout.demonstrations),
            "comparisons": (self.comparisons, self.heldout.comparisons),
            "prompts": (self.prompts, self.heldout.prompts),
            "judge": (self.judge, None),
        }


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
    for kind, (origin, heldout) in settings.by_kind().items():
        for field, value in ((kind, origin), (f"heldout.{kind}", heldout)):
            if value is not None and is_local(value):
                local[field] = Path(value).expanduser()
                if not local[field].exists():
                    raise SettingsError(f"there is no file or folder {value}", f"data.{field}", f"correct data.{field}")
    return local
