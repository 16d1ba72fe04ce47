"""Settings of PPO: docs/ppo.md has every equation, and the source of every default."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from rlhf.config.base import semantic
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.stages import RmSettings, SftSettings
from rlhf.config.tuning import LoraTuning, LowRankTuning, results_in_adapter

# A2C (Mnih et al. 2016, arXiv:1602.01783, without asynchrony) as settings of PPO: one update on each rollout, at which
# the ratio is 1, so that there is nothing to clip.
A2C = {"epochs": 1, "minibatches": 1, "policy_clip": None, "value_clip": None}


class PpoSettings(PolicyGradientSettings):
    """PPO with a KL penalty: docs/ppo.md has every equation."""

    algorithm: Literal["ppo", "a2c"] = semantic("ppo")
    """``a2c`` is the same loop with one update on each rollout and no clipping (Menick et al. 2022, arXiv:2203.11147;
    Glaese et al. 2022, arXiv:2209.14375): it sets ``epochs`` and ``minibatches`` to 1, both clips to null."""
    share_base: bool = semantic(False)
    """Keep one base with the LoRA adapters of policy, reference, value model and reward models on it, in place of a
    model for each (docs/ppo.md). The policy and the reward models are adapters that sft and rm trained with ``tuning:
    {method: lora}`` on one base; the policy goes on training its own, whatever rank ``tuning`` names here, which
    counts for a policy without an adapter."""
    whiten_rewards: bool = semantic(False)
    """Scale the rewards of all tokens to variance 1, their mean kept (Ziegler et al. 2019)."""
    discount: float = semantic(1.0, ge=0, le=1)
    """γ of GAE (Schulman et al. 2015, arXiv:1506.02438, eq. 16)."""
    gae_lambda: float = semantic(0.95, ge=0, le=1)
    """λ of GAE."""
    value_lambda: float | None = semantic(None, ge=0, le=1)
    """λ of the returns that the value model learns, where it is another than the advantages' (Yue et al. 2025, VAPO,
    arXiv:2504.05118, §3.1: 1 there, so that the value model learns without bias). Null takes ``gae_lambda``."""
    whiten_advantages: bool | Literal["minibatch"] = semantic(True)
    """Shift and scale advantages to mean 0 and variance 1 over the real tokens of all ranks: those of the iteration, or
    with ``minibatch`` of each minibatch alone (Huang et al. 2022, "The 37 implementation details of PPO", no. 7)."""
    value_clip: float | None = semantic(0.2, gt=0)
    """How far a value may move from its old value before its loss is clipped; null leaves it unclipped."""
    value_init: Literal["reward", "policy"] = semantic("reward")
    """Whose weights the value model starts from, with a fresh head: the first reward model's, whose vocabulary must
    then be the policy's, or the policy's."""
    value_warmup: int = semantic(0, ge=0)
    """First iterations in which the value model alone is trained."""
    value_learning_rate: float = semantic(1e-5, gt=0)
    """Peak learning rate of the value model."""

    @model_validator(mode="before")
    @classmethod
    def _algorithm_fills_in(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("algorithm") == "a2c":
            return A2C | values
        return values

    @model_validator(mode="after")
    def _value_settings_fit(self) -> "PpoSettings":
        if self.algorithm == "a2c":
            for name, value in A2C.items():
                if (given := getattr(self, name)) != value:
                    wanted = "null" if value is None else value
                    raise ValueError(f"algorithm a2c needs {name} {wanted}, and it is {given}; leave it out")
        if self.whiten_advantages == "minibatch" and self.importance_cap:
            raise ValueError(
                "importance_cap weighs advantages that are whitened already, and whiten_advantages minibatch comes "
                "after it; leave one of them out"
            )
        if self.value_warmup >= self.iterations:
            raise ValueError(
                f"value_warmup {self.value_warmup} leaves none of {self.iterations} iterations to the policy"
            )
        if self.value_init == "reward" and not any(reward.model for reward in self.rewards):
            raise ValueError("value_init reward needs a reward model among rewards; write value_init: policy")
        if self.share_base and not (isinstance(self.tuning, LoraTuning) and self.tuning.init == "zero"):
            given = "pissa, which changes the base" if isinstance(self.tuning, LoraTuning) else self.tuning.method
            raise ValueError(f"share_base needs tuning {{method: lora}} with init zero, and it is {given}")
        if self.share_base and self.rollout.tensor_parallel not in (1, "auto"):
            raise ValueError(
                f"rollout.tensor_parallel {self.rollout.tensor_parallel} does not go with share_base, of whose base "
                "every rank holds a copy"
            )
        if self.share_base and self.placement == "apart":
            raise ValueError(
                "placement apart puts reference and reward models on other ranks than the policy, and with share_base "
                "they are adapters on its base; write placement: together, or share_base: false"
            )
        return self

    def obstacle_to_vllm(self) -> str | None:
        """Return why vLLM cannot take the policy's weights; None where it can."""
        if self.share_base:
            return "with share_base the policy is an adapter"
        return super().obstacle_to_vllm()


def without_adapter(settings: PpoSettings, makers: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return why ``share_base`` cannot be, where a stage makes no LoRA adapter that it needs, and what to do.

    makers  settings of the stages that make the inputs, by role; of those that make a maker's own, by role/its role
    """
    base_of_policy = _base_of("policy", makers)
    for role, maker in makers.items() if settings.share_base else ():
        if "/" in role or not isinstance(maker, SftSettings | RmSettings):
            continue
        method = maker.tuning
        adapter = results_in_adapter(method)
        # A policy may be whole weights, on which the reward model's adapter was trained.
        if (adapter and not isinstance(method, LowRankTuning)) or (not adapter and role != "policy"):
            made = f"an adapter of method {method.method}" if adapter else "whole weights"
            what = f"share_base needs LoRA adapters on one base, and {role} will be {made}"
            return what, f"give the stage that makes {role} tuning: {{method: lora}}, without merge"
        base = _base_of(role, makers)
        trained = any(isinstance(one, SftSettings | RmSettings) for one in (base, base_of_policy))
        # Two stages that do not train may make the same model.
        if trained and None not in (base, base_of_policy) and base != base_of_policy:
            what = f"share_base needs adapters on one base, and {role} will be trained on another one than policy"
            return what, (
                "give both stages one base and tuning: {method: lora}, without merge; or train the reward model on the "
                "policy's whole weights; or set share_base: false"
            )
    return None


def _base_of(role: str, makers: Mapping[str, Any]) -> Any:
    """Return the settings of the stage that makes the whole weights under a result; None where they are not known."""
    maker = makers.get(role)
    if isinstance(maker, SftSettings | RmSettings) and results_in_adapter(maker.tuning):
        return makers.get(f"{role}/base")
    return maker
