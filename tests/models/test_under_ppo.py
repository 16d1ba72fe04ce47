"""Policy and value model as PPO has them, in a group of one, against transformers alone."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import Precision
from rlhf.config.tuning import FULL, LoraTuning, Tuning
from rlhf.models import folders, text, tuning
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward
from rlhf.rl.losses import ValueSums, clipped_policy_loss, clipped_value_loss
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.rollout.sequences import Experience, Sequences, lay_out, minibatch_of
from rlhf.training.learner import Optimiser, TrainedValue
from rlhf.training.loading import load_models, plain_folder
from rlhf.training.policy import FrozenPolicy, TrainedPolicy
from rlhf.zero.engine import whole_weights

pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group"),
]

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[40, 41], [42, 43, 44, 3], [45]]
LOSS = partial(clipped_policy_loss, clip=0.2)


def policy_of(
    tiny: Path,
    temperature: float = 1.0,
    precision: Precision = "fp32",
    method: Tuning = FULL,
    **more: Any,
) -> TrainedPolicy:
    optimiser = Optimiser("policy", learning_rate=0.01, max_grad_norm=1.0)
    return TrainedPolicy.load_folder(
        tiny, precision, temperature, MicroBatch(2), method=method, source=tiny, seed=0, optimiser=optimiser, **more
    )


def sequences() -> Sequences:
    return lay_out(PROMPTS, RESPONSES, pad=0)


def weights_of(trained: Any) -> dict[str, Tensor]:
    """By the names that its file has."""
    weights = whole_weights(trained.engine.module, trained_only=False)
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def experience(policy: TrainedPolicy, advantage: float) -> Experience:
    batch = sequences()
    logprobs = policy.logprobs(batch)
    zeros = torch.zeros_like(logprobs)
    return Experience.of(
        batch, logprobs=logprobs, reference_logprobs=logprobs, values=zeros, advantages=zeros + advantage, returns=zeros
    )


def test_every_log_probability_is_at_the_temperature_of_the_sampling(tiny: Path) -> None:
    """The policy's and the reference's, each token's by transformers alone on its row alone, over real tokens."""
    policy = policy_of(tiny, temperature=0.7)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokens = len(policy.tokenizer)
    assert tokens < model.config.vocab_size
    found = policy.logprobs(sequences())
    torch.testing.assert_close(policy.reference_logprobs(sequences()), found)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :tokens].double() / 0.7
        expected = logits.log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(found[row, : len(response)].double(), expected, atol=1e-4, rtol=0)


def test_demonstrations_pull_the_policy_where_nothing_else_does(tiny: Path) -> None:
    """Advantages of 0 leave it where it is; demonstrations grow likelier, and it says how likely they were."""
    policy = policy_of(tiny, ptx_coef=0.5)
    start = weights_of(policy)
    still = minibatch_of(experience(policy, 0.0), [0, 1, 2], MicroBatch(2))
    policy.update(still, LOSS, 0.01)
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(policy).items())

    def likelihood() -> float:
        return float(policy.logprobs(sequences())[sequences().mask].mean())

    before = likelihood()
    sums = policy.update(still, LOSS, 0.01, minibatch_of(sequences(), [0, 1, 2], MicroBatch(2)))
    assert sums.demonstrations.item() == pytest.approx(-before, abs=1e-4)
    assert likelihood() > before + 0.01


