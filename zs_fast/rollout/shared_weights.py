"""One copy of the weights for sampler and trainer: a trainer's parameters become views into the sampler's tensors.

vLLM fuses what transformers keeps apart: query, key and value projections lie in one matrix, gate and up projection in
another, and the embedding has rows added at its end. Every trainer tensor is a contiguous range of rows of one of
those, so it can be a view: an optimizer step is what the sampler reads next, with nothing copied, nothing announced.
Nothing here imports vLLM; a module is understood by its `packed_modules_mapping` and its layers' `output_sizes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.attention import PackedAttention
from zs_fast.models.load import LoadedModel

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest mean difference of log-probabilities, in nats, that rounding alone explains. Measured between vLLM and this
trainer: 3e-6 in float32, 0.05 in bfloat16 (SmolLM2-135M); tensors laid out otherwise differ by more than 1."""
PROBE_PROMPT_TOKENS = 24
PROBE_NEW_TOKENS = 8


def served_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A vLLM module's parameters by the names they have in transformers, as views of the module's own memory.

    Tied embeddings appear once, as in `named_parameters`. Raises PreflightError for tensors that can't be viewed:
    quantised, repacked, or split over several devices.
    """
    packed: Mapping[str, Sequence[str]] = getattr(module, "packed_modules_mapping", None) or {}
    tensors: dict[str, Tensor] = {}
    for full_name, parameter in module.named_parameters():
        path, _, kind = full_name.rpartition(".")
        layer: Any = module.get_submodule(path)
        _check_plain(full_name, parameter, layer)
        name = plain_name(path)
        parent, _, leaf = name.rpartition(".")
        data = parameter.detach()
        if leaf in packed:
            sizes = [int(size) for size in layer.output_sizes]
            if len(sizes) != len(packed[leaf]) or sum(sizes) != data.shape[0]:
                raise PreflightError(
                    f"vLLM's {full_name} has {data.shape[0]} rows, but {', '.join(packed[leaf])} take {sizes}."
                )
            for part, rows in zip(packed[leaf], data.split(sizes), strict=True):
                tensors[f"{parent}.{part}.{kind}"] = rows
        elif hasattr(layer, "org_vocab_size"):
            tensors[f"{name}.{kind}"] = data[: layer.org_vocab_size]
        else:
            tensors[f"{name}.{kind}"] = data
    return tensors


def plain_name(name: str) -> str:
    """The name that a tensor has in a model without adapters, whose layers are wrapped in others where there are."""
    return name.replace(".base_layer", "")


def named_as_in(model: nn.Module, served: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`served`, by the names its tensors have in `model`; names that `model` does not know stay as they are."""
    ours = {plain_name(name): name for name, _ in model.named_parameters()}
    return {ours.get(name, name): tensor for name, tensor in served.items()}


def _check_plain(name: str, parameter: Tensor, layer: Any) -> None:
    if getattr(layer, "tp_size", 1) != 1:
        raise PreflightError(
            f"vLLM splits {name} over {layer.tp_size} GPUs (tensor parallel); weights are shared on one GPU only. "
            "Use engine.kind = 'transformers', or one GPU per process."
        )
    if parameter.numel() == 0 or not parameter.is_floating_point():
        raise PreflightError(
            f"vLLM holds {name} as {list(parameter.shape)} {parameter.dtype}: quantised or repacked weights can't be "
            "trained in place. Give plain bfloat16 or float32 weights, or use engine.kind = 'transformers'."
        )


def share(loaded: LoadedModel, served: Mapping[str, Tensor]) -> None:
    """Make every parameter of `loaded.model` a view of the served tensor of its name (see `named_as_in`), in place.

    Values move into the served tensors first, except from parameters on the meta device, which have none: those take
    what is served. Parameters become new objects, so an optimizer is built afterwards. Raises PreflightError, before
    anything is touched, when the two differ in a name or a shape.
    """
    model = loaded.model
    ours = dict(model.named_parameters())
    for name in sorted(ours.keys() | served.keys()):
        if name not in ours or name not in served:
            where = "vLLM" if name in served else "transformers"
            raise PreflightError(f"Model {loaded.name!r}: only {where} has a tensor {name}; they can't share weights.")
        if ours[name].shape != served[name].shape:
            raise PreflightError(
                f"Model {loaded.name!r}: {name} is {list(ours[name].shape)} in transformers and "
                f"{list(served[name].shape)} in vLLM; they can't share weights."
            )
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    with torch.no_grad():
        for name, old in ours.items():
            if not old.is_meta:
                served[name].copy_(old)
            view = nn.Parameter(served[name], requires_grad=old.requires_grad)
            for module, leaf in places[id(old)]:
                module._parameters[leaf] = view
    _materialise_rotary_tables(model, next(iter(served.values())).device)


def _materialise_rotary_tables(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds: on the meta device they have no values yet."""
    if any(buffer.is_meta for buffer in model.buffers()):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"buffer {name} of {type(buffer_owner).__name__} has no values"
                buffer_owner._buffers[name] = buffer.to(device)


def probe(loaded: LoadedModel, sample: Callable[[list[int], int], tuple[list[int], list[float]]]) -> float:
    """Mean difference, in nats, between the sampler's log-probabilities and the trainer's for the same tokens.

    `sample(prompt_ids, num_tokens)` gives greedily sampled ids and their log-probabilities. Raises EngineError where
    the difference is more than rounding: shared memory that is read in another order, another rotary embedding, a norm
    of another epsilon.
    """
    vocab_size = len(loaded.tokenizer)
    prompt = [(7919 * place + 11) % vocab_size for place in range(PROBE_PROMPT_TOKENS)]
    ids, logprobs = sample(prompt, PROBE_NEW_TOKENS)
    difference = float((trainer_logprobs(loaded, prompt, ids) - torch.tensor(logprobs)).abs().mean())
    limit = PROBE_TOLERANCE[next(loaded.model.parameters()).dtype]
    if not difference <= limit:
        raise EngineError(
            f"Model {loaded.name!r}: vLLM's log-probabilities differ from the trainer's by {difference:.3g} nats on "
            f"average (limit {limit}), though both read the same weights. This model's forward is another one in vLLM; "
            "use engine.kind = 'transformers'."
        )
    return difference


@torch.no_grad()
def trainer_logprobs(loaded: LoadedModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """[n] float32 on the CPU: log-probabilities of `token_ids` after `prompt_ids` by the trainer's own forward."""
    model: Any = loaded.model
    ids = [*prompt_ids, *token_ids][:-1]
    device = next(model.parameters()).device
    hidden = model.model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.arange(len(ids), device=device)[None],
        use_cache=False,
        attention_state=PackedAttention([0, len(ids)]),
    ).last_hidden_state[0, len(prompt_ids) - 1 :]
    logits = model.get_output_embeddings()(hidden)[:, : len(loaded.tokenizer)]
    targets = torch.tensor([list(token_ids)], device=device)
    return torch.log_softmax(logits.float(), -1).gather(-1, targets.T)[:, 0].cpu()
