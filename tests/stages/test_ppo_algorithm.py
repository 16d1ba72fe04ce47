"""The stage against PPO written out once more, slowly, in float64, with models whose answers are made up."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.ppo import PpoSettings
from rlhf.errors import DivergedError
from rlhf.models import text
from rlhf.models.micro_batches import MicroBatch
from rlhf.rl.losses import PolicySums, ValueSums
from rlhf.rollout.prompts import WATCHED, DemonstrationStream
from rlhf.rollout.sampling import Responses
from rlhf.rollout.sequences import Experience, Minibatch, Sequences
from rlhf.tracking import read_metrics
from rlhf.training.loop import Journal
from rlhf.training.scoring import Together
from tests.models.tiny import make_tiny_llama

pytestmark = [
    # DeepSpeed's and torch's own, as the stage imports them.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group"),
]

ITERATIONS, ROLLOUTS, TIME = 3, 6, 5
Row = list[float]


def of_sequences(sequences: Sequences, kind: int) -> Tensor:
    """A made-up number for every response token, a function of ids alone, so that oracle and stage agree on it."""
    ids = sequences.ids[:, -sequences.time :].double()
    return (torch.sin(ids * (kind + 1.7) + torch.arange(sequences.time) * 0.9 + kind) * 0.4 - 1.0).float()


@dataclass
class Update:
    """What a model was given to learn from."""

    iteration: int
    minibatch: Minibatch[Any]
    learning_rate: float
    loss: Any
    examples: Any = None


class Model:
    """What the loop asks of anything with state."""

    updates: list[Update]
    iteration = -1

    def checkpoint_bytes(self) -> int:
        return 0

    def save(self, checkpoint: Path) -> None:
        """Nothing to keep."""

    def load(self, checkpoint: Path) -> None:
        """Nothing was kept."""


@dataclass
class MadeUpPolicy(Model):
    tokenizer: Any
    drift: float
    """How far each update moves the log-probabilities."""
    updates: list[Update] = field(default_factory=list)
    rollouts: list[Tensor] = field(default_factory=list)
    exported: list[Path] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    """What the stage returned."""
    lengths = MappingProxyType[int, int]({})
    """Of all responses of an iteration, where that is given; beyond the limit none of them ends."""

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        if len(prompts) == WATCHED:
            return Responses(torch.full((WATCHED, TIME), 30), torch.zeros(WATCHED, TIME))
        self.iteration += 1
        generator = torch.Generator().manual_seed(self.iteration)
        ids = torch.randint(20, 250, (len(prompts), TIME), generator=generator)
        for row in range(1, len(prompts)):  # the first is cut off; the others end at their own place
            ids[row, row % TIME] = self.tokenizer.eos_token_id
        if self.iteration in self.lengths:
            ids = torch.randint(20, 250, (len(prompts), TIME), generator=generator)
            ids[:, self.lengths[self.iteration] - 1 :] = self.tokenizer.eos_token_id
        self.rollouts.append(ids)
        sequences = Sequences(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
        return Responses(ids, of_sequences(sequences, 4))

    def logprobs_and_entropies(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        return of_sequences(sequences, 0), of_sequences(sequences, 3) + 2

    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        return of_sequences(sequences, 1)

    def update(self, minibatch: Minibatch[Experience], loss: Any, rate: float, examples: Any) -> PolicySums:
        self.updates.append(Update(self.iteration, minibatch, rate, loss, examples))
        sums: list[PolicySums] = []
        for part in minibatch.parts:
            now = part.logprobs + self.drift
            constants = part.logprobs, part.reference_logprobs, part.advantages, part.mask
            sums.append(loss(now, torch.zeros_like(now), *constants, num_tokens=minibatch.num_tokens)[1])
        return sum(sums[1:], start=sums[0])

    def export(self, target: Path) -> None:
        self.exported.append(target)


@dataclass
class MadeUpValue(Model):
    policy: MadeUpPolicy
    updates: list[Update] = field(default_factory=list)

    def values(self, sequences: Sequences) -> Tensor:
        return of_sequences(sequences, 2)

    def update(self, minibatch: Minibatch[Experience], loss: Any, rate: float) -> ValueSums:
        self.updates.append(Update(self.policy.iteration, minibatch, rate, loss))
        part = minibatch.parts[0]
        return loss(part.values, part.values, part.returns, part.mask, num_tokens=minibatch.num_tokens)[1]


@dataclass
class MadeUpReward:
    scale: float
    growth: float = 0.0
    """How much more each rollout scores than the one before."""
    asked: int = 0

    def score(self, prompts: Sequence[Any], responses: Sequence[str]) -> Tensor:
        assert {*prompts} <= {f"a film {number}" for number in range(4)}
        if len(responses) == WATCHED:
            return torch.full((WATCHED,), -7.0)
        more, self.asked = self.growth * self.asked, self.asked + 1
        return torch.tensor([self.scale * math.sin(number + 1.0) + more for number in range(len(responses))])

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        return {"score/out_of_range": 0.05}


@dataclass
class Written:
    """An iteration as the oracle has it: a list of each response's real tokens."""

    advantages: list[Row]
    returns: list[Row]
    kl: float
    gaps: list[Row]
    """How much likelier the sampler found each token than the policy does."""


