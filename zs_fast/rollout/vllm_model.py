"""One model served by vLLM: the engine for it, the trainer's module over the same memory, and its roles' adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.load import LoadedModel, load_model
from zs_fast.models.lora import adapter_rank, adapter_targets, adapter_tensors
from zs_fast.rollout.shared_weights import named_as_in, probe, served_tensors, share
from zs_fast.rollout.vllm_adapters import AdapterSlots
from zs_fast.rollout.vllm_core import (
    LORA_RANKS,
    SMALLEST_CPU_HEAD,
    CoreSettings,
    VllmCore,
    cache_block_tokens,
    default_device,
)
from zs_fast.types import Role, Sampling

PROBE_KEY = "probe"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingSettings:
    """What all models of an engine are served with."""

    slots: int
    device: torch.device
    kv_cache_bytes: int | None = None
    """Per model; None takes what `slots` sequences of full length need."""
    enforce_eager: bool = False
    pooled_kv: bool = False
    adapters: Mapping[Role, Mapping[str, Tensor]] = field(default_factory=dict)
    """Fixed adapters of roles that share a model, by the names of `models.lora.adapter_tensors`."""
    weights: Literal["auto", "shared", "copied"] = "auto"
    """`auto` shares where vLLM's tensors can be viewed, and copies otherwise."""


