"""Sample responses by vLLM, whose engine runs in each rank's process beside the models that train.

The engine starts with random weights and is given the policy's before each rollout, by the names of the model's files.
Between rollouts a GPU's memory is the trainer's: weights and cache are dropped. Each sample's first random number seeds
its request, so that its tokens follow from the seed, the sample and the logits; they are other tokens than those that
:mod:`rlhf.rollout.sampling` draws with the same numbers.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.attempt import liveness
from rlhf.config.stages import Precision
from rlhf.errors import PreflightError, size
from rlhf.models import capacity, safe_loading, text
from rlhf.models.heads import rows_without_token
from rlhf.models.layout import config_of, shapes
from rlhf.rollout.drawing import Responses
from rlhf.rollout.rollout import Sampler
from rlhf.zero import group
from rlhf.zero.engine import gathered, is_sharded, whole_shape

OTHER = "write rollout: {engine: native}"
"""What to do where vLLM cannot sample from a model."""
NOT_INSTALLED = "vLLM is not installed", f"pip install 'rlhf-pipeline[vllm]', or {OTHER}"
"""What is wrong, and what to do."""
SHARE = 0.7
"""Of a GPU's memory that is free beside the engine's weights, for keys and values; the rest is for activations."""
BLOCK = 128
"""Tokens of a block of the cache on a CPU; a GPU's blocks are smaller."""


class Room(NamedTuple):
    """The largest rollout of a rank."""

    rows: int
    """Responses."""
    length: int
    """Tokens of a prompt and its response together."""


def obstacle(folder: Path) -> tuple[str, str] | None:
    """Return why this rank's vLLM cannot sample from a plain folder's model, and what to do; None where it can."""
    if find_spec("vllm") is None:
        return NOT_INSTALLED
    vllm = _imported()
    kind = group.device().type
    built_for = import_module("vllm.platforms").current_platform.device_type
    if built_for != kind:
        return f"the vLLM that is installed computes on {built_for or 'no device here'}, and the ranks on {kind}", OTHER
    architectures = config_of(folder).get("architectures") or []
    if not set(architectures) & set(vllm.ModelRegistry.get_supported_archs()):
        return f"vLLM {vllm.__version__} does not know the architecture {', '.join(architectures)}", OTHER
    if others := misnamed(folder):
        what = "vLLM takes weights by the names of the model's files, and transformers has other names for"
        return f"{what} {len(others)} of them, such as {others[0]}", OTHER
    return None


