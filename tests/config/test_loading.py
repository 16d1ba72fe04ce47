import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.pipeline import (
    ClusterSettings,
    PipelineConfig,
    StoreSettings,
    TrackingSettings,
    load_pipeline,
    resolved,
)
from rlhf.config.yaml_tree import to_yaml
from rlhf.errors import SettingsError
from tests.config.conftest import Load, Refuse
from tests.config.example import STAGES, AdapterExample, KlExample, ReadExample, TrainExample


def train(config: PipelineConfig, name: str = "train") -> TrainExample:
    settings = config.instances[name].settings
    assert isinstance(settings, TrainExample)
    return settings


def test_a_pipeline_is_its_top_level_settings_and_its_stage_instances_in_order(load: Load) -> None:
    """Everything a file says arrives, and everything it leaves out has its default."""
    config = load(
        """
        pipeline: tiny
        store: {uri: elsewhere}
        tracking: {wandb: disabled}
        rows: {uses: read, file: rows.jsonl}
        train:
          inputs: {data: rows/train, other: rows}
          kl: {coef: 0.1}
        """
    )
    assert (config.name, config.path, config.seed) == ("tiny", Path("p.yaml"), 0)
    assert config.store == StoreSettings(uri="elsewhere")
    assert config.cluster == ClusterSettings()
    assert config.tracking == TrackingSettings(wandb="disabled")
    assert list(config.instances) == ["rows", "train"]
    assert config.instances["rows"].uses == "read"
    assert config.instances["rows"].settings == ReadExample(file="rows.jsonl")
    assert config.instances["train"].inputs == {"data": "rows/train", "other": "rows"}
    assert train(config) == TrainExample(kl=KlExample(coef=0.1))


def test_a_pipeline_without_a_name_is_called_after_its_file(load: Load) -> None:
    """The name is a folder of the store, so there always is one."""
    assert load("train: {}").name == "p"


def test_an_empty_section_is_a_stage_with_its_defaults(load: Load) -> None:
    """``train:`` with nothing under it is not null but a section."""
    assert train(load("train:\n")) == TrainExample()


def test_the_pipeline_s_seed_fills_the_seeds_that_are_not_set(load: Load) -> None:
    """An instance's own seed wins; a stage without a seed gets none."""
    config = load("seed: 7\ntrain: {}\nown: {uses: train, seed: 1}\nread: {file: x}")
    assert (train(config).seed, train(config, "own").seed) == (7, 1)
    assert train(load("seed: 7\ntrain: {}", "seed=8")).seed == 8
    assert train(load("seed: 7\ntrain: {}", "seed=8", "train.seed=9")).seed == 9


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-04", ".0001", "0.0001", "1_0.0e-5"])
def test_every_way_to_write_a_number_is_a_number(load: Load, text: str) -> None:
    """PyYAML alone takes 1e-4 for text."""
    assert train(load(f"train: {{learning_rate: {text}}}")).learning_rate == pytest.approx(1e-4)
    assert train(load("train: {}", f"train.learning_rate={text}")).learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "text", ["no", "on", "2024-01-31", "1:30", "010", "0x", ".inf", ".nan", "'1e-4'", "=", "1.2.3"]
)
def test_what_only_yaml_1_1_takes_for_something_else_is_text(load: Load, text: str) -> None:
    """No truth value out of ``no``, no date, no number to the base of 60 or 8, no infinity."""
    assert train(load(f"train: {{prefix: {text}}}")).prefix == text.strip("'")


@pytest.mark.parametrize(("text", "value"), [("16", 16), ("+16", 16), ("0x10", 16), ("0o20", 16), ("1_6", 16)])
def test_every_way_to_write_a_whole_number_is_one(load: Load, text: str, value: int) -> None:
    """Bases are marked as in YAML 1.2, and long numbers may be grouped."""
    assert train(load(f"train: {{rollouts: {text}}}")).rollouts == value


def test_anchors_and_merge_keys_share_settings_between_instances(load: Load) -> None:
    """What an instance says itself wins over what it merges, and an override of one leaves the other alone."""
    text = """
        train: &train {rollouts: 32, kl: {coef: 0.1}}
        second: {<<: *train, uses: train, rollouts: 16}
        third: {<<: [{rollouts: 1}, *train], uses: train}
        """
    config = load(text, "second.kl.coef=0.3")
    assert [train(config, name).rollouts for name in config.instances] == [32, 16, 1]
    assert [train(config, name).kl.coef for name in config.instances] == [0.1, 0.3, 0.1]


