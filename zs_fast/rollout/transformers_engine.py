"""The embedded engine: continuous batching over the plain transformers module that the trainer updates.

Weights are shared by construction: the engine holds the very module. A step packs the next token of every running
sequence and pieces of new prompts into one [1, T] forward of the decoder, without padding or masks between them; keys
and values live in preallocated slots and stay there between the turns of a trajectory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.load import LoadedModel
from zs_fast.rollout.fixed_blocks import FixedBlocks, round_up_rows
from zs_fast.rollout.kv_slots import Context, KvSlots, Piece, SlotAttention
from zs_fast.rollout.sampler import sample_tokens
from zs_fast.rollout.stop import StopStrings, eos_token_ids
from zs_fast.search.codec import Codec
from zs_fast.types import Completion, FinishReason, Role, Sampling

PIECE_TOKENS = 256
"""Longest piece of a prompt that goes through attention in one call."""
PREFILL_TOKENS = 512
"""Prompt tokens per step and model, beyond which further pieces wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts of one role since the engine was made."""

    prefill_tokens: int = 0
    """Prompt tokens computed, those computed again after an eviction or a weight update included."""
    decode_tokens: int = 0
    """Tokens sampled."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were still there."""
    evictions: int = 0
    """Kept contexts that lost their slot to a waiting request."""
    steps: int = 0
    """Forwards."""


@dataclass(slots=True, eq=False)
class _Request:
    """One unfinished request: queued while its context has no slot, else running."""

    request_id: int
    prompt_ids: list[int]
    sampling: Sampling
    cache_salt: str | None
    policy_version: int
    context: Context
    sampled_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    plan: deque[tuple[int, int]] = field(default_factory=deque)
    """Pieces still to go through the model; the last one ends with the last known token."""

    def token_ids(self, start: int, end: int) -> list[int]:
        split = len(self.prompt_ids)
        if start >= split:
            return self.sampled_ids[start - split : end - split]
        return self.prompt_ids[start:end] + self.sampled_ids[: max(0, end - split)]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.sampled_ids)


class TransformersEngine:
    """Engine over one loaded model per role (one model may serve several roles); see the Engine protocol.

    With `batch_invariant` a request's tokens and log-probabilities are, bit for bit, a function of the weights, its
    own prompts and its Sampling: other rows, slots, arrival order and evictions don't matter (CPU, fixed thread count).
    None turns it on for models on the CPU.
    """

    def __init__(
        self,
        models: Mapping[Role, LoadedModel],
        *,
        slots: int,
        max_context_tokens: Mapping[Role, int] | int,
        batch_invariant: bool | None = None,
    ) -> None:
        if slots < 1:
            raise EngineError(f"engine.slots is {slots}; at least 1 is needed.")
        self._lanes: dict[Role, _Lane] = {}
        self._version = 0
        for role, loaded in models.items():
            limit = max_context_tokens if isinstance(max_context_tokens, int) else max_context_tokens[role]
            on_cpu = next(loaded.model.parameters()).device.type == "cpu"
            invariant = on_cpu if batch_invariant is None else batch_invariant
            self._lanes[role] = _Lane(role, loaded, num_slots=slots, max_tokens=limit, batch_invariant=invariant)

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        self._lane(role).add(request_id, prompt_ids, sampling, cache_salt, self._version)

    def step(self) -> list[Completion]:
        return [completion for lane in self._lanes.values() for completion in lane.step()]

    def end(self, role: Role, cache_salt: str) -> None:
        self._lane(role).end(cache_salt)

    def publish(self, version: int) -> None:
        self._version = version
        for lane in self._lanes.values():
            lane.forget_kv()

    def release_kv(self) -> int:
        busy = {role: lane.num_unfinished for role, lane in self._lanes.items() if lane.num_unfinished}
        if busy:
            counts = ", ".join(f"{count} of {role}" for role, count in busy.items())
            raise EngineError(f"release_kv with unfinished requests ({counts}). Step until they are finished.")
        for lane in self._lanes.values():
            lane.forget_kv()
        return sum(lane.slots.release() for lane in self._lanes.values())

    def acquire_kv(self) -> None:
        for lane in self._lanes.values():
            lane.slots.allocate()

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.slots.release()
        self._lanes = {}

    def stats(self) -> dict[Role, EngineStats]:
        """Counts per role since the engine was made."""
        return {role: lane.stats() for role, lane in self._lanes.items()}

    def module(self, role: Role) -> PreTrainedModel:
        """The module that samples for `role`: the very one that was passed in."""
        return self._lane(role).model

    @property
    def num_unfinished(self) -> int:
        return sum(lane.num_unfinished for lane in self._lanes.values())

    def _lane(self, role: Role) -> _Lane:
        if role not in self._lanes:
            have = ", ".join(self._lanes) or "none (it is closed)"
            raise EngineError(f"This engine has no model for role {role!r}; its roles: {have}.")
        return self._lanes[role]


