"""One reading of a text: whatever the template and the record, all stages turn it into the same token ids."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from datasets import disable_progress_bars
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.config.policy_gradient import PtxSettings
from rlhf.errors import PreflightError, RecordError
from rlhf.models import base_models, reward, templates, text
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.packing import as_dataset
from rlhf.rollout.prompts import DemonstrationStream, PromptStream
from tests.models.families import FAMILIES, Family, make_tokenizer, template_of, write

pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group_of_one"),
]

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
DATED = ("llama 3.2", "smollm 3")


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def records(family: Family) -> list[dict[str, Any]]:
    """Records that have been read in several ways, with every added token of the family written out in them."""
    written = " ".join([*family.special, *family.other])
    tricks = [
        {"prompt": "what is the capital of france ?", "completion": "paris ."},
        {"prompt": messages((USER, "what ?")), "completion": messages((ASSISTANT, "paris ."))},
        {"prompt": "the answer ends in a space : ", "completion": "paris ."},
        {"prompt": "say\n\nso", "completion": "  between spaces \n"},
        {"prompt": f"what is {written} ?", "completion": f"use {written} in html , not{family.ends}."},
        {"prompt": f"{family.ends}", "completion": f"{family.ends}"},
        {"prompt": "a", "completion": "日本 \ue000 ünï"},
        {"prompt": messages((USER, "a ?"), (ASSISTANT, "b ."), (USER, "c ?")), "completion": "d ."},
    ]
    system = messages((SYSTEM, "be short"), (USER, "what ?"))
    if family.template not in ("gemma", FAMILIES["mistral"].template):
        tricks.append({"prompt": system, "completion": "paris ."})
        several = messages((SYSTEM, "be short"), (USER, "a ?"), (ASSISTANT, "b ."), (USER, "c ?"))
        tricks.append({"prompt": several, "completion": "d ."})
    return tricks


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_all_stages_read_a_record_alike(name: str, tmp_path: Path) -> None:
    """sft's context is ppo's prompt, sft's learned ids are what a policy that says the completion emits, ptx's are
    sft's, and the reward model reads prompt and those ids; nothing that a text says is a control token.
    """
    family = FAMILIES[name]
    tokenizer = text.load_tokenizer(write(family, tmp_path / "tokenizer"))
    rows = records(family)
    file = write_rows(tmp_path / "data", rows)
    prompts = PromptStream(file, tokenizer, 1000).first(len(rows)).ids
    learned: Any = as_dataset(file, tokenizer)
    ptx = DemonstrationStream(
        file, tokenizer, PtxSettings(coef=1.0, batch_size=len(rows), max_length=1000), 0, MicroBatch(len(rows))
    )
    mixed = ptx.minibatch(0).parts[0]
    mixed_rows = sorted(ids[seen.bool()].tolist() for ids, seen in zip(mixed.ids, mixed.attention_mask, strict=True))
    markers = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    control = {markers[token] for token in markers if token not in ("<think>", "</think>")}
    assert tokenizer.eos_token == family.ends
    assert tokenizer.pad_token_id != tokenizer.eos_token_id

    for row, prompt, demonstration in zip(rows, prompts, learned, strict=True):
        mask = demonstration["completion_mask"]
        context = [number for number, learns in zip(demonstration["input_ids"], mask, strict=True) if not learns]
        emitted = [number for number, learns in zip(demonstration["input_ids"], mask, strict=True) if learns]
        completion = text.plain_text(row["completion"])
        assert context == prompt
        assert demonstration["input_ids"] == [*context, *emitted]
        assert emitted[-1] == tokenizer.eos_token_id
        assert not control & set(emitted[:-1])
        assert text.response_text(tokenizer, emitted) == completion
        assert "".join(text.pieces(tokenizer, emitted)) == completion
        assert text.scored_ids(tokenizer, row["prompt"], completion, 1000) == [*prompt, *emitted]
        assert text.scored_ids(tokenizer, None, completion, 1000) == [*text.text_start(tokenizer), *emitted]
        # What the prompt says itself: as many control tokens as the template writes around plain words.
        plain: Any = [{**message, "content": "a"} for message in text.as_messages(row["prompt"])]
        expected = text.prompt_ids(tokenizer, plain if tokenizer.chat_template else "a")
        assert [number for number in prompt if number in control] == [n for n in expected if n in control]
        said = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert all(m["content"].strip().replace("\ue000", "") in said for m in text.as_messages(row["prompt"]))
    assert mixed_rows == sorted(demonstration["input_ids"] for demonstration in learned)


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.template and n not in DATED])
def test_a_prompt_is_the_templates_own(name: str) -> None:
    """Where no text spells a control token the ids are transformers' own, generation prompt included.

    Templates that print the date differ in that.
    """
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    for row in records(family):
        if any(token in str(row["prompt"]) for token in (*family.special, *family.other, "\ue000")):
            continue
        asked = text.as_messages(row["prompt"])
        rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        assert text.prompt_ids(tokenizer, row["prompt"]) == rendered["input_ids"]


@pytest.mark.parametrize("name", ["zephyr", "first phi 3", "qwen2.5 base", "llama 3.1", "gemma"])
def test_a_response_goes_on_as_the_templates_own_conversation_does(name: str, tmp_path: Path) -> None:
    """Without the space that SentencePiece puts before whatever begins a text: behind a line break none begins."""
    tokenizer = text.load_tokenizer(write(FAMILIES[name], tmp_path))
    asked = messages((USER, "what ?"))
    whole = tokenizer.apply_chat_template([*asked, *messages((ASSISTANT, "paris ."))], return_dict=True)["input_ids"]
    read = text.prompt_ids(tokenizer, asked) + text.response_ids(tokenizer, "paris .")
    assert whole[: len(read)] == read
    for said in ("paris .", " paris .", "\nparis", ""):
        assert text.response_text(tokenizer, text.response_ids(tokenizer, said)) == said
        assert "".join(text.pieces(tokenizer, text.response_ids(tokenizer, said))) == said


@pytest.mark.usefixtures("new_accelerator")
def test_trl_learns_the_ids_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of sft's trainer are the completion's ids, and nothing else, EOS included."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    disable_progress_bars()
    family = FAMILIES["qwen2.5 base"]
    tokenizer = text.load_tokenizer(write(family, tmp_path / "tokenizer"))
    file = write_rows(tmp_path / "data", records(family))
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_length=1000,
        packing=False,
        completion_only_loss=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    data: Any = as_dataset(file, tokenizer)
    trainer = SFTTrainer(model=LlamaForCausalLM(shape), args=arguments, train_dataset=data, processing_class=tokenizer)
    prepared: Any = trainer.train_dataset
    for given, row in zip(data, prepared, strict=True):
        assert row["input_ids"] == given["input_ids"]
        assert row["labels"] == [
            number if learns else -100
            for number, learns in zip(given["input_ids"], given["completion_mask"], strict=True)
        ]


REFUSED = {
    "role": ("gemma", messages((SYSTEM, "be short"), (USER, "what ?")), r"refuses message 1, of the role 'system'"),
    "order": ("gemma", messages((USER, "a ?"), (USER, "b ?")), r"refuses message 2, of the role 'user'"),
    "left out": ("qwen2.5 base", messages(("human", "what ?")), r"leaves out message 1, of the role 'human'"),
    "left out, last": ("deepseek v3", messages((USER, "a ?"), ("human", "b")), r"leaves out message 2"),
    "reasoning": (
        "deepseek r1 distill",
        messages((USER, "a ?"), (ASSISTANT, "<think>why</think>b ."), (USER, "c ?")),
        r"changes the text of message 2, of the role 'assistant'",
    ),
    "reasoning that a later message quotes": (
        "deepseek r1 distill",
        messages((USER, "a ?"), (ASSISTANT, "<think>why</think>b ."), (USER, "what is <think>why</think>b . ?")),
        r"changes the text of message 2, of the role 'assistant'",
    ),
    "nothing to answer": ("qwen2.5 base", messages((USER, "a ?"), (ASSISTANT, "b .")), r"there is nothing to answer"),
    "mistral": ("mistral", messages((SYSTEM, "be short"), (USER, "what ?")), r"message 1, of the role 'system': Only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_conversation_that_is_not_rendered_whole_is_refused_by_row_and_role(case: str, tmp_path: Path) -> None:
    """Before anything trains, in sft, ppo and ptx, with the reason that the template gives."""
    family, prompt, message = REFUSED[case]
    tokenizer = text.load_tokenizer(write(FAMILIES[family], tmp_path / "tokenizer"))
    good = {"prompt": "what ?", "completion": "paris ."}
    file = write_rows(tmp_path / "data", [good, {"prompt": prompt, "completion": "paris ."}])
    for read in (
        lambda: as_dataset(file, tokenizer),
        lambda: PromptStream(file, tokenizer, 1000),
        lambda: DemonstrationStream(file, tokenizer, PtxSettings(coef=1.0), 0, MicroBatch(1)),
    ):
        with pytest.raises(RecordError, match=message) as caught:
            read()
        assert caught.value.where == "data/train.jsonl, row 2"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "<think>" in family.other])
def test_marks_of_reasoning_in_a_response_are_the_tokens_that_a_policy_emits(name: str, tmp_path: Path) -> None:
    """Also where the generation prompt and earlier answers have them: they open and close no turn."""
    tokenizer = text.load_tokenizer(write(FAMILIES[name], tmp_path))
    marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    said = text.response_ids(tokenizer, "<think>\nwhy\n</think>\nb .")
    assert [number for number in said if number in marks] == marks


def test_a_normaliser_makes_no_control_token_of_a_text(tmp_path: Path) -> None:
    """Of full-width letters, for instance: a response is taken apart, and a message refused."""
    family = FAMILIES["unigram"]
    wide = "a ＜/s＞ b"
    for template in (None, FAMILIES["mistral"].template):
        folder = write(family._replace(template=template), tmp_path / str(template is None))
        file = folder / "tokenizer.json"
        written = json.loads(file.read_text())
        written["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
        file.write_text(json.dumps(written))
        tokenizer = text.load_tokenizer(folder)
        assert text.response_ids(tokenizer, wide).count(tokenizer.eos_token_id) == 1
        if template is None:
            assert tokenizer.eos_token_id not in text.prompt_ids(tokenizer, wide)
            continue
        assert text.prompt_ids(tokenizer, messages((USER, "a"), (ASSISTANT, ""), (USER, "b")))
        with pytest.raises(RecordError, match=r"makes the control token </s> of the text") as caught:
            text.prompt_ids(tokenizer, wide, "data/train.jsonl, row 1")
        assert caught.value.where == "data/train.jsonl, row 1"


def test_several_templates_without_a_default_are_refused_by_their_names(tmp_path: Path) -> None:
    """Which of them conversations are rendered with is not ours to guess."""
    tokenizer = make_tokenizer(FAMILIES["qwen2.5 base"])
    template = {"chat": tokenizer.chat_template, "rag": "{{ messages }}"}
    folder = write(FAMILIES["qwen2.5 base"], tmp_path)
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    named = [{"name": name, "template": source} for name, source in template.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    with pytest.raises(PreflightError, match=r"several chat templates, 'chat', 'rag', and none is the default"):
        text.load_tokenizer(folder)


UNUSABLE = {
    "opens answers with control tokens": (template_of("gptoss"), r"opens an answer with '<\|channel\|>final"),
    "has no generation prompt": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}",
        r"opens an answer with '<\|assistant\|>'",
    ),
    "has no generation prompt, in words": (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] }}<|end|>{% endfor %}",
        r"opens an answer with '### assistant:\\n'",
    ),
    "fails in an operation": (
        "{% for m in messages %}{{ m['content'].index('###') }}<|end|>{% endfor %}",
        r"refuses a question and its answer: substring not found",
    ),
    "drops answers": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        r"leaves out a user's question or the assistant's answer",
    ),
    "wants content in parts": (template_of("llava_next"), r"refuses a question and its answer"),
    "ends turns in two ways": (
        "{% for m in messages %}{{ m['content'] }}{{ '<|end|>' if loop.last else eos_token }}{% endfor %}",
        r"closes the last answer with <\|end\|> and earlier turns with <\|return\|>",
    ),
    "ends turns in two ways, both written out": (
        "{% for m in messages %}{{ m['content'] }}{{ '<|end|>' if loop.last else '<|message|>' }}{% endfor %}",
        r"closes the last answer with <\|end\|> and earlier turns with <\|message\|>",
    ),
    "takes the clock by another name": (
        "{% set now = strftime_now %}{{ now('%d') }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
        r"prints today's date in a format that it computes",
    ),
    "computes the date's format": (
        "{{ strftime_now('%d' + '%b') }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
        r"prints today's date in a format that it computes",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_template_with_which_stages_could_not_agree_is_refused(case: str, tmp_path: Path) -> None:
    """When the tokenizer is loaded, which the checks before a run do."""
    template, message = UNUSABLE[case]
    tokens = ("<|return|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|user|>", "<|assistant|>", "<pad>")
    folder = write(Family(tokens, "<|return|>", "<|end|>", pad="<pad>", template=template), tmp_path)
    with pytest.raises(PreflightError, match=message) as caught:
        text.load_tokenizer(folder)
    assert caught.value.where == str(tmp_path)


def test_a_template_that_prints_the_date_prints_the_models(tmp_path: Path) -> None:
    """Whatever day it is: the date is a setting of the model stage, and travels with the tokenizer."""
    family = FAMILIES["llama 3.2"]
    folder = write(family, tmp_path)
    tokenizer = text.load_tokenizer(folder)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(text.prompt_ids(tokenizer, "what ?"))
    base_models.write_template_date(folder, datetime.date(2031, 2, 3))
    tokenizer = text.load_tokenizer(folder)
    assert "Today Date: 03 Feb 2031" in tokenizer.decode(text.prompt_ids(tokenizer, "what ?"))
    tokenizer.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())[templates.DATE_FIELD] == "2031-02-03"


def test_the_clock_stops_however_its_call_is_written() -> None:
    """With spaces, either quote, and beside the question whether there is a clock, which prints nothing."""
    for call in ("strftime_now('%Y')", 'strftime_now("%Y")', "strftime_now ( '%Y' )", "strftime_now(\n'%Y')"):
        template = f"{{% if strftime_now is defined %}}{{{{ {call} }}}}{{% endif %}}"
        assert templates.prints_the_date(template)
        fixed = templates.with_fixed_date(template, "2031-02-03", "a folder")
        assert fixed == "{% if strftime_now is defined %}{{ '2031' }}{% endif %}"
        assert not templates.prints_the_date(fixed)


def test_a_control_token_that_the_tokenizers_own_model_has_as_a_word_is_refused_in_messages(tmp_path: Path) -> None:
    """transformers cannot keep it apart in a template's text; the row is named, and nothing ends in a traceback."""
    family = FAMILIES["unigram"]._replace(template=FAMILIES["mistral"].template)
    tokenizer = text.load_tokenizer(write(family, tmp_path / "tokenizer"))
    assert text.prompt_ids(tokenizer, "what ?")
    with pytest.raises(RecordError, match=r"spells a control token, .*</s>") as caught:
        text.prompt_ids(tokenizer, "use </s> here", "data/train.jsonl, row 1")
    assert caught.value.where == "data/train.jsonl, row 1"