def test_the_last_override_wins_over_earlier_ones_and_the_file(load: Load) -> None:
    """Overrides apply from left to right, on top of the file."""
    text = "train: {rollouts: 8, kl: {coef: 0.1, target: 6}}"
    config = load(text, "train.rollouts=16", "train.kl.coef=0.2", "train.rollouts=32", "train.kl.target=null")
    assert train(config).rollouts == 32
    assert train(config).kl == KlExample(coef=0.2, target=None)


def test_overrides_take_any_yaml_and_open_optional_sections(load: Load) -> None:
    """Lists and sections as values; a field of a section that is null; pipeline sections that the file leaves out."""
    config = load(
        "train:\n",
        "train.layers=[1, 2]",
        "train.kl={coef: 1}",
        "train.adapter.rank=4",
        "cluster.cpus=2",
        "train.prefix=a=b",
    )
    assert train(config).layers == (1, 2)
    assert train(config).kl == KlExample(coef=1)
    assert train(config).adapter == AdapterExample(rank=4)
    assert train(config).prefix == "a=b"
    assert config.cluster.cpus == 2


REFUSALS = {
    "unknown key": (
        "train:\n  kl:\n    ceof: 1",
        "train.kl has no setting ceof\n  where: p.yaml:3\n  next:  did you mean coef? known: coef, target",
    ),
    "key of another section": (
        "train:\n  coef: 1",
        "train has no setting coef\n  where: p.yaml:2\n  next:  did you mean train.kl.coef?",
    ),
    "misspelt uses": (
        "read: {file: x}\nb:\n  uses: read\n  file: x\n  input: {}",
        "b has no setting input\n  where: p.yaml:5\n  next:  did you mean inputs? known: file, inputs, uses",
    ),
    "unknown key of the pipeline": (
        "cluster: {cpu: 1}",
        "cluster has no setting cpu\n  where: p.yaml:1\n"
        "  next:  did you mean cpus? known: address, cpus, gpus, max_failures",
    ),
    "text for a number": (
        "train:\n  discount: high",
        'train.discount is "high" and must be a number from 0 to 1\n  where: p.yaml:2',
    ),
    "number out of range": (
        "train:\n  learning_rate: 0",
        "train.learning_rate is 0 and must be a number above 0\n  where: p.yaml:2",
    ),
    "quoted number": (
        'train:\n  rollouts: "8"',
        'train.rollouts is "8" and must be a whole number of at least 1\n  where: p.yaml:2',
    ),
    "fraction": (
        "train: {rollouts: 1.5}",
        "train.rollouts is 1.5 and must be a whole number of at least 1\n  where: p.yaml:1",
    ),
    "number for a truth value": (
        "train: {packing: 1}",
        "train.packing is 1 and must be true or false\n  where: p.yaml:1",
    ),
    "word that is no choice": (
        "train: {precision: fp16}",
        'train.precision is "fp16" and must be one of fp32, bf16\n  where: p.yaml:1',
    ),
    "value for a section": (
        "train: {kl: 3}",
        "train.kl is 3 and must be a section with coef, target\n  where: p.yaml:1",
    ),
    "item of a list": (
        "train:\n  layers:\n    - 1\n    - x",
        'train.layers.1 is "x" and must be a whole number\n  where: p.yaml:4',
    ),
    "item of a section of names": (
        "train:\n  weights:\n    a: 1\n    b: true",
        "train.weights.b is true and must be a number\n  where: p.yaml:4",
    ),
    "optional value": (
        "train: {kl: {target: -1}}",
        "train.kl.target is -1 and must be a number above 0, or null\n  where: p.yaml:1",
    ),
    "none of several kinds": (
        "train: {steps: some}",
        'train.steps is "some" and must be a whole number, or all\n  where: p.yaml:1',
    ),
    "required setting": ("seed: 0\nread:\n", "read.file is required\n  where: p.yaml:2\n  next:  it takes text"),
    "values that do not go together": (
        "seed: 1\ntrain: {minibatches: 5}",
        "train: rollouts 64 is not a multiple of minibatches 5\n  where: p.yaml:2",
    ),
    "unknown section": (
        "trian: {}",
        "trian is neither a stage nor a section of the pipeline\n  where: p.yaml:1\n  next:  did you mean train? "
        "known: cluster, pipeline, read, seed, store, targets, tracking, train "
        "(another name for a stage needs uses: STAGE)",
    ),
    "unknown stage": (
        "a:\n  uses: trian",
        "a.uses is 'trian', which is no stage\n  where: p.yaml:2\n  next:  did you mean train? known: read, train",
    ),
    "stage that is no section": (
        "train: 3",
        "train is a single value and must be a stage's section\n  where: p.yaml:1",
    ),
    "name with a dot": (
        "a.b: {uses: train}",
        "'a.b' cannot name a stage instance\n  where: p.yaml:1\n  next:  use letters, digits, _ and -",
    ),
    "input of nothing": (
        "rows: {uses: read, file: x}\ntrain:\n  inputs:\n    data: row/train",
        "train.inputs.data names 'row', and the pipeline has no such stage instance\n  where: p.yaml:4\n"
        "  next:  did you mean rows? known: rows, train",
    ),
    "input that is no name": (
        "train:\n  inputs: {data: 3}",
        "train.inputs.data must be an instance's name, or instance/part\n  where: p.yaml:2",
    ),
    "inputs that are no section": (
        "train:\n  inputs: rows",
        "train.inputs must be a section of `role: instance` lines\n  where: p.yaml:2",
    ),
    "key set twice": (
        "train:\n  rollouts: 1\n  rollouts: 2",
        "train.rollouts is set twice\n  where: p.yaml:3\n  next:  delete one of the two; the first is at p.yaml:2",
    ),
    "section set twice": (
        "train: {}\nread: {file: x}\ntrain: {}",
        "train is set twice\n  where: p.yaml:3\n  next:  delete one of the two; the first is at p.yaml:1",
    ),
    "key that is no text": (
        "train:\n  1: 2",
        "a setting's name is text, and this one is 1\n  where: p.yaml:2\n  next:  put it in quotes",
    ),
    "number too large": (
        "train: {learning_rate: 1e999}",
        "train.learning_rate is 1e999, which is too large a number\n  where: p.yaml:1",
    ),
    "foreign tag": (
        "train: {prefix: !!python/name:os.system x}",
        "train.prefix is 'x' and cannot be read as !!python/name:os.system\n  where: p.yaml:1",
    ),
    "text tagged as a number": (
        "train: {rollouts: !!int many}",
        "train.rollouts is 'many' and cannot be read as !!int\n  where: p.yaml:1",
    ),
    "section that contains itself": ("train: &a\n  kl: *a", "train.kl contains itself\n  where: p.yaml:1"),
    "merging what is no section": ("train: {<<: 3}", "<< takes another section, or a list of them\n  where: p.yaml:1"),
    "merging itself": ("train: &a {kl: {<<: *a}}", "<< takes another section, or a list of them\n  where: p.yaml:1"),
    "aliases to aliases": (
        "train:\n  a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n  b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "  c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\n  d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        "  e: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]",
        "there are more than 100000 settings, with what aliases repeat\n  where: p.yaml:2"
        "\n  next:  remove aliases that repeat aliases",
    ),
    "name of a stage that ends its line": (
        '"train\\n": {uses: train}',
        "'train\\n' cannot name a stage instance\n  where: p.yaml:1\n  next:  use letters, digits, _ and -",
    ),
    "no YAML": (
        "seed: 0\ntrain: [1, 2\n",
        "p.yaml is not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence\n"
        "  where: p.yaml:3:1\n  next:  correct that line",
    ),
    "no colon": (
        "train:\n  rollouts 3\n  packing: true",
        "p.yaml is not valid YAML: mapping values are not allowed here\n  where: p.yaml:3:10"
        "\n  next:  correct that line",
    ),
    "sign that YAML forbids": (
        "train: \x07",
        "p.yaml is not valid YAML: unacceptable character #x0007: special characters are not allowed\n"
        '  in "<unicode string>", position 7\n  where: p.yaml',
    ),
    "empty file": (
        "# nothing\n",
        "p.yaml is empty\n  where: p.yaml\n  next:  a pipeline file holds sections of `name: value` lines",
    ),
    "list": (
        "- train",
        "p.yaml holds no settings\n  where: p.yaml\n  next:  a pipeline file holds sections of `name: value` lines",
    ),
    "two documents": (
        "train: {}\n---\ntrain: {}",
        "p.yaml is not valid YAML: but found another document, expected a single document in the stream\n"
        "  where: p.yaml:2:1\n  next:  correct that line",
    ),
}


