"""Decode responses in slots: rows of a cache of fixed size, each with a position of its own.

Tokens lie at places 0 … n - 1 of their slot, so that nothing is padded. A step runs the model on every row's last
token, draws the next and writes it down, all on the device. On CUDA a step is captured as a graph, one for each number
of rows and of places that are read; on a CPU the same step runs as it is. The host looks now and then which rows have
ended: their slots take prompts that wait, and when none wait, the rows close up, so that a step has fewer.

A prompt's last token goes through the first step; the tokens before it are read once for all slots with that prompt.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.attempt import liveness
from rlhf.errors import PreflightError, size
from rlhf.models import capacity, text, varlen
from rlhf.models.heads import body_of, unwrapped
from rlhf.models.packable import keeps_texts_apart
from rlhf.models.splitting import Peers
from rlhf.models.virtual_tokens import has_virtual_tokens
from rlhf.rollout import grouped
from rlhf.rollout.drawing import Responses, drawn
from rlhf.rollout.slots import LayerShape, Space

UNPACKED = frozenset({"opt"})
"""Model types that decode in slots beside those that keep texts of one row apart, each with a test."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Settings of a mixture of experts, whose layers ask the device which experts have tokens: no graph can hold that."""
UNCAPTURED = frozenset({"falcon"})
"""Types that pick heads by a list of numbers, which is copied from the host at each step: no graph can hold that."""
FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Rotary embeddings that do not follow from the longest text of the batch."""
SHARE = 0.7
"""Of a GPU's free memory, for the cache and the logits; the rest is for activations."""


def decodes_in_slots(model: Any) -> bool:
    """Return whether a causal language model, PEFT's wrapper included, gives the same tokens in slots as alone."""
    plain = unwrapped(model)
    return (
        _suits_slots(plain.config)
        and plain.config._attn_implementation in ("sdpa", "eager", varlen.NAME)
        and not has_virtual_tokens(body_of(plain)[1])
    )


def has_graphs(config: Any) -> bool:
    """Return whether on CUDA the steps of a model with this configuration of transformers' are graphs.

    A step without one takes six times as long, since the GPU waits for the host.
    """
    return (
        _suits_slots(config)
        and config.model_type not in UNCAPTURED
        and not any(getattr(config, name, None) for name in EXPERTS)
        and getattr(config, "quantization_config", None) is None
    )


def _suits_slots(config: Any) -> bool:
    known = keeps_texts_apart(config) or config.model_type in UNPACKED
    return known and _rope_types(config) <= FIXED_ROPE


