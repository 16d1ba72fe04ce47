"""Collect: responses of one model or several to the same prompts, to be compared.

In: the models, prompts.
Out: ``train.jsonl`` and ``heldout.jsonl``, rows ``{"prompt", "responses", "models"}``.

All models answer the same prompts, each response with random numbers of its own, so that neither the order of sampling
nor the number of ranks changes a response, but for rounding in bf16 (docs/ppo.md). Left out: choosing prompts by the
models' uncertainty.
"""

from rlhf.attempt.context import Context
from rlhf.collect.written import Written
from rlhf.config.collect import CollectSettings
from rlhf.data.records import ResponseSet
from rlhf.rollout.prompts import draw, prompt_batch, read_prompts
from rlhf.rollout.rollout import roll_out
from rlhf.training.loading import load_writer


def run(context: Context[CollectSettings]) -> dict[str, float]:
    """Write the sets; final metrics: ``sets``, ``responses`` and ``repeated``, the share of repeated responses."""
    settings, folder = context.settings, context.inputs["prompts"]
    train = draw(read_prompts(folder / "train.jsonl"), settings.prompts, settings.seed)
    prompts = [*train, *read_prompts(folder / "heldout.jsonl")[: settings.prompts_heldout]]
    models = [writer.shown for writer in settings.models for _ in range(writer.responses)]
    total = len(models) * len(prompts)
    written = Written(context)

    end = 0
    for writer in settings.models:
        # Sample s is response s // len(prompts) to prompt s % len(prompts).
        start, end = end, end + writer.responses * len(prompts)
        if len(written.texts) >= end:
            continue
        context.progress(f"loading {writer.shown}", start, total)
        policy = load_writer(context, writer)
        for samples in written.left(range(start, end), settings.micro_batch_size):
            answered = [prompts[sample % len(prompts)] for sample in samples]
            batch = prompt_batch(answered, samples, policy.tokenizer, settings.max_prompt_length)
            written.add(roll_out(policy, batch, settings.seed, settings.max_new_tokens).texts)
            context.progress(f"{writer.shown}: response {samples.stop} of {total}", samples.stop, total)

    sets: list[ResponseSet] = []
    for number, prompt in enumerate(prompts):
        responses = written.texts[number :: len(prompts)]
        sets.append(ResponseSet.model_validate({"prompt": prompt, "responses": responses, "models": models}))
    written.write("train.jsonl", sets[: len(train)])
    written.write("heldout.jsonl", sets[len(train) :])
    distinct = sum(len(set(row.responses)) for row in sets)
    return {"sets": len(sets), "responses": total, "repeated": 1 - distinct / total}
