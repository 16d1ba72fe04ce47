"""What one rank of a group does for the tests: ``python -m tests.zero.groups tests.zero.checks FOLDER``.

Starting a group costs more than all checks together, so one start runs them all. What each check returns is kept in
``FOLDER/result-<rank>.pt`` for the tests to judge.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from safetensors.torch import save_file
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.ppo import PpoSettings
from rlhf.config.tuning import FULL, LoraTuning, Tuning
from rlhf.config.zero import ZeroSettings
from rlhf.errors import DiskFullError, DivergedError, PreflightError
from rlhf.models import folders, heads, text, tuning
from rlhf.models.heads import TokenLogprobs
from rlhf.models.micro_batches import MicroBatch
from rlhf.rl.losses import clipped_policy_loss
from rlhf.rollout.drawing import uniforms
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.rollout import Generator, roll_out
from rlhf.rollout.sequences import Experience, Sequences, minibatches
from rlhf.rollout.split import GatheredSampler, SplitGenerator
from rlhf.training import checkpoint_writer, loading
from rlhf.training.learner import Optimiser
from rlhf.training.policy import TrainedPolicy
from rlhf.zero import group, shards
from rlhf.zero.engine import STAGE_3, Engine, gathered, sharded_loading, whole_weights
from rlhf.zero.group import computable
from tests.pipeline.helpers import until
from tests.zero import placement
from tests.zero.groups import TIMEOUT_S
from tests.zero.inputs import SIZES
from tests.zero.memory import ON_NODES, counted_gathers, memory, on_nodes
from tests.zero.resuming import (
    DONE,
    STAGES,
    KilledError,
    first_iterations,
    forms,
    of_other_group,
    unbroken_and_resumed,
)

# Before DeepSpeed and accelerate are imported by whatever comes below.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

LORA = LoraTuning(rank=4)
CASES, apart = placement.CASES, placement.apart
FORMS: dict[str, Tuning] = {"full": FULL, "lora": LORA}
COUNTS = (1, 2, 3, 5, 8)
BATCH, PROMPT, TIME = 4, 3, 5
PROMPTS = PromptBatch(prompts=["a", "b", "c"], ids=[[5, 6, 7], [8], [9, 10]], samples=[0, 1, 2])


def rows_of(indices: Tensor) -> Tensor:
    """Something to spread: ``[len(indices), 2]``."""
    return torch.stack([indices.float(), indices.float().square()], dim=1)


def spread(_: Path) -> dict[int, Tensor]:
    """What every rank gets, of counts that the ranks cannot share evenly too."""
    return {count: group.spread(count, rows_of) for count in COUNTS}


def share(_: Path) -> list[int]:
    """This rank's items of eight."""
    return group.share_of(list(range(8)))


def sharded(tiny: Path, method: Tuning, zero: ZeroSettings = STAGE_3) -> Any:
    """The tiny model, sharded as it is read."""
    with sharded_loading("fp32", zero):
        model = folders.load_policy(tiny, torch.float32)
        return tuning.prepared(model, method, tiny, scores=False, seed=0)


