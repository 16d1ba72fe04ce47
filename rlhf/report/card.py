"""The model card of an exported model, made from the lineage of its result; with what a hub reads at its head.

The form is the hub's: YAML between two lines of dashes, then Markdown (Mitchell et al. 2019, arXiv:1810.03993, is where
cards come from). A card is made to be published: it holds no host, user, path or address.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment

from rlhf.config.base import is_local
from rlhf.history.reading import attempts_at, evaluated_samples, joined, prompt_text
from rlhf.models.layout import ADAPTER_CONFIG, BASE, is_adapter, virtual_tokens_in
from rlhf.pipeline.documents import ancestry, lineage_document
from rlhf.pipeline.plan import Planned, result_of
from rlhf.pipeline.stage import stages
from rlhf.report.page import shown_text
from rlhf.store import ActionRecord, Store
from rlhf.terminal import duration

SAMPLES = 3
OUTSIDE = ("model", "import")
"""Stages that train nothing."""
UNMEASURED = ("data", "model", "rank", "import")
"""Stages whose metrics say nothing of a model's quality."""
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The hub's names of base models that come from elsewhere."""
SERVICE = "url"
"""The setting by which a section is known that names a service."""


def model_card(planned: Planned, pipeline: str, store: Store, folder: Path) -> str:
    """Return the card of a stage's result that was written to a folder, by which the lines that load it are chosen.

    pipeline  the name of the pipeline whose evaluations of the model are quoted
    """
    record = result_of(planned)
    results = list(ancestry(record, store).values())
    weights = _weights_chain(record, store)
    root: Mapping[str, Any] = weights[-1].provenance.get("origin", {}).get("model", {})
    evaluations = _evaluations(record, pipeline, store)
    read = {entry["part"] for one in results for entry in one.inputs.values()}
    data = [
        (kind, source)
        for one in results
        if one.stage == "data"
        for kind, source in one.provenance.get("origin", {}).items()
        if kind.partition(".")[0] in read  # of a task it is kind.task
    ]
    datasets = sorted({re.split("[@#]", source["source"])[0] for _, source in data if _is_hub(source["source"])})
    licence = root.get("license")
    head = ModelCardData(
        library_name="peft" if is_adapter(folder) else "transformers",
        pipeline_tag="text-classification" if planned.stage.kind == "reward-model" else "text-generation",
        base_model=_hub_base(root),
        license=licence.lower() if licence else None,
        datasets=datasets or None,
        tags=["rlhf", *dict.fromkeys(one.stage for one in weights if one.stage not in OUTSIDE)],
    )
    samples_of, samples = _samples(record, evaluations, store)
    # It is Markdown, and no page of ours: the hub escapes what it shows.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701
    environment.filters["row"] = _row
    template = environment.from_string((files("rlhf.report") / "card.jinja").read_text(encoding="utf-8"))
    text = template.render(
        head=head.to_yaml(),
        title=planned.name,
        kind="A reward model" if planned.stage.kind == "reward-model" else "A language model",
        base=_base(root),
        usage=_usage(planned, folder),
        metrics=[row for one in (*results, *evaluations) for row in _metrics(one)],
        samples=samples,
        samples_of=samples_of,
        sources=_source_rows(root, data),
        command=f"rlhf run {planned.name}",
        results=[_result_row(one) for one in results],
        cost=_cost(record, store),
        versions=", ".join(f"{name} {number}" for name, number in record.provenance.get("versions", {}).items()),
        settings="".join(_settings(one) for one in results if one.settings),
        limits=_limits(planned, record, root, evaluations, store),
    )
    return text.rstrip("\n") + "\n"


def _weights_chain(record: ActionRecord, store: Store) -> list[ActionRecord]:
    """Return a record and those whose weights were trained further to make it, as far as they are known."""
    known, chain = stages(), [record]
    while (stage := known.get(chain[-1].stage)) and stage.continues in chain[-1].inputs:
        key = chain[-1].inputs[stage.continues]["key"]
        if (parent := store.action(key) if key else None) is None:
            break
        chain.append(parent)
    return chain


def _is_hub(source: str) -> bool:
    return "/" in source and not is_local(source)


def _hub_base(root: Mapping[str, Any]) -> str | None:
    source = str(root.get("source"))
    return HUB_NAMES.get(source) or (source if root.get("revision") else None)


