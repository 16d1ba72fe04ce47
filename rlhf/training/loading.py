"""Load what trains: the size of its micro batches, PPO's models, and the folder that training starts from."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.config.collect import CollectSettings, SelectSettings, WriterSettings, writer_inputs
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import DpoSettings, EvaluateSettings, Precision, RmSettings, SftSettings
from rlhf.config.zero import ZeroSettings
from rlhf.errors import PreflightError, size
from rlhf.models import folders, kernels, safe_loading, tuning
from rlhf.models.capacity import AT_ONCE
from rlhf.models.layout import BASE, is_adapter, shapes, virtual_tokens_in
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.templates import Tokenizer
from rlhf.models.text import check_same_tokens, load_tokenizer
from rlhf.pipeline import memory
from rlhf.pipeline.fitting import architectures
from rlhf.pipeline.memory import T
from rlhf.rewards import Rewards
from rlhf.rollout.decoding import has_graphs
from rlhf.rollout.rollout import Generator
from rlhf.rollout.split import ranks_of_node
from rlhf.rollout.vllm_sampling import Room, obstacle
from rlhf.training import shared_base
from rlhf.training.learner import Optimiser, TrainedValue
from rlhf.training.policy import FrozenPolicy, TrainedPolicy
from rlhf.training.scoring import Apart, Scoring, Together
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, STAGE_3


def load_models(context: Context[PpoSettings]) -> tuple[TrainedPolicy, TrainedValue, Scoring]:
    """Load and shard the models of PPO; errors are those of :func:`load_value`. A collective."""
    if context.settings.share_base:
        rollout_by_vllm(context, context.inputs["policy"])  # never; ``auto`` says why
        policy, value, rewards = shared_base.load_models(context, MicroBatch.of(context.settings))
        return policy, value, Together(policy, rewards)
    policy, scoring = load_policy_and_scoring(context)
    return policy, load_value(context), scoring


def load_policy_and_scoring(context: Context[PolicyGradientSettings]) -> tuple[TrainedPolicy, Scoring]:
    """Load and shard the models of a stage without a value model. A collective."""
    settings = context.settings
    if settings.placement == "apart":
        plain_policy(context)  # the others read it from now on
        scoring = Apart(settings)
        return load_policy(context, with_reference=False), scoring
    policy = load_policy(context)
    return policy, Together(policy, load_rewards(context, MicroBatch.of(settings), settings.zero))


def with_micro_batch(context: Context[T], in_list: int | None = None) -> Context[T]:
    """Return the context with a number for ``micro_batch_size``, on GPUs the largest that fits them. A collective.

    On GPUs ``packing`` of samples is decided too, and rm, where it packs, has ``micro_batch_tokens`` in the number's
    place. A group that starts again has the number that the attempt's folder says.

    in_list  most responses in a list of rm
    """
    given, device = context.settings, group.device()
    may_pack = isinstance(given, PolicyGradientSettings)
    unset = given.micro_batch_size is None and given.micro_batch_tokens is None
    if device.type == "cpu" or not (unset or may_pack):
        return context
    # Before a collective: rank 0 writes it after that.
    kept = context.folder.micro_batch.get() if unset else None
    if kept is not None:
        given = given.model_copy(update={"micro_batch_size": kept["size"]})
    smallest = -group.all_max(torch.tensor(-torch.cuda.get_device_properties(device).total_memory))
    models = architectures(context.inputs)
    settings = memory.with_micro_batch(
        given, models, int(smallest), in_list=in_list, node=ranks_of_node() if may_pack else None
    )
    if isinstance(given, PolicyGradientSettings) and isinstance(settings, PolicyGradientSettings) and models:
        why = memory.why_together(given, settings, models, int(smallest))
        if why is not None and group.is_main():
            context.note(why)
    if unset and kept is None and group.is_main():
        context.folder.micro_batch.write({"size": settings.micro_batch})
        why = "as many as fit" if models else "the default of CPUs, since the model's sizes are not known"
        context.note(f"micro_batch_size {settings.micro_batch}, {why}")
    if unset and isinstance(settings, RmSettings) and models and memory.computes_by_text(settings, models["base"]):
        # As in ppo: lists that are shorter than the longest fill what as many of these would.
        tokens = settings.max_length * settings.texts_at_once(in_list or 1)
        settings = settings.model_copy(update={"micro_batch_size": None, "micro_batch_tokens": tokens})
    return replace(context, settings=settings)


def load_policy(context: Context[PolicyGradientSettings], *, with_reference: bool = True) -> TrainedPolicy:
    """Load and shard the trained policy, by default with its reference. A collective."""
    settings, folder = context.settings, plain_policy(context)
    copies = together(context, folder)
    return TrainedPolicy.load_folder(
        folder,
        settings.precision,
        settings.sampling.temperature,
        MicroBatch.of(settings),
        method=settings.tuning,
        source=context.inputs["policy"],
        seed=settings.seed,
        optimiser=Optimiser("policy", settings.policy_learning_rate, settings.max_grad_norm),
        fp32_head=settings.sampling.fp32_head,
        learns_entropy=settings.entropy_bonus > 0,
        ptx_coef=settings.ptx.coef,
        average_decay=settings.average_decay,
        zero=settings.zero,
        activation_checkpointing=settings.activation_checkpointing,
        vllm=rollout_by_vllm(context, folder, copies if isinstance(copies, int) else 1),
        tensor_parallel=copies,
        with_reference=with_reference,
    )


def together(context: Context[PolicyGradientSettings], folder: Path) -> int | Literal["gathered"]:
    """Return the ranks that hold a copy of the policy to sample from. A collective.

    folder  of the policy's whole weights

    Raises:
        PreflightError: they do not divide the ranks of a node.
    """
    given = context.settings.rollout.tensor_parallel
    if given == "auto" or group.world_size() == 1:  # one rank samples from the weights where they lie
        return 1
    if given == "gathered":
        if group.is_main():
            context.note(_cost_of_gathering(context.settings, folder))
        return given
    if (ranks := ranks_of_node()) % given:
        numbers = ", ".join(str(count) for count in range(1, ranks + 1) if ranks % count == 0)
        raise PreflightError(
            f"{given} ranks of a node are to hold a copy of the policy together, and {ranks} is the most that divides "
            "the ranks of every node",
            f"{context.stage}.rollout.tensor_parallel",
            f"take one of {numbers}, or write rollout: {{tensor_parallel: gathered}}",
        )
    return given


def _cost_of_gathering(settings: PolicyGradientSettings, folder: Path) -> str:
    """Return a warning that names what ranks hand each other for a rollout."""
    width = 2 if settings.precision == "bf16" else 4
    weights = width * sum(map(math.prod, shapes(folder).values()))
    rows = math.ceil(settings.rollouts / group.world_size())
    batches = math.ceil(rows / (AT_ONCE * MicroBatch.of(settings).samples))
    steps = batches * settings.sampling.max_new_tokens
    return (
        f"samples through gathered layers, without a copy of the policy: slow, since each rank receives "
        f"{size(weights)} of weights for every token, up to {size(steps * weights)} in an iteration"
    )


def rollout_by_vllm(context: Context[PolicyGradientSettings], folder: Path, ranks: int = 1) -> Room | None:
    """Return the largest rollout of a rank where vLLM samples; None where responses are sampled natively. A collective.

    folder  of the policy's whole weights
    ranks   that hold a copy, and answer the same prompts

    Raises:
        PreflightError: vLLM is asked for and cannot sample from this policy here.
    """
    settings = context.settings
    automatic, why_not = settings.rollout.engine == "auto", settings.obstacle_to_vllm()
    if settings.rollout.engine == "native":
        return None
    if why_not is None and automatic:
        why_not = _better_natively(folder)
    if why_not is None and (problem := obstacle(folder)):
        if not automatic:
            raise PreflightError(problem[0], f"{context.stage}.rollout.engine", problem[1])
        why_not = problem[0]
    chosen = group.all_true(why_not is None)
    if automatic and group.is_main():
        why = why_not or ("native has no CUDA graphs for this type of model" if chosen else "another rank cannot")
        context.note(f"rollout.engine auto samples by {'vLLM' if chosen else 'native'}: {why}")
    room = settings.max_prompt_length + settings.sampling.max_new_tokens
    return Room(math.ceil(settings.rollouts * ranks / group.world_size()), room) if chosen else None


def _better_natively(folder: Path) -> str | None:
    """Return why the native engine is at least as fast for a folder's model as vLLM; None where it is not."""
    if group.device().type == "cpu":
        return "ranks have no GPU"
    if has_graphs(AutoConfig.from_pretrained(folder, **safe_loading.TOKENIZER)):
        return "its steps are CUDA graphs for this type of model, and faster"
    return None


