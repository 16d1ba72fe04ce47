"""Predict the memory of a training stage's ranks before anything runs.

A prediction is what ``memory/peak_gb`` in a stage's metrics then measures: the tensors of one rank at their most, which
is at one of several moments. Beside them a GPU holds CUDA's own context and what the allocator cannot use, about
:data:`CONTEXT`. Texts are taken to be as long as the settings or the data allow; shorter ones need less.

What DeepSpeed 0.19 keeps under ZeRO-3, in bytes for each trained parameter of a rank's share: the weight, in bf16 also
in fp32 (4), Adam's moments (8), gradients (4). Beside these a buffer for gradients on their way to other ranks, of
``reduce_bucket_size`` parameters whatever the model's size. A test counts these bytes in a real engine.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import DpoSettings, RmSettings, SftSettings, WorkerSettings
from rlhf.config.tuning import LowRankTuning, virtual_tokens
from rlhf.config.zero import BUCKET
from rlhf.errors import size
from rlhf.models import capacity, footprint
from rlhf.models.footprint import Architecture, Learned, learned, weight_bytes
from rlhf.models.splittable import obstacle

PARTS = ("weights", "gradients", "optimiser", "activations", "logits", "generation", "frozen models")
CONTEXT = 10**9
"""Bytes of a GPU that no tensor can have."""
FILLED = 0.8
"""Share of a GPU's memory that is filled where the size of micro batches is not set."""
MOST_TOGETHER = 8
"""Ranks that a copy of the policy is spread over where their number is not set: more are seldom in one node."""
REUSE = 5 * 10**8
"""Parameters of a rank's layers that stay gathered from the forward to the backward pass, half of DeepSpeed's
``max_reuse_distance``."""
TILE = 4096, 32768
"""Tokens and entries of the vocabulary whose logits sft has at a time: TRL's."""

Training = SftSettings | RmSettings | DpoSettings | PolicyGradientSettings
T = TypeVar("T", bound=Training)
Bytes = Mapping[str, float]


@dataclass(frozen=True)
class Texts:
    """The longest texts of a stage, in tokens."""

    longest: int
    """Of a whole text, of ppo prompt and response together."""
    response: int = 0
    """Of a response in ppo."""
    in_list: int = 1
    """Most responses in a list of rm; two of a pair of dpo."""


@dataclass(frozen=True)
class Prediction:
    """The memory of one rank at its peak."""

    moment: str
    """When the peak is."""
    parts: Bytes
    """Bytes by the names of :data:`PARTS`; parts without any are missing."""

    @property
    def total(self) -> float:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = [f"{size(self.parts[name])} for {name}" for name in PARTS if self.parts.get(name, 0) >= 10**6]
        return f"{size(self.total)} {self.moment} ({', '.join(listed)})"


def limits(settings: Training) -> Texts:
    """Return the longest texts that the settings allow; lists of rm that have no set size count as four responses."""
    match settings:
        case SftSettings():
            return Texts(settings.max_length)
        case RmSettings():
            return Texts(settings.max_length, in_list=settings.responses_per_list or 4)
        case DpoSettings():
            return Texts(settings.max_length, in_list=2)
        case PolicyGradientSettings():
            response, mixed = settings.sampling.max_new_tokens, settings.ptx.max_length if settings.ptx.coef else 0
            return Texts(settings.longest, max(response, mixed))


def predict(
    settings: Training, models: Mapping[str, Architecture], texts: Texts | None = None, *, gpu: bool = True
) -> Prediction:
    """Predict the peak of each rank.

    models  of the stage's inputs, by role: ``base``, or ``policy`` and each ``reward…``
    texts   the longest of the data; None takes the longest that the settings allow
    gpu     whether ranks have GPUs; on CPUs buffers count as far as they are filled
    """
    texts = texts or limits(settings)
    models = {role: replace(model, fused=model.fused and gpu) for role, model in models.items()}
    if isinstance(settings, PolicyGradientSettings):
        moments = list(_policy_gradient(settings, models, texts, gpu))
    else:
        model = models["policy" if isinstance(settings, DpoSettings) else "base"]
        moments = list(_supervised(settings, model, texts, gpu))
    moment, parts = max(moments, key=lambda candidate: sum(candidate[1].values()))
    return Prediction(moment, {name: parts[name] for name in PARTS if parts.get(name)})


