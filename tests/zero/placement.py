"""Stages with the models that never learn on ranks of their own, and with all models together: the same in both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__

from rlhf.config.grpo import GrpoSettings
from rlhf.config.ppo import PpoSettings
from rlhf.models import heads
from rlhf.stages import grpo, ppo
from rlhf.tracking import read_metrics
from rlhf.training import scorers
from rlhf.zero import group
from rlhf.zero.apart import is_set_apart
from tests.zero.inputs import CASES, Case
from tests.zero.resuming import POLICY_ROLES, Stage, attempt_of, context_of, outcome, policy_values


def _stage(case: Case, data: Path, *, apart: bool) -> Stage:
    values = policy_values(data) | {
        "rewards": [{}, {"function": f"{data / 'reward.py'}:reward", "weight": 0.5}],
        "iterations": 2,
        "epochs": 1,
        "workers": {"count": case.trainers + (case.scorers if apart else 0)},
    }
    if apart:
        # Parts of three, three and two responses.
        values |= {"placement": "apart", "scorers": case.scorers, "parts": 3}
    run, kind = {"ppo": (ppo.run, PpoSettings), "grpo": (grpo.run, GrpoSettings)}[case.stage]
    settings = kind.model_validate(values | case.settings)
    return Stage(run, lambda _: settings, POLICY_ROLES | {"policy": "policy", "reward": "reward"}, (), None, None)


def together(data: Path, folder: Path) -> dict[str, Any]:
    """What a case's stage makes with all models on as many ranks as train in it."""
    (case,) = [case for case in CASES if case.trainers == group.world_size()]
    stage = _stage(case, data, apart=False)
    return outcome(stage, attempt_of(context_of(case.stage, stage, data, folder), folder, ()))


def apart(number: int, case: Case, folder: Path) -> None:
    """Run a rank of a case, whose process group its environment says; rank 0 writes what was made."""
    torch.set_num_threads(1)
    if case.trainers > 1:
        heads.CHUNK, heads.FEWEST = 1, 5
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    stage = _stage(case, folder.parent, apart=True)
    context = context_of(case.stage, stage, folder.parent, folder)
    context = replace(context, output=folder / "output", attempt=folder / "attempt", attempts=(folder / "attempt",))
    if is_set_apart():
        assert number >= case.trainers
        assert scorers.run(context) == {}
        return
    found = outcome(stage, context)
    if group.is_main():
        rows = read_metrics(context.attempt / "metrics.jsonl")
        torch.save(found | {"all": rows}, folder / "apart.pt")
    group.barrier()
