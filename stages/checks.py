"""Checks that need data and models, run before any worker group starts: what they find, no stage has to.

Each takes the context that its stage will have, with the inputs that exist by now: of a model that is yet to be
trained, the one that it will be trained from.
"""

import math

from rlhf.attempt.context import Context
from rlhf.collect.judges import judge_of
from rlhf.config.collect import CollectSettings, CompareSettings, writer_inputs
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import EvaluateSettings, RmSettings, SftSettings
from rlhf.data.records import read_rows
from rlhf.errors import PreflightError
from rlhf.models.layout import check_scored_length, config_of, context_length
from rlhf.models.packing import tokenised
from rlhf.models.reward import reads_messages
from rlhf.models.text import (
    Tokenizer,
    check_same_tokens,
    load_tokenizer,
    prompt_ids,
    response_ids,
    text_start,
)
from rlhf.pipeline import disk
from rlhf.ranking.lists import draw_lists
from rlhf.rewards.service import EndpointReward
from rlhf.rewards.sources import load_function
from rlhf.rollout.prompts import DemonstrationStream, PromptStream, read_prompts


def sft(context: Context[SftSettings]) -> dict[str, float]:
    """Does ``max_length`` fit the model's context, and how many demonstrations are cut?"""
    settings = context.settings
    tokenizer = load_tokenizer(context.inputs["base"])
    _fits(context, settings.max_length, "max_length")
    _batch_divides(context)
    _has_heldout(context, "demonstrations")
    rows = tokenised(context.inputs["demonstrations"] / "train.jsonl", tokenizer)
    tokenised(context.inputs["demonstrations"] / "heldout.jsonl", tokenizer)
    lengths = [row.length for row in rows]
    prompts_only = sum(len(row.prompt) >= settings.max_length for row in rows)
    if prompts_only:
        raise PreflightError(
            f"{prompts_only} demonstrations have prompts of {settings.max_length} tokens or more: "
            "nothing of them would be learned",
            f"{context.stage}.max_length",
            f"raise {context.stage}.max_length above {max(lengths)}, or shorten those prompts",
        )
    over = sum(length > settings.max_length for length in lengths)
    if over:
        context.note(
            f"{over} of {len(rows)} demonstrations are longer than {settings.max_length} tokens: they are cut at the "
            "end, and nothing is learned of how they end"
        )
    # Fewer than two of the sequences that rows are packed into are half empty.
    tokens = sum(min(length, settings.max_length) for length in lengths)
    sequences = min(len(rows), 2 * tokens // settings.max_length + 1) if settings.packing else len(rows)
    steps = math.ceil(settings.epochs * -(-sequences // settings.batch_size))
    return {"demonstrations/too_long": float(over)} | disk.written(context, [context.inputs["base"]], steps)


def rm(context: Context[RmSettings]) -> dict[str, float]:
    """Does ``max_length`` fit the model's context, and how many responses are cut?"""
    settings = context.settings
    tokenizer = load_tokenizer(context.inputs["base"])
    _fits(context, settings.max_length, "max_length")
    _batch_divides(context)
    if "comparisons" not in context.inputs:
        return {}
    _has_heldout(context, "comparisons")
    over = total = 0
    sets = {part: read_rows(context.inputs["comparisons"] / f"{part}.jsonl") for part in ("train", "heldout")}
    for part, rows in sets.items():
        for number, row in enumerate(rows, start=1):
            place = f"comparisons/{part}.jsonl, row {number}"
            alone = settings.sees == "response"
            before = text_start(tokenizer) if alone else prompt_ids(tokenizer, row["prompt"], place)
            lengths = [len(before) + len(response_ids(tokenizer, response)) for response in row["responses"]]
            total += len(lengths)
            over += sum(length > settings.max_length for length in lengths)
    if settings.sees == "conversation" and "demonstrations" in context.inputs:
        tokenised(context.inputs["demonstrations"] / "train.jsonl", tokenizer)
    if over:
        context.note(
            f"{over} of {total} responses are, with their prompts, longer than {settings.max_length} tokens: they are "
            "cut at the start"
        )
    lists = draw_lists(sets["train"], settings.responses_per_list, settings.lists_per_response, settings.seed)
    steps = math.ceil(settings.epochs * -(-len(lists) // settings.batch_size))
    return {"responses/too_long": float(over)} | disk.written(context, [context.inputs["base"]], steps)


def ppo(context: Context[PpoSettings]) -> dict[str, float]:
    """Do prompts and responses together fit the policy's context, does the batch divide among the ranks, and are the
    rewards there?
    """
    settings = context.settings
    _rewards_are_there(context)
    ranks = settings.workers.count
    if settings.rollouts // settings.minibatches % ranks:
        multiple = settings.minibatches * ranks
        raise PreflightError(
            f"a minibatch of {settings.rollouts // settings.minibatches} rollouts cannot be shared among {ranks} ranks",
            f"{context.stage}.rollouts",
            f"{context.stage}.rollouts={-(-settings.rollouts // multiple) * multiple}",
        )
    if settings.value_init == "reward" and "reward" in context.inputs:
        check_same_tokens(context.inputs["reward"], context.inputs["policy"], context.stage)
    tokenizer = load_tokenizer(context.inputs["policy"])
    _demonstrations_fit(context, tokenizer)
    PromptStream(context.inputs["prompts"] / "train.jsonl", tokenizer, settings.max_prompt_length, settings.seed)
    _rewards_read_prompts(context, "train")
    _leaves_room(context, "policy", settings.sampling.max_new_tokens, "sampling.max_new_tokens")
    valued = "reward" if settings.value_init == "reward" and "reward" in context.inputs else "policy"
    models = [context.inputs[role] for role in ("policy", valued)]
    return disk.written(context, models, settings.iterations, average=settings.average_decay is not None)


def _leaves_room(
    context: Context[PpoSettings] | Context[EvaluateSettings] | Context[CollectSettings],
    role: str,
    response: int,
    field: str,
) -> None:
    longest, limit = context.settings.max_prompt_length, context_length(config_of(context.inputs[role]))
    if longest + response > limit:
        half = limit // 2
        fits = f"max_prompt_length={limit - response}" if response < limit else f"{field}={half}"
        raise PreflightError(
            f"prompts of {longest} and responses of {response} tokens do not fit the policy's context of {limit}",
            f"{context.stage}.max_prompt_length, {context.stage}.{field}",
            f"{context.stage}.{fits}",
        )


def _demonstrations_fit(context: Context[PpoSettings], tokenizer: Tokenizer) -> None:
    settings, ranks = context.settings, context.settings.workers.count
    if settings.ptx.coef and settings.ptx.batch_size % ranks:
        raise PreflightError(
            f"ptx.batch_size {settings.ptx.batch_size} cannot be shared among {ranks} ranks",
            f"{context.stage}.ptx.batch_size",
            f"{context.stage}.ptx.batch_size={-(-settings.ptx.batch_size // ranks) * ranks}",
        )
    stream = DemonstrationStream.of(context, tokenizer)
    if stream is not None and stream.cut:
        context.note(
            f"{stream.cut} demonstrations are longer than {settings.ptx.max_length} tokens and are cut at the end, "
            f"{stream.left_out} of them left out because nothing of their completion would remain"
        )


def evaluate(context: Context[EvaluateSettings]) -> dict[str, float]:
    """Do held-out prompts and responses together fit the policy's context, and are the rewards there?"""
    settings = context.settings
    _rewards_are_there(context)
    if "before" in context.inputs and "prompts" in context.inputs:
        tokenizer = load_tokenizer(context.inputs["before"])
        PromptStream(context.inputs["prompts"] / "heldout.jsonl", tokenizer, settings.max_prompt_length)
        _rewards_read_prompts(context, "heldout")
        _leaves_room(context, "before", settings.sampling.max_new_tokens, "sampling.max_new_tokens")
    return disk.written(context)


def collect(context: Context[CollectSettings]) -> dict[str, float]:
    """Do prompts and responses together fit every model's context?"""
    settings = context.settings
    if "prompts" in context.inputs:
        for role in writer_inputs(settings):
            if role in context.inputs:
                tokenizer = load_tokenizer(context.inputs[role])
                for part in ("train", "heldout"):
                    PromptStream(context.inputs["prompts"] / f"{part}.jsonl", tokenizer, settings.max_prompt_length)
                _leaves_room(context, role, settings.max_new_tokens, "max_new_tokens")
    return disk.written(context)


def compare(context: Context[CompareSettings]) -> dict[str, float]:
    """Is the judge there?"""
    judge_of(context.settings)
    return {}


def _rewards_are_there(context: Context[PpoSettings] | Context[EvaluateSettings]) -> None:
    for reward in context.settings.rewards:
        if reward.function is not None:
            load_function(reward.function)
        elif reward.endpoint is not None:
            EndpointReward(reward.endpoint)
    for role, folder in context.inputs.items():
        if role.startswith("reward"):
            check_scored_length(folder)


def _rewards_read_prompts(context: Context[PpoSettings] | Context[EvaluateSettings], part: str) -> None:
    # A reward model may have another chat template than the policy, which refuses other prompts.
    prompts = read_prompts(context.inputs["prompts"] / f"{part}.jsonl")
    for role, folder in context.inputs.items():
        if role.startswith("reward") and reads_messages(folder):
            tokenizer = load_tokenizer(folder)
            for number, prompt in enumerate(prompts, start=1):
                prompt_ids(tokenizer, prompt, f"prompts/{part}.jsonl, row {number}, as {role} reads it")


def _batch_divides(context: Context[SftSettings] | Context[RmSettings]) -> None:
    size, ranks = context.settings.batch_size, context.settings.workers.count
    if size % ranks:
        raise PreflightError(
            f"batch_size {size} is not a multiple of the {ranks} ranks",
            f"{context.stage}.batch_size",
            f"{context.stage}.batch_size={-(-size // ranks) * ranks}",
        )


def _has_heldout(context: Context[SftSettings] | Context[RmSettings], role: str) -> None:
    if not read_rows(context.inputs[role] / "heldout.jsonl"):
        raise PreflightError(
            f"no {role} are held out, so {context.stage} could not tell how good its result is",
            f"data.{role}",
            f"raise data.heldout_fraction, or name a source of records that you hold out as data.heldout.{role}",
        )


def _fits(context: Context[SftSettings] | Context[RmSettings], length: int, field: str) -> None:
    limit = context_length(config_of(context.inputs["base"]))
    if length > limit:
        raise PreflightError(
            f"{field} is {length}, and the model's context is {limit} tokens",
            f"{context.stage}.{field}",
            f"{context.stage}.{field}={limit}",
        )
