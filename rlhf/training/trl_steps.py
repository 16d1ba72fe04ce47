"""What the trainers of sft, rm and dpo share: arguments, the order of rows, micro batches, journal and checkpoints."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.attempt.folder import marker
from rlhf.config.stages import SupervisedSettings
from rlhf.errors import DivergedError
from rlhf.models.micro_batches import MicroBatch
from rlhf.randomness import seed_of
from rlhf.training import checkpoint_writer
from rlhf.training.loop import Journal, ends_here, learning_order, stopped
from rlhf.zero import group, shards
from rlhf.zero.engine import (
    GradualAdamW,
    checkpoint_activations,
    checkpoint_bytes,
    deepspeed_config,
    mark_leaves,
    parameter_groups,
    trained,
    unfreeze,
)

TOKENS = "tokens.json"
SHARDS = "model"
"""The name of a checkpoint's files of weights and optimiser."""


def common_arguments(context: Context[SupervisedSettings]) -> dict[str, Any]:
    """Return all trainers' arguments: batch arithmetic, optimiser, precision, ZeRO, checkpoints.

    The batch is a multiple of the ranks, which the stages' preflight checks.
    """
    settings = context.settings
    # Without it accelerate takes a CPU group for a single process.
    PartialState(backend=torch.distributed.get_backend())
    automatic = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {
        "output_dir": str(context.folder.checkpoints),
        # To the trainer a rank's share of a step is one batch, which training_step cuts.
        "per_device_train_batch_size": settings.batch_size // group.world_size(),
        "gradient_accumulation_steps": 1,
        "learning_rate": settings.optimizer.learning_rate,
        "weight_decay": settings.optimizer.weight_decay,
        "warmup_steps": settings.optimizer.warmup_fraction,
        "lr_scheduler_type": "linear",
        "max_grad_norm": settings.optimizer.max_grad_norm,
        # The rows of all epochs are one pass, in the order of learning_order.
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "seed": seed_of("trainer", settings.seed),
        "bf16": settings.precision == "bf16",
        "use_cpu": group.device().type == "cpu",
        "deepspeed": deepspeed_config(settings.precision, settings.zero, gradient_clipping="auto", **automatic),
        "accelerator_config": {"use_configured_state": True},
        # Reports says when to save: any other strategy also saves the last step, which the result makes superfluous.
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        # checkpoint_activations is ours.
        "gradient_checkpointing": False,
    }


