"""`zs-fast label`: collected searches -> balanced examples of useful and noisy ones, in the form simulators learn from.

Written into the output folder, the questions split once and for all:

    train_alpaca.jsonl        {"instruction": the simulator's prompt, "input": "", "output": "Doc 1: ...\\nDoc 2: ..."}
    train_sharegpt.jsonl      the same as {"conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}
    train_searches.jsonl      each search as it was really answered, for `zs-fast simulator-quality`
    validation_*.jsonl        likewise, of the questions that are held out
    labels.json               counts, and how often an answer stands where
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError, DataError
from zs_fast.ranks import hold_run_folder
from zs_fast.search.prompts import simulator_prompt
from zs_fast.search.reward import contains_answer, normalise, tells_nothing
from zs_fast.simulator.collect import FILE
from zs_fast.simulator.judge import judged_useful
from zs_fast.simulator.records import (
    CollectedTrajectory,
    FoundSearch,
    LabelledSearch,
    read_trajectories,
    to_row,
    write_json,
    write_rows,
)
from zs_fast.simulator.snippets import snippet
from zs_fast.system.seeds import seed_for
from zs_fast.types import SearchMode

SUMMARY_FILE = "labels.json"
SPLITS = ("train", "validation")


class Played(NamedTuple):
    """A search and the trajectory it was made in."""

    trajectory: CollectedTrajectory
    search: FoundSearch


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The labelled searches of one split, balanced, and the searches as they were really answered."""

    examples: list[LabelledSearch]
    real: list[LabelledSearch]
    counts: dict[str, float]


def label(config: RunConfig) -> dict[str, Any]:
    """Label the trajectories of the file or folder `data` by `label.by`; the statistics, ready for JSON.

    Raises ConfigError when the output folder holds labels already, DataError when a split is left without examples.
    """
    output = config.output or Path("runs") / f"{config.name}_labels"
    if (output / SUMMARY_FILE).exists():
        raise ConfigError(f"{output / SUMMARY_FILE} exists already. Choose another --output, or remove the folder.")
    source = Path(config.data).expanduser()
    trajectories = read_trajectories(source / FILE if source.is_dir() else source)
    with ExitStack() as stack:
        hold_run_folder(output, stack)
        searches = [Played(trajectory, search) for trajectory in trajectories for search in trajectory.searches]
        useful = _usefulness(searches, config)
        held_out = held_out_questions(trajectories, config)
        summary: dict[str, Any] = {"by": config.label.by, "searches": len(searches)}
        for split in SPLITS:
            part = [
                (played, verdict)
                for played, verdict in zip(searches, useful, strict=True)
                if (normalise(played.trajectory.question.text) in held_out) == (split == "validation")
            ]
            labels = make_labels(part, config, split)
            if not labels.examples and not (split == "validation" and not held_out):
                raise DataError(
                    f"{config.data}: the {split} questions have {labels.counts['useful_found']:.0f} useful and "
                    f"{labels.counts['noisy_found']:.0f} noisy searches; a simulator needs some of both. Collect more "
                    "questions, or more documents per search (collect.documents), or label by something else."
                )
            _write(output, split, labels, config)
            summary[split] = labels.counts
            print(f"{split}: " + ", ".join(f"{name} {value:.4g}" for name, value in labels.counts.items()), flush=True)
        write_json(output / SUMMARY_FILE, summary)
    return summary


def held_out_questions(trajectories: Sequence[CollectedTrajectory], config: RunConfig) -> set[str]:
    """The normalised texts of the questions that are held out: two ids of one question never part."""
    texts = sorted({normalise(trajectory.question.text) for trajectory in trajectories})
    ranked = sorted(texts, key=lambda text: seed_for(config.seed, question_id=text, purpose="held_out"))
    count = round(config.label.validation_fraction * len(texts))
    if config.label.validation_fraction and not 0 < count < len(texts):
        raise DataError(
            f"label.validation_fraction = {config.label.validation_fraction} of {len(texts)} questions is {count}; "
            "both parts need some. Collect more questions, or change the share."
        )
    return set(ranked[:count])


def make_labels(searches: Sequence[tuple[Played, bool | None]], config: RunConfig, split: str) -> Labels:
    """Balanced examples out of (search, do its documents help? None: can't be told).

    The same query for the same question counts once. Of the more frequent mode some are left out, drawn from the seed.
    """
    elsewhere = _found_elsewhere([played for played, _ in searches]) if config.label.answers_from == "question" else {}
    found: dict[SearchMode, dict[tuple[str, str], LabelledSearch]] = {SearchMode.USEFUL: {}, SearchMode.NOISY: {}}
    real: dict[tuple[str, str], LabelledSearch] = {}
    duplicates = untold = 0
    for played, verdict in searches:
        question, search = played.trajectory.question, played.search
        key = normalise(question.text), normalise(search.query)
        if key in real:
            duplicates += 1
            continue
        modes = _modes(played, verdict, config, elsewhere.get(key[0], ()))
        untold += not modes
        if config.label.by == "answer" and verdict is None:
            continue
        shown = _snippets(search.documents, config, answers=question.answers)[: config.simulator.documents]
        real[key] = LabelledSearch(question=question, query=search.query, mode=SearchMode.REAL, documents=shown)
        for mode, documents in modes:
            found[mode][key] = LabelledSearch(question=question, query=search.query, mode=mode, documents=documents)
    kept = min(len(of_mode) for of_mode in found.values())
    draws = random.Random(seed_for(config.seed, purpose=f"balance {split}"))
    examples = [one for of_mode in found.values() for one in draws.sample(list(of_mode.values()), kept)]
    draws.shuffle(examples)
    counts: dict[str, float] = {
        "questions": len({question for question, _ in real}),
        "examples": len(examples),
        "useful_found": len(found[SearchMode.USEFUL]),
        "noisy_found": len(found[SearchMode.NOISY]),
        "duplicates_left_out": duplicates,
        "without_a_label": untold,
    }
    return Labels(examples=examples, real=list(real.values()), counts=counts | leaks(examples, list(real.values())))


