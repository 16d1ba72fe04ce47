"""A pipeline file from anywhere: it runs nothing, exhausts nothing, and keeps no secret."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.config.pipeline import kind_of_secret, load_pipeline
from rlhf.errors import SettingsError
from rlhf.pipeline.stage import stages

TYPES = {name: stage.settings for name, stage in stages().items()}


def refusal(tmp_path: Path, text: str, overrides: Sequence[str] = ()) -> str:
    path = tmp_path / "evil.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_pipeline(path, overrides, TYPES)
    return str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch {mark}]",
        "!!python/object/new:pathlib.Path [{mark}]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1]",
        "!!binary aGVsbG8=",
        "!custom x",
    ],
)
def test_no_tag_makes_anything_but_plain_values(tmp_path: Path, tag: str):
    """Neither in a file nor in an override, in the place of a value or of a whole section."""
    mark = tmp_path / "ran"
    written = tag.format(mark=mark)
    for text, overrides in (
        (f"seed: {written}\n", []),
        (f"store: {{uri: {written}}}\n", []),
        (f"{written}\n", []),
        ("model: {}\n", [f"seed={written}"]),
        (f"? {written}\n: 1\n", []),
    ):
        refusal(tmp_path, text, overrides)
    assert not mark.exists()


def test_aliases_to_aliases_cannot_fill_the_memory(tmp_path: Path):
    """Nine lines that stand for a thousand million values are refused while they are still nine lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "aliases" in refusal(tmp_path, "\n".join(lines))
    merges = ["a0: &a0 {x: 1}"]
    merges += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    refusal(tmp_path, "\n".join(merges))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2\n",
        "store: {uri: a, uri: b}\n",
        "a: &a [*a]\n",
        f"seed: {'9' * 5000}\n",
        f"seed: 0x{'f' * 5000}\n",
        f"sft: {{epochs: 1e{'9' * 400}}}\n",
        f"sft: {'[' * 2000}{']' * 2000}\n",
        f"sft: {'{a: ' * 2000}1{'}' * 2000}\n",
        "--- 1\n--- 2\n",
        "\x00",
    ],
    ids=[
        "key twice",
        "nested key twice",
        "holds itself",
        "huge number",
        "huge hexadecimal",
        "huge exponent",
        "deep list",
        "deep section",
        "two documents",
        "no text",
    ],
)
def test_a_file_that_could_confuse_or_exhaust_is_a_plain_error(tmp_path: Path, text: str):
    """One of our errors, in a moment, whatever is in the file; the same of an override."""
    refusal(tmp_path, text)
    section, _, value = text.strip().partition(": ")
    if "\n" not in text.strip():
        refusal(tmp_path, "model: {}\nsft: {}\n", [f"{section}={value}"])


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "a\nb", "/etc", ""])
def test_names_that_are_parts_of_paths_cannot_leave_the_store(tmp_path: Path, name: str):
    """Of the pipeline, and of a stage's instance."""
    quoted = name.replace("\n", "\\n")
    refusal(tmp_path, f'pipeline: "{quoted}"\nmodel: {{}}\n')
    refusal(tmp_path, f'"{quoted}": {{uses: model}}\n')


SECRETS = {
    "hf_" + "aB3" * 12: "a Hugging Face token",
    "wandb_v1_" + "x9Y" * 12: "a Weights & Biases key",
    "local-" + "0a" * 20: "a Weights & Biases key",
    "AKIA" + "Q7" * 8: "an access key of Amazon's",
    "sk-proj-" + "Ab1_" * 10: "a key of an API",
    "ghp_" + "z8" * 18: "a GitHub token",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlaXRpcw": "a signed token",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    "https://someone:hunter22@example.com/x": "an address with a password",
    "https://example.com/score?api_key=hunter22": "an address with a key in its query",
    "s3://bucket/x?X-Amz-Signature=hunter22": "an address with a key in its query",
}


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items())
def test_a_secret_in_a_setting_is_refused_without_being_repeated(tmp_path: Path, secret: str, kind: str):
    """As a value at any depth, as a name, and in an override, also where that one could not be applied."""
    for text, overrides in (
        (f'tracking: {{entity: "{secret}"}}\n', []),
        (f'ppo: {{rewards: [{{endpoint: {{url: "{secret}"}}}}]}}\n', []),
        (f'tracking: {{"{secret}": 1}}\n', []),
        (f'"{secret}": {{}}\n', []),
        ("model: {}\n", [f"tracking.entity={secret}"]),
        ("model: {}\n", [f"wandb.key={secret}"]),
        ("model: {}\n", [f"tracking.no_such={secret}"]),
    ):
        message = refusal(tmp_path, text, overrides)
        assert kind in message
        assert secret not in message
        assert "hunter22" not in message
        assert "environment variable" in message


@pytest.mark.parametrize(
    "plain",
    [
        "a" * 40,
        "0123456789abcdef" * 4,
        "HuggingFaceTB/SmolLM2-135M",
        "hf_dataset",
        "sk-learn",
        "https://example.com:8443/score?model=3&max_tokens=5",
        "https://example.com/a:b@c",
        "eyJ",
        "data/token_counts.jsonl",
        "s3://bucket/prefix",
        "movie-snippets",
        "head-node:6379",
    ],
)
def test_what_could_be_anything_is_no_secret(plain: str):
    """Commits, digests, names and addresses are not mistaken for one."""
    assert kind_of_secret(plain) is None


def test_a_token_in_the_place_of_a_variables_name_is_not_repeated(tmp_path: Path):
    """The setting wants the name: whoever writes the token itself reads what is wrong, and the token nowhere."""
    text = 'ppo: {rewards: [{endpoint: {url: "https://localhost/", token_variable: hunter22}}]}\n'
    message = refusal(tmp_path, text)
    assert "not the token itself" in message
    assert "hunter22" not in message
