"""The methods of fine-tuning in a pipeline file: what is read, what is refused, and the former name ``lora``."""

from pathlib import Path

import pytest

from rlhf.config.base import Settings, describe, semantic_values
from rlhf.config.pipeline import PipelineConfig, load_pipeline, resolved
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import EvaluateSettings, RmSettings, SftSettings, TrainingSettings
from rlhf.config.tuning import FULL, BottomFrozenTuning, FullTuning, LoraTuning, TopTuning
from rlhf.config.yaml_tree import to_yaml
from tests.config.conftest import Load, Refuse

STAGES: dict[str, type[Settings]] = {
    "sft": SftSettings,
    "rm": RmSettings,
    "ppo": PpoSettings,
    "evaluate": EvaluateSettings,
}
METHODS = "full, top, bottom-frozen, gradual, transfer, lora, qlora, prompt, p-tuning, prefix, p-tuning-v2, ia3"


def tuning(config: PipelineConfig, name: str = "sft") -> Settings:
    settings = config.instances[name].settings
    assert isinstance(settings, TrainingSettings)
    return settings.tuning


def test_a_method_is_read_with_its_settings_and_written_back(load: Load, tmp_path: Path) -> None:
    """In each stage its own; left out, every weight trains; what `rlhf config` prints is the same pipeline."""
    text = "sft:\n  tuning: {method: top, blocks: 3}\nrm: {tuning: {method: lora, targets: [q_proj]}}\nppo: {}"
    config = load(text)
    assert tuning(config) == TopTuning(method="top", blocks=3)
    assert tuning(config, "rm") == LoraTuning(method="lora", targets=["q_proj"])
    assert tuning(config, "ppo") == FullTuning()
    (tmp_path / "p.yaml").write_text(to_yaml(resolved(config)), encoding="utf-8")
    assert load_pipeline(Path("p.yaml"), [], STAGES).instances == config.instances


def test_overrides_change_a_setting_of_the_method_or_the_whole_section(load: Load) -> None:
    """An override of a section leaves nothing of what the file says in it."""
    text = "sft: {tuning: {method: lora, rank: 8, alpha: 4}}"
    assert tuning(load(text, "sft.tuning.rank=2")) == LoraTuning(method="lora", rank=2, alpha=4)
    assert tuning(load(text, "sft.tuning={method: top}")) == TopTuning(method="top")
    shared = "sft: {tuning: {method: top, blocks: 5}}"
    assert tuning(load(shared, "sft.tuning.method=bottom-frozen")) == BottomFrozenTuning(
        method="bottom-frozen", blocks=5
    )


def test_the_method_and_its_settings_enter_the_key() -> None:
    """As the settings of any section do, and no settings of other methods with them."""
    assert semantic_values(SftSettings())["tuning"] == {"method": "full"}
    top = SftSettings(tuning=TopTuning(method="top"))
    assert semantic_values(top)["tuning"] == {"method": "top", "blocks": 2}
    assert semantic_values(top) != semantic_values(SftSettings(tuning=BottomFrozenTuning(method="bottom-frozen")))


def test_each_method_s_settings_are_described_apart() -> None:
    """The choice comes first, with a line for each method; settings of one name say whose they are."""
    rows = {(row.path, row.form): row for row in describe(SftSettings)}
    section, choice = rows["tuning", ""], rows["tuning.method", ""]
    assert (section.type, section.default) == (f"a section whose method is one of {METHODS}", '{"method": "full"}')
    assert (choice.type, choice.default, choice.role) == (f"one of {METHODS}", "required", "semantic")
    assert choice.help.splitlines()[0] == "full: Every weight trains."
    rank = rows["tuning.rank", "method lora"]
    assert (rank.type, rank.default, rank.role) == ("a whole number of at least 1", "16", "semantic")
    assert rank.help == "Rank r of the update; 8 to 64 are usual."
    assert rows["tuning.blocks", "method top"].help == "Number of blocks, counted from the top, that train."
    frozen = rows["tuning.blocks", "method bottom-frozen"]
    assert frozen.help == "Number of blocks, counted from the bottom, that are frozen."
    assert ("tuning.rank", "") not in rows


