"""Checks that need data and models, run before any worker group starts, so that no stage fails on them later.

Each takes the context that its stage will have, with the inputs that exist by now: in place of a model that is yet to
be trained, the model that it will be trained from. It returns its counts, and the bytes that the stage will
write (:mod:`rlhf.pipeline.disk`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.cluster.devices import device_of_ranks
from rlhf.collect.judges import judge_of
from rlhf.config.collect import CollectSettings, CompareSettings, SelectSettings, writer_inputs
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.rewards import RewardSettings
from rlhf.config.stages import DpoSettings, EvaluateSettings, RmSettings, SftSettings, SupervisedSettings
from rlhf.config.tuning import (
    BottomFrozenTuning,
    LoraTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    QLoraTuning,
    TopTuning,
    Tuning,
    results_in_adapter,
)
from rlhf.config.zero import ZeroSettings
from rlhf.data.mixture import Mixture, by_task
from rlhf.data.records import read_rows
from rlhf.errors import PreflightError
from rlhf.models import splittable
from rlhf.models.architectures import check_packing, check_policy, check_scorer, check_virtual_tokens
from rlhf.models.layout import (
    ADAPTER_CONFIG,
    BASE,
    UNBOUNDED,
    check_scored_length,
    config_of,
    context_length,
    count_parameters,
    is_adapter,
    shapes,
    virtual_tokens_in,
)
from rlhf.models.packing import tokenised
from rlhf.models.reward import reads_messages
from rlhf.models.text import (
    check_same_tokens,
    load_tokenizer,
    prompt_ids,
    response_ids,
    text_start,
)
from rlhf.models.tuning import anchors, experts_left_out
from rlhf.pipeline import disk, fitting
from rlhf.pipeline.memory import Texts
from rlhf.ranking.lists import draw_lists, draw_pairs
from rlhf.rewards import EndpointReward, load_function
from rlhf.rollout.prompts import DemonstrationStream, PromptStream, read_prompts
from rlhf.rollout.vllm_sampling import NOT_INSTALLED
from rlhf.training.shared_base import check_adapters

MIN_LENGTH = 8
"""The least that ``max_length`` may be."""


def sft(context: Context[SftSettings]) -> dict[str, float]:
    """Check that every demonstration leaves a completion to learn, and count those that are cut."""
    check_policy(context.inputs["base"])
    settings, tokenizer = context.settings, load_tokenizer(context.inputs["base"])
    check_supervised(context, "demonstrations")
    check_tuning(context, ["base"])
    if "demonstrations" not in context.inputs:
        return {}
    file = context.inputs["demonstrations"] / "train.jsonl"
    rows = tokenised(file, tokenizer)
    tokenised(file.with_name("heldout.jsonl"), tokenizer)
    lengths = [row.length for row in rows]
    if prompts_only := sum(len(row.prompt) >= settings.max_length for row in rows):
        raise PreflightError(
            f"{prompts_only} demonstrations have prompts of {settings.max_length} tokens or more: "
            "nothing of them would be learned",
            f"{context.stage}.max_length",
            f"raise {context.stage}.max_length above {max(lengths)}, or shorten those prompts",
        )
    if over := sum(length > settings.max_length for length in lengths):
        context.note(
            f"{over} of {len(rows)} demonstrations are longer than {settings.max_length} tokens: they are cut at the "
            "end, and nothing is learned of how they end"
        )
    fitting.check(context, Texts(min(max(lengths), settings.max_length)))
    # At most one of the sequences that rows are packed into is less than half full.
    epoch = Mixture(read_rows(file)).epoch(settings.seed)
    tokens = sum(min(lengths[row], settings.max_length) for row in epoch)
    sequences = min(len(epoch), 2 * tokens // settings.max_length + 1) if settings.packing else len(epoch)
    steps = math.ceil(settings.epochs * math.ceil(sequences / settings.batch_size))
    check_offloading(context, [context.inputs["base"]])
    return {"demonstrations/too_long": float(over)} | disk.written(context, [context.inputs["base"]], steps)


def rm(context: Context[RmSettings]) -> dict[str, float]:
    """Check that the model reads every text, and count the responses that are cut."""
    check_policy(context.inputs["base"])
    check_scorer(context.inputs["base"])
    settings, tokenizer = context.settings, load_tokenizer(context.inputs["base"])
    check_supervised(context, "comparisons")
    check_tuning(context, [] if settings.init == "scratch" else ["base"])
    if "comparisons" not in context.inputs:
        return {}
    over = total = longest = 0
    sets = {part: read_rows(context.inputs["comparisons"] / f"{part}.jsonl") for part in ("train", "heldout")}
    for part, rows in sets.items():
        for number, row in enumerate(rows, start=1):
            alone, place = settings.sees == "response", f"comparisons/{part}.jsonl, row {number}"
            before = text_start(tokenizer) if alone else prompt_ids(tokenizer, row["prompt"], place)
            lengths = [len(before) + len(response_ids(tokenizer, response)) for response in row["responses"]]
            total += len(lengths)
            longest = max(longest, *lengths)
            over += sum(length > settings.max_length for length in lengths)
    if settings.sees == "conversation" and "demonstrations" in context.inputs:
        tokenised(context.inputs["demonstrations"] / "train.jsonl", tokenizer)
    if over:
        context.note(
            f"{over} of {total} responses are, with their prompts, longer than {settings.max_length} tokens: they are "
            "cut at the start"
        )
    lists = draw_lists(sets["train"], settings.responses_per_list, settings.lists_per_response, settings.seed)
    most, tokens = max(map(len, lists), default=1), settings.micro_batch_tokens
    if tokens is not None and tokens < most * settings.max_length:
        what = (
            f"micro_batch_tokens {tokens} is less than {most} responses of {settings.max_length} tokens, a whole list"
        )
        raise _fitting(context.stage, "micro_batch_tokens", most * settings.max_length, what)
    fitting.check(context, Texts(min(longest, settings.max_length), in_list=most))
    steps = math.ceil(settings.epochs * math.ceil(len(lists) / settings.batch_size))
    check_offloading(context, [context.inputs["base"]])
    return {"responses/too_long": float(over)} | disk.written(context, [context.inputs["base"]], steps)


def dpo(context: Context[DpoSettings]) -> dict[str, float]:
    """Check that the sets order pairs and each leaves something to learn; count what is left out and what is cut."""
    policy, settings = context.inputs["policy"], context.settings
    check_policy(policy)
    check_supervised(context, "comparisons")
    check_tuning(context, ["policy"])
    if "comparisons" not in context.inputs:
        return {}
    tokenizer, over, prompts_only, longest, steps = load_tokenizer(policy), 0, 0, 0, 0
    counts: dict[str, float] = {}
    for part in ("train", "heldout"):
        sets = read_rows(context.inputs["comparisons"] / f"{part}.jsonl")
        tied = sum(len(set(row["strengths"])) == 1 for row in sets)
        pairs, equal = draw_pairs(sets, settings.pairs_per_response, settings.seed)
        if not pairs:
            raise PreflightError(
                f"none of the {len(sets)} sets orders two different responses ({tied} have responses of equal "
                f"strength alone, {equal} pairs have equal texts), so there is no pair to learn from or to measure by",
                f"comparisons/{part}.jsonl",
                "check that ratings differ and rankings order responses; more annotators break ties",
            )
        if tied or equal:
            context.note(
                f"of the {len(sets)} sets of {part} {tied} are left out, since all their responses are of equal "
                f"strength, and {equal} pairs, since their texts are equal"
            )
        for number, row in enumerate(sets, start=1):
            before = len(prompt_ids(tokenizer, row["prompt"], f"comparisons/{part}.jsonl, row {number}"))
            lengths = [before + len(response_ids(tokenizer, response)) for response in row["responses"]]
            longest, prompts_only = max(longest, *lengths), prompts_only + (before >= settings.max_length)
            over += sum(length > settings.max_length for length in lengths)
        if part == "train":
            steps = math.ceil(settings.epochs * math.ceil(len(pairs) / settings.batch_size))
            counts = {"sets/tied": float(tied), "pairs/equal": float(equal)}
    if prompts_only:
        raise PreflightError(
            f"{prompts_only} sets have prompts of {settings.max_length} tokens or more: nothing of their responses "
            "would be learned",
            f"{context.stage}.max_length",
            f"raise {context.stage}.max_length above {longest}, or shorten those prompts",
        )
    if over:
        context.note(
            f"{over} responses are, with their prompts, longer than {settings.max_length} tokens: they are cut at the "
            "end, and nothing is learned of how they end"
        )
    fitting.check(context, Texts(min(longest, settings.max_length), in_list=2))
    check_offloading(context, [policy])
    return counts | {"responses/too_long": float(over)} | disk.written(context, [policy], steps)


def check_split(context: Context[PolicyGradientSettings]) -> None:
    """Refuse a policy that cannot be split over as many ranks as are to hold a copy of it."""
    together = context.settings.rollout.tensor_parallel
    if not isinstance(together, int) or together == 1:
        return
    if problem := splittable.obstacle(config_of(context.inputs["policy"]), together):
        raise PreflightError(problem, f"{context.stage}.rollout.tensor_parallel", splittable.OTHERWISE)


def ppo(context: Context[PpoSettings]) -> dict[str, float]:
    """Check what :func:`policy_gradient` does, and that the value model can start where it shall."""
    inputs = context.inputs
    if context.settings.share_base:
        check_adapters(inputs, context.stage)
    from_reward = context.settings.value_init == "reward" and "reward" in inputs
    if from_reward:
        check_same_tokens(inputs["reward"], inputs["policy"], context.stage)
    return policy_gradient(context, value="reward" if from_reward else "policy")


def policy_gradient(context: Context[PolicyGradientSettings], value: str | None = None) -> dict[str, float]:
    """Check rewards, models, prompts and demonstrations, and that each batch divides among the ranks.

    value  role of the model that a value model starts from; None without a value model
    """
    settings, inputs, ranks = context.settings, context.inputs, context.settings.trainers
    check_rewards(settings.rewards, inputs)
    if settings.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise PreflightError(NOT_INSTALLED[0], f"{context.stage}.rollout.engine", NOT_INSTALLED[1])
    check_split(context)
    that_train = " that train" if settings.set_apart else ""
    minibatch, multiple = settings.rollouts // settings.minibatches, settings.minibatches * ranks
    if minibatch % ranks:
        what = f"a minibatch of {minibatch} rollouts cannot be shared among {ranks} ranks{that_train}"
        raise _fitting(context.stage, "rollouts", math.ceil(settings.rollouts / multiple) * multiple, what)
    check_policy(inputs["policy"])
    starts = ["policy", *([value] if value else [])]
    for role in dict.fromkeys(starts) if settings.packing else ():
        check_packing(inputs[role], context.stage)
    tokenizer, size = load_tokenizer(inputs["policy"]), settings.ptx.batch_size
    if settings.ptx.coef and size % ranks:
        what = f"ptx.batch_size {size} cannot be shared among {ranks} ranks{that_train}"
        raise _fitting(context.stage, "ptx.batch_size", math.ceil(size / ranks) * ranks, what)
    stream = DemonstrationStream.of(context, tokenizer) if "demonstrations" in inputs else None
    if stream is not None and stream.cut:
        context.note(
            f"{stream.cut} demonstrations are longer than {settings.ptx.max_length} tokens and are cut at the end, "
            f"{stream.left_out} of them left out because nothing of their completion would remain"
        )
    prompts = PromptStream(inputs["prompts"] / "train.jsonl", tokenizer, settings.max_prompt_length, settings.seed)
    check_rewards_read(inputs, "train")
    check_tuning(context, list(dict.fromkeys(starts)))
    response, tokens = settings.sampling.max_new_tokens, virtual_tokens_of(settings.tuning)
    check_room(context.stage, inputs["policy"], settings.max_prompt_length, response, "sampling.max_new_tokens", tokens)
    longest, mixed = max(map(len, prompts.first(UNBOUNDED).ids)), settings.ptx.max_length if settings.ptx.coef else 0
    fitting.check(context, Texts(max(longest + response, mixed), max(response, mixed)))
    check_virtual_tokens(inputs["policy"], settings.tuning, settings.max_prompt_length + response, context.stage)
    models = [inputs[role] for role in starts]
    frozen = [folder for role, folder in inputs.items() if role.startswith("reward")]
    check_offloading(
        context, models, frozen=frozen if results_in_adapter(settings.tuning) else [inputs["policy"], *frozen]
    )
    return disk.written(context, models, settings.iterations, average=settings.average_decay is not None)


def evaluate(context: Context[EvaluateSettings]) -> dict[str, float]:
    """Check the rewards, and that held-out prompts and responses together fit the policy's context."""
    settings, inputs = context.settings, context.inputs
    check_rewards(settings.rewards, inputs)
    for role in ("before", *settings.compared):
        if role in inputs:
            check_policy(inputs[role])
    if "before" in inputs and "prompts" in inputs:
        tokenizer = load_tokenizer(inputs["before"])
        PromptStream(inputs["prompts"] / "heldout.jsonl", tokenizer, settings.max_prompt_length)
        check_rewards_read(inputs, "heldout")
        response = settings.sampling.max_new_tokens
        check_room(context.stage, inputs["before"], settings.max_prompt_length, response, "sampling.max_new_tokens")
        for role in settings.compared.keys() & inputs.keys():
            if load_tokenizer(inputs[role]).get_vocab() != tokenizer.get_vocab():
                raise PreflightError(
                    f"the policies before and {role} have different tokenizers, so that their KL is not defined",
                    f"{context.stage}.policies",
                    "compare policies that were trained from one model",
                )
    return disk.written(context)