def misnamed(folder: Path) -> list[str]:
    """Return the weights that a plain folder's model has in transformers and not in its files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **safe_loading.TOKENIZER))
    files = shapes(folder)
    return [name for name, _ in model.named_parameters() if name not in files]


def _imported() -> Any:
    # With a process of its own the engine could not be given tensors; and it would report its use to vLLM's makers.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if group.device().type == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # it would bind the trainer's threads too
    return import_module("vllm")


class VllmSampler(Sampler):
    """Samples by vLLM from a policy that trains.

    folder  the plain folder that the policy was loaded from
    source  the policy
    ranks   that hold a copy together, which vLLM splits itself; they divide those of a node
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        temperature: float,
        room: Room,
        *,
        fp32_head: bool,
        source: Any,
        ranks: int = 1,
    ) -> None:
        self.tokenizer, self.ranks = text.load_tokenizer(folder), ranks
        self._folder, self._precision, self._fp32_head = folder, precision, fp32_head
        self._temperature, self._room, self._source = temperature, room, source
        self._engine: Any = None
        self._sleeps = False

    @property
    def holds_weights(self) -> bool:
        """Whether the weights that were taken last are still there; after an answer a GPU has their memory back."""
        return not self._sleeps

    def take_weights(self) -> None:
        """Take the policy's present weights. A collective."""
        if self._engine is None:
            self._engine = self._started()
        engine = self._engine
        if self._sleeps:
            torch.cuda.empty_cache()  # vLLM takes its memory past torch's allocator, which keeps what it has freed
            engine.wake_up(tags=["weights"])
        try:
            engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        except (KeyError, ValueError) as error:
            what = f"vLLM does not take the policy's weights: {str(error)[:200]}"
            raise PreflightError(what, "rollout.engine", OTHER) from error
        if self._sleeps:
            engine.wake_up(tags=["kv_cache"])
            self._sleeps = False
        engine.apply_model(_pack_tied_head)
        engine.reset_prefix_cache()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        sharded = is_sharded(self._source)
        for name, parameter in self._source.named_parameters():
            weight = parameter.detach()
            if sharded:
                # The engine reads a layer's weights when it has all of them, by then this one is in shards again.
                with gathered([parameter]):
                    weight = parameter.detach().clone()
            yield name, weight
            liveness.beat()

    def answer(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt, on this rank alone."""
        vllm, engine = _imported(), self._engine
        kind: Any = import_module("vllm.sampling_params").RequestOutputKind
        ids, logprobs = torch.full(noise.shape, self.tokenizer.pad_token_id), torch.zeros(noise.shape)
        for row, (prompt, number) in enumerate(zip(prompts, noise[:, 0].tolist(), strict=True)):
            asked = vllm.SamplingParams(
                temperature=self._temperature,
                seed=int(number * 2**53),
                max_tokens=noise.shape[1],
                stop_token_ids=[self.tokenizer.eos_token_id],
                ignore_eos=True,  # of the model's own configuration
                logprobs=0,  # of the tokens that are drawn, and of no others
                flat_logprobs=True,
                detokenize=False,
                output_kind=kind.FINAL_ONLY,
            )
            engine.add_request(str(row), {"prompt_token_ids": prompt}, asked)
        while engine.has_unfinished_requests():
            for answered in engine.step():
                (response,), row = answered.outputs, int(answered.request_id)
                length = len(response.token_ids)
                ids[row, :length] = torch.tensor(response.token_ids)
                if self._temperature:
                    logprobs[row, :length] = torch.tensor(response.logprobs.logprobs)
            liveness.beat()
        if group.device().type == "cuda":
            engine.sleep(level=2)
            self._sleeps = True
        return Responses(ids, logprobs)

    def _started(self) -> Any:
        """Start the engine. A collective.

        Raises:
            PreflightError: no response fits into memory, or this vLLM cannot compute logits in fp32.
        """
        vllm, on_gpu = _imported(), group.device().type == "cuda"
        weights = self._weight_bytes()
        cache = self._cache_bytes(weights)
        overrides = {"tie_word_embeddings": self._source.config.get_text_config().tie_word_embeddings}
        arguments = vllm.EngineArgs(
            model=str(self._folder),
            model_impl="vllm",
            dtype={"fp32": "float32", "bf16": "bfloat16"}[self._precision],
            hf_overrides=overrides | ({"head_dtype": "float32"} if self._fp32_head else {}),
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # its own: the model's would change what is sampled from
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=self.ranks,
            # Graphs of a step, without a compiler: ranks run without torch's.
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY" if on_gpu else "NONE"},
            enable_sleep_mode=on_gpu,
            max_model_len=self._room.length,
            max_num_seqs=self._rows(),
            max_num_batched_tokens=capacity.TOKENS_ON_GPU if on_gpu else capacity.TOKENS_ON_CPU,
            kv_cache_memory_bytes=cache,
            # vLLM wants this share to be free, and then takes what the line above says.
            gpu_memory_utilization=_share_of_gpu(weights + cache) if on_gpu else 0.5,
            disable_log_stats=True,
        )
        liveness.beat()
        engine = vllm.LLMEngine.from_engine_args(arguments)
        liveness.beat()
        if self._fp32_head and engine.model_config.head_dtype != torch.float32:
            raise PreflightError(
                f"vLLM {vllm.__version__} computes this model's logits in {self._precision}, and fp32_head is true",
                "sampling.fp32_head",
                f"sampling.fp32_head=false, a later vLLM, or {OTHER}",
            )
        if rows := rows_without_token(self._source, self.tokenizer):
            engine.apply_model(_forbidding(rows))
        return engine

    def _rows(self) -> int:
        most = capacity.ROWS_ON_GPU if group.device().type == "cuda" else capacity.ROWS_ON_CPU
        return min(self._room.rows, most)

    def _weight_bytes(self) -> int:
        whole = sum(whole_shape(weight).numel() * weight.element_size() for weight in self._source.parameters())
        return whole // self.ranks

    def _cache_bytes(self, weights: int) -> int:
        """Return the bytes of the cache: for all rows at once, or as many as fit.

        weights  bytes of the engine's weights

        Raises:
            PreflightError: not one fits.
        """
        config = self._source.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        place = 2 * config.num_hidden_layers * heads * width * self._source.dtype.itemsize // self.ranks
        row = place * capacity.rounded(self._room.length, BLOCK)
        wanted = (self._rows() + 1) * row  # one block is vLLM's own
        if group.device().type == "cpu":
            return wanted
        torch.cuda.empty_cache()
        # The ranks of a copy must have caches of one size.
        free = -int(group.all_max(torch.tensor(-torch.cuda.mem_get_info()[0]))) - weights
        if SHARE * free < 2 * row:
            raise PreflightError(
                f"vLLM needs {size(weights)} for a copy of the policy and {size(2 * row)} for the keys and values of "
                f"{self._room.length} tokens, and {size(free + weights)} of the GPU are free",
                "rollout.engine",
                f"take more ranks or a larger GPU, lower sampling.max_new_tokens, or {OTHER}",
            )
        return min(wanted, int(SHARE * free))


def _share_of_gpu(taken: int) -> float:
    return min(1.0, math.ceil(1000 * taken / torch.cuda.mem_get_info()[1]) / 1000)


def _forbidding(rows: list[int]) -> Callable[[Any], None]:
    """Return what makes an engine's model give probability 0 to rows of its head that are no token.

    vLLM's own setting, a list of the allowed tokens, is copied to the device for each request.
    """
    processor = import_module("vllm.model_executor.layers.logits_processor").LogitsProcessor

    def forbid(module: Any, arguments: Any, logits: Any) -> Any:  # noqa: ARG001 - torch's signature
        return logits.index_fill_(-1, torch.tensor(rows, device=logits.device), -math.inf)

    def apply(model: Any) -> None:
        for part in model.modules():
            if isinstance(part, processor):
                part.register_forward_hook(forbid)

    return apply


def _pack_tied_head(model: Any) -> None:
    """Let a head that is tied to the embeddings follow them.

    On a CPU vLLM 0.30 multiplies by a packed copy of the head, which new embeddings do not reach. On a GPU there is no
    copy, and this does nothing.
    """
    head = import_module("vllm.model_executor.layers.vocab_parallel_embedding").ParallelLMHead
    for part in model.modules():
        if isinstance(part, head):
            part.quant_method.process_weights_after_loading(part)
