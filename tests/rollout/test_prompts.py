import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import PreflightError
from rlhf.models import text
from rlhf.rollout.prompts import PromptStream

PROMPTS = ["one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return text.load_tokenizer(tiny)


def write(folder: Path, prompts: list[str]) -> Path:
    (folder / "prompts").mkdir()
    file = folder / "prompts" / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return file


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_each_pass_covers_every_prompt_in_an_order_of_its_own(tmp_path: Path, tokenizer: Any, size: int) -> None:
    """Whatever the batch size: batches run on over the end of a pass."""
    stream = PromptStream(write(tmp_path, PROMPTS), tokenizer, 64, seed=3)
    batches = [stream.batch(iteration, size) for iteration in range(-(-35 // size))]
    drawn = [str(prompt) for batch in batches for prompt in batch.prompts][:35]
    passes = [tuple(drawn[start : start + 5]) for start in range(0, 35, 5)]
    assert all(sorted(one) == sorted(PROMPTS) for one in passes)
    assert len(set(passes)) > 1
    assert [sample for batch in batches for sample in batch.samples][:35] == list(range(35))
    for batch in batches:
        assert batch.ids == [text.prompt_ids(tokenizer, prompt) for prompt in batch.prompts]


def test_an_iteration_s_prompts_depend_on_the_seed_and_its_number_alone(tmp_path: Path, tokenizer: Any) -> None:
    """So a resumed run goes on where it was, without the batches before."""
    file = write(tmp_path, [f"prompt {number}" for number in range(40)])
    whole, resumed, other = (PromptStream(file, tokenizer, 64, seed) for seed in (3, 3, 4))
    before = [whole.batch(iteration, 6) for iteration in range(9)]
    assert resumed.batch(8, 6) == before[8]
    assert other.batch(8, 6) != before[8]


def test_further_prompts_depend_on_the_seed_and_the_draw_alone(tmp_path: Path, tokenizer: Any) -> None:
    """However many the draws before took; all prompts are drawn as often, with random numbers that nothing else has."""
    file = write(tmp_path, [f"prompt {number}" for number in range(40)])
    stream = PromptStream(file, tokenizer, 64, seed=3)
    whole = [stream.further(draw, size=12, most=12, repeats=2) for draw in range(20)]
    assert PromptStream(file, tokenizer, 64, seed=3).further(7, size=12, most=12, repeats=2) == whole[7]
    fewer = stream.further(7, size=4, most=12, repeats=2)
    assert fewer.prompts == whole[7].prompts[:4]
    assert fewer.samples == whole[7].samples[:4]
    assert all(batch.prompts[::2] == batch.prompts[1::2] for batch in whole)
    assert set(Counter(str(prompt) for batch in whole for prompt in batch.prompts).values()) == {6}
    samples = [sample for batch in whole for sample in batch.samples]
    assert len(set(samples)) == 240
    assert max(samples) < 0
    assert whole[0].prompts != stream.batch(0, 12, repeats=2).prompts


def test_the_first_prompts_are_those_of_the_file(tmp_path: Path, tokenizer: Any) -> None:
    """In their order, and fewer where there are fewer."""
    stream = PromptStream(write(tmp_path, PROMPTS), tokenizer, 64)
    assert stream.first(2).prompts == PROMPTS[:2]
    everything = stream.first(100)
    assert everything.prompts == PROMPTS
    assert everything.samples == [0, 1, 2, 3, 4]
    assert len(everything.ids) == 5


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path, tokenizer: Any) -> None:
    """By file and row, with how many there are and how long it is; one of just the limit passes."""
    prompts = ["short", "a much longer prompt than all others, by far", "the second longest of them"]
    file = write(tmp_path, prompts)
    lengths = [len(text.prompt_ids(tokenizer, prompt)) for prompt in prompts]
    assert PromptStream(file, tokenizer, max(lengths))
    with pytest.raises(PreflightError, match=rf"2 of 3 prompts .* the longest has {max(lengths)}") as caught:
        PromptStream(file, tokenizer, sorted(lengths)[0])
    assert caught.value.where == "prompts/train.jsonl, row 2"
    assert "max_prompt_length" in caught.value.next_step


def test_prompts_of_a_task_are_drawn_as_often_as_its_weight_says(tmp_path: Path, tokenizer: Any) -> None:
    """In every two passes each once, twice and four times."""
    file = write(tmp_path, [])
    weights = {"one": 0.5, "two": 0.5, "three": 1.0, "four": 2.0}
    rows = [{"prompt": prompt, "task": f"t{weight}", "weight": weight} for prompt, weight in weights.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = PromptStream(file, tokenizer, 64)
    for turns in range(3):
        drawn = Counter(map(str, stream.batch(turns, 8).prompts))
        assert drawn == {prompt: 2 * weight for prompt, weight in weights.items()}
