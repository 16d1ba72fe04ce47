"""Try what DeepSpeed has of other parallelism with tiny models of ours: ``python -m benchmarks.parallelism``.

Two ranks on the CPU train one step with AutoTP (weights cut between them) or Ulysses (texts cut between them). A row of
the table for each case: the error that stopped it, or its loss and the norm of its gradients beside plain torch's, from
which they should differ by rounding.
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

RANKS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ROWS, TIME = 2, 12
IDS = torch.randint(5, 90, (ROWS, TIME), generator=torch.Generator().manual_seed(0))


def model_of(kind: str, *, tied: bool = False, lora: bool = False) -> Any:
    """Return a model with random weights, the same each time."""
    torch.manual_seed(0)
    default: Any = AutoConfig.for_model(kind)
    known = default.to_dict().keys() | default.attribute_map.keys()
    config = type(default)(**{name: value for name, value in SHAPE.items() if name in known}, tie_word_embeddings=tied)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def text(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return positions and learned places ``[row, time]`` of texts that lie so, and their mask where they need one."""
    mask = torch.ones_like(IDS)
    positions = torch.arange(TIME).expand(ROWS, TIME).clone()
    if kind == "two texts a row":
        positions[:, 5:] -= 5
        learned = torch.arange(TIME).expand(ROWS, TIME) != 4
        return positions, learned & (torch.arange(TIME) < TIME - 1), None
    if kind != "a text a row":
        mask[0, :4] = 0
        mask = mask if kind == "padded at the start" else mask.flip(1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    return positions, (mask * mask.roll(-1, 1)).bool() & (torch.arange(TIME) < TIME - 1), mask


def loss_of(model: Any, kind: str, places: slice = slice(None)) -> Tensor:
    """Return the negative log-likelihood of the learned tokens at these places."""
    positions, learned, mask = text(kind)
    named = {} if mask is None else {"attention_mask": mask[:, places]}
    logits = model(input_ids=IDS[:, places], position_ids=positions[:, places], use_cache=False, **named).logits
    logprobs = logits.float().log_softmax(-1).gather(2, IDS.roll(-1, 1)[:, places, None])[..., 0]
    return -(logprobs * learned[:, places]).sum() / 20


def engine_of(model: Any, stage: int, mpu: Any = None, **more: Any) -> Any:
    """Return DeepSpeed's engine of a model."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,
        **more,
    }
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]


def with_autotp(model: Any, stage: int) -> tuple[float, float]:
    """Return loss and norm of a step whose weights are cut between the ranks."""
    engine = engine_of(model, stage, tensor_parallel={"autotp_size": RANKS})
    loss = loss_of(engine, "a text a row")
    engine.backward(loss)
    engine.step()
    return loss.item(), float(engine.get_global_grad_norm())


def sharded_with_autotp(model: Any) -> tuple[float, float]:
    """Return those of a model that is sharded as it is read."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    tensor_parallel = {"autotp_size": RANKS}
    zero = {"stage": 3}
    config = HfDeepSpeedConfig({"zero_optimization": zero, "tensor_parallel": tensor_parallel, "train_batch_size": 2})
    with tempfile.TemporaryDirectory() as mine:
        model.save_pretrained(mine)  # by rank 0 alone
        folder = [mine]
        dist.broadcast_object_list(folder)
        model = AutoModelForCausalLM.from_pretrained(folder[0])
        dist.barrier()
    del config
    return with_autotp(model, 3)


def with_ulysses(model: Any, kind: str) -> tuple[float, float]:
    """Return loss and norm of a step whose texts are cut between the ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", RANKS, ROWS)
    engine = engine_of(model, 3, mpu, sequence_parallel_size=RANKS)
    start = dist.get_rank() * TIME // RANKS
    loss = loss_of(engine, kind, slice(start, start + TIME // RANKS))
    total = loss.detach().clone()
    dist.all_reduce(total)
    engine.backward(loss * RANKS)
    engine.step()
    return total.item(), float(engine.get_global_grad_norm())


Case = tuple[Callable[[], Any], Callable[[Any], tuple[float, float]], str]
LLAMA = partial(model_of, "llama")
CASES: dict[str, Case] = {
    f"AutoTP, stage {stage}, {name}": (model, partial(with_autotp, stage=stage), "a text a row")
    for stage, name, model in (
        (1, "Llama", LLAMA),
        (2, "Llama", LLAMA),
        (1, "Qwen3", partial(model_of, "qwen3")),
        (1, "Llama with a tied head", partial(LLAMA, tied=True)),
        (1, "Llama with LoRA", partial(LLAMA, lora=True)),
        (1, "GPT-2", partial(model_of, "gpt2")),
    )
}
CASES["AutoTP, stage 3, Llama sharded as it is read"] = (LLAMA, sharded_with_autotp, "a text a row")
for kind in ("a text a row", "padded at the end", "two texts a row", "padded at the start"):
    CASES[f"Ulysses, Llama, {kind}"] = (LLAMA, partial(with_ulysses, kind=kind), kind)
CASES["Ulysses, GPT-2"] = (partial(model_of, "gpt2"), partial(with_ulysses, kind="a text a row"), "a text a row")


def rank(number: int, case: str, folder: Path) -> None:
    """Be a rank of a case, and write what came of it."""
    os.environ |= {name: str(number) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS)}
    with (folder / f"log-{number}").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # It would be compiled.
    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder / 'meeting'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=number, world_size=RANKS)
    make, run, kind = CASES[case]
    plain = make()
    loss = loss_of(plain, kind)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    try:
        found, found_norm = run(make())
        came = f"loss {found:.6f}, plain {loss.item():.6f}; norm {found_norm:.5f}, plain {norm.item():.5f}"
    except Exception as error:  # noqa: BLE001 - it is the result
        came = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    (folder / f"came-{number}").write_text(came)


def main() -> None:
    """Print the table."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed")  # once, for all ranks
    forking = multiprocessing.get_context("fork")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            ranks = [forking.Process(target=rank, args=(number, case, Path(folder))) for number in range(RANKS)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(120)
                process.kill()
            # A rank that waits for one that failed has an error too, a later one.
            came = sorted(Path(folder).glob("came-*"), key=lambda file: file.stat().st_mtime_ns)
            print(f"| {case} | {came[0].read_text() if came else 'no answer in two minutes'} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
