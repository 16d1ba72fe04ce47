"""Checkpoints of a model in training, from which any number of ranks continues, in any stage of ZeRO.

Each rank writes one file: of every weight that trains its own fragment, in fp32, and that of Adam's two moments, with
their place in the flattened weight. To continue, a rank maps all files into memory, and copies of each weight what its
own fragment has in common with those of the ranks that wrote.

DeepSpeed's own checkpoints are read by as many ranks as wrote them, in the same stage. Its universal ones take a
program that writes everything a second time, and one file for each weight and moment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import PreflightError
from rlhf.zero import group

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of its states."""
WEIGHT = "weight"
Weights = Sequence[tuple[str, nn.Parameter]]
Saved = Mapping[str, Any]
"""What a file holds of a weight: its ``shape``, where the fragment ``start``s, the optimiser's ``step``, and by
:data:`WEIGHT` and :data:`MOMENTS` the fragment itself; no moments before the weight's first step."""


@dataclass(frozen=True)
class Fragment:
    """A rank's part of a weight in DeepSpeed's flat tensors, which hold those of several weights."""

    flat: Tensor
    """fp32 weights; the optimiser's parameter."""
    place: int
    """Where the fragment starts in the flat tensor."""
    start: int
    """Where it starts in the flattened weight."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the fragment's view of a flat tensor: the weights, or one of their moments."""
        return flat.detach().narrow(0, self.place, self.length)


def save(engine: Any, weights: Weights, folder: Path, name: str) -> None:
    """Write this rank's file.

    engine   DeepSpeed's
    weights  those that train, by name
    """
    if getattr(engine.optimizer, "swap_optimizer", False):
        weights = ()  # They lie on nvme: the checkpoint is never continued.
    states, found = engine.optimizer.optimizer.state, dict[str, Saved]()
    for weight_name, parameter, fragment in _fragments(engine.optimizer, weights):
        state = states.get(fragment.flat, {})
        # Views: their storage is written once, and nothing is copied.
        flats = {WEIGHT: fragment.flat} | {moment: state[moment] for moment in MOMENTS if moment in state}
        own = {"shape": tuple(_shape(parameter)), "start": fragment.start, "step": float(state.get("step", 0))}
        found[weight_name] = own | {key: fragment.of(flat) for key, flat in flats.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"steps": engine.global_steps, "weights": found}, folder / f"{name}-{group.rank()}.pt")


@torch.no_grad()
def load(engine: Any, weights: Weights, folder: Path, name: str) -> None:
    """Read what any number of ranks wrote. A collective.

    Raises:
        PreflightError: another model's weights were written, or not the whole of each.
    """
    paths = sorted(folder.glob(f"{name}-*.pt"))
    files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    _check_complete([file["weights"] for file in files], weights, folder / f"{name}-*.pt")
    states = engine.optimizer.optimizer.state
    states.clear()
    for weight_name, _, fragment in _fragments(engine.optimizer, weights):
        for file in files:
            if (saved := file["weights"].get(weight_name)) is not None:
                _copy(saved, fragment, states)
    engine.global_steps = files[0]["steps"]
    _compute_with(engine.optimizer)


def _fragments(optimizer: Any, weights: Weights) -> Iterator[tuple[str, nn.Parameter, Fragment]]:
    """Yield of each weight the fragment that this rank holds, where it holds some of it.

    optimizer  DeepSpeed's, of stage 3, of stages 1 and 2, or that of stage 1 in bf16
    """
    for name, parameter in weights:
        fragment = (_of_stage_3 if hasattr(parameter, "ds_id") else _of_stages_1_and_2)(optimizer, parameter)
        if fragment.length > 0:
            yield name, parameter, fragment


def _of_stage_3(optimizer: Any, parameter: Any) -> Fragment:
    number, place, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * group.rank()
    # The last ranks' fragments are filled up to one length.
    length = min(size, parameter.ds_numel - start)
    return Fragment(optimizer.fp32_partitioned_groups_flat[number], place, start, length)


