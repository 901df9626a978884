"""The models a run needs beside the policy it plays with: frozen copy, reference, critic; and its saved weights.

Under an adapter they all stand on the policy's base; where all weights are trained each is a model of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zs_fast.config import RunConfig
from zs_fast.errors import CheckpointUnusableError
from zs_fast.learn.critic import Critic
from zs_fast.models.load import DTYPES, LoadedModel, load_model, on_same_base, resolve_path
from zs_fast.models.lora import adapter_rank, is_adapter_folder, load_adapter, read_adapter
from zs_fast.ranks import in_pieces, loading_device
from zs_fast.setup import load_served
from zs_fast.system.checkpoint import Checkpoint
from zs_fast.system.files import files_digest
from zs_fast.system.seeds import seed_for
from zs_fast.types import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def frozen_copy(config: RunConfig, policy: LoadedModel, device: Any) -> LoadedModel | None:
    """The policy as it was before the first step, where all its weights are trained and the KL term is used."""
    if not config.algorithm.kl_coefficient or adapter_rank(policy.model):
        return None
    if config.simulator.kind == "policy":  # the simulator speaks through it, so the engine serves it
        return load_served(config.model.path, config, device)
    where = loading_device(config, device)
    frozen = load_model(config.model.path, dtype=DTYPES[config.model.dtype], device=where)
    in_pieces(config, frozen.model.requires_grad_(False), device, train=False)
    return frozen


def reference_of(config: RunConfig, policy: LoadedModel, frozen: LoadedModel | None) -> LoadedModel | None:
    """What the KL term compares with: the frozen copy, or under an adapter the base itself, with the adapter that the
    run began with where `model.path` brought one. Made after the engine, which may move the base."""
    if not config.algorithm.kl_coefficient or frozen is not None:
        return frozen
    began_with_adapter = is_adapter_folder(resolve_path(config.model.path))
    return on_same_base(policy, config.model.path if began_with_adapter else "")


def critic_of(config: RunConfig, policy: LoadedModel, device: Any) -> Critic | None:
    """PPO's value model; its weights come from the checkpoint on resume."""
    if config.algorithm.name != "ppo":
        return None
    rank = config.critic.lora_rank
    if rank is None:
        rank = 0 if config.critic.path else adapter_rank(policy.model)
    if rank:
        seed = seed_for(config.seed, role=Role.CRITIC, purpose="adapter")
        return Critic.on_base(policy, rank, targets=config.model.lora_targets, seed=seed)
    where, dtype = loading_device(config, device), DTYPES[config.model.dtype]
    critic = Critic(load_model(config.critic.path or config.model.path, dtype=dtype, device=where))
    return in_pieces(config, critic, device)  # type: ignore[no-any-return]


def load_policy_weights(policy: LoadedModel, folder: Path, config: RunConfig) -> None:
    """Take over the weights, or the adapter, that a checkpoint's model folder holds."""
    if adapter_rank(policy.model):
        load_adapter(policy.model, read_adapter(folder))
        return
    saved = load_model(folder, dtype=DTYPES[config.model.dtype], device=policy.model.device)
    try:
        policy.model.load_state_dict(saved.model.state_dict())
    except RuntimeError as error:
        raise CheckpointUnusableError(
            f"The weights in {folder} are of another shape than the model {policy.name!r} is now: {error}. Put back "
            "the model that the run began with."
        ) from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hexadecimal digits of how text becomes ids: vocabulary, rules, added tokens, chat template."""
    whole = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def check_same_tokenizer(checkpoint: Checkpoint, policy: LoadedModel) -> None:
    """Return if the policy reads text as it did when the checkpoint was written, else CheckpointUnusableError."""
    saved, now = checkpoint.state.get("tokenizer"), tokenizer_digest(policy.tokenizer)
    if saved is not None and saved != now:
        raise CheckpointUnusableError(
            f"The tokenizer of {policy.name!r} is another one than in {checkpoint.path} (digest saved {saved}, now "
            f"{now}): the same text would be other ids. Put back the tokenizer and chat template that the run began "
            "with."
        )


def model_digests(config: RunConfig, policy: LoadedModel) -> dict[str, str]:
    """Field of the config -> digest of the model there, for those that a checkpoint does not hold: what an adapter
    stands on, the reference, the simulator."""
    paths = {"simulator.adapter": config.simulator.adapter}
    if config.algorithm.kl_coefficient or adapter_rank(policy.model):
        paths["model.path"] = config.model.path
    if config.simulator.kind == "model":
        paths["simulator.path"] = config.simulator.path
    if config.critic.path:
        paths["critic.path"] = config.critic.path
    return {field: files_digest(resolve_path(path)) for field, path in paths.items() if path}


def check_same_models(checkpoint: Checkpoint, now: Mapping[str, str], config: RunConfig) -> None:
    """Return if the models that a checkpoint does not hold are those it was written with, else
    CheckpointUnusableError. One of a version that did not write them down is taken as it is."""
    for field, saved in checkpoint.state.get("models", {}).items():
        if now.get(field) != saved:
            part, name = field.split(".")
            raise CheckpointUnusableError(
                f"The files of {field} = {getattr(getattr(config, part), name)!r} are others than when "
                f"{checkpoint.path} was written (digest saved {saved}, now {now.get(field)}): the run would go on with "
                "another model. Put back the files that it began with."
            )
