"""What the program tells people: in a few lines what is wrong, where, and what to do next."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from rlhf.cli.main import COMMANDS, main
from rlhf.cli.run import DEFAULT_CONFIG
from rlhf.store import Store
from tests.cli.conftest import Ask
from tests.pipeline.helpers import REPOSITORY, install_toys, make, planned, start, write_model, write_pipeline
from tests.store.helpers import flip_bit

HEAVY = ("torch", "ray", "aiohttp", "transformers", "datasets", "pyarrow", "scipy", "sklearn")


def refused(ask: Ask, *words: str, status: int = 2) -> str:
    """The message of a request that is refused in a few lines on standard error alone."""
    answer = ask(*words)
    assert answer.status == status
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err
    assert len(answer.err.splitlines()) <= 6
    return answer.err


def test_an_unknown_setting_in_the_file_is_named_by_line_with_the_nearest(ask: Ask, path: Path):
    """file:line, the setting as it was written, and what was probably meant."""
    path.write_text(path.read_text().replace("count: {}", "count:\n  stepp: 2"))
    message = refused(ask, "plan")
    assert f"{path}:4" in message
    assert "count has no setting stepp" in message
    assert "did you mean step?" in message


def test_an_unknown_setting_on_the_command_line_is_named_as_an_override(ask: Ask):
    """A misspelt field and a misspelt section."""
    message = refused(ask, "plan", "total.facter=2")
    assert "override total.facter=2" in message
    assert "did you mean factor?" in message
    assert "did you mean total?" in refused(ask, "plan", "totel.factor=2")


def test_a_value_of_the_wrong_type_is_told_what_it_must_be(ask: Ask):
    """In words, with the value that was given."""
    message = refused(ask, "run", "count.step=many")
    assert 'count.step is "many" and must be a whole number of at least 1' in message


def test_a_missing_pipeline_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Status 2 and the path that was looked at."""
    assert main(["plan", "--config", str(tmp_path / "nowhere.yaml")]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "nowhere.yaml") in err
    assert "Traceback" not in err


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]):
    """And with all commands."""
    assert main(["staus"]) == 2
    err = capsys.readouterr().err
    assert "there is no command 'staus'" in err
    assert "did you mean status?" in err


def test_an_unknown_option_is_refused(ask: Ask):
    """With the command that lists the known ones."""
    message = refused(ask, "plan", "--jsn")
    assert "--jsn" in message
    assert "rlhf plan --help" in message


def test_an_unknown_stage_is_answered_with_the_nearest_and_makes_nothing(ask: Ask, path: Path):
    """Also a run of it: not even a store is made."""
    for command in ("run", "plan", "status"):
        assert "did you mean total?" in refused(ask, command, "totl")
    assert not (path.parent / "store").exists()


def test_debug_shows_the_traceback_beside_the_message(ask: Ask):
    """And nothing else does."""
    answer = ask("plan", "totl", "--debug")
    assert answer.status == 2
    assert answer.err.startswith("Traceback")
    assert "error: the pipeline has no stage 'totl'" in answer.err


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("tests.pipeline.toys:TOTAL", "another stage is named 'total'"),
        ("tests.pipeline.toys:TotalSettings", "no Stage"),
    ],
)
def test_a_package_registers_stages_under_names_of_their_own(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
):
    """In place of a stage of that name, its settings and results would be another's."""
    info = tmp_path / "second" / "second-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[rlhf.stages]\ntotal = {value}\n")
    monkeypatch.syspath_prepend(info.parent)
    message = refused(ask, "plan")
    assert said in message