def collect(context: Context[CollectSettings]) -> dict[str, float]:
    """Check that prompts and responses together fit every model's context."""
    settings, inputs = context.settings, context.inputs
    for role in writer_inputs(settings):
        if role in inputs:
            check_policy(inputs[role])
        if role in inputs and "prompts" in inputs:
            tokenizer, longest = load_tokenizer(inputs[role]), settings.max_prompt_length
            for part in ("train", "heldout"):
                PromptStream(inputs["prompts"] / f"{part}.jsonl", tokenizer, longest)
            check_room(context.stage, inputs[role], longest, settings.max_new_tokens, "max_new_tokens")
    return disk.written(context)


def compare(context: Context[CompareSettings]) -> dict[str, float]:
    """Check that the judge exists."""
    judge_of(context.settings)
    return {}


def select(context: Context[SelectSettings]) -> dict[str, float]:
    """Check the rewards."""
    check_rewards(context.settings.rewards, context.inputs)
    return disk.written(context)


def check_supervised(context: Context[SupervisedSettings], role: str) -> None:
    """Refuse a ``max_length`` beyond the model's context, a batch that the ranks cannot share, and data of which no
    rows are held out.

    role  of the input with the data; not checked while its artifact does not exist
    """
    settings, stage, ranks = context.settings, context.stage, context.settings.workers.ranks
    virtual, model = virtual_tokens_of(settings.tuning), _trained_model(context)
    length, limit = settings.max_length, context_length(config_of(model))
    if length + virtual > limit:
        before = f", of which {virtual} are for virtual tokens" if virtual else ""
        what = f"max_length is {length}, and the model's context is {limit} tokens{before}"
        if limit - virtual < MIN_LENGTH:
            raise PreflightError(what, f"{stage}.tuning", "take fewer virtual tokens: 10 to 100 are usual")
        raise _fitting(stage, "max_length", limit - virtual, what)
    check_virtual_tokens(model, settings.tuning, length, stage)
    if settings.batch_size % ranks:
        what = f"batch_size {settings.batch_size} is not a multiple of the {ranks} ranks"
        raise _fitting(stage, "batch_size", math.ceil(settings.batch_size / ranks) * ranks, what)
    if role not in context.inputs:
        return
    train, heldout = (read_rows(context.inputs[role] / f"{part}.jsonl") for part in ("train", "heldout"))
    untested = sorted(by_task(train).keys() - by_task(heldout).keys())
    if untested or not heldout:
        of_tasks = f" of the task {', '.join(untested)}" if untested else ""
        raise PreflightError(
            f"no {role}{of_tasks} are held out, so {stage} could not tell how good its result is",
            f"data.{role}",
            f"raise data.heldout_fraction, or name a source of records that you hold out as data.heldout.{role}",
        )


