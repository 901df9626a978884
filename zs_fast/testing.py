"""Fakes for tests and for users: a scripted engine, a scripted search, a byte-level tokenizer and tiny models.

torch and transformers are imported only by the functions that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zs_fast.errors import EngineError
from zs_fast.search.codec import AnyCodec
from zs_fast.search.reward import contains_answer
from zs_fast.types import Completion, FinishReason, Role, Sampling, SearchMode, SearchRequest, SearchResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from zs_fast.models.load import LoadedModel

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ScriptedEngine:
    """An Engine whose completions are written by functions from prompt ids to text, one per role.

    The text is cut behind the first stop string, or gets an end-of-sequence token where the codec has one.
    `steps_needed(request_id)` says after how many steps a request finishes (1 by default), to try other orders.
    Raising EngineError inside a script gives a FAILED completion.
    """

    def __init__(
        self,
        scripts: Mapping[Role, Callable[[list[int]], str]],
        codec: AnyCodec,
        *,
        steps_needed: Callable[[int], int] = lambda request_id: 1,
    ) -> None:
        self._scripts = dict(scripts)
        self._codec = codec
        self._steps_needed = steps_needed
        self._left: dict[tuple[Role, int], int] = {}
        self._done: dict[tuple[Role, int], Completion] = {}
        self._version = 0
        self.requests: list[tuple[Role, int, list[int], Sampling, str | None]] = []
        """Everything that was ever added, in order."""
        self.ended: list[tuple[Role, str]] = []

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        if role not in self._scripts:
            raise EngineError(f"This engine has no script for role {role!r}.")
        if (role, request_id) in self._left:
            raise EngineError(f"Request {request_id} of {role} was added twice before it finished.")
        self.requests.append((role, request_id, list(prompt_ids), sampling, cache_salt))
        self._left[role, request_id] = self._steps_needed(request_id)
        self._done[role, request_id] = self._completion(request_id, prompt_ids, sampling, role)

    def step(self) -> list[Completion]:
        for key in self._left:
            self._left[key] -= 1
        finished = [key for key, left in self._left.items() if left <= 0]
        for key in finished:
            del self._left[key]
        return [self._done.pop(key) for key in finished]

    @property
    def num_unfinished(self) -> int:
        return len(self._left)

    def end(self, role: Role, cache_salt: str) -> None:
        self.ended.append((role, cache_salt))

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        for request_id in request_ids:
            self._left.pop((role, request_id), None)
            self._done.pop((role, request_id), None)

    def publish(self, version: int) -> None:
        self._version = version

    def release_kv(self) -> int:
        return 0

    def acquire_kv(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _completion(self, request_id: int, prompt_ids: list[int], sampling: Sampling, role: Role) -> Completion:
        error, ids, reason = "", [], FinishReason.FAILED
        try:
            text = self._scripts[role](list(prompt_ids))
        except EngineError as failure:
            error = str(failure)
        else:
            ends = [text.index(stop) + len(stop) for stop in sampling.stop if stop in text]
            ids = self._codec.encode_untrusted(text[: min(ends)] if ends else text)
            if not ends:
                ids += sorted(self._codec.eos_ids)[:1]
            reason = FinishReason.STOP
            if len(ids) > sampling.max_new_tokens:
                ids, reason = ids[: sampling.max_new_tokens], FinishReason.LENGTH
        return Completion(
            request_id=request_id,
            role=role,
            token_ids=tuple(ids),
            logprobs=tuple(-1.0 for _ in ids),
            finish_reason=reason,
            policy_version=self._version,
            error=error,
        )


class ScriptedSearch:
    """A SearchBackend whose documents are written by a function; None from it is a failed search.

    `polls_needed(n)` says after how many polls the n-th search comes back (1 by default).
    """

    def __init__(
        self,
        documents: Callable[[SearchRequest], Sequence[str] | None],
        *,
        polls_needed: Callable[[int], int] = lambda n: 1,
    ) -> None:
        self._documents = documents
        self._polls_needed = polls_needed
        self._waiting: list[list[Any]] = []
        self.requests: list[SearchRequest] = []

    def submit(self, request: SearchRequest) -> None:
        self._waiting.append([self._polls_needed(len(self.requests)), request])
        self.requests.append(request)

    def deliver(self, completion: Completion) -> None:
        raise EngineError(f"A scripted search asks no model, yet a completion of role {completion.role} came back.")

    def poll(self) -> list[SearchResult]:
        for entry in self._waiting:
            entry[0] -= 1
        ready = [request for left, request in self._waiting if left <= 0]
        self._waiting = [entry for entry in self._waiting if entry[0] > 0]
        return [self._result(request) for request in ready]

    def cancel(self) -> None:
        self._waiting = []

    def recall(self, results: Sequence[SearchResult]) -> None:
        pass

    def _result(self, request: SearchRequest) -> SearchResult:
        documents = self._documents(request)
        if documents is None:
            return SearchResult(request=request, documents=(), mode=SearchMode.REAL, failed=True, error="scripted")
        return SearchResult(
            request=request,
            documents=tuple(documents),
            mode=SearchMode.REAL,
            contains_answer=contains_answer(documents, request.question.answers),
        )


def byte_tokenizer(*, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A real fast tokenizer of 259 ids: every byte is one token, then <|endoftext|>, <|im_start|> and <|im_end|> (EOS).

    Every text can be encoded and decoded exactly, at one token per UTF-8 byte.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE if chat_template else None,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    kind: Literal["llama", "qwen2", "qwen3"] = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 4096,
    tokenizer: PreTrainedTokenizerFast | None = None,
    tie_word_embeddings: bool = True,
    padded_rows: int = 0,
) -> LoadedModel:
    """A random causal model of a real architecture with the byte tokenizer, built in memory, in eval mode on the CPU.

    Qwen2 has biases on its query, key and value projections, drawn at random too; Qwen3 has norms there. `padded_rows`
    are vocabulary rows beyond the tokenizer's, as many published models have.
    """
    import torch
    import transformers

    from zs_fast.models.attention import ATTENTION_NAME
    from zs_fast.models.load import DTYPES, LoadedModel

    tokenizer = tokenizer or byte_tokenizer()
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=len(tokenizer) + padded_rows,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION_NAME,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 / hidden_size**0.5))
            else:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        # Logits of spread 1.6 about: neither flat nor certain. A last norm of random signs keeps a tied head from
        # saying the last token again.
        model.get_input_embeddings().weight.mul_(8)
        if not tie_word_embeddings:
            model.get_output_embeddings().weight.mul_(8)
        model.model.norm.weight.copy_(0.4 * torch.randn(hidden_size, generator=generator))
    model.tie_weights()
    model.to(DTYPES[dtype]).eval()
    return LoadedModel(model=model, tokenizer=tokenizer, path=Path(f"tiny-{kind}"), name=f"tiny-{kind}")