def test_what_nobody_foresaw_is_an_error_and_no_traceback(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A broken package that registers a stage, say, is told in three lines, with the command that shows more."""
    info = tmp_path / "broken" / "broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[rlhf.stages]\nbroken = nowhere_at_all:STAGE\n")
    monkeypatch.syspath_prepend(info.parent)
    message = refused(ask, "plan", status=1)
    assert "unforeseen ModuleNotFoundError: No module named 'nowhere_at_all'" in message
    assert "next:  rlhf plan" in message
    assert "--debug" in message
    assert ask("plan", "--json").document["error"]["what"].startswith("unforeseen")


def test_generate_needs_a_policy_that_has_a_result(ask: Ask, path: Path):
    """A stage of another kind answers nothing; a policy that was not made yet is made by the named command."""
    assert "words makes a data" in refused(ask, "generate", "words", "--prompt", "hi")
    message = refused(ask, "generate", "total", "--prompt", "hi")
    assert "total has no result yet" in message
    assert f"rlhf run total --config {path}" in message
    assert "exactly one STAGE" in refused(ask, "generate")


@pytest.mark.parametrize("option", [("--temperature", "nan"), ("--temperature", "-1"), ("--max-new-tokens", "0")])
def test_generate_takes_no_number_that_means_nothing(ask: Ask, made: Path, option: tuple[str, str]):
    """Before a model is loaded."""
    assert f"{option[0]} is" in refused(ask, "generate", "total", "--prompt", "hi", *option)


def test_generate_without_a_prompt_says_where_it_looked(ask: Ask, made: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither an option nor a line of standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no prompt" in refused(ask, "generate", "total")


def test_an_export_says_where_it_wrote_and_refuses_a_full_folder(ask: Ask, made: Path, tmp_path: Path):
    """What lies there is not mixed with a result."""
    answer = ask("export", "total", str(tmp_path / "out"))
    assert answer.status == 0
    assert str(tmp_path / "out") in answer.out.replace("\n", "")
    assert (tmp_path / "out" / "config.json").read_text() == "2.0"
    assert "is not empty" in refused(ask, "export", "total", str(tmp_path / "out"))
    again = refused(ask, "export", "total", str(tmp_path / "other"), "total.factor=3")
    assert f"rlhf run total total.factor=3 --config {made}" in again
    assert "a stage and a folder" in refused(ask, "export", "total")


def test_an_import_pins_a_stage_until_it_is_forgotten(ask: Ask, made: Path, tmp_path: Path):
    """The program says how to undo it."""
    write_model(tmp_path / "model")
    answer = ask("import", str(tmp_path / "model"), "--as", "total")
    assert "rlhf import --forget --as total" in answer.out
    assert planned(made, "total.factor=9.0")["total"].why == "imported"
    assert ask("explain", "total", "--json").document["changes"] == []
    assert ask("import", "--forget", "--as", "total").status == 0
    assert planned(made)["total"].why == "unchanged"
    assert "it makes a data" in refused(ask, "import", str(tmp_path / "model"), "--as", "words")


def test_a_run_leaves_out_what_only_imported_stages_read(ask: Ask, path: Path, tmp_path: Path):
    """In an empty store, with the last stage imported, nothing runs and no source is read; plan and run say why."""
    write_model(tmp_path / "model")
    gone = f"words.file={tmp_path / 'gone'}"
    assert ask("import", str(tmp_path / "model"), "--as", "total", gone).status == 0
    for command in ("plan", "run"):
        answer = ask(command, gone)
        assert answer.status == 0
        for stage in ("words", "count"):
            (line,) = [line for line in answer.out.splitlines() if line.startswith(stage)]
            assert line.split(maxsplit=2)[1:] == ["unused", "not needed: total is imported"]
        assert "metrics, logs" not in answer.out, "nothing has any here"
    for words in (("status",), ("lineage",), ("lineage", "total"), ("explain", "total"), ("diff", "total", "total")):
        assert ask(*words, gone).status == 0
    assert "gone" in refused(ask, "run", "count", gone)


@pytest.mark.parametrize("virtual_tokens", [False, True])
def test_the_export_that_a_run_proposes_works(ask: Ask, tmp_path: Path, virtual_tokens: bool):
    """Virtual tokens are written beside their base alone."""
    folder = write_model(tmp_path / "model")
    if virtual_tokens:
        shutil.copytree(folder, folder / "base")
        entries = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
        (folder / "adapter_config.json").write_text(json.dumps(entries))
    assert ask("import", str(folder), "--as", "total").status == 0
    proposed = shlex.split(ask("run").out.splitlines()[-1].replace("DIR", str(tmp_path / "out")))
    assert proposed[:2] == ["rlhf", "export"]
    assert ask(*proposed[1:]).status == 0
    assert (tmp_path / "out" / "base").exists() == virtual_tokens


def test_an_import_that_is_damaged_is_never_replaced_by_training(ask: Ask, made: Path, tmp_path: Path):
    """Neither at once nor later, when its record is gone: the program says so until it is imported again or undone."""
    write_model(tmp_path / "model")
    again = ("import", str(tmp_path / "model"), "--as", "total")
    assert ask(*again).status == 0
    record = planned(made)["total"].record
    assert record is not None
    flip_bit(made.parent / "store" / "manifests" / f"{record.artifact}.json")
    for _ in range(2):
        assert "the imported model is damaged or gone" in ask("plan").out
        answer = ask("run")
        assert answer.status == 1
        assert "rlhf import --forget --as total" in answer.err.replace("\n", " ")
    assert ask(*again).status == 0
    assert planned(made)["total"].why == "imported"
    flip_bit(made.parent / "store" / "actions" / f"{record.key}.json")
    assert planned(made)["total"].state == "blocked"
    assert ask("import", "--forget", "--as", "total").status == 0
    assert planned(made)["total"].why == "unchanged"


def test_a_file_of_the_store_changed_by_hand_is_named_and_its_stage_is_missing(ask: Ask, made: Path):
    """On standard error, once; the plan then says why the stage would run."""
    store = Store.open(made.parent / "store")
    record = planned(made)["count"].record
    assert record is not None
    sha256 = store.manifest(record.artifact).files[0].sha256
    blob = made.parent / "store" / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_text("33")
    answer = ask("plan")
    assert answer.status == 0
    assert len(answer.err.splitlines()) == 1
    assert f"blobs/sha256/{sha256[:2]}/{sha256}" in answer.err
    assert "quarantine" in answer.err
    assert "its result was damaged" in answer.out
    assert ask("plan").err == ""


@pytest.mark.parametrize("command", ["run", "import"])
def test_a_store_that_cannot_be_written_is_named_before_anything_is_started(ask: Ask, tmp_path: Path, command: str):
    """Where its place can be no folder the address is wrong; any other reason may pass."""
    (tmp_path / "file").write_text("")
    (tmp_path / "model").mkdir()
    words = (str(tmp_path / "model"), "--as", "total") if command == "import" else ()
    for store, status in ((tmp_path / "file" / "store", 2), (Path("/proc/store"), 75)):
        assert str(store) in refused(ask, command, *words, f"store.uri={store}", status=status)


@pytest.fixture
def public_folder() -> Generator[Path, None, None]:
    """A folder that another user can read, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
    shutil.rmtree(folder)


def test_a_read_only_store_can_be_looked_at(public_folder: Path):
    """Plan, status, lineage and export write nothing there; a run is refused with status 75 and the store's place."""
    path = write_pipeline(public_folder)
    make(path)
    site = install_toys(public_folder / "site")
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(public_folder / "store")], check=True)
    (public_folder / "mine").mkdir(mode=0o777)
    (public_folder / "mine").chmod(0o777)
    # All that will be needed is imported first: another user may not be able to read this installation.
    code = f"""
import json, os
from rlhf.cli.main import main
import encodings.ascii, rich.tree, rlhf.cluster.session, rlhf.pipeline.runner, rlhf.pipeline.transfer, rlhf.report.card
def ask(*words):
    return main([*words, "--config", {str(path)!r}])
ask("lineage")
if os.getuid() == 0:
    os.setuid(65534)
told = [ask("plan"), ask("status"), ask("lineage"), ask("export", "total", {str(public_folder / "mine" / "out")!r})]
print(json.dumps([*told, ask("run")]))
"""
    answer = run_python(code, site)
    assert json.loads(answer.stdout.splitlines()[-1]) == [0, 0, 0, 0, 75], answer.stderr
    assert str(public_folder / "store") in answer.stderr
    assert "Traceback" not in answer.stderr