class _Lane:
    """One role's requests, slots and forwards."""

    def __init__(
        self, role: Role, loaded: LoadedModel, *, num_slots: int, max_tokens: int, batch_invariant: bool
    ) -> None:
        config = loaded.model.config
        positions = config.max_position_embeddings
        if max_tokens > positions:
            raise PreflightError(
                f"The {role} may need contexts of {max_tokens} tokens, but model {loaded.name!r} knows {positions} "
                "positions. Lower game.max_context_tokens (for a simulator: max_new_tokens), or take another model."
            )
        parameter = next(loaded.model.parameters())
        self._role = role
        self.model = loaded.model
        self._decoder = loaded.model.get_decoder()
        self._lm_head = loaded.model.get_output_embeddings()
        self._vocab_size = len(loaded.tokenizer)
        codec = Codec(loaded.tokenizer, chat_template=True)
        self._eos_ids = eos_token_ids(loaded, codec)
        self._stop_strings = StopStrings(codec)
        self._max_tokens = max_tokens
        self._blocks = FixedBlocks(loaded.model) if batch_invariant else None
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
        self._free = list(range(num_slots))[::-1]
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._request_ids: set[int] = set()
        self._contexts: dict[str, Context] = {}
        self._clock = 0
        self._counts = dict.fromkeys(("prefill_tokens", "decode_tokens", "reused_tokens", "evictions", "steps"), 0)

    @property
    def num_unfinished(self) -> int:
        return len(self._request_ids)

    def stats(self) -> EngineStats:
        return EngineStats(**self._counts)

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, cache_salt: str | None, version: int
    ) -> None:
        needed = len(prompt_ids) + sampling.max_new_tokens - 1
        if not prompt_ids or sampling.max_new_tokens < 1 or needed > self._max_tokens:
            raise EngineError(
                f"Request {request_id} of {self._role} has a prompt of {len(prompt_ids)} tokens and asks for "
                f"{sampling.max_new_tokens} new ones; both must be at least 1, and together they may hold "
                f"{self._max_tokens + 1} (max_context_tokens + 1). Shorten the prompt or raise the limit."
            )
        if request_id in self._request_ids:
            raise EngineError(f"Request {request_id} of {self._role} was added twice before it finished.")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._decoder.embed_tokens.num_embeddings:
            raise EngineError(
                f"Request {request_id} of {self._role} holds token ids from {min(prompt_ids)} to {max(prompt_ids)}; "
                f"the model knows 0 to {self._decoder.embed_tokens.num_embeddings - 1}. Another tokenizer's ids?"
            )
        context = self._contexts.get(cache_salt) if cache_salt is not None else None
        context = context or Context()
        if context.busy:
            raise EngineError(
                f"Request {request_id} of {self._role} uses cache_salt {cache_salt!r}, whose last request is "
                "unfinished."
            )
        context.busy = True
        if cache_salt is not None:
            self._contexts[cache_salt] = context
        self._request_ids.add(request_id)
        self._waiting.append(_Request(request_id, list(prompt_ids), sampling, cache_salt, version, context))

    def end(self, cache_salt: str) -> None:
        context = self._contexts.pop(cache_salt, None)
        if context is None:
            return
        context.ended = True
        if not context.busy:
            self._free_slot(context)

    def forget_kv(self) -> None:
        """The weights changed: nothing stored may be used again. Running requests compute their tokens anew."""
        running = {id(request.context): request for request in self._running}
        for context in [*self._contexts.values(), *(request.context for request in self._running)]:
            request = running.get(id(context))
            if request is None:
                self._free_slot(context)
            else:
                start = context.bounds[-1]
                request.plan = deque([*context.pieces(), *(piece for piece in request.plan if piece[0] >= start)])
                context.token_ids, context.bounds = [], [0]

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """One forward for everything that can advance; what finished with it."""
        # Not torch.inference_mode: a module may keep a tensor made in here (rotary tables), and a later backward
        # would refuse it.
        self._clock += 1
        self._admit()
        scheduled = self._schedule()
        if not scheduled:
            return []
        self._counts["steps"] += 1
        with _eval_mode(self.model), self._blocks.active() if self._blocks else nullcontext():
            due, logits = self._forward(scheduled)
        if not due:
            return []
        ids, logprobs = sample_tokens(
            logits, [request.sampling for request in due], [len(request.sampled_ids) for request in due]
        )
        completions = []
        for request, token, logprob in zip(due, ids.tolist(), logprobs.tolist(), strict=True):
            reason = self._append(request, token, logprob)
            if reason is not None:
                completions.append(self._finish(request, reason))
        return completions

    def _admit(self) -> None:
        """Give slots to waiting requests: first to trajectories that were begun, then in order of arrival.

        A new trajectory may evict one that waits for its documents only while fewer than half of the slots are
        running: below that, idle slots cost more than computing a context again.
        """
        if not self._waiting:
            return
        self.slots.allocate()
        for begun in (True, False):
            for request in [r for r in self._waiting if bool(r.context.token_ids) == begun]:
                if request.context.slot is None:
                    half_idle = len(self._running) < max(1, self.slots.num_slots // 2)
                    slot = self._take_slot(may_evict=begun or half_idle)
                    if slot is None:
                        continue
                    request.context.slot = slot
                    kept = 0
                    request.context.keep_prefix(request.prompt_ids)
                    request.plan.extend(request.context.pieces())
                    replayed = request.context.bounds[-1]
                    request.context.token_ids, request.context.bounds = [], [0]
                else:
                    kept = replayed = request.context.keep_prefix(request.prompt_ids)
                self._counts["reused_tokens"] += kept
                total = len(request.prompt_ids)
                request.plan.extend(
                    (start, min(start + PIECE_TOKENS, total)) for start in range(replayed, total, PIECE_TOKENS)
                )
                self._waiting.remove(request)
                self._running.append(request)

    def _take_slot(self, *, may_evict: bool) -> int | None:
        """A free slot, else that of the least recently used idle context, which then has to be computed again."""
        if self._free:
            return self._free.pop()
        if not may_evict:
            return None
        idle = [context for context in self._contexts.values() if context.slot is not None and not context.busy]
        if not idle:
            return None
        oldest = min(idle, key=lambda context: context.last_used)
        slot, oldest.slot = oldest.slot, None
        self._counts["evictions"] += 1
        return slot

    def _free_slot(self, context: Context) -> None:
        if context.slot is not None:
            self._free.append(context.slot)
            context.slot = None

    def _schedule(self) -> list[tuple[_Request, list[tuple[int, int]]]]:
        """Pieces of this step: one sampled token of each running sequence, and prompts up to PREFILL_TOKENS."""
        scheduled = []
        budget = PREFILL_TOKENS
        for request in self._running:
            pieces: list[tuple[int, int]] = []
            while request.plan:
                start, end = request.plan[0]
                is_decode = start >= len(request.prompt_ids) and end == request.num_tokens
                if not is_decode:
                    if budget <= 0:
                        break
                    budget -= end - start
                    self._counts["prefill_tokens"] += end - start
                pieces.append(request.plan.popleft())
            if pieces:
                scheduled.append((request, pieces))
        return scheduled

    def _forward(self, scheduled: list[tuple[_Request, list[tuple[int, int]]]]) -> tuple[list[_Request], Tensor]:
        """Run the decoder; the requests whose next token is due, and their logits [R, tokenizer's vocabulary]."""
        self.slots.reserve(max(pieces[-1][1] for _, pieces in scheduled))
        pieces = []
        tokens: dict[Piece, list[int]] = {}
        for request, bounds in scheduled:
            for start, end in bounds:
                assert request.context.slot is not None and request.context.bounds[-1] == start
                piece = Piece(request.context.slot, start, end)
                pieces.append(piece)
                tokens[piece] = request.token_ids(start, end)
                request.context.token_ids.extend(tokens[piece])
                request.context.bounds.append(end)
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
        due = [request for request, _ in scheduled if not request.plan]
        rows = [last_row[request.context.slot, request.num_tokens] for request in due]
        if not due:
            return [], hidden[:0]
        if self._blocks:
            rows = rows + rows[:1] * (round_up_rows(len(rows)) - len(rows))
        logits = self._lm_head(hidden[torch.tensor(rows, device=self._device)])
        return due, logits[: len(due), : self._vocab_size]

    def _append(self, request: _Request, token: int, logprob: float) -> FinishReason | None:
        """Add one sampled token; why the request is finished with it, or None."""
        self._counts["decode_tokens"] += 1
        request.sampled_ids.append(token)
        request.logprobs.append(logprob)
        if token in self._eos_ids or self._stop_strings.completed(request.sampled_ids, request.sampling.stop):
            return FinishReason.STOP
        if len(request.sampled_ids) >= request.sampling.max_new_tokens:
            return FinishReason.LENGTH
        request.plan.append((request.num_tokens - 1, request.num_tokens))
        return None

    def _finish(self, request: _Request, reason: FinishReason) -> Completion:
        self._running.remove(request)
        self._request_ids.discard(request.request_id)
        request.context.busy = False
        request.context.last_used = self._clock
        if request.cache_salt is None or request.context.ended:
            self._free_slot(request.context)
        return Completion(
            request_id=request.request_id,
            role=self._role,
            token_ids=tuple(request.sampled_ids),
            logprobs=tuple(request.logprobs),
            finish_reason=reason,
            policy_version=request.policy_version,
        )


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
