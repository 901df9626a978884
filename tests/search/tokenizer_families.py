"""Four small tokenizers with the added tokens, splitting rules and chat forms of Qwen, Llama 3, SmolLM2 and Gemma.

Only the vocabulary is small: it is trained here on the text below, so nothing is downloaded. What matters to the game
is real: which strings are added tokens, which of them are special, where their ids lie, and how text is split.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("qwen", "llama3", "smollm2", "gemma")

TRAINING_TEXT = [
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time.",
    "<think> I need to find out who wrote the novel. </think>\n<search> who wrote the novel Emma </search>\n\n",
    "<information>Doc 1: Emma is a novel by Jane Austen.\nDoc 2: It was published in 1815.</information>\n\n",
    "<think> The documents say that it was Jane Austen. </think>\n<answer> Jane Austen </answer>",
    "My previous action is invalid. Let me try again. If I want to search, I should put the query between tags.",
    "The capital of Norway is Oslo; it has 717,710 inhabitants (2024). Die Straße führt über die Brücke. ça va?",
    "日本の首都は東京です。Москва — столица России. Ἐν ἀρχῇ ἦν ὁ λόγος.  Two  spaces,\ttabs,\n\nand blank lines.\n\n\n",
] * 8

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_SPLIT = _QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_QWEN_TABLE = [
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")),
    *((f"<|{name}|>", True) for name in ("box_start", "box_end", "quad_start", "quad_end", "vision_start")),
    *((f"<|{name}|>", True) for name in ("vision_end", "vision_pad", "image_pad", "video_pad")),
    ("<tool_call>", False),
    ("</tool_call>", False),
    *((f"<|{name}|>", False) for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name")),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
]
_LLAMA_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
_SMOLLM_TABLE = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>"),
    *("<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"),
]
_HTML = [
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code"),
]
_GEMMA_TABLE = [
    *(("<pad>", True), ("<eos>", True), ("<bos>", True), ("<unk>", True)),
    *(("<mask>", False), ("<2mass>", False), ("[@BOS@]", False)),
    *((f"<unused{index}>", False) for index in range(99)),
    *(("<start_of_turn>", True), ("<end_of_turn>", True)),
    *(("\n" * count, False) for count in range(1, 32)),
    *(("\u2581" * count, False) for count in range(2, 32)),
    *((f"<{slash}{name}>", False) for slash in ("", "/") for name in _HTML),
]

_QWEN_CHAT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_SMOLLM_CHAT = _QWEN_CHAT.replace("Qwen, created by Alibaba Cloud. You are ", "")
_GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else "
    "message.role }}\n{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """One tokenizer and what a test may ask about it."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    added: dict[str, int]
    special: frozenset[str]


@cache
def family(name: str) -> Family:
    """The tokenizer of one family, built once per process."""
    build = {"qwen": _qwen, "llama3": _llama3, "smollm2": _smollm2, "gemma": _gemma}[name]
    tokenizer = build()
    decoder = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return Family(
        name=name,
        tokenizer=tokenizer,
        added={token.content: index for index, token in decoder.items()},
        special=frozenset(token.content for token in decoder.values() if token.special),
    )


def _train_bytes(split: pre_tokenizers.PreTokenizer, vocab_size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of a small byte-level BPE."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(TRAINING_TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _byte_level(split: str | None) -> pre_tokenizers.PreTokenizer:
    first = pre_tokenizers.Digits(individual_digits=True)
    if split is not None:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    return pre_tokenizers.Sequence([first, last])


def _fast(backend: Tokenizer, chat_template: str, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def _add(backend: Tokenizer, table: list[tuple[str, bool]]) -> None:
    for content, special in table:
        token = AddedToken(content, special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])


def _qwen() -> PreTrainedTokenizerFast:
    split = _byte_level(_QWEN_SPLIT)
    vocab, merges = _train_bytes(split, 700)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), split
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    _add(backend, _QWEN_TABLE)
    return _fast(backend, _QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama3() -> PreTrainedTokenizerFast:
    split = _byte_level(_LLAMA_SPLIT)
    vocab, merges = _train_bytes(split, 700)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    reserved = iter(range(256))
    _add(
        backend,
        [
            (f"<|{_LLAMA_NAMED[i]}|>" if i in _LLAMA_NAMED else f"<|reserved_special_token_{next(reserved)}|>", True)
            for i in range(256)
        ],
    )
    start = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A $B",
                special_tokens=[("<|begin_of_text|>", start)],
            ),
        ]
    )
    return _fast(backend, _LLAMA_CHAT, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def _smollm2() -> PreTrainedTokenizerFast:
    split = _byte_level(None)
    vocab, merges = _train_bytes(split, 700)
    # As in the real one, the added tokens are the first entries of the model's own vocabulary.
    vocab = {piece: index + len(_SMOLLM_TABLE) for piece, index in vocab.items()}
    vocab.update({piece: index for index, piece in enumerate(_SMOLLM_TABLE)})
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    _add(backend, [(piece, True) for piece in _SMOLLM_TABLE])
    return _fast(backend, _SMOLLM_CHAT, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")


def _gemma() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    trained.train_from_iterator(TRAINING_TEXT, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [content for content, _ in _GEMMA_TABLE] + [f"<0x{byte:02X}>" for byte in range(256)]
    known = set(pieces)
    pieces += [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in known]
    # The real merges build the whitespace runs too, so switching off added tokens alone would still give their ids.
    merges = [(mark * (n - 1), mark) for mark in ("\n", "\u2581") for n in range(2, 32)]
    merges += [tuple(pair) for pair in model["merges"] if tuple(pair) not in set(merges)]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    _add(backend, _GEMMA_TABLE)
    start = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", start)]
    )
    return _fast(backend, _GEMMA_CHAT, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
