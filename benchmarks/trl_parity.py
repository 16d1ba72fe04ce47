"""Compare ``rlhf.rl`` with TRL 1.12.0's PPOTrainer, number by number: ``python -m benchmarks.trl_parity``.

TRL 1.12.0 is its last release with PPO. The first run makes an environment for it (``.venv-trl``, about 1.5 GB); a run
then takes half a minute on a CPU. :mod:`benchmarks.trl_record` lets the trainer do an iteration twice, with different
settings, and records it. Here our functions get the same tokens, log-probabilities, values and scores. Each row of the
table, Markdown on standard output, holds the largest absolute difference of a quantity over both recordings:

    as defined      between our function and TRL's number
    with TRL's      between our function and TRL's number where ours is given the convention that the row explains

The exit status is 1 if a quantity whose definition is the same differs by more than ``TOLERANCE``, if a quantity that
differs by convention still does so with the convention, or if it no longer differs although the table says so.

    --environment FOLDER    TRL's environment, made if it is not there
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf.rl.advantages import (
    VARIANCE_FLOOR,
    generalised_advantages,
    kl_penalised_rewards,
    masked_moments,
    shaped_scores,
    whiten,
)
from rlhf.rl.kl import kl_estimates, logprobs_and_entropies, logprobs_of
from rlhf.rl.losses import PolicySums, ValueSums, clipped_policy_loss, clipped_value_loss
from rlhf.rl.masks import ended, last_token_mask, masked, masked_mean, response_mask
from rlhf.rl.metrics import rollout_metrics, update_metrics

RELEASE = "1.12.0"
TOLERANCE = 1e-5
CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Comparison:
    """One quantity of one recording."""

    quantity: str
    defined: float
    """Largest absolute difference, by our definition."""
    adjusted: float | None = None
    """The same, with TRL's convention; None where the definitions are the same."""
    why: str = ""
    """Where and why the definitions differ; line numbers are those of TRL's ``trl/experimental/ppo/ppo_trainer.py``."""

    @property
    def fine(self) -> bool:
        """Whether the figures are as the row says."""
        if self.adjusted is None:
            return self.defined <= TOLERANCE
        return self.adjusted <= TOLERANCE < self.defined

    def worst(self, other: "Comparison") -> "Comparison":
        """Merge both recordings into one row."""
        adjusted = None if self.adjusted is None or other.adjusted is None else larger(self.adjusted, other.adjusted)
        return Comparison(self.quantity, larger(self.defined, other.defined), adjusted, self.why)


def larger(first: float, second: float) -> float:
    """Return the larger of two, NaN if either is: Python's max drops a NaN that comes second."""
    return torch.tensor([first, second], dtype=torch.float64).max().item()


def same(quantity: str, ours: Tensor, theirs: Tensor) -> Comparison:
    """Compare where the definitions are the same."""
    return Comparison(quantity, distance(ours, theirs))


def apart(quantity: str, ours: Tensor, theirs: Tensor, adjusted: Tensor, why: str) -> Comparison:
    """Compare where they are not; ``adjusted`` is ours with TRL's convention."""
    return Comparison(quantity, distance(ours, theirs), distance(adjusted, theirs), why)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; shapes must be the same, so that nothing is broadcast unseen."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return (ours.double() - theirs.double()).abs().max().item()


@dataclass(frozen=True)
class Recording:
    """The recording of a case by :mod:`benchmarks.trl_record`: ``[sample, time]`` unless stated otherwise there."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    optimizer_steps: int

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """Read a file."""
        # safe_open is native code without types.
        with cast(Any, safe_open)(path, "pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = {name: json.loads(text) for name, text in file.metadata().items()}
        return cls(tensors, about["settings"], about["metrics"], about["optimizer_steps"])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def mask(self) -> Tensor:
        """Real tokens, by our definition."""
        return response_mask(self["responses"], self.settings["eos_token_id"])

    @property
    def longer(self) -> Tensor:
        """TRL's steps: real tokens and, where a response ended before the limit, one step more."""
        return ~self["padding_mask_p1"]

    @property
    def micro_batches(self) -> int:
        """How many make a minibatch."""
        return self.settings["gradient_accumulation_steps"] // self.settings["num_mini_batches"]