def leaks(examples: Sequence[LabelledSearch], real: Sequence[LabelledSearch]) -> dict[str, float]:
    """How often a gold answer stands in the documents of each mode, and in the query itself."""
    shares: dict[str, float] = {}
    for mode in SearchMode:
        of_mode = [one for one in (*examples, *real) if one.mode is mode]
        if of_mode:
            shares[f"{mode}_contains_answer"] = _share(
                [contains_answer(one.documents, one.question.answers) for one in of_mode]
            )
    if real:
        shares["query_contains_answer"] = _share([contains_answer([one.query], one.question.answers) for one in real])
    return shares


def as_document_list(documents: Sequence[str]) -> str:
    """What a simulator should write: one document a line, `Doc 1: ...`."""
    return "\n".join(f"Doc {number}: {document}" for number, document in enumerate(documents, start=1))


def _usefulness(searches: Sequence[Played], config: RunConfig) -> list[bool | None]:
    """Of each search: do its documents help? None where that can't be told."""
    if config.label.by == "judge":
        return judged_useful([(played.search.query, played.search.documents) for played in searches], config)
    if config.label.by == "outcome":
        if any(played.trajectory.f1 is None for played in searches):
            raise DataError(
                f"{config.data} was collected with collect.play = 'question', so no trajectory ended well or badly. "
                "Take label.by = 'answer' or 'judge', or collect with a policy."
            )
        return [(played.trajectory.f1 or 0.0) >= config.label.correct_f1 for played in searches]
    return [
        None
        if tells_nothing(played.trajectory.question.answers)
        else contains_answer(played.search.documents, played.trajectory.question.answers)
        for played in searches
    ]


def _found_elsewhere(searches: Sequence[Played]) -> dict[str, tuple[str, ...]]:
    """Of each question, by its normalised text: the document with an answer that most of its searches found."""
    counts: dict[str, Counter[str]] = {}
    for trajectory, search in searches:
        counted = counts.setdefault(normalise(trajectory.question.text), Counter())
        counted.update(text for text in search.documents if contains_answer([text], trajectory.question.answers))
    return {question: tuple(text for text, _ in counted.most_common(1)) for question, counted in counts.items()}


def _modes(
    played: Played, verdict: bool | None, config: RunConfig, elsewhere: Sequence[str]
) -> list[tuple[SearchMode, tuple[str, ...]]]:
    """(mode, documents) of the examples that a search gives; by answer there may be one of each mode.

    elsewhere: what stands in for documents with an answer where the search itself found none.
    """
    k = config.simulator.documents
    documents, answers = played.search.documents, played.trajectory.question.answers
    if verdict is None:
        return []
    if config.label.by != "answer":
        shown = _snippets(documents, config, answers=answers)[:k]
        return [(SearchMode.USEFUL if verdict else SearchMode.NOISY, shown)] if len(shown) == k else []
    holding = [text for text in documents if contains_answer([text], answers)] or elsewhere
    others = [text for text in documents if not contains_answer([text], answers)]
    modes: list[tuple[SearchMode, tuple[str, ...]]] = []
    shown = tuple(text for text in _snippets(holding, config, answers=answers) if contains_answer([text], answers))
    useful = (*shown, *_snippets(others, config))[:k]
    if shown and len(useful) == k:
        modes.append((SearchMode.USEFUL, useful))
    if len(others) >= k:
        modes.append((SearchMode.NOISY, _snippets(others, config)[:k]))
    return modes


def _snippets(documents: Sequence[str], config: RunConfig, answers: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(snippet(document, config.label.document_words, answers) for document in documents)


def _write(output: Path, split: str, labels: Labels, config: RunConfig) -> None:
    pairs = [
        (
            simulator_prompt("fine_tuned", example.mode, example.request(), config.simulator.documents),
            as_document_list(example.documents),
        )
        for example in labels.examples
    ]
    write_rows(output / f"{split}_alpaca.jsonl", [{"instruction": p, "input": "", "output": d} for p, d in pairs])
    write_rows(
        output / f"{split}_sharegpt.jsonl",
        [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": d}]} for p, d in pairs],
    )
    write_rows(output / f"{split}_searches.jsonl", [to_row(search) for search in labels.real])


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
