"""The contract of a stage, and the description of each of our stages.

A description names the stage's code as a string, which only workers import, so that planning needs neither torch nor
Ray. Another package adds stages through the entry-point group ``rlhf.stages``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from rlhf.config.base import Settings, is_local
from rlhf.config.collect import (
    CollectSettings,
    CompareSettings,
    SelectSettings,
    awaited,
    compare_sources,
    writer_inputs,
)
from rlhf.config.data import DataSettings, RankSettings, ranked_inputs, sources
from rlhf.config.grpo import GrpoSettings, RlooSettings
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings, without_adapter
from rlhf.config.rewards import reward_inputs, reward_sources
from rlhf.config.stages import (
    DpoSettings,
    EvaluateSettings,
    ModelSettings,
    RmSettings,
    SftSettings,
    WorkerSettings,
    loses_virtual_tokens,
)
from rlhf.errors import RequestError


@dataclass(frozen=True)
class Input:
    """What may fill a role of a stage."""

    default: str
    """``instance`` or ``instance/part``, unless the pipeline names another."""
    kinds: tuple[str, ...] = ()
    """Kinds of artifact that may fill the role, as a whole; empty where every artifact and every part may."""


Inputs = Callable[[Any], Mapping[str, Input]]


def taking(**inputs: str | Input) -> Inputs:
    """Return the inputs of a stage whose roles do not depend on its settings; text is a default of any kind."""
    given = {role: Input(value) if isinstance(value, str) else value for role, value in inputs.items()}
    return lambda _: given


@dataclass(frozen=True)
class Stage:
    """What the pipeline must know of a stage.

    Its code is ``run(context: Context) -> dict[str, float]``: it fills ``context.output`` and returns final metrics.
    """

    name: str
    version: int
    """Raised when the code's results change, so that no result of an older version is a hit."""
    settings: type[Settings]
    code: str
    """``module:function``"""
    kind: str
    """Kind of the artifact made: ``model``, ``policy``, ``reward-model``, ``data``, ``responses``, ``comparisons`` or
    ``report``."""
    inputs: Inputs
    """Maps the settings to {role: input}."""
    runs: Literal["task", "workers"] = "task"
    """One Ray task, or a worker group of ZeRO ranks (the settings then have ``workers``)."""
    continues: str | None = None
    """The role whose model the result is a trained version of."""
    preflight: str | None = None
    """``module:function`` of a check that needs data and models; it runs before any worker group starts."""
    imports: tuple[str, ...] = ()
    """Modules beside DeepSpeed that are imported ahead of the stage's ranks (:mod:`rlhf.cluster.fork_server`), which
    changes nothing but their start. Stages with the same modules share the process that imports them."""
    sources: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    """Maps the settings to {setting: local path}; the content of each path, not its place, enters the key."""
    disagrees: Callable[[Any, Mapping[str, Any]], tuple[str, str] | None] = lambda _settings, _makers: None
    """Maps the settings, and by role those of the stages that make its inputs, by role/role those that make these
    stages' own, to what they contradict each other in and what to write instead, or None."""
    awaits: Callable[[Any], Path | None] = lambda _: None
    """Maps the settings to a file that people have yet to make, without which there is no key, or None."""

    def __post_init__(self) -> None:
        """Refuse what would fail only as the stage is planned or run.

        Raises:
            RequestError: ``inputs`` is no function, or workers are to run the stage and its settings have none.
        """
        if not callable(self.inputs):
            raise RequestError(
                f"inputs of the stage {self.name} is no function of the settings: {self.inputs!r}",
                f"inputs of the Stage {self.name!r}",
                'inputs=taking(ROLE="STAGE/PART")',
            )
        workers = self.settings.model_fields.get("workers")
        if self.runs == "workers" and (workers is None or workers.annotation is not WorkerSettings):
            raise RequestError(
                f'the stage {self.name} runs="workers", and its settings have no workers: {WorkerSettings.__name__}',
                f"{self.settings.__module__}.{self.settings.__qualname__}",
                "inherit ShardedSettings or TrainingSettings of rlhf.config.stages there",
            )


_MODELS = ("model", "policy")
# The same for all, so that one process imports them for all.
_IMPORTS = (
    "transformers.models.llama.modeling_llama",
    "peft",
    "datasets",
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.dpo_trainer",
    "scipy.stats",
    "sklearn.feature_extraction.text",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "httpx",
    "torch.nn.attention.varlen",
)


_on_workers = partial(Stage, runs="workers", imports=_IMPORTS)


def _each(roles: Mapping[str, str], *kinds: str) -> dict[str, Input]:
    return {role: Input(default, kinds) for role, default in roles.items()}


def _tuned_by_reward(settings: PolicyGradientSettings) -> dict[str, Input]:
    return (
        {"policy": Input("sft", _MODELS), "prompts": Input("data/prompts")}
        | _each(reward_inputs(settings.rewards), "reward-model")
        | ({"demonstrations": Input("data/demonstrations")} if settings.ptx.coef else {})
    )


