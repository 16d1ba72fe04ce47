"""TRL's trainers inside a worker group: the one module that knows what they and transformers' Trainer need from us.

They bring the loss, the data order and exact resumption; we bring the process group, checkpoints that are complete or
ignored, and metrics that go where all others go.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
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

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.config.stages import RmSettings, SftSettings, SupervisedSettings
from rlhf.errors import DivergedError
from rlhf.models import adapters, reward_losses
from rlhf.models.packing import keeps_texts_apart
from rlhf.models.reward import raw_scores
from rlhf.models.reward_losses import COLUMNS, ListBatch, ListLoss, collate
from rlhf.models.templates import Tokenizer
from rlhf.randomness import seed_of
from rlhf.training import checkpoint_writer
from rlhf.training.loop import Journal, ends_here, stopped
from rlhf.training.schedules import learning_order
from rlhf.zero import group
from rlhf.zero.engine import checkpoint_bytes, mark_leaves, whole_weights, zero3_config

TOKENS = "tokens.json"


def common_arguments(context: Context[Any], settings: SupervisedSettings) -> dict[str, Any]:
    """What every trainer is told: batch arithmetic, optimiser, precision, ZeRO-3, checkpoints.

    The batch is a multiple of the ranks: the stages' checks see to it.
    """
    share = settings.batch_size // group.world_size()
    micro = max(size for size in range(1, min(settings.micro_batch_size, share) + 1) if share % size == 0)
    # accelerate would take a CPU group for a single process: it is told of the group that there is.
    PartialState(backend=torch.distributed.get_backend())
    automatic = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {
        "output_dir": str(context.folder.checkpoints),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": settings.optimizer.learning_rate,
        "weight_decay": settings.optimizer.weight_decay,
        "warmup_steps": settings.optimizer.warmup_fraction,
        "lr_scheduler_type": "linear",
        "max_grad_norm": settings.optimizer.max_grad_norm,
        # The rows come in the order in which they are learned from, all epochs' together.
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "seed": seed_of("trainer", settings.seed),
        "bf16": settings.precision == "bf16",
        "deepspeed": zero3_config(settings.precision, gradient_clipping="auto", **automatic),
        "accelerator_config": {"use_configured_state": True},
        # Else the last step would be saved too, which the result makes superfluous: Reports says when.
        "save_strategy": "no",
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
        self._stopping = False

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

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Say that a micro batch is done."""
        liveness.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - positional
        """Say that a step is done; have it saved where that is due, and training stopped where that is asked for."""
        step = state.global_step
        self._stopping = ends_here(self._context, step)
        due = step % self._context.settings.checkpoint_every == 0 and step < state.max_steps
        control.should_save = self._stopping or due
        if self._stopping:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002 - positional
        """Close the journal; a training that was asked to stop goes no further, and has no time for that."""
        if self._stopping:
            raise stopped(state.global_step)
        if self.journal is not None:
            self.journal.finish()


def _renamed(name: str) -> str:
    return {"learning_rate": "lr"}.get(name, name)


def train(trainer: Any, context: Context[Any]) -> None:
    """Train from the newest complete checkpoint, or from the start.

    Raises:
        DiskFullError: there is no room for a checkpoint; those before it stay.
        InterruptedRunError: the ranks were asked to stop, and have saved the step that they were at.
    """
    newest = checkpoint_writer.checkpoint_to_resume(context)
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
    _total_train_tokens: int

    def __init__(self, context: Context[Any], **trainer: Any) -> None:
        self._context = context
        super().__init__(**trainer)
        lengths = list(map(self._length, self.train_dataset))
        settings = context.settings
        order = learning_order(lengths, settings.batch_size, settings.epochs, settings.seed)
        self.train_dataset = self.train_dataset.select(order)

    @staticmethod
    def _length(row: Any) -> int:
        """The tokens that a row is padded to."""
        raise NotImplementedError

    def go_on_counting(self, checkpoint: Path) -> None:
        """Count tokens from where the checkpoint's run was: TRL would count from 0 again."""
        self._total_train_tokens = json.loads((checkpoint / TOKENS).read_text())["tokens"]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        above: Any = super()
        estimate = checkpoint_bytes(self.model)
        with checkpoint_writer.writing(self._context, self.state.global_step, estimate) as checkpoint:
            above._save_checkpoint(model, trial)
            if group.is_main():
                (checkpoint / TOKENS).write_text(json.dumps({"tokens": self._total_train_tokens}))


class _SftTrainer(_Checkpointed, SFTTrainer):
    @staticmethod
    def _length(row: Any) -> int:
        return len(row["input_ids"])


