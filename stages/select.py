"""Select: of several responses to a prompt the best by the rewards, as a demonstration to be imitated.

In: sets of responses, a reward model.
Out: ``train.jsonl`` and ``heldout.jsonl``, demonstrations.

An ``sft`` instance that learns them is rejection-sampling fine-tuning (Touvron et al. 2023, arXiv:2307.09288, §3.2.3).
"""

import torch

from rlhf.attempt.context import Context
from rlhf.config.collect import SelectSettings
from rlhf.data.records import Demonstration, ResponseSet, read_jsonl, write_jsonl
from rlhf.errors import StageError
from rlhf.models.micro_batches import MicroBatch
from rlhf.training.loading import load_rewards
from rlhf.zero import group


def run(context: Context[SelectSettings]) -> dict[str, float]:
    """Write a demonstration for each set; final metrics: ``sets``, and the mean scores of the best and of all.

    ``sets/left_out`` counts those whose responses are all empty, from which nothing could be learned.

    Raises:
        StageError: all responses are.
    """
    folder = context.inputs["responses"]
    parts = {part: list(read_jsonl(folder / f"{part}.jsonl", ResponseSet)) for part in ("train", "heldout")}
    reward = load_rewards(context, MicroBatch(context.settings.micro_batch_size))
    sets = [row for rows in parts.values() for row in rows]
    responses = [response for row in sets for response in row.responses]
    prompts = [prompt for row in sets for prompt in [row.model_dump()["prompt"]] * len(row.responses)]
    scores = reward.score(prompts, responses)

    # However well an empty response scores, it is no demonstration.
    written = torch.tensor([bool(response.strip()) for response in responses])
    of_sets = scores.where(written, -torch.inf).split([len(row.responses) for row in sets])
    highest = torch.stack([of_set.max() for of_set in of_sets])
    chosen = {
        number: Demonstration(prompt=row.prompt, completion=row.responses[int(of_set.argmax())])
        for number, (row, of_set) in enumerate(zip(sets, of_sets, strict=True))
        if highest[number] > -torch.inf
    }
    train = [one for number, one in chosen.items() if number < len(parts["train"])]
    if not train:
        raise StageError("all responses are empty", str(folder / "train.jsonl"), "collect responses of another model")
    if group.is_main():
        write_jsonl(context.output / "train.jsonl", train)
        write_jsonl(context.output / "heldout.jsonl", list(chosen.values())[len(train) :])
    group.barrier()
    return {
        "sets": float(len(chosen)),
        "sets/left_out": float(len(sets) - len(chosen)),
        "score/best": highest[highest > -torch.inf].mean().item(),
        "score/all": scores.mean().item(),
    }