def with_micro_batch(
    settings: T,
    models: Mapping[str, Architecture] | None,
    gpu: int,
    *,
    in_list: int | None = None,
    node: int | None = None,
) -> T:
    """Return the settings with a number for ``micro_batch_size``, unless ``micro_batch_tokens`` stands for it; where
    both are null the largest that fits a GPU. In ppo ``packing`` and ``rollout.tensor_parallel`` are decided too.

    It divides a rank's share of an update. A prediction with it fills at most :data:`FILLED` of the smallest GPU, with
    texts as long as the settings allow: so the driver and all ranks agree, whatever each knows of the data.

    models   as for :func:`predict`; None where they are not known, which takes what a CPU would
    gpu      bytes of the smallest GPU
    in_list  most responses in a list of rm
    node     ranks of a node; None where that is not known, which takes all to be on one
    """
    if isinstance(settings, PolicyGradientSettings):
        packing = packs(settings, models, gpu=True) if models else bool(settings.packing)
        settings = settings.model_copy(update={"packing": packing})
        if settings.rollout.tensor_parallel == "auto":
            sized = settings
            for together in _together(settings, models, node):
                rollout = settings.rollout.model_copy(update={"tensor_parallel": together})
                sized = with_micro_batch(settings.model_copy(update={"rollout": rollout}), models, gpu)
                if models is None or predict(sized, models).total + CONTEXT <= gpu:
                    break
            return sized
    if settings.micro_batch_tokens is not None:
        return settings
    if settings.micro_batch_size is not None or models is None:
        return settings.model_copy(update={"micro_batch_size": settings.micro_batch})
    texts, share = limits(settings), share_of_rank(settings)
    texts = replace(texts, in_list=in_list or texts.in_list)
    sizes = (size for size in range(share, 1, -1) if share % size == 0)
    candidates = (settings.model_copy(update={"micro_batch_size": size}) for size in sizes)
    enough = (given for given in candidates if predict(given, models, texts).total + CONTEXT <= FILLED * gpu)
    return next(enough, settings.model_copy(update={"micro_batch_size": 1}))


def _together(
    settings: PolicyGradientSettings, models: Mapping[str, Architecture] | None, node: int | None
) -> list[int | Literal["gathered"]]:
    """Return what ``rollout.tensor_parallel`` may be, in the order of what it costs."""
    ranks = settings.trainers
    if models is None or ranks == 1 or settings.zero.stage != 3 or shares_base(settings):
        return [1]
    if settings.rollout.engine != "native":
        return [1]
    node = node or ranks
    split = range(0) if settings.obstacle_to_split() else range(2, min(node, MOST_TOGETHER) + 1)
    config = models["policy"].config
    fitting = [count for count in split if node % count == 0 and obstacle(config, count) is None]
    return [1, *fitting, "gathered"]


def why_together(
    given: PolicyGradientSettings, chosen: PolicyGradientSettings, models: Mapping[str, Architecture], gpu: int
) -> str | None:
    """Return why ``rollout.tensor_parallel: auto`` is what was chosen; None where it was set, or is 1.

    gpu  bytes of the smallest GPU
    """
    together = chosen.rollout.tensor_parallel
    if given.rollout.tensor_parallel != "auto" or together == 1:
        return None
    whole = chosen.model_copy(update={"rollout": chosen.rollout.model_copy(update={"tensor_parallel": 1})})
    needed, now = (size(predict(settings, models).total) for settings in (whole, chosen))
    return (
        f"rollout.tensor_parallel auto is {together}: with a whole copy of the policy a rank would take about {needed} "
        f"of a GPU's {size(gpu)}, and so it takes {now}"
    )