@pytest.mark.parametrize(("text", "expected"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_mistake_is_named_with_its_line_and_what_to_write(refuse: Refuse, text: str, expected: str) -> None:
    """The whole text of the error is a promise to the reader."""
    assert refuse(text) == expected


OVERRIDE_REFUSALS = {
    "train.kl.ceof=1": (
        "train.kl has no setting ceof\n  where: override train.kl.ceof=1"
        "\n  next:  did you mean coef? known: coef, target"
    ),
    "train.kl={coef: -1}": (
        "train.kl.coef is -1 and must be a number of at least 0\n  where: override train.kl={coef: -1}"
    ),
    "trian.rollouts=1": (
        "p.yaml has no section trian\n  where: override trian.rollouts=1\n"
        "  next:  did you mean train? known: cluster, pipeline, seed, store, targets, tracking, train"
    ),
    "read.file=x": (
        "p.yaml has no section read\n  where: override read.file=x\n"
        "  next:  add `read: {}` to p.yaml; `rlhf config --fields read` explains its settings"
    ),
    "train.rollouts": (
        "'train.rollouts' is not an override\n  where: override train.rollouts\n  next:  write section.field=value"
    ),
    "train.=1": "'train.=1' is not an override\n  where: override train.=1\n  next:  write section.field=value",
    "train.rollouts.x=1": (
        "train.rollouts is a single value; it holds no x\n  where: override train.rollouts.x=1\n"
        "  next:  it was set at p.yaml:2"
    ),
    "train.layers=[1": (
        "'[1' is not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence\n"
        "  where: override train.layers=[1\n  next:  quote the value"
    ),
    "train.kl={coef: 1, coef: 2}": (
        "train.kl.coef is set twice\n  where: override train.kl={coef: 1, coef: 2}\n"
        "  next:  delete one of the two; the first is at override train.kl={coef: 1, coef: 2}"
    ),
    "tracking.wandb=of": (
        'tracking.wandb is "of" and must be one of auto, online, offline, disabled\n  where: override tracking.wandb=of'
    ),
    "seed=-1": "seed is -1 and must be a whole number of at least 0 and below 4294967296\n  where: override seed=-1",
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDE_REFUSALS.items())
def test_a_mistake_in_an_override_is_named_by_the_override(refuse: Refuse, override: str, expected: str) -> None:
    """The place is what was typed, even where the file sets the same key."""
    assert refuse("train:\n  rollouts: 4\n  kl: {coef: 0.1}", override) == expected


def test_an_override_repairs_what_the_file_has_wrong(load: Load) -> None:
    """What it replaces is no longer looked at."""
    assert train(load("train: {kl: {ceof: 1}}", "train.kl={coef: 2}")).kl.coef == 2


def test_a_file_s_places_are_forgotten_where_an_override_replaced_them(refuse: Refuse) -> None:
    """A section that an override replaced is named by the override, and not by the line it had."""
    expected = "read.file is required\n  where: override read={}\n  next:  it takes text"
    assert refuse("read:\n  file: x", "read={}") == expected


def test_several_mistakes_are_reported_together(refuse: Refuse) -> None:
    """Five at most, each with its place, and how many more there are."""
    text = "seed: x\ntrain:\n  rollouts: 0\n  kl: {ceof: 1}\n  packing: maybe\nreed: {}\nread: {file: 1}"
    lines = refuse(text).splitlines()
    assert lines[0] == "6 settings are wrong"
    assert lines[1] == '  p.yaml:1: seed is "x" and must be a whole number of at least 0 and below 4294967296'
    assert lines[2] == '  p.yaml:5: train.packing is "maybe" and must be true or false'
    assert "  p.yaml:4: train.kl has no setting ceof (did you mean coef? known: coef, target)" in lines
    assert lines[6] == "  and 1 more"
    assert len(lines) == 7


def test_a_missing_file_names_the_pipelines_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest name first; those of the checkout's own folder where none lies beside it, or that it says."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        load_pipeline(tmp_path / "tinny.yaml", [], STAGES)
    assert caught.value.next_step == f"no pipeline file lies in {tmp_path} or configs; name one with --config"
    with pytest.raises(SettingsError) as caught:
        load_pipeline(Path("configs/tiny.yaml"), [], STAGES)
    assert caught.value.next_step == "no pipeline file lies in configs; name one with --config"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("train: {}")
    for name, next_step in (
        ("tiny.yml", "--config configs/tiny.yaml"),
        ("x", "--config with one of configs/tiny.yaml"),
    ):
        with pytest.raises(SettingsError) as caught:
            load_pipeline(Path(name), [], STAGES)
        assert caught.value.next_step == next_step
    for name in ("quickstart.yaml", "tiny.yaml"):
        (tmp_path / name).write_text("train: {}")
    with pytest.raises(SettingsError) as caught:
        load_pipeline(tmp_path / "tinny.yaml", [], STAGES)
    assert caught.value.what == f"there is no pipeline file {tmp_path / 'tinny.yaml'}"
    beside = f"{tmp_path / 'quickstart.yaml'}, {tmp_path / 'tiny.yaml'}"
    assert caught.value.next_step == f"--config {tmp_path / 'tiny.yaml'} (beside it: {beside})"


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    """A folder, and bytes that are no UTF-8."""
    (tmp_path / "latin.yaml").write_bytes(b"train: \xe9")
    for name in ("", "latin.yaml"):
        with pytest.raises(SettingsError, match="cannot be read as text"):
            load_pipeline(tmp_path / name, [], STAGES)


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn"]), max_size=12)
tricky = st.sampled_from(
    ["1e-4", "no", "null", "~", "0o7", "<<", "*a", "&a", "!x", "- a", "a: b", "#", "'", '"', "=", " a ", "1_0"]
)
number = st.floats(0, 1e300)
train_settings = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**70),
        "learning_rate": st.floats(1e-300, 1e300),
        "precision": st.sampled_from(["fp32", "bf16"]),
        "packing": st.booleans(),
        "kl": st.fixed_dictionaries({}, optional={"coef": number, "target": st.none() | st.floats(1e-9, 1e9)}),
        "adapter": st.none() | st.fixed_dictionaries({"rank": st.integers(1, 99)}),
        "layers": st.lists(st.integers(-5, 5), max_size=4),
        "weights": st.dictionaries(text | tricky, number, max_size=3),
        "prefix": text | tricky,
        "steps": st.just("all") | st.integers(-(2**70), 2**70),
        "downloads": st.none() | (tricky | text).map(lambda name: str(Path(name))),
    },
)