def check_tuning(context: Context[Any], roles: Sequence[str]) -> None:
    """Refuse a method that does not fit the model, its tokenizer, the workers, or virtual tokens that a model has.

    roles  of the inputs whose virtual tokens would go on training
    """
    settings, stage = context.settings, context.stage
    method = settings.tuning
    folder = _trained_model(context)
    plain = folder / BASE if is_adapter(folder) else folder
    config = config_of(folder)
    config = config.get("text_config", config)
    match method:
        case TopTuning(blocks=blocks) | BottomFrozenTuning(blocks=blocks):
            depth = config.get("num_hidden_layers", config.get("n_layer", config.get("num_layers")))
            if depth is not None and blocks > depth:
                what = f"tuning.blocks is {blocks}, and the model has {depth} blocks"
                raise _fitting(stage, "tuning.blocks", depth, what)
        case LoraTuning() | QLoraTuning():
            check_targets(stage, method.targets or [], plain, config.get("vocab_size"))
            check_experts(context, method, plain)
            if isinstance(method, QLoraTuning):
                check_qlora(stage, settings.workers.gpu)
        case PTuning():
            anchors(method, folder, f"{stage}.tuning.template")
        case _:
            pass
    for role in roles:
        check_goes_on(stage, role, context.inputs[role], method)