OURS = (
    Stage("data", 4, DataSettings, "rlhf.stages.data:run", "data", inputs=taking(), sources=sources),
    Stage(
        "model",
        1,
        ModelSettings,
        "rlhf.stages.model:run",
        "model",
        inputs=lambda settings: {"demonstrations": Input("data/demonstrations")} if settings.base == "scratch" else {},
        sources=lambda settings: {"base": settings.base} if is_local(settings.base) else {},
    ),
    _on_workers(
        "collect",
        3,
        CollectSettings,
        "rlhf.stages.collect:run",
        "responses",
        inputs=lambda settings: {"prompts": Input("data/prompts")} | _each(writer_inputs(settings), *_MODELS),
        preflight="rlhf.stages.checks:collect",
    ),
    Stage(
        "compare",
        1,
        CompareSettings,
        "rlhf.stages.compare:run",
        "data",
        inputs=taking(responses=Input("collect", ("responses",))),
        preflight="rlhf.stages.checks:compare",
        sources=compare_sources,
        awaits=awaited,
    ),
    _on_workers(
        "select",
        1,
        SelectSettings,
        "rlhf.stages.select:run",
        "data",
        inputs=lambda settings: (
            {"responses": Input("collect", ("responses",))} | _each(reward_inputs(settings.rewards), "reward-model")
        ),
        preflight="rlhf.stages.checks:select",
        sources=lambda settings: reward_sources(settings.rewards),
    ),
    Stage(
        "rank",
        4,
        RankSettings,
        "rlhf.stages.rank:run",
        "comparisons",
        inputs=lambda settings: _each({"comparisons": "data/comparisons"} | ranked_inputs(settings)),
    ),
    _on_workers(
        "sft",
        4,
        SftSettings,
        "rlhf.stages.sft:run",
        "policy",
        inputs=taking(base=Input("model", _MODELS), demonstrations="data/demonstrations"),
        continues="base",
        disagrees=loses_virtual_tokens,
        preflight="rlhf.stages.checks:sft",
    ),
    _on_workers(
        "rm",
        6,
        RmSettings,
        "rlhf.stages.rm:run",
        "reward-model",
        inputs=taking(
            base=Input("model", (*_MODELS, "reward-model")),
            comparisons=Input("rank", ("comparisons",)),
            demonstrations="data/demonstrations",
        ),
        continues="base",
        disagrees=loses_virtual_tokens,
        preflight="rlhf.stages.checks:rm",
    ),
    _on_workers(
        "ppo",
        4,
        PpoSettings,
        "rlhf.stages.ppo:run",
        "policy",
        inputs=_tuned_by_reward,
        continues="policy",
        preflight="rlhf.stages.checks:ppo",
        disagrees=lambda settings, makers: without_adapter(settings, makers) or loses_virtual_tokens(settings, makers),
        sources=lambda settings: reward_sources(settings.rewards),
    ),
    *(
        _on_workers(
            name,
            1,
            kind,
            "rlhf.stages.grpo:run",
            "policy",
            inputs=_tuned_by_reward,
            continues="policy",
            preflight="rlhf.stages.checks:policy_gradient",
            disagrees=loses_virtual_tokens,
            sources=lambda settings: reward_sources(settings.rewards),
        )
        for name, kind in (("grpo", GrpoSettings), ("rloo", RlooSettings))
    ),
    _on_workers(
        "dpo",
        1,
        DpoSettings,
        "rlhf.stages.dpo:run",
        "policy",
        inputs=taking(policy=Input("sft", _MODELS), comparisons=Input("rank", ("comparisons",))),
        continues="policy",
        disagrees=loses_virtual_tokens,
        preflight="rlhf.stages.checks:dpo",
    ),
    _on_workers(
        "evaluate",
        5,
        EvaluateSettings,
        "rlhf.stages.evaluate:run",
        "report",
        inputs=lambda settings: (
            {"before": Input("sft", _MODELS), "prompts": Input("data/prompts")}
            | _each(settings.compared, *_MODELS)
            | _each(reward_inputs(settings.rewards), "reward-model")
            | ({"judge": Input("data/judge")} if settings.judge else {})
        ),
        preflight="rlhf.stages.checks:evaluate",
        sources=lambda settings: reward_sources(settings.rewards),
    ),
)


def stages() -> dict[str, Stage]:
    """Return every known stage by name: ours, and those that other packages register.

    Raises:
        RequestError: what is registered is no Stage, or has the name of another.
    """
    known = {stage.name: stage for stage in OURS}
    for point in entry_points(group="rlhf.stages"):
        stage, where = point.load(), f"entry point {point.name} = {point.value} of group rlhf.stages"
        if not isinstance(stage, Stage):
            raise RequestError(f"what is registered as a stage is no Stage: {stage!r}", where, "name a Stage there")
        if stage.name in known:
            raise RequestError(f"another stage is named {stage.name!r} already", where, "rename the stage there")
        known[stage.name] = stage
    return known
