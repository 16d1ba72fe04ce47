import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.tuning import FULL, LoraTuning, Tuning
from rlhf.errors import PreflightError
from rlhf.models import folders, text, tuning
from rlhf.models.heads import SequenceScores
from rlhf.models.layout import config_of, is_adapter
from tests.models.tiny import tiny_config

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 40, 41, 99, 60, 61, 4]])
NORMALISER = {"score_mean": 0.25, "score_std": 1.5, "sees": "response", "score_max_length": 64}
FORMS = {"full": FULL, "adapter": LoraTuning(rank=4), "merged": LoraTuning(rank=4, merge=True)}


def trained(tiny: Path, method: Tuning, *, scores: bool) -> tuple[Any, dict[str, Tensor]]:
    """A model whose trainable weights have moved, and those weights by name."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_pretrained(tiny, **({"num_labels": 1} if scores else {}))
    model = tuning.prepared(model, method, tiny, scores=scores, seed=0).eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.2 * torch.randn(weight.shape)
    return model, {name: weight.detach().clone() for name, weight in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_loads_anywhere_without_our_code(tmp_path: Path, tiny: Path, form: str, scores: bool) -> None:
    """Moved away from its base, the folder gives the trained model's outputs, tokenizer and normaliser.

    What its users' programs sample by, `generation_config.json`, is the base's; a policy's also names the token that
    the chat template closes turns with.
    """
    method, base = FORMS[form], tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "generation_config.json").write_text('{"do_sample": true, "top_k": 20, "eos_token_id": 1}')
    model, weights = trained(base, method, scores=scores)
    tuning.save(model, weights, base, tmp_path / "saved", method, scores=scores, config=NORMALISER if scores else None)
    shutil.rmtree(base)
    folder = tmp_path / "moved"
    shutil.move(tmp_path / "saved", folder)
    assert is_adapter(folder) == (form == "adapter")

    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    plain = folder / "base" if is_adapter(folder) else folder
    loaded = auto.from_pretrained(plain, **({"num_labels": 1} if scores else {}))
    loaded = (PeftModel.from_pretrained(loaded, str(folder)) if is_adapter(folder) else loaded).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)
    whole = folders.load_whole(folder, scores=scores, dtype=torch.float32).eval()
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)
    base = auto.from_pretrained(tiny, **({"num_labels": 1} if scores else {})).eval()
    assert (base(IDS).logits - loaded(IDS).logits).abs().max() > 0.01

    original, copy = AutoTokenizer.from_pretrained(tiny), AutoTokenizer.from_pretrained(folder)
    assert copy.get_vocab() == original.get_vocab()
    assert copy.chat_template == original.chat_template
    sampling = json.loads((folder / "generation_config.json").read_text())
    end = text.load_tokenizer(folder).eos_token_id
    assert sampling == {"do_sample": True, "top_k": 20, "eos_token_id": 1 if scores else [end, 1]}
    if not scores:
        assert loaded.generation_config.eos_token_id == [end, 1]
    if scores:
        assert {name: getattr(loaded.config, name) for name in NORMALISER} == NORMALISER
        assert config_of(folder).items() >= NORMALISER.items()
        assert not config_of(tiny).items() & NORMALISER.items()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT looks at modules alone
@pytest.mark.parametrize("merge", [False, True])
def test_a_mixture_s_experts_are_adapted_in_the_saved_model_too(tmp_path: Path, tiny: Path, merge: bool) -> None:
    """Beside its base read by plain PEFT, and folded in read by plain transformers."""
    base, method = tmp_path / "base", LoraTuning(rank=2, merge=merge)
    shutil.copytree(tiny, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = tiny_config("mixtral", num_hidden_layers=1, vocab_size=len(text.load_tokenizer(tiny)))
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model, weights = trained(base, method, scores=False)
    assert {name.split(".experts.")[1].split(".")[0] for name in weights if ".experts." in name} == {
        "base_layer",
        "lora_A",
        "lora_B",
    }
    tuning.save(model, weights, base, tmp_path / "saved", method, scores=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / ("" if merge else "base"))
    loaded = loaded if merge else PeftModel.from_pretrained(loaded, str(tmp_path / "saved"))
    torch.testing.assert_close(loaded.eval()(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    for name, weight in model.named_parameters():
        if ".experts." in name and ".lora_B." in name:
            weight.zero_()
    assert (loaded(IDS).logits - model(IDS).logits).abs().max() > 1e-3


def test_an_adapter_s_folder_is_small_beside_its_base_and_leaves_the_base_alone(tmp_path: Path, tiny: Path) -> None:
    """Only what was trained is stored beside the base, whose files are the same, byte by byte."""
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    model, weights = trained(tiny, FORMS["adapter"], scores=False)
    tuning.save(model, weights, tiny, tmp_path / "saved", FORMS["adapter"], scores=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved" / "base").iterdir()} == before
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before
    assert sum(weight.numel() for weight in weights.values()) * 4 < len(before["model.safetensors"])
    assert not list((tmp_path / "saved").rglob("*.bin"))


def test_an_adapter_written_as_a_plain_folder_is_the_same_reward_model(tmp_path: Path, tiny: Path) -> None:
    """PPO reads it so: outputs, normaliser and tokenizer carry over."""
    model, weights = trained(tiny, FORMS["adapter"], scores=True)
    tuning.save(model, weights, tiny, tmp_path / "saved", FORMS["adapter"], scores=True, config=NORMALISER)
    plain = folders.write_plain(tmp_path / "saved", tmp_path / "plain", scores=True, dtype=torch.float32)
    assert not is_adapter(plain)
    assert NORMALISER.items() <= config_of(plain).items()
    loaded = AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(plain).chat_template


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA begun by pissa_niter_4"),
        ({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}, "do not fit"),
        ({"peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM"}, "type ADAPTION_PROMPT, which can neither"),
        ({"r": 2}, "do not fit"),
        ({"target_modules": ["q_proj"]}, "do not fit its configuration and base; the first is base_model.model"),
    ],
)
def test_an_adapter_that_cannot_stand_beside_its_base_is_refused(
    tmp_path: Path, tiny: Path, entries: dict[str, Any], words: str
) -> None:
    """By name, and never read in part."""
    model, weights = trained(tiny, FORMS["adapter"], scores=False)
    tuning.save(model, weights, tiny, tmp_path / "saved", FORMS["adapter"], scores=False)
    file = tmp_path / "saved" / "adapter_config.json"
    file.write_text(json.dumps(entries if "peft_type" in entries else json.loads(file.read_text()) | entries))
    with pytest.raises(PreflightError, match=words):
        folders.load(tmp_path / "saved", scores=False, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*save_embedding_layers")  # PEFT's
@torch.no_grad()
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_changes_that_one_alone(tmp_path: Path, tiny: Path, target: str) -> None:
    """Folded in, the plain folder has a head of its own. Such adapters come from other programs."""
    base: Any = AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=True)
    (adapter := tmp_path / "adapter").mkdir()
    base.save_pretrained(adapter / "base")
    folders.copy_tokenizer(tiny, adapter)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.add_(torch.randn(weight.shape, generator=torch.manual_seed(len(name))))
    model.save_pretrained(adapter)
    expected = model.eval()(IDS).logits
    plain = folders.write_plain(adapter, tmp_path / "plain", scores=False, dtype=torch.float32)
    folded: Any = AutoModelForCausalLM.from_pretrained(plain).eval()
    torch.testing.assert_close(folded(IDS).logits, expected, atol=1e-3, rtol=1e-4)


def test_fresh_adapters_change_nothing_and_follow_the_seed(tiny: Path) -> None:
    """LoRA's B begins at 0, so that training starts from the base model."""
    base: Any = AutoModelForCausalLM.from_pretrained(tiny).eval()
    models = [
        tuning.prepared(AutoModelForCausalLM.from_pretrained(tiny), LoraTuning(rank=4), tiny, scores=False, seed=seed)
        for seed in (0, 0, 1)
    ]
    with torch.no_grad():
        torch.testing.assert_close(models[0].eval()(IDS).logits, base(IDS).logits)
    first, again, other = (
        torch.cat([weight.flatten() for weight in model.parameters() if weight.requires_grad]) for model in models
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


PAIRS = [
    ("a film", "a joy"),
    ("say so", "dull , dull , dull , dull , dull , dull , dull , dull , dull , dull , dull , dull"),
    ("a", ""),
    ("two halves", "the film is a joy"),
    ("say <|end|>", "a <|end|> joy"),
]
# Nothing but the card's own lines, and then what a user may do who knows transformers and not this project.
FRESH = """
import json, os, re, sys
scores = {}
for folder in sys.argv[2:]:
    os.chdir(folder)
    card = {}
    exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1], card)
    prompts, responses = zip(*json.loads(sys.argv[1]))
    scores[folder] = {"card": card["score"](prompts, responses).tolist()}
    rows = [card["ids"](*pair) for pair in zip(prompts, responses)]
    with card["torch"].no_grad():
        for side in ("left", "right"):
            batch = card["tokenizer"].pad({"input_ids": rows}, return_tensors="pt", padding_side=side)
            scores[folder][side] = card["model"](**batch).logits[:, 0].tolist()
        alone = [card["model"](card["torch"].tensor([row])).logits.item() for row in rows]
        scores[folder]["alone"] = alone
print(json.dumps(scores))
"""


@torch.no_grad()
def test_a_reward_model_s_card_scores_as_we_do_in_a_fresh_process(tmp_path: Path, tiny: Path) -> None:
    """Whatever its form and what it reads, padded on either side, cut, and from a base whose padding is its EOS."""
    base = tmp_path / "origin"
    shutil.copytree(tiny, base)
    for name, entries in (("config", {"pad_token_id": 3}), ("tokenizer_config", {"pad_token": "<|end|>"})):
        file = base / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    expected: dict[str, Tensor] = {}
    for form, method in FORMS.items():
        for sees in ("response", "conversation"):
            normaliser = NORMALISER | {"sees": sees, "score_max_length": 24}
            model, weights = trained(base, method, scores=True)
            folder = tmp_path / f"{form}-{sees}"
            tuning.save(model, weights, base, folder, method, scores=True, config=normaliser)
            tokenizer = text.load_tokenizer(base)
            rows = [
                text.scored_ids(tokenizer, prompt if sees == "conversation" else None, response, 24)
                for prompt, response in PAIRS
            ]
            assert max(map(len, rows)) == 24
            ids, mask = text.pad(rows, tokenizer.pad_token_id, "right")
            expected[str(folder)] = SequenceScores(model)(ids, mask)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(PAIRS), *expected], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for folder, scores in json.loads(done.stdout.splitlines()[-1]).items():
        raw = expected[folder]
        torch.testing.assert_close(torch.tensor(scores["card"]), (raw - 0.25) / 1.5, atol=1e-3, rtol=1e-4)
        for padded in ("left", "right", "alone"):
            torch.testing.assert_close(torch.tensor(scores[padded]), raw, atol=1e-3, rtol=1e-4)
    assert str(tmp_path) not in (tmp_path / "adapter-response" / "README.md").read_text()
