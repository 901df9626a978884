"""Rollouts by vLLM in this process, over the very weights that the trainer updates.

One vLLM engine per distinct model; all roles of a step advance together, and a completion's end is decided by the same
rules as in the embedded engine. Token ids go in and come out as they are: vLLM has no tokenizer here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.load import LoadedModel
from zs_fast.rollout.engine import EngineStats
from zs_fast.rollout.stop import StopStrings, eos_token_ids
from zs_fast.rollout.vllm_core import MIN_TEMPERATURE, Finished, check_device
from zs_fast.rollout.vllm_kv import CpuKv, CudaKv
from zs_fast.rollout.vllm_model import ServedModel, ServingSettings
from zs_fast.search.codec import Codec
from zs_fast.types import Completion, FinishReason, Role, Sampling


class VllmEngine:
    """Engine over one loaded model per role (one model may serve several roles); see the Engine protocol.

    Every model's parameters become views of vLLM's tensors, in place: parameters on the meta device (`load_skeleton`)
    take the weights that vLLM reads from the model's folder, others are moved in. Then one short completion is scored
    by the trainer's forward, so that a layout read wrongly is found before the first rollout.

    Roles with adapters over one base are computed in one batch, each by its own; see ServedModel for who has which.

    A prefix is shared by all requests of a role and policy version, whatever their `cache_salt`. `frozen` roles keep
    their cache when weights are published. Log-probabilities are those of the whole vocabulary at the sampling
    temperature; top_p and top_k are refused, since vLLM would report the cut distribution's. A simulator's completions
    carry none. Results depend on what else is in the batch (last bits), unlike the embedded engine's.
    """

    def __init__(
        self,
        models: Mapping[Role, LoadedModel],
        *,
        slots: int,
        max_context_tokens: Mapping[Role, int] | int,
        device: torch.device | None = None,
        frozen: Collection[Role] = (),
        kv_cache_bytes: int | None = None,
        enforce_eager: bool = False,
        wake: Callable[[Any], None] | None = None,
        adapters: Mapping[Role, Mapping[str, Tensor]] | None = None,
        weights: Literal["auto", "shared", "copied"] = "auto",
    ) -> None:
        """`kv_cache_bytes` is per model; by default what `slots` sequences of full length need. `device` must be the
        one that the installed vLLM was built for. `wake` maps the cache's pool on CUDA again; without it `release_kv`
        frees nothing there. `adapters` are fixed ones (`models.lora.read_adapter`) of roles other than the policy.
        """
        device = check_device(device)
        if slots < 1:
            raise EngineError(f"engine.slots is {slots}; at least 1 is needed.")
        self._version = 0
        self._lanes: dict[Role, _Lane] = {}
        self._before_use: dict[Role, Callable[[], None]] = {}
        self._served: list[ServedModel] = []
        self._frozen = frozenset(frozen)
        settings = ServingSettings(
            slots=slots,
            device=device,
            kv_cache_bytes=kv_cache_bytes,
            enforce_eager=enforce_eager,
            pooled_kv=wake is not None,
            adapters=adapters or {},
            weights=weights,
        )
        limits = {
            role: max_context_tokens if isinstance(max_context_tokens, int) else max_context_tokens[role]
            for role in models
        }
        try:
            for loaded in {id(loaded): loaded for loaded in models.values()}.values():
                roles = [role for role in models if models[role] is loaded]
                served = ServedModel(loaded, roles, max(limits[role] for role in roles), settings)
                self._served.append(served)
                self._lanes |= {role: _Lane(role, served, limits[role]) for role in roles}
        except BaseException:
            self.close()
            raise
        self._kv_is_released = False
        cores = [served.core for served in self._served]
        self._kv: CpuKv | CudaKv | None = None
        self._kv_stays_because = ""
        if device.type == "cpu":
            self._kv = CpuKv(cores)
        elif wake is None:
            self._kv_stays_because = "engine.release_kv is false"
        else:
            try:
                self._kv = CudaKv(cores, wake)
            except PreflightError as error:
                self._kv_stays_because = str(error)

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        lane = self._lane(role)
        self.acquire_kv()
        if role in self._before_use:
            self._before_use[role]()
        lane.served.prove_copy()
        lane.add(request_id, prompt_ids, sampling, self._version)

    def step(self) -> list[Completion]:
        completions = []
        for served in self._served:
            if served.core.num_unfinished:
                for role in served.roles:
                    self._lanes[role].note_step()
                for finished in served.core.step():
                    role = Role(finished.key.partition(":")[0])
                    completions.append(self._lanes[role].finish(finished))
        return completions

    @property
    def num_unfinished(self) -> int:
        return sum(len(lane.unfinished) for lane in self._lanes.values())

    def end(self, role: Role, cache_salt: str) -> None:
        """Nothing to do: blocks that no running request holds are the first to be overwritten."""

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        lane = self._lane(role)
        lane.abort([request_id for request_id in request_ids if request_id in lane.unfinished])

    def publish(self, version: int) -> None:
        self._version = version
        busy = [role for role, lane in self._lanes.items() if lane.unfinished]
        for served in self._served:
            served.publish(version, frozen=self._frozen, busy=busy)

    def release_kv(self) -> int:
        busy = {role: len(lane.unfinished) for role, lane in self._lanes.items() if lane.unfinished}
        if busy:
            counts = ", ".join(f"{count} of {role}" for role, count in busy.items())
            raise EngineError(f"release_kv with unfinished requests ({counts}). Step until they are finished.")
        if self._kv is None or self._kv_is_released:
            return 0
        for served in self._served:
            served.core.forget_kv()
        self._kv_is_released = True
        return self._kv.release() + sum(served.discard_copy() for served in self._served)

    def acquire_kv(self) -> None:
        """Copies of weights that were discarded with the keys and values are written again."""
        if self._kv is not None and self._kv_is_released:
            for served in self._served:
                served.restore_copy()
            self._kv.acquire()
            self._kv_is_released = False

    def close(self) -> None:
        self._kv = None
        for served in self._served:
            served.core.close()
        self._lanes, self._served = {}, []

    def before_use(self, role: Role, call: Callable[[], None]) -> None:
        self._before_use[role] = call

    def stats(self) -> dict[Role, EngineStats]:
        """Counts per role since the engine was made; the probe's are not among them."""
        return {role: lane.stats() for role, lane in self._lanes.items()}

    def module(self, role: Role) -> PreTrainedModel:
        """The trainer's module for `role`; its parameters are vLLM's memory."""
        return self._lane(role).model

    def served(self, role: Role) -> dict[str, Tensor]:
        """The tensors that vLLM samples `role` with at this moment, under the trainer's names."""
        return self._lane(role).served.served()

    def copies(self, role: Role) -> bool:
        """Has the trainer's module for `role` memory of its own, whose values `copy_weights` hands over?"""
        return bool(self._lane(role).served.unshared_because)

    def copy_weights(self, role: Role) -> int:
        """Write the trained values of `role` into vLLM's memory; the bytes written, 0 where they are shared."""
        return self._lane(role).served.copy_weights()

    def choices(self) -> list[str]:
        """One line per model, and one for the cache: how its memory is held, and why so where it could be better."""
        lines = []
        for served in self._served:
            shared = "one copy, shared with the trainer" if not served.unshared_because else "copied at every publish"
            why = f" ({served.unshared_because})" if served.unshared_because else ""
            lines.append(f"vLLM's weights of {served.loaded.name} ({', '.join(served.roles)}): {shared}{why}")
        return [*lines, self._choice_of_memory()]

    def _choice_of_memory(self) -> str:
        """Which link of the chain in docs/vllm.md holds; a simulator in a process of its own is the last."""
        copied = [served for served in self._served if served.unshared_because]
        if self._kv_stays_because:
            weights = "copies of weights" if copied else "weights shared,"
            return f"vLLM's memory: {weights} {'and ' if copied else ''}keys and values stay: {self._kv_stays_because}"
        if not copied:
            return "vLLM's memory: weights shared, keys and values can be given back between rollouts"
        copies = "the copies of weights" if all(served.can_discard for served in copied) else "no copy of weights"
        return f"vLLM's memory: keys and values can be given back between rollouts, and {copies}"

    def _lane(self, role: Role) -> _Lane:
        if role not in self._lanes:
            have = ", ".join(self._lanes) or "none (it is closed)"
            raise EngineError(f"This engine has no model for role {role!r}; its roles: {have}.")
        return self._lanes[role]


