import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from ray.exceptions import ActorDiedError, RayActorError

from rlhf import errors
from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder, Failure
from rlhf.attempt.liveness import beat, beating
from rlhf.cluster.causes import Retries, cause_of
from rlhf.cluster.worker import Call, load, perform
from rlhf.errors import (
    DiskFullError,
    DivergedError,
    HangError,
    KilledError,
    PreemptedError,
    PreflightError,
    RlhfError,
    StageError,
)
from tests.pipeline.helpers import REPOSITORY
from tests.pipeline.toys import TotalSettings


def loud(context: Context[Any]) -> dict[str, float]:
    print("from python", flush=True)
    os.write(1, b"from below\n")
    subprocess.run([sys.executable, "-c", "import sys; print('from a child', file=sys.stderr)"], check=True)
    return {"value": 1}


def reading(context: Context[Any]) -> dict[str, float]:
    return {"value": float(Path("here.txt").read_text())}


def crowded(context: Context[Any]) -> dict[str, float]:
    raise torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` …\n")


def full(context: Context[Any]) -> dict[str, float]:
    raise OSError(errno.ENOSPC, "No space left on device", str(context.attempt / "model.safetensors"))


def greedy(context: Context[Any]) -> dict[str, float]:
    raise MemoryError


def diverged(context: Context[Any]) -> dict[str, float]:
    raise DivergedError("the loss is nan")


def preempted(context: Context[Any]) -> dict[str, float]:
    from ray import _raylet

    raise_exit: Callable[..., Never] = vars(_raylet)["raise_sys_exit_with_custom_error_message"]
    raise_exit("The process receives a SIGTERM.", exit_code=1)


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    folder = tmp_path / "attempt"
    (folder / "output").mkdir(parents=True)
    return folder


def call(attempt: Path, function: str) -> Call:
    context = Context("total", "key", TotalSettings(), {}, attempt / "output", attempt, attempt / "cache")
    return Call(f"tests.cluster.test_worker:{function}", context)


def failed(attempt: Path, *failures: tuple[int, float, str, tuple[str, ...]]) -> RlhfError:
    """What the driver makes of failures (rank, time, class, arguments)."""
    folder = AttemptFolder(attempt)
    for rank, at, error, args in failures:
        folder.rank(rank).failure.write(Failure(at, rank, "node", 7, error, args, f"log-{rank}"))
    return cause_of(call(attempt, "loud"), [(1, DiedError("first\n  the actor died\n"))], folder.failures())


class DiedError(RayActorError):
    """Ray's account of a death, with its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        return self.text


def test_whatever_a_stage_prints_is_in_its_log_and_nowhere_else(attempt: Path):
    """Also what libraries below Python and child processes print; afterwards printing is as before."""
    # In a process of its own: pytest's capture gives this one a standard output that is no file descriptor.
    code = f"""from pathlib import Path
from tests.cluster.test_worker import call, perform
print("before")
perform(call(Path({str(attempt)!r}), "loud"))
print("after")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert (answer.stdout, answer.stderr) == ("before\nafter\n", "")
    assert (attempt / "log-0.txt").read_text() == "from python\nfrom below\nfrom a child\n"
    assert AttemptFolder(attempt).result.read() == {"value": 1.0}


def test_a_failure_is_kept_for_the_driver_with_its_place(attempt: Path):
    """Class and arguments as they were raised, and where: the driver needs no pickle of the error."""
    with pytest.raises(DivergedError):
        perform(call(attempt, "diverged"))
    (failure,) = AttemptFolder(attempt).failures()
    assert (failure.error, failure.args, failure.rank) == ("DivergedError", ("the loss is nan", "", ""), 0)
    assert failure.pid == os.getpid()
    error = cause_of(call(attempt, "diverged"), [(None, RuntimeError())], AttemptFolder(attempt).failures())
    assert type(error) is DivergedError
    assert str(attempt / "log-0.txt") in error.where
    assert not (attempt / "result.json").exists()


def test_a_rank_that_is_told_to_end_says_so(attempt: Path):
    """Ray makes an exception of SIGTERM, which passes through the stage's code."""
    with pytest.raises(SystemExit):
        perform(call(attempt, "preempted"))
    error = cause_of(call(attempt, "preempted"), [(None, RuntimeError())], AttemptFolder(attempt).failures())
    assert type(error) is PreemptedError
    assert error.what == "rank 0 of total was told to end (SIGTERM)"
    assert error.next_step == "rlhf run"


def test_a_full_disk_is_a_reason_to_try_again(attempt: Path):
    """Status 75, and the file that could not be written."""
    with pytest.raises(OSError, match="No space left"):
        perform(call(attempt, "full"))
    error = cause_of(call(attempt, "full"), [(None, RuntimeError())], AttemptFolder(attempt).failures())
    assert type(error) is DiskFullError
    assert error.exit_status == 75
    assert "model.safetensors" in error.where


def test_a_disk_too_full_to_tell_of_it_is_a_reason_to_try_again_too(attempt: Path):
    """No failure could be written: Ray alone brings the cause."""
    told = RuntimeError("the task failed")
    told.__dict__["cause"] = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    error = cause_of(call(attempt, "loud"), [(None, told)], AttemptFolder(attempt).failures())
    assert type(error) is DiskFullError
    assert error.where == "metrics.jsonl"


def test_a_worker_without_the_attempts_folder_names_the_store(tmp_path: Path):
    """It makes no folder of its own, which the driver would never see."""
    gone = tmp_path / "gone"
    with pytest.raises(PreflightError, match="does not see the store") as caught:
        perform(call(gone, "loud"))
    assert "store.uri" in caught.value.next_step
    assert not gone.exists()


def test_of_several_ranks_failures_the_informative_one_is_told(attempt: Path):
    """A rank that fails takes its peers down in their next collective, and theirs may be written first."""
    error = failed(
        attempt,
        (1, 1.0, "RuntimeError", ("connection closed by peer",)),
        (0, 2.0, "DivergedError", ("the loss is nan", "step 7", "lower the learning rate")),
    )
    assert type(error) is DivergedError
    assert error.args == ("the loss is nan", "step 7", "lower the learning rate")


def test_of_failures_that_are_not_ours_the_earliest_is_told(attempt: Path):
    """With its rank, host, process and log."""
    error = failed(attempt, (0, 2.0, "RuntimeError", ("peer",)), (1, 1.0, "ValueError", ("bad\nshape " + "x" * 999,)))
    assert type(error) is StageError
    assert error.what.startswith("total failed: ValueError: bad shape xxx")
    assert len(error.what) < 400
    assert error.where == "rank 1 on node (pid 7); log: log-1"
    assert error.next_step == "less +G log-1"


def test_without_any_account_the_worker_died(attempt: Path):
    """What Ray says is told in one line."""
    error = failed(attempt)
    assert type(error) is KilledError
    assert "died without a word" in error.what
    assert error.where.startswith("the actor died; logs: ")
    assert "\n" not in error.where


@pytest.mark.parametrize(
    "kind", [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RlhfError)]
)
def test_every_error_of_ours_comes_back_from_a_worker_as_itself(attempt: Path, kind: type[RlhfError]):
    """Class, status and words survive the way through the attempt's folder."""
    error = failed(attempt, (0, 1.0, kind.__name__, ("what", "where", "next")))
    assert type(error) is kind
    assert error.args == ("what", "where", "next")


@pytest.mark.parametrize(
    ("kind", "retries"),
    [
        (errors.SettingsError, 0),
        (errors.DivergedError, 0),
        (errors.StoreUnreachableError, 0),
        (errors.InterruptedRunError, 0),
        (errors.OutOfMemoryError, 1),
        (errors.KilledError, 3),
        (errors.PreemptedError, 3),
        (errors.HangError, 3),
    ],
)
def test_each_cause_has_its_number_of_retries(kind: type[RlhfError], retries: int):
    """What would go wrong again is not tried again, and nothing more often than the settings say."""
    allowed = Retries(max_failures=3)
    assert [allowed.allow(kind("it failed"), reached=2) for _ in range(5)] == [one < retries for one in range(5)]


def test_failures_of_several_kinds_are_counted_together():
    """A group that always finds another way to die ends too."""
    retries = Retries(max_failures=2)
    kinds = (HangError, KilledError, PreemptedError)
    assert [retries.allow(kind("it failed"), reached=-1) for kind in kinds] == [True, True, False]


def test_a_group_that_gets_on_between_its_failures_is_started_again_for_as_long_as_it_does():
    """A run of weeks on machines that come and go; out of memory a second time is no such thing."""
    retries = Retries(max_failures=1)
    assert all(retries.allow(PreemptedError("gone"), reached=step) for step in range(0, 100, 10))
    assert retries.count == 1
    assert not retries.allow(PreemptedError("gone"), reached=90)
    assert retries.allow(errors.OutOfMemoryError("too large"), reached=100)
    assert not retries.allow(errors.OutOfMemoryError("too large"), reached=110)


@pytest.mark.parametrize(
    ("line", "signal"),
    [
        ("*** SIGSEGV received at time=1 on cpu 0 ***", "SIGSEGV"),
        ("Fatal Python error: Aborted", "SIGABRT"),
        ("an ordinary line", "SIGKILL"),
    ],
)
def test_a_killed_rank_is_told_with_its_signal_step_and_log(attempt: Path, line: str, signal: str):
    """A crash leaves its signal in the log; what leaves nothing was killed."""
    log = attempt / "log-1.txt"
    log.write_text(f"training\n{line}\n")
    with beating(attempt, 1, "", log, 60):
        beat(7)
        error = cause_of(call(attempt, "loud"), [(1, ActorDiedError())], AttemptFolder(attempt).failures())
    assert type(error) is KilledError
    assert signal in error.what
    assert error.what.startswith("rank 1 of total ")
    assert f"(pid {os.getpid()}), last step 7; log: {log}" in error.where


def test_a_rank_that_found_no_memory_says_what_to_lower(attempt: Path):
    """torch's errors are not ours, but one of them has a name that is."""
    with pytest.raises(MemoryError):
        perform(call(attempt, "greedy"))
    error = cause_of(call(attempt, "greedy"), [(None, RuntimeError())], AttemptFolder(attempt).failures())
    assert type(error) is errors.OutOfMemoryError
    assert error.what == "total ran out of memory: MemoryError"
    assert error.next_step == "give total a node with more memory"


def test_what_goes_wrong_before_a_rank_runs_our_code_is_told_as_it_came(attempt: Path):
    """Nobody was killed."""
    error = cause_of(call(attempt, "loud"), [(3, ValueError("no such\ndevice"))], AttemptFolder(attempt).failures())
    assert type(error) is StageError
    assert error.what == "total failed before it began: ValueError: no such device"
    assert error.where == f"rank 3; logs: {attempt}/log-*.txt"


def test_a_device_too_full_to_begin_is_out_of_memory(attempt: Path):
    """torch's class for that is no OutOfMemoryError of its own, and its advice is for who writes kernels."""
    with pytest.raises(torch.AcceleratorError):
        perform(call(attempt, "crowded"))
    error = cause_of(call(attempt, "crowded"), [(None, RuntimeError())], AttemptFolder(attempt).failures())
    assert type(error) is errors.OutOfMemoryError
    assert error.what == "total ran out of memory: CUDA error: out of memory"


def test_each_module_that_a_stage_imports_is_a_sign_of_life(
    attempt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They may take long to come from a slow file system, and are no standstill; one that never comes is."""
    parts = [f"part_{number}" for number in range(5)]
    for part in parts:
        (tmp_path / f"{part}.py").touch()
    imports = "".join(f"import {part}\n" for part in parts)
    told = "def run(context):\n    return {'beats': context.folder.pulses()[0].beat}\n"
    (tmp_path / "slow_stage.py").write_text(f"{imports}{told}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(liveness, "LEAST_SECONDS", 0.0)
    finders = list(sys.meta_path)
    perform(replace(call(attempt, "loud"), code="slow_stage:run"))
    # Each part, the stage itself, the process's begin, and what comes before and after the stage's import.
    assert AttemptFolder(attempt).result.read() == {"beats": len(parts) + 4}
    assert sys.meta_path == finders


def test_code_is_named_by_module_and_function():
    """A stage's code is imported where it runs, and by its name alone."""
    assert load("json:dumps") is json.dumps
    with pytest.raises(ModuleNotFoundError):
        load("nowhere:run")


def test_a_half_written_failure_is_never_read(attempt: Path):
    """Failures come to their names by a rename; a temporary file is none."""
    (attempt / "failure-0.tmp").write_text('{"at": ')
    assert AttemptFolder(attempt).failures() == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")
def test_freed_memory_is_used_again_without_the_kernel():
    """A block of 64 MiB takes 16,384 page faults the first time, and next to none once its like was freed."""
    program = """
import resource
from rlhf.cluster.worker import keep_freed_memory
keep_freed_memory()
taken = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"1") * 2**26
    del block
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(taken[-1])
"""
    faults = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(faults) < 100