def estimate(name: str, policy: float, reference: float) -> float:
    gap = policy - reference
    match name:
        case "k1":
            return gap
        case "k2":
            return gap * gap / 2
        case _:
            return math.exp(-gap) - 1 + gap


def spread(rows: list[Row]) -> tuple[float, float]:
    values = [value for row in rows for value in row]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-8)


def written_out(ids: Tensor, eos: int, settings: PpoSettings, beta: float) -> Written:
    """One iteration: the definition, token by token."""
    sequences = Sequences(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    policy, reference, value, sampler = (of_sequences(sequences, kind).double().tolist() for kind in (0, 1, 2, 4))
    lengths = [row.index(eos) + 1 if eos in row else TIME for row in ids.tolist()]
    rewards: list[Row] = []
    kls: list[float] = []
    for row, length in enumerate(lengths):
        score = 3 * math.sin(row + 1.0)
        if settings.score_clip is not None:
            score = min(max(score, -settings.score_clip), settings.score_clip)
        if eos not in ids[row].tolist():
            replaced = settings.missing_eos_score
            score = score - settings.missing_eos_penalty if replaced is None else replaced
        pairs = list(zip(policy[row], reference[row], strict=True))[:length]
        kls.append(sum(estimate("k1", *pair) for pair in pairs))
        weight = beta if settings.kl.place == "reward" else 0.0
        rewards.append([-weight * estimate(settings.kl.estimator, *pair) for pair in pairs])
        rewards[-1][-1] += score
    if settings.whiten_rewards:
        mean, deviation = spread(rewards)
        rewards = [[(one - mean) / deviation + mean for one in row] for row in rewards]
    advantages: list[Row] = []
    for row, length in enumerate(lengths):
        following, after, found = 0.0, 0.0, [0.0] * length
        for t in reversed(range(length)):
            delta = rewards[row][t] + settings.discount * after - value[row][t]
            following = found[t] = delta + settings.discount * settings.gae_lambda * following
            after = value[row][t]
        advantages.append(found)
    returns = [[a + v for a, v in zip(row, value[number], strict=False)] for number, row in enumerate(advantages)]
    if settings.whiten_advantages is True:
        mean, deviation = spread(advantages)
        advantages = [[(one - mean) / deviation for one in row] for row in advantages]
    gaps = [[s - p for s, p in zip(sampler[n], policy[n], strict=True)][:length] for n, length in enumerate(lengths)]
    if settings.importance_cap is not None:
        weights = [[min(math.exp(-gap), settings.importance_cap) for gap in row] for row in gaps]
        advantages = [[a * w for a, w in zip(*rows, strict=True)] for rows in zip(advantages, weights, strict=True)]
    return Written(advantages, returns, sum(kls) / len(kls), gaps)


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drift: float = 0.0,
    scale: float = 3.0,
    growth: float = 0.0,
    **more: Any,
) -> tuple[PpoSettings, MadeUpPolicy, MadeUpValue]:
    from rlhf.stages import ppo

    folder = make_tiny_llama(tmp_path / "tiny")
    files = {
        "prompts": [{"prompt": f"a film {number}"} for number in range(4)],
        "demonstrations": [{"prompt": "a film", "completion": f"joy {number}"} for number in range(4)],
    }
    for role, rows in files.items():
        (tmp_path / role).mkdir()
        (tmp_path / role / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = MadeUpPolicy(text.load_tokenizer(folder), drift)
    value = MadeUpValue(policy)
    made_up: Any = policy, MadeUpReward(scale, growth)
    monkeypatch.setattr(ppo, "load_models", lambda _: (policy, value, Together(*made_up)))
    values: dict[str, Any] = {
        "rewards": [{"function": "unused.py:reward"}],
        "value_init": "policy",
        "iterations": ITERATIONS,
        "rollouts": ROLLOUTS,
        "epochs": 2,
        "minibatches": 3,
        "micro_batch_size": 1,
        "sampling": {"max_new_tokens": TIME},
        "policy_learning_rate": 0.5,
        "value_learning_rate": 0.25,
    }
    settings = PpoSettings.model_validate(values | more)
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    policy.final = ppo.run(
        Context(
            stage="ppo",
            key="key",
            settings=settings,
            inputs={"policy": folder} | {role: tmp_path / role for role in files},
            output=tmp_path,
            attempt=attempt,
            cache=tmp_path,
            attempts=(attempt,),
            tracking={"mode": "disabled"},
        )
    )
    return settings, policy, value


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return read_metrics(tmp_path / "attempt" / "metrics.jsonl")


def parts_of(updates: Sequence[Update], iteration: int) -> list[Experience]:
    return [part for update in updates if update.iteration == iteration for part in update.minibatch.parts]


def place_of(part: Experience, ids: Tensor) -> int:
    """Of a micro batch of one sample, among the responses of its iteration."""
    length = int(part.mask.sum())
    return next(n for n, one in enumerate(ids) if torch.equal(one[:length], part.ids[0, -part.time :][:length]))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kl": {"coef": 0.4, "estimator": "k2"}, "discount": 0.9, "gae_lambda": 0.7},
        {"kl": {"coef": 0.4, "estimator": "k3"}, "score_clip": 1.5, "missing_eos_penalty": 0.7},
        {"missing_eos_score": -2.0, "whiten_rewards": True},
        {"whiten_rewards": True, "whiten_advantages": False, "gae_lambda": 1.0},
        {"kl": {"coef": 0.4, "estimator": "k2", "place": "loss", "importance_weights": False}},
        {"kl": {"coef": 0.4, "target": 0.3, "horizon": 20}},
        {"importance_cap": 1.1},
        {"whiten_advantages": "minibatch"},
    ],
)
def test_both_models_learn_from_what_the_definition_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Every response once an epoch, with its real tokens' advantages and returns under the β of its iteration."""
    settings, policy, value = run(tmp_path, monkeypatch, **more)
    beta = settings.kl.coef
    for iteration, ids in enumerate(policy.rollouts):
        expected = written_out(ids, policy.tokenizer.eos_token_id, settings, beta)
        for updates in (policy.updates, value.updates):
            seen: list[int] = []
            for update in (one for one in updates if one.iteration == iteration):
                parts = {place_of(part, ids): part for part in update.minibatch.parts}
                seen += parts
                mean, deviation = spread([expected.advantages[row] for row in parts])
                for row, part in parts.items():
                    advantages, length = expected.advantages[row], int(part.mask.sum())
                    if settings.whiten_advantages == "minibatch":
                        advantages = [(one - mean) / deviation for one in advantages]
                    for found, written in ((part.advantages, advantages), (part.returns, expected.returns[row])):
                        torch.testing.assert_close(
                            found[0, :length].double(), torch.tensor(written).double(), atol=1e-4, rtol=1e-4
                        )
            for epoch in range(settings.epochs):
                assert sorted(seen[epoch * ROLLOUTS : (epoch + 1) * ROLLOUTS]) == list(range(ROLLOUTS))
        for update in (one for one in policy.updates if one.iteration == iteration):
            penalties = update.loss.keywords["penalties"]
            assert penalties.kl_coef == (beta if settings.kl.place == "loss" else 0.0)
            assert penalties.kl_estimator == settings.kl.estimator
            assert penalties.kl_importance_weights == settings.kl.importance_weights
            assert update.minibatch.num_tokens == sum(int(part.mask.sum()) for part in update.minibatch.parts)
        row = read_metrics(tmp_path / "attempt" / "metrics.jsonl")[iteration]
        assert row["rollout/kl_to_trained"] == pytest.approx(sum(map(sum, expected.gaps)) / ROLLOUTS, abs=1e-5)
        assert row["rollout/largest_gap"] == pytest.approx(
            max(abs(gap) for one in expected.gaps for gap in one), abs=1e-5
        )
        if settings.kl.target is not None:
            error = min(max(expected.kl / settings.kl.target - 1, -0.2), 0.2)
            beta *= 1 + error * ROLLOUTS / settings.kl.horizon
    assert settings.kl.target is None or beta != settings.kl.coef


