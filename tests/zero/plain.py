"""What a user sees who has transformers and PEFT alone: ``python plain.py JOBS RESULTS``.

JOBS     JSON: ``ids`` of a text, ``scorers`` and ``writers``, which are folders
RESULTS  a file to write: for each folder its logits or score, and the text that a writer goes on with
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def load(auto: Any, folder: Path, **named: Any) -> Any:
    """A plain folder's model, or an adapter's on the base beside it."""
    if not (folder / "adapter_config.json").exists():
        return auto.from_pretrained(folder, **named).eval()
    return PeftModel.from_pretrained(auto.from_pretrained(folder / "base", **named), str(folder)).eval()


def score(model: Any, ids: Tensor) -> Tensor:
    """Of one text. With a prefix, PEFT's own pass of a classifier asks transformers for an argument by its old name."""
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, PrefixTuningConfig):
        return model(ids).logits
    prefix: Any = model.get_prompt(batch_size=1)
    mask = torch.ones(1, prefix.get_seq_length() + ids.shape[1], dtype=torch.long)
    return model.get_base_model()(input_ids=ids, attention_mask=mask, cache=prefix).logits


def check_card(folder: Path, model: Any) -> None:
    """The code of its card scores texts of different lengths as the model scores each alone."""
    card: dict[str, Any] = {}
    os.chdir(folder)
    code = re.search("```python\n(.*?)```", Path("README.md").read_text(), re.S)
    assert code is not None
    exec(code[1], card)
    prompts, responses = ["a film", "say so"], ["a joy", "dull , dull , dull"]
    config = json.loads((folder / ("base" if (folder / "base").exists() else "") / "config.json").read_text())
    alone = [score(model, torch.tensor([card["ids"](*pair)])) for pair in zip(prompts, responses, strict=True)]
    expected = (torch.cat(alone)[:, 0] - config["score_mean"]) / config["score_std"]
    torch.testing.assert_close(card["score"](prompts, responses), expected, atol=1e-3, rtol=1e-4)


def continuation(model: Any, folder: Path, ids: list[int], length: int) -> str:
    """The likeliest next tokens, each read off a forward pass over everything before it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(sorted(tokenizer.get_vocab().values()))
    row = list(ids)
    while len(row) < len(ids) + length and row[-1] != tokenizer.eos_token_id:
        logits = model(torch.tensor([row])).logits[0, -1]
        row.append(int(tokens[logits[tokens].argmax()]))
    return tokenizer.decode([token for token in row[len(ids) :] if token != tokenizer.eos_token_id])


@torch.no_grad()
def main(jobs: Path, results: Path) -> None:
    """Load every folder once."""
    results = results.absolute()
    todo = json.loads(jobs.read_text())
    outputs: dict[str, tuple[Tensor, str]] = {}
    for folder in todo["scorers"]:
        model = load(AutoModelForSequenceClassification, Path(folder), num_labels=1)
        outputs[folder] = score(model, torch.tensor([todo["ids"]])), ""
        check_card(Path(folder), model)
    for folder in todo["writers"]:
        model = load(AutoModelForCausalLM, Path(folder))
        # Virtual tokens in front have logits too.
        logits = model(torch.tensor([todo["ids"]])).logits[:, -len(todo["ids"]) :]
        outputs[folder] = logits, continuation(model, Path(folder), todo["ids"], todo["length"])
    assert not {"rlhf", "stages"} & sys.modules.keys()
    torch.save(outputs, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