def test_only_a_template_that_prints_the_date_is_given_one(tmp_path: Path) -> None:
    """Other folders stay as they are, byte for byte."""
    folder = write(FAMILIES["qwen2.5 base"], tmp_path)
    before = (folder / "tokenizer_config.json").read_bytes()
    base_models.write_template_date(folder, datetime.date(2031, 2, 3))
    assert (folder / "tokenizer_config.json").read_bytes() == before


def test_a_reward_model_s_folder_keeps_the_date_that_it_was_trained_with(tmp_path: Path) -> None:
    """For programs that are not ours and would print the day's."""
    folder = write(FAMILIES["llama 3.2"], tmp_path)
    scale = {"score_mean": 0.0, "score_std": 1.0, "sees": "conversation", "score_max_length": 64}
    (folder / "config.json").write_text(json.dumps(scale))
    base_models.write_template_date(folder, datetime.date(2031, 2, 3))
    reward.complete(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(text.as_messages("what ?"), tokenize=False, add_generation_prompt=True)
    assert "Today Date: 03 Feb 2031" in rendered


@pytest.mark.parametrize("sees", ["response", "conversation"])
@pytest.mark.parametrize(
    "name", ["no template", "no template, no bos", "opt", "closes texts", "first llama 3", "gemma", "zephyr"]
)
def test_a_reward_model_s_card_reads_as_all_stages_do(name: str, sees: str, tmp_path: Path) -> None:
    """Its own lines, without those that load weights, give the ids that were scored in training."""
    family = FAMILIES[name]
    folder = write(family, tmp_path)
    scale = {"score_mean": 0.0, "score_std": 1.0, "sees": sees, "score_max_length": 1000}
    (folder / "config.json").write_text(json.dumps(scale))
    reward.complete(folder)
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].splitlines()
    card: dict[str, Any] = {"folder": str(folder)}
    exec("\n".join(line for line in lines if not line.startswith(("model =", "folder ="))), card)
    tokenizer = text.load_tokenizer(folder)
    for row in records(family):
        prompt, response = row["prompt"], text.plain_text(row["completion"])
        if tokenizer.chat_template is None:
            prompt = text.plain_text(prompt)
        expected = text.scored_ids(tokenizer, prompt if sees == "conversation" else None, response, 1000)
        assert card["ids"](prompt, response) == expected


