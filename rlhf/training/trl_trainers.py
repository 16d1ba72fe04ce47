"""sft, rm and dpo through TRL: with :mod:`rlhf.training.trl_steps` all that knows TRL's trainers, transformers' Trainer
and accelerate.

TRL and transformers give the training loop with its AdamW, learning-rate schedule and mixed precision, DeepSpeed's
set-up, adapters, sft's loss and packing, dpo's loss, and of a checkpoint's content the schedule, random numbers, and
how many rows were learned from.
Ours are the order of the rows, rm's lists, loss and metrics, dpo's reference and soft labels, the weights and the
optimiser's state in a checkpoint, the count of tokens after a resume, when a checkpoint is written and when it is
complete, stopping, the journal, measurements after training, and the exported folder.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.config.stages import DpoSettings, RmSettings, SftSettings
from rlhf.models import folders, reward_losses, tuning
from rlhf.models.heads import body_of, compute_in_fp32, learned_tokens, packs_texts, unwrapped
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.packable import keeps_texts_apart
from rlhf.models.reward import raw_scores
from rlhf.models.reward_losses import COLUMNS, ListBatch, ListLoss, collate
from rlhf.models.shared_beginnings import read_beginnings_once
from rlhf.models.templates import Tokenizer
from rlhf.models.virtual_tokens import has_virtual_tokens
from rlhf.training import checkpoint_writer
from rlhf.training.trl_steps import Ordered, common_arguments
from rlhf.zero import group
from rlhf.zero.engine import (
    is_sharded,
    whole_weights,
)


class _SftTrainer(Ordered, SFTTrainer):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Shards are gathered for each chunk of logits, of which each rank would have another number.
        if group.device().type == "cpu" and not is_sharded(self.model):
            read_learned_tokens(unwrapped(self.model))


def read_learned_tokens(model: Any) -> None:
    """Have a model compute sft's log-probabilities for learned tokens alone.

    On a CPU TRL computes those of prompts too, with several steps over the logits where torch has kernels that are one.
    """
    forward = model.forward
    # The logits of TRL's own tiles are in fp32 too.
    compute_in_fp32(model.get_output_embeddings())

    @wraps(forward)
    def learned(*arguments: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **named: Any) -> Any:
        if not fused_lm_head or labels is None or named.get("output_router_logits"):
            return forward(*arguments, fused_lm_head=fused_lm_head, labels=labels, **named)
        _, body = body_of(model)
        outputs = body(*arguments, **named)
        mask = labels[:, 1:] != -100
        hidden, tokens = outputs.last_hidden_state[:, :-1][mask], labels[:, 1:][mask]
        found = learned_tokens(model, outputs, hidden, tokens)
        logprobs, entropy, likeliest = (part.new_zeros(mask.shape).masked_scatter(mask, part) for part in found)
        return FusedCausalLMOutput(log_probs=logprobs, entropy=entropy, is_top1=likeliest, label_mask=mask)

    model.forward = learned


class _RewardTrainer(Ordered, RewardTrainer):
    """TRL's trainer with lists of any number of responses in place of pairs.

    TRL's own loss is that of lists of two; a test compares ours with it.
    """

    def __init__(self, loss: ListLoss, *arguments: Any, **named: Any) -> None:
        self._loss = loss
        super().__init__(*arguments, **named)

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
        """Return the mean over the micro batch's lists; all lists of a batch have one weight in any micro batch."""
        lists = ListBatch(**inputs)
        outputs = model(input_ids=lists.input_ids, attention_mask=lists.attention_mask, use_cache=False)
        scores = lists.arranged(outputs.logits.squeeze(-1).float())
        loss = self._loss(scores, lists).mean()
        gather: Callable[[Tensor], Tensor] = self.accelerator.gather
        metrics = self._metrics["train"]
        self._total_train_tokens += int(gather(lists.attention_mask.sum()).sum())
        metrics["num_tokens"] = [self._total_train_tokens]
        with torch.no_grad():
            rewards = scores[lists.present]
            accuracy = reward_losses.accuracy(scores, lists.strengths, lists.present).mean()
            metrics["min_reward"].append(gather(rewards.min()).min().item())
            metrics["mean_reward"].append(gather(rewards.mean()).mean().item())
            metrics["max_reward"].append(gather(rewards.max()).max().item())
            metrics["accuracy"].append(gather(accuracy).mean().item())
        return (loss, outputs) if return_outputs else loss


