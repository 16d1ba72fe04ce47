"""Record what TRL 1.12.0's PPOTrainer computes in one iteration: ``python trl_record.py FOLDER``.

Runs in TRL's own environment, which :mod:`benchmarks.trl_parity` makes, and imports nothing of this repository. Each of
``CASES`` is one rollout of tiny random models on the CPU in fp32 and three epochs on it, at a learning rate that makes
both clips bite. It becomes ``FOLDER/<case>.safetensors``: tensors over the iteration, ``[sample]`` or
``[sample, time]``, and ``micro/<name>`` over the micro batches in the order of training. The file's metadata hold
settings and metrics.

The trainer offers no way to look in, so functions of its module are wrapped, and a wrapper reads the local variables of
``PPOTrainer.train``, which calls it. Their names are those of the release that is recorded.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

import datasets
import torch
import transformers
import trl
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCABULARY = 16
EOS = 2
# One past the vocabulary: it cannot be sampled, so only EOS ends a response. The trainer never embeds it.
PAD = VOCABULARY

# The settings of PPOConfig that differ between the recordings, by name.
CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {"kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0, "lam": 0.95, "temperature": 0.7},
    "whitened": {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.97, "lam": 0.9, "temperature": 1.0},
}

# Local variables of PPOTrainer.train that are kept as they are.
OF_ITERATION = (
    "responses",
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "rewards",
    "returns",
    "padding_mask",
    "padding_mask_p1",
)


@dataclass
class Recording:
    """Tensors and metrics that the wrappers read."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    micro: dict[str, list[Tensor]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    optimizer_steps: int = 0
    means: int = 0
    logits: Tensor | None = None

    def keep(self, **tensors: Tensor) -> None:
        """Keep tensors of the iteration."""
        self.tensors |= {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def keep_micro(self, **tensors: Any) -> None:
        """Keep tensors of one micro batch."""
        for name, tensor in tensors.items():
            self.micro.setdefault(name, []).append(torch.as_tensor(tensor).detach().clone())

    def forward(self, caller: Mapping[str, Any], _: tuple[Any, ...], result: Any) -> None:
        """A forward pass; the trainer divides these logits by the temperature in place, hence the copy."""
        trained = isinstance(result, tuple)
        output = result[0] if trained else result
        logits = output.logits[:, caller["context_length"] - 1 : -1].detach().clone()
        if trained:
            self.logits = logits
        else:
            self.keep(reference_logits=logits)

    def reward(self, caller: Mapping[str, Any], arguments: tuple[Any, ...], result: Any) -> None:
        """Scores as the reward model gave them; later the trainer punishes a missing EOS in place."""
        if arguments[0] is caller["reward_model"]:
            self.keep(raw_scores=result[1])

    def whiten(self, caller: Mapping[str, Any], arguments: tuple[Any, ...], result: Tensor) -> None:
        """Whitening, of rewards first where those are whitened, then of advantages."""
        if "advantages" not in caller:
            self.keep(rewards_before=arguments[0], rewards_whitened=result)
            return
        self.keep(**{name: caller[name] for name in OF_ITERATION})
        self.keep(contain_eos=caller["contain_eos_token"], advantages_before=arguments[0], advantages_whitened=result)

    def mean(self, caller: Mapping[str, Any], _: tuple[Any, ...], result: Tensor) -> None:
        """Four means a micro batch: value loss, its clip fraction, policy loss; after backward its clip fraction."""
        self.means += 1
        match self.means % 4:
            case 3:
                caller["new_logprobs"].retain_grad()
                caller["vpred"].retain_grad()
            case 0:
                self.keep_micro(
                    rows=caller["micro_batch_inds"],
                    logits=self.logits,
                    logprobs=caller["new_logprobs"],
                    logprobs_gradient=caller["new_logprobs"].grad,
                    values=caller["vpred"],
                    values_gradient=caller["vpred"].grad,
                    policy_loss=caller["pg_loss"],
                    policy_clip_fraction=result,
                    value_loss=caller["vf_loss"],
                    value_clip_fraction=caller["vf_clipfrac"],
                )
            case _:
                pass

    def log(self, caller: Mapping[str, Any], arguments: tuple[Any, ...], _: Any) -> None:
        """The end of the iteration."""
        self.keep(**{f"stats/{name}": caller[f"{name}_stats"] for name in ("approxkl", "entropy", "ratio")})
        self.metrics = {name: float(value) for name, value in arguments[0].items()}

    def step(self, *_: Any) -> None:
        """A step of the optimiser."""
        self.optimizer_steps += 1

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write everything."""
        micro = {f"micro/{name}": torch.stack(tensors) for name, tensors in self.micro.items()}
        about = {
            "settings": settings,
            "metrics": self.metrics,
            "optimizer_steps": self.optimizer_steps,
            "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        }
        save_file(self.tensors | micro, path, {name: json.dumps(value) for name, value in about.items()})


def watched(function: Callable[..., Any], watch: Callable[..., None]) -> Callable[..., Any]:
    """``function``, telling ``watch`` of calls that PPOTrainer.train makes itself."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train":
            watch(caller.f_locals, arguments, result)
        return result

    return call


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that only has to know the special tokens."""
    words = {"<unk>": 0, "<s>": 1, "</s>": EOS, "<pad>": PAD}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        padding_side="left",
    )


def model(kind: type, seed: int, **options: Any) -> Any:
    """A tiny Llama; weights are drawn wide enough for distributions and scores that are far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=None,
        **options,
    )
    return kind.from_config(config, dtype=torch.float32)


def record(case: str, folder: Path) -> None:
    """Run one iteration of one case."""
    policy, reference = (model(AutoModelForCausalLM, seed=0) for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    reward, value = (model(AutoModelForSequenceClassification, seed=seed, num_labels=1) for seed in (1, 2))

    # Two iterations' worth for one iteration: on a loader's last batch accelerate ends accumulation every micro batch.
    lengths = torch.randint(3, 9, (64,)).tolist()
    rows = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]
    settings = CASES[case] | {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 3,
        "total_episodes": 32,
        "local_rollout_forward_batch_size": 32,
        "response_length": 24,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "kl_coef": 0.05,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "learning_rate": 5e-4,
    }
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trainer"),
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=4,
            num_sample_generations=0,
            gradient_checkpointing=False,
            **settings,
        ),
        processing_class=tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
    )
    recording = Recording()
    whole = {name: getattr(ppo_trainer, name) for name in ("forward", "get_reward", "masked_whiten", "masked_mean")}
    watches = (recording.forward, recording.reward, recording.whiten, recording.mean)
    for (name, function), watch in zip(whole.items(), watches, strict=True):
        setattr(ppo_trainer, name, watched(function, watch))
    trainer.log = watched(trainer.log, recording.log)
    trainer.optimizer.optimizer.register_step_post_hook(recording.step)
    try:
        trainer.train()
    finally:
        for name, function in whole.items():
            setattr(ppo_trainer, name, function)
    recording.save(folder / f"{case}.safetensors", settings | {"eos_token_id": EOS})


if __name__ == "__main__":
    # One thread: the order of sums, and with it the last digit, does not depend on the machine's cores.
    torch.set_num_threads(1)
    for name in CASES:
        record(name, Path(sys.argv[1]))
