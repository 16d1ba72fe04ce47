"""Rewards in a worker group of two ranks."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.attempt.context import Context
from rlhf.cluster.session import Session
from rlhf.cluster.worker import Call
from rlhf.cluster.worker_group import run_group
from rlhf.config.ppo import PpoSettings
from rlhf.config.rewards import RewardSettings
from rlhf.errors import RewardError
from rlhf.models.micro_batches import MicroBatch
from rlhf.pipeline.stage import stages
from rlhf.rewards import Rewards
from rlhf.training import checkpoint_writer
from rlhf.zero import group

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets of dead actors to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FILE = Path(__file__).parent / "functions.py"


def score_after_a_checkpoint(context: Context[PpoSettings]) -> dict[str, float]:
    """What PPO does, in short: a good iteration, its checkpoint, and one in which the second reward fails."""
    good, bad = (Rewards([one], {}, "fp32", MicroBatch(4)) for one in context.settings.rewards)
    assert good.score(["a", "b"], ["x", "yy"]).tolist() == [1.0, 2.0]
    checkpoint = context.folder.checkpoint(1)
    if group.is_main():
        checkpoint.mkdir(parents=True)
    group.barrier()
    (checkpoint / f"shard-{group.rank()}").write_text("kept")
    checkpoint_writer.mark_complete(checkpoint, context)
    bad.score(["a", "b"], ["x", "yy"])
    raise AssertionError("a reward of NaN was taken")


def test_a_failed_reward_ends_all_ranks_at_once_and_is_not_tried_again(session: Session, tmp_path: Path) -> None:
    """Every rank hears of it, so that none waits for another; the checkpoint before it can be gone on from."""
    (tmp_path / "output").mkdir()
    rewards = [RewardSettings(function=f"{FILE}:{name}") for name in ("lengths", "nan_second")]
    settings = PpoSettings(rewards=rewards, value_init="policy")
    context: Context[Any] = Context("ppo", "key", settings, {}, tmp_path / "output", tmp_path, tmp_path, (tmp_path,))
    code = "tests.rewards.test_worker_group:score_after_a_checkpoint"
    call = Call(code, context, timeout_minutes=2, imports=stages()["ppo"].imports)
    ranks, said = session.resources().per_rank("ppo", 2, 1, None), list[str]()
    with pytest.raises(RewardError, match="response 1 is nan") as caught:
        run_group(lambda _: (call, ranks), lambda _: True, 3, lambda: None, said.append)
    assert caught.value.where == f"{FILE}:nan_second, row 1"
    assert said == []
    assert [file.name for file in sorted(tmp_path.glob("failure-*.json"))] == ["failure-0.json", "failure-1.json"]
    newest = checkpoint_writer.newest_complete([tmp_path])
    assert newest is not None
    assert newest.name == "checkpoint-1"
