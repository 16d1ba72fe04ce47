"""The policy before and after PPO on held-out prompts, by the reward model and by a judge outside of training.

In: both policies, the reward model, held-out prompts, ratings for the judge.  Out: every sample with its scores.
Both policies answer the same prompts with the same random numbers. KL is the mean over responses of the tuned policy of
log π_after(y | x) - log π_before(y | x), an unbiased estimate of KL(after ‖ before) in nats a response.
"""

from rlhf.attempt.context import Context
from rlhf.config.stages import EvaluateSettings
from rlhf.models import evaluation
from rlhf.rl.kl import kl_estimates
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import roll_out
from rlhf.training.loading import load_frozen


def run(context: Context[EvaluateSettings]) -> dict[str, float]:
    """Compare the policies; the final metrics are those of docs/evaluate.md."""
    settings = context.settings
    before, after, reward = load_frozen(context)
    prompts = PromptStream(context.inputs["prompts"] / "heldout.jsonl", before.tokenizer, settings.max_prompt_length)
    batch = prompts.first(settings.prompts)

    context.progress("the policy before", 0, 2)
    old = roll_out(before, batch, settings.seed, settings.sampling.max_new_tokens)
    context.progress("the policy after", 1, 2)
    new = roll_out(after, batch, settings.seed, settings.sampling.max_new_tokens)
    old_scores, new_scores = (reward.score(rollout.prompts, rollout.texts) for rollout in (old, new))
    kl = kl_estimates(after.logprobs(new.sequences), before.logprobs(new.sequences), new.mask).sum(-1)

    metrics = evaluation.before_and_after("score", old_scores.double(), new_scores.double())
    metrics |= {
        "kl/response": kl.mean().item(),
        "length/before": old.mask.sum(-1).float().mean().item(),
        "length/after": new.mask.sum(-1).float().mean().item(),
    } | evaluation.diversity(old.texts, new.texts)
    if settings.judge:
        judge = evaluation.load_judge(context.inputs["judge"])
        metrics |= evaluation.before_and_after("judge", judge.rate(old.texts), judge.rate(new.texts))
    columns = {
        "prompt": batch.prompts,
        "before": old.texts,
        "after": new.texts,
        "score_before": old_scores.tolist(),
        "score_after": new_scores.tolist(),
        "kl": kl.tolist(),
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    evaluation.write_samples(context.output / "samples.jsonl", rows)
    return metrics
