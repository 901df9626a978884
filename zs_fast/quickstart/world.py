"""A small invented world: people, towns, companies and books, the facts between them, as passages and questions.

    company --founded by--> person      company --based in--> town
    book    --written by--> person      town    --mayor-->    person
    person  --born in-->    town        person  --married to--> person

A one-hop question asks for one fact, a two-hop question for a fact of a fact. Names are drawn from fixed pools of
invented words, so that every word is known to the tokenizer while every fact is new.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

_CONSONANTS = (*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDINGS = {
    "first": ("a", "o", "is", "en", "i"),
    "family": ("er", "ov", "and", "ell", "ik", "orn"),
    "town": ("ka", "mere", "dal", "ford", "wick", "gard"),
    "company": ("ex", "on", "ium", "ax", "ity"),
    "book": ("ing", "ance", "ow", "eth", "ille"),
}
_POOL_SIZES = {"first": 64, "family": 96, "town": 72, "company": 64, "book": 64}
TOWN_ENDINGS = ("Bay", "Bridge", "Falls", "Hill", "Hollow", "Lake", "Mills", "Point", "Ridge", "Vale", "Wells", "Wood")
COMPANY_ENDINGS = ("Works", "Motors", "Foods", "Labs", "Press", "Mining", "Glass", "Steel", "Textiles", "Radio")
BOOK_NOUNS = ("Garden", "Lantern", "Mirror", "River", "Winter", "Harbor", "Clock", "Island", "Orchard", "Letter")
BOOK_NOUNS += ("Tower", "Road")


@cache
def name_pool(kind: str) -> tuple[str, ...]:
    """The invented words of one kind (`first`, `family`, `town`, `company`, `book`); all pools are disjoint."""
    taken = {word for other in _POOL_SIZES if other < kind for word in name_pool(other)}
    draws = random.Random(f"zs_fast quickstart names {kind}")
    words: list[str] = []
    while len(words) < _POOL_SIZES[kind]:
        syllables = draws.choice((1, 2))
        stem = "".join(draws.choice(_CONSONANTS) + draws.choice(_VOWELS) for _ in range(syllables))
        word = (stem + draws.choice(("", "l", "n", "r", "m")) + draws.choice(_ENDINGS[kind])).capitalize()
        if word not in taken:
            taken.add(word)
            words.append(word)
    return tuple(words)


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact. `ask` turns a subject into a question, `query` into a search, `state` into a sentence."""

    name: str
    subject: str
    """Kind of the subject: person, town, company or book."""
    value: str
    """Kind of the value: person or town."""
    ask: tuple[str, ...]
    query: str
    state: str
    noun: str
    """The value as a phrase inside a two-hop question: `the founder of {subject}`."""


RELATIONS: tuple[Relation, ...] = (
    Relation("founder", "company", "person", ("who founded {s}?", "who is the founder of {s}?"), "founder of {s}",
             "{s} was founded by {v}.", "the founder of {s}"),
    Relation("seat", "company", "town", ("where is {s} based?", "in which town is {s} based?"), "head office of {s}",
             "{s} is based in {v}.", "the town where {s} is based"),
    Relation("author", "book", "person", ("who wrote {s}?", "who is the author of {s}?"), "author of {s}",
             "{s} was written by {v}.", "the author of {s}"),
    Relation("mayor", "town", "person", ("who is the mayor of {s}?", "who is mayor in {s}?"), "mayor of {s}",
             "The mayor of {s} is {v}.", "the mayor of {s}"),
    Relation("birthplace", "person", "town", ("where was {s} born?", "in which town was {s} born?"),
             "birthplace of {s}", "{s} was born in {v}.", "the town where {s} was born"),
    Relation("spouse", "person", "person", ("who is married to {s}?", "who is the spouse of {s}?"), "spouse of {s}",
             "{s} is married to {v}.", "the spouse of {s}"),
)  # fmt: skip
RELATION = {relation.name: relation for relation in RELATIONS}
KINDS = ("person", "town", "company", "book")
RELATIONS_OF = {kind: tuple(r for r in RELATIONS if r.subject == kind) for kind in KINDS}
_FILLERS = {
    "company": ("It is an old company.", "It is a young company.", "It is known abroad."),
    "book": ("It is a novel.", "It is a book of poems.", "It was printed twice."),
    "town": ("It is a quiet town.", "It lies near the sea.", "It has an old market."),
    "person": ("", ""),
}


