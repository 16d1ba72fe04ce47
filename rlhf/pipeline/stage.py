"""The stage contract, and the stages that are ours.

A stage is described here without its code: the code is named by a string and imported on the workers only, so that
planning needs neither torch nor Ray. Another package adds stages through the entry-point group ``rlhf.stages``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from rlhf.config.base import Settings
from rlhf.config.collect import CollectSettings, CompareSettings, awaited, compare_sources, writer_inputs
from rlhf.config.data import DataSettings, RankSettings, ranked_inputs
from rlhf.config.ppo import PpoSettings
from rlhf.config.rewards import reward_inputs, reward_sources
from rlhf.config.stages import EvaluateSettings, ModelSettings, RmSettings, SftSettings

Inputs = Callable[[Any], Mapping[str, str]]


def taking(**roles: str) -> Inputs:
    """Inputs that are the same whatever the settings."""
    return lambda _: roles


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
    """The kind of artifact made: ``model``, ``policy``, ``reward-model``, ``data``, ``responses``, ``comparisons`` or
    ``report``."""
    inputs: Inputs
    """Of the settings: role to the default ``instance`` or ``instance/part`` that fills it."""
    takes: Callable[[str], tuple[str, ...] | None] = field(default=lambda _: None)
    """Of a role: the kinds of whole artifacts that may fill it, or None where any may."""
    runs: Literal["task", "workers"] = "task"
    """One Ray task, or a worker group of ZeRO-3 ranks (the settings then have ``workers``)."""
    continues: str | None = None
    """The role whose model the result is a trained version of."""
    preflight: str | None = None
    """``module:function`` of a check that needs data and models; run before any worker group starts."""
    sources: Callable[[Any], Mapping[str, Any]] = field(default=lambda _: {})
    """Of the settings: setting to local path whose content, not place, is part of the key."""
    awaits: Callable[[Any], Path | None] = field(default=lambda _: None)
    """Of the settings: a file that people have still to make, without which there is no key, or None."""


def _data_sources(settings: DataSettings) -> Mapping[str, Any]:
    from rlhf.config.data import sources

    return sources(settings)


def _model_sources(settings: ModelSettings) -> Mapping[str, Any]:
    from rlhf.config.base import is_local

    return (
        {"base": settings.base} if settings.base not in ("smollm2-135m", "scratch") and is_local(settings.base) else {}
    )


def _ppo_inputs(settings: PpoSettings) -> Mapping[str, str]:
    roles = {"policy": "sft", "prompts": "data/prompts"} | reward_inputs(settings.rewards)
    return roles | ({"demonstrations": "data/demonstrations"} if settings.ptx.coef else {})


def _kinds(role: str) -> tuple[str, ...] | None:
    if role.startswith("reward"):
        return ("reward-model",)
    if role in ("base", "policy", "before", "after") or role.startswith("model"):
        return ("model", "policy")
    return (role,) if role in ("comparisons", "responses") else None


OURS = (
    Stage("data", 4, DataSettings, "stages.data:run", "data", inputs=taking(), sources=_data_sources),
    Stage(
        "model",
        1,
        ModelSettings,
        "stages.model:run",
        "model",
        inputs=lambda settings: {"demonstrations": "data/demonstrations"} if settings.base == "scratch" else {},
        sources=_model_sources,
    ),
    Stage(
        "collect",
        3,
        CollectSettings,
        "stages.collect:run",
        "responses",
        inputs=lambda settings: {"prompts": "data/prompts"} | writer_inputs(settings),
        takes=_kinds,
        runs="workers",
        preflight="stages.checks:collect",
    ),
    Stage(
        "compare",
        1,
        CompareSettings,
        "stages.compare:run",
        "data",
        inputs=taking(responses="collect"),
        takes=_kinds,
        preflight="stages.checks:compare",
        sources=compare_sources,
        awaits=awaited,
    ),
    Stage(
        "rank",
        4,
        RankSettings,
        "stages.rank:run",
        "comparisons",
        inputs=lambda settings: {"comparisons": "data/comparisons"} | ranked_inputs(settings),
    ),
    Stage(
        "sft",
        4,
        SftSettings,
        "stages.sft:run",
        "policy",
        inputs=taking(base="model", demonstrations="data/demonstrations"),
        takes=_kinds,
        runs="workers",
        continues="base",
        preflight="stages.checks:sft",
    ),
    Stage(
        "rm",
        6,
        RmSettings,
        "stages.rm:run",
        "reward-model",
        inputs=taking(base="model", comparisons="rank", demonstrations="data/demonstrations"),
        takes=lambda role: ("model", "policy", "reward-model") if role == "base" else _kinds(role),
        runs="workers",
        continues="base",
        preflight="stages.checks:rm",
    ),
    Stage(
        "ppo",
        4,
        PpoSettings,
        "stages.ppo:run",
        "policy",
        inputs=_ppo_inputs,
        takes=_kinds,
        runs="workers",
        continues="policy",
        preflight="stages.checks:ppo",
        sources=lambda settings: reward_sources(settings.rewards),
    ),
    Stage(
        "evaluate",
        4,
        EvaluateSettings,
        "stages.evaluate:run",
        "report",
        inputs=lambda settings: (
            {
                "before": "sft",
                "after": "ppo",
                "prompts": "data/prompts",
            }
            | reward_inputs(settings.rewards)
            | ({"judge": "data/judge"} if settings.judge else {})
        ),
        takes=_kinds,
        runs="workers",
        preflight="stages.checks:evaluate",
        sources=lambda settings: reward_sources(settings.rewards),
    ),
)


def stages() -> dict[str, Stage]:
    """Every known stage by name: ours, and those that other packages register."""
    found = {stage.name: stage for stage in OURS}
    for point in entry_points(group="rlhf.stages"):
        stage: Stage = point.load()
        found[stage.name] = stage
    return found
