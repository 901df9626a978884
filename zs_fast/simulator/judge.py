"""A language model says of each search whether its documents suffice to answer the query."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zs_fast.config import RunConfig
from zs_fast.errors import EngineError
from zs_fast.rollout.engine import Engine
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.codec import AnyCodec, ByteCodec, Codec
from zs_fast.setup import load_served, use_device
from zs_fast.simulator.ask import ask
from zs_fast.simulator.snippets import snippet
from zs_fast.types import FinishReason, Role, Sampling

_PROMPT = """A search engine was asked a query and found the documents below. Do they hold what is needed to answer \
the query? They do if the answer can be read in them, and do not if they only speak of the same things. Reply with one \
word, yes or no.

Query: {query}

{documents}

Do the documents suffice to answer the query? Reply yes or no.
"""
_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
MAX_NEW_TOKENS = 8
MAX_DOCUMENT_WORDS = 120


def judged_useful(searches: Sequence[tuple[str, Sequence[str]]], config: RunConfig) -> list[bool | None]:
    """Of each (query, documents): yes, no, or None where the judge said neither. Greedy.

    The first `simulator.documents` documents are shown to it: those that an example would have.
    """
    engine, codec = _judge(config)
    try:
        return read_verdicts(engine, codec, searches, config.simulator.documents)
    finally:
        engine.close()


def read_verdicts(
    engine: Engine, codec: AnyCodec, searches: Sequence[tuple[str, Sequence[str]]], documents: int
) -> list[bool | None]:
    """The judge's word on each search. Raises EngineError where it could not be asked."""
    prompts = [codec.encode_prompt(judge_prompt(query, found[:documents])) for query, found in searches]
    sampling = [Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)] * len(prompts)
    verdicts: list[bool | None] = []
    for completion in ask(engine, Role.SIMULATOR, prompts, sampling):
        if completion.finish_reason is FinishReason.FAILED:
            raise EngineError(f"The judge could not be asked: {completion.error or 'no reason given'}")
        match = _VERDICT.match(codec.decode(completion.token_ids))
        verdicts.append(None if match is None else match[1].lower() == "yes")
    return verdicts


def judge_prompt(query: str, documents: Sequence[str]) -> str:
    """What the judge is asked; each document on one line."""
    lines = (f"Doc {n}: {snippet(text, MAX_DOCUMENT_WORDS)}" for n, text in enumerate(documents, start=1))
    return _PROMPT.format(query=" ".join(query.split()), documents="\n".join(lines))


def _judge(config: RunConfig) -> tuple[Engine, AnyCodec]:
    if config.label.judge == "openai":
        return OpenAIEngine(config.simulator), ByteCodec()
    model = load_served(config.label.judge_path or config.model.path, config, use_device(config))
    engine = TransformersEngine(
        {Role.SIMULATOR: model}, slots=config.engine.slots, max_context_tokens=config.game.max_context_tokens
    )
    return engine, Codec(model.tokenizer, chat_template=True)