class Reports(TrainerCallback):
    """Carries the trainer's logs to the journal, and tells the trainer when to save and stop."""

    def __init__(self, context: Context[Any], shown: tuple[str, ...]) -> None:
        self._context, self._shown = context, shown
        self.journal: Journal | None = None
        self._stopping = False

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002 - positional
        """Open the journal, now that the number of steps is known."""
        self.journal = Journal(self._context, state.max_steps, unit="step", shown=self._shown)

    def on_log(self, args: Any, state: Any, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:  # noqa: ARG002 - positional
        """Write the trainer's metrics under our names, and stop at a loss that is not finite."""
        if not logs or "loss" not in logs or self.journal is None:
            return
        names = {"learning_rate": "lr"}
        metrics = {names.get(name, name): float(value) for name, value in logs.items() if name != "epoch"}
        self.journal.log(state.global_step, metrics)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics.get("grad_norm", 0.0))):
            raise DivergedError(
                f"the loss is {metrics['loss']} at step {state.global_step}",
                self._context.stage,
                f"lower {self._context.stage}.optimizer.learning_rate",
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:  # noqa: ARG002 - positional
        """Unfreeze what begins to train at this step."""
        # Within accelerate's wrapper and DeepSpeed's.
        inner = optimizer.optimizer.optimizer
        assert isinstance(inner, GradualAdamW)
        inner.steps = state.global_step
        unfreeze(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - positional
        """Show that a step is done, save it where a checkpoint is due, and stop where the ranks are asked to."""
        step = state.global_step
        self._stopping = ends_here(self._context, step)
        due = step % self._context.settings.checkpoint_every == 0 and step < state.max_steps
        control.should_save = self._stopping or due
        if self._stopping:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002 - positional
        """Close the journal, or raise at once where the ranks were asked to stop."""
        if self._stopping:
            raise stopped(state.global_step)
        if self.journal is not None:
            self.journal.finish()


@dataclass(frozen=True)
class Steps:
    """The optimiser steps of all epochs, each as this rank's micro batches, of which all ranks have equally many."""

    rows: Dataset
    order: Tensor
    """``[row]``: those of each step in turn, by falling length."""
    batch_size: int
    """Rows of a step, over all ranks."""
    lengths: Tensor
    """``[row, 2]``, as :meth:`MicroBatch.cut` takes them."""
    micro_batch: MicroBatch
    collate: Callable[[list[Any]], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, step: int) -> list[tuple[int, dict[str, Any]]]:
        """Return each micro batch's number of rows, and what the model takes of them."""
        batch = self.order.view(-1, self.batch_size)[step]
        mine = (turn[:, group.rank()].tolist() for turn in self.micro_batch.cut(batch, self.lengths))
        return [(len(rows), self.collate([self.rows[row] for row in rows])) for rows in mine]


def micro_batch_of(settings: SupervisedSettings, *, packed: bool) -> MicroBatch:
    """Return the most that a rank computes at a time: rows, whose number divides its share of a step, or tokens."""
    share = settings.batch_size // group.world_size()
    rows = max(size for size in range(1, min(settings.micro_batch, share) + 1) if share % size == 0)
    return MicroBatch(rows, settings.micro_batch_tokens, packed)


class Ordered:
    """Mixin of all trainers; list it first among the bases. The rows of all epochs come in our order, cut into micro
    batches of our size.

    Checkpoints need room, are complete or ignored, and hold TRL's count of tokens.

    length  the tokens of a row of the prepared data set, by which rows are sorted
    tokens  those that it takes of a micro batch's, where these differ
    packed  whether rows lie end to end, so that there is no padding to count
    shown   metrics that the user sees as the stage runs
    """

    state: Any
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    accelerator: Any
    args: Any
    data_collator: Any
    train_dataset: Any
    _total_train_tokens: int

    def __init__(
        self,
        context: Context[SupervisedSettings],
        model: Any,
        length: Callable[[Any], int],
        tokens: Callable[[Any], int] | None = None,
        *,
        packed: bool,
        shown: tuple[str, ...],
        **trainer: Any,
    ) -> None:
        self._context, settings = context, context.settings
        if settings.activation_checkpointing:
            checkpoint_activations(model)
        if settings.zero.of_ranks(group.world_size()).stage == 3:
            mark_leaves(model)
        above: Any = super()
        above.__init__(
            model=model,
            callbacks=[Reports(context, shown)],
            **trainer,
        )
        rows: Any = self.train_dataset
        order = learning_order([length(row) for row in rows], settings.batch_size, settings.epochs, settings.seed)
        taken = torch.tensor([[0, (tokens or length)(row)] for row in rows])
        micro_batch = micro_batch_of(settings, packed=packed)
        self._steps = Steps(rows, torch.tensor(order), settings.batch_size, taken, micro_batch, self.data_collator)

    def get_train_dataloader(self) -> Any:
        """Return the micro batches of a step at a time; accelerate would share rows out, and count micro batches."""
        return DataLoader(cast(Any, self._steps), batch_size=1, collate_fn=itemgetter(0))

    def training_step(
        self,
        model: Any,
        inputs: Sequence[tuple[int, Mapping[str, Any]]],
        num_items_in_batch: Any = None,  # noqa: ARG002 - transformers' signature
    ) -> Tensor:
        """Add up the gradients of a step's micro batches; return the sum of their shares of its loss. A collective."""
        above, share = cast(Any, super()), sum(count for count, _ in inputs)
        # The tokens that sft's loss is divided by, those of all ranks.
        _, items = above.get_batch_samples((part for _, part in inputs), len(inputs), self.args.device)
        loss = torch.zeros((), device=group.device())
        for number, (count, part) in enumerate(inputs, start=1):
            # With the last one DeepSpeed takes the optimiser's step.
            self.accelerator.gradient_state._set_sync_gradients(number == len(inputs))
            # What is no sum over tokens is a mean over the micro batch's rows, and divided by this.
            self.current_gradient_accumulation_steps = share / count
            loss += above.training_step(model, part, items)
            liveness.beat()
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002 - transformers' signature
        """Make AdamW over the weights that train, each by its schedule; only matrices decay."""
        settings, above = self._context.settings.optimizer, cast(Any, super())
        decays = set(above.get_decay_parameter_names(self.model))
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups: list[dict[str, Any]] = []
        for whole in parameter_groups(self.model):
            rate = settings.learning_rate * whole["schedule"].share
            for decay in (True, False):
                parameters = [part for part in whole["params"] if (names[id(part)] in decays) == decay]
                if parameters:
                    weight_decay = settings.weight_decay if decay else 0.0
                    groups.append(whole | {"params": parameters, "lr": rate, "weight_decay": weight_decay})
        self.optimizer = GradualAdamW(groups, lr=settings.learning_rate, fused=True)
        return self.optimizer

    def go_on_counting(self, checkpoint: Path) -> None:
        """Count tokens from where the checkpoint's run was: TRL would count from 0 again."""
        self._total_train_tokens = json.loads((checkpoint / TOKENS).read_text())["tokens"]

    def before_first_step(self) -> None:
        """Measure what needs the initial weights, which a resumed run has too before it reads its checkpoint. A
        collective.
        """

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Read weights and optimiser from our shards, which any number of ranks may have written. A collective.

        The only step of a run has its whole learning rate: a warm-up begins at 0, with which nothing would be learned.
        """
        above: Any = super()
        if max_steps == 1:
            self.args.warmup_steps = 0
        prepared = above._prepare_for_training(max_steps, train_dataloader, None)
        self.before_first_step()
        if resume_from_checkpoint is not None:
            shards.load(self.model_wrapped, trained(self.model), Path(resume_from_checkpoint), SHARDS)
            above._load_optimizer_and_scheduler(resume_from_checkpoint)  # under DeepSpeed it reads the schedule alone
            for parameters, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                parameters["lr"] = rate
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        shards.save(self.model_wrapped, trained(self.model), Path(output_dir), SHARDS)
        if group.is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on with the random numbers of dropout; as many ranks go on with their own."""
        if checkpoint is None or marker(Path(checkpoint))["ranks"] == group.world_size():
            above: Any = super()
            above._load_rng_state(checkpoint)
            return
        torch.manual_seed(seed_of("trainer", self._context.settings.seed, self.state.global_step, group.rank()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write no weights beside our shards, from which a run continues.

        PEFT would also compute virtual tokens on rank 0 alone, with an encoder that is sharded over all ranks.
        """

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        above: Any = super()
        estimate = checkpoint_bytes(self.model)
        with checkpoint_writer.writing(self._context, self.state.global_step, estimate) as checkpoint:
            above._save_checkpoint(model, trial)
            if group.is_main():
                (checkpoint / TOKENS).write_text(json.dumps({"tokens": self._total_train_tokens}))
