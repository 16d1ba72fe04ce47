import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import SftSettings
from rlhf.config.zero import ZeroSettings
from rlhf.errors import DiskFullError, PreflightError
from rlhf.models.layout import count_parameters
from rlhf.stages import checks
from rlhf.zero import offloading
from rlhf.zero.offloading import check_zero
from tests.models.tiny import make_tiny_llama


def nvme(folder: Path, **more: Any) -> ZeroSettings:
    return ZeroSettings.model_validate({"offload_optimizer": "nvme", "nvme_path": folder} | more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_a_folder_that_does_not_serve_is_refused(tmp_path: Path) -> None:
    """One that is not there, a file, one that cannot be written; each with the setting that names it."""
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        with pytest.raises(PreflightError, match="the folder to offload to is not there") as error:
            check_zero(nvme(tmp_path / name), "ppo", 1, 1)
        assert error.value.where == "ppo.zero.nvme_path"
    refused = patch.object(offloading.tempfile, "TemporaryFile", side_effect=PermissionError(13, "Permission denied"))
    with refused, pytest.raises(PreflightError, match=r"cannot be written: .* \(Permission denied\)"):
        check_zero(nvme(tmp_path), "ppo", 1, 1)


@pytest.mark.parametrize(
    ("parts", "needed"),
    [({}, 16_000_000), ({"offload_parameters": "nvme"}, 20_000_000), ({"offload_parameters": "cpu"}, 16_000_000)],
)
def test_a_folder_without_room_is_refused_with_the_bytes_needed(
    tmp_path: Path, parts: dict[str, Any], needed: int
) -> None:
    """16 bytes of each weight that trains, and the weights themselves where they are offloaded."""
    usage = shutil.disk_usage(tmp_path)
    with (
        patch.object(shutil, "disk_usage", return_value=usage._replace(free=needed - 1)),
        pytest.raises(DiskFullError, match=rf"ppo offloads {needed // 10**6}\.0 MB, and {(needed - 1) / 1e6:.1f} MB"),
    ):
        check_zero(nvme(tmp_path, **parts), "ppo", 1_000_000, 4_000_000)
    with (
        patch.object(shutil, "disk_usage", return_value=usage._replace(free=needed)),
        patch.object(offloading, "_check_async_io"),
    ):
        check_zero(nvme(tmp_path, **parts), "ppo", 1_000_000, 4_000_000)


def test_a_machine_that_cannot_compile_async_io_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    """Before ranks start, which would compile it."""
    with (
        patch.object(shutil, "which", return_value=None),
        pytest.raises(PreflightError, match=r"needs DeepSpeed's async_io, which cannot be compiled: c\+\+ is not here"),
    ):
        check_zero(nvme(tmp_path), "ppo", 1, 1)


def test_a_value_of_the_wrong_type_in_the_file_is_named(tmp_path: Path) -> None:
    """DeepSpeed itself would stop every rank with a page of text."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}')
    zero = ZeroSettings.model_validate({"config": str(tmp_path / "ds.json")})
    with pytest.raises(PreflightError, match=r"ppo.zero.config: zero_optimization.reduce_bucket_size is 'many'"):
        check_zero(zero, "ppo", 1, 1)


def test_the_stages_checks_count_the_weights_that_are_offloaded(tiny: Path, tmp_path: Path) -> None:
    """All that train in fp32: of sft its model, of ppo policy and value model, and of ppo the frozen reference too."""
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "heldout"):
        (data / f"{part}.jsonl").write_text(json.dumps({"prompt": "a film", "completion": "of two halves"}) + "\n")
    function = tmp_path / "reward.py"
    function.write_text("def reward(prompts, responses):\n    return [0.0 for _ in responses]\n")
    zero = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": str(tmp_path)}
    rewards = [{"function": f"{function}:reward"}]
    weights = count_parameters(tiny)
    values: dict[str, Any] = {"value_init": "policy", "max_prompt_length": 32, "sampling": {"max_new_tokens": 8}}
    ppo = PpoSettings.model_validate(values | {"zero": zero, "rewards": rewards})
    sft = SftSettings.model_validate({"zero": zero, "max_length": 32})
    cases: list[tuple[Any, Any, str, int, int]] = [
        (checks.sft, sft, "base", weights, weights),
        (checks.ppo, ppo, "policy", 2 * weights, 3 * weights),
    ]
    for check, settings, role, trained, all_weights in cases:
        inputs = {role: tiny, "prompts": data, "demonstrations": data}
        with patch.object(offloading, "check_zero") as check_zero:
            check(Context("s", "0" * 64, settings, inputs, tmp_path, tmp_path, tmp_path))
        check_zero.assert_called_once_with(settings.zero, "s", trained, 4 * all_weights)
