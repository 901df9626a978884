"""The quickstart models' tokenizer: a byte-level BPE over the world's sentences, with a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zs_fast.quickstart.demonstrations import fresh_world, labelled_search, policy_demonstration
from zs_fast.quickstart.world import name_pool

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY_SIZE = 2048


def _sentences() -> Iterator[str]:
    draws = random.Random("zs_fast quickstart tokenizer")
    for _ in range(300):
        world = fresh_world(draws)
        yield from (world.passage(name, draws) for name in world.entities)
        yield from (question.text for question in world.all_questions(draws))
        demonstration = policy_demonstration(draws)
        yield demonstration.prompt
        yield from (text for text, _ in demonstration.segments)
        yield labelled_search(draws).prompt
    for kind in ("first", "family", "town", "company", "book"):
        yield from (f" {word}" for word in name_pool(kind))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of at most VOCABULARY_SIZE ids in which every word of the world is one token. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
