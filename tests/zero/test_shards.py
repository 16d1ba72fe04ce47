"""Fragments of weights, as the ranks of any number hold them in each stage of ZeRO, dealt out anew."""

import itertools
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import PreflightError
from rlhf.zero import group, shards

SHAPES = {"embedding": (7, 3), "bias": (1,), "norm": (5,), "wide": (2, 3, 4), "head": (4, 4)}
COUNTS = (1, 2, 3, 4, 8)
LAYOUTS = {(stage, count) for stage in (2, 3) for count in COUNTS}


def weights_of(seed: float) -> dict[str, Tensor]:
    """Each number another one."""
    sizes = itertools.accumulate(map(math.prod, SHAPES.values()), initial=0)
    return {
        name: seed + torch.arange(float(math.prod(shape))).view(shape) + start
        for (name, shape), start in zip(SHAPES.items(), sizes, strict=False)
    }


def engine_of(stage: int, count: int, rank: int, wholes: dict[str, dict[str, Tensor]]) -> tuple[Any, Any]:
    """What DeepSpeed's engine holds of the weights on a rank, and the weights, by the words of its documentation.

    In stage 3 each weight is cut by itself into fragments of one length. In stage 2 all weights, end to end, are.
    """
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    flats: dict[str, list[Tensor]] = {key: [] for key in wholes}
    optimizer = SimpleNamespace(checkpoint_event_prologue=list, checkpoint_event_epilogue=list, fp16_groups=[])
    optimizer.update_lp_params = list
    if stage == 3:
        places: dict[int, tuple[int, int, int]] = {}
        for name, parameter in parameters.items():
            size = -(-parameter.numel() // count)
            places[id(parameter)] = (0, sum(map(len, flats[shards.WEIGHT])), size)
            vars(parameter).update(ds_id=0, ds_shape=parameter.shape, ds_numel=parameter.numel())
            for key, whole in wholes.items():
                padded = torch.cat([whole[name].flatten(), torch.zeros(count * size - parameter.numel())])
                flats[key].append(padded[rank * size :][:size])
        optimizer.grad_position, optimizer.get_param_id = places, id
    else:
        total = sum(parameter.numel() for parameter in parameters.values())
        size = -(-total // count)
        bits = torch.zeros(count * size)
        optimizer.bit16_groups_flat, start = [bits], 0
        for parameter in parameters.values():
            parameter.data = bits[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        for key, whole in wholes.items():
            end_to_end = torch.cat(
                [*(tensor.flatten() for tensor in whole.values()), torch.zeros(count * size - total)]
            )
            flats[key].append(end_to_end[rank * size :][:size])
    flat = {key: torch.cat(parts).clone() for key, parts in flats.items()}
    own = [flat[shards.WEIGHT]]
    optimizer.single_partition_of_fp32_groups = own
    if stage == 3:
        optimizer.fp32_partitioned_groups_flat = own
    moments = {key: flat[key] for key in shards.MOMENTS if key in flat}
    state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    if moments:
        state[own[0]] = {**moments, "step": torch.tensor(3.0)}
    optimizer.optimizer = SimpleNamespace(state=state)
    return SimpleNamespace(optimizer=optimizer, global_steps=5), list(parameters.items())


def at_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setattr(group, "rank", lambda: rank)
    monkeypatch.setattr(group, "world_size", lambda: count)


@pytest.mark.parametrize("written", sorted(LAYOUTS))
def test_any_number_of_ranks_reads_what_any_number_wrote(
    written: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that no number of ranks divides too, and between the stages: each number is where it belongs."""
    wholes = {key: weights_of(1000.0 * (1 + number)) for number, key in enumerate((shards.WEIGHT, *shards.MOMENTS))}
    stage, count = written
    for rank in range(count):
        at_rank(monkeypatch, rank, count)
        shards.save(*engine_of(stage, count, rank, wholes), tmp_path, "policy")
    zeros = {shards.WEIGHT: {name: torch.zeros(shape) for name, shape in SHAPES.items()}}
    for stage, count in LAYOUTS:
        for rank in range(count):
            at_rank(monkeypatch, rank, count)
            engine, parameters = engine_of(stage, count, rank, zeros)
            shards.load(engine, parameters, tmp_path, "policy")
            expected, _ = engine_of(stage, count, rank, wholes)
            (own,), (wanted,) = (one.optimizer.single_partition_of_fp32_groups for one in (engine, expected))
            assert torch.equal(own, wanted)
            state, wanted_state = engine.optimizer.optimizer.state[own], expected.optimizer.optimizer.state[wanted]
            for key in (*shards.MOMENTS, "step"):
                if (wanted != 0).any():  # of a rank beyond the last weight there is nothing
                    assert torch.equal(state[key], wanted_state[key])
            assert engine.global_steps == 5


def test_weights_before_their_first_step_have_no_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW begins theirs by itself, when their schedule does."""
    at_rank(monkeypatch, 0, 1)
    wholes = {shards.WEIGHT: weights_of(1.0)}
    shards.save(*engine_of(3, 1, 0, wholes), tmp_path, "policy")
    engine, parameters = engine_of(2, 1, 0, {key: weights_of(0.0) for key in (shards.WEIGHT, *shards.MOMENTS)})
    shards.load(engine, parameters, tmp_path, "policy")
    assert not engine.optimizer.optimizer.state


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"head": (16,)}, "it has head of the shape [4, 4], this one weights of the shape [16]"),
        ({"head": None}, "it has head of the shape [4, 4], this one no such weights"),
        ({"tail": (2,)}, "the checkpoint holds 0 of the 2 numbers of tail"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_weight(
    change: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a weight is missing here or there, or has another shape."""
    at_rank(monkeypatch, 0, 1)
    engine, parameters = engine_of(3, 1, 0, {shards.WEIGHT: weights_of(1.0)})
    shards.save(engine, parameters, tmp_path, "policy")
    changed = SHAPES | change
    others = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in changed.items() if shape is not None]
    with pytest.raises(PreflightError) as caught:
        shards.load(engine, others, tmp_path, "policy")
    assert caught.value.what.endswith(what)
    assert str(tmp_path) in caught.value.where


def test_a_checkpoint_without_one_rank_s_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a weight is no weight."""
    for rank in range(2):
        at_rank(monkeypatch, rank, 2)
        shards.save(*engine_of(3, 2, rank, {shards.WEIGHT: weights_of(1.0)}), tmp_path, "policy")
    (tmp_path / "policy-1.pt").unlink()
    at_rank(monkeypatch, 0, 1)
    with pytest.raises(PreflightError, match="the checkpoint holds 11 of the 21 numbers of embedding"):
        shards.load(*engine_of(2, 1, 0, {shards.WEIGHT: weights_of(0.0)}), tmp_path, "policy")
