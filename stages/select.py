"""Select: of several responses to a prompt the best by the rewards, as a demonstration to be imitated.

In: sets of responses, a reward model.
Out: ``train.jsonl`` and ``heldout.jsonl``, demonstrations.

An ``sft`` instance that learns them is rejection-sampling fine-tuning (Touvron et al. 2023, arXiv:2307.09288, §3.2.3).
"""

from rlhf.attempt.context import Context
from rlhf.config.collect import SelectSettings
from rlhf.data.records import Demonstration, ResponseSet, read_jsonl, write_jsonl
from rlhf.models.micro_batches import MicroBatch
from rlhf.training.loading import load_rewards
from rlhf.zero import group


def run(context: Context[SelectSettings]) -> dict[str, float]:
    """Write a demonstration for each set; final metrics: ``sets``, and the mean scores of the best and of all."""
    folder = context.inputs["responses"]
    parts = {part: list(read_jsonl(folder / f"{part}.jsonl", ResponseSet)) for part in ("train", "heldout")}
    reward = load_rewards(context, MicroBatch(context.settings.micro_batch_size))
    sets = [row for rows in parts.values() for row in rows]
    prompts = [prompt for row in sets for prompt in [row.model_dump()["prompt"]] * len(row.responses)]
    scores = reward.score(prompts, [response for row in sets for response in row.responses])

    of_sets = scores.split([len(row.responses) for row in sets])
    best = [int(of_set.argmax()) for of_set in of_sets]
    chosen = [
        Demonstration(prompt=row.prompt, completion=row.responses[place]) for row, place in zip(sets, best, strict=True)
    ]
    if group.is_main():
        write_jsonl(context.output / "train.jsonl", chosen[: len(parts["train"])])
        write_jsonl(context.output / "heldout.jsonl", chosen[len(parts["train"]) :])
    group.barrier()
    highest = sum(of_set.max().item() for of_set in of_sets) / len(sets)
    return {"sets": float(len(sets)), "score/best": highest, "score/all": scores.mean().item()}
