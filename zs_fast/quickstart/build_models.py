"""Rebuild the quickstart's two tiny models: `python -m zs_fast.quickstart.build_models`. About an hour on two cores.

Both start as one base: a 1M-parameter Qwen2 that first learns to copy, then to play and to write documents in
throw-away worlds. The policy is then fine-tuned on mostly bad play, the simulator on labelled query-document pairs, all
with the project's own `train_sft`. Weights are stored as bfloat16.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from zs_fast.config import SftConfig
from zs_fast.learn.sft import SftExample, SftStep, train_sft
from zs_fast.models.attention import ATTENTION_NAME
from zs_fast.models.load import LoadedModel, load_model
from zs_fast.quickstart.demonstrations import labelled_search, policy_demonstration
from zs_fast.quickstart.tokenizer import build_tokenizer
from zs_fast.search.codec import Codec

FOLDER = Path(__file__).parent
BETAS = (0.9, 0.98)
COPY = SftConfig(
    steps=350, batch_size=64, learning_rate=3e-3, warmup_steps=50, final_learning_rate_fraction=1.0, betas=BETAS
)
BASE = SftConfig(
    steps=1600, batch_size=16, learning_rate=2e-3, warmup_steps=50, final_learning_rate_fraction=0.1, betas=BETAS
)
READING = SftConfig(
    steps=2400, batch_size=16, learning_rate=2e-3, warmup_steps=50, final_learning_rate_fraction=0.02, betas=BETAS
)
POLICY = SftConfig(
    steps=250, batch_size=32, learning_rate=4e-4, warmup_steps=20, final_learning_rate_fraction=0.1, betas=BETAS
)
SIMULATOR = SftConfig(
    steps=350, batch_size=32, learning_rate=8e-4, warmup_steps=20, final_learning_rate_fraction=0.1, betas=BETAS
)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """A random Qwen2 with 4 layers of 4 heads of 32, whose first layer looks one and two tokens back."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION_NAME,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    look_back(model, offsets=(1, 1, 2, 2))
    return LoadedModel(model=model, tokenizer=tokenizer, path=FOLDER, name="quickstart base")


def look_back(model: Qwen2ForCausalLM, offsets: Sequence[int], strength: float = 5.0) -> None:
    """Set the first layer's query and key biases so that head i attends `offsets[i]` tokens back.

    With rotary positions, a constant query q and key k score Re(q conj(k) e^{i theta (m - n)}) at distance m - n;
    turning q by -offset * theta puts the peak at `offset`. Copying needs such a head, and a model this small takes
    thousands of steps to find it by itself; with it, copying is learned in a few hundred.
    """
    config = model.config
    half = config.hidden_size // config.num_attention_heads // 2
    angles = torch.tensor([config.rope_parameters["rope_theta"] ** (-index / half) for index in range(half)])
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        key = torch.zeros(config.num_key_value_heads, 2 * half)
        key[:, :half] = strength
        attention.k_proj.bias.copy_(key.flatten())
        turned = [torch.cat([torch.cos(o * angles), -torch.sin(o * angles)]) for o in offsets]
        attention.q_proj.bias.copy_(strength * torch.cat(turned))


def copy_example(draws: random.Random, vocabulary_size: int) -> SftExample:
    """Random tokens, then the same again; the second time is to be predicted."""
    tokens = [draws.randrange(vocabulary_size) for _ in range(draws.randint(4, 24))]
    return SftExample(
        input_ids=(*tokens, *tokens), loss_mask=(False,) * (len(tokens) + 1) + (True,) * (len(tokens) - 1)
    )


def policy_example(draws: random.Random, codec: Codec, end: int, *, only_full: bool) -> SftExample:
    demonstration = policy_demonstration(draws, only_full=only_full)
    played = [(codec.encode_untrusted(text), by_policy) for text, by_policy in demonstration.segments]
    return SftExample.from_segments([(codec.encode_prompt(demonstration.prompt), False), *played, ([end], True)])


def simulator_example(draws: random.Random, codec: Codec, end: int) -> SftExample:
    pair = labelled_search(draws)
    prompt, documents = codec.encode_prompt(pair.prompt), codec.encode_untrusted(pair.documents)
    return SftExample.from_segments([(prompt, False), ([*documents, end], True)])


def base_example(draws: random.Random, codec: Codec, end: int, *, simulator_share: float = 0.4) -> SftExample:
    """What both models start from: documents written to order, and questions played well."""
    if draws.random() < simulator_share:
        return simulator_example(draws, codec, end)
    return policy_example(draws, codec, end, only_full=True)


def fine_tune(model: LoadedModel, name: str, config: SftConfig, make: Callable[[random.Random], SftExample]) -> None:
    """Train `model` in place on as many fresh examples as the phase has room for, printing the loss now and then."""
    draws = random.Random(f"zs_fast quickstart {name}")
    examples = [make(draws) for _ in range(config.steps * config.batch_size)]

    recent: list[float] = []

    def report(step: SftStep) -> None:
        recent.append(step.loss)
        if step.step % 50 == 0:
            print(f"{name} step {step.step}/{config.steps}: loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()

    train_sft(model, examples, config, seed=0, on_step=report)


def save(model: LoadedModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A Hugging Face folder with the weights in `dtype`; the model itself stays as it is."""
    model.model.save_pretrained(folder, state_dict={k: v.to(dtype) for k, v in model.model.state_dict().items()})
    model.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("build/quickstart_base"), help="where the base model lies")
    parser.add_argument(
        "--only", choices=("base", "policy", "simulator"), help="build one; policy and simulator need the base"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder that gets policy/ and simulator/")
    arguments = parser.parse_args()
    if arguments.only in (None, "base"):
        base = new_model(build_tokenizer())
        codec, end = Codec(base.tokenizer, chat_template=True), base.tokenizer.eos_token_id
        fine_tune(base, "copy", COPY, lambda draws: copy_example(draws, codec.vocab_size))
        fine_tune(base, "base", BASE, lambda draws: base_example(draws, codec, end))
        fine_tune(base, "reading", READING, lambda draws: base_example(draws, codec, end, simulator_share=0.25))
        save(base, arguments.base, torch.float32)
    if arguments.only in (None, "policy"):
        policy = load_model(arguments.base)
        codec, end = Codec(policy.tokenizer, chat_template=True), policy.tokenizer.eos_token_id
        fine_tune(policy, "policy", POLICY, lambda draws: policy_example(draws, codec, end, only_full=False))
        save(policy, arguments.output / "policy")
    if arguments.only in (None, "simulator"):
        simulator = load_model(arguments.base)
        codec, end = Codec(simulator.tokenizer, chat_template=True), simulator.tokenizer.eos_token_id
        fine_tune(simulator, "simulator", SIMULATOR, lambda draws: simulator_example(draws, codec, end))
        save(simulator, arguments.output / "simulator")


if __name__ == "__main__":
    main()