@given(settings=train_settings, seed=st.integers(0, 9), wired=st.booleans())
def test_random_settings_survive_yaml_and_back(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any], seed: int, wired: bool
) -> None:
    """What is written is what is read; and a resolved pipeline, written as YAML, loads to the same pipeline."""
    file = tmp_path_factory.mktemp("round", numbered=True) / "p.yaml"
    section = {"uses": "train", **({"inputs": {"data": "rows/x"}} if wired else {}), **settings}
    file.write_text(to_yaml({"seed": seed, "rows": {"uses": "read", "file": "x"}, "a": section}), encoding="utf-8")
    config = load_pipeline(file, [], STAGES)
    # pydantic's own lax reading of the same Python values is the oracle.
    assert config.instances["a"].settings == TrainExample.model_validate({"seed": seed, **settings})
    file.write_text(to_yaml(resolved(config)), encoding="utf-8")
    assert load_pipeline(file, [], STAGES) == config


def test_every_override_equals_the_same_setting_in_the_file(load: Load) -> None:
    """``section.field=value`` is the file with that one line changed."""
    base = load("train: {}")
    for name, value in (("learning_rate", "1e-3"), ("kl", "{target: 6}"), ("layers", "[3]"), ("precision", "bf16")):
        overridden = load("train: {}", f"train.{name}={value}")
        assert overridden == load(f"train: {{{name}: {value}}}")
        assert overridden != base


def test_no_message_speaks_of_the_library_underneath(refuse: Refuse) -> None:
    """pydantic's words and links mean nothing to somebody who wrote YAML."""
    for file_text, _ in REFUSALS.values():
        assert not re.search("pydantic|Input should|Extra inputs|union|nullable", refuse(file_text))