def _trained_model(context: Context[Any]) -> Path:
    return next(context.inputs[role] for role in ("base", "policy") if role in context.inputs)


def check_targets(stage: str, targets: Sequence[str], folder: Path, vocabulary: int | None) -> None:
    """Refuse names of modules that a plain folder's model does not have: PEFT passes over one of several."""
    matrices = [name for name, shape in shapes(folder).items() if len(shape) == 2 and vocabulary not in shape]
    modules = [name.removesuffix(".weight") for name in matrices]
    missing = [target for target in targets if not any(f".{module}".endswith(f".{target}") for module in modules)]
    if modules and missing:
        there = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
        raise PreflightError(
            f"the model has no linear layer named {', '.join(missing)}; it has {there}",
            f"{stage}.tuning.targets",
            f"name some of those, or leave {stage}.tuning.targets out for all of them",
        )


def check_experts(context: Context[Any], method: LoraTuning | QLoraTuning, folder: Path) -> None:
    """Refuse a variant of LoRA that PEFT cannot give to a mixture's experts; note experts that no adapter reaches."""
    if not any(".experts." in name or len(shape) == 3 for name, shape in shapes(folder).items()):
        return
    left_out = experts_left_out(folder, method)
    if left_out and method.targets is None:
        context.note(
            f"{context.stage}: {method.method} leaves the experts' {' and '.join(left_out)} as they are, since PEFT "
            "adapts linear layers alone in this architecture"
        )