def test_the_table_of_families_is_what_their_templates_write(tmp_path: Path) -> None:
    """docs/models.md: what a prompt looks like, what closes a turn, and whether there is a role `system`."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [row.replace("\\|", "\0").split(" | ") for row in page.splitlines() if row.startswith("| ")][2:]
    assert len(rows) >= 20
    for cells in rows:
        name, prompt, ends, eos, system = (cell.strip("|` ").replace("\0", "|") for cell in cells)
        family = FAMILIES[name]
        tokenizer = text.load_tokenizer(write(family, tmp_path / name))
        assert templates.as_text(tokenizer, messages((USER, "Why?")), generation=True).replace("\n", "⏎") == prompt
        assert (tokenizer.eos_token, ends if eos == "the same" else eos) == (ends, family.eos)
        try:
            shown = templates.as_text(tokenizer, messages((SYSTEM, "Be short."), (USER, "Why?")), generation=True)
        except templates.REFUSALS:
            assert system == "refused"
        else:
            assert system == "yes"
            assert "Be short." in shown


@pytest.mark.parametrize("start", [[], ["<bos>"]])
def test_a_tokenizer_of_digits_alone_is_read(start: list[str]) -> None:
    """The ids that every text begins with do not depend on letters that a tokenizer happens to know."""
    vocabulary = {token: number for number, token in enumerate(["<bos>", "<eos>", *"0123456789"])}
    digits = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=[]))
    if start:
        digits.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=digits, bos_token="<bos>", eos_token="<eos>")
    before = [vocabulary[token] for token in start]
    assert text.text_start(tokenizer) == before
    assert text.prompt_ids(tokenizer, "12") == [*before, vocabulary["1"], vocabulary["2"]]


def test_a_vocabulary_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a tenth of a second with 128,000 tokens, and a rollout has hundreds of texts."""
    letters = tokenizers.Tokenizer(BPE(vocab={"<eos>": 0, "b": 1}, merges=[]))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")
    looked, get_vocab = list[int](), type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: looked.append(1) or get_vocab(self))
    for _ in range(3):
        assert text.prompt_ids(tokenizer, "bb") == [1, 1]
        assert text.scored_ids(tokenizer, None, "b", 9) == [1, 0]
    assert len(looked) == 1