class ServedModel:
    """A loaded model, vLLM's engine for it, and the roles that speak through it.

    Its parameters are vLLM's memory, or where that can't be (`unshared_because`) have memory of their own, and
    `copy_weights` writes their values into vLLM's.

    Where the model carries an adapter (`models.lora`), that one belongs to the policy, or else to the first role; every
    other role speaks by its own adapter of `settings.adapters`, or by the base.
    """

    def __init__(
        self, loaded: LoadedModel, roles: Sequence[Role], max_context_tokens: int, settings: ServingSettings
    ) -> None:
        _check_model(loaded, roles, max_context_tokens)
        self.loaded = loaded
        self.roles = tuple(roles)
        self.unshared_because: str | None = None
        """Why the weights are copied; empty where they are shared, None until it is known."""
        self._own_role = Role.POLICY if Role.POLICY in roles else roles[0]
        self._versions = dict.fromkeys(roles, 0)
        adapters = {role: settings.adapters[role] for role in roles if role in settings.adapters}
        rank = self._rank = adapter_rank(loaded.model)
        if adapters and not rank:
            largest = max(
                tensor.shape[0] for tensors in adapters.values() for name, tensor in tensors.items() if "lora_A" in name
            )
            rank = next((fitting for fitting in LORA_RANKS if fitting >= largest), largest)
        self._keeps_addresses = settings.device.type == "cuda" and not settings.enforce_eager
        """CUDA graphs hold the addresses of weights: these can't come back elsewhere."""
        self._discarded: list[tuple[torch.UntypedStorage, int]] = []
        """Of vLLM's own copy, with their sizes."""
        self._is_proven = True
        self._num_probes = 0
        self._slots: AdapterSlots | None = None
        self._slot_of: dict[Role, str] = {}
        if rank:
            self._slot_of = self._name_slots(adapters, on_cpu=settings.device.type == "cpu")
        self.core = self._build_core(max_context_tokens, settings, rank, _targets(loaded, adapters))
        try:
            if rank:
                self._slots = AdapterSlots(self.core, sorted(set(self._slot_of.values())))
                for role, tensors in adapters.items():
                    self._slots.write(self._slot_of[role], tensors)
            self.unshared_because = self._share(settings)
            self.probe_difference = probe(loaded, self._sample)
        except BaseException:
            self.core.close()
            raise

    def _name_slots(self, adapters: Collection[Role], *, on_cpu: bool) -> dict[Role, str]:
        """Role -> name of its slot. A role without one speaks by the base.

        On a CPU the base needs a slot of zeros: in a batch with others, vLLM's CPU build would give a request without
        an adapter the last slot's.
        """
        slot_of = {role: str(role) for role in self.roles if role in adapters}
        if self._rank:
            slot_of[self._own_role] = str(self._own_role)
        if on_cpu:
            slot_of |= {role: "base" for role in self.roles if role not in slot_of}
        return slot_of

    def _build_core(
        self, max_context_tokens: int, settings: ServingSettings, rank: int, targets: tuple[str, ...]
    ) -> VllmCore:
        model = self.loaded.model
        weight = model.get_input_embeddings().weight
        with tempfile.TemporaryDirectory(prefix="zs_fast_") as temporary:
            empty = not weight.is_meta
            folder = Path(temporary) if empty else self.loaded.path
            if empty:
                model.config.architectures = [type(model).__name__]
                model.config.save_pretrained(folder)
            return VllmCore(
                CoreSettings(
                    folder=folder,
                    name=self.loaded.name,
                    dtype=weight.dtype,
                    device=settings.device,
                    max_context_tokens=max_context_tokens,
                    max_num_seqs=settings.slots,
                    vocab_size=len(self.loaded.tokenizer),
                    kv_cache_bytes=settings.kv_cache_bytes
                    or _kv_bytes(model.config, weight.dtype, settings.slots, max_context_tokens),
                    empty=empty,
                    enforce_eager=settings.enforce_eager,
                    pooled_kv=settings.pooled_kv,
                    lora_rank=rank,
                    num_adapters=len(set(self._slot_of.values())),
                    lora_targets=targets,
                )
            )

    def _share(self, settings: ServingSettings) -> str:
        """Make the weights one with vLLM's; where that can't be, or is not asked for, a copy of them, and say why."""
        reason = "engine.weights is 'copied'"
        if settings.weights != "copied":
            try:
                share(self.loaded, self.served())
                return ""
            except PreflightError as error:
                if settings.weights == "shared":
                    raise
                reason = str(error)
        model: Any = self.loaded.model
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.to(settings.device)
            self._copy_base()
        else:  # vLLM has read the folder; the trainer reads it, too
            whole = load_model(self.loaded.base, dtype=model.get_input_embeddings().weight.dtype)
            weights = {name: parameter.detach() for name, parameter in whole.model.named_parameters()}
            adapter = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
            ours = named_as_in(model, weights) | adapter
            share(self.loaded, {name: tensor.to(settings.device) for name, tensor in ours.items()})
        self.copy_weights()
        return reason

    def _copy_base(self) -> None:
        """Write all weights but the adapter's, by vLLM's own loader, or where layers are wrapped into their tensors."""
        adapter = adapter_tensors(self.loaded.model)
        values = {n: p.detach() for n, p in self.loaded.model.named_parameters() if n not in adapter}
        if not self._rank:
            loader: Any = self.core.module
            loader.load_weights(iter(values.items()))
            return
        served = self.served()
        with torch.no_grad():
            for name, value in values.items():
                served[name].copy_(value)

    def copy_weights(self) -> int:
        """Write the trained values into vLLM's memory, and what was discarded; the bytes written, 0 where the memory
        is one.

        Raises EngineError if vLLM does not hold them afterwards: one tensor is compared, bit for bit. Where the layout
        is another one, the next request is preceded by a probe (`prove_copy`).
        """
        if self.unshared_because == "":
            return 0
        adapter = adapter_tensors(self.loaded.model)
        everything = dict(self.loaded.model.named_parameters())
        written = everything if self._regain() else adapter or everything
        if len(written) > len(adapter):
            self._copy_base()
        if self._rank and self._slots is not None:
            self._slots.write(self._slot_of[self._own_role], adapter)
        self._check_copied(written)
        return sum(tensor.nbytes for tensor in written.values())

    def _check_copied(self, written: Mapping[str, Tensor]) -> None:
        try:
            served = self.served()
        except PreflightError:
            self._is_proven = False  # another layout than ours: only what comes out of it can be compared
            return
        name = next(reversed(list(written)))
        if not _same_bits(served[name], written[name]):
            raise EngineError(f"{name} was copied to vLLM, which holds other values afterwards: it can't be trained.")

    def prove_copy(self) -> None:
        """Compare what comes out of a copy that can't be compared itself, if that is due and nothing is under way.

        Raises EngineError where vLLM's log-probabilities are not the trainer's. Weights that are not all finite prove
        nothing.
        """
        if self._is_proven or self.core.num_unfinished:
            return
        self._is_proven = True
        if all(bool(parameter.isfinite().all()) for parameter in self.loaded.model.parameters()):
            self.probe_difference = probe(self.loaded, self._sample)

    @property
    def can_discard(self) -> bool:
        """Has vLLM a copy of the weights that may go, and come back elsewhere?"""
        return bool(self.unshared_because) and not self._keeps_addresses

    def discard_copy(self) -> int:
        """Give the memory of vLLM's own copy of the weights back; the bytes that came free. `copy_weights` writes it
        again. Memory that the trainer's weights lie in stays."""
        if not self.can_discard or self._discarded:
            return 0
        ours = {parameter.untyped_storage()._cdata for parameter in self.loaded.model.parameters()}
        theirs = {p.untyped_storage()._cdata: p.untyped_storage() for p in self.core.module.parameters()}
        self._discarded = [(storage, storage.nbytes()) for key, storage in theirs.items() if key not in ours]
        for storage, _ in self._discarded:
            storage.resize_(0)
        return sum(size for _, size in self._discarded)

    def restore_copy(self) -> None:
        """Write vLLM's own copy again where it was discarded."""
        if self._discarded:
            self.copy_weights()

    def _regain(self) -> bool:
        """Have memory for vLLM's copy; True where it was discarded, so that all of it must be written."""
        for storage, size in self._discarded:
            storage.resize_(size)
            storage.fill_(0)  # rows beyond the vocabulary, which nobody writes
        was_discarded, self._discarded = bool(self._discarded), []
        return was_discarded

    def served(self) -> dict[str, Tensor]:
        """What is sampled with at this moment, by the trainer's names: the weights, and the own adapter's slot."""
        tensors = named_as_in(self.loaded.model, served_tensors(self.core.module))
        if self._rank and self._slots is not None:
            slot = self._slots.tensors(self._slot_of[self._own_role])
            tensors |= {name: slot[name] for name in adapter_tensors(self.loaded.model) if name in slot}
        return tensors

    def salt(self, role: Role) -> str:
        """Keys and values are found again under the same role and version only."""
        return f"{role}@{self._versions[role]}"

    def adapter(self, role: Role) -> Any:
        """vLLM's name for the role's adapter; None where it has none."""
        if self._slots is None or role not in self._slot_of:
            return None
        return self._slots.request(self._slot_of[role], self._versions[role])

    def publish(self, version: int, *, frozen: Collection[Role], busy: Collection[Role]) -> None:
        """The trained weights changed: the adapter's role, or all roles of a model without one, get a new version.

        `busy` roles have unfinished requests; those compute their contexts anew. A model that serves frozen roles only
        did not change.
        """
        moved = [self._own_role] if self._rank else list(self.roles)
        if all(role in frozen for role in moved):
            return
        for role in moved:
            self._versions[role] = version
        # A new version is enough to miss old keys. The cache is dropped where somebody holds some, or all are stale.
        if not self._rank or any(role in busy for role in moved):
            self.core.forget_kv()

    def _sample(self, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Greedy ids and log-probabilities, with nothing else in the engine and no keys of an earlier probe."""
        self._num_probes += 1
        self.core.add(
            PROBE_KEY,
            prompt_ids,
            Sampling(max_new_tokens=num_tokens, temperature=0.0),
            eos_ids=(),
            stopped=None,
            salt=f"{PROBE_KEY}{self._num_probes}",
            with_logprobs=True,
            adapter=self.adapter(self._own_role),
        )
        while True:
            for finished in self.core.step():
                return finished.token_ids, finished.logprobs


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike torch.equal, of numbers that are none, too."""
    return one.dtype == other.dtype and torch.equal(
        one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8)
    )


