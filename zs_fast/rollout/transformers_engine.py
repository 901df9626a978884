"""The embedded engine: continuous batching over the plain transformers module that the trainer updates.

Weights are shared by construction: the engine holds the very module. A step packs the next token of every running
sequence and pieces of new prompts into one forward of T tokens, without masks between them; keys and values live in
preallocated slots and stay there between the turns of a trajectory. On a CPU that forward is RowDecoder's, where it
knows the model, and roles on one base share it, each with its adapter; otherwise the module's own, over SlotAttention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.load import LoadedModel
from zs_fast.models.quantize import is_quantized
from zs_fast.rollout.engine import EngineStats
from zs_fast.rollout.fixed_blocks import FixedBlocks, round_up_rows
from zs_fast.rollout.kv_slots import KvSlots, Piece, SlotAttention
from zs_fast.rollout.row_decoder import DecoderRows, RowDecoder, logits_of, why_not
from zs_fast.rollout.sampler import sample_tokens
from zs_fast.rollout.scheduler import Request, Scheduled, Scheduler
from zs_fast.rollout.stop import StopStrings, eos_token_ids
from zs_fast.rollout.watch import EngineWatcher, Row
from zs_fast.search.codec import Codec
from zs_fast.types import Completion, FinishReason, Role, Sampling

Drawn = tuple[Request, int, float]
"""A request, its next token, and that one's log-probability."""


class TransformersEngine:
    """Engine over one loaded model per role (one model may serve several roles); see the Engine protocol.

    With `batch_invariant` a request's tokens and log-probabilities are, bit for bit, a function of the weights, its
    own prompts and its Sampling: other rows, slots, arrival order and evictions don't matter (CPU, fixed thread count).
    None turns it on for models on the CPU, unless they are quantised. It does so by the row operators, or without
    those in fixed blocks (`row_operators` false, or a model that they don't compute; true: such a model is refused).
    """

    def __init__(
        self,
        models: Mapping[Role, LoadedModel],
        *,
        slots: int,
        max_context_tokens: Mapping[Role, int] | int,
        batch_invariant: bool | None = None,
        row_operators: bool | None = None,
    ) -> None:
        if slots < 1:
            raise EngineError(f"engine.slots is {slots}; at least 1 is needed.")
        self._lanes: dict[Role, _Lane] = {}
        self._before_use: dict[Role, Callable[[], None]] = {}
        self._version = 0
        self.watcher: EngineWatcher | None = None
        """Is told of every request and forward."""
        for role, loaded in models.items():
            limit = max_context_tokens if isinstance(max_context_tokens, int) else max_context_tokens[role]
            packed = is_quantized(loaded.model)
            if packed and batch_invariant:
                raise PreflightError(
                    f"engine.batch_invariant is true, but model {loaded.name!r} is quantised, and its products "
                    "depend on the number of rows. Leave engine.batch_invariant or model.quantization out."
                )
            on_cpu = next(loaded.model.parameters()).device.type == "cpu"
            invariant = (on_cpu and not packed) if batch_invariant is None else batch_invariant
            by_rows = invariant if row_operators is None else row_operators
            if by_rows and (reason := why_not(loaded.model)):
                if row_operators:
                    raise PreflightError(f"row_operators is true, but model {loaded.name!r} can't be had so: {reason}.")
                by_rows = False
            self._lanes[role] = _Lane(
                role, loaded, num_slots=slots, max_tokens=limit, batch_invariant=invariant, by_rows=by_rows
            )
        self._together = _by_base(self._lanes.values())

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        lane = self._lane(role)
        if role in self._before_use:
            self._before_use[role]()
        lane.add(request_id, prompt_ids, sampling, cache_salt, self._version)
        if self.watcher is not None:
            self.watcher.added(role, request_id, len(prompt_ids))

    def step(self) -> list[Completion]:
        return [completion for lanes in self._together for completion in _step(lanes, self.watcher)]

    def end(self, role: Role, cache_salt: str) -> None:
        self._lane(role).scheduler.end(cache_salt)

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        for request_id in request_ids:
            self._lane(role).scheduler.abort(request_id)

    def publish(self, version: int) -> None:
        self._version = version
        for lane in self._lanes.values():
            lane.weights_changed()
        self._together = _by_base(self._lanes.values())

    def release_kv(self) -> int:
        busy = {role: lane.num_unfinished for role, lane in self._lanes.items() if lane.num_unfinished}
        if busy:
            counts = ", ".join(f"{count} of {role}" for role, count in busy.items())
            raise EngineError(f"release_kv with unfinished requests ({counts}). Step until they are finished.")
        for lane in self._lanes.values():
            lane.scheduler.forget_kv()
        return sum(lane.slots.release() for lane in self._lanes.values())

    def acquire_kv(self) -> None:
        for lane in self._lanes.values():
            lane.slots.allocate()

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.slots.release()
        self._lanes, self._together = {}, []

    def share_prefixes(self, on: bool) -> None:
        """Whether prompts that begin alike are computed once, where that changes no bits; so it is from the start."""
        for lane in self._lanes.values():
            lane.scheduler.shares_prefixes = on

    def before_use(self, role: Role, call: Callable[[], None]) -> None:
        self._before_use[role] = call

    def stats(self) -> dict[Role, EngineStats]:
        """Counts per role since the engine was made."""
        return {role: lane.stats() for role, lane in self._lanes.items()}

    def sampled_so_far(self, role: Role, request_id: int) -> list[int]:
        """The tokens of an unfinished request up to now; none for one that has not begun, or is finished."""
        return self._lane(role).scheduler.sampled_so_far(request_id)

    def eos_ids(self, role: Role) -> set[int]:
        """The token ids that end a completion; a benchmark that counts tokens empties the set."""
        return self._lane(role).eos_ids

    def module(self, role: Role) -> PreTrainedModel:
        """The module that samples for `role`: the very one that was passed in."""
        return self._lane(role).model

    def served(self, role: Role) -> dict[str, Tensor]:
        """Every tensor of the role's module."""
        model = self._lane(role).model
        return dict(model.named_parameters()) | dict(model.named_buffers())

    def copies(self, role: Role) -> bool:
        """Never: it samples with the trainer's own modules."""
        return False

    def copy_weights(self, role: Role) -> int:
        return 0

    def choices(self) -> list[str]:
        return []

    @property
    def num_unfinished(self) -> int:
        return sum(lane.num_unfinished for lane in self._lanes.values())

    def _lane(self, role: Role) -> _Lane:
        if role not in self._lanes:
            have = ", ".join(self._lanes) or "none (it is closed)"
            raise EngineError(f"This engine has no model for role {role!r}; its roles: {have}.")
        return self._lanes[role]