def _base(root: Mapping[str, Any]) -> str:
    """Return the base model in words; empty where its origin is not known."""
    source = str(root.get("source", ""))
    if source == "scratch":
        return "random weights"
    return _hub_base(root) or ("a model of a local folder" if source else "")


def _source_rows(root: Mapping[str, Any], data: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    revision = f" at commit {root['revision']}" if root.get("revision") else ""
    licence = "" if root.get("source") == "scratch" else root.get("license") or "not known"
    rows = [["base model", (_base(root) or "not known") + revision, licence]]
    for kind, source in data:
        name, file = str(source.get("source")), source.get("file", {})
        shown = f"the file or folder {Path(name).name}" if is_local(name) else name
        origin = f", of {file['package']} {file['version']}: {file['citation']}" if file else ""
        counts = ", ".join(f"{count} {part.rpartition('/')[2]}" for part, count in source.get("rows", {}).items())
        rows.append([kind, shown + origin + (f" ({counts})" if counts else ""), file.get("licence") or "not known"])
    return rows


def _evaluations(record: ActionRecord, pipeline: str, store: Store) -> list[ActionRecord]:
    """Return the reports of a pipeline that measured this result."""
    records = [store.action(ref.key) for ref in store.refs(pipeline).values()]
    return [
        one
        for one in records
        if one is not None
        and one.stage == "evaluate"
        and record.artifact in [entry["artifact"] for entry in one.inputs.values()]
    ]


def _metrics(record: ActionRecord) -> list[list[str]]:
    """Return a row for each final metric: the stage, the metric's name, its value and its interval."""
    rows: list[list[str]] = []
    for name, value in record.metrics.items() if record.stage not in UNMEASURED else ():
        stem, _, end = name.rpartition("_")
        if end not in ("low", "high") or stem not in record.metrics:
            low, high = (record.metrics.get(f"{name}_{side}") for side in ("low", "high"))
            rows.append([record.stage, name, f"{value:.4g}", _interval(low, high)])
    return rows


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _samples(
    record: ActionRecord, evaluations: Sequence[ActionRecord], store: Store
) -> tuple[str, list[dict[str, str]]]:
    """Return what the samples are, and some: each a mapping of what it is to a text, which is fenced."""
    for report in evaluations:
        after = report.inputs.get("after", {}).get("artifact") == record.artifact
        rows = evaluated_samples(report, store).rows[:SAMPLES]
        response = "after" if after else "before"
        if rows:
            return "Answers to the first held-out prompts of the evaluation, unchosen.", [
                {
                    "Prompt": _fenced(prompt_text(row["prompt"])),
                    f"Answer, score {row[f'score_{response}']:.2f}": _fenced(str(row[response])),
                }
                for row in rows
            ]
    attempts = attempts_at(record.key, store)
    rows = attempts[-1].newest_samples[:SAMPLES] if attempts else ()
    return "Answers of the last iteration of training, the first that were kept.", [
        {
            "Prompt": _fenced(prompt_text(row["prompt"])),
            f"Answer, score {row['score']:.2f}": _fenced(str(row["response"])),
        }
        for row in rows
    ]


def _fenced(text: str) -> str:
    """Return a text as a block of Markdown that nothing in it ends."""
    text = shown_text(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _row(cells: Iterable[object]) -> str:
    return " | ".join(map(_cell, cells))


def _cell(text: object) -> str:
    """Return a text as a cell of a table."""
    return re.sub(r"[|<>]", lambda sign: f"\\{sign[0]}", " ".join(shown_text(str(text)).split()))


def _result_row(record: ActionRecord) -> list[str]:
    read = [f"{role} {(entry['digest'] or '')[:12]}" for role, entry in record.inputs.items()]
    return [record.stage, str(record.version), record.key, record.artifact[:12], ", ".join(read)]


def _cost(record: ActionRecord, store: Store) -> str:
    total = lineage_document(record, store)["provenance"]["total"]
    gpu_hours = "an unknown number of" if total["gpu_hours"] is None else total["gpu_hours"]
    devices = sorted(set(record.provenance.get("devices") or []))
    on = f", the last stage on {', '.join(devices)}" if devices else ""
    return f"It took {duration(total['seconds'])} of work and {gpu_hours} GPU-hours{on}."


def _settings(record: ActionRecord) -> str:
    """Return the settings of a result as a section that a pipeline file takes."""
    section = yaml.safe_dump({record.stage: _without_services(record.settings)}, sort_keys=False, allow_unicode=True)
    return f"Settings of {record.stage}, key {record.key[:12]}:\n\n```yaml\n{section}```\n\n"


def _without_services(value: Any) -> Any:
    """Return settings in which no service is named, whose address is nobody else's business."""
    if isinstance(value, Mapping):
        if SERVICE in value:
            return "a service"
        return {name: _without_services(each) for name, each in value.items()}
    return [_without_services(each) for each in value] if isinstance(value, (list, tuple)) else value


def _limits(
    planned: Planned, record: ActionRecord, root: Mapping[str, Any], evaluations: Sequence[ActionRecord], store: Store
) -> list[str]:
    """Return what the record says about where the model should not be trusted."""
    settings = record.settings
    limits: list[str] = []
    if root.get("source") == "scratch":
        limits.append("Its base had random weights: it knows nothing but what these data taught it.")
    if sampling := settings.get("sampling"):
        longest = settings.get("max_prompt_length")
        prompts = f" prompts of up to {longest} tokens and" if longest else ""
        limits.append(
            f"Trained on{prompts} responses of up to {sampling['max_new_tokens']} tokens; longer ones are untried."
        )
    elif longest := settings.get("max_length"):
        limits.append(f"Trained on texts of up to {longest} tokens; longer ones are untried.")
    if planned.stage.kind == "reward-model":
        limits.append(
            "A score says how the annotators of these comparisons would order responses, and nothing of truth or harm. "
            "A policy that is optimised against it finds what it overrates."
        )
    else:
        judged = [one for one in evaluations if "judge/after" in one.metrics]
        limits.append(
            "A judge that no stage was trained against has rated it; see the results."
            if judged
            else "No judge that is independent of its training has rated it."
        )
        limits.append(
            "Nothing was done to keep it from false, biased or harmful answers beyond what the data taught it."
        )
    rows = joined([attempt.metrics.rows for attempt in attempts_at(record.key, store)])
    alarms = dict.fromkeys(
        name.removeprefix("alarm/")
        for row in rows
        for name, value in row.items()
        if name.startswith("alarm/") and value
    )
    if alarms:
        limits.append(f"Alarms that were raised during training: {', '.join(alarms)}.")
    return limits


LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
PLAIN = 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()\n'
ADAPTED = f"""base = AutoModelForCausalLM.from_pretrained(folder + "/{BASE}", dtype="auto")
model = PeftModel.from_pretrained(base, folder).eval()
"""
CHAT = """
prompt = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
TEXT = """
inputs = tokenizer("Hello!", return_tensors="pt")
"""
ANSWER = """ids = model.generate(**inputs)  # sampled as generation_config.json says
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _usage(planned: Planned, folder: Path) -> str:
    """Return the lines that load and ask the model of a folder, and the commands that serve and publish it."""
    upload = "\n    hf upload OWNER/NAME ."
    if planned.stage.kind == "reward-model":
        readme = folder / "README.md"
        # It was written with the model: a title, then the lines that score.
        lines = readme.read_text(encoding="utf-8").partition("\n\n")[2] if readme.exists() else ""
        return f"{lines}{upload}"
    adapter = is_adapter(folder)
    load = ("from peft import PeftModel\n" if adapter else "") + LOAD + (ADAPTED if adapter else PLAIN)
    code = load + (CHAT if _has_chat_template(folder) else TEXT) + ANSWER
    return f"```python\n{code}```\n{_serving(planned.name, folder)}{upload}"


def _serving(name: str, folder: Path) -> str:
    """Return the commands that serve a policy, as an indented block; none for adapters that vLLM does not serve."""
    gguf = "\n    llama-server --model model.gguf\n" if (folder / "model.gguf").exists() else ""
    if not is_adapter(folder):
        return f"\n    vllm serve .\n{gguf}"
    if virtual_tokens_in(folder) or json.loads((folder / ADAPTER_CONFIG).read_text())["peft_type"] != "LORA":
        return ""
    return f"\n    vllm serve {BASE} --enable-lora --lora-modules {name}=.\n"


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (
        settings.exists() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    )