def test_learning_rates_fall_along_one_line_over_all_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the peak to almost 0, epochs and minibatches counted, the value model's beside the policy's."""
    settings, policy, value = run(tmp_path, monkeypatch)
    total = ITERATIONS * settings.epochs * settings.minibatches
    shares = [1 - number / total for number in range(total)]
    assert [update.learning_rate for update in policy.updates] == pytest.approx([0.5 * share for share in shares])
    assert [update.learning_rate for update in value.updates] == pytest.approx([0.25 * share for share in shares])


def test_learning_rates_rise_first_and_keep_to_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a quarter of the 18 updates, rounded up; a constant rate then stays at its peak."""
    _, policy, value = run(tmp_path, monkeypatch, warmup_fraction=0.25, schedule="constant")
    shares = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, *[1.0] * 13]
    assert [update.learning_rate for update in policy.updates] == pytest.approx([0.5 * share for share in shares])
    assert [update.learning_rate for update in value.updates] == pytest.approx([0.25 * share for share in shares])


def test_the_losses_are_clipped_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings reach the losses."""
    _, policy, value = run(tmp_path, monkeypatch, policy_clip=0.3, value_clip=None, entropy_bonus=0.01)
    assert policy.updates[0].loss.keywords["clip"] == 0.3
    assert policy.updates[0].loss.keywords["penalties"].entropy_bonus == 0.01
    assert policy.updates[0].loss.keywords["penalties"].kl_importance_weights
    assert value.updates[0].loss.keywords["clip"] is None


def test_the_value_model_warms_up_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first iterations asked for, the policy and β stay as they are; β moves after the first that trains it."""
    kl = {"coef": 0.4, "target": 0.3, "horizon": 20}
    settings, policy, value = run(tmp_path, monkeypatch, value_warmup=1, kl=kl)
    assert {update.iteration for update in policy.updates} == {1, 2}
    assert {update.iteration for update in value.updates} == {0, 1, 2}
    first, second, third = (row["kl/coef"] for row in rows_of(tmp_path))
    assert first == second == 0.4
    measured = written_out(policy.rollouts[1], policy.tokenizer.eos_token_id, settings, 0.4).kl
    error = min(max(measured / 0.3 - 1, -0.2), 0.2)
    assert third == pytest.approx(0.4 * (1 + error * ROLLOUTS / 20))
    assert third != 0.4


