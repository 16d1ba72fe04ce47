"""Supervised fine-tuning on demonstrations: Ouyang et al. 2022 (arXiv:2203.02155), §3.5, step 1.

In: a base model, demonstrations.  Out: a policy.
The loss is the mean negative log-likelihood of the completions' tokens, EOS included; prompts are read, not learned.
"""

from typing import Any

from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.config.stages import SftSettings
from rlhf.models import kernels
from rlhf.models.folders import loading_options
from rlhf.models.packing import heldout_demonstrations, training_demonstrations
from rlhf.models.text import load_tokenizer
from rlhf.models.tuning import prepared
from rlhf.training import loading, trl_trainers
from rlhf.zero.engine import DTYPES


def run(context: Context[SftSettings]) -> dict[str, float]:
    """Fine-tune the base model; the final metric is ``eval/loss``, nats per held-out completion token.

    Of several tasks there is also ``eval/loss/<task>`` for each.
    """
    context = loading.with_micro_batch(context)
    settings, given, demonstrations = context.settings, context.inputs["base"], context.inputs["demonstrations"]
    base = loading.plain_folder(given, context.folder.policy, settings.precision, scores=False)
    tokenizer = load_tokenizer(base)

    def load() -> Any:
        kernels.fuse(base)
        model = AutoModelForCausalLM.from_pretrained(
            base, **loading_options(settings.tuning, DTYPES[settings.precision])
        )
        return prepared(model, settings.tuning, given, scores=False, seed=settings.seed, fresh_head=True)

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
