"""Supervised fine-tuning on demonstrations: Ouyang et al. 2022 (arXiv:2203.02155), §3.5, step 1.

In: a base model, demonstrations.  Out: a policy.
The loss is the mean negative log-likelihood of the completions' tokens, EOS included; prompts are read, not learned.
"""

from rlhf.attempt.context import Context
from rlhf.config.stages import SftSettings
from rlhf.models.packing import heldout_demonstrations, training_demonstrations
from rlhf.training import loading, trl_trainers


def run(context: Context[SftSettings]) -> dict[str, float]:
    """Fine-tune the base model; the final metric is ``eval/loss``, nats per held-out completion token.

    Of several tasks there is also ``eval/loss/<task>`` for each.
    """
    context = loading.with_micro_batch(context)
    settings, demonstrations = context.settings, context.inputs["demonstrations"]
    base, tokenizer, load = loading.language_model(context, context.inputs["base"], fresh_head=True)
    trainer = trl_trainers.sft_trainer(
        context,
        load,
        tokenizer,
        training_demonstrations(demonstrations / "train.jsonl", tokenizer, settings.seed),
        heldout_demonstrations(demonstrations / "heldout.jsonl", tokenizer),
    )
    trl_trainers.train(trainer, context)
    losses = trl_trainers.heldout_losses(trainer, settings.micro_batch)
    trl_trainers.export(trainer, base, context, scores=False)
    return losses