class Learner:
    """An engine that learns a fixed batch by heart, each rank its share of it, one sequence a micro batch."""

    def __init__(self, tiny: Path, method: Tuning, zero: ZeroSettings = STAGE_3, *, split: bool = False) -> None:
        self.model = sharded(tiny, method, zero)
        if split:
            self.split = SplitGenerator(tiny, self.model, "fp32", 1.0, 6, group.world_size())
        self.engine = Engine(TokenLogprobs(self.model), "fp32", learning_rate=1e-2, zero=zero)
        tokens = len(text.load_tokenizer(tiny))
        self._ids = torch.randint(5, tokens, (BATCH, PROMPT + TIME), generator=torch.Generator().manual_seed(0))

    def step(self, learning_rate: float = 1e-2) -> float:
        """One optimiser step on the mean of all tokens' negative log-probabilities; the gradients' norm."""
        rows = group.share_of(list(range(BATCH)))
        for row in rows:
            ids = self._ids[row, None]
            logprobs, _ = self.engine(ids, torch.ones_like(ids), TIME, 1.0, False)
            self.engine.backward(-logprobs.sum() / (BATCH * TIME), last=row == rows[-1])
        return self.engine.step(learning_rate)

    @torch.no_grad()
    def held(self) -> float:
        """The share of all weights that this rank keeps once it has computed with them."""
        ids = self._ids[:1]
        self.engine(ids, torch.ones_like(ids), TIME, 1.0, False)
        parameters: list[Any] = list(self.model.parameters())
        kept = [kind for each in parameters for kind in (each.ds_tensor, each.ds_secondary_tensor) if kind is not None]
        return sum(tensor.numel() for tensor in kept) / sum(each.ds_numel for each in parameters)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, on rank 0."""
        return whole_weights(self.model, trained_only=True)


def whole(tiny: Path) -> dict[str, Tensor]:
    """All weights of a model that nothing has changed."""
    model = sharded(tiny, FULL)
    Engine(TokenLogprobs(model), "fp32")
    return whole_weights(model, trained_only=False)


def steps(tiny: Path) -> dict[str, Any]:
    """Three optimiser steps: weights and gradient norms."""
    found: dict[str, Any] = {}
    for form, method in FORMS.items():
        learner = Learner(tiny, method)
        norms = [learner.step() for _ in range(3)]
        found[form] = {"norms": norms, "weights": learner.weights()}
    return found


def resume(tiny: Path, folder: Path) -> dict[str, Any]:
    """Weights after four steps: in one go, and by a second engine from a save after two."""
    found: dict[str, Any] = {}
    for form, method in FORMS.items():
        first = Learner(tiny, method)
        for _ in range(2):
            first.step()
        first.engine.save(folder / form, "policy")
        halfway = first.weights()
        group.barrier()
        if group.is_main():
            (folder / form / DONE).touch()
        others = of_other_group(folder / form)
        until((others / DONE).exists, f"{others}: the other group's save", TIMEOUT_S)
        second, third = (Learner(tiny, method) for _ in range(2))
        second.engine.load(folder / form, "policy")
        third.engine.load(others, "policy")
        loaded = second.weights()
        third.engine.save(folder / f"{form}-again", "policy")
        for learner in (first, second, third):
            for _ in range(2):
                learner.step(5e-3)
        found[form] = {
            "halfway": halfway,
            "loaded": loaded,
            "unbroken": first.weights(),
            "resumed": second.weights(),
            "continued": third.weights(),
            "theirs": saved(others),
            "again": saved(folder / f"{form}-again"),
        }
    return found


def saved(folder: Path) -> dict[str, Tensor]:
    """All that the ranks of a group saved: fp32 weights and Adam's moments, whole, and the steps taken."""
    files = [torch.load(path, weights_only=True) for path in sorted(folder.glob("policy-*.pt"))]
    whole: dict[str, Tensor] = {"steps": torch.tensor([file["steps"] for file in files]).unique()}
    for name, fragment in ((name, fragment) for file in files for name, fragment in file["weights"].items()):
        assert whole.setdefault(f"{name} step", torch.tensor(fragment["step"])) == fragment["step"]
        for key in (shards.WEIGHT, *shards.MOMENTS):
            flat = whole.setdefault(f"{name} {key}", torch.full((math.prod(fragment["shape"]),), torch.nan))
            flat[fragment["start"] :][: len(fragment[key])] = fragment[key]
    return whole


def not_a_number(tiny: Path) -> dict[str, Any]:
    """The error of a step in which the last rank alone has a loss that is no number; and the weights after it."""
    learner = Learner(tiny, FULL)
    before = learner.weights()
    ids = torch.full((1, PROMPT + TIME), 9)
    loss = learner.engine(ids, torch.ones_like(ids), TIME, 1.0, False)[0].sum()
    if group.rank() == group.world_size() - 1:
        loss = loss * float("nan")
    error = ""
    try:
        learner.engine.backward(loss, last=True)
        learner.engine.step(0.1)
    except DivergedError as diverged:
        error = diverged.what
    return {"error": error, "before": before, "after": learner.weights()}


def context_of(attempt: Path, *earlier: Path) -> Context[PpoSettings]:
    """An attempt of a stage that takes nothing."""
    return Context(
        stage="ppo",
        key="0" * 64,
        settings=PpoSettings(),
        inputs={},
        output=attempt,
        attempt=attempt,
        cache=attempt,
        attempts=(*earlier, attempt),
    )


