"""A stage in this process, or on the ranks of a group, on models of random weights and random words."""

import argparse
import copy
import gc
import json
import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.limits import SHAPES, described, nominal
from benchmarks.tiny_models import save_word_tokenizer
from rlhf.attempt.context import Context
from rlhf.cluster.worker import Call, prepare_deepspeed
from rlhf.config.base import Settings
from rlhf.config.tuning import LoraTuning
from rlhf.models import tuning
from rlhf.rl.masks import response_mask
from rlhf.rollout.sampling import Responses
from rlhf.rollout.vllm_sampling import VllmSampler
from rlhf.training.limits import Ceilings
from rlhf.zero import group

NORMALISER = {"score_mean": 0.0, "score_std": 1.0, "sees": "conversation", "score_max_length": 512}
FLOOR = 1 / 16
"""Above the probability of token 0, under weights that are as good as random."""
S = TypeVar("S", bound=Settings)


@contextmanager
def alone(scratch: str | None = None) -> Generator[Path]:
    """Make this process a group of one rank, set up as a worker is; yield a folder that is removed afterwards."""
    with TemporaryDirectory(dir=scratch) as folder, _joined(0, 1, free_port(), Path(folder)):
        yield Path(folder)


def in_group(given: argparse.Namespace, act: Callable[[argparse.Namespace, Path], None]) -> None:
    """Run ``act(given, folder)`` on each of ``given.ranks`` ranks of a group on this machine, one on each GPU.

    act     a function of a module; one rank is this process
    folder  the same for all, and removed afterwards
    """
    with TemporaryDirectory(dir=given.scratch) as folder:
        arguments = given.ranks, free_port(), Path(folder), given, act
        if given.ranks == 1:
            _act_as_rank(0, *arguments)
        else:
            spawn(_act_as_rank, arguments, nprocs=given.ranks)


def _act_as_rank(number: int, ranks: int, port: int, folder: Path, given: argparse.Namespace, act: Any) -> None:
    with _joined(number, ranks, port, folder):
        act(given, folder)


@contextmanager
def _joined(number: int, ranks: int, port: int, folder: Path) -> Generator[None]:
    known = {"RANK": number, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    known |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), ranks)
    os.environ |= {name: str(value) for name, value in known.items()}
    if torch.cuda.is_available():
        torch.cuda.set_device(number)
        # A rank of a run has one core beside its GPU: more threads would take those of the other ranks.
        torch.set_num_threads(1)
    prepare_deepspeed(Call("", context_of("", Settings(), {}, folder), gpu=torch.cuda.is_available()))
    # As a worker: DeepSpeed collects garbage again and again.
    gc.freeze()
    yield
    dist.destroy_process_group()


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def context_of(stage: str, settings: S, inputs: Mapping[str, Path], folder: Path) -> Context[S]:
    """Return what a stage is given, with its attempt below ``folder``."""
    attempt = folder / "attempt"
    (attempt / "output").mkdir(parents=True, exist_ok=True)
    off = {"mode": "disabled"}
    return Context(stage, "0" * 64, settings, inputs, attempt / "output", attempt, cache=folder, tracking=off)


def save_model(config: Any, folder: Path, *, scores: bool = False, normaliser: Mapping[str, Any] = NORMALISER) -> Path:
    """Write a model of random weights in bf16, made where there is a GPU on it, with a tokenizer of words.

    config      of transformers
    scores      makes a reward model
    normaliser  of its scores
    """
    torch.manual_seed(int(scores))
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = auto.from_config(_of_kind(config, scores=scores), dtype=torch.bfloat16)
    # A shard is what is in the CPU's memory at a time.
    model.save_pretrained(folder, max_shard_size="2GB")
    save_word_tokenizer(config.vocab_size, folder, pad=config.pad_token_id, eos=config.eos_token_id)
    if scores:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(normaliser)))
    return folder


def save_adapter(
    config: Any,
    base: Path,
    folder: Path,
    method: LoraTuning,
    *,
    scores: bool,
    normaliser: Mapping[str, Any] = NORMALISER,
) -> Path:
    """Write a LoRA adapter of random weights for a base, which is not read."""
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(_of_kind(config, scores=scores), dtype=torch.bfloat16)
    adapted = tuning.prepared(model, method, base, scores=scores, seed=0)
    generator = torch.Generator().manual_seed(int(scores))
    weights = {
        name: 0.01 * torch.randn(weight.shape, generator=generator).bfloat16()
        for name, weight in adapted.named_parameters()
        if weight.requires_grad
    }
    tuning.save(adapted, weights, base, folder, method, scores=scores, config=dict(normaliser) if scores else None)
    return folder


def _of_kind(config: Any, *, scores: bool) -> Any:
    of_kind = copy.deepcopy(config)
    if scores:
        of_kind.num_labels = 1
    return of_kind