class _Lane:
    """One role's requests: what it accepts, where a completion ends, and what comes back."""

    def __init__(self, role: Role, served: ServedModel, max_tokens: int) -> None:
        loaded = served.loaded
        self.model = loaded.model
        self.served = served
        self.unfinished: dict[int, int] = {}
        """Request id -> the policy version it was added under."""
        self._role = role
        self._max_tokens = max_tokens
        self._vocab_size = loaded.model.get_input_embeddings().num_embeddings
        codec = Codec(loaded.tokenizer, chat_template=True)
        self._eos_ids = sorted(eos_token_ids(loaded, codec))
        self._stop_strings = StopStrings(codec)
        self._counts = dict.fromkeys(("prefill_tokens", "decode_tokens", "reused_tokens", "steps"), 0)

    def add(self, request_id: int, prompt_ids: list[int], sampling: Sampling, version: int) -> None:
        self._check(request_id, prompt_ids, sampling)
        stop = sampling.stop
        self.served.core.add(
            f"{self._role}:{request_id}",
            prompt_ids,
            sampling,
            eos_ids=self._eos_ids,
            stopped=partial(self._stop_strings.completed, stop=stop) if stop else None,
            salt=self.served.salt(self._role),
            with_logprobs=self._role is not Role.SIMULATOR,
            adapter=self.served.adapter(self._role),
        )
        self.unfinished[request_id] = version

    def abort(self, request_ids: Collection[int]) -> None:
        self.served.core.abort([f"{self._role}:{request_id}" for request_id in request_ids])
        for request_id in request_ids:
            del self.unfinished[request_id]

    def note_step(self) -> None:
        self._counts["steps"] += bool(self.unfinished)

    def stats(self) -> EngineStats:
        return EngineStats(**self._counts)

    def finish(self, finished: Finished) -> Completion:
        self._counts["reused_tokens"] += finished.num_cached_tokens
        self._counts["prefill_tokens"] += finished.num_prompt_tokens - finished.num_cached_tokens
        self._counts["decode_tokens"] += len(finished.token_ids)
        request_id = int(finished.key.partition(":")[2])
        return Completion(
            request_id=request_id,
            role=self._role,
            token_ids=tuple(finished.token_ids),
            logprobs=tuple(finished.logprobs),
            finish_reason=FinishReason.STOP if finished.stopped else FinishReason.LENGTH,
            policy_version=self.unfinished.pop(request_id),
        )

    def _check(self, request_id: int, prompt_ids: list[int], sampling: Sampling) -> None:
        needed = len(prompt_ids) + sampling.max_new_tokens - 1
        if not prompt_ids or sampling.max_new_tokens < 1 or needed > self._max_tokens:
            raise EngineError(
                f"Request {request_id} of {self._role} has a prompt of {len(prompt_ids)} tokens and asks for "
                f"{sampling.max_new_tokens} new ones; both must be at least 1, and together they may hold "
                f"{self._max_tokens + 1} (max_context_tokens + 1). Shorten the prompt or raise the limit."
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._vocab_size:
            raise EngineError(
                f"Request {request_id} of {self._role} holds token ids from {min(prompt_ids)} to {max(prompt_ids)}; "
                f"the model knows 0 to {self._vocab_size - 1}. Another tokenizer's ids?"
            )
        if request_id in self.unfinished:
            raise EngineError(f"Request {request_id} of {self._role} was added twice before it finished.")
        if sampling.top_p < 1.0 or sampling.top_k:
            raise EngineError(
                f"Request {request_id} of {self._role} has top_p {sampling.top_p} and top_k {sampling.top_k}; with "
                "vLLM its log-probabilities would be those of the cut distribution. Use top_p = 1 and top_k = 0, or "
                "engine.kind = 'transformers'."
            )
        if 0.0 < sampling.temperature < MIN_TEMPERATURE:
            raise EngineError(
                f"Request {request_id} of {self._role} has temperature {sampling.temperature}; vLLM samples at 0 or "
                f"from {MIN_TEMPERATURE} up."
            )