def test_an_update_that_went_too_far_is_the_iteration_s_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the square of a drift of 0.2 is 0.02 nats a token."""
    _, policy, _ = run(tmp_path, monkeypatch, drift=0.2, early_stop_kl=0.019)
    assert [update.iteration for update in policy.updates] == [0, 1, 2]


def test_steps_that_stay_near_are_all_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is not reached."""
    settings, policy, _ = run(tmp_path, monkeypatch, drift=0.2, early_stop_kl=0.021)
    assert len(policy.updates) == ITERATIONS * settings.epochs * settings.minibatches


def test_a2c_takes_one_unclipped_step_a_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all its responses at once."""
    more: dict[str, Any] = {"algorithm": "a2c", "epochs": 1, "minibatches": 1}
    _, policy, value = run(tmp_path, monkeypatch, **more)
    for model in (policy, value):
        assert [update.iteration for update in model.updates] == [0, 1, 2]
        assert all(len(update.minibatch.parts) == ROLLOUTS for update in model.updates)
        assert all(update.loss.keywords["clip"] is None for update in model.updates)


def test_each_iteration_reports_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbered from 1, with its own KL, scores, rate and responses; the policy is exported at the end."""
    settings, policy, _ = run(tmp_path, monkeypatch, drift=0.1)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["episode"] for row in rows] == [6, 12, 18]
    assert [row["lr"] for row in rows] == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    eos = policy.tokenizer.eos_token_id
    for row, ids in zip(rows, policy.rollouts, strict=True):
        expected = written_out(ids, eos, settings, settings.kl.coef)
        assert row["objective/kl"] == pytest.approx(expected.kl, abs=1e-5)
        assert row["objective/scores"] == pytest.approx(sum(3 * math.sin(n + 1.0) for n in range(ROLLOUTS)) / ROLLOUTS)
        assert row["policy/approxkl_first"] == pytest.approx(0.005, abs=1e-6)
        assert row["policy/updates"] == settings.epochs * settings.minibatches
        assert row["score/out_of_range"] == 0.05
        penalty = -settings.kl.coef * expected.kl
        assert row["objective/non_score_reward"] == pytest.approx(penalty, abs=1e-5)
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] + penalty, abs=1e-5)
        lengths = [len(one) for one in expected.gaps]
        assert (row["length/mean"], row["length/max"]) == pytest.approx((sum(lengths) / ROLLOUTS, TIME))
        assert row["val/num_eos_tokens"] == ROLLOUTS - 1
        sequences = Sequences(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
        said, unsure = (of_sequences(sequences, kind).tolist() for kind in (0, 3))
        surprise = -sum(sum(one[:length]) for one, length in zip(said, lengths, strict=True)) / ROLLOUTS
        entropy = 2 + sum(sum(one[:length]) for one, length in zip(unsure, lengths, strict=True)) / sum(lengths)
        assert row["objective/entropy"] == pytest.approx(surprise, abs=1e-5)
        assert row["policy/entropy_avg"] == pytest.approx(entropy, abs=1e-5)
        assert {"time/rollout_s", "time/score_s", "time/train_s", "loss/value_avg", "loss/policy_avg"} <= row.keys()
        assert row["perf/tokens_per_s"] > 0
    samples = [json.loads(line) for line in (tmp_path / "attempt" / "samples.jsonl").read_text().splitlines()]
    watched = [sample for sample in samples if sample.get("watched")]
    looks = [(1, False), (2, False), (3, False), (3, True)]
    assert [(one["step"], one.get("finished", False)) for one in watched[::WATCHED]] == looks
    assert len(watched) == len(looks) * WATCHED
    # No model learns from them, so that their tokens have no advantage.
    assert {len(token) for sample in watched for token in sample["tokens"]} == {2}
    assert {len(sample["tokens"]) for sample in watched} == {TIME}
    assert all(row["time/watched_s"] >= 0 for row in rows)
    assert {sample["score"] for sample in watched} == {-7.0}
    assert {sample["prompt"] for sample in watched} == {f"a film {number}" for number in range(4)}
    samples = [sample for sample in samples if not sample.get("watched")]
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    for number, sample in enumerate(samples[: len(samples) // 3]):
        assert sample["score"] == pytest.approx(3 * math.sin(number + 1.0))
        assert sample["ended"] == (number > 0)
        pieces, drifts, advantages = zip(*sample["tokens"], strict=True)
        assert "".join(pieces) == sample["response"]
        assert {type(value) for value in (*drifts, *advantages)} == {float}
    assert policy.exported == [tmp_path]


def test_watching_changes_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps no samples looks at no prompts, and learns the same."""
    rows: list[Any] = []
    for kept in (0, 8):
        folder = tmp_path / str(kept)
        folder.mkdir()
        run(folder, monkeypatch, drift=0.1, samples_kept=kept)
        rows.append([{name: x for name, x in row.items() if "time" not in name} for row in rows_of(folder)])
        for row in rows[-1]:
            del row["perf/tokens_per_s"]
    assert rows[0] == rows[1]
    assert not (tmp_path / "0" / "attempt" / "samples.jsonl").exists()


def test_the_user_is_told_of_an_alarm_once_and_each_row_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that moves before its first update is one."""
    run(tmp_path, monkeypatch, drift=0.1)
    assert [row["alarm/ratio"] for row in rows_of(tmp_path)] == [1, 1, 1]
    assert "\n".join(AttemptFolder(tmp_path / "attempt").notes()).count("ratio was not 1") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [({"scale": math.nan}, "scores of 6 of 6 responses are not finite numbers"), ({"kl": {"limit": 0.01}}, "drifted")],
)
def test_a_run_that_diverged_stops_before_any_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: str
) -> None:
    """And exports nothing."""
    updates: list[Any] = []
    monkeypatch.setattr(MadeUpPolicy, "update", lambda *given: updates.append(given))
    monkeypatch.setattr(MadeUpValue, "update", lambda *given: updates.append(given))
    monkeypatch.setattr(MadeUpPolicy, "export", lambda *given: updates.append(given))
    with pytest.raises(DivergedError, match=words):
        run(tmp_path, monkeypatch, **more)
    assert not updates


@pytest.mark.parametrize("name", ["logprobs", "reference_logprobs", "values"])
def test_no_update_is_made_of_a_token_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever model gave none; what it gave is named."""

    def broken(sequences: Sequences) -> Tensor:
        return of_sequences(sequences, 0).index_fill(0, torch.tensor([2]), math.nan)

    made_up = {
        "logprobs": (MadeUpPolicy, "logprobs_and_entropies", lambda _, ids: (broken(ids), of_sequences(ids, 3))),
        "reference_logprobs": (MadeUpPolicy, "reference_logprobs", lambda _, ids: broken(ids)),
        "values": (MadeUpValue, "values", lambda _, ids: broken(ids)),
    }
    monkeypatch.setattr(*made_up[name])
    with pytest.raises(DivergedError, match=f"^{name} of 1 of {ROLLOUTS} responses"):
        run(tmp_path, monkeypatch)


def test_responses_that_collapse_to_a_lone_eos_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the iteration in which they do, before it is learned from."""
    monkeypatch.setattr(MadeUpPolicy, "lengths", {1: 1})
    with pytest.raises(DivergedError, match="collapsed"):
        run(tmp_path, monkeypatch)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


def test_responses_that_were_short_from_the_start_are_no_collapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first iteration is what the others are compared with."""
    monkeypatch.setattr(MadeUpPolicy, "lengths", {0: 1, 1: 1, 2: 1})
    run(tmp_path, monkeypatch)
    assert [row["length/mean"] for row in rows_of(tmp_path)] == [1, 1, 1]


def test_alarms_compare_with_the_first_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses that grow to the limit are one, in every iteration in which they are longer than at first."""
    monkeypatch.setattr(MadeUpPolicy, "lengths", {1: TIME, 2: TIME})
    run(tmp_path, monkeypatch)
    assert [row["alarm/length"] for row in rows_of(tmp_path)] == [0, 1, 1]


def test_every_update_has_its_demonstrations_where_they_are_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its number, counted through all iterations, also those that train the value model alone."""
    ptx = {"coef": 0.5, "batch_size": 3, "max_length": 32}
    settings, policy, _ = run(tmp_path, monkeypatch, ptx=ptx, value_warmup=1, seed=3)
    stream = DemonstrationStream(
        tmp_path / "demonstrations" / "train.jsonl",
        policy.tokenizer,
        settings.ptx,
        settings.seed,
        MicroBatch.of(settings),
    )
    for number, update in enumerate(policy.updates, start=settings.epochs * settings.minibatches):
        expected = stream.minibatch(number)
        assert [part.ids.tolist() for part in update.examples.parts] == [part.ids.tolist() for part in expected.parts]


def test_without_a_share_of_demonstrations_none_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are some."""
    _, policy, _ = run(tmp_path, monkeypatch)
    assert {update.examples for update in policy.updates} == {None}


def test_the_final_metrics_are_the_first_and_the_last_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores at first and at last, and how far the policy is from its reference at last; the journal is closed."""
    closed: list[int] = []
    monkeypatch.setattr(Journal, "finish", lambda _: closed.append(len(rows_of(tmp_path))))
    settings, policy, _ = run(tmp_path, monkeypatch, growth=0.5)
    mean = sum(3 * math.sin(number + 1.0) for number in range(ROLLOUTS)) / ROLLOUTS
    last = written_out(policy.rollouts[-1], policy.tokenizer.eos_token_id, settings, settings.kl.coef)
    assert policy.final == {
        "objective/scores_first": pytest.approx(mean, abs=1e-6),
        "objective/scores": pytest.approx(mean + 0.5 * (ITERATIONS - 1), abs=1e-6),
        "objective/kl": pytest.approx(last.kl, abs=1e-5),
    }
    assert closed == [ITERATIONS]