def _rope_types(config: Any) -> set[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {one["rope_type"] for one in settings if "rope_type" in one}


@dataclass(frozen=True)
class Pace:
    """How often the host looks at the device, and what sizes a step has."""

    steps: int
    """Steps between two looks."""
    late: bool
    """Whether a look sees the state of the look before, so that the device never waits for the host."""
    any_size: bool
    """Whether a step may have any number of rows; otherwise 1, 2, 3, 4, 6, 8, 12, …"""
    columns: int
    """The cache's columns are read in multiples of this."""
    tokens: int
    """Most tokens of prompts that are read at a time, where one has no more."""

    def rows(self, count: int) -> int:
        """Return the number of rows of a step for ``count`` slots."""
        if self.any_size:
            return count
        power = 1 << (count - 1).bit_length()
        return 3 * power // 4 if power > 2 and count <= 3 * power // 4 else power

    def length(self, columns: int, *, few_rows: bool = False) -> int:
        """Return how many columns are read where ``columns`` are needed.

        few_rows  whether so little is read that a graph for each length is not worth its making
        """
        wanted = capacity.rounded(columns, self.columns)
        return self.columns * self.rows(wanted // self.columns) if few_rows else wanted


ON_CPU = Pace(1, late=False, any_size=True, columns=capacity.COLUMNS_ON_CPU, tokens=capacity.TOKENS_ON_CPU)
ON_GPU = Pace(16, late=True, any_size=False, columns=capacity.COLUMNS_ON_GPU, tokens=capacity.TOKENS_ON_GPU)


class Drawing(NamedTuple):
    """What tokens are drawn by: constants of a graph."""

    temperature: float
    eos: int


class Decoder:
    """Samples responses from a model that :func:`decodes_in_slots`.

    Graphs and a small cache stay for the next call, as long as the model's weights stay where they are.

    peers  of a model that is split, whose steps are no graphs: all its ranks must sample the same
    """

    def __init__(
        self,
        model: Any,
        pace: Pace | None = None,
        most_rows: int | None = None,
        *,
        use_grouped: bool | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._model = unwrapped(model)
        _, self._body = body_of(self._model)
        self._device: torch.device = model.device
        on_gpu = self._device.type == "cuda"
        self._pace = pace or (ON_GPU if on_gpu else ON_CPU)
        self._most_rows = most_rows or (capacity.ROWS_ON_GPU if on_gpu else capacity.ROWS_ON_CPU)
        self._peers = peers
        self._captures = on_gpu and peers is None and has_graphs(self._model.config)
        self._space: Space | None = None
        self._key: tuple[Any, ...] = ()
        self._probe()
        heads = self._model.config.num_attention_heads // (1 if peers is None else peers.ranks)
        self._grouped = grouped.fits(self._model) and (
            grouped.computes(heads, self._shapes, self._dtype, self._device) if use_grouped is None else use_grouped
        )

    @torch.no_grad()
    def _probe(self) -> None:
        """Learn from one pass what a cache of the model holds, and which tokens it gives no probability."""
        cache = DynamicCache()
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        inputs = {"input_ids": token, "position_ids": token, "use_cache": True}
        logits = self._model(**inputs, cache=cache).logits[0, -1]
        layers: list[Any] = cache.layers
        self._shapes = [
            LayerShape((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
            for layer in layers
        ]
        self._dtype: torch.dtype = layers[0].keys.dtype
        # A step calls the model's forward pass without its hooks: the one that forbids these rows of the head copies
        # their numbers to the device each time, which no graph can hold.
        self._forbidden = logits.isneginf().nonzero().squeeze(-1)
        without = self._model.forward(**inputs, cache=DynamicCache()).logits[0, -1]
        without = without.index_fill(-1, self._forbidden, -torch.inf)
        assert torch.allclose(logits, without, atol=1e-3, rtol=1e-3), "a hook changes the logits"
        self._vocabulary = len(logits)
        self._unseen = torch.full((), -torch.inf, dtype=self._dtype, device=self._device)
        self._seen = torch.zeros_like(self._unseen)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[list[int]], numbers: Tensor, temperature: float, *, eos_token_id: int, pad: int
    ) -> Responses:
        """Sample a response to each prompt, as :func:`rlhf.rollout.sampling.sample_responses`."""
        drawing = Drawing(temperature, eos_token_id)
        space = self._space_for(len(prompts), numbers.shape[1], max(map(len, prompts)), drawing)
        space.begin(numbers, pad)
        _Call(self, space, drawing, prompts, self._pace).run()
        count = len(prompts)
        responses = Responses(space.ids[:count, :-1].cpu(), space.logprobs[:count, :-1].cpu())
        if not self._captures or space.bytes > capacity.KEPT:
            self._space = None
        return responses

    def _space_for(self, samples: int, time: int, prompt: int, drawing: Drawing) -> Space:
        """Return the slots of the last call where they have room and the weights are where they were."""
        weights = [*self._model.parameters(), *self._model.buffers()]
        key = (time, drawing, tuple(weight.data_ptr() for weight in weights))
        # The last token of all is drawn and never read.
        length = self._pace.length(prompt + time - 1)
        space = self._space
        if space is None or key != self._key or space.samples < samples or space.length < length:
            self._space = space = None  # before the next is made
            sizes = {"samples": samples, "time": time, "length": length}
            space = Space(self._shapes, self._dtype, self._device, slots=self._rows(samples, length), **sizes)
            self._space, self._key = space, key
        return space

    def _rows(self, samples: int, length: int) -> int:
        """Return the number of slots: as many as there are samples, or as fit.

        Raises:
            PreflightError: not one fits.
        """
        wanted = min(samples, self._most_rows)
        if self._device.type != "cuda":
            return wanted
        free = torch.cuda.mem_get_info(self._device)[0]
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if self._peers is not None:
            free = self._peers.least(free, self._device)
        place = sum(heads * width for shape in self._shapes for heads, width in shape) * self._dtype.itemsize
        logits = capacity.LOGIT_BYTES * self._vocabulary
        room = int(SHARE * free)
        if room < place * length + logits:
            fit = max(0, (room - logits) // place // self._pace.columns * self._pace.columns)
            raise PreflightError(
                f"sampling one response needs {size(place * length + logits)} for the keys and values of {length} "
                f"tokens, and {size(free)} of the GPU are free",
                "sampling.max_new_tokens",
                f"prompts and responses of {fit} tokens together fit: lower max_new_tokens by {length - fit}, or take "
                "more ranks or a larger GPU",
            )
        return min(wanted, room // (place * length + logits))

    def read(self, space: Space, rows: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> None:
        """Write the keys and values of texts into slots, each text into its own.

        rows   token ids, of equal length or nearly so: they are padded on the right, where no token sees padding
        slots  of each text
        """
        ids = text.pad(rows, 0, "right")[0].to(self._device)
        cache = DynamicCache()  # without a configuration, so that layers with a window keep all
        positions = space.columns[None, : ids.shape[1]].expand(len(rows), -1)
        self._body(input_ids=ids, position_ids=positions, cache=cache, use_cache=True)
        sources = self.indices([row for row, targets in enumerate(slots) for _ in targets])
        layers: list[Any] = cache.layers
        targets = self.indices([slot for targets in slots for slot in targets])
        space.copy(targets, [(layer.keys, layer.values) for layer in layers], sources)

    def indices(self, values: Sequence[Any]) -> Tensor:
        """Return integers as a tensor on the device, without waiting for the device."""
        return torch.tensor(values, dtype=torch.long, pin_memory=self._device.type == "cuda").to(
            self._device, non_blocking=True
        )

    def advance(self, space: Space, drawing: Drawing, rows: int, length: int, steps: int) -> None:
        """Take steps with the first ``rows`` slots, reading the first ``length`` places."""
        length = min(length, space.length)
        if not self._captures:
            for _ in range(steps):
                self.step(space, drawing, rows, length)
            return
        if (rows, length) not in space.graphs:
            self._capture(space, drawing, rows, length)
            steps -= 1
        for _ in range(steps):
            space.graphs[rows, length].replay()

    def _capture(self, space: Space, drawing: Drawing, rows: int, length: int) -> None:
        """Take one step, which loads what the device still lacks, and record the same step as a graph."""
        if space.pool is None:
            space.pool = torch.cuda.graph_pool_handle()
            space.aside = torch.cuda.Stream(self._device)
        present, aside = torch.cuda.current_stream(self._device), space.aside
        aside.wait_stream(present)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            self.step(space, drawing, rows, length)
            aside.synchronize()
            # torch.cuda.graph would collect garbage and give memory back each time. Other threads may use the device.
            graph.capture_begin(pool=space.pool, capture_error_mode="thread_local")
            try:
                self.step(space, drawing, rows, length)
            finally:
                graph.capture_end()
        present.wait_stream(aside)
        space.graphs[rows, length] = graph

    def step(self, space: Space, drawing: Drawing, rows: int, length: int) -> None:
        """Draw the next token of each row. Nothing here may wait for the device or copy from the host."""
        token, position, written, sample, running = space.state[:, :rows].unbind(0)
        space.reach.move_to(position, length)
        with grouped.attending(self._model) if self._grouped else nullcontext():
            logits = self._model.forward(
                input_ids=token[:, None],
                attention_mask=self._masks(space.columns[:length], position),
                position_ids=position[:, None],
                cache=space.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        if len(self._forbidden):
            logits = logits.index_fill(-1, self._forbidden, -torch.inf)
        tokens, logprobs = drawn(logits, space.numbers[sample, written], drawing.temperature)
        space.ids[sample, written], space.logprobs[sample, written] = tokens, logprobs
        token.copy_(tokens)
        written.add_(running)
        ended = (tokens == drawing.eos) | (written == space.time)
        running.masked_fill_(ended, 0)
        position.add_(running)  # not of a row that has ended: there may be no further place
        sample.masked_fill_(ended, space.samples)  # what else the row draws is nobody's

    def _masks(self, columns: Tensor, position: Tensor) -> Any:
        """Return what is added to attention's products, ``[row, 1, 1, column]``, for each type of layer."""
        config = self._model.config
        window = getattr(config, "sliding_window", None)
        seen = columns <= position[:, None]
        masks = {"full_attention": self._added(seen)}
        if window:
            masks["sliding_attention"] = self._added(seen & (columns > position[:, None] - window))
        if getattr(config, "layer_types", None):
            return masks
        return masks.get("sliding_attention", masks["full_attention"])

    def _added(self, seen: Tensor) -> Tensor:
        return torch.where(seen, self._seen, self._unseen)[:, None, None]


class _Look(NamedTuple):
    """A copy of which slots run, on its way to the host."""

    samples: list[int | None]
    running: Tensor
    arrived: Any


class _Call:
    """The host's part of a call: which sample is in which slot."""

    def __init__(
        self, decoder: Decoder, space: Space, drawing: Drawing, prompts: Sequence[list[int]], pace: Pace
    ) -> None:
        self._decoder, self._space, self._drawing, self._prompts, self._pace = decoder, space, drawing, prompts, pace
        # The longest are last, and are taken first. Equal prompts stand together, and are read once.
        self._waiting = sorted(range(len(prompts)), key=lambda sample: (len(prompts[sample]), prompts[sample]))
        self._slots: list[int | None] = [None] * space.slots
        self._steps: dict[int, int] = {}
        """Steps of the samples that are in slots."""
        self._looks: list[_Look] = []

    def run(self) -> None:
        """Answer all prompts."""
        while self._waiting or self._steps:
            self._admit()
            self._close_up()
            self._advance()
            self._look()
            liveness.beat()

    def _admit(self) -> None:
        """Let waiting prompts into free slots, an eighth of the slots at a time, since each pass has its price."""
        free = [slot for slot, sample in enumerate(self._slots) if sample is None]
        enough = min(len(self._waiting), max(1, len(self._slots) // 8))
        if not self._waiting or len(free) < enough:
            return
        taken = {slot: self._waiting.pop() for slot in free[: len(self._waiting)]}
        for slot, sample in taken.items():
            self._slots[slot], self._steps[sample] = sample, 0
        self._read(taken)
        prompts = {slot: self._prompts[sample] for slot, sample in taken.items()}
        states = [[prompt[-1], len(prompt) - 1, 0, taken[slot], 1] for slot, prompt in prompts.items()]
        indices = self._decoder.indices
        self._space.put(indices(list(taken)), indices(list(zip(*states, strict=True))))

    def _read(self, taken: dict[int, int]) -> None:
        """Read the prompts of slots, but for their last tokens, equal ones once and the longest first."""
        texts: dict[tuple[int, ...], list[int]] = {}
        for slot, sample in taken.items():
            texts.setdefault(tuple(self._prompts[sample][:-1]), []).append(slot)
        texts.pop((), None)
        rows = sorted(texts, key=len, reverse=True)
        while rows:
            count = max(1, self._pace.tokens // len(rows[0]))
            part, rows = rows[:count], rows[count:]
            self._decoder.read(self._space, part, [texts[row] for row in part])

    def _close_up(self) -> None:
        """Move the last slots' rows into free ones, where a step then has fewer rows."""
        taken = [slot for slot, sample in enumerate(self._slots) if sample is not None]
        if self._waiting or not taken:
            return
        rows = self._pace.rows(len(taken))
        sources = [slot for slot in taken if slot >= rows]
        if not sources:
            return
        targets = [slot for slot in range(rows) if self._slots[slot] is None][: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            self._slots[source], self._slots[target] = None, self._slots[source]
        self._space.move(self._decoder.indices(sources), self._decoder.indices(targets))

    def _advance(self) -> None:
        time = self._space.time
        last = max(slot for slot, sample in enumerate(self._slots) if sample is not None)
        rows = min(self._pace.rows(last + 1), len(self._slots))
        steps = min(self._pace.steps, time - min(self._steps.values()))
        longest = max(len(self._prompts[sample]) + min(time, made + steps) for sample, made in self._steps.items())
        length = self._pace.length(longest - 1, few_rows=4 * rows <= len(self._slots))
        self._decoder.advance(self._space, self._drawing, rows, length, steps)
        self._steps = {sample: made + steps for sample, made in self._steps.items()}

    def _look(self) -> None:
        """Free the slots of samples that have ended: at the limit, or as the device said by now."""
        ended = {sample for sample, made in self._steps.items() if made >= self._space.time}
        running = self._space.state[4]
        arrived = None
        if running.device.type == "cuda":
            copy = torch.empty(running.shape, dtype=running.dtype, pin_memory=True)
            running = copy.copy_(running, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            running = running.clone()
        self._looks.append(_Look(list(self._slots), running, arrived))
        if len(self._looks) > int(self._pace.late):
            look = self._looks.pop(0)
            if look.arrived is not None:
                look.arrived.synchronize()
            pairs = zip(look.samples, look.running.tolist(), strict=True)
            ended |= {sample for sample, runs in pairs if sample is not None and not runs}
        for slot, sample in enumerate(self._slots):
            if sample in ended:
                self._slots[slot] = None
                self._steps.pop(sample)