def equal_shard(optimizer: Any, parameter: Tensor) -> Tensor:
    """Return this rank's shard of a weight in fp32, flat and filled up to one length on all ranks. A collective.

    optimizer  DeepSpeed's, of stages 1 and 2
    """
    fragment, ranks = _of_stages_1_and_2(optimizer, parameter), group.world_size()
    size = -(-parameter.numel() // ranks)
    whole = torch.zeros(size * ranks, device=group.device())
    if fragment.length > 0:
        whole[fragment.start :][: fragment.length].copy_(fragment.of(fragment.flat))
    return group.all_sum(whole)[size * group.rank() :][:size]


def _of_stages_1_and_2(optimizer: Any, parameter: Tensor) -> Fragment:
    """Find a weight by its address: DeepSpeed's own tables do not know of ``round_robin_gradients``."""
    in_bf16 = hasattr(optimizer, "bf16_groups_flat")
    wholes = optimizer.bf16_groups_flat if in_bf16 else optimizer.bit16_groups_flat
    flats = optimizer.fp32_groups_flat_partition if in_bf16 else optimizer.single_partition_of_fp32_groups
    for whole, flat in zip(wholes, flats, strict=True):
        begin = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
        if not 0 <= begin < whole.numel():
            continue
        mine = len(whole) // group.world_size() * group.rank()
        first = max(begin, mine)
        last = min(begin + parameter.numel(), mine + len(whole) // group.world_size())
        return Fragment(flat, first - mine, first - begin, last - first)
    raise AssertionError("a weight that trains is in no group of DeepSpeed's")


def _copy(saved: Saved, fragment: Fragment, states: dict[Tensor, dict[str, Tensor]]) -> None:
    """Copy what a saved fragment and this rank's have in common."""
    first = max(saved["start"], fragment.start)
    length = min(saved["start"] + len(saved[WEIGHT]), fragment.start + fragment.length) - first
    if length <= 0:
        return
    for key in (WEIGHT, *MOMENTS):
        if key not in saved:  # it has not taken a step
            continue
        flat = fragment.flat if key == WEIGHT else _moment(states[fragment.flat], key, fragment.flat, saved["step"])
        source = saved[key].narrow(0, first - saved["start"], length)
        fragment.of(flat).narrow(0, first - fragment.start, length).copy_(source)


def _moment(state: dict[str, Tensor], key: str, flat: Tensor, step: float) -> Tensor:
    """Return a moment of a flat tensor; AdamW itself would make it in the first step."""
    if key not in state:
        # In the type and on the device that AdamW counts in where it is fused.
        state |= {key: torch.zeros_like(flat), "step": torch.tensor(step, dtype=torch.float32, device=flat.device)}
    return state[key]


def _compute_with(optimizer: Any) -> None:
    """Give the weights that the model computes with the values of those in fp32. A collective."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for number in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()


def _check_complete(files: Sequence[Mapping[str, Saved]], weights: Weights, where: Path) -> None:
    wanted = {name: tuple(_shape(parameter)) for name, parameter in weights}
    held = dict.fromkeys(wanted, 0)
    for name, saved in ((name, saved) for file in files for name, saved in file.items()):
        if wanted.get(name) != saved["shape"]:
            has = f"weights of the shape {list(wanted[name])}" if name in wanted else "no such weights"
            what = (
                f"the checkpoint is of another model: it has {name} of the shape {list(saved['shape'])}, this one {has}"
            )
            break
        held[name] += len(saved[WEIGHT])
    else:
        cut = next((name for name, shape in wanted.items() if held[name] != torch.Size(shape).numel()), None)
        if cut is None:
            return
        what = f"the checkpoint holds {held[cut]} of the {torch.Size(wanted[cut]).numel()} numbers of {cut}"
    raise PreflightError(what, str(where), "remove the checkpoint's folder to restart the stage")


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