def free_memory() -> None:
    """Give back what making models took, and begin to measure."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def words(numbers: Sequence[int]) -> str:
    """Return a text of as many tokens under the tokenizer of words."""
    return " ".join(f"w{number}" for number in numbers)


def write_prompts(folder: Path, vocabulary: int, length: int, rows: int = 64) -> Path:
    """Write prompts of random words, all of one length."""
    folder.mkdir()
    numbers = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": words(row)}) + "\n" for row in numbers))
    return folder


def drawn_lengths(kind: str, response: int, rows: int) -> list[int]:
    """Return the lengths of ``rows`` responses, in an order that has nothing to do with them.

    kind  ``uniform``: all ``response``; ``spread``: evenly from 32 (or ``response``, if that is less) to twice
          ``response``, the same lengths each time
    """
    if kind == "uniform":
        return [response] * rows
    lengths = np.linspace(min(32, response), 2 * response, rows).round().astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()


def longest(kind: str, response: int) -> int:
    """Return the setting ``max_new_tokens`` that responses of :func:`drawn_lengths` need."""
    return response if kind == "uniform" else 2 * response


def with_lengths(noise: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return noise under which each response has its length, whatever the model's weights are.

    A token is where the cumulative distribution passes its number, and EOS is the token 0: the number 0 always draws
    it, and a number above its probability never does.

    noise  ``[sample, time]``, in [0, 1)
    """
    forced = FLOOR + (1 - FLOOR) * noise
    for row, length in enumerate(lengths):
        if length < noise.shape[1]:
            forced[row, length - 1] = 0.0
    return forced


def force_lengths(sampler: Any, lengths: Sequence[int]) -> None:
    """Have an object's ``sample(prompts, noise)`` answer in these lengths; see :func:`with_lengths`.

    vLLM draws by numbers of its own: its requests are told to go on to their lengths, and their last tokens become EOS.
    """
    sample, eos = sampler.sample, sampler.tokenizer.eos_token_id

    if isinstance(by := vars(sampler).get("_generator", sampler), VllmSampler):
        take_weights = by.take_weights

        def with_requests() -> None:
            take_weights()
            engine: Any = vars(by)["_engine"]
            if "add_request" not in vars(engine):
                engine.add_request = partial(_of_length, engine.add_request, lengths)

        def of_lengths(prompts: Sequence[list[int]], noise: Tensor) -> Responses:
            responses = sample(prompts, noise)
            for row, length in enumerate(lengths):
                responses.ids[row, :length][responses.ids[row, :length] == eos] = eos + 1
                responses.ids[row, length - 1] = eos
            return responses

        vars(by)["take_weights"] = with_requests
        vars(sampler)["sample"] = of_lengths
        return

    def forced(prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        responses = sample(prompts, with_lengths(noise, lengths))
        if response_mask(responses.ids, eos).sum(1).tolist() != list(lengths):
            raise RuntimeError("the sampler does not follow its noise: responses have other lengths than were drawn")
        return responses

    vars(sampler)["sample"] = forced


def _of_length(add: Callable[..., None], lengths: Sequence[int], row: str, prompt: Any, asked: Any) -> None:
    """Add a request for as many tokens as its row's length to vLLM's engine."""
    asked.max_tokens, asked.stop_token_ids = lengths[int(row)], []
    add(row, prompt, asked)


def parser(description: str | None, **defaults: int | None) -> argparse.ArgumentParser:
    """Return a command line with what all benchmarks take, and with whole numbers by their names."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--shape", choices=tuple(SHAPES), default="1b" if torch.cuda.is_available() else "tiny")
    made.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="a CPU without bf16 takes fp32")
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    made.add_argument("--scratch", help="folder for models of random weights; a temporary one otherwise")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return made


def add_engine(made: argparse.ArgumentParser) -> None:
    """Let a command line say how responses are sampled."""
    made.add_argument("--engine", choices=("native", "vllm"), default="native", help="that samples responses")
    made.add_argument("--bf16-head", action="store_true", help="leave the logits in bf16, as vLLM before 0.30 must")


def fill_in(given: argparse.Namespace, **of_tiny: int) -> None:
    """Give sizes that were left out the tiny shape's own, or those that one GPU is measured with."""
    defaults = of_tiny if given.shape == "tiny" else {"rollouts": 128, "prompt": 256, "response": 256}
    vars(given).update({name: value for name, value in defaults.items() if getattr(given, name) is None})


def publish(given: argparse.Namespace, measured: Ceilings, text: str, figures: Mapping[str, Any]) -> None:
    """Print the tables, and write the figures as JSON where that is asked for."""
    print(f"\n{described(measured)}; torch {torch.__version__}\n\n{text}", flush=True)
    if given.json:
        flags = {name: value for name, value in vars(given).items() if name not in ("json", "scratch")}
        whole = {"flags": flags, "ceilings": vars(measured) | {"nominal": nominal(measured)}} | dict(figures)
        given.json.write_text(json.dumps(whole | {"torch": torch.__version__}, indent=1) + "\n")


def sizes(given: argparse.Namespace, precision: str, lengths: Sequence[int]) -> str:
    """Return in words what was measured.

    lengths  of the responses
    """
    mean, drawn = sum(lengths) / len(lengths), f"{given.lengths} ({min(lengths)} to {max(lengths)})"
    tokens = f"{given.rollouts} x ({given.prompt} + {mean:g}) tokens"
    return f"{given.shape}, {precision}, {tokens}, response lengths {drawn}"


def largest(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the most GPU memory in metrics of steps, 10^9 bytes: of tensors, and of the allocator; empty on a CPU."""
    names = [name for name in ("memory/peak_gb", "memory/reserved_gb") if name in rows[0]]
    return {name: max(row[name] for row in rows) for name in names}


def in_words(memory: Mapping[str, float]) -> str:
    """Return the figures of :func:`largest` for a line of text."""
    return "".join(f"; {name.removeprefix('memory/')} {value:.1f}" for name, value in memory.items())


@contextmanager
def announced(what: str) -> Generator[None]:
    """Print how many seconds something took, on a group's first rank."""
    start = time.perf_counter()
    yield
    if group.is_main():
        print(f"{what} {time.perf_counter() - start:.1f} s", flush=True)
