"""RLHF's four models, loaded for PPO: policy (with its reference), value model, reward model."""

from pathlib import Path

from rlhf.config.stages import EvaluateSettings, PpoSettings
from rlhf.errors import PreflightError
from rlhf.models import folders
from rlhf.models.adapter_folders import is_adapter
from rlhf.models.policy import FrozenPolicy, TrainedPolicy
from rlhf.models.reward import FrozenReward
from rlhf.models.training import Training
from rlhf.models.value import TrainedValue
from rlhf.pipeline.context import Context
from rlhf.zero import group
from rlhf.zero.engine import DTYPES


def load_models(context: Context[PpoSettings]) -> tuple[TrainedPolicy, TrainedValue, FrozenReward]:
    """Load and shard the models of PPO. A collective.

    Raises:
        PreflightError: the value model, made of the reward model, would not understand the policy's tokens.
    """
    settings = context.settings
    share = settings.rollouts // settings.minibatches // group.world_size()
    size = min(settings.micro_batch_size, share)
    accumulation = -(-share // size)

    def training(learning_rate: float) -> Training:
        return Training(learning_rate, settings.max_grad_norm, accumulation)

    policy = TrainedPolicy(
        plain_folder(context.inputs["policy"], context.attempt / "policy", settings, scores=False),
        settings.precision,
        settings.sampling.temperature,
        size,
        lora=settings.lora,
        seed=settings.seed,
        training=training(settings.policy_learning_rate),
    )
    reward_folder = plain_folder(context.inputs["reward"], context.attempt / "reward", settings, scores=True)
    reward_model = FrozenReward(reward_folder, settings.precision, size)
    if reward_model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise PreflightError(
            "the reward model and the policy have different tokenizers, "
            "so the value model cannot start from the reward model",
            context.stage,
            "train the reward model from the policy's base model",
        )
    value = TrainedValue(
        reward_folder,
        settings.precision,
        size,
        lora=settings.lora,
        seed=settings.seed,
        training=training(settings.value_learning_rate),
    )
    return policy, value, reward_model


def load_frozen(context: Context[EvaluateSettings]) -> tuple[FrozenPolicy, FrozenPolicy, FrozenReward]:
    """Load and shard the two policies to compare, and the reward model. A collective."""
    settings = context.settings

    def policy(role: str) -> FrozenPolicy:
        folder = plain_folder(context.inputs[role], context.attempt / "policy" / role, settings, scores=False)
        return FrozenPolicy(folder, settings.precision, settings.sampling.temperature, settings.micro_batch_size)

    reward = plain_folder(context.inputs["reward"], context.attempt / "reward", settings, scores=True)
    return policy("before"), policy("after"), FrozenReward(reward, settings.precision, settings.micro_batch_size)


def plain_folder(folder: Path, target: Path, settings: PpoSettings | EvaluateSettings, *, scores: bool) -> Path:
    """The folder with any adapter folded into the weights; written to ``target`` only if there is one. A collective."""
    if not is_adapter(folder):
        return folder
    if group.is_main() and not (target / "config.json").exists():
        folders.write_plain(folder, target, scores=scores, dtype=DTYPES[settings.precision])
    group.barrier()
    return target