def load_value(context: Context[PpoSettings]) -> TrainedValue:
    """Load and shard the value model, with the weights of the reward model or of the policy. A collective.

    Raises:
        PreflightError: the reward model would not understand the policy's tokens.
    """
    settings, source, folder = context.settings, context.inputs["policy"], plain_policy(context)
    if settings.value_init == "reward":
        source = context.inputs["reward"]
        check_same_tokens(source, folder, context.stage)
        folder = plain_folder(source, context.folder.reward / "reward", settings.precision, scores=True)
    return TrainedValue.load_folder(
        folder,
        settings.precision,
        MicroBatch.of(settings),
        method=settings.tuning,
        source=source,
        seed=settings.seed,
        optimiser=Optimiser("value model", settings.value_learning_rate, settings.max_grad_norm),
        zero=settings.zero,
        activation_checkpointing=settings.activation_checkpointing,
    )


def plain_policy(context: Context[PolicyGradientSettings]) -> Path:
    """Return the folder that the policy's training starts from, as :func:`plain_folder`."""
    return plain_folder(context.inputs["policy"], context.folder.policy, context.settings.precision, scores=False)


def load_frozen(context: Context[EvaluateSettings], role: str) -> FrozenPolicy:
    """Load and shard a policy to compare. A collective."""
    settings = context.settings
    return FrozenPolicy(
        context.inputs[role],
        settings.precision,
        settings.sampling.temperature,
        MicroBatch(settings.micro_batch_size),
        fp32_head=settings.sampling.fp32_head,
    )