class _DpoTrainer(Ordered, DPOTrainer):
    """TRL's trainer with the initial policy's log-probabilities measured once, by the model before its first step.

    So there is no second model, whatever the way of fine-tuning; TRL would copy the model, or an adapter.

    heldout  pairs whose log-probabilities are also measured
    collate  TRL's
    """

    def __init__(
        self,
        context: Context[DpoSettings],
        model: Any,
        heldout: Dataset,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        **named: Any,
    ) -> None:
        self._heldout, self._collate = heldout, collate
        self._reference = self._heldout_reference = torch.empty(0)
        super().__init__(
            context,
            model,
            _tokens_of_longer,
            lambda row: 2 * _tokens_of_longer(row),
            packed=False,
            shown=("loss", "rewards/accuracies"),
            data_collator=self.collated,
            ref_model=object(),  # TRL makes no reference where it is given one
            **named,
        )
        self.precompute_ref_logps = True

    @property
    def ref_model(self) -> None:
        """None: what TRL is given in its place is forgotten."""

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        del model

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:  # noqa: ARG002 - TRL's signature
        return dataset

    def before_first_step(self) -> None:
        """Measure the initial policy's log-probabilities of all pairs."""
        self._reference = self._logprobs(self.train_dataset, "reference")
        self._heldout_reference = self._logprobs(self._heldout, "reference of held-out pairs")

    def collated(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch of training pairs, the offset as a part of the reference."""
        batch = self._collate(rows)
        chosen, rejected = self._reference[[row["number"] for row in rows]].unbind(-1)
        offsets, preferences = (torch.tensor([row[name] for row in rows]) for name in ("offset", "preference"))
        reference = {"ref_chosen_logps": chosen + offsets / self.beta, "ref_rejected_logps": rejected}
        return batch | reference | {"preferences": preferences}

    @torch.no_grad()
    def _logprobs(self, rows: Any, what: str) -> Tensor:
        """Return log π ``[pair, 2]`` of chosen and rejected responses, in nats. A collective.

        what  is measured, for the user
        """
        engine = self.model_wrapped
        engine.eval()
        lengths = torch.tensor([_tokens_of_longer(row) for row in rows])
        order = lengths.argsort(stable=True)
        batches = order.split(self._context.settings.micro_batch)
        mine = group.my_rows(len(batches)).tolist()
        found = torch.zeros(len(mine), len(batches[0]), 2)
        for place, number in enumerate(mine):
            pairs = [rows[row] for row in batches[number].tolist()]
            batch = {name: value.to(group.device()) for name, value in self._collate(pairs).items()}
            labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
            outputs = engine(**batch, labels=labels, use_cache=False, fused_lm_head=True)
            found[place, : len(pairs)] = outputs.log_probs.sum(1).view(2, -1).T.cpu()
            self._context.progress(f"{what}, batch {place + 1} of {len(mine)}", place + 1, len(mine))
        sorted_pairs = group.gather_rows(found, len(batches)).flatten(0, 1)[: len(order)]
        return torch.empty_like(sorted_pairs).index_copy_(0, order, sorted_pairs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return TRL's loss, and of soft labels what makes a part 1 - p of each pair one of the opposite order:

            -p log σ(z) - (1 - p) log σ(-z) = -log σ(z) + (1 - p) z

        with z the difference of rewards, which is 0 where p is 1.
        """
        preferences = inputs.pop("preferences")
        seen: list[Any] = []

        def forward(**named: Any) -> Any:
            seen.append(model(**named))
            return seen[0]

        loss = super()._compute_loss(forward, inputs, return_outputs)
        chosen, rejected = seen[0].log_probs.sum(1).chunk(2)
        rewards = self.beta * (chosen - inputs["ref_chosen_logps"] - rejected + inputs["ref_rejected_logps"])
        return loss + ((1 - preferences) * rewards).mean()

    def heldout_margins(self) -> Tensor:
        """Return the differences of the rewards of held-out pairs ``[pair]``, chosen less rejected. A collective."""
        ratios = self._logprobs(self._heldout, "held-out pairs") - self._heldout_reference
        return self.beta * (ratios[:, 0] - ratios[:, 1])


def _tokens_of_longer(row: Any) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _has_virtual_tokens(model: Any) -> bool:
    """Return whether a model's routers, of a mixture of experts, are frozen, and their loss counts other tokens."""
    base = unwrapped(model)
    return has_virtual_tokens(getattr(base, base.base_model_prefix))


def sft_trainer(
    context: Context[SftSettings],
    load: Callable[[], Any],
    tokenizer: Tokenizer,
    demonstrations: Dataset,
    heldout: Dataset | dict[str, Dataset],
) -> Any:
    """Make TRL's SFTTrainer: the loss is of completions alone.

    Several demonstrations are packed into a sequence where ``packing`` is set and the model keeps them apart.

    load     loads the model; called when transformers already knows of ZeRO-3, so that it is sharded as it is read
    heldout  by task where there are several
    """
    settings = context.settings
    arguments = SFTConfig(**common_arguments(context), max_length=settings.max_length, completion_only_loss=True)
    model = load()
    virtual = _has_virtual_tokens(model)
    arguments.packing = settings.packing and keeps_texts_apart(model.config) and not virtual
    if arguments.packing:
        read_beginnings_once(unwrapped(model))
    if virtual:
        arguments.router_aux_loss_coef = 0.0
    if settings.packing and not arguments.packing and group.is_main():
        apart = f"{model.config.model_type} models do not keep packed texts apart"
        why = "virtual tokens stand before each text" if virtual else apart
        context.note(f"{why}: each demonstration is padded instead, and batch_size counts demonstrations")
    return _SftTrainer(
        context,
        model,
        lambda row: len(row["input_ids"]),
        packed=arguments.packing,
        shown=("loss", "mean_token_accuracy"),
        args=arguments,
        train_dataset=demonstrations,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )


def reward_trainer(
    context: Context[RmSettings], load: Callable[[], Any], tokenizer: Tokenizer, lists: Dataset, loss: ListLoss
) -> Any:
    """Make TRL's RewardTrainer over lists of responses.

    load   as for :func:`sft_trainer`
    lists  tokenised, with :data:`rlhf.models.reward_losses.COLUMNS`
    """
    arguments = RewardConfig(**common_arguments(context), max_length=None)
    model = load()
    packed = packs_texts(unwrapped(model))

    def tokens(row: Any) -> int:
        lengths = list(map(len, row["ids"]))
        return sum(lengths) if packed else len(lengths) * max(lengths)

    return _RewardTrainer(
        loss,
        context,
        model,
        lambda row: max(map(len, row["ids"])),
        tokens,
        packed=packed,
        shown=("loss", "accuracy"),
        args=arguments,
        train_dataset=lists,
        data_collator=partial(collate, padding=tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def dpo_trainer(
    context: Context[DpoSettings], load: Callable[[], Any], tokenizer: Tokenizer, pairs: Dataset, heldout: Dataset
) -> Any:
    """Make TRL's DPOTrainer over tokenised pairs, whose reference is the model before its first step.

    load   as for :func:`sft_trainer`
    pairs  columns ``number``, ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and of training pairs ``offset`` and
           ``preference``
    """
    settings = context.settings
    smoothing = settings.label_smoothing if settings.loss == "robust" else 0.0
    more: dict[str, Any] = {"beta": settings.beta, "loss_type": [settings.loss], "label_smoothing": smoothing}
    arguments = DPOConfig(**common_arguments(context), **more, max_length=settings.max_length)
    model = load()
    if _has_virtual_tokens(model):
        arguments.router_aux_loss_coef = 0.0
    return _DpoTrainer(
        context,
        model,
        heldout,
        DataCollatorForPreference(tokenizer.pad_token_id, settings.max_length),
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
    )


def train(trainer: Any, context: Context[Any]) -> None:
    """Train from the newest complete checkpoint, or from the start; errors as :func:`loop.resumable_steps`."""
    newest = checkpoint_writer.checkpoint_to_resume(context)
    if newest is not None:
        trainer.go_on_counting(newest)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def export(
    trainer: Any, source: Path, context: Context[Any], *, scores: bool, config: dict[str, Any] | None = None
) -> None:
    """Write the trained model's folder. A collective.

    source  the plain folder that the model was loaded from
    """
    method = context.settings.tuning
    weights = whole_weights(trainer.model, trained_only=isinstance(trainer.model, PeftModel))
    # TRL sets this for the loss of the routers, which it adds to sft's.
    folders.without_router_logits(trainer.model)
    if group.is_main():
        tuning.save(trainer.model, weights, source, context.output, method, scores=scores, config=config)
    group.barrier()


def heldout_losses(trainer: Any, at_once: int) -> dict[str, float]:
    """Return ``eval/loss``, over all held-out rows, and of several tasks ``eval/loss/<task>``. A collective.

    It is the mean negative log-likelihood, in nats per learned token.

    at_once  rows of a forward pass; changes the result by rounding only
    """
    heldout = trainer.eval_dataset
    if not isinstance(heldout, dict):
        total, tokens = heldout_sums(trainer, heldout, at_once)
        return {"eval/loss": total / tokens}
    sums = {task: heldout_sums(trainer, rows, at_once) for task, rows in cast(dict[str, Any], heldout).items()}
    totals, tokens = zip(*sums.values(), strict=True)
    return {"eval/loss": sum(totals) / sum(tokens)} | {
        f"eval/loss/{task}": sums[task][0] / sums[task][1] for task in sums
    }


@torch.no_grad()
def heldout_sums(trainer: Any, rows: Any, at_once: int) -> tuple[float, float]:
    """Return the negative log-likelihood of rows, in nats, and the number of their learned tokens. A collective."""
    engine = trainer.model_wrapped
    engine.eval()
    batches = torch.arange(len(rows)).split(at_once)
    mine, device = group.my_rows(len(batches)).tolist(), group.device()
    sums = torch.zeros(len(mine), 2, dtype=torch.float64)  # of each batch: over its tokens, and their number
    for place, number in enumerate(mine):
        batch = trainer.data_collator([rows[row] for row in batches[number].tolist()])
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        # As in training, TRL's forward pass returns log-probabilities without keeping the logits.
        outputs = engine(**batch, use_cache=False, fused_lm_head=True)
        sums[place, 0], sums[place, 1] = -outputs.log_probs.double().sum(), outputs.label_mask.sum()
        liveness.beat()
    total, tokens = group.gather_rows(sums, len(batches)).sum(0).tolist()
    return total, tokens


def scores(trainer: Any, texts: Sequence[list[int]], at_once: int) -> Tensor:
    """Return the trained reward model's raw scores ``[text]`` of rows of token ids. A collective.

    at_once  rows of a forward pass
    """
    engine = trainer.model_wrapped
    engine.eval()

    def score(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return engine(input_ids=ids, attention_mask=attention_mask).logits.squeeze(-1).float()

    return raw_scores(score, trainer.processing_class, texts, MicroBatch(at_once))
