"""What the two tiny models are fine-tuned on: played searches for the policy, query-document pairs for the simulator.

Every example comes from a fresh throw-away world, so neither model can learn a fact of the world that is trained and
tested on; they learn to read, to copy and to ask. The policy's demonstrations are mostly bad play on purpose (it
guesses, stops after one hop, copies from the wrong document): what to do more often is for reinforcement learning to
find out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from zs_fast.quickstart.world import RELATIONS_OF, Hop, World, WorldQuestion, make_world
from zs_fast.search.prompts import observation, policy_prompt, simulator_prompt
from zs_fast.types import Question, SearchMode, SearchRequest

DOCUMENTS = 5
BEHAVIOURS = {"guess": 0.56, "full": 0.20, "one_hop": 0.10, "misread": 0.07, "wrong_query": 0.07}
"""Share of each kind of play among the policy's demonstrations."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A played trajectory: the prompt text, then (text, written by the policy?) segments in order."""

    prompt: str
    segments: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class LabelledSearch:
    """One query-document pair for the simulator: its prompt, and the documents it should write."""

    prompt: str
    documents: str


def fresh_world(draws: random.Random) -> World:
    return make_world(draws, people=12, towns=6, companies=5, books=5)


def draw_question(world: World, draws: random.Random, *, two_hop: bool) -> WorldQuestion:
    """A random question whose answer its text does not give away."""
    while True:
        entity = draws.choice(list(world.entities.values()))
        first = draws.choice(RELATIONS_OF[entity.kind])
        if two_hop:
            question = world.two_hop(entity, first, draws.choice(RELATIONS_OF[first.value]), draws)
        else:
            question = world.one_hop(entity, first, draws)
        if question.answer not in question.text:
            return question


def retrieve(world: World, hop: Hop, draws: random.Random, *, found: bool, first_share: float) -> list[str]:
    """Five passages as a search for `hop` might bring them: the subject's own (if `found`) among others.

    It stands first with probability `first_share`, else anywhere.
    """
    others = [name for name in world.entities if name != hop.subject]
    if not found:
        others = [n for n in others if hop.subject not in world.entities[n].facts.values()]
        others = [n for n in others if hop.value not in world.entities[n].facts.values() and n != hop.value]
    draws.shuffle(others)
    # A real retriever ranks passages that mention the subject, or look like it, above the rest.
    words = set(hop.subject.split())
    others.sort(key=lambda n: hop.subject not in world.entities[n].facts.values() and not words & set(n.split()))
    chosen = others[: DOCUMENTS - 1] if found else others[:DOCUMENTS]
    if found:
        chosen.insert(0 if draws.random() < first_share else draws.randrange(DOCUMENTS), hop.subject)
    return [world.passage(name, draws) for name in chosen]


def _search(thought: str, query: str) -> str:
    return f"<think> {thought} </think>\n<search> {query} </search>"


def _answer(thought: str, answer: str) -> str:
    return f"<think> {thought} </think>\n<answer> {answer} </answer>"


def demonstrate(
    world: World, question: WorldQuestion, behaviour: str, draws: random.Random, *, noise: float = 0.15
) -> Demonstration:
    """One trajectory that plays `question` in the given way; at most three searches."""
    segments: list[tuple[str, bool]] = []
    value_kind = question.hops[-1].relation.value
    strangers = [entity.name for entity in world.of_kind(value_kind) if entity.name != question.answer]
    prompt = policy_prompt(question.text)
    if behaviour == "guess":
        return Demonstration(prompt, ((_answer("I know this.", draws.choice(strangers)), True),))
    hops = question.hops[:1] if behaviour == "one_hop" else question.hops
    thought = ""
    searches = 0
    for hop in hops:
        query = hop.query
        if behaviour == "wrong_query":
            query = draws.choice((hop.relation.query.format(s=draws.choice(strangers)), question.text.rstrip("?")))
        while True:
            segments.append((_search(f"{thought}I need the {query}.", query), True))
            searches += 1
            found = draws.random() >= noise and query == hop.query
            segments.append((observation(retrieve(world, hop, draws, found=found, first_share=0.6)), False))
            if found or searches == 3:
                break
            thought = "The documents do not say it. "
        if not found:
            segments.append((_answer("The documents do not say it. I have to guess.", draws.choice(strangers)), True))
            return Demonstration(prompt, tuple(segments))
        statement = hop.statement
        if behaviour == "misread":
            wrong = draws.choice(strangers)
            statement = hop.relation.state.format(s=hop.subject, v=wrong)
            segments.append((_answer(f"{statement} I have the answer.", wrong), True))
            return Demonstration(prompt, tuple(segments))
        thought = f"{statement} "
    segments.append((_answer(f"{thought}I have the answer.", hops[-1].value), True))
    return Demonstration(prompt, tuple(segments))


def policy_demonstration(draws: random.Random, *, only_full: bool = False) -> Demonstration:
    """Play in a fresh world, half of it two-hop; its behaviour is drawn from BEHAVIOURS unless `only_full`."""
    world = fresh_world(draws)
    question = draw_question(world, draws, two_hop=draws.random() < 0.5)
    behaviour = "full" if only_full else draws.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
    return demonstrate(world, question, behaviour, draws)


def labelled_search(draws: random.Random) -> LabelledSearch:
    """A query as the policy might send it, with the documents a useful or a noisy search engine would return."""
    world = fresh_world(draws)
    question = draw_question(world, draws, two_hop=draws.random() < 0.6)
    mode = draws.choice((SearchMode.USEFUL, SearchMode.NOISY))
    hop = draws.choice(question.hops)
    documents = retrieve(world, hop, draws, found=mode is SearchMode.USEFUL, first_share=0.9)
    if mode is SearchMode.NOISY:
        documents = [document for document in documents if question.answer not in document]
        while len(documents) < DOCUMENTS:
            name = draws.choice(list(world.entities))
            passage = world.passage(name, draws)
            if question.answer not in passage and name != hop.subject:
                documents.append(passage)
    request = SearchRequest(
        step=0,
        question=Question(id="demonstration", text=question.text, answers=(question.answer,), source="quickstart"),
        sample=0,
        turn=0,
        query=hop.query,
        noise_probability=0.0,
    )
    prompt = simulator_prompt("fine_tuned", mode, request, DOCUMENTS)
    text = "\n".join(f"Doc {number}: {document}" for number, document in enumerate(documents, 1))
    return LabelledSearch(prompt, text)
