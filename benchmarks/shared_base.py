"""Memory and time of PPO on one base with adapters: ``python -m benchmarks.shared_base [--layers N] [--hidden N] …``.

A Llama of random weights in bf16, by default of the shape of Llama 2 7B, with LoRA adapters as sft and rm would have
made them, takes three iterations of the stage ppo with ``share_base: true``; with ``--separate``, with a model for
each. The columns: 10^9 bytes of weights that all models hold, counted; the most GPU memory that was taken, measured;
the seconds of rollout, scoring and update. It needs a GPU of 80 GB for the default shape, and runs a small one on a
CPU.
"""

import argparse
import gc
from collections.abc import Iterator

from torch import nn
from transformers import LlamaConfig

from benchmarks.ranks import alone, announced, context_of, free_memory, save_adapter, save_model, write_prompts
from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.tuning import LoraTuning
from rlhf.rollout.prompts import PromptStream
from rlhf.stages import ppo
from rlhf.tracking import read_metrics
from rlhf.training.loading import load_models
from rlhf.training.loop import Journal
from rlhf.training.policy import KlCoefficient

ITERATIONS = 3
COLUMNS = {
    "weights, GB": "weights_gb",
    "peak, GB": "memory/peak_gb",
    "reserved, GB": "memory/reserved_gb",
    "rollout, s": "time/rollout_s",
    "score, s": "time/score_s",
    "train, s": "time/train_s",
    "KL, nats": "objective/kl",
}


def weights_held() -> int:
    """Return the bytes of weights of all modules in this process, of shards and of whole ones, each counted once."""
    held: dict[int, int] = {}
    for module in (one for one in gc.get_objects() if isinstance(one, nn.Module)):
        for weight in module.parameters(recurse=False):
            for tensor in (weight, getattr(weight, "ds_tensor", weight)):
                if tensor.device.type != "meta" and tensor.numel():
                    held[tensor.data_ptr()] = tensor.nbytes
    return sum(held.values())


def iterations(context: Context[PpoSettings]) -> Iterator[dict[str, float]]:
    """Run PPO's iterations; yield each one's metrics, with the weights held."""
    settings = context.settings
    models = load_models(context)
    file = context.inputs["prompts"] / "train.jsonl"
    prompts = PromptStream(file, models[0].tokenizer, settings.max_prompt_length, settings.seed)
    journal = Journal(context, ITERATIONS, unit="iteration", shown=())
    for iteration in range(ITERATIONS):
        ppo.iterate(iteration, settings, models, prompts, None, KlCoefficient(settings.kl), journal)
        yield read_metrics(context.folder.metrics)[-1] | {"weights_gb": weights_held() / 1e9}
    with announced("the result was written in"):
        models[0].export(context.output)


def settings_of(given: argparse.Namespace) -> PpoSettings:
    """Return the stage's settings."""
    return PpoSettings.model_validate(
        {
            "share_base": not given.separate,
            "tuning": {"method": "lora", "rank": given.rank},
            "precision": given.precision,
            "iterations": ITERATIONS,
            "rollouts": given.rollouts,
            "micro_batch_size": given.micro_batch,
            "sampling": {"max_new_tokens": given.new_tokens},
            "max_prompt_length": given.prompt,
            "policy_learning_rate": 1e-4,
            "value_learning_rate": 1e-4,
        }
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    shape = {"layers": 32, "hidden": 4096, "heads": 32, "intermediate": 11008, "vocabulary": 32000, "rank": 16}
    lengths = {"prompt": 128, "new-tokens": 128, "rollouts": 32, "micro-batch": 4}
    for name, default in (shape | lengths).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--separate", action="store_true", help="a model for each, instead of one base")
    parser.add_argument("--scratch", help="folder for the models; 28 GB with --separate and the default shape, else 14")
    return parser.parse_args()


def main() -> None:
    """Print a table."""
    given = arguments()
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with alone(given.scratch) as folder:
        with announced("the models were written in"):
            base, method = save_model(config, folder / "base"), LoraTuning(rank=given.rank)
            inputs = {
                "policy": save_adapter(config, base, folder / "policy", method, scores=False),
                "reward": save_adapter(config, base, folder / "reward", method, scores=True),
                "prompts": write_prompts(folder / "prompts", given.vocabulary, given.prompt),
            }
        free_memory()
        context = context_of("ppo", settings_of(given), inputs, folder)
        print(f"| iteration | {' | '.join(COLUMNS)} |\n{'| --- ' * (1 + len(COLUMNS))}|")
        for number, row in enumerate(iterations(context), start=1):
            cells = [f"{row[name]:.3g}" if name in row else "" for name in COLUMNS.values()]
            print(f"| {number} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