def check_qlora(stage: str, gpu: bool | None) -> None:
    """Refuse QLoRA on workers that will have no GPU, and without its library."""
    device = device_of_ranks(gpu)
    if gpu is False or (device is not None and not device.gpu):
        why = f"{stage}.workers.gpu is false" if gpu is False else "there is none here"
        raise PreflightError(
            f"qlora computes with 4-bit weights, which needs a GPU, and {why}",
            f"{stage}.tuning.method, {stage}.workers.gpu",
            f"{stage}.tuning={{method: lora}}, or run it where workers have GPUs",
        )
    if find_spec("bitsandbytes") is None:
        raise PreflightError(
            "qlora needs bitsandbytes, which is not installed",
            f"{stage}.tuning.method",
            "pip install 'rlhf-pipeline[qlora]'",
        )


def virtual_tokens_of(method: Tuning) -> int:
    """Return the virtual tokens that a method puts before every text."""
    return method.tokens if isinstance(method, PromptTuning | PTuning | PrefixTuning | PTuningV2) else 0


def check_goes_on(stage: str, role: str, folder: Path, method: Tuning) -> None:
    """Refuse a model whose virtual tokens the method cannot train further: nothing can fold them into the weights."""
    if not (tokens := virtual_tokens_in(folder)):
        return
    is_prefix = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["peft_type"] == "PREFIX_TUNING"
    kinds = (PrefixTuning, PTuningV2) if is_prefix else (PromptTuning, PTuning)
    if isinstance(method, kinds) and virtual_tokens_of(method) == tokens:
        return
    name, other = ("p-tuning-v2", "prefix") if is_prefix else ("prompt", "p-tuning")
    given = f" with {virtual_tokens_of(method)}" if virtual_tokens_of(method) else ""
    remedy = f"{stage}.tuning={{method: {name}, tokens: {tokens}}}, or give {stage} the model that they were trained on"
    raise PreflightError(
        f"the model that {stage} takes as {role} has {tokens} virtual tokens of {name} or {other}, which only these "
        f"methods can train further, and tuning is {method.method}{given}",
        f"{stage}.tuning",
        f"{stage}.value_init=policy" if role == "reward" else remedy,
    )


