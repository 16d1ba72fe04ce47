"""One base with several LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in place of the four models of PPO.

The base is sharded once. The policy's adapter and the value model's train, each by optimiser steps of its own; the
adapter that the policy began with, which is the reference, and those of the reward models are frozen.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.errors import PreflightError
from rlhf.models import folders, tuning
from rlhf.models.capacity import AT_ONCE
from rlhf.models.heads import SequenceScores, TokenLogprobs, TokenValues, initialise_head, unwrapped
from rlhf.models.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, is_adapter
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward, is_reward_model
from rlhf.models.shared_beginnings import read_beginnings_once
from rlhf.models.text import check_same_tokens
from rlhf.models.tuning import INITIAL
from rlhf.models.virtual_tokens import TRAINED
from rlhf.rewards import Rewards
from rlhf.rollout.rollout import Generator
from rlhf.training.learner import Learner, MovingAverage, TrainedValue
from rlhf.training.policy import Policy, TrainedPolicy
from rlhf.zero import group
from rlhf.zero.engine import (
    DTYPES,
    Engine,
    Schedule,
    checkpoint_bytes,
    set_schedule,
    sharded_loading,
    trained,
    whole_weight,
)

VALUE = "value_model"
"""PEFT's name of the value model's adapter; the policy's is ``TRAINED``, the reference's ``INITIAL``, and a reward
model's its role. None may be the name of a module of some architecture: PEFT tells them by their names."""
PARTS = {TRAINED: "policy", VALUE: "value model"}
"""Of the adapters that train, by adapter: their names in errors."""
REMEDY = "train sft and rm with tuning: {method: lora}, without merge, on one base model; or set share_base: false"


def check_adapters(inputs: Mapping[str, Path], stage: str) -> None:
    """Refuse models that cannot share a base.

    inputs  of the stage ppo; a reward model that is yet to be trained may be the model that it is trained from

    Raises:
        PreflightError: one is no LoRA adapter, holds other weights than an adapter's, or was trained on another base.
    """
    policy = inputs["policy"]
    for role, folder in inputs.items():
        if role != "policy" and not role.startswith("reward"):
            continue
        if is_adapter(folder):
            _check_lora(role, folder)
        elif is_reward_model(folder):
            raise PreflightError(f"{role} is a whole model, and share_base takes adapters", f"{stage}.{role}", REMEDY)
        if role != "policy":
            _check_same_base(role, folder, policy)


def _check_lora(role: str, folder: Path) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    if (kind := config.get("peft_type")) != "LORA":
        raise PreflightError(
            f"{role} is an adapter of type {kind}, and share_base takes LoRA adapters", str(folder), REMEDY
        )
    if (bias := config.get("bias", "none")) != "none":
        raise PreflightError(
            f"{role}'s adapter has bias {bias!r}, and others share the biases of its base",
            str(folder / ADAPTER_CONFIG),
            "train it without biases; or set share_base: false",
        )
    with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as weights:
        others = [name for name in weights.keys() if ".lora_" not in name and not name.endswith(".score.weight")]  # noqa: SIM118 - not a mapping
    if others:
        raise PreflightError(
            f"{role}'s adapter replaces weights of its base, which others share; the first is {min(others)}",
            str(folder / ADAPTER_WEIGHTS),
            "train it without modules_to_save and biases; or set share_base: false",
        )


def _check_same_base(role: str, folder: Path, policy: Path) -> None:
    ours, other = _base_files(policy), _base_files(folder)
    # Checkouts of one store are links to one file.
    if ours.keys() == other.keys() and all(file.samefile(other[name]) for name, file in ours.items()):
        return
    if (mine := _digest(ours)) != (others := _digest(other)):
        raise PreflightError(
            f"{role} is an adapter for another base ({others}) than the policy's ({mine})",
            f"{_base(folder)}, {_base(policy)}",
            REMEDY,
        )


def _base(folder: Path) -> Path:
    return folder / BASE if is_adapter(folder) else folder


def _base_files(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(_base(folder).glob("*.safetensors"))}


