"""TRL's trainers inside a worker group: the one module that knows what they and transformers' Trainer need from us.

They bring the loss, the data order and exact resumption; we bring the process group, checkpoints that are complete or
ignored, and metrics that go where all others go.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.config.stages import RmSettings, SftSettings
from rlhf.data.order import learning_order
from rlhf.errors import DivergedError
from rlhf.models import adapters
from rlhf.models.reward import raw_scores
from rlhf.models.text import Tokenizer
from rlhf.pipeline.context import Context
from rlhf.zero import checkpoints, group
from rlhf.zero.engine import checkpoint_bytes, mark_leaves, whole_weights, zero3_config
from rlhf.zero.journal import Journal

TrainingSettings = SftSettings | RmSettings

TOKENS = "tokens.json"


def common_arguments(context: Context[Any], settings: TrainingSettings) -> dict[str, Any]:
    """What every trainer is told: batch arithmetic, optimiser, precision, ZeRO-3, checkpoints.

    The batch is a multiple of the ranks: the stages' checks see to it.
    """
    share = settings.batch_size // group.world_size()
    micro = max(size for size in range(1, min(settings.micro_batch_size, share) + 1) if share % size == 0)
    # accelerate would take a CPU group for a single process: it is told of the group that there is.
    PartialState(backend=torch.distributed.get_backend())
    automatic = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {
        "output_dir": str(context.attempt / "checkpoints"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "per_device_eval_batch_size": settings.micro_batch_size,
        "learning_rate": settings.optimizer.learning_rate,
        "weight_decay": settings.optimizer.weight_decay,
        "warmup_steps": settings.optimizer.warmup_fraction,
        "lr_scheduler_type": "linear",
        "max_grad_norm": settings.optimizer.max_grad_norm,
        # The rows come in the order in which they are learned from: all epochs', see in_order.
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "seed": settings.seed,
        "bf16": settings.precision == "bf16",
        "deepspeed": zero3_config(settings.precision, gradient_clipping="auto", **automatic),
        "accelerator_config": {"use_configured_state": True},
        "save_steps": settings.checkpoint_every,
        "save_total_limit": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


@contextmanager
def _bf16_anywhere() -> Generator[None]:
    """Inside, transformers accepts bf16 without a GPU: it takes every process without ``use_cpu`` to be on one."""
    with patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
        yield


class Reports(TrainerCallback):
    """Carries the trainer's logs to the journal."""

    def __init__(self, context: Context[Any], shown: tuple[str, ...]) -> None:
        self._context, self._shown = context, shown
        self.journal: Journal | None = None

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002 - positional
        """Open the journal, now that the number of steps is known."""
        self.journal = Journal(self._context, state.max_steps, unit="step", shown=self._shown)

    def on_log(self, args: Any, state: Any, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:  # noqa: ARG002 - positional
        """Write the trainer's metrics under our names, and stop where the loss is no number."""
        if not logs or "loss" not in logs or self.journal is None:
            return
        metrics = {_renamed(name): float(value) for name, value in logs.items() if name != "epoch"}
        self.journal.log(state.global_step, metrics)
        if not all(map(torch.isfinite, map(torch.tensor, (metrics["loss"], metrics.get("grad_norm", 0.0))))):
            raise DivergedError(
                f"the loss is {metrics['loss']} at step {state.global_step}",
                self._context.stage,
                f"lower {self._context.stage}.optimizer.learning_rate",
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the journal."""
        if self.journal is not None:
            self.journal.finish()


def _renamed(name: str) -> str:
    return {"learning_rate": "lr"}.get(name, name)


def train(trainer: Any, context: Context[Any]) -> None:
    """Train from the newest complete checkpoint, or from the start.

    Raises:
        DiskFullError: there is no room for a checkpoint; those before it stay.
    """
    newest = checkpoints.checkpoint_to_resume(context)
    if newest is not None:
        trainer.go_on_counting(newest)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


class _Checkpointed:
    """What TRL's trainers are told of checkpoints: they need room, are complete or ignored, and hold all that counts.

    It stands before the trainer among a class's bases.
    """

    state: Any
    model: Any
    train_dataset: Dataset
    _texts: tuple[str, ...]
    """Columns with token ids that are padded to one length."""
    _total_train_tokens: int

    def __init__(self, context: Context[Any], **trainer: Any) -> None:
        self._context = context
        super().__init__(**trainer)
        self.train_dataset = in_order(self.train_dataset, self._texts, context.settings)

    def go_on_counting(self, checkpoint: Path) -> None:
        """Count tokens from where the checkpoint's run was: TRL would count from 0 again."""
        self._total_train_tokens = json.loads((checkpoint / TOKENS).read_text())["tokens"]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        above: Any = super()
        estimate = checkpoint_bytes(self.model)
        with checkpoints.writing(self._context, self.state.global_step, estimate) as checkpoint:
            above._save_checkpoint(model, trial)
            if group.is_main():
                (checkpoint / TOKENS).write_text(json.dumps({"tokens": self._total_train_tokens}))


def in_order(rows: Dataset, texts: Sequence[str], settings: TrainingSettings) -> Dataset:
    """The rows as they are learned from, one batch after the other.

    texts  columns with token ids, of which a row's longest counts
    """
    lengths = [max(map(len, ids)) for ids in zip(*(rows[column] for column in texts), strict=True)]
    return rows.select(learning_order(lengths, settings.batch_size, settings.epochs, settings.seed))


class _SftTrainer(_Checkpointed, SFTTrainer):
    _texts = ("input_ids",)


class _RewardTrainer(_Checkpointed, RewardTrainer):
    _texts = ("chosen_ids", "rejected_ids")


def sft_trainer(
    context: Context[SftSettings],
    load: Any,
    tokenizer: Tokenizer,
    demonstrations: Dataset,
    heldout: Dataset,
) -> Any:
    """TRL's SFTTrainer: loss on completions alone, several demonstrations packed into a sequence.

    load  loads the model; called when transformers already knows of ZeRO-3, so that it is sharded as it is read
    """
    settings = context.settings
    with _bf16_anywhere():
        arguments = SFTConfig(
            **common_arguments(context, settings),
            max_length=settings.max_length,
            packing=settings.packing,
            completion_only_loss=True,
        )
    return _SftTrainer(
        context,
        model=_prepared(load()),
        args=arguments,
        train_dataset=demonstrations,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=adapters.lora_config(settings.lora, scores=False) if settings.lora else None,
        callbacks=[Reports(context, shown=("loss", "mean_token_accuracy"))],
    )


def reward_trainer(context: Context[RmSettings], load: Any, tokenizer: Tokenizer, pairs: Dataset) -> Any:
    """TRL's RewardTrainer: Bradley-Terry loss on pairs, minus their margin, plus centring.

    pairs  tokenised: ``chosen_ids``, ``rejected_ids``, ``margin``
    load   as for :func:`sft_trainer`
    """
    settings = context.settings
    with _bf16_anywhere():
        arguments = RewardConfig(
            **common_arguments(context, settings),
            # TRL would drop longer pairs; ours are cut already.
            max_length=None,
            center_rewards_coefficient=settings.centering or None,
        )
    return _RewardTrainer(
        context,
        model=_prepared(load()),
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=adapters.lora_config(settings.lora, scores=True) if settings.lora else None,
        callbacks=[Reports(context, shown=("loss", "accuracy"))],
    )


def _prepared(model: Any) -> Any:
    mark_leaves(model)
    return model


def export(
    trainer: Any, source: Path, context: Context[Any], *, scores: bool, config: dict[str, Any] | None = None
) -> None:
    """Write the trained model's folder. A collective.

    source  the plain folder that the model was loaded from
    """
    lora = context.settings.lora
    weights = whole_weights(trainer.model, trained_only=lora is not None)
    if group.is_main():
        adapters.save(trainer.model, weights, source, context.output, lora, scores=scores, config=config)
    group.barrier()


def scores(trainer: Any, context: Context[RmSettings], texts: Sequence[list[int]]) -> Tensor:
    """Raw scores ``[text]`` of rows of token ids by the trained reward model. A collective."""
    engine = trainer.model_wrapped
    engine.eval()

    def score(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return engine(input_ids=ids, attention_mask=attention_mask).logits.squeeze(-1).float()

    return raw_scores(score, trainer.processing_class, texts, 2 * context.settings.micro_batch_size)
