"""Between text and token ids, in the three ways the game needs: prompts, untrusted text, and reading what was sampled.

Sampled ids are never re-encoded: text is decoded only to be read (parsing, logs), and the ids that were sampled are
the ids that are trained. So `decode` need not be invertible, and nothing here ever encodes a decoded completion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from zs_fast.errors import PreflightError
from zs_fast.search.untrusted import break_strings

_SURROGATES = re.compile("[\ud800-\udfff]")
_TAG_NAMES = ("think", "search", "information", "answer")
_PROTOCOL_TAGS = frozenset(f"<{slash}{name}>" for slash in ("", "/") for name in _TAG_NAMES)
_TURN_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "</s>")
_PROBE = "zs0probe0text"


class Codec:
    """A fast tokenizer (of transformers or tokenizers) with untrusted text kept apart from trusted text.

    Added tokens are the entries that a tokenizer matches as whole strings before its model runs: `<|im_end|>`, and
    also non-special ones such as Qwen's `<tool_call>` or Gemma's runs of newlines. Switching off special tokens does
    not switch off the non-special ones, so untrusted text goes through a copy of the tokenizer that has no added
    tokens, and no vocabulary entry or merge that could produce their ids.
    """

    def __init__(self, tokenizer: Any, chat_template: bool) -> None:
        self._tokenizer = tokenizer
        self._full: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(self._full, Tokenizer):
            raise PreflightError(
                f"the tokenizer is a {type(tokenizer).__name__}, which has no Rust tokenizer behind it. Use a model "
                "folder with a tokenizer.json."
            )
        if self._full.truncation or self._full.padding or self._full.encode_special_tokens:
            # Such settings, often left in a tokenizer.json, would cut or fill prompts without a word.
            self._full = Tokenizer.from_str(self._full.to_str())
            self._full.no_truncation()
            self._full.no_padding()
            self._full.encode_special_tokens = False
        added = self._full.get_added_tokens_decoder()
        self._chat = bool(chat_template and getattr(tokenizer, "chat_template", None))
        self._plain = _without_added_tokens(self._full, {token.content for token in added.values()})
        self._hidden = frozenset(
            index for index, token in added.items() if token.special and token.content not in _PROTOCOL_TAGS
        )
        self.added_ids: frozenset[int] = frozenset(added)
        """Ids of all added tokens, special or not. None of them ever comes out of `encode_untrusted`."""
        self.vocab_size: int = self._full.get_vocab_size(with_added_tokens=True)
        """Number of ids the tokenizer knows; the model's embedding may have more rows."""
        self.reserved_strings: tuple[str, ...] = tuple(
            sorted(token.content for token in added.values() if _is_markup(token.content, token.special))
        )
        """Added-token strings that `clean_document` breaks in untrusted text. Left out are those an honest text is
        made of, which need no breaking as they are encoded as ordinary pieces: whitespace (Gemma's newline runs) and
        plain words that are not special."""
        self._prompt_reserved = tuple(text for text in self.reserved_strings if text not in _PROTOCOL_TAGS)
        guarded = {index for index, token in added.items() if token.content in self._prompt_reserved}
        self._guarded = self._hidden | guarded
        self.eos_ids: frozenset[int] = self._find_eos_ids()
        """Ids that end a completion: the tokenizer's EOS, and what its chat template puts after an assistant turn."""
        self.prompt_opens_thinking: bool = False
        """True where the chat template itself writes `<think>` at the start of the assistant's turn."""
        if self._chat:
            start = self._render(_PROBE, None).rpartition(_PROBE)[2]
            self.prompt_opens_thinking = start.rfind("<think>") > start.rfind("</think>")

    def encode_prompt(self, text: str, *, system: str | None = None) -> list[int]:
        """The ids of a single user turn and the start of the assistant's turn.

        With a chat template: the same ids as `apply_chat_template` with `add_generation_prompt`; `system` adds a
        system message (an empty one where the template would add its own). Without: the text with the tokenizer's own
        start token. Reserved strings inside `text`, except the protocol's tags, are broken first, so that text from a
        data set can't end the turn.
        """
        text = break_strings(_SURROGATES.sub("\ufffd", text), self._prompt_reserved)
        before, ids, after = self._prompt_parts(text, system)
        expected = [index for index in before + after if index in self._guarded]
        if [index for index in ids if index in self._guarded] != expected:
            # A normaliser made a reserved token out of text that did not hold its string.
            return before + self.encode_untrusted(text) + after
        return ids

    def _prompt_parts(self, text: str, system: str | None) -> tuple[list[int], list[int], list[int]]:
        """Ids of what comes before the user's text, of the whole prompt, and of what comes after the text."""
        if not self._chat:
            lead = system + "\n\n" if system else ""
            return self._encode_start(lead), self._encode_start(lead + text), []
        parts = self._render(_PROBE, system).split(_PROBE)
        if len(parts) != 2:
            raise PreflightError(
                f"the tokenizer's chat template shows the user's message {len(parts) - 1} times; it must be once. Set "
                "model.chat_template = false, or repair the template."
            )
        before, after = (self._encode_trusted(part) for part in parts)
        return before, self._encode_trusted(self._render(text, system)), after

    def encode_untrusted(self, text: str) -> list[int]:
        """The ids of text that others wrote: no added token, special or not, is ever among them.

        The strings of added tokens are spelled with ordinary pieces; so are Gemma's newline and space runs, which are
        added tokens there. Nothing is put before or after the text. Characters that the vocabulary can't spell (only
        without byte fallback) are left out. Linear time.
        """
        ids: list[int] = self._plain.encode(_SURROGATES.sub("\ufffd", text), add_special_tokens=False).ids
        return [index for index in ids if index not in self.added_ids]

    def cut_untrusted(self, text: str, max_tokens: int) -> str:
        """The start of the text, cut between tokens, that takes at most `max_tokens` ids by itself."""
        text = _SURROGATES.sub("\ufffd", text)
        while text:
            encoding = self._plain.encode(text, add_special_tokens=False)
            if len(encoding.ids) <= max_tokens:
                return text
            # The first token to go starts here; a character whose bytes lie in both parts goes as a whole.
            text = text[: min(encoding.offsets[max_tokens][0], len(text) - 1)]
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of sampled ids, to be read. Special tokens are left out, unless they are one of the protocol's tags;
        non-special added tokens are kept. Ids that the tokenizer does not know are left out. Incomplete UTF-8 becomes
        U+FFFD. No spaces are cleaned up."""
        visible = [index for index in ids if index not in self._hidden and 0 <= index < 2**32]
        text: str = self._full.decode(visible, skip_special_tokens=False)
        return text

    def _encode_start(self, text: str) -> list[int]:
        """Ids of a text that starts a sequence, with the tokenizer's own start token but no end token."""
        ids: list[int] = self._full.encode(text).ids
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return ids

    def _encode_trusted(self, text: str) -> list[int]:
        ids: list[int] = self._full.encode(text, add_special_tokens=False).ids
        return ids

    def _render(self, text: str, system: str | None, answer: str | None = None) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        rendered: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )
        return rendered

    def _find_eos_ids(self) -> frozenset[int]:
        added = self._full.get_added_tokens_decoder()
        found = {index for index, token in added.items() if token.special and token.content in _TURN_ENDS}
        eos = getattr(self._tokenizer, "eos_token_id", None)
        if eos is not None:
            found.add(int(eos))
        if self._chat:
            rendered = self._render("?", None, answer=_PROBE)
            after = self._encode_trusted(rendered.rpartition(_PROBE)[2])
            found.update(index for index in after[:1] if index in self._hidden)
        return frozenset(found)