def check_room(stage: str, model: Path, prompt: int, response: int, field: str, virtual: int | None = None) -> None:
    """Refuse prompts and responses whose longest do not fit a model's context together.

    prompt    the setting ``max_prompt_length``, tokens
    response  the setting ``field``, tokens
    virtual   virtual tokens before them; None for those that the model has
    """
    virtual = virtual_tokens_in(model) if virtual is None else virtual
    limit = context_length(config_of(model)) - virtual
    if prompt + response > limit:
        what = f"prompts of {prompt} and responses of {response} tokens do not fit the policy's context of " + (
            f"{limit + virtual}, of which {virtual} are for virtual tokens" if virtual else f"{limit}"
        )
        if virtual and limit < MIN_LENGTH:
            raise PreflightError(what, f"{stage}.tuning", "take fewer virtual tokens: 10 to 100 are usual")
        fits = f"max_prompt_length={limit - response}" if response < limit else f"{field}={limit // 2}"
        raise PreflightError(what, f"{stage}.max_prompt_length, {stage}.{field}", f"{stage}.{fits}")


def check_offloading(
    context: Context[SftSettings] | Context[RmSettings] | Context[DpoSettings] | Context[PolicyGradientSettings],
    models: Sequence[Path],
    frozen: Sequence[Path] = (),
) -> None:
    """Refuse ``zero`` settings that cannot work with the models that train and those that are frozen."""
    settings = context.settings
    if settings.zero == ZeroSettings():
        return
    from rlhf.zero.offloading import check_zero  # it imports DeepSpeed

    weights = sum(map(count_parameters, [*models, *frozen])) * (2 if settings.precision == "bf16" else 4)
    check_zero(settings.zero, context.stage, sum(disk.trained_weights(context, models)), weights)


def check_rewards(rewards: Sequence[RewardSettings], inputs: Mapping[str, Path]) -> None:
    """Refuse a function or an endpoint that cannot be used, and a reward model that cannot read as far as it says."""
    for reward in rewards:
        if reward.function is not None:
            load_function(reward.function)
        elif reward.endpoint is not None:
            EndpointReward(reward.endpoint)
    for role, folder in inputs.items():
        if role.startswith("reward"):
            check_scored_length(folder)


def check_rewards_read(inputs: Mapping[str, Path], part: str) -> None:
    """Refuse prompts that a reward model's chat template, which may not be the policy's, refuses."""
    prompts = read_prompts(inputs["prompts"] / f"{part}.jsonl")
    for role, folder in inputs.items():
        if role.startswith("reward") and reads_messages(folder):
            tokenizer = load_tokenizer(folder)
            for number, prompt in enumerate(prompts, start=1):
                prompt_ids(tokenizer, prompt, f"prompts/{part}.jsonl, row {number}, as {role} reads it")


def _fitting(stage: str, field: str, value: int, what: str) -> PreflightError:
    """Return the error about a setting for which ``value`` would fit."""
    return PreflightError(what, f"{stage}.{field}", f"{stage}.{field}={value}")