def one_step_later(rewards: Tensor, scores: Tensor, mask: Tensor, longer: Tensor) -> Tensor:
    """Move the scores from the last real token to TRL's last step."""
    scores = scores.unsqueeze(-1).expand(mask.shape)
    return rewards - masked(scores, last_token_mask(mask)) + masked(scores, last_token_mask(longer))


def one_step_sooner(rewards: Tensor, mask: Tensor, longer: Tensor) -> Tensor:
    """Add TRL's reward at its step after the EOS to the last real token instead."""
    after = masked(rewards, longer & ~mask)
    return masked(rewards, mask) + after.roll(-1, dims=1)


def effect_of_last_step(
    rewards: Tensor, values: Tensor, mask: Tensor, longer: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """Return the part of an advantage that TRL's step after the EOS takes, in closed form; 0 without such a step.

    With n real tokens, r_n the reward at the step after them and V_n the value there, at token t:

        (discount * gae_lambda)^(n - 1 - t) * ((1 - discount * gae_lambda) * r_n - discount * (1 - gae_lambda) * V_n)
    """
    after = longer & ~mask
    reward, value = (masked(x, after).sum(-1, keepdim=True) for x in (rewards, values))
    step = (1 - discount * gae_lambda) * reward - discount * (1 - gae_lambda) * value
    away = mask.sum(-1, keepdim=True) - 1 - torch.arange(mask.shape[1])
    return masked((discount * gae_lambda) ** away.clamp(min=0) * step, mask)


def whiten_unbiased(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Our whitening, with the variance's denominator one less."""
    moments = masked_moments(values, mask)
    count, total, squares = moments.unbind()
    mean = total / count
    variance = squares / count - mean.square()
    scale = ((variance + VARIANCE_FLOOR) / (variance * count / (count - 1) + VARIANCE_FLOOR)).sqrt()
    whitened = whiten(values, mask, moments) * scale
    return masked(whitened if shift_mean else whitened + mean, mask)


UNBIASED = "TRL's variance is divided by n - 1 (l. 250 to 260), ours by n."
MEANS = "Mean over real tokens here; TRL's is over padding too"


def of_rollout(recorded: Recording) -> Iterator[Comparison]:
    """Compare masks, scores, log-probabilities, rewards, advantages, returns."""
    settings, mask, longer = recorded.settings, recorded.mask, recorded.longer
    responses, eos, temperature = recorded["responses"], settings["eos_token_id"], settings["temperature"]
    logprobs, reference, values = recorded["logprobs"], recorded["ref_logprobs"], recorded["values"]
    yield same("real tokens", mask.float(), (~recorded["padding_mask"]).float())
    yield same("which responses ended", ended(responses, eos).float(), recorded["contain_eos"].float())

    scores = shaped(recorded)
    yield same("scores after the EOS penalty", scores, recorded["scores"])
    again = logprobs_of(recorded["reference_logits"], responses, temperature)
    yield same("reference log-probabilities, of its logits", again[mask], reference[mask])
    rows = recorded["micro/rows"][: settings["gradient_accumulation_steps"]].flatten()
    first = recorded["micro/logits"][: settings["gradient_accumulation_steps"]].flatten(0, 1)
    again = logprobs_of(first, responses[rows], temperature)
    yield same("old log-probabilities, from the training pass", again[mask[rows]], logprobs[rows][mask[rows]])

    rewards = kl_penalised_rewards(scores, logprobs, reference, mask, settings["kl_coef"], settings["kl_estimator"])
    later = one_step_later(rewards, scores, mask, longer)
    why = "TRL pays the score one step after the EOS where there is room (l. 778, 779), here at the EOS."
    yield apart("rewards", rewards, recorded.tensors.get("rewards_before", recorded["rewards"]), later, why)
    if settings["whiten_rewards"]:
        rewards = whiten(rewards, mask, masked_moments(rewards, mask), shift_mean=False)
        later = whiten_unbiased(later, longer, shift_mean=False)
        why = f"The step after the EOS counts as a token (l. 783). {UNBIASED}"
        yield apart("whitened rewards", rewards, recorded["rewards"], later, why)

    discount, gae_lambda = settings["gamma"], settings["lam"]
    theirs, before = recorded["rewards"], recorded["advantages_before"]
    over_steps, returns = generalised_advantages(theirs, values, longer, discount, gae_lambda)
    yield same("advantages, over TRL's steps and of its rewards", over_steps, before)
    yield same("returns, over TRL's steps and of its rewards", returns, recorded["returns"])

    sooner = one_step_sooner(theirs, mask, longer)
    advantages, returns = generalised_advantages(sooner, values, mask, discount, gae_lambda)
    effect = effect_of_last_step(theirs, values, mask, longer, discount, gae_lambda)
    why = (
        "TRL's episode has a step after the EOS, with a value V_n (l. 768, 769, 791). By it the two differ at token t "
        "of n by (γλ)^(n-1-t) ((1 - γλ) score - γ (1 - λ) V_n), so by nothing where γ = λ = 1."
    )
    yield apart("advantages, of the same rewards", advantages, masked(before, mask), advantages - effect, why)
    yield apart(
        "returns, of the same rewards", returns, masked(recorded["returns"], mask), returns - effect, "The same."
    )

    whitened = masked(recorded["advantages_whitened"], mask)
    ours = whiten(before, mask, masked_moments(before, mask))
    why = f"{UNBIASED} And TRL's moments are each rank's own, ours those of all ranks (l. 797; one rank here)."
    yield apart("whitened advantages, of the same advantages", ours, whitened, whiten_unbiased(before, mask), why)

    advantages, _ = generalised_advantages(rewards, values, mask, discount, gae_lambda)
    ours = whiten(advantages, mask, masked_moments(advantages, mask))
    advantages, _ = generalised_advantages(later, values, longer, discount, gae_lambda)
    why = "All of the above together: from log-probabilities, values and scores on."
    adjusted = whiten_unbiased(advantages, mask)
    yield apart("whitened advantages, from the start", ours, whitened, adjusted, why)


def shaped(recorded: Recording) -> Tensor:
    """Our scores, with the punishment for a missing EOS."""
    return shaped_scores(
        recorded["raw_scores"],
        ended(recorded["responses"], recorded.settings["eos_token_id"]),
        clip=None,
        missing_eos_penalty=recorded.settings["missing_eos_penalty"],
        missing_eos_score=None,
    )


@dataclass(frozen=True)
class Part:
    """Our losses on a selection of rows, at the log-probabilities and values that the trainer had then."""

    policy_loss: Tensor
    policy_gradient: Tensor
    """Times the number of tokens: of the order of 1."""
    policy: PolicySums
    value_loss: Tensor
    value_gradient: Tensor
    value: ValueSums
    logprobs: Tensor
    """Of the recorded logits."""
    entropies: Tensor
    mask: Tensor

    @classmethod
    def of(cls, recorded: Recording, micro: slice, *, value_mask: Tensor) -> "Part":
        """Compute them on a slice of the micro batches.

        value_mask  ``[sample, time]`` of the iteration: the steps on which the value model is trained
        """
        settings = recorded.settings
        rows = recorded["micro/rows"][micro].flatten()
        mask, steps, responses = recorded.mask[rows], value_mask[rows], recorded["responses"][rows]
        logits = recorded["micro/logits"][micro].flatten(0, 1)
        logprobs = recorded["micro/logprobs"][micro].flatten(0, 1).requires_grad_()
        values = recorded["micro/values"][micro].flatten(0, 1).requires_grad_()
        again, entropies = logprobs_and_entropies(logits, responses, settings["temperature"])
        policy_loss, policy = clipped_policy_loss(
            logprobs,
            entropies,
            recorded["logprobs"][rows],
            recorded["ref_logprobs"][rows],
            recorded["advantages_whitened"][rows],
            mask,
            clip=settings["cliprange"],
            num_tokens=mask.sum(),
        )
        value_loss, value = clipped_value_loss(
            values,
            recorded["values"][rows],
            recorded["returns"][rows],
            steps,
            clip=settings["cliprange_value"],
            num_tokens=steps.sum(),
        )
        (policy_gradient,) = torch.autograd.grad(policy_loss, logprobs)
        (value_gradient,) = torch.autograd.grad(value_loss, values)
        return cls(
            policy_loss.detach(),
            policy_gradient * mask.sum(),
            policy,
            value_loss.detach(),
            value_gradient * steps.sum(),
            value,
            again,
            entropies,
            mask,
        )

    @property
    def padding(self) -> Tensor:
        """How many positions are padding."""
        return (~self.mask).sum()


def of_updates(recorded: Recording) -> Iterator[Comparison]:
    """Compare losses, their gradients and metrics, on every micro batch of every epoch."""
    settings, size = recorded.settings, recorded.micro_batches
    count = len(recorded["micro/rows"])
    parts = [Part.of(recorded, slice(i, i + 1), value_mask=recorded.longer) for i in range(count)]
    tokens = torch.stack([part.mask.sum() for part in parts])
    steps = recorded.longer[recorded["micro/rows"]].sum((1, 2))
    masks = recorded.mask[recorded["micro/rows"]]

    def ours(name: str) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts])

    def sums(which: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(part, which), name) for part in parts])

    # Accelerate divides every micro batch's loss by this.
    scale = settings["gradient_accumulation_steps"]
    yield same("log-probabilities, of its logits", ours("logprobs")[masks], recorded["micro/logprobs"][masks])
    yield same("policy loss of a micro batch", ours("policy_loss"), recorded["micro/policy_loss"])
    gradient = recorded["micro/logprobs_gradient"] * scale * tokens[:, None, None]
    yield same("its gradient in the log-probabilities, × tokens", ours("policy_gradient"), gradient)
    fraction = sums("policy", "clip_fraction")
    yield same("share of tokens that the policy's clip holds", fraction, recorded["micro/policy_clip_fraction"])
    yield same("value loss, over TRL's steps", ours("value_loss"), recorded["micro/value_loss"])
    gradient = recorded["micro/values_gradient"] * scale * steps[:, None, None] / settings["vf_coef"]
    yield same("its gradient in the values, × steps", ours("value_gradient"), gradient)
    fraction = sums("value", "clip_fraction")
    yield same("share of steps that the value clip holds", fraction, recorded["micro/value_clip_fraction"])

    real = [Part.of(recorded, slice(i, i + 1), value_mask=recorded.mask) for i in range(count)]
    only_real = torch.stack([part.value_loss for part in real])
    why = "TRL trains the value after the EOS too, on the score (l. 837)."
    theirs = recorded["micro/value_loss"]
    yield apart("value loss, of the same returns", only_real, theirs, ours("value_loss"), why)

    minibatches = [Part.of(recorded, slice(i, i + size), value_mask=recorded.longer) for i in range(0, count, size)]
    why = (
        f"Of {size} micro batches. All tokens of a minibatch count alike here; TRL averages means of micro batches, so "
        "a token counts more among short responses (l. 837, 846)."
    )
    for which in ("policy", "value"):
        whole = torch.stack([getattr(part, f"{which}_loss") for part in minibatches])
        theirs = recorded[f"micro/{which}_loss"].view(-1, size).mean(1)
        yield apart(f"{which} loss of a minibatch", whole, theirs, ours(f"{which}_loss").view(-1, size).mean(1), why)

    def stats(name: str) -> Tensor:
        return recorded[f"stats/{name}"][..., :size].flatten()

    positions = tokens + ours("padding")
    kl, ratio = sums("policy", "approximate_kl"), sums("policy", "mean_ratio")
    entropy = torch.stack([masked_mean(part.entropies, part.mask) for part in parts])
    padded_kl, padded_ratio = kl * tokens / positions, (ratio * tokens + ours("padding")) / positions
    padded_entropy = ours("entropies").mean((1, 2))
    yield apart(
        "approximate KL of a micro batch", kl, stats("approxkl"), padded_kl, MEANS + ", where it is 0 (l. 857)."
    )
    yield apart("mean ratio of a micro batch", ratio, stats("ratio"), padded_ratio, MEANS + ", where it is 1 (l. 868).")
    why = MEANS + ", where logits mean nothing (l. 867)."
    yield apart("entropy of a micro batch", entropy, stats("entropy"), padded_entropy, why)

    mine = update_metrics([part.policy for part in real], [part.value for part in real])
    averaged = {
        "loss/policy_avg": ours("policy_loss"),
        "policy/clipfrac_avg": sums("policy", "clip_fraction"),
        "policy/approxkl_avg": padded_kl,
        "loss/value_avg": ours("value_loss"),
        "val/clipfrac_avg": sums("value", "clip_fraction"),
        "val/ratio": padded_ratio,
    }
    why = (
        "Beside the above, TRL averages over entries that it never fills (l. 631, 897 to 903): its figure is too small "
        f"by a factor of `num_mini_batches`, here {settings['num_mini_batches']}."
    )
    unfilled = settings["num_mini_batches"]
    for name, values in averaged.items():
        theirs, adjusted = torch.tensor(recorded.metrics[name]), values.mean() / unfilled
        yield apart(f"`{name}`", torch.tensor(mine[name]), theirs, adjusted, why)
        why = "The same."
    filled = torch.cat([padded_ratio, torch.zeros(count * (unfilled - 1))])
    why = "Variance over tokens here; TRL's is that of means of micro batches, unfilled zeros included (l. 904)."
    theirs = torch.tensor(recorded.metrics["val/ratio_var"])
    yield apart("`val/ratio_var`", torch.tensor(mine["val/ratio_var"]), theirs, filled.var(), why)
    why = (
        "One a minibatch here. TRL accumulates over `gradient_accumulation_steps` micro batches (l. 460, 810), which "
        "are the whole batch: one an epoch, however many minibatches."
    )
    updates = torch.tensor(float(settings["num_ppo_epochs"] * settings["num_mini_batches"]))
    theirs = torch.tensor(float(recorded.optimizer_steps))
    yield apart("optimiser steps of an iteration", updates, theirs, updates / settings["num_mini_batches"], why)