def shares_base(settings: Training) -> bool:
    """Return whether a stage's models are adapters on one base."""
    return isinstance(settings, PpoSettings) and settings.share_base


def packs(settings: PolicyGradientSettings, models: Mapping[str, Architecture], *, gpu: bool) -> bool:
    """Return whether samples are laid end to end: as ``packing`` says, else where a kernel keeps them apart."""
    if settings.packing is not None:
        return settings.packing
    return gpu and all(computes_by_text(settings, one) for one in _starts(settings, models))


def computes_by_text(settings: Training, model: Architecture) -> bool:
    """Return whether a GPU's kernel keeps the texts of a row apart."""
    return settings.precision == "bf16" and virtual_tokens(settings.tuning) is None and model.by_text


def _starts(settings: PolicyGradientSettings, models: Mapping[str, Architecture]) -> list[Architecture]:
    """Return what the trained models start from: the policy, and the value model where there is one."""
    if not isinstance(settings, PpoSettings):
        return [models["policy"]]
    return [models["policy"], models.get("reward" if settings.value_init == "reward" else "policy", models["policy"])]


def share_of_rank(settings: Training) -> int:
    """Return the rows of an update that one rank computes."""
    rows = (
        settings.rollouts // settings.minibatches
        if isinstance(settings, PolicyGradientSettings)
        else settings.batch_size
    )
    return max(1, rows // settings.trainers)


@dataclass(frozen=True)
class Sharding:
    """What of ``zero`` decides about memory; the numbers are DeepSpeed's defaults."""

    stage: int = 3
    host_optimiser: bool = False
    host_weights: bool = False
    bucket: float = BUCKET
    """Parameters whose gradients are reduced at a time."""
    sub_group: float = 1e9
    """Parameters whose optimiser step is taken at a time."""
    own_linear: bool = True
    """Whether DeepSpeed's linear layers, which keep their inputs where they are frozen too, take the place of torch's;
    in stage 3 alone."""
    held: float = 1.0
    """Share of all weights that a rank holds, in stage 3 its own and that of its node's second copy."""

    @classmethod
    def of(cls, settings: Training) -> Self:
        """Read a stage's settings."""
        ranks = settings.trainers
        zero = settings.zero.of_ranks(ranks)
        second = 1 / zero.secondary_partition if zero.secondary_partition > 1 else 0.0
        return cls(
            zero.stage,
            zero.offload_optimizer != "none",
            zero.offload_parameters != "none",
            zero.sharding.get("reduce_bucket_size", cls.bucket),
            zero.sharding.get("sub_group_size", cls.sub_group),
            zero.stage == 3 and zero.sharding.get("memory_efficient_linear", cls.own_linear),
            1 / ranks + second if zero.stage == 3 else 1.0,
        )


@dataclass(frozen=True)
class Trained:
    """A model that a stage trains on one rank."""

    settings: Training
    name: str
    model: Architecture
    part: Learned
    scores: bool
    gpu: bool

    @property
    def width(self) -> int:
        """Bytes of an element of the model's precision."""
        return 2 if self.settings.precision == "bf16" else 4

    @property
    def share(self) -> float:
        """Trained parameters of a rank."""
        return self.part.parameters / self.settings.trainers

    @property
    def whole(self) -> float:
        """Bytes of the weights on all ranks together."""
        return weight_bytes(self.model, self.part, self.width, scores=self.scores)

    @property
    def masked(self) -> bool:
        """Whether attention has a mask; packed texts are computed one by one where the GPU's kernel can."""
        settings = self.settings
        packed = isinstance(settings, RmSettings) or (not isinstance(settings, DpoSettings) and settings.packing)
        return not (packed and self.gpu and self.width == 2 and self.model.by_text and not self.part.tokens)

    @property
    def sharding(self) -> Sharding:
        """How it is spread over ranks and host."""
        return Sharding.of(self.settings)

    @property
    def gathered(self) -> float:
        """Bytes of whole weights that a rank has beside its share while it computes; one rank's share is the whole."""
        at_work = (REUSE + self.model.layer) * self.width
        alone = self.settings.trainers == 1 and not self.sharding.host_weights
        return 0.0 if alone or self.sharding.stage < 3 else min(self.whole, at_work)

    @property
    def filled(self) -> float:
        """Parameters whose gradients are reduced at a time."""
        return min(self.sharding.bucket, self.part.parameters)

    def standing(self) -> Bytes:
        """Return the bytes that are there from the first step to the last."""
        sharding = self.sharding
        whole = 0.0 if sharding.host_weights else self.whole
        copied = 4 if self.width < 4 or sharding.stage < 3 else 0
        buffer = 4 * (sharding.bucket if self.gpu else self.filled)
        return {
            "weights": whole * sharding.held,
            "gradients": self._gradients() + buffer if sharding.stage == 3 else 0.0,
            "optimiser": 0.0 if sharding.host_optimiser else (copied + 8) * self.share,
        }

    def _gradients(self) -> float:
        """Return the bytes of added up gradients; stages 1 and 2 give them back after each optimiser step."""
        kept = self.part.parameters if self.sharding.stage == 1 else self.share
        return 0.0 if self.sharding.host_optimiser else 4 * kept

    def saved(self, rows: int, time: int) -> float:
        """Return the bytes that a forward pass saves."""
        return footprint.saved(
            self.model,
            self.part,
            self.width,
            rows,
            time,
            checkpointing=self.settings.activation_checkpointing,
            keeps_inputs=self.sharding.own_linear,
            masked=self.masked,
        )

    def moments(self, rows: int, time: int, logits: float) -> Iterator[tuple[str, Bytes]]:
        """Yield what an update takes beside what stands.

        rows, time  shape of a micro batch of token ids
        logits      bytes at the loss
        """
        kept = self.saved(rows, time)
        stage = self.sharding.stage
        gradients = self._gradients() if stage < 3 else 0.0
        # Stages 1 and 2 make their buffers, two that overlap, for each backward pass.
        buffers = self.width * (2 * self.sharding.bucket if self.gpu else self.filled) if stage < 3 else 0.0
        at_work = {"weights": self.gathered, "gradients": gradients + buffers}
        yield f"at {self.name} loss", _sum(at_work, {"activations": kept, "logits": logits})
        # A tied head's gradient waits for that of the embeddings.
        tied = self.part.head and not (self.model.head or self.scores)
        matrix = self.model.vocabulary * self.model.hidden
        layer = footprint.work(self.model, self.width, rows, time, backward=True, masked=self.masked)
        backward = {"activations": kept + layer, "gradients": self.width * matrix if tied else 0.0}
        yield f"in {self.name} backward pass", _sum(at_work, backward)
        # Full buckets are reduced by a copy, the first after as many parameters of the top layers have gradients.
        left = max(0.0, 1 - self.filled / self.part.parameters)
        reduced = {"activations": kept * left, "gradients": 4 * self.filled}
        yield f"in {self.name} reduction of gradients", _sum(at_work, reduced)
        if not self.sharding.host_optimiser:
            yield f"in {self.name} optimiser step", _sum({"gradients": gradients}, self._step())

    def _step(self) -> Bytes:
        """Return what an optimiser step takes: a copy of its gradients; AdamW, fused, has no tensors of its own."""
        stage, ranks = self.sharding.stage, self.settings.trainers
        stepped = min(self.share, self.sharding.sub_group + self.model.layer / ranks) if stage == 3 else self.share
        # Stages 1 and 2 have them in one piece, and those of the model's precision too.
        narrow = self.width % 4
        return {"gradients": {1: self.part.parameters * narrow, 2: self.share * narrow, 3: 4 * stepped}[stage]}


def _supervised(
    settings: SftSettings | RmSettings | DpoSettings, model: Architecture, texts: Texts, gpu: bool
) -> Iterator[tuple[str, Bytes]]:
    """Yield the moments of sft, rm or dpo, whose reference takes no memory."""
    scores = isinstance(settings, RmSettings)
    part = learned(model, settings.tuning, scores=scores)
    trained = Trained(settings, "the", model, part, scores, gpu)
    share = share_of_rank(settings)
    micro = max(number for number in range(1, min(settings.micro_batch, share) + 1) if share % number == 0)
    packed = isinstance(settings, SftSettings) and settings.packing
    length, most = settings.max_length if packed else texts.longest, share * texts.in_list
    rows = min(most, math.ceil((settings.micro_batch_tokens or 0) / length)) or micro * texts.in_list
    # Packed sequences lie end to end.
    rows, time = (1, rows * length) if packed else (rows, length)
    logits = 0.0 if scores else _tiled_logits(trained, rows * time)
    for moment, parts in trained.moments(rows, time, logits):
        yield moment, _sum(trained.standing(), parts)


def _tiled_logits(trained: Trained, tokens: int) -> float:
    """Return bytes of a tile of logits, of the gradients of hidden states and, where it trains, of the head."""
    model, width = trained.model, trained.width
    head = (4 + (width if width < 4 else 0)) * model.vocabulary * model.hidden if trained.part.head else 0
    if not trained.gpu and trained.sharding.stage < 3 and isinstance(trained.settings, SftSettings):
        # Logits in fp32, their distribution, and the terms of its entropy.
        return 12 * _in_chunk(trained, tokens) * model.vocabulary + head
    rows, entries = min(tokens, TILE[0]), min(model.vocabulary, TILE[1])
    # Without Triton, so on a CPU, a tile's gradient is computed in seven steps that each have a tensor in fp32.
    steps = 0 if trained.gpu else 7 * 4 * rows * entries
    return rows * TILE[1] * width + steps + 4 * tokens * model.hidden + head


def _policy_gradient(
    settings: PolicyGradientSettings, models: Mapping[str, Architecture], texts: Texts, gpu: bool
) -> Iterator[tuple[str, Bytes]]:
    """Yield the moments of an iteration."""
    settings = settings.model_copy(update={"packing": packs(settings, models, gpu=gpu)})
    ranks, given = settings.trainers, models["policy"]
    rewards = [model for role, model in models.items() if role.startswith("reward")]
    tuning = settings.tuning
    if isinstance(tuning, LowRankTuning):
        tuning = tuning.model_copy(update={"dropout": 0.0})  # the models are never in training mode
    policy = Trained(settings, "the policy's", given, learned(given, tuning, scores=False), False, gpu)
    values = [
        Trained(settings, "the value model's", start, learned(start, tuning, scores=True), True, gpu)
        for start in _starts(settings, models)[1:]
    ]
    width, micro = policy.width, min(settings.micro_batch, share_of_rank(settings))
    apart, scored = settings.placement == "apart", sum(model.parameters * width for model in rewards)
    frozen = 0.0 if apart else scored + (0 if policy.part.keeps_base else given.parameters * width)
    held = policy.sharding.held
    of_value, whole = (
        _sum(*(value.standing() for value in values)),
        weight_bytes(given, policy.part, width, scores=False),
    )
    # vLLM always has a copy, which a GPU drops between rollouts; otherwise whole weights are sampled where they lie.
    engine = settings.rollout.engine
    if settings.obstacle_to_vllm() or (engine == "auto" and not gpu):
        engine = "native"
    stays = not gpu if engine == "vllm" else policy.sharding.stage == 3
    given = settings.rollout.tensor_parallel if policy.sharding.stage == 3 and ranks > 1 else 1
    gathers, together = given == "gathered", given if isinstance(given, int) else 1
    copied = _part_of_copy(policy, whole, together)
    # A copy that several ranks hold natively is dropped between rollouts too.
    stays = stays and not gathers and (together == 1 or engine == "vllm")
    generation = copied * stays
    dropped = {"generation": copied * (not stays and not gathers and (engine != "native" or together > 1))}
    if shares_base(settings):
        # Beside the policy's base there are adapters alone, and one engine with one buffer.
        (value,) = values
        gradients = 4 * value.share if policy.sharding.stage == 3 else 0.0
        of_value |= {"weights": value.part.parameters * width * held, "gradients": gradients}
        frozen = (1 + len(rewards)) * policy.part.parameters * width
        generation *= ranks > 1
    standing = _sum(
        policy.standing(),
        of_value,
        {
            "frozen models": 0.0 if policy.sharding.host_weights else frozen * held,
            "generation": generation,
            "optimiser": 4 * policy.share if settings.average_decay is not None else 0.0,
        },
    )
    # Samples that lie end to end may have short prompts, and so more tokens of responses than as many long ones.
    tokens = micro * (texts.longest if settings.packing else texts.response)
    shape = (1, micro * texts.longest) if settings.packing else (micro, texts.longest)
    logits = _policy_loss(settings, policy, tokens)
    others: list[tuple[str, Bytes]] = [("while responses are scored", _scoring(settings, policy, texts, micro))]
    others += policy.moments(*shape, logits)
    for value in values:
        others += value.moments(*shape, (4 + width) * tokens * value.model.hidden)
    # Sampling has as many rows as there is memory for: what fits otherwise fits with some.
    most = max(sum(parts.values()) for _, parts in others)
    rows, cache = _rows(settings, policy, texts, gpu=gpu, together=together)
    if gathers:
        rows, dropped = min(rows, capacity.AT_ONCE * micro), {"weights": policy.gathered}
    has_graphs = gpu and engine != "vllm" and together == 1 and not gathers
    kept = {"generation": cache * rows if has_graphs and cache * rows <= capacity.KEPT else 0.0}
    wanted = _sum(dropped, _sampling(policy, texts, rows, cache, gpu=gpu))
    while gpu and rows > 1 and not gathers and sum(wanted.values()) > most + kept["generation"]:
        rows //= 2
        wanted = _sum(dropped, _sampling(policy, texts, rows, cache, gpu=gpu))
    yield "while responses are sampled", _sum(standing, wanted)
    for moment, parts in others:
        yield moment, _sum(standing, kept, parts)
    if apart:
        yield _on_scorers(policy, texts, micro, scored + whole)


def _on_scorers(policy: Trained, texts: Texts, micro: int, frozen: float) -> tuple[str, Bytes]:
    """Return what a rank holds that scores alone.

    frozen  bytes of its models on all ranks that score
    """
    settings = policy.settings
    assert isinstance(settings, PolicyGradientSettings)
    workers, rollouts = WorkerSettings(count=settings.scorers), math.ceil(settings.rollouts / settings.parts)
    on_scorers = settings.model_copy(update={"placement": "together", "workers": workers, "rollouts": rollouts})
    alike = replace(policy, settings=on_scorers)
    held = 0.0 if alike.sharding.host_weights else frozen * alike.sharding.held
    return "while others score", _sum({"frozen models": held}, _scoring(on_scorers, alike, texts, micro))


def _logit_width(policy: Trained) -> int:
    settings = policy.settings
    return 4 if isinstance(settings, PolicyGradientSettings) and settings.sampling.fp32_head else policy.width


def _head_work(policy: Trained, tokens: int, *, trained: bool = False) -> float:
    """Return the bytes of logits, of the head in fp32, and of its gradient where it trains."""
    matrix, width = policy.model.vocabulary * policy.model.hidden, _logit_width(policy)
    # A GPU multiplies bf16 as it is.
    copied = width * matrix if (width > policy.width and not policy.gpu) or trained else 0
    cast = policy.width * matrix if width > policy.width and trained else 0
    return width * tokens * policy.model.vocabulary + copied + cast


def _in_chunk(policy: Trained, tokens: int) -> int:
    return min(tokens, max(capacity.FEWEST, capacity.CHUNK // policy.model.vocabulary))


def _policy_loss(settings: PolicyGradientSettings, policy: Trained, tokens: int) -> float:
    """Return the bytes at the loss of a micro batch's response tokens."""
    chunk, trained = _in_chunk(policy, tokens), policy.part.head
    # The logits and a tensor in fp32, another one of scaled logits, and one for the entropy's gradient.
    copies = 8 + 4 * (settings.sampling.temperature != 1) + 4 * (settings.entropy_bonus > 0)
    # The head's gradient of a chunk is added to that of those before.
    added = policy.width * policy.model.vocabulary * policy.model.hidden if trained and chunk < tokens else 0
    return max(copies * chunk * policy.model.vocabulary, _head_work(policy, chunk, trained=trained)) + added


def _scoring(settings: PolicyGradientSettings, policy: Trained, texts: Texts, micro: int) -> Bytes:
    """Return the bytes that a pass without gradients computes."""
    rows = min(capacity.AT_ONCE * micro, math.ceil(settings.rollouts / settings.trainers))
    chunk = _in_chunk(policy, rows * texts.response)
    rows, time = (1, rows * texts.longest) if settings.packing else (rows, texts.longest)
    masked = policy.masked
    copies = _logit_width(policy) + 8 + 4 * (settings.sampling.temperature != 1)
    return {
        "weights": policy.gathered,
        "activations": footprint.work(policy.model, policy.width, rows, time, backward=False, masked=masked),
        "logits": max(copies * chunk * policy.model.vocabulary, _head_work(policy, chunk)),
    }


def _part_of_copy(policy: Trained, whole: float, ranks: int) -> float:
    """Return the bytes of a rank's part of a copy; norms are whole on each rank."""
    model = policy.model
    norms = policy.width * model.layers * model.norms * model.hidden
    return norms + (whole - norms) / ranks


def _rows(
    settings: PolicyGradientSettings, policy: Trained, texts: Texts, *, gpu: bool, together: int = 1
) -> tuple[int, float]:
    """Return the rows that a rank samples at a time where memory allows, and the bytes of a row's keys and values.

    together  ranks that answer the same prompts
    """
    most = capacity.ROWS_ON_GPU if gpu else capacity.ROWS_ON_CPU
    places = capacity.rounded(texts.longest - 1, capacity.COLUMNS_ON_GPU if gpu else capacity.COLUMNS_ON_CPU)
    rows = min(most, math.ceil(settings.rollouts * together / settings.trainers))
    keys = policy.model.layers * 2 * policy.model.keys * policy.width / together
    return rows, (places + policy.part.tokens) * keys


def _sampling(policy: Trained, texts: Texts, rows: int, cache: float, *, gpu: bool) -> Bytes:
    """Return the bytes of the cache of all rows, and of what reading prompts and drawing tokens computes."""
    model, prompt = policy.model, max(1, texts.longest - texts.response)
    at_once = capacity.TOKENS_ON_GPU if gpu else capacity.TOKENS_ON_CPU
    read = min(rows, max(1, at_once // prompt))
    keys = read * prompt * model.layers * 2 * model.keys * policy.width
    logits = max(capacity.LOGIT_BYTES * rows * model.vocabulary, _head_work(policy, rows))
    work = keys + footprint.work(model, policy.width, read, prompt, backward=False)
    return {"generation": cache * rows, "activations": work, "logits": logits}


def _sum(*parts: Bytes) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in PARTS}
