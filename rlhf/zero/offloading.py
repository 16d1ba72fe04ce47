"""Check before ranks start that weights and optimiser state can be offloaded as the settings say."""

import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from rlhf.config.zero import ZeroSettings
from rlhf.errors import DiskFullError, PreflightError, size

OPTIMISER_BYTES = 16
"""Of a trained weight on disk: the fp32 weight, Adam's two moments and the gradient."""


def check_zero(zero: ZeroSettings, stage: str, trained: int, weights: int) -> None:
    """Refuse settings that DeepSpeed does not take, and a folder for ``nvme`` that does not serve.

    stage    the instance's name
    trained  weights that train, of all models
    weights  bytes of all weights, frozen models' included

    Raises:
        PreflightError: a value is of the wrong type; the folder is missing or cannot be written; or DeepSpeed's
            asynchronous reading and writing cannot be built on this machine.
        DiskFullError: the folder has too little room.
    """
    if zero.sharding:
        _check_types(zero, stage)
    if zero.nvme_path is None:
        return
    setting, folder = f"{stage}.zero.nvme_path", zero.nvme_path
    if not folder.is_dir():
        raise PreflightError(f"the folder to offload to is not there: {folder}", setting, f"mkdir -p {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PreflightError(
            f"the folder to offload to cannot be written: {folder} ({error.strerror})", setting, "name another folder"
        ) from error
    needed = OPTIMISER_BYTES * trained * (zero.offload_optimizer == "nvme")
    needed += weights * (zero.offload_parameters == "nvme")
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DiskFullError(
            f"{stage} offloads {size(needed)}, and {size(free)} are free in {folder}",
            setting,
            "free some space there, name a folder on a larger disk, or offload to cpu",
        )
    _check_async_io(folder, stage)


def _check_types(zero: ZeroSettings, stage: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig.model_validate({"stage": zero.stage} | zero.sharding)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = ".".join(map(str, ("zero_optimization", *detail["loc"])))
        raise PreflightError(
            f"{stage}.zero.config: {name} is {detail['input']!r}: {detail['msg']}",
            f"{stage}.zero.config",
            "correct that field of the file, or take it out",
        ) from error


def _check_async_io(folder: Path, stage: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    # It is compiled when a rank first needs it.
    missing = [program for program in ("c++", "ninja") if shutil.which(program) is None]
    if not missing and not AsyncIOBuilder().is_compatible(verbose=False):
        missing = ["libaio with its headers"]
    if missing:
        raise PreflightError(
            f"offloading to {folder} needs DeepSpeed's async_io, which cannot be compiled: {missing[0]} is not here",
            f"{stage}.zero",
            "install it (libaio-dev, g++, ninja-build), or offload to cpu",
        )
