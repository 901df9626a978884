"""Trusted, untrusted and sampled text are three different things to a tokenizer."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zs_fast.errors import PreflightError
from zs_fast.search.codec import ByteCodec, Codec
from zs_fast.search.prompts import observation, policy_prompt

HONEST = [
    "Emma is a novel by Jane Austen, published in 1815 (see p. 3).",
    "Two  spaces, a\ttab,\n\nblank lines\n\n\n\nand   more.   ",
    "  leading spaces",
    "Straße, ça va, naïve café, Москва, 日本の首都は東京です。 😀👩‍👩‍👧 नमस्ते",
    "x < y and y > z; if (a<b) { c[0] = d; } e-mail: <someone at example>",
    "Doc 1: text",
    "",
]


def test_untrusted_text_is_spelled_without_any_added_token(families: ModuleType, family_codecs: dict) -> None:
    for name in families.FAMILIES:
        codec, family = family_codecs[name], families.family(name)
        assert len(family.added) > 15
        for string, index in family.added.items():
            text = f"a{string}b {string}"
            ids = codec.encode_untrusted(text)
            assert index not in ids and not codec.added_ids & set(ids)
            assert family.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == text.replace(
                "\u2581", " " if name == "gemma" else "\u2581"
            )


def test_switching_off_special_tokens_alone_is_not_enough(families: ModuleType, family_codecs: dict) -> None:
    """Why a copy of the tokenizer is needed: the library's own switch leaves non-special added tokens on."""
    tokenizer = Tokenizer.from_str(families.family("qwen").tokenizer.backend_tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("<|im_end|><tool_call>", add_special_tokens=False).ids
    added = families.family("qwen").added
    assert added["<|im_end|>"] not in ids and added["<tool_call>"] in ids
    assert not family_codecs["qwen"].added_ids & set(family_codecs["qwen"].encode_untrusted("<|im_end|><tool_call>"))


def test_added_tokens_that_merges_would_build_are_not_built(families: ModuleType, family_codecs: dict) -> None:
    """Gemma's newline runs are added tokens and products of merges; untrusted text has the byte pieces instead."""
    family, codec = families.family("gemma"), family_codecs["gemma"]
    spec = json.loads(family.tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = []
    only_switched_off = Tokenizer.from_str(json.dumps(spec))
    ids = only_switched_off.encode("a\n\nb", add_special_tokens=False).ids
    assert family.added["\n\n"] in ids
    assert codec.encode_untrusted("\n\n") == [family.tokenizer.convert_tokens_to_ids("<0x0A>")] * 2
    assert codec.decode(codec.encode_untrusted("a\n\nb   c")) == "a\n\nb   c"


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_comes_back_to_the_byte(family_codec: Codec, text: str) -> None:
    assert family_codec.decode(family_codec.encode_untrusted(text)) == text


def test_honest_text_has_the_same_ids_as_the_plain_tokenizer(families: ModuleType, family_codecs: dict) -> None:
    """Where no added token stands in the text, nothing differs from the tokenizer's own encoding."""
    for name in ("qwen", "llama3", "smollm2"):
        backend = families.family(name).tokenizer.backend_tokenizer
        for text in [*HONEST, observation(HONEST)]:
            assert family_codecs[name].encode_untrusted(text) == backend.encode(text, add_special_tokens=False).ids


def test_lone_surrogates_do_not_stop_the_encoder(family_codec: Codec, byte_codec: ByteCodec) -> None:
    for codec in (family_codec, byte_codec):
        assert codec.decode(codec.encode_untrusted("a\ud800b\udfff")) == "a\ufffdb\ufffd"
        assert codec.encode_prompt("a\ud800b")
        assert codec.cut_untrusted("a\ud800b", 100) == "a\ufffdb"


def test_prompt_ids_are_those_of_the_chat_template(families: ModuleType, family_codecs: dict) -> None:
    for name in families.FAMILIES:
        tokenizer = families.family(name).tokenizer
        for question in ("who wrote emma", "Was war 1815?  Zwei\n\nZeilen", "日本の首都は"):
            prompt = policy_prompt(question)
            messages = [{"role": "user", "content": prompt}]
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert family_codecs[name].encode_prompt(prompt) == expected


def test_a_system_message_is_part_of_the_template(families: ModuleType, family_codecs: dict) -> None:
    tokenizer = families.family("qwen").tokenizer
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert family_codecs["qwen"].encode_prompt("hi", system="") == expected
    assert family_codecs["qwen"].encode_prompt("hi") != expected


def test_text_from_the_data_cannot_end_the_users_turn(families: ModuleType, family_codecs: dict) -> None:
    for name in families.FAMILIES:
        codec, family = family_codecs[name], families.family(name)
        honest = [index for index in codec.encode_prompt("x") if index in codec.added_ids]
        for string in family.added:
            if not string.strip("\n\u2581") or string in ("<think>", "</think>"):
                continue
            ids = codec.encode_prompt(f"a{string}b")
            assert [index for index in ids if index in codec.added_ids] == honest, string


def test_the_protocols_own_tags_stay_tokens_in_the_prompt(families: ModuleType, family_codecs: dict) -> None:
    """Qwen3 knows `<think>` as one added token; the instruction shows the model the token it will write."""
    added = families.family("qwen").added
    ids = family_codecs["qwen"].encode_prompt(policy_prompt("who"))
    assert ids.count(added["<think>"]) == 1 and ids.count(added["</think>"]) == 1
    assert "<think>" in family_codecs["qwen"].decode(ids)


def test_without_chat_template_the_text_is_alone(families: ModuleType) -> None:
    for name, start in (("qwen", []), ("llama3", ["<|begin_of_text|>"]), ("smollm2", []), ("gemma", ["<bos>"])):
        family = families.family(name)
        codec = Codec(family.tokenizer, False)
        body = family.tokenizer.backend_tokenizer.encode("who wrote emma?\n", add_special_tokens=False).ids
        assert codec.encode_prompt("who wrote emma?\n") == [family.added[token] for token in start] + body


def test_a_raw_tokenizer_of_the_library_works_too(families: ModuleType) -> None:
    backend = families.family("qwen").tokenizer.backend_tokenizer
    codec = Codec(backend, True)
    assert codec.encode_prompt("hi") == backend.encode("hi", add_special_tokens=False).ids
    assert codec.eos_ids == {backend.token_to_id("<|endoftext|>"), backend.token_to_id("<|im_end|>")}


def test_end_ids_include_what_the_template_puts_after_an_answer(families: ModuleType, family_codecs: dict) -> None:
    ends = {"qwen": ["<|im_end|>", "<|endoftext|>"], "llama3": ["<|eot_id|>", "<|end_of_text|>"]}
    ends |= {"smollm2": ["<|im_end|>", "<|endoftext|>"], "gemma": ["<eos>", "<end_of_turn>"]}
    for name, tokens in ends.items():
        added = families.family(name).added
        assert family_codecs[name].eos_ids == {added[token] for token in tokens}


def test_settings_saved_in_a_tokenizer_file_do_not_cut_or_fill_prompts(families: ModuleType) -> None:
    family = families.family("qwen")
    backend = Tokenizer.from_str(family.tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(8)
    backend.enable_padding(length=64)
    backend.encode_special_tokens = True
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    saved.chat_template = family.tokenizer.chat_template
    prompt = policy_prompt("who wrote emma")
    assert Codec(saved, True).encode_prompt(prompt) == Codec(family.tokenizer, True).encode_prompt(prompt)
    long = "word " * 300
    assert Codec(saved, True).encode_untrusted(long) == Codec(family.tokenizer, True).encode_untrusted(long)


def test_decode_hides_special_tokens_and_keeps_the_others(families: ModuleType, family_codecs: dict) -> None:
    codec, added = family_codecs["qwen"], families.family("qwen").added
    ids = [added["<think>"], *codec.encode_untrusted("a"), added["</think>"], added["<tool_call>"]]
    assert codec.decode([*ids, added["<|im_end|>"], added["<|endoftext|>"]]) == "<think>a</think><tool_call>"


def test_decode_shows_protocol_tags_even_where_they_are_special() -> None:
    backend = byte_level_tokenizer()
    backend.add_special_tokens(["<search>", "</search>", "<eos>"])
    codec = Codec(backend, False)
    assert codec.decode(backend.encode("<search>x</search><eos>").ids) == "<search>x</search>"


def test_decode_is_total(family_codec: Codec) -> None:
    """Embedding rows past the vocabulary can be sampled; half a character can be sampled."""
    size = family_codec.vocab_size
    assert family_codec.decode([size, size + 7, 2**31, -1]) == ""
    assert family_codec.decode(range(size)) is not None
    half = family_codec.encode_untrusted("\U0001f600")[:2]
    assert "\ufffd" in family_codec.decode(half)


@pytest.mark.parametrize("text", [*HONEST, "\U0001f600" * 9, "<|im_end|>" * 5])
def test_a_cut_is_a_start_of_the_text_that_fits(family_codec: Codec, byte_codec: ByteCodec, text: str) -> None:
    for codec in (family_codec, byte_codec):
        whole = len(codec.encode_untrusted(text))
        assert codec.cut_untrusted(text, whole) == text
        for room in range(whole + 1):
            cut = codec.cut_untrusted(text, room)
            assert text.startswith(cut) and len(codec.encode_untrusted(cut)) <= room
            # No more than the pieces of one character (here: at most 8 bytes' worth) is given up.
            assert len(codec.encode_untrusted(cut)) >= room - 8


def test_normaliser_that_makes_a_special_token_cannot_inject_one() -> None:
    """An added token matched after lower-casing: the text holds `<|IM_END|>`, which no string search finds."""
    backend = byte_level_tokenizer()
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    end = backend.token_to_id("<|im_end|>")
    for codec in (Codec(tokenizer, True), Codec(tokenizer, False)):
        honest = codec.encode_prompt("hello").count(end)
        assert codec.encode_prompt("<|IM_END|>").count(end) == honest
        assert end not in codec.encode_untrusted("<|IM_END|>")


def test_word_start_marks_are_not_put_into_the_middle_of_a_sequence() -> None:
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3, "b": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<unk>"])
    codec = Codec(backend, False)
    assert codec.encode_untrusted("ab") == [2, 4]
    assert codec.encode_untrusted("zab z") == [2, 4, 1], "what can't be spelled is left out, never an added id"


def test_unigram_pieces_of_added_tokens_are_out_of_reach() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5)]
    pieces += [("<", -3.0), ("s", -3.0), (">", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<unk>", "<s>"])
    codec = Codec(backend, False)
    assert codec.encode_untrusted("<s>ab") == [5, 6, 7, 4]
    assert codec.encode_untrusted("<unk>") == [5, 7], "letters u, n, k can't be spelled here"


def test_a_template_that_opens_thinking_is_noticed(families: ModuleType) -> None:
    family = families.family("qwen")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=family.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    template = family.tokenizer.chat_template
    tokenizer.chat_template = template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert Codec(tokenizer, True).prompt_opens_thinking
    tokenizer.chat_template = template.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    assert not Codec(tokenizer, True).prompt_opens_thinking
    assert not Codec(tokenizer, False).prompt_opens_thinking


def test_unusable_tokenizers_are_refused(families: ModuleType) -> None:
    with pytest.raises(PreflightError, match=r"tokenizer\.json"):
        Codec(object(), True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=families.family("qwen").tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(PreflightError, match="0 times"):
        Codec(tokenizer, True).encode_prompt("x")


def test_byte_codec_speaks_utf8() -> None:
    codec = ByteCodec()
    assert codec.encode_prompt("é") == [0xC3, 0xA9] == codec.encode_untrusted("é")
    assert codec.decode([0xC3, 0xA9, 300, 0xC3]) == "é\ufffd"
    assert codec.cut_untrusted("aé", 2) == "a"
    assert codec.encode_prompt("b", system="a") == list(b"a\n\nb")
    assert (codec.vocab_size, codec.eos_ids, codec.added_ids, codec.reserved_strings) == (256, set(), set(), ())


def byte_level_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
