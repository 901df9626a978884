"""What documents are worth to a fixed policy: the F1 of the answers that it gives after reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zs_fast.config import RunConfig
from zs_fast.models.load import LoadedModel
from zs_fast.rollout.play import Progress
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.codec import Codec
from zs_fast.search.environment import fit_documents
from zs_fast.search.parser import parse_turn
from zs_fast.search.prompts import STOP_STRINGS, policy_prompt
from zs_fast.search.reward import f1
from zs_fast.simulator.ask import ask
from zs_fast.types import Answer, Role, Sampling, SearchMode, SearchResult

_SEARCH = "<think> I should look this up. </think>\n<search> {query} </search>"


def read(
    reader: LoadedModel,
    results: Mapping[SearchMode, Sequence[SearchResult]],
    config: RunConfig,
    *,
    on_progress: Progress | None = None,
) -> dict[SearchMode, list[float]]:
    """The F1 after each search: the question, the search as if the reader had asked it, its documents, then one turn of
    the reader, greedily. A reader that searches again instead of answering scores 0, and so does a failed search."""
    codec = Codec(reader.tokenizer, chat_template=config.model.chat_template)
    engine = TransformersEngine(
        {Role.POLICY: reader},
        slots=config.engine.slots,
        max_context_tokens=config.game.max_context_tokens,
        batch_invariant=config.engine.batch_invariant,
    )
    served = [(mode, n, result) for mode, of in results.items() for n, result in enumerate(of) if result.documents]
    prompts = [context(result, codec, config) for _, _, result in served]
    how = Sampling(max_new_tokens=config.game.max_new_tokens, temperature=0.0, stop=STOP_STRINGS)
    try:
        completions = ask(engine, Role.POLICY, prompts, [how] * len(prompts), on_progress=on_progress)
    finally:
        engine.close()
    scores = {mode: [0.0] * len(of_mode) for mode, of_mode in results.items()}
    for (mode, number, result), completion in zip(served, completions, strict=True):
        action = parse_turn(codec.decode(completion.token_ids))
        if isinstance(action, Answer):
            scores[mode][number] = f1(action.text, result.request.question.answers)
    return scores


def context(result: SearchResult, codec: Codec, config: RunConfig) -> list[int]:
    """The ids that the reader goes on from."""
    prompt = codec.encode_prompt(policy_prompt(result.request.question.text))
    searched = codec.encode_untrusted(_SEARCH.format(query=" ".join(result.request.query.split())))
    _, documents = fit_documents(result.documents, config.game.max_observation_tokens, codec)
    return [*prompt, *searched, *documents]
