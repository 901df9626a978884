"""The warm-start example teaches the form of play, and only what the policy would write."""

from __future__ import annotations

import importlib.util
from itertools import groupby
from pathlib import Path

from zs_fast.models.load import load_model
from zs_fast.search.codec import Codec
from zs_fast.search.parser import parse_turn
from zs_fast.types import Answer, Question, Search

EXAMPLE = Path(__file__).parents[2] / "examples" / "warm_start.py"


def load_example():
    spec = importlib.util.spec_from_file_location("warm_start", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_demonstration_searches_reads_and_answers():
    tokenizer = load_model("quickstart:policy").tokenizer
    codec = Codec(tokenizer, chat_template=True)
    question = Question(id="q", text="who wrote emma?", answers=("Jane Austen",), source="s")
    example = load_example().demonstration(question, codec, tokenizer.eos_token_id)
    marked = list(zip(example.input_ids, example.loss_mask, strict=True))
    spans = [[token for token, _ in run] for is_loss, run in groupby(marked, key=lambda pair: pair[1]) if is_loss]
    search, answer = (parse_turn(codec.decode(span)) for span in spans)
    assert search == Search("who wrote emma") and answer == Answer("Jane Austen")
    assert example.input_ids[-1] == tokenizer.eos_token_id and example.loss_mask[-1]
    masked = codec.decode(token for token, is_loss in marked if not is_loss)
    assert masked.endswith("<information>Doc 1: who wrote emma: Jane Austen.</information>\n\n")