@dataclass(frozen=True, slots=True)
class Entity:
    """One named thing and its facts: `facts["founder"]` is the name of the founder."""

    name: str
    kind: str
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a question's solution: ask `relation` of `subject`, get `value`."""

    subject: str
    relation: Relation
    value: str

    @property
    def query(self) -> str:
        return self.relation.query.format(s=self.subject)

    @property
    def statement(self) -> str:
        return self.relation.state.format(s=self.subject, v=self.value)


@dataclass(frozen=True, slots=True)
class WorldQuestion:
    """A question with its solution. The answer is the last hop's value."""

    text: str
    hops: tuple[Hop, ...]

    @property
    def answer(self) -> str:
        return self.hops[-1].value


def _name(kind: str, draws: random.Random) -> str:
    if kind == "person":
        return f"{draws.choice(name_pool('first'))} {draws.choice(name_pool('family'))}"
    if kind == "town":
        return f"{draws.choice(name_pool('town'))} {draws.choice(TOWN_ENDINGS)}"
    if kind == "company":
        return f"{draws.choice(name_pool('company'))} {draws.choice(COMPANY_ENDINGS)}"
    return f"The {draws.choice(name_pool('book'))} {draws.choice(BOOK_NOUNS)}"


@dataclass(frozen=True, slots=True)
class World:
    """Entities by name. Make one with `make_world`."""

    entities: dict[str, Entity]

    def of_kind(self, kind: str) -> list[Entity]:
        return [entity for entity in self.entities.values() if entity.kind == kind]

    def passage(self, name: str, draws: random.Random) -> str:
        """The facts of one entity as two short sentences, in random order."""
        entity = self.entities[name]
        sentences = [RELATION[key].state.format(s=name, v=value) for key, value in entity.facts.items()]
        if len(sentences) < 2:
            sentences.append(draws.choice(_FILLERS[entity.kind]))
        draws.shuffle(sentences)
        if sentences[0].startswith("It "):
            sentences.reverse()
        return " ".join(sentences)

    def one_hop(self, entity: Entity, relation: Relation, draws: random.Random) -> WorldQuestion:
        text = draws.choice(relation.ask).format(s=entity.name)
        return WorldQuestion(text, (Hop(entity.name, relation, entity.facts[relation.name]),))

    def two_hop(self, entity: Entity, first: Relation, second: Relation, draws: random.Random) -> WorldQuestion:
        bridge = entity.facts[first.name]
        text = draws.choice(second.ask).format(s=first.noun.format(s=entity.name))
        hops = (Hop(entity.name, first, bridge), Hop(bridge, second, self.entities[bridge].facts[second.name]))
        return WorldQuestion(text, hops)

    def all_questions(self, draws: random.Random) -> list[WorldQuestion]:
        """Every one-hop question, then every two-hop question from a company, book or town."""
        found = [
            self.one_hop(entity, relation, draws)
            for entity in self.entities.values()
            for relation in RELATIONS_OF[entity.kind]
        ]
        for entity in self.entities.values():
            for first in RELATIONS_OF[entity.kind]:
                found += [self.two_hop(entity, first, second, draws) for second in RELATIONS_OF[first.value]]
        return [question for question in found if question.answer not in question.text]


def make_world(draws: random.Random, *, people: int, towns: int, companies: int, books: int) -> World:
    """A world with that many entities (an even number of people), every fact drawn at random."""
    names: dict[str, list[str]] = {}
    taken: set[str] = set()
    for kind, count in (("person", people), ("town", towns), ("company", companies), ("book", books)):
        names[kind] = []
        while len(names[kind]) < count:
            name = _name(kind, draws)
            if name not in taken:
                taken.add(name)
                names[kind].append(name)
    entities: dict[str, Entity] = {}
    for kind, members in names.items():
        for name in members:
            facts = {}
            for relation in RELATIONS_OF[kind]:
                value = draws.choice(names[relation.value])
                while value == name:
                    value = draws.choice(names[relation.value])
                facts[relation.name] = value
            entities[name] = Entity(name, kind, facts)
    # Marriage goes both ways: with an even number of people each is drawn a partner.
    for one, other in zip(names["person"][::2], names["person"][1::2], strict=True):
        entities[one].facts["spouse"], entities[other].facts["spouse"] = other, one
    return World(entities)