def _targets(loaded: LoadedModel, adapters: Mapping[Role, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Last names of all layers that some adapter is on."""
    names = [name.split(".")[-3] for tensors in adapters.values() for name in tensors]
    return tuple(sorted({*adapter_targets(loaded.model), *names}))


def _check_model(loaded: LoadedModel, roles: Sequence[Role], max_context_tokens: int) -> None:
    config = loaded.model.config
    positions = config.max_position_embeddings
    if max_context_tokens > positions:
        raise PreflightError(
            f"The {' and '.join(roles)} may need contexts of {max_context_tokens} tokens, but model {loaded.name!r} "
            f"knows {positions} positions. Lower game.max_context_tokens (for a simulator: max_new_tokens), or take "
            "another model."
        )
    if getattr(config, "quantization_config", None):
        raise PreflightError(
            f"Model {loaded.name!r} has quantised weights, which can't be trained in place. Give its plain bfloat16 or "
            "float32 weights, or use engine.kind = 'transformers'."
        )
    if default_device().type == "cpu" and _head_dim(config) < SMALLEST_CPU_HEAD:
        raise PreflightError(
            f"Model {loaded.name!r} has attention heads of {_head_dim(config)} numbers; vLLM on a CPU needs at least "
            f"{SMALLEST_CPU_HEAD}. Use engine.kind = 'transformers'."
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _kv_bytes(config: Any, dtype: torch.dtype, slots: int, max_context_tokens: int) -> int:
    """Bytes for `slots` sequences of full length, in whole blocks, and one block that vLLM keeps for itself."""
    block = cache_block_tokens()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config) * dtype.itemsize
    return int((slots * -(-(max_context_tokens + 1) // block) + 1) * block * per_token)
