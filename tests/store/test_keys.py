import json
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import RequestError
from rlhf.store import canonical_json, digest_file, digest_of, key_of
from tests.store.helpers import REPOSITORY

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12)
SETTINGS = st.dictionaries(TEXT, VALUES, max_size=6)


def slow_canonical(value: Any) -> str:
    """An independent, obvious writer of the same text."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{slow_canonical(k)}:{slow_canonical(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(slow_canonical(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def reordered(value: Any) -> Any:
    """The same value, with every object's keys put in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(VALUES)
def test_canonical_json_reads_back_as_the_same_value_and_has_one_spelling(value: Any):
    """The text loses nothing, and an obvious writer gives the same one."""
    text = canonical_json(value)
    assert json.loads(text) == value
    assert text.decode() == slow_canonical(value)


@given(SETTINGS)
def test_order_of_settings_changes_no_key(settings: dict[str, Any]):
    """Settings are a mapping: the order in a YAML file says nothing."""
    assert key_of("sft", 1, settings, {}) == key_of("sft", 1, reordered(settings), {})


@given(SETTINGS, TEXT, VALUES)
def test_any_changed_added_or_removed_setting_changes_the_key(settings: dict[str, Any], name: str, value: Any):
    """Two settings have one key only if they are one value; 1, 1.0 and true are three."""
    other = {**settings, name: value}
    same = slow_canonical(settings) == slow_canonical(other)
    assert (key_of("sft", 1, settings, {}) == key_of("sft", 1, other, {})) == same


def test_stage_version_role_and_input_each_change_the_key():
    """Everything that defines a result is in its key, and nothing slides from one place into another."""
    digests = [digest_of(n) for n in range(2)]
    keys = [
        key_of("sft", 1, {}, {"data": digests[0]}),
        key_of("rm", 1, {}, {"data": digests[0]}),
        key_of("sft", 2, {}, {"data": digests[0]}),
        key_of("sft", 1, {"data": digests[0]}, {}),
        key_of("sft", 1, {}, {"prompts": digests[0]}),
        key_of("sft", 1, {}, {"data": digests[1]}),
        key_of("sft", 1, {}, {}),
    ]
    assert len(set(keys)) == len(keys)


def test_a_key_never_changes_from_one_release_to_the_next():
    """People's caches outlive the program; this text and its SHA-256 (by sha256sum) are the contract."""
    text = b'{"inputs":{"data":"00"},"settings":{"kl":0.1,"name":"\xc3\xa9"},"stage":"ppo","version":3}'
    values = {"version": 3, "stage": "ppo", "settings": {"name": "é", "kl": 0.1}, "inputs": {"data": "00"}}
    assert canonical_json(values) == text
    assert (
        key_of("ppo", 3, {"name": "é", "kl": 0.1}, {"data": "00"})
        == "a188f2409f5c6a458075322f4bcc454b6bd93da1dbe06d6e39787d918d98727b"
    )


class Colour(Enum):
    RED = 1


SELF: list[Any] = []
SELF.append(SELF)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"lr": float("nan")}, "value.lr"),
        ({"a": [0, float("inf")]}, "value.a[1]"),
        ({"a": {1: 2}}, "value.a"),
        ({"a": {None: 2}}, "value.a"),
        ({"path": Path("x")}, "value.path"),
        ({"names": {"a", "b"}}, "value.names"),
        ({"data": b"bytes"}, "value.data"),
        ({"colour": Colour.RED}, "value.colour"),
        ({"text": "\ud800"}, "value.text"),
        ({"\udfff": 1}, "value: key '\\udfff'"),
        ({"big": 10**5000}, "value"),
        (SELF, "value"),
    ],
)
def test_what_has_no_stable_form_is_refused_by_name(value: Any, place: str):
    """A value that another process would write differently must never enter a key."""
    with pytest.raises(RequestError) as caught:
        canonical_json(value)
    assert caught.value.where == place


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_a_files_digest_is_the_one_that_sha256sum_prints(tmp_path: Path, size: int):
    """Anybody can check a blob with the tools at hand."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    printed = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout
    assert digest_file(path) == printed.split()[0]


def test_the_store_needs_nothing_but_the_standard_library():
    """Planning must stay quick: opening a store imports no third-party package."""
    program = (
        "import sys; before = set(sys.modules); import rlhf.store; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'rlhf'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