class ByteCodec:
    """Ids are the bytes of the text in UTF-8 (0 to 255): what is spoken with a remote server that takes text."""

    added_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    prompt_opens_thinking = False
    reserved_strings: tuple[str, ...] = ()
    vocab_size = 256

    def encode_prompt(self, text: str, *, system: str | None = None) -> list[int]:
        """The bytes of the text; the server applies its own chat template. A system message is put before the text."""
        return self.encode_untrusted((system + "\n\n" if system else "") + text)

    def encode_untrusted(self, text: str) -> list[int]:
        """The bytes of the text; a lone surrogate becomes U+FFFD."""
        return list(_SURROGATES.sub("\ufffd", text).encode("utf-8"))

    def cut_untrusted(self, text: str, max_tokens: int) -> str:
        """The longest start of the text that takes at most `max_tokens` bytes, cut between characters."""
        return _SURROGATES.sub("\ufffd", text).encode("utf-8")[:max_tokens].decode("utf-8", "ignore")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; incomplete UTF-8 becomes U+FFFD, ids above 255 are left out."""
        return bytes(index for index in ids if 0 <= index < 256).decode("utf-8", "replace")


AnyCodec = Codec | ByteCodec


def _is_markup(text: str, special: bool) -> bool:
    """Is this added token's string one that an honest text does not hold by accident?"""
    if text.replace("\u2581", "").strip() == "":
        return False
    return special or not text.replace("\u2581", "").replace(" ", "").isalnum()


def _without_added_tokens(full: Tokenizer, strings: set[str]) -> Tokenizer:
    """A copy that spells any text with the model's own pieces, none of which is an added token's string."""
    spec = json.loads(full.to_str())
    spec["added_tokens"] = []
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    # A text in mid-sequence gets no word-start mark of its own.
    spec["normalizer"] = _without_prefix(spec["normalizer"])
    spec["pre_tokenizer"] = _without_prefix(spec["pre_tokenizer"])
    model = spec["model"]
    kind = model["type"]

    def out_of_reach(piece: str, index: int) -> str:
        # U+FFFF is no character: honest text never holds it, and `encode_untrusted` drops the id if a hostile one does.
        return f"\uffff{index}\uffff" if piece in strings else piece

    if kind == "Unigram":
        model["vocab"] = [[out_of_reach(piece, index), value] for index, (piece, value) in enumerate(model["vocab"])]
    else:
        unknown = model.get("unk_token")
        if unknown in model["vocab"]:
            model["unk_token"] = out_of_reach(unknown, model["vocab"][unknown])
        model["vocab"] = {out_of_reach(piece, index): index for piece, index in model["vocab"].items()}
    if kind == "BPE":
        model["merges"] = [pair for pair in map(_pair, model["merges"]) if not _touches(pair, strings)]
    return Tokenizer.from_str(json.dumps(spec))


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _touches(pair: tuple[str, str], strings: set[str]) -> bool:
    return pair[0] in strings or pair[1] in strings or pair[0] + pair[1] in strings


def _without_prefix(step: Any) -> Any:
    """A normaliser or pre-tokenizer that puts no space or mark before the text."""
    if step is None:
        return None
    kind = step["type"]
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [inner for inner in map(_without_prefix, step[key]) if inner is not None]
        return {**step, key: kept}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step