def run_python(code: str, site: Path | None = None) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(REPOSITORY), *([str(site)] if site else [])])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["plan"], ["plan", "--json"], ["status"], ["config"], ["explain", "ppo"]]
)
def test_looking_imports_nothing_heavy(words: list[str], tmp_path: Path):
    """The default pipeline, in a fresh process: neither torch nor Ray is needed to say what would run."""
    override = [] if words == ["--help"] else [f"store.uri={tmp_path / 'store'}"]
    code = (
        f"import json, sys\nfrom rlhf.cli.main import main\nstatus = main({[*words, *override]!r})\n"
        f"print(json.dumps([status, sorted(set({HEAVY!r}) & set(sys.modules))]))"
    )
    assert json.loads(run_python(code).stdout.splitlines()[-1]) == [0, []]


def test_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]):
    """And each command explains itself."""
    assert main([]) == 0
    out = capsys.readouterr().out
    for command, function in COMMANDS.items():
        assert f"  {command:<10}" in out
        assert (function.__doc__ or "").splitlines()[0] in out
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert ("--config" in capsys.readouterr().out) == (command != "demo")  # which has a pipeline of its own
    assert Path("rlhf.yaml") == DEFAULT_CONFIG


@pytest.mark.parametrize("words", [["--help"], ["config"], ["config", "--fields"]])
def test_a_reader_that_has_enough_is_no_error(words: list[str], path: Path, tmp_path: Path):
    """`rlhf config | head -1` ends without a complaint, whichever way a command prints."""
    process = start(install_toys(tmp_path / "site"), *words, "--config", path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert err == ""


def test_fields_of_a_section_that_is_not_there_are_refused(ask: Ask):
    """With the nearest; a section that is there comes alone."""
    assert "no section is named 'totla'" in refused(ask, "config", "--fields", "totla")
    assert {line.partition(".")[0] for line in ask("config", "--fields", "store").out.splitlines()[::2]} == {"store"}


def test_settings_of_one_name_say_whose_they_are(ask: Ask):
    """Every method of tuning has a line of its own under the choice, and its settings name it."""
    lines = ask("config", "--fields", "sft").out.splitlines()
    assert "    full: Every weight trains." in lines
    for method, text in (("top", "top, that train."), ("bottom-frozen", "bottom, that are frozen.")):
        row = lines.index(f"sft.tuning.blocks with method {method}: a whole number of at least 1; default 2; semantic")
        assert lines[row + 1] == f"    Number of blocks, counted from the {text}"


def test_settings_that_are_printed_load_to_the_same_keys(ask: Ask, path: Path, tmp_path: Path):
    """`rlhf config > file` keeps everything that defines a result."""
    answer = ask("config", "count.step=2", "words.style.upper=true")
    (tmp_path / "printed.yaml").write_text(answer.out)
    assert planned(tmp_path / "printed.yaml")["words"].key == planned(path, "words.style.upper=true")["words"].key
    assert "step: 2" in answer.out
    fields = ask("config", "count", "--fields").out
    assert "count.step: a whole number of at least 1; default 1; semantic" in fields
    assert "What a word counts." in fields
    assert "words.left" not in fields


def test_settings_under_a_former_name_are_noted_on_standard_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A line for each stage, once; the document on standard output is whole."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("model: {base: scratch}\ndata: {}\nsft: {lora: {rank: 4}}\n", encoding="utf-8")
    assert main(["plan", "--json", "--config", "p.yaml"]) == 0
    said = capsys.readouterr()
    assert [stage["stage"] for stage in json.loads(said.out)["stages"]] == ["data", "model", "sft"]
    assert said.err.splitlines() == [
        "sft.lora is now called sft.tuning, and the next release refuses the old name; "
        "write tuning: {method: lora, rank: 4} (p.yaml:3)"
    ]


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_a_store_that_is_not_there_is_not_called_sound(ask: Ask, tmp_path: Path, command: str):
    """Its address is most likely mistyped, and nothing is made there."""
    said = refused(ask, command, f"store.uri={tmp_path / 'typo'}", status=2)
    assert "there is no store here" in said
    assert not (tmp_path / "typo").exists()