def of_metrics(recorded: Recording) -> Iterator[Comparison]:
    """Compare the metrics of responses before they are trained on."""
    settings, mask = recorded.settings, recorded.mask
    responses, eos, estimator = recorded["responses"], settings["eos_token_id"], settings["kl_estimator"]
    logprobs, reference = recorded["logprobs"], recorded["ref_logprobs"]
    ours = rollout_metrics(
        recorded["raw_scores"],
        ended(responses, eos),
        logprobs,
        reference,
        torch.zeros_like(logprobs),
        mask,
        settings["kl_coef"],
        estimator,
    )
    kl = kl_estimates(logprobs, reference, mask, estimator).sum(-1).mean()
    score = shaped(recorded).mean()
    adjusted = {
        "objective/kl": (
            kl,
            "k1 here, whatever the penalty is; TRL's is the penalty's estimate, here k3 (l. 774, 882).",
        ),
        "objective/scores": (score, "Before the EOS penalty here; after it in TRL (l. 759, 896)."),
        "objective/rlhf_reward": (score - settings["kl_coef"] * kl, "The same (l. 886)."),
        "val/num_eos_tokens": (
            (responses == eos).sum().float(),
            "Responses here; TRL counts tokens, and its generation may fill up with EOS (l. 905).",
        ),
    }
    for name in ("objective/entropy", "objective/non_score_reward"):
        yield same(f"`{name}`", torch.tensor(ours[name]), torch.tensor(recorded.metrics[name]))
    for name, (value, why) in adjusted.items():
        yield apart(f"`{name}`", torch.tensor(ours[name]), torch.tensor(recorded.metrics[name]), value, why)