REFUSALS = {
    "setting of other methods": (
        "sft:\n  tuning:\n    method: lora\n    blocks: 3",
        "sft.tuning has no setting blocks for method lora\n  where: p.yaml:4\n"
        "  next:  blocks belongs to top, bottom-frozen",
    ),
    "misspelt setting": (
        "sft:\n  tuning:\n    method: lora\n    rnk: 3",
        "sft.tuning has no setting rnk for method lora\n  where: p.yaml:4\n"
        "  next:  did you mean rank? known: alpha, dora, dropout, init, merge, method, rank, rslora, targets",
    ),
    "setting of no method": (
        "sft:\n  tuning: {method: p-tuning-v2, epochs: 3}",
        "sft.tuning has no setting epochs for method p-tuning-v2\n  where: p.yaml:2\n  next:  did you mean sft.epochs?",
    ),
    "setting of a method beside the section": (
        "sft:\n  rank: 8",
        "sft has no setting rank\n  where: p.yaml:2\n  next:  did you mean sft.tuning.rank?",
    ),
    "setting with the name of its method": (
        "sft:\n  tuning:\n    method: prefix\n    prefix: {tokens: 0}",
        "sft.tuning has no setting prefix for method prefix\n  where: p.yaml:4\n"
        "  next:  known: hidden_size, method, text, tokens",
    ),
    "value out of range beside a setting with the name of the method": (
        "sft:\n  tuning:\n    method: prefix\n    tokens: 0\n    prefix: {tokens: 0}",
        "2 settings are wrong\n  p.yaml:4: sft.tuning.tokens is 0 and must be a whole number of at least 1\n"
        "  p.yaml:5: sft.tuning has no setting prefix for method prefix (known: hidden_size, method, text, tokens)",
    ),
    "unknown method": (
        "sft:\n  tuning: {method: lroa, rank: 8}",
        f'sft.tuning.method is "lroa" and must be one of {METHODS}\n  where: p.yaml:2\n  next:  did you mean lora?',
    ),
    "method like no other": (
        "sft:\n  tuning: {method: 3}",
        f"sft.tuning.method is 3 and must be one of {METHODS}\n  where: p.yaml:2",
    ),
    "no method": (
        "sft:\n  tuning: {}",
        f"sft.tuning.method is required\n  where: p.yaml:2\n  next:  it takes one of {METHODS}",
    ),
    "no method, and settings of some": (
        "sft:\n  tuning:\n    rank: 8\n    alpha: 4",
        "sft.tuning.method is required\n  where: p.yaml:2\n  next:  it takes lora or qlora, which have rank, alpha",
    ),
    "no method, and settings of none": (
        "sft:\n  tuning: {rnk: 8}",
        f"sft.tuning.method is required\n  where: p.yaml:2\n  next:  it takes one of {METHODS}",
    ),
    "text in place of the section": (
        "sft:\n  tuning: lora",
        f'sft.tuning is "lora" and must be a section whose method is one of {METHODS}\n  where: p.yaml:2\n'
        "  next:  write {method: lora}",
    ),
    "null in place of the section": (
        "sft:\n  tuning: null",
        f"sft.tuning is null and must be a section whose method is one of {METHODS}\n  where: p.yaml:2",
    ),
    "number out of range": (
        "sft:\n  tuning:\n    method: lora\n    rank: 0",
        "sft.tuning.rank is 0 and must be a whole number of at least 1\n  where: p.yaml:4",
    ),
    "empty list": (
        "sft:\n  tuning:\n    method: lora\n    targets: []",
        "sft.tuning.targets is [] and must be a list that is not empty, each text, or null\n  where: p.yaml:4",
    ),
    "settings that do not go together": (
        "sft:\n  tuning: {method: lora, dora: true, init: pissa}",
        "sft.tuning: dora scales the whole weight, of which pissa takes a part away; choose one of them\n"
        "  where: p.yaml:2",
    ),
    "value inside the former block": (
        "sft:\n  lora:\n    alpha: 4\n    rank: 0",
        "sft.tuning.rank is 0 and must be a whole number of at least 1\n  where: p.yaml:4",
    ),
    "unknown setting inside the former block": (
        "sft:\n  lora:\n    rank: 4\n    blocks: 3",
        "sft.tuning has no setting blocks for method lora\n  where: p.yaml:4\n"
        "  next:  blocks belongs to top, bottom-frozen",
    ),
    "former block that is no section": (
        "sft:\n  lora: true",
        f"sft.tuning is true and must be a section whose method is one of {METHODS}\n  where: p.yaml:2",
    ),
    "both names": (
        "sft:\n  tuning: {method: full}\n  lora: null",
        "sft has both tuning, set at p.yaml:2, and lora, its former name\n  where: p.yaml:3\n"
        "  next:  keep tuning, and take lora out",
    ),
    "a stage that trains nothing": (
        "evaluate: {lora: null}",
        "evaluate has no setting lora\n  where: p.yaml:1\n  next:  known: seed, precision, workers, policies, "
        "responses, best_of_n, rewards, prompts, max_prompt_length, judge, sampling, micro_batch_size, uses, inputs",
    ),
}