def checkpointing(folder: Path) -> dict[str, Any]:
    """What is left of four checkpoints and of an earlier attempt's, and which was the newest after each.

    The second is cut off; where the third will lie there is what a killed group left of it, with a marker that fits.
    """
    earlier, newest = folder / "earlier", list[str]()
    context = context_of(folder, earlier)

    def write(context: Context[Any], step: int) -> None:
        with suppress(KilledError), checkpoint_writer.writing(context, step, 0) as checkpoint:
            (checkpoint / f"shard-{group.rank()}").write_bytes(b"x" * (step + 1))
            group.barrier()
            if context.attempt == folder and step == 2:
                raise KilledError
        group.barrier()
        found = checkpoint_writer.newest_complete([earlier, folder])
        newest.append(str(found and found.relative_to(folder)))
        group.barrier()

    if group.is_main():
        earlier.mkdir()
        left = AttemptFolder(folder).checkpoint(3)
        left.mkdir(parents=True)
        (left / "shard-7").write_bytes(b"half")
        (left / checkpoint_writer.MARKER).write_text(json.dumps({"ranks": 8, "sizes": {"shard-0": 4, "shard-7": 4}}))
    group.barrier()
    write(context_of(earlier), 1)
    for step in (2, 3, 4):
        write(context, step)
    return {
        "newest": newest,
        "left": sorted(str(path.relative_to(folder)) for path in folder.glob("**/checkpoint-*")),
        "third": json.loads((AttemptFolder(folder).checkpoint(3) / checkpoint_writer.MARKER).read_text()),
    }


def full_disk(tiny: Path, folder: Path) -> dict[str, Any]:
    """What a disk that is full before and in the middle of a write does to checkpoints; ``why_not`` without one."""
    if group.world_size() > 1:
        return {"why_not": "one rank shows it"}
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        return {"why_not": mounted.stderr.strip()}
    try:
        return _filled(Learner(tiny, FULL).engine, context_of(small))
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def _filled(engine: Engine, context: Context[Any]) -> dict[str, Any]:
    filler = context.attempt / "filler"
    found: dict[str, Any] = {}

    def fill(but: int) -> None:
        filler.write_bytes(bytes(shutil.disk_usage(context.attempt).free - but))

    def write(name: str, step: int, save: Callable[[Path], None]) -> None:
        error: DiskFullError | None = None
        try:
            with checkpoint_writer.writing(context, step, engine.checkpoint_bytes()) as checkpoint:
                save(checkpoint)
        except DiskFullError as full:
            error = full
        newest = checkpoint_writer.newest_complete(list(context.attempts))
        left = sorted(path.name for path in context.attempt.glob("checkpoints/*"))
        found[name] = {"error": error, "newest": newest and newest.name, "left": left}
        filler.unlink(missing_ok=True)

    def save_torch(checkpoint: Path) -> None:
        engine.save(checkpoint, "policy")

    def save_torch_without_room(checkpoint: Path) -> None:
        fill(100_000)
        save_torch(checkpoint)

    def save_safetensors_without_room(checkpoint: Path) -> None:
        fill(100_000)
        save_file({"shard": torch.zeros(100_000)}, checkpoint / "average.safetensors")

    def save_text_without_room(checkpoint: Path) -> None:
        fill(0)
        (checkpoint / "kl.json").write_text(" " * 100_000)

    fill(1_000)
    write("first, no room", 1, save_torch)
    write("first", 1, save_torch)
    fill(100_000)
    write("second, no room", 2, save_torch)
    write("torch", 2, save_torch_without_room)
    write("safetensors", 2, save_safetensors_without_room)
    write("text", 2, save_text_without_room)
    write("second", 2, save_torch)
    return found


def other_groups(folder: Path) -> dict[str, str]:
    """Which checkpoint a stage goes on from; and the errors when the newest was written otherwise."""
    context = context_of(folder)
    newest = checkpoint_writer.checkpoint_to_resume(context)
    assert newest is not None
    found = {"newest": newest.name}
    written = json.loads((newest / checkpoint_writer.MARKER).read_text())
    others: dict[str, dict[str, Any]] = {
        "bf16": {"precision": "bf16"},
        "older": {"shards": None},
        "nvme": {"optimiser": "nvme"},
    }
    for name, other in others.items():
        group.barrier()
        if group.is_main():
            (newest / checkpoint_writer.MARKER).write_text(json.dumps(written | other))
        group.barrier()
        try:
            found[name] = str(checkpoint_writer.checkpoint_to_resume(context))
        except PreflightError as error:
            found[name] = str(error)
    found["left"] = str(checkpoint_writer.newest_complete(context.attempts))
    return found