def make_environment(folder: Path) -> Path:
    """Make TRL's environment, unless it is there; return its interpreter."""
    python, ready = folder / "bin" / "python", folder / "ready"
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    # The versions of our own environment, so that TRL's release is all that differs.
    constraints = "\n".join(line for line in lines if not line.startswith("trl==")) + "\n"
    if ready.exists() and ready.read_text() == constraints:
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "constraints.txt").write_text(constraints)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Torch first and alone, so that nothing that needs "some torch" pulls in another build.
    for package in ("torch", f"trl=={RELEASE}"):
        subprocess.run([*install, "--constraint", folder / "constraints.txt", package], check=True, stdout=sys.stderr)
    ready.write_text(constraints)
    return python


def record(python: Path) -> list[Recording]:
    """Run the trainer and read its recordings."""
    with TemporaryDirectory() as folder:
        script = Path(__file__).with_name("trl_record.py")
        done = subprocess.run([python, script, folder], check=False, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise SystemExit(f"error: {script.name} failed:\n{done.stderr}")
        return [Recording.read(path) for path in sorted(Path(folder).glob("*.safetensors"), reverse=True)]


def compare(recordings: Sequence[Recording]) -> list[Comparison]:
    """Return a row for each quantity, with its largest differences, in the order of the recordings."""
    rows: dict[str, Comparison] = {}
    for recorded in recordings:
        for part in (of_rollout, of_updates, of_metrics):
            for row in part(recorded):
                rows[row.quantity] = rows[row.quantity].worst(row) if row.quantity in rows else row
    return list(rows.values())


def table(rows: Sequence[Comparison]) -> str:
    """Return Markdown: quantities that are defined alike, then the others."""
    alike = [row for row in rows if row.adjusted is None]
    lines = ["| defined alike | largest difference | |", "| --- | --- | --- |"]
    lines += [f"| {row.quantity} | {figure(row.defined)} | {verdict(row)} |" for row in alike]
    lines += [
        "",
        "| defined otherwise | as defined | with TRL's | | where and why |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.quantity} | {figure(row.defined)} | {figure(row.adjusted)} | {verdict(row)} | {row.why} |"
        for row in rows
        if row.adjusted is not None
    ]
    return "\n".join(lines)


def figure(difference: float) -> str:
    """Two digits."""
    return f"{difference:.2g}"


def verdict(row: Comparison) -> str:
    """Return whether the figures are as the row says."""
    if not row.fine:
        return "**NOT AS SAID**"
    return "agrees" if row.adjusted is None else "explained"


def exercised(recordings: Sequence[Recording]) -> str:
    """Describe the recordings, and refuse them where they prove too little.

    Raises:
        SystemExit: a clip never bites, or no response ended early, or every one ended.
    """
    lines: list[str] = []
    for recorded in recordings:
        lengths, limit = recorded.mask.sum(-1), recorded.mask.shape[1]
        cut_off = int((~recorded["contain_eos"]).sum())
        early = int((lengths < limit).sum())
        at_limit = len(lengths) - cut_off - early
        last = recorded.settings["gradient_accumulation_steps"]
        policy, value = (recorded[f"micro/{name}_clip_fraction"][-last:].mean().item() for name in ("policy", "value"))
        if not (cut_off and early and 0 < policy < 1 and 0 < value < 1):
            raise SystemExit("error: the recording exercises too little; next: change the seed or learning rate of it")
        lines.append(
            f"{len(lengths)} responses: {early} ended before the limit of {limit} tokens, {at_limit} at it, {cut_off} "
            f"did not. In the last epoch the policy's clip holds {policy:.0%} of tokens, the value's {value:.0%}."
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--environment", type=Path, default=CHECKOUT / ".venv-trl", metavar="FOLDER")
    options = parser.parse_args()
    recordings = record(make_environment(options.environment.absolute()))
    print(exercised(recordings), file=sys.stderr)
    rows = compare(recordings)
    print(table(rows))
    wrong = [row.quantity for row in rows if not row.fine]
    print(f"{len(rows) - len(wrong)} of {len(rows)} as said", *wrong, sep="\n  ", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