@pytest.mark.parametrize(("text", "expected"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_mistake_is_named_with_its_line_and_what_to_write(refuse: Refuse, text: str, expected: str) -> None:
    """The whole text of the error is a promise to the reader."""
    assert refuse(text) == expected


OVERRIDE_REFUSALS = {
    "sft.tuning.rank=0": "sft.tuning.rank is 0 and must be a whole number of at least 1\n"
    "  where: override sft.tuning.rank=0",
    "sft.tuning.method=top": "sft.tuning has no setting rank for method top\n  where: p.yaml:4\n"
    "  next:  rank belongs to lora, qlora; sft.tuning={method: top} replaces the whole section",
    "sft.tuning={method: top, rank: 8}": "sft.tuning has no setting rank for method top\n"
    "  where: override sft.tuning={method: top, rank: 8}\n  next:  rank belongs to lora, qlora",
    "sft.tuning=null": f"sft.tuning is null and must be a section whose method is one of {METHODS}\n"
    "  where: override sft.tuning=null",
    "sft.lora.rank=8": "sft has both tuning, set at p.yaml:2, and lora, its former name\n"
    "  where: override sft.lora.rank=8\n  next:  keep tuning, and take lora out",
    "rm.tuning.rank=8": "rm.tuning.method is required\n  where: override rm.tuning.rank=8\n"
    "  next:  it takes lora or qlora, which have rank",
    "rm.lora.rank=0": "rm.tuning.rank is 0 and must be a whole number of at least 1\n  where: override rm.lora.rank=0",
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDE_REFUSALS.items())
def test_a_mistake_in_an_override_is_named_where_it_can_be_mended(refuse: Refuse, override: str, expected: str) -> None:
    """An override of the method alone leaves the file's settings of the former one."""
    assert refuse("sft:\n  tuning:\n    method: lora\n    rank: 16\nrm:\n", override) == expected


def now(stage: str, line: str, where: str) -> str:
    return (
        f"{stage}.lora is now called {stage}.tuning, and the next release refuses the old name; write {line} ({where})"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "expected", "notice"),
    [
        ("{lora: null}", [], FULL, ("tuning: {method: full}", "p.yaml:1")),
        ("{lora: {}}", [], LoraTuning(method="lora"), ("tuning: {method: lora}", "p.yaml:1")),
        (
            "{lora: {rank: 4, merge: true}}",
            [],
            LoraTuning(method="lora", rank=4, merge=True),
            ("tuning: {method: lora, rank: 4, merge: true}", "p.yaml:1"),
        ),
        (
            "{lora: {rank: 4}}",
            ["rm.lora.rank=8"],
            LoraTuning(method="lora", rank=8),
            ("tuning: {method: lora, rank: 8}", "p.yaml:1"),
        ),
        ("{lora: {rank: 4}}", ["rm.lora=null"], FULL, ("rm.tuning={method: full}", "override rm.lora=null")),
        (
            "{}",
            ["rm.lora.rank=8"],
            LoraTuning(method="lora", rank=8),
            ("rm.tuning={method: lora, rank: 8}", "override rm.lora.rank=8"),
        ),
    ],
)
def test_the_former_name_is_read_with_a_line_that_says_what_to_write(
    load: Load, text: str, overrides: list[str], expected: Settings, notice: tuple[str, str]
) -> None:
    """The line says the whole section, and loads to the same settings."""
    config = load(f"rm: {text}", *overrides)
    assert tuning(config, "rm") == expected
    assert config.notices == (now("rm", *notice),)
    line, where = notice
    again = load("rm: {}", line) if where.startswith("override") else load(f"rm: {{{line}}}")
    assert (tuning(again, "rm"), again.notices) == (expected, ())


def test_each_stage_with_the_former_name_has_a_line(load: Load) -> None:
    """By the instance's name; a merged section is a section of its own."""
    config = load("sft: &sft {lora: {rank: 4}}\nsecond: {<<: *sft, uses: sft}\nppo: {}", "second.lora.rank=2")
    assert [notice.partition(" ")[0] for notice in config.notices] == ["sft.lora", "second.lora"]
    assert tuning(config) == LoraTuning(method="lora", rank=4)
    assert tuning(config, "second") == LoraTuning(method="lora", rank=2)