def computed_precision(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """What a stage that asks for bf16 computes in, and what is said of it, by which ranks' CPUs have instructions."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, precision, able in (
        ("all", "bf16", True),
        ("none", "bf16", False),
        ("the first alone", "bf16", group.is_main()),
        ("fp32", "fp32", False),
    ):
        notes: list[str] = []
        context = context_of(folder)
        context = replace(context, settings=context.settings.model_copy(update={"precision": precision}))
        with (
            patch.object(torch.cpu, "get_capabilities", return_value={"avx2": True, "avx512_bf16": able}),
            patch.object(Context, "note", lambda _, line, notes=notes: notes.append(line)),
        ):
            found[name] = computable(context).settings.precision, notes
    return found


def replica(tiny: Path, folder: Path) -> dict[str, Any]:
    """Responses of an unsharded copy before its policy was trained and after, and of the exported model."""
    found: dict[str, Any] = {}
    noise = uniforms(0, range(6), 12)
    prompts = [[5 + row, 40, 41 + row] for row in range(6)]

    for form, method in FORMS.items():
        learner = Learner(tiny, method, split=True)
        prepare = partial(tuning.prepared, tuning=method, source=tiny, scores=False, seed=0)
        copied = Generator(tiny, "fp32", 1.0, 6, prepare=prepare, source=learner.model)
        gathered_layers = GatheredSampler(tiny, learner.engine.module, learner.model, 1.0, 2)
        samplers = {"copied": copied, "split": learner.split, "gathered": gathered_layers}
        before = {name: sampler.sample(prompts, noise) for name, sampler in samplers.items()}
        for _ in range(3):
            learner.step(0.05)
        refreshed = {name: sampler.sample(prompts, noise) for name, sampler in samplers.items()}
        exported, weights = folder / f"replica-{form}", learner.weights()
        if group.is_main():
            tuning.save(learner.model, weights, tiny, exported, method, scores=False)
        group.barrier()
        plain = Generator(exported, "fp32", 1.0, 6).sample(prompts, noise).ids
        found[form] = {"before": before, "refreshed": refreshed, "exported": plain}
    return found


def nodes(folder: Path) -> str:
    """The ranks that hold a copy together, or the error where two would be on two nodes."""
    given = {"rollout": {"tensor_parallel": 2}, "workers": {"count": "auto"}}
    context = context_of(folder)
    context = replace(context, settings=PpoSettings.model_validate(context.settings.model_dump() | given))
    try:
        with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "1"}):
            return str(loading.together(context, folder))
    except PreflightError as error:
        return error.what


def experience_of(sequences: Sequences, logprobs: Tensor) -> Experience:
    """The rollout with advantages that ask for something else: odd tokens are good, even ones bad."""
    advantages = torch.where(sequences.ids[:, -sequences.time :] % 2 == 1, 1.0, -1.0)
    zeros = torch.zeros_like(logprobs)
    return Experience.of(
        sequences,
        logprobs=logprobs,
        reference_logprobs=zeros,
        values=zeros,
        advantages=advantages,
        returns=zeros,
    )


def policies(tiny: Path, folder: Path) -> dict[str, Any]:
    """Samples of a policy under PPO: fresh, after an update, and by another one resumed from its checkpoint."""
    found: dict[str, Any] = {}
    for form, method in FORMS.items():

        def fresh(method: Tuning = method) -> TrainedPolicy:
            optimiser = Optimiser("policy", learning_rate=0.03, max_grad_norm=1.0)
            return TrainedPolicy.load_folder(
                tiny, "fp32", 1.0, MicroBatch(4), method=method, source=tiny, seed=0, optimiser=optimiser
            )

        policy = fresh()
        batch = copy.deepcopy(PROMPTS)
        # As many samples as two ranks can share evenly.
        batch = PromptBatch([*batch.prompts, "d"], [*batch.ids, [11, 12]], [*batch.samples, 3])
        rollout = roll_out(policy, batch, 0, 12)
        sequences = rollout.sequences
        reference = policy.reference_logprobs(sequences)
        logprobs, entropies = policy.logprobs_and_entropies(sequences)
        experience = experience_of(sequences, logprobs)
        sums = [
            policy.update(minibatch, partial(clipped_policy_loss, clip=0.2), 0.03)
            for minibatch in [
                *minibatches(experience, 1, MicroBatch(4), 0),
                *minibatches(experience, 1, MicroBatch(4), 1),
            ]
        ]
        policy.save(folder / f"policy-{form}")
        resumed = fresh()
        resumed.load(folder / f"policy-{form}")
        found[form] = {
            "ids": sequences.ids,
            "mask": rollout.mask,
            "logprobs": logprobs,
            "entropies": entropies,
            "reference": reference,
            "reference_after": policy.reference_logprobs(sequences),
            "logprobs_after": policy.logprobs(sequences),
            "first_ratio": sums[0].mean_ratio,
            "tokens": sums[0].tokens,
            "updated": roll_out(policy, batch, 0, 12).sequences.ids,
            "resumed": roll_out(resumed, batch, 0, 12).sequences.ids,
        }
    return found


def across_nodes(tiny: Path, folder: Path) -> dict[str, Any]:
    """Steps of engines whose ranks keep the weights a second time on their nodes, and of one whose ranks do not; and
    of one that goes on from what a single rank saved.
    """
    found: dict[str, Any] = {}
    plain = ON_NODES.model_copy(update={"secondary_partition": 1})
    theirs = folder.parent / "1" / "full"
    until((theirs / DONE).exists, f"{theirs}: the save of one rank", TIMEOUT_S)
    for name, zero in {"plain": plain, "nodes": ON_NODES, "continued": ON_NODES}.items():
        learner, rates = Learner(tiny, FULL, zero), [1e-2, 1e-2, 5e-3]
        if name == "continued":
            learner.engine.load(theirs, "policy")
            rates = [5e-3, 5e-3]
        with counted_gathers() as gathers:
            norms = [learner.step(rate) for rate in rates]
        found[name] = {"norms": norms, "weights": learner.weights(), "gathers": dict(gathers), "held": learner.held()}
        learner.engine.save(folder / name, "policy")
        group.barrier()
        found[name]["saved"] = saved(folder / name)
    return found


def gathering(tiny: Path) -> Tensor:
    """A weight that rank 0 alone has changed while it was whole, as every rank then sees it."""
    model = sharded(tiny, FULL)
    weight = model.model.norm.weight
    with gathered([weight], modify=True):
        if group.is_main():
            weight.data.fill_(7.0)
    with gathered([weight]):
        return weight.detach().clone()


def of_stages(folder: Path, world_size: int) -> dict[str, Callable[[], Any]]:
    """The checks that run stages."""
    checks: dict[str, Callable[[], Any]] = {
        "first_iterations": partial(first_iterations, folder.parent, folder / "first"),
        "memory": partial(memory, folder.parent, folder / "memory"),
        "together": partial(placement.together, folder.parent, folder / "together"),
    }
    if world_size > 1:
        checks["forms"] = partial(forms, folder.parent, folder / "forms")
    for name in STAGES:
        checks[name] = partial(unbroken_and_resumed, name, folder.parent, folder / name.replace(" ", "-"))
    return checks


def main(rank: int, world_size: int, folder: Path) -> None:
    """Run all checks in turn, together with the other ranks."""
    torch.set_num_threads(1)
    if world_size > 1:
        # The results of one rank, which computes all logits at once, are what those of two are compared with.
        heads.CHUNK, heads.FEWEST = 1, 5
    # DeepSpeed would compile its shared-memory collectives, which takes half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder / 'meeting'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=rank, world_size=world_size)
    tiny = folder.parent / "tiny"
    checks: dict[str, Callable[[], Any]] = {
        "full_disk": partial(full_disk, tiny, folder),
        "spread": partial(spread, folder),
        "share": partial(share, folder),
        "largest": lambda: group.all_max(torch.tensor([rank, -rank])).tolist(),
        "gathering": partial(gathering, tiny),
        "whole": partial(whole, tiny),
        "steps": partial(steps, tiny),
        "resume": partial(resume, tiny, folder),
        "not_a_number": partial(not_a_number, tiny),
        "checkpointing": partial(checkpointing, folder),
        "other_groups": partial(other_groups, folder),
        "precision": partial(computed_precision, folder),
        "nodes": partial(nodes, folder),
        "replica": partial(replica, tiny, folder),
        "policies": partial(policies, tiny, folder),
    }
    if world_size == SIZES[-1]:
        # DeepSpeed keeps the groups of nodes that it has made: what comes after would have them too.
        checks = {name: checks[name] for name in ("spread", "whole")}
        checks["across_nodes"] = partial(across_nodes, tiny, folder)
        checks["on_nodes"] = partial(on_nodes, folder.parent, folder / "nodes")
    else:
        checks |= of_stages(folder, world_size)
    results: dict[str, Any] = {}
    for name, check in checks.items():
        start = time.process_time()
        results[name] = check()
        # The machine may be busy with other things.
        print(f"{name}: {time.process_time() - start:.1f} s of this process", flush=True)
    torch.save(results, folder / f"result-{group.rank()}.pt")
    dist.destroy_process_group()