def load_writer(context: Context[CollectSettings], writer: WriterSettings) -> Generator:
    """Load a model that writes responses. A collective."""
    settings = context.settings
    role = next(role for role, model in writer_inputs(settings).items() if model == writer.model)
    temperature = settings.temperature if writer.temperature is None else writer.temperature
    return Generator(context.inputs[role], settings.precision, temperature, settings.micro_batch_size)


def load_rewards(
    context: Context[PolicyGradientSettings] | Context[EvaluateSettings] | Context[SelectSettings],
    micro_batch: MicroBatch,
    zero: ZeroSettings = STAGE_3,
) -> Rewards:
    """Load the rewards that score responses. A collective."""
    settings = context.settings
    models = {role: folder for role, folder in context.inputs.items() if role.startswith("reward")}
    return Rewards(settings.rewards, models, settings.precision, micro_batch, zero)


def language_model(
    context: Context[SftSettings] | Context[DpoSettings], given: Path, *, fresh_head: bool = False
) -> tuple[Path, Tokenizer, Callable[[], Any]]:
    """Return the plain folder that TRL's training starts from, its tokenizer, and what loads the model. A collective.

    given       the stage's input
    fresh_head  whether the method ``transfer`` draws a language head anew
    """
    settings = context.settings
    base = plain_folder(given, context.folder.policy, settings.precision, scores=False)

    def load() -> Any:
        kernels.fuse(base)
        model = AutoModelForCausalLM.from_pretrained(
            base, **folders.loading_options(settings.tuning, DTYPES[settings.precision])
        )
        return tuning.prepared(model, settings.tuning, given, scores=False, seed=settings.seed, fresh_head=fresh_head)

    return base, load_tokenizer(base), load


def plain_folder(folder: Path, target: Path, precision: Precision, *, scores: bool) -> Path:
    """Return the folder that training starts from, any adapter folded into the weights once. A collective.

    It is folded in fp32 and then cast, so that trained model, reference and sampler begin at the same weights. It is
    written to ``target``, and only if there is an adapter. Virtual tokens cannot be folded: of such an adapter the base
    is returned, and :func:`rlhf.models.tuning.prepared` goes on with the tokens.
    """
    if not is_adapter(folder):
        return folder
    if virtual_tokens_in(folder):
        return folder / BASE
    if group.is_main() and not (target / "config.json").exists():
        folders.write_plain(folder, target, scores=scores, dtype=DTYPES[precision])
    group.barrier()
    return target