def _digest(files: Mapping[str, Path]) -> str:
    """Return the first 12 hex digits of a digest of files' names and contents."""
    whole = hashlib.sha256()
    for name, file in files.items():
        with file.open("rb") as content:
            whole.update(name.encode() + hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()[:12]


class OneBase(nn.Module):
    """A language model with adapters, and with the heads of those that score.

    model  with an adapter ``TRAINED``; without one ``INITIAL``, that is the model without adapter
    heads  by adapter, linear with one output
    """

    def __init__(self, model: PeftModel, heads: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.model: Any = model
        self.heads = nn.ModuleDict(heads)
        language_model: Any = unwrapped(model)
        body = getattr(language_model, language_model.base_model_prefix)
        # Not as submodules, of which ZeRO-3 would hook the base's once for each.
        self._readers: dict[str, Callable[..., Any]] = dict.fromkeys((TRAINED, INITIAL), TokenLogprobs(model))
        for name, head in heads.items():
            reader = TokenValues if name == VALUE else SequenceScores
            self._readers[name] = reader(SimpleNamespace(base_model_prefix="body", body=body, score=head))

    def forward(self, adapter: str, *arguments: Any) -> Any:
        """Return what the head of an adapter, which is the active one, reads in the base's states."""
        return self._readers[adapter](*arguments)

    def activate(self, adapter: str) -> None:
        """Let the base compute with one adapter. Nothing requires a gradient afterwards."""
        if adapter in self.model.peft_config:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter, inference_mode=True)
        else:
            self.model.base_model.disable_adapter_layers()


class SharedEngine:
    """The engine of a :class:`OneBase`, and which adapter is active in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._active = ""

    def switch(self, adapter: str) -> None:
        """Make an adapter the active one, and the only one whose weights require a gradient and take steps."""
        if adapter != self._active:
            self.engine.module.activate(adapter)
            # A frozen adapter is no part: then none trains.
            self.engine.take_turn(PARTS.get(adapter, adapter))
            self._active = adapter


class AdapterEngine:
    """One adapter's use of the shared engine, like an engine of its own.

    The policy's part of a checkpoint is that of all adapters, the others have none.
    """

    def __init__(self, shared: SharedEngine, adapter: str) -> None:
        self._shared, self._adapter = shared, adapter

    def __call__(self, *arguments: Any) -> Any:
        """Run the forward pass with the adapter and its head."""
        self._shared.switch(self._adapter)
        return self._shared.engine(self._adapter, *arguments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro batch's gradients, as :meth:`rlhf.zero.engine.Engine.backward`."""
        self._shared.engine.backward(loss, last=last)

    def step(self, learning_rate: float) -> float:
        """Take a step with the adapter alone, as :meth:`rlhf.zero.engine.Engine.step`."""
        return self._shared.engine.step(learning_rate)

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks write in :meth:`save`."""
        return checkpoint_bytes(self._shared.engine.module) if self._adapter == TRAINED else 0

    def save(self, folder: Path, name: str) -> None:
        """Write this rank's part of a checkpoint."""
        if self._adapter == TRAINED:
            self._shared.engine.save(folder, name)

    def load(self, folder: Path, name: str) -> None:
        """Read what :meth:`save` wrote."""
        if self._adapter == TRAINED:
            self._shared.engine.load(folder, name)


class SharedGenerator(Generator):
    """Samples from an unsharded view of the base with the policy's adapter.

    On one rank it shares the memory of the sharded weights. On several it holds a copy of the base and the adapter.

    model  not yet under an engine, with the policy's adapter active
    """

    def __init__(self, folder: Path, model: Any, settings: PpoSettings, at_once: int) -> None:
        super().__init__(folder, settings.precision, settings.sampling.temperature, at_once, source=model)
        # The modules without their weights, which are filled in before each rollout.
        empty = {id(weight): nn.Parameter(weight.new_empty(0), requires_grad=False) for weight in model.parameters()}
        self._view: Any = copy.deepcopy(model, empty).to(group.device()).eval()
        self._filled = False

    def _present(self) -> Any:
        others = [f".{name}." for name in self._source.peft_config if name != TRAINED]
        changed = dict(trained(self._source, PARTS[TRAINED]))
        for name, weight in self._source.named_parameters():
            if (name in changed or not self._filled) and not any(other in f"{name}." for other in others):
                own, whole = self._view.get_parameter(name), whole_weight(weight)
                if self._filled and group.world_size() > 1:
                    own.data.copy_(whole)  # a copy stays where it is: graphs of the decoder read it there
                else:
                    own.data = whole
        self._filled = True
        return self._view


def _adapted(inputs: Mapping[str, Path], settings: PpoSettings) -> tuple[Any, dict[str, nn.Linear]]:
    """Load the base with all adapters, and return it with their heads."""
    policy, dtype = inputs["policy"], DTYPES[settings.precision]
    model = folders.load_policy(policy, dtype, fp32_head=settings.sampling.fp32_head)
    if is_adapter(policy):
        _add_copy(model, TRAINED, INITIAL)
    else:
        model = tuning.prepared(model, settings.tuning, policy, scores=False, seed=settings.seed)
    width = model.config.get_text_config().hidden_size
    head = partial(nn.Linear, width, 1, bias=False, dtype=dtype, device=group.device())
    heads = {role: head() for role in inputs if role.startswith("reward")}
    for role in heads:
        config = folders.adapter_config(inputs[role])
        config.task_type, config.modules_to_save = "CAUSAL_LM", None
        model.add_adapter(role, config, autocast_adapter_dtype=False)
        folders.fill(model, inputs[role], adapter_name=role, head=heads[role].weight)
    _add_copy(model, "reward" if settings.value_init == "reward" else TRAINED, VALUE)
    heads[VALUE] = head()
    initialise_head(heads[VALUE].weight, "value head", settings.seed)
    return model, heads


def _add_copy(model: Any, source: str, target: str) -> None:
    """Add an adapter that equals another one."""
    model.add_adapter(target, replace(model.peft_config[source]), autocast_adapter_dtype=False)
    own = dict(model.named_parameters())
    of = partial(get_peft_model_state_dict, model, own, save_embedding_layers=False)
    weights, copies = of(adapter_name=source), of(adapter_name=target)
    with torch.no_grad():
        for name, weight in weights.items():
            copies[name].copy_(weight)


def _choose_trained(model: Any, heads: Mapping[str, nn.Linear]) -> None:
    """Let the adapters of policy and value model train, with the value model's head, and nothing else."""
    model.requires_grad_(False)
    for head in heads.values():
        head.requires_grad_(False)
    own = dict(model.named_parameters())
    for adapter, part in PARTS.items():
        weights: list[Any] = list(get_peft_model_state_dict(model, own, adapter, save_embedding_layers=False).values())
        weights += [heads[VALUE].weight] if adapter == VALUE else []
        for weight in weights:
            weight.requires_grad_(True)
            set_schedule(weight, Schedule(part=part))


def _sharded(
    inputs: Mapping[str, Path], settings: PpoSettings, micro_batch: MicroBatch
) -> tuple[Any, SharedEngine, SharedGenerator]:
    """Load and shard the base with all adapters; return the adapted model with its engine and generator."""
    with sharded_loading(settings.precision, settings.zero):
        model, heads = _adapted(inputs, settings)
    read_beginnings_once(unwrapped(model))
    module = OneBase(model, heads)
    module.activate(TRAINED)
    generator = SharedGenerator(inputs["policy"], model, settings, AT_ONCE * micro_batch.samples)
    _choose_trained(model, heads)
    # The rates of both are given with each step.
    engine = Engine(
        module,
        settings.precision,
        learning_rate=settings.policy_learning_rate,
        max_grad_norm=settings.max_grad_norm,
        zero=settings.zero,
        activation_checkpointing=settings.activation_checkpointing,
    )
    return model, SharedEngine(engine), generator


def load_models(context: Context[PpoSettings], micro_batch: MicroBatch) -> tuple[TrainedPolicy, TrainedValue, Rewards]:
    """Load and shard one base with the adapters of PPO's models. A collective; errors as :func:`check_adapters`."""
    settings, inputs = context.settings, context.inputs
    check_adapters(inputs, context.stage)
    if settings.value_init == "reward":
        check_same_tokens(inputs["reward"], inputs["policy"], context.stage)
    model, shared, generator = _sharded(inputs, settings, micro_batch)
    temperature = settings.sampling.temperature
    policy = TrainedPolicy(
        model,
        Learner(AdapterEngine(shared, TRAINED), "policy"),
        generator,
        Policy(AdapterEngine(shared, INITIAL), generator, temperature, micro_batch),
        None
        if settings.average_decay is None
        else MovingAverage(shared.engine, model, settings.average_decay, PARTS[TRAINED]),
        temperature,
        micro_batch,
        folder=_base(inputs["policy"]),
        method=settings.tuning,
        learns_entropy=settings.entropy_bonus > 0,
        ptx_coef=settings.ptx.coef,
    )
    value = TrainedValue(AdapterEngine(shared, VALUE), micro_batch)
    rewards = {
        role: FrozenReward(folder, settings.precision, micro_batch, engine=AdapterEngine(shared, role))
        for role, folder in inputs.items()
        if role.startswith("reward")
    }
    return policy, value, Rewards(settings.rewards, rewards, settings.precision, micro_batch)