def test_what_is_exported_is_the_average_of_what_was(tiny: Path, tmp_path: Path) -> None:
    """decay · average + (1 - decay) · weights after every update, from the first weights on."""
    policy = policy_of(tiny, average_decay=0.6)
    average = weights_of(policy)
    for _ in range(3):
        policy.update(minibatch_of(experience(policy, 1.0), [0, 1, 2], MicroBatch(2)), LOSS, 0.01)
        average = {name: 0.6 * average[name] + 0.4 * weight for name, weight in weights_of(policy).items()}
    policy.export(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in exported.items():
        torch.testing.assert_close(weight, average[name], atol=1e-6, rtol=1e-5)
    last = weights_of(policy)
    assert max(float((weight - last[name]).abs().max()) for name, weight in exported.items()) > 1e-4


@pytest.mark.parametrize("value_init", ["reward", "policy"])
def test_the_value_model_starts_from_the_weights_asked_for(tiny: Path, tmp_path: Path, value_init: str) -> None:
    """Its body is the reward model's or the policy's; its head is neither's."""
    reward = tmp_path / "reward"
    shutil.copytree(tiny, reward)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    entries = {"score_mean": 0.0, "score_std": 1.0, "sees": "response", "score_max_length": 32}
    for name, entry in entries.items():
        setattr(model.config, name, entry)
    model.save_pretrained(reward)
    settings = PpoSettings.model_validate({"value_init": value_init, "rollouts": 2, "micro_batch_size": 2})
    inputs = {"policy": tiny, "reward": reward}
    _, value, _ = load_models(Context("ppo", "key", settings, inputs, tmp_path, tmp_path, tmp_path))
    found = weights_of(value)
    sources = load_file((reward if value_init == "reward" else tiny) / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(found[name], sources[name])
    assert not torch.equal(found["score.weight"], load_file(reward / "model.safetensors")["score.weight"])


LORA = LoraTuning(rank=4, alpha=8.0)


@pytest.mark.parametrize("method", [FULL, LoraTuning(rank=4, alpha=8.0, dropout=0.5)], ids=["full", "adapter"])
def test_the_value_model_moves_from_its_old_values_towards_the_returns(
    tiny: Path, tmp_path: Path, method: Tuning
) -> None:
    """Before each token of a response a value, by transformers alone; never one that dropout changed."""

    def value_of(seed: int) -> TrainedValue:
        return TrainedValue.load_folder(
            tiny,
            "fp32",
            MicroBatch(2),
            method=method,
            source=tiny,
            seed=seed,
            optimiser=Optimiser("value model", learning_rate=0.01, max_grad_norm=1.0),
        )

    def head_of(value: TrainedValue) -> Tensor:
        # An adapter keeps what the head was beside what it becomes.
        [*_, head] = [weight for name, weight in weights_of(value).items() if "score" in name and "lora" not in name]
        return head

    value, batch = value_of(0), sequences()
    head = head_of(value)
    assert torch.equal(head_of(value_of(0)), head)
    assert not torch.equal(head_of(value_of(1)), head)
    body: Any = AutoModelForCausalLM.from_pretrained(tiny).model.eval()
    values = value.values(batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            states = body(torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(values[row, : len(response)], (states @ head.T).squeeze(-1), atol=1e-4, rtol=1e-4)

    zeros = torch.zeros_like(values)
    wanted = values + torch.arange(1.0, values.shape[1] + 1)
    minibatch = minibatch_of(
        Experience.of(batch, logprobs=zeros, reference_logprobs=zeros, values=values, advantages=zeros, returns=wanted),
        [0, 1, 2],
        MicroBatch(2),
    )
    real = batch.mask
    errors: list[float] = []
    kept = values
    for number in range(3):
        expected = value.values(batch)
        seen: list[tuple[Tensor, ...]] = []

        def loss(*given: Tensor, num_tokens: int, seen: list[tuple[Tensor, ...]] = seen) -> tuple[Tensor, ValueSums]:
            assert num_tokens == int(real.sum())
            seen.append(given)
            return clipped_value_loss(*given, clip=None, num_tokens=num_tokens)

        sums = value.update(minibatch, loss, 0.003)
        # Micro batches are padded no further than they need: of each row the real tokens are compared.
        now, old, returns = (torch.cat([given[place][given[3]] for given in seen]) for place in range(3))
        torch.testing.assert_close(now.detach(), expected[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(old, values[real])
        assert torch.equal(returns, wanted[real])
        errors.append(float((expected - wanted)[real].square().mean()))
        assert sums.mean_loss.item() == pytest.approx(errors[-1] / 2, rel=1e-4)
        if number == 1:
            value.save(tmp_path / "checkpoint")
            kept = value.values(batch)
    assert errors[2] < 0.95 * errors[0]
    assert not torch.equal(value.values(batch), kept)
    value.load(tmp_path / "checkpoint")
    assert torch.equal(value.values(batch), kept)


def sampled(policy: FrozenPolicy | TrainedPolicy) -> Rollout:
    return roll_out(policy, PromptBatch(["a"] * 12, PROMPTS * 4, list(range(12))), 0, 8)


def divergence(policy: FrozenPolicy | TrainedPolicy, other: FrozenPolicy | TrainedPolicy, rollout: Rollout) -> float:
    """Root mean square difference of log-probabilities, nats a token."""
    gaps = policy.logprobs(rollout.sequences) - other.logprobs(rollout.sequences)
    return float(gaps[rollout.mask].square().mean().sqrt())


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_in_bf16_what_samples_and_what_is_evaluated_is_what_is_trained(tiny: Path, tmp_path: Path, form: str) -> None:
    """Updates too small for the weights of a base in bf16 reach the sampler, and whoever reads the exported adapter."""
    policy = policy_of(tiny, precision="bf16", method=LORA if form == "adapter" else FULL)
    start = policy_of(tiny, precision="bf16")
    for _ in range(4):
        policy.update(minibatch_of(experience(policy, 1.0), [0, 1, 2], MicroBatch(2)), LOSS, 4e-4)
    rollout = sampled(policy)
    gap = (rollout.logprobs - policy.logprobs(rollout.sequences))[rollout.mask]
    moved = divergence(policy, start, rollout)
    assert moved > 0.02
    assert gap.abs().mean() < moved / 10  # one token's may be as large, by bf16's rounding
    policy.export(tmp_path / "out")
    exported = FrozenPolicy(tmp_path / "out", "bf16", 1.0, MicroBatch(2))
    assert divergence(exported, policy, rollout) < moved / 30
    assert torch.equal(sampled(exported).sequences.ids, rollout.sequences.ids)
    if form == "adapter":
        # Otherwise the updates were no test.
        folders.write_plain(tmp_path / "out", tmp_path / "folded", scores=False, dtype=torch.bfloat16)
        assert divergence(FrozenPolicy(tmp_path / "folded", "bf16", 1.0, MicroBatch(2)), policy, rollout) > moved / 5


@pytest.mark.parametrize("fp32_head", [True, False])
def test_the_sampler_and_every_log_probability_have_the_head_asked_for(tiny: Path, fp32_head: bool) -> None:
    """In bf16 too the logits are fp32's products of the last layer's states, or bf16's where that is asked for."""
    policy = policy_of(tiny, precision="bf16", fp32_head=fp32_head)
    rollout = sampled(policy)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    tokens = len(policy.tokenizer)
    for found in (rollout.logprobs, policy.logprobs(rollout.sequences), policy.reference_logprobs(rollout.sequences)):
        gaps: list[Tensor] = []
        for row, ids in enumerate(rollout.sequences.ids):
            real = ids[rollout.sequences.attention_mask[row].bool()]
            response = real[-int(rollout.mask[row].sum()) :]
            with torch.no_grad():
                states = model.model(real[None]).last_hidden_state[0, -len(response) - 1 : -1]
                logits = (states.float() @ model.lm_head.weight.float().T)[:, :tokens]
            expected = logits.log_softmax(-1)[range(len(response)), response]
            gaps.append((found[row, : len(response)] - expected).abs())
        # The states before the head are bf16's, and many differ by a step between a batch and a row alone.
        same = (torch.cat(gaps) < 1e-5).double().mean()
        assert same > 0.2 if fp32_head else same < 0.05


NORMALISER = {"score_mean": 0.5, "score_std": 2.0, "sees": "response", "score_max_length": 32}


def reward_adapter(tiny: Path, folder: Path) -> Path:
    """A reward model in bf16: an adapter whose part in each weight is below a step of bf16."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.bfloat16)
    model = tuning.prepared(base, LORA, tiny, scores=True, seed=0)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in trained.items():
            weight += (0.002 if "lora" in name else 1.0) * torch.randn(weight.shape)
    weights = {name: weight.detach().clone() for name, weight in trained.items()}
    tuning.save(model, weights, tiny, folder, LORA, scores=True, config=NORMALISER)
    return folder


def test_an_adapter_scores_beside_its_base_and_is_folded_in_fp32_where_training_starts(
    tiny: Path, tmp_path: Path
) -> None:
    """The reward model is the one that was trained; the value model's first weights are the nearest to it in bf16."""
    folder = reward_adapter(tiny, tmp_path / "reward")
    texts = ["a film", "the joy of two halves", "dull , dull"]
    beside = FrozenReward(folder, "bf16", MicroBatch(2))
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.bfloat16)
    trained: Any = PeftModel.from_pretrained(plain, str(folder), autocast_adapter_dtype=False).eval().get_base_model()
    rows = [text.scored_ids(beside.tokenizer, None, one, 32) for one in texts]
    with torch.no_grad():
        hidden = [trained.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        expected = (torch.cat([trained.score(state).float() for state in hidden]) - 0.5) / 2
    torch.testing.assert_close(beside.score(["", "", ""], texts), expected, atol=0.01, rtol=0.005)

    start = plain_folder(folder, tmp_path / "start", "bf16", scores=True)
    found, base = (load_file(one / "model.safetensors") for one in (start, tiny))
    folded = folders.load_whole(folder, scores=True, dtype=torch.float32).state_dict()
    for name, weight in found.items():
        assert torch.equal(weight, folded[name].bfloat16())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < (found[name] != base[name].bfloat16()).double().mean() < 0.9