class _Lane:
    """One role's model, slots and forwards; the scheduler says what goes into the next one."""

    def __init__(
        self,
        role: Role,
        loaded: LoadedModel,
        *,
        num_slots: int,
        max_tokens: int,
        batch_invariant: bool,
        by_rows: bool,
    ) -> None:
        config = loaded.model.config
        positions = config.max_position_embeddings
        if max_tokens > positions:
            raise PreflightError(
                f"The {role} may need contexts of {max_tokens} tokens, but model {loaded.name!r} knows {positions} "
                "positions. Lower game.max_context_tokens (for a simulator: max_new_tokens), or take another model."
            )
        parameter = next(loaded.model.parameters())
        self.role = role
        self.model = loaded.model
        self._decoder = loaded.model.get_decoder()
        self._lm_head = loaded.model.get_output_embeddings()
        self._vocab_size = len(loaded.tokenizer)
        codec = Codec(loaded.tokenizer, chat_template=True)
        self.eos_ids = set(eos_token_ids(loaded, codec))
        self._stop_strings = StopStrings(codec)
        self._max_tokens = max_tokens
        self._blocks = FixedBlocks(loaded.model) if batch_invariant and not by_rows else None
        self._device = parameter.device
        self.slots = KvSlots(
            num_layers=config.num_hidden_layers,
            num_slots=num_slots,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_tokens=max_tokens,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        self._rows = RowDecoder(loaded.model, self.slots, self._vocab_size) if by_rows else None
        # In blocks a token's bits depend on the pieces that its sequence came in, which a copy would change.
        self.scheduler = Scheduler(role, num_slots, None if self._blocks else self.slots.copy_prefix)
        self._decode_tokens = 0
        self._steps = 0

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    def weights_changed(self) -> None:
        """Nothing computed before is found again."""
        self.scheduler.forget_kv()
        if self._rows is not None:
            self._rows.find_modules()

    def stats(self) -> EngineStats:
        return EngineStats(decode_tokens=self._decode_tokens, steps=self._steps, **self.scheduler.counts)

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, cache_salt: str | None, version: int
    ) -> None:
        needed = len(prompt_ids) + sampling.max_new_tokens - 1
        if not prompt_ids or sampling.max_new_tokens < 1 or needed > self._max_tokens:
            raise EngineError(
                f"Request {request_id} of {self.role} has a prompt of {len(prompt_ids)} tokens and asks for "
                f"{sampling.max_new_tokens} new ones; both must be at least 1, and together they may hold "
                f"{self._max_tokens + 1} (max_context_tokens + 1). Shorten the prompt or raise the limit."
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._decoder.embed_tokens.num_embeddings:
            raise EngineError(
                f"Request {request_id} of {self.role} holds token ids from {min(prompt_ids)} to {max(prompt_ids)}; "
                f"the model knows 0 to {self._decoder.embed_tokens.num_embeddings - 1}. Another tokenizer's ids?"
            )
        self.scheduler.add(request_id, prompt_ids, sampling, cache_salt, version)

    def allocate(self) -> None:
        """The slots, where requests wait for some."""
        if self.scheduler.num_waiting:
            self.slots.allocate()

    def make_room(self, scheduled: list[Scheduled]) -> None:
        """For the keys and values of the tokens that were scheduled."""
        self.slots.reserve(max(pieces[-1][1] for _, pieces in scheduled))

    def shares_forwards_with(self, other: _Lane) -> bool:
        """Do the row operators compute both, over the same base weights?"""
        return self._rows is not None and other._rows is not None and self._rows.stands_on_the_base_of(other._rows)

    @property
    def by_rows(self) -> bool:
        return self._rows is not None

    def feed_rows(self, scheduled: list[Scheduled]) -> DecoderRows:
        """The tokens that were scheduled, which their contexts hold from now on, for `logits_of`."""
        assert self._rows is not None
        rows = DecoderRows(decoder=self._rows, input_ids=[], slots=[], positions=[], due=[])
        for request, bounds in scheduled:
            slot = request.context.slot
            assert slot is not None
            for start, end in bounds:
                rows.input_ids.extend(_feed(request, start, end))
                rows.positions.extend(range(start, end))
                rows.slots.extend([slot] * (end - start))
            if not request.plan:
                rows.due.append(len(rows.input_ids) - 1)
        return rows

    def feed_module(self, scheduled: list[Scheduled]) -> Tensor:
        """The same into the module itself: logits [R, tokenizer's vocabulary] of the requests that are due."""
        with self._blocks.active() if self._blocks else nullcontext():
            return self._forward(scheduled)

    def draw(self, scheduled: list[Scheduled], logits: Tensor) -> list[Drawn]:
        """A token for each request that is due."""
        due = _due(scheduled)
        if not due:
            return []
        ids, logprobs = sample_tokens(
            logits, [request.sampling for request in due], [len(request.sampled_ids) for request in due]
        )
        return list(zip(due, ids.tolist(), logprobs.tolist(), strict=True))

    def take(self, drawn: list[Drawn]) -> list[Completion]:
        """The requests go on with their tokens; what finished with it."""
        self._steps += 1
        completions = []
        for request, token, logprob in drawn:
            reason = self._append(request, token, logprob)
            if reason is not None:
                completions.append(self._finish(request, reason))
        return completions

    def _forward(self, scheduled: list[Scheduled]) -> Tensor:
        due = _due(scheduled)
        pieces = []
        tokens: dict[Piece, list[int]] = {}
        for request, bounds in scheduled:
            for start, end in bounds:
                assert request.context.slot is not None
                piece = Piece(request.context.slot, start, end)
                pieces.append(piece)
                tokens[piece] = _feed(request, start, end)
        num_tokens = sum(piece.num_tokens for piece in pieces)
        padded = round_up_rows(num_tokens) if self._blocks else num_tokens
        state = SlotAttention(self.slots, pieces, padded, batched=self._blocks is None and self._device.type != "cpu")
        input_ids: list[int] = []
        last_row: dict[tuple[int, int], int] = {}
        for piece in state.pieces:
            input_ids.extend(tokens[piece])
            last_row[piece.slot, piece.end] = len(input_ids) - 1
        input_ids.extend([0] * state.num_padding)
        hidden = self._decoder(
            input_ids=torch.tensor([input_ids], device=self._device),
            position_ids=state.position_ids[None],
            use_cache=False,
            attention_state=state,
        ).last_hidden_state[0]
        rows = [
            last_row[request.context.slot, request.num_tokens] for request in due if request.context.slot is not None
        ]
        if not due:
            return hidden[:0]
        if self._blocks:
            rows = rows + rows[:1] * (round_up_rows(len(rows)) - len(rows))
        logits: Tensor = self._lm_head(hidden[torch.tensor(rows, device=self._device)])
        return logits[: len(due), : self._vocab_size]

    def _append(self, request: Request, token: int, logprob: float) -> FinishReason | None:
        """Add one sampled token; why the request is finished with it, or None."""
        self._decode_tokens += 1
        request.sampled_ids.append(token)
        request.logprobs.append(logprob)
        if token in self.eos_ids or self._stop_strings.completed(request.sampled_ids, request.sampling.stop):
            return FinishReason.STOP
        if len(request.sampled_ids) >= request.sampling.max_new_tokens:
            return FinishReason.LENGTH
        request.plan.append((request.num_tokens - 1, request.num_tokens))
        return None

    def _finish(self, request: Request, reason: FinishReason) -> Completion:
        self.scheduler.finish(request)
        return Completion(
            request_id=request.request_id,
            role=self.role,
            token_ids=tuple(request.sampled_ids),
            logprobs=tuple(request.logprobs),
            finish_reason=reason,
            policy_version=request.policy_version,
        )


def _by_base(lanes: Iterable[_Lane]) -> list[list[_Lane]]:
    """The lanes whose tokens share a forward, in order."""
    together: list[list[_Lane]] = []
    for lane in lanes:
        mates = next((mates for mates in together if mates[0].shares_forwards_with(lane)), None)
        if mates is None:
            together.append([lane])
        else:
            mates.append(lane)
    return together


@torch.no_grad()
def _step(lanes: Sequence[_Lane], watcher: EngineWatcher | None) -> list[Completion]:
    """One forward for everything of these lanes that can advance; what finished with it."""
    # Not torch.inference_mode: a module may keep a tensor made in here (rotary tables), and a later backward would
    # refuse it.
    for lane in lanes:
        lane.allocate()
    work = [(lane, scheduled) for lane in lanes if (scheduled := lane.scheduler.next_pieces())]
    if not work:
        return []
    with ExitStack() as stack:
        for lane, scheduled in work:
            stack.enter_context(_eval_mode(lane.model))
            if watcher is not None:
                stack.enter_context(watcher.forward(lane.role, _rows(scheduled)))
        try:
            drawn = _forward_and_draw(work)
        except BaseException:
            for lane, scheduled in work:
                lane.scheduler.put_back(scheduled)
            raise
        completions = [one for lane, of_lane in drawn for one in lane.take(of_lane)]
    if watcher is not None:
        for completion in completions:
            watcher.finished(completion.role, completion.request_id, len(completion.token_ids))
    return completions


def _forward_and_draw(work: Sequence[tuple[_Lane, list[Scheduled]]]) -> list[tuple[_Lane, list[Drawn]]]:
    for lane, scheduled in work:
        lane.make_room(scheduled)
    if all(lane.by_rows for lane, _ in work):
        logits = logits_of([lane.feed_rows(scheduled) for lane, scheduled in work])
    else:
        logits = [lane.feed_module(scheduled) for lane, scheduled in work]
    return [(lane, lane.draw(scheduled, own)) for (lane, scheduled), own in zip(work, logits, strict=True)]


def _due(scheduled: Sequence[Scheduled]) -> list[Request]:
    """Those whose whole context is computed with this step: each gets a token."""
    return [request for request, _ in scheduled if not request.plan]


def _feed(request: Request, start: int, end: int) -> list[int]:
    """The tokens start .. end of a request, which its context holds from now on."""
    context = request.context
    assert context.bounds[-1] == start
    token_ids = request.token_ids(start, end)
    context.token_ids.extend(token_ids)
    context.bounds.append(end)
    return token_ids


def _rows(scheduled: list[Scheduled]) -> list[Row]:
    rows = []
    for request, pieces in scheduled:
        last = request.num_tokens
        decodes = bool(request.sampled_ids) and pieces[-1] == (last - 1, last)
        tokens = sum(end - start for start, end in pieces)
        rows.append(Row(request.request_id, tokens - decodes, decodes))
    return rows


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Sampling never sees dropout or gradient checkpointing; a trainer that left train mode on finds it on again."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