class _RewardTrainer(_Checkpointed, RewardTrainer):
    """TRL's, with lists of any number of responses in place of pairs.

    TRL's own loss is that of lists of two, which a test holds ours to.
    """

    def __init__(self, context: Context[Any], loss: ListLoss, **trainer: Any) -> None:
        self._loss = loss
        super().__init__(context, **trainer)

    @staticmethod
    def _length(row: Any) -> int:
        return max(map(len, row["ids"]))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:  # noqa: ARG002 - TRL's signature
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 - transformers' signature
    ) -> Any:
        """The mean over the micro batch's lists; lists of a batch count alike, whatever micro batches they are in."""
        lists = ListBatch(**inputs)
        outputs = model(input_ids=lists.input_ids, attention_mask=lists.attention_mask, use_cache=False)
        scores = lists.arranged(outputs.logits.squeeze(-1).float())
        loss = self._loss(scores, lists).mean()
        gather: Callable[[Tensor], Tensor] = cast(Any, self.accelerator).gather
        self._total_train_tokens += int(gather(lists.attention_mask.sum()).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        with torch.no_grad():
            found = scores[lists.present]
            share = reward_losses.accuracy(scores, lists.strengths, lists.present).mean()
            for name, value, of_ranks in (
                ("min_reward", found.min(), torch.min),
                ("mean_reward", found.mean(), torch.mean),
                ("max_reward", found.max(), torch.max),
                ("accuracy", share, torch.mean),
            ):
                self._metrics["train"][name].append(of_ranks(gather(value)).item())
        return (loss, outputs) if return_outputs else loss


def sft_trainer(
    context: Context[SftSettings],
    load: Any,
    tokenizer: Tokenizer,
    demonstrations: Dataset,
    heldout: Dataset,
) -> Any:
    """TRL's SFTTrainer: loss on completions alone; several demonstrations are packed into a sequence where that is set
    and the model keeps them apart.

    load  loads the model; called when transformers already knows of ZeRO-3, so that it is sharded as it is read
    """
    settings = context.settings
    with _bf16_anywhere():
        arguments = SFTConfig(
            **common_arguments(context, settings), max_length=settings.max_length, completion_only_loss=True
        )
    model = _prepared(load())
    arguments.packing = settings.packing and keeps_texts_apart(model.config)
    if settings.packing and not arguments.packing and group.is_main():
        context.note(
            f"{model.config.model_type} models do not keep packed texts apart: each demonstration is padded instead, "
            "and batch_size counts demonstrations"
        )
    return _SftTrainer(
        context,
        model=model,
        args=arguments,
        train_dataset=demonstrations,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=adapters.lora_config(settings.lora, scores=False) if settings.lora else None,
        callbacks=[Reports(context, shown=("loss", "mean_token_accuracy"))],
    )


def reward_trainer(
    context: Context[RmSettings], load: Any, tokenizer: Tokenizer, lists: Dataset, loss: ListLoss
) -> Any:
    """TRL's RewardTrainer, over lists of responses.

    load   as for :func:`sft_trainer`
    lists  tokenised, with :data:`rlhf.models.reward_losses.COLUMNS`
    """
    settings = context.settings
    with _bf16_anywhere():
        arguments = RewardConfig(**common_arguments(context, settings), max_length=None)
    return _RewardTrainer(
        context,
        loss,
        model=_prepared(load()),
        args=arguments,
        train_dataset=lists,
        data_collator=partial(collate, padding=tokenizer.pad_token_id),
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


def heldout_loss(trainer: Any, at_once: int) -> float:
    """Return the mean negative log-likelihood of the held-out rows, in nats per token that is learned of. A collective.

    at_once  rows of a forward pass; changes the result by rounding only
    """
    rows, engine = trainer.eval_dataset, trainer.model_wrapped
    engine.eval()
    batches = torch.arange(len(rows)).split(at_once)

    def sums(numbers: Tensor) -> Tensor:
        """``[batch, 2]``: the sum over a batch's tokens, and their number."""
        found = torch.zeros(len(numbers), 2, dtype=torch.float64)
        for place, number in enumerate(numbers.tolist()):
            batch = trainer.data_collator([rows[row] for row in batches[number].tolist()])
            # As in training, TRL's forward pass answers log-probabilities without keeping the logits.
            outputs = engine(**_on_device(batch), use_cache=False, fused_lm_head=True)
            found[place, 0], found[place, 1] = -outputs.log_probs.double().sum(), outputs.label_mask.sum()
            liveness.beat()
        return found

    with torch.no_grad():
        total, tokens = group.spread(len(batches), sums).sum(0).tolist()
    return total / tokens


def _on_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(group.device()) if isinstance(value, Tensor) else value for name, value in batch.items()}


def scores(trainer: Any, texts: Sequence[list[int]], at_once: int) -> Tensor:
    """Raw scores ``[text]`` of rows of token ids by the trained reward model, so many in a batch. A collective."""
    engine = trainer.model_wrapped
    engine.eval()

    def score(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return engine(input_ids=ids, attention_mask=attention_mask).logits.squeeze(-1).float()

    return raw_scores(score, trainer.processing_class, texts, at_once)
