import json
import math
import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.stages import SftSettings
from rlhf.pipeline.memory import Sharding
from rlhf.training import checkpoint_writer
from tests.zero.checks import COUNTS, FORMS, TIME, rows_of
from tests.zero.conftest import Results
from tests.zero.inputs import MEMORY_STAGES, MICRO_BATCHES, STAGE_NAMES
from tests.zero.memory import CONTINUED, RESUMED, VARIANTS

# The groups run while the first of these tests waits.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(660)]

Weights = dict[str, Tensor]


def assert_same_weights(ours: Weights, others: Weights, tolerance: float = 0.0) -> None:
    assert ours.keys() == others.keys()
    assert ours
    for name, weight in ours.items():
        torch.testing.assert_close(
            weight, others[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def largest_difference(ours: Weights, others: Weights) -> float:
    return max((weight - others[name]).abs().max().item() for name, weight in ours.items())


@pytest.mark.parametrize("count", COUNTS)
def test_what_ranks_compute_together_is_what_one_would_alone(results: Results, count: int) -> None:
    """Whole and in order on every rank, whether or not the ranks share the rows evenly."""
    for ranks in results.values():
        for found in ranks:
            assert torch.equal(found["spread"][count], rows_of(torch.arange(count)))


def test_ranks_share_items_out(results: Results) -> None:
    """Each item goes to one rank."""
    assert [found["share"] for found in results[2]] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_largest_of_each_entry_is_known_to_all_ranks(results: Results) -> None:
    """As the memory of the fullest GPU is."""
    assert [found["largest"] for found in results[2]] == [[1, 0], [1, 0]]


def test_what_rank_0_changes_in_a_whole_weight_all_ranks_see(results: Results) -> None:
    """A score head is drawn so."""
    for found in results[2]:
        assert torch.equal(found["gathering"], torch.full((32,), 7.0))


def test_whole_weights_are_those_of_the_file_on_rank_0_alone(results: Results, tiny_weights: Weights) -> None:
    """Gathered from the shards; every other rank holds none, since the model may not fit there."""
    for ranks in results.values():
        assert_same_weights(ranks[0]["whole"], tiny_weights)
    assert results[2][1]["whole"] == {}


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_take_the_steps_of_one(results: Results, form: str) -> None:
    """Weights and gradient norms after three steps differ by rounding only; and the steps did something."""
    single, pair = (results[size][0]["steps"][form] for size in (1, 2))
    assert_same_weights(single["weights"], pair["weights"], tolerance=1e-5)
    assert single["norms"] == pytest.approx(pair["norms"], rel=1e-4)
    assert all(norm > 0 for norm in single["norms"])
    if form == "full":
        start = results[1][0]["whole"]
        assert largest_difference(single["weights"], start) > 1e-3
    else:
        assert all("lora_" in name for name in single["weights"])
        assert any(weight.abs().max() > 1e-3 for name, weight in single["weights"].items() if "lora_B" in name)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_engine_goes_on_bit_for_bit(results: Results, form: str, size: int) -> None:
    """Weights and Adam's moments are in what it saves: the next steps are those of the engine that never stopped."""
    found = results[size][0]["resume"][form]
    assert_same_weights(found["loaded"], found["halfway"])
    assert_same_weights(found["resumed"], found["unbroken"])
    assert largest_difference(found["resumed"], found["halfway"]) > 1e-4


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_an_engine_goes_on_with_what_another_number_of_ranks_saved(results: Results, form: str, size: int) -> None:
    """It holds the same fp32 weights and moments to the last bit; its next steps differ by rounding only."""
    found, others = results[size][0]["resume"][form], results[3 - size][0]["resume"][form]
    assert found["theirs"]["steps"].tolist() == [2]
    assert sum(name.endswith("exp_avg_sq") for name in found["theirs"]) == len(others["unbroken"])
    assert_same_weights(found["again"], found["theirs"])
    assert_same_weights(found["continued"], others["unbroken"], tolerance=1e-6)


def test_one_rank_s_nan_stops_every_rank_before_the_step(results: Results) -> None:
    """A rank that went on alone would wait for the others for ever."""
    for ranks in (results[1], results[2]):
        for found in ranks:
            assert "not a finite number" in found["not_a_number"]["error"]
        assert_same_weights(ranks[0]["not_a_number"]["before"], ranks[0]["not_a_number"]["after"])


def test_the_two_newest_checkpoints_are_kept_and_what_was_cut_off_is_swept(results: Results) -> None:
    """Of four, the second cut off; an earlier attempt's are not touched, for somebody may still write there."""
    left = ["checkpoints/checkpoint-3", "checkpoints/checkpoint-4", "earlier/checkpoints/checkpoint-1"]
    for ranks in (results[1], results[2]):
        for found in ranks:
            assert found["checkpointing"]["left"] == left


def test_there_is_a_complete_checkpoint_at_every_moment_since_the_first(results: Results) -> None:
    """An earlier attempt's until this attempt has one, though a newer one was begun and cut off."""
    earlier = "earlier/checkpoints/checkpoint-1"
    newest = [earlier, earlier, "checkpoints/checkpoint-3", "checkpoints/checkpoint-4"]
    for ranks in (results[1], results[2]):
        for found in ranks:
            assert found["checkpointing"]["newest"] == newest


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_killed_group_left_is_no_part_of_the_checkpoint_written_over_it(results: Results, size: int) -> None:
    """Neither its files nor its marker, though that would fit what is being written."""
    sizes = {f"shard-{rank}": 4 for rank in range(size)}
    assert results[size][0]["checkpointing"]["third"] == {
        "ranks": size,
        "precision": "fp32",
        "optimiser": "none",
        "shards": checkpoint_writer.SHARDS,
        "sizes": sizes,
    }


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(results: Results) -> None:
    """A real one, full before the write and in its middle, whoever meets it: torch, safetensors or a plain file."""
    found = results[1][0]["full_disk"]
    if "why_not" in found:
        assert os.environ.get("CI") != "true", found["why_not"]
        pytest.skip(f"no file system can be mounted here: {found['why_not']}")
    assert found["first, no room"]["left"] == []
    assert found["first"]["newest"] == "checkpoint-1"
    for when in ("second, no room", "torch", "safetensors", "text"):
        assert found[when]["left"] == ["checkpoint-1"], when
        assert found[when]["newest"] == "checkpoint-1", when
    for when in ("first, no room", "second, no room", "torch", "safetensors", "text"):
        assert found[when]["error"].exit_status == 75
        assert re.search(r"[\d.]+ \w+ needed, [\d.]+ \w+ free", found[when]["error"].what), when
    assert found["second"] == {"error": None, "newest": "checkpoint-2", "left": ["checkpoint-1", "checkpoint-2"]}


@pytest.mark.parametrize("stage", ["rm", "ppo", "ppo with adapters", "ppo with one base"])
def test_two_ranks_learn_from_the_rows_that_one_learns_from(results: Results, stage: str) -> None:
    """To the end of a run, where an epoch does not fill its last batch too; sft draws its dropout on each rank."""
    one, two = (results[size][0][stage]["unbroken"] for size in (1, 2))
    assert_same_weights(one["weights"], two["weights"], tolerance=1e-3)
    for ours, other in zip(one["rows"], two["rows"], strict=True):
        assert ours["step"] == other["step"]
        for name in ("loss", "objective/scores", "objective/kl"):
            assert ours.get(name, 0.0) == pytest.approx(other.get(name, 0.0), abs=1e-3), (ours["step"], name)


def test_ppo_s_first_iteration_is_the_same_however_it_is_split(results: Results) -> None:
    """The same rollouts to the last token, and updates within 1e-4, for any micro batch, on one rank and two.

    Of the two some sample from one copy that they hold together, and from none.
    The first ratio is 1 but for rounding.
    """
    found = [results[size][0]["first_iterations"][micro] for size in (1, 2) for micro in MICRO_BATCHES]
    assert found[0]["samples"]
    for one in found:
        assert one["samples"] == found[0]["samples"]
        assert_same_weights(found[0]["weights"], one["weights"], tolerance=1e-4)
        assert one["rows"][0]["policy/approxkl_first"] < 1e-12


@pytest.mark.parametrize("size", [1, 2])
def test_models_on_ranks_of_their_own_score_what_those_beside_the_policy_do(results: Results, size: int) -> None:
    """In grpo with one rank that scores, and in ppo with two that shard the models while two hold a copy to sample from
    together: the same samples, metrics, and updated weights.

    Scores and the reference's log-probabilities are computed in other micro batches, so that they differ by rounding.
    """
    together, apart = (results[size][0][name] for name in ("together", "apart"))
    assert_same_weights(together["weights"], apart["weights"], tolerance=1e-6)
    assert apart["metrics"] == pytest.approx(together["metrics"], abs=1e-5)
    assert len(apart["rows"]) == 2
    for ours, other in zip(apart["rows"], together["rows"], strict=True):
        assert ours == pytest.approx(other, abs=1e-5)
    ours, others = ([json.loads(line) for line in found["samples"].splitlines()] for found in (apart, together))
    assert len(ours) == 2 * 8 + 3 * 4  # of two iterations, and answers to the watched prompts in both and at the end
    for sample, other in zip(ours, others, strict=True):
        assert (sample["step"], sample["response"]) == (other["step"], other["response"])
        assert sample["score"] == pytest.approx(other["score"], abs=1e-5)
        for (token, *figures), (same, *known) in zip(sample["tokens"], other["tokens"], strict=True):
            assert token == same
            assert figures == pytest.approx(known, abs=2e-3)  # they are rounded


@pytest.mark.parametrize("size", [1, 2])
def test_it_is_seen_how_long_ranks_waited_for_those_that_score(results: Results, size: int) -> None:
    """The wait is a part of the time of scoring, so that the parts of an iteration still add up to it."""
    for row in results[size][0]["apart"]["all"]:
        assert 0 < row["perf/waiting_s"] <= row["time/score_s"]
        assert row["perf/scorers_s"] > 0
        whole = sum(value for name, value in row.items() if name.startswith("time/"))
        tokens = row["perf/tokens_per_s"] * whole
        assert tokens == pytest.approx(round(tokens))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_stage_stopped_over_and_over_equals_one_in_one_go(results: Results, stage: str, size: int) -> None:
    """Bit for bit: weights, final metrics and every step's row, wherever in an epoch it was stopped."""
    found = results[size][0][stage]
    assert_same_weights(found["resumed"]["weights"], found["unbroken"]["weights"])
    assert found["resumed"]["rows"] == found["unbroken"]["rows"]
    assert found["resumed"]["metrics"] == found["unbroken"]["metrics"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [*STAGE_NAMES[1:], *CONTINUED])
def test_a_stage_goes_on_with_another_number_of_ranks(results: Results, stage: str, size: int) -> None:
    """From one rank to two, which shard otherwise, and back, and between stages of ZeRO, and with state offloaded.

    The rows of the steps before are kept, and the last step's result is that of the ranks that did the others.
    """
    found, others = (results[ranks][0][stage] for ranks in (size, 3 - size))
    unbroken = others["unbroken"]
    if stage in CONTINUED:
        found, others = (results[ranks][0]["memory"][stage] for ranks in (size, 3 - size))
        unbroken = others[CONTINUED[stage] if size == 1 else "stage 3"]
    assert_same_weights(found["continued"]["weights"], unbroken["weights"], tolerance=1e-6)
    *before, last = found["continued"]["rows"]
    assert before == unbroken["rows"][:-1]
    for name in ("step", "loss", "num_tokens", "lr", "loss/policy_avg", "objective/scores", "kl/coef"):
        assert last.get(name, 0.0) == pytest.approx(unbroken["rows"][-1].get(name, 0.0), abs=1e-6), name


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_the_last_step_is_not_saved(results: Results, stage: str) -> None:
    """The result is all that is left of it: the newest checkpoint is that of the step before."""
    for found in (ranks[0][stage]["unbroken"] for ranks in (results[1], results[2])):
        last = found["rows"][-1]["step"]
        assert found["newest"] == f"checkpoint-{last - 1}"


def test_groups_are_replaced_alike_on_any_number_of_ranks(results: Results) -> None:
    """And some are; without this the tests above would not see a resumed run draw as it would have."""
    one, two = (results[ranks][0]["grpo"]["unbroken"]["rows"] for ranks in (1, 2))
    assert 0 < sum(row["groups/replaced"] for row in one) < 4 * 2 * 4
    for name in ("groups/draws", "groups/replaced", "groups/without_gradient"):
        assert [row[name] for row in one] == [row[name] for row in two]


def test_the_stages_epochs_end_at_the_steps_that_they_are_stopped_at(results: Results) -> None:
    """Two epochs of three steps each; without this the test above would not see an epoch's boundary."""
    for name in ("sft", "rm"):
        assert [row["step"] for row in results[2][0][name]["unbroken"]["rows"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_every_stage_writes_an_adapter_and_folds_it_in(
    results: Results, tiny_weights: dict[str, torch.Tensor], stage: str
) -> None:
    """A folded adapter is the one that would have stayed beside its base; no form is the model that it began with."""
    forms = {form: results[2][0]["forms"][stage][form] for form in ("adapter", "merged")}
    assert {form: result["adapter"] for form, result in forms.items()} == {"adapter": True, "merged": False}
    for result in forms.values():
        assert any(
            not torch.equal(result["weights"][name], weight)
            for name, weight in tiny_weights.items()
            if name in result["weights"]
        )
    assert_same_weights(forms["merged"]["weights"], forms["adapter"]["weights"], tolerance=1e-6)
    torch.testing.assert_close(forms["merged"]["read"], forms["adapter"]["read"], atol=1e-3, rtol=0)
    start = results[2][0]["forms"]["start"]["read"]
    assert stage == "rm" or (forms["adapter"]["read"] - start).abs().max() > 0.01


@pytest.mark.parametrize("name", ["ppo", "ppo with adapters", "ppo with one base"])
def test_the_resumed_ppo_has_state_to_lose(results: Results, name: str) -> None:
    """The KL coefficient moved, and demonstrations were mixed in."""
    rows = results[2][0][name]["unbroken"]["rows"]
    assert len({row["kl/coef"] for row in rows}) > 2
    assert rows[-1]["objective/kl"] != 0


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_no_room_for_a_checkpoint_stops_every_rank_before_it_is_begun(results: Results, stage: str) -> None:
    """PPO's and TRL's alike, with the sizes, and with the last one to go on from."""
    for ranks in (results[1], results[2]):
        for found in (rank[stage]["full"] for rank in ranks):
            step = int(found["newest"].removeprefix("checkpoint-")) + 1
            assert re.fullmatch(
                rf"no room for the checkpoint of step {step}: [\d.]+ \w+ needed, 1\.0 kB free", found["error"].what
            )
            assert not found["begun"]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_stage_that_is_asked_to_stop_saves_the_step_and_says_which(results: Results, stage: str) -> None:
    """PPO's loop and TRL's alike, on every rank; that it goes on from there is part of the resumed runs above."""
    for ranks in (results[1], results[2]):
        for found in (rank[stage]["asked"] for rank in ranks):
            step = int(found["newest"].removeprefix("checkpoint-"))
            assert found["what"] == f"interrupted; saved at step {step}"


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_that_cannot_be_continued_is_refused_with_what_it_was(results: Results, size: int) -> None:
    """Of another precision or version; one of an optimiser on nvme is removed."""
    for found in results[size]:
        assert found["other_groups"]["newest"] == "checkpoint-4"
        assert "has a checkpoint in bf16 at step 4, which this CPU, computing in fp32" in found["other_groups"]["bf16"]
        assert "has a checkpoint of an older version at step 4" in found["other_groups"]["older"]
        assert found["other_groups"]["nvme"] == found["other_groups"]["left"] == "None"


@pytest.mark.parametrize("size", [1, 2])
def test_a_group_computes_in_bf16_where_all_its_cpus_can(results: Results, size: int) -> None:
    """Otherwise in fp32 on every rank, and rank 0 says so once."""
    for rank, result in enumerate(results[size]):
        notes = ["computes in fp32, since this CPU has no instructions for bf16"] if rank == 0 else []
        assert result["precision"] == {
            "all": ("bf16", []),
            "none": ("fp32", notes),
            "the first alone": ("bf16" if size == 1 else "fp32", [] if size == 1 else notes),
            "fp32": ("fp32", []),
        }


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_refreshed_replica_samples_as_the_exported_model_does(results: Results, form: str, size: int) -> None:
    """With the trained weights, an adapter beside its base, and no longer as the model that training began with."""
    for found in results[size]:
        tokens = found["replica"][form]
        assert torch.equal(tokens["refreshed"]["copied"].ids, tokens["exported"])
        assert not torch.equal(tokens["refreshed"]["copied"].ids, tokens["before"]["copied"].ids)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampler", ["split", "gathered"])
def test_without_a_whole_copy_the_same_tokens_are_sampled(results: Results, sampler: str, form: str, size: int) -> None:
    """From a copy that the ranks hold together, and from the sharded policy; before and after it was trained."""
    for found in results[size]:
        for when in ("before", "refreshed"):
            ours, copied = (found["replica"][form][when][name] for name in (sampler, "copied"))
            assert torch.equal(ours.ids, copied.ids)
            torch.testing.assert_close(ours.logprobs, copied.logprobs, atol=1e-4, rtol=0)


def test_a_copy_is_not_held_by_ranks_of_two_nodes(results: Results) -> None:
    """The error names what divides the ranks of each node; one rank samples from its own weights."""
    assert [found["nodes"] for found in results[1]] == ["1"]
    for found in results[2]:
        assert found["nodes"] == (
            "2 ranks of a node are to hold a copy of the policy together, and 1 is the most that divides the ranks of "
            "every node"
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_policy_s_samples_and_probabilities_do_not_depend_on_the_ranks(results: Results, form: str) -> None:
    """The same rollout, whole on every rank; one update, and the next rollout is the same again."""
    first: dict[str, Any] = results[1][0]["policies"][form]
    for found in (rank["policies"][form] for rank in results[2]):
        assert torch.equal(found["ids"], first["ids"])
        assert torch.equal(found["updated"], first["updated"])
        assert found["tokens"] == first["tokens"] == first["mask"].sum()
        for name in ("logprobs", "entropies", "reference", "logprobs_after"):
            torch.testing.assert_close(
                found[name][first["mask"]],
                first[name][first["mask"]],
                atol=1e-4,
                rtol=0,
                msg=lambda t, n=name: f"{n}: {t}",
            )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_stays_while_the_policy_moves(results: Results, form: str, size: int) -> None:
    """Before training they are one, and the first ratio is 1; afterwards only the policy's probabilities have moved."""
    found = results[size][0]["policies"][form]
    mask = found["mask"]
    torch.testing.assert_close(found["reference"][mask], found["logprobs"][mask], atol=1e-5, rtol=0)
    assert found["first_ratio"].item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found["reference_after"][mask], found["reference"][mask], atol=1e-6, rtol=0)
    assert (found["logprobs_after"] - found["logprobs"])[mask].abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_policy_samples_from_the_weights_it_was_saved_with(results: Results, form: str, size: int) -> None:
    """From its very first rollout: not from the folder that training began with."""
    found = results[size][0]["policies"][form]
    assert not torch.equal(found["updated"], found["ids"])
    assert torch.equal(found["resumed"], found["updated"])


def test_entropies_are_of_the_whole_vocabulary(results: Results) -> None:
    """Between 0 and ln(vocabulary), one a token."""
    entropies = results[1][0]["policies"]["full"]["entropies"]
    assert entropies.shape[1] == 12 > TIME
    assert 0 <= entropies.min() <= entropies.max() <= math.log(300) + 1e-4


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stage 3"])
@pytest.mark.parametrize("stage", MEMORY_STAGES)
def test_what_is_sharded_offloaded_or_computed_again_changes_no_result(
    results: Results, tiny_weights: Weights, stage: str, variant: str
) -> None:
    """Two ranks learn what one learns in stage 3 with everything on its device: weights, losses and gradients."""
    single, pair = results[1][0]["memory"][stage]["stage 3"], results[2][0]["memory"][stage][variant]
    assert_same_weights(single["weights"], pair["weights"], tolerance=1e-5)
    for ours, other in zip(single["rows"], pair["rows"], strict=True):
        # TRL's other metrics are means or extremes over micro batches, which two ranks cut otherwise.
        for name in ("loss", "grad_norm", "objective/scores", "objective/kl", "value/loss"):
            assert ours.get(name, 0.0) == pytest.approx(other.get(name, 0.0), abs=1e-4), (ours["step"], name)
    assert bool(pair["recomputed"]) == ("activation_checkpointing" in VARIANTS[variant])
    moved = single["weights"].get("model.safetensors model.norm.weight")
    assert stage == "sft" or (moved - tiny_weights["model.norm.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize(("stage", "variant"), RESUMED)
def test_a_resumed_stage_equals_an_unbroken_one_whatever_is_sharded(results: Results, stage: str, variant: str) -> None:
    """Bit for bit, from the checkpoint of its first step."""
    by_variant = results[2][0]["memory"][stage]
    assert_same_weights(by_variant[f"{variant}, resumed"]["weights"], by_variant[variant]["weights"])
    assert by_variant[f"{variant}, resumed"]["rows"] == by_variant[variant]["rows"]


def test_ranks_that_keep_weights_twice_take_the_steps_of_those_that_do_not(results: Results) -> None:
    """Bit for bit, though most weights come from the ranks of the same node alone."""
    plain, nodes = (results[4][0]["across_nodes"][name] for name in ("plain", "nodes"))
    assert_same_weights(plain["weights"], nodes["weights"])
    assert plain["norms"] == nodes["norms"]
    # The first step needs none but its own node's, for the weights were read with all ranks.
    steps, whole = 3, sum(weight.numel() for weight in plain["weights"].values())
    assert nodes["gathers"][4] == (steps - 1) * whole
    assert plain["gathers"] == {4: nodes["gathers"][4] + nodes["gathers"][2]}
    assert_same_weights(plain["saved"], nodes["saved"])


def test_the_second_copy_takes_the_memory_that_is_predicted(results: Results) -> None:
    """A quarter of the weights on each of four ranks, and with two nodes a half more; beside what fills weights up."""
    for name, partition in (("plain", 1), ("nodes", 2)):
        zero, workers = {"secondary_partition": partition}, {"count": 4}
        predicted = Sharding.of(SftSettings.model_validate({"zero": zero, "workers": workers})).held
        assert [ranks["across_nodes"][name]["held"] for ranks in results[4]] == pytest.approx([predicted] * 4, rel=1e-3)


def test_ranks_that_keep_weights_twice_go_on_from_one_rank_s_checkpoint(results: Results) -> None:
    """With the weights that were loaded, on the node too."""
    ours, others = results[4][0]["across_nodes"]["continued"], results[1][0]["resume"]["full"]["unbroken"]
    assert_same_weights(ours["weights"], others, tolerance=1e-5)


@pytest.mark.parametrize("stage", MEMORY_STAGES)
def test_a_stage_on_nodes_learns_what_one_rank_learns(results: Results, stage: str) -> None:
    """After a kill, too, of rm and ppo; and most weights come from the node."""
    single, four = results[1][0]["memory"][stage]["stage 3"], results[4][0]["on_nodes"][stage]
    assert_same_weights(single["weights"], four["weights"], tolerance=1e-5)
    assert four["gathers"][2] >= four["gathers"][4] > 0
