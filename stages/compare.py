"""Compare: collected responses with a judge's preferences.

In: sets of responses.
Out: ``train.jsonl`` and ``heldout.jsonl``, comparison sets with the models that wrote the responses, for ``rank``.

The judge is a file of people's answers, a Python function, or a language model that sees each pair in both orders. Sets
without a judgement are left out and counted.
"""

from rlhf.attempt.context import Context
from rlhf.collect.collection import name_of
from rlhf.collect.judges import judge_of
from rlhf.config.collect import CompareSettings
from rlhf.data.records import ResponseSet, read_jsonl, write_jsonl
from rlhf.errors import RecordError


def run(context: Context[CompareSettings]) -> dict[str, float]:
    """Write the sets; final metrics: ``train``, ``heldout``, ``left_out``, and the judge's own."""
    judge, folder = judge_of(context.settings), context.inputs["responses"]
    parts = {part: list(read_jsonl(folder / f"{part}.jsonl", ResponseSet)) for part in ("train", "heldout")}
    counts: dict[str, float] = {}
    left_out = 0
    for part, sets in parts.items():
        compared = list(judge.compare(sets, context))
        counts[part] = write_jsonl(context.output / f"{part}.jsonl", compared)
        left_out += len(set(map(name_of, sets)) - set(map(name_of, compared)))
    if not sum(counts.values()):
        raise RecordError(
            "no judgement compares any of the collected responses",
            context.settings.file or context.stage,
            "name judgements of exactly these responses: a row has the same prompt, and the same responses in order",
        )
    if left_out:
        context.note(f"{left_out} sets are left out, because no judgement compares them")
    return counts | {"left_out": left_out} | judge.metrics()
