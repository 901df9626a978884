"""TRL's GRPOTrainer on the ops of zs_kernels: a tiny random model learns to write letters, on a CPU, in seconds.

    pip install trl==1.16.0                            # beside this project: scripts/peers.sh .venv/bin/python
    python examples/trl_grpo_ops.py                    # with our ops
    python examples/trl_grpo_ops.py --compare          # once without and once with them: the same losses

`zs_kernels.compat.trl.patch()` is all that is needed around `trainer.train()`; the rest is an ordinary TRL script. In
float32 on a CPU the two traces agree to rounding: the largest difference is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is made here

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from zs_fast.testing import byte_tokenizer
from zs_kernels.compat import trl as ops_for_trl

SHOWN = ("loss", "grad_norm", "kl", "entropy", "reward")


def letters(completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of a completion that is ASCII letters."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def write_model(folder: Path, seed: int) -> None:
    """A random Qwen2 of 0.1 M parameters and its byte tokenizer, as files: TRL loads the reference model from there."""
    tokenizer = byte_tokenizer(chat_template=False)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model: str, output: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The logged numbers of each step."""
    config = GRPOConfig(
        output_dir=str(output),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        num_iterations=2,  # the second update on a batch has ratios other than 1
        learning_rate=1e-3,
        beta=0.04,
        epsilon_high=0.28,
        temperature=0.9,
        entropy_coef=0.01,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=arguments.seed,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": [f"Letters, please ({i}): " for i in range(16)]})
    trainer = GRPOTrainer(model=model, reward_funcs=letters, args=config, train_dataset=prompts)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a causal model; by default a tiny one is made")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="train without the ops first")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    traces: dict[str, list[dict[str, float]]] = {}
    calls: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = str(Path(folder) / "model")
            write_model(Path(model), arguments.seed)
        ways: list[tuple[str, Callable[[], Any]]] = [("zs_kernels", ops_for_trl.patch)]
        if arguments.compare:
            ways.insert(0, ("trl", contextlib.nullcontext))
        for name, way in ways:
            with way() as patched:
                traces[name] = train(model, Path(folder) / name, arguments)
            if patched is not None:
                calls = dict(patched.calls)
    if arguments.json:
        print(json.dumps({"traces": traces, "calls": calls}))
        return
    for name, trace in traces.items():
        print(name)
        for step, entry in enumerate(trace, 1):
            print(f"  step {step}: " + "  ".join(f"{key} {entry[key]:.6f}" for key in SHOWN if key in entry))
    if arguments.compare:
        differences = [abs(a["loss"] - b["loss"]) for a, b in zip(traces["trl"], traces["zs_kernels"], strict=True)]
        print(f"largest difference of a loss: {max(differences):.1e}")
    print(f"calls of our ops: {calls}")


if __name__ == "__main__":
    main()
