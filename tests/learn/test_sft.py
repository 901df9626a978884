from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from zs_fast.config import SftConfig
from zs_fast.errors import ConfigError, DataError, MemoryBudgetError
from zs_fast.learn.sft import SftStep, SftValidation, sft_command, train_sft, validation_loss
from zs_fast.learn.sft_data import Message, SftExample, encode_conversation, read_conversations
from zs_fast.models.load import load_model, save_model
from zs_fast.models.lora import adapter_rank
from zs_fast.recipe_files import load_recipe
from zs_fast.testing import byte_tokenizer, tiny_model


def small(seed: int = 0):  # type: ignore[no-untyped-def]
    return tiny_model(seed=seed, hidden_size=32, layers=1, heads=2, kv_heads=1)


def example(prompt: str, completion: str) -> SftExample:
    messages = [Message("user", prompt), Message("assistant", completion)]
    return encode_conversation(messages, byte_tokenizer(chat_template=False), chat_template=False)


EXAMPLES = [example("a", "xy"), example("bcd", "z"), example("ef", "wxyz")]


def test_overfits_a_tiny_set() -> None:
    losses = train_sft(small(), EXAMPLES, SftConfig(steps=100, batch_size=3, learning_rate=1e-2), seed=0)
    assert len(losses) == 100 and losses[0] > 3.0 and losses[-1] < 0.2


def test_prompts_are_not_learnt() -> None:
    """The loss is the mean over the masked-in tokens alone, against transformers' own forward pass."""
    model = small()
    model.model.set_attn_implementation("eager")
    total, count = 0.0, 0
    for item in EXAMPLES:
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([item.input_ids]), use_cache=False).logits[0]
        table = torch.log_softmax(logits, -1)
        for position, flag in enumerate(item.loss_mask):
            if flag:
                total -= float(table[position - 1, item.input_ids[position]])
                count += 1
    losses = train_sft(small(), EXAMPLES, SftConfig(steps=1, batch_size=3, learning_rate=1e-3), seed=0)
    assert count == 3 + 2 + 5  # completions and the end token
    assert losses[0] == pytest.approx(total / count, rel=1e-4)


def test_micro_batches_change_nothing_and_the_seed_decides_everything() -> None:
    def run(seed: int, token_budget: int) -> list[float]:
        config = SftConfig(steps=5, batch_size=2, learning_rate=1e-3, token_budget=token_budget)
        return train_sft(small(), EXAMPLES, config, seed=seed)

    assert run(0, 1000) == run(0, 1000)
    assert run(0, 1) == pytest.approx(run(0, 1000), rel=1e-4)
    assert run(0, 1000) != run(1, 1000)


def test_every_epoch_sees_every_example_once() -> None:
    seen: list[int] = []
    config = SftConfig(steps=3, batch_size=2, learning_rate=1e-9)
    train_sft(small(), EXAMPLES, config, seed=3, on_step=lambda step: seen.append(step.num_loss_tokens))
    assert sum(seen) == 2 * (3 + 2 + 5)  # 6 draws from 3 examples: two whole epochs


def test_steps_are_reported_and_a_non_finite_one_is_skipped() -> None:
    model = small()
    steps: list[SftStep] = []
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("inf"))
    before = [parameter.detach().clone() for parameter in model.model.parameters()]
    train_sft(model, EXAMPLES, SftConfig(steps=2, batch_size=1), seed=0, on_step=steps.append)
    assert [step.skipped for step in steps] == [True, True] and [step.step for step in steps] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))


def test_validation_scores_what_is_not_learnt_and_changes_nothing() -> None:
    """The loss of held-out examples is that of a step on them alone, and training goes as it does without."""
    held_out, learnt = EXAMPLES[:1], EXAMPLES[1:]
    config = SftConfig(steps=5, batch_size=2, learning_rate=1e-2, validate_every=2)
    seen: list[SftValidation] = []
    model = small()
    losses = train_sft(
        model,
        learnt,
        config,
        seed=0,
        validation=held_out,
        quality=lambda judged: {"same": float(judged is model)},
        on_validation=seen.append,
    )
    assert losses == train_sft(small(), learnt, config, seed=0)
    assert [found.step for found in seen] == [0, 2, 4, 5] and all(found.quality == {"same": 1.0} for found in seen)
    (alone,) = train_sft(small(), held_out, SftConfig(steps=1, batch_size=1), seed=0)
    assert seen[0].loss == pytest.approx(alone, rel=1e-6)
    both = train_sft(small(), EXAMPLES, SftConfig(steps=1, batch_size=3), seed=0)
    assert validation_loss(small(), EXAMPLES, token_budget=1) == pytest.approx(both[0], rel=1e-6)
    unasked: list[SftValidation] = []
    train_sft(small(), learnt, config, seed=0, quality=lambda _: {"x": 1.0}, on_validation=unasked.append)
    assert [found.loss for found in unasked] == [None] * 4


def test_a_validation_example_that_is_too_long_is_named() -> None:
    config = SftConfig(steps=1, batch_size=1, max_tokens=4)
    with pytest.raises(DataError, match="validation example 1 has 9 tokens"):
        train_sft(small(), EXAMPLES[:1], config, seed=0, validation=[example("abcd", "wxyz")])


@pytest.fixture
def sft_files(tmp_path: Path) -> Path:
    save_model(small(), tmp_path / "base")
    rows = [{"prompt": f"{n}?", "completion": "yes" if n % 2 else "no"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def command(folder: Path, name: str, quality=None, **overrides: object) -> dict:  # type: ignore[no-untyped-def]
    given = {
        "output": folder / name,
        "data": folder / "data.jsonl",
        "model.path": folder / "base",
        "sft.steps": 30,
        "sft.batch_size": 4,
        "sft.learning_rate": 1e-2,
    }
    config = load_recipe([], {key: [str(value)] for key, value in (given | overrides).items()})
    return sft_command(config, torch.device("cpu"), quality=quality)


def test_an_adapter_is_learnt_saved_and_learnt_further(sft_files: Path) -> None:
    options = {"model.lora_rank": 4, "sft.validation_fraction": 0.25, "sft.validate_every": 10}
    result = command(sft_files, "tuned", lambda model: {"rank": adapter_rank(model.model)}, **options)
    assert result["examples"] == 9 and result["validation_loss_after"] < 0.5 * result["validation_loss_before"]
    rows = [json.loads(line) for line in (sft_files / "tuned" / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in judged] == [0, 10, 20, 30] and all(row["quality/rank"] == 4 for row in judged)
    assert len(rows) == 34 and judged[0]["validation/loss"] == result["validation_loss_before"]
    tuned, base = load_model(result["model"]), load_model(sft_files / "base")
    assert tuned.base == str(sft_files / "base") and adapter_rank(tuned.model) == 4
    weights = dict(base.model.named_parameters())
    for name, parameter in tuned.model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, weights[name.replace(".base_layer", "")]), name
    further = command(
        sft_files, "further", **{"model.path": result["model"], "sft.steps": 1, "sft.learning_rate": 1e-6}
    )
    assert further["first_loss"] < 0.5 * result["first_loss"]
    assert load_model(further["model"]).base == str(sft_files / "base")


def test_all_weights_are_learnt_without_a_rank(sft_files: Path) -> None:
    result = command(sft_files, "full", **{"sft.validation_data": sft_files / "data.jsonl"})
    assert result["validation_loss_after"] < 0.5 * result["validation_loss_before"]
    assert (sft_files / "full" / "model" / "model.safetensors").exists()


def test_validation_settings_that_can_not_be(sft_files: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.validation_fraction 0\.5: .* one of the two"):
        command(sft_files, "x", **{"sft.validation_data": "y", "sft.validation_fraction": 0.5})
    with pytest.raises(DataError, match="holds back all of 12 examples"):
        command(sft_files, "x", **{"sft.validation_fraction": 0.99})
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        command(sft_files, "x", **{"sft.validation_data": "absent.jsonl"})


def test_long_and_empty_examples() -> None:
    long = example("a" * 50, "b")
    config = SftConfig(steps=1, batch_size=1, max_tokens=20)
    with pytest.raises(DataError, match=r"example 2 has 52 tokens, more than sft.max_tokens = 20"):
        train_sft(small(), [EXAMPLES[0], long], config, seed=0)
    skipping = config.model_copy(update={"skip_long": True})
    assert len(train_sft(small(), [EXAMPLES[0], long], skipping, seed=0)) == 1
    with pytest.raises(DataError, match="none of 1 examples"):
        train_sft(small(), [long], skipping, seed=0)
    with pytest.raises(DataError, match="no examples"):
        train_sft(small(), [], config, seed=0)
    with pytest.raises(DataError, match="example 1 has no token to learn from"):
        train_sft(small(), [SftExample(input_ids=(1, 2), loss_mask=(False, False))], config, seed=0)


ROWS = [
    ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "p"},
                {"role": "assistant", "content": "c"},
            ]
        },
        [("system", "s"), ("user", "p"), ("assistant", "c")],
    ),
    ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\n\nx"), ("assistant", "o")]),
    ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
    (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
        [("user", "p"), ("assistant", "c")],
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_the_four_forms_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [row for row, _ in ROWS]
    text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    got = [[(message.role, message.content) for message in conversation] for conversation in read_conversations(path)]
    assert got == [expected for _, expected in ROWS]


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"prompt": "p", "completion": 3}', ["row 1", "field completion", "3"]),
        ('{"prompt": "p", "completion": ""}', ["row 1", "field completion"]),
        ('{"prompt": "p", "completion": "c"}\n{"text": "x"}', ["row 2", "text"]),
        ("not json", ["row 1", "not JSON"]),
        ("[1]", ["row 1", "object", "list"]),
        ('{"messages": []}', ["field messages"]),
        ('{"messages": [{"role": "robot", "content": "x"}]}', ["message 1", "role", "robot"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["assistant"]),
        ("", ["no examples"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    for word in ["data.jsonl", *words]:
        assert word in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_conversations(tmp_path / "absent.jsonl")


def test_a_conversation_has_the_ids_of_the_prompts_it_will_be_sampled_from() -> None:
    tokenizer = byte_tokenizer()
    conversation = [Message("user", "a"), Message("assistant", "bc"), Message("user", "d"), Message("assistant", "e")]
    got = encode_conversation(conversation, tokenizer, chat_template=True)
    messages = [{"role": m.role, "content": m.content} for m in conversation]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(got.input_ids[: len(start)]) == start and not any(got.loss_mask[: len(start)])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(got.input_ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    learnt = [index for index, flag in zip(got.input_ids, got.loss_mask, strict=True) if flag]
    end = tokenizer.eos_token_id
    # the words and the end token of each turn; not the newline that the template puts behind it
    assert learnt == [*tokenizer("bc")["input_ids"], end, *tokenizer("e")["input_ids"], end]


def test_without_a_template_the_texts_follow_one_another() -> None:
    tokenizer = byte_tokenizer(chat_template=False)
    conversation = [Message("system", "s"), Message("user", "p"), Message("assistant", "c")]
    got = encode_conversation(conversation, tokenizer, chat_template=True)
    assert list(got.input_ids) == [*tokenizer("s\n\npc")["input_ids"], tokenizer.eos_token_id]
    assert got.loss_mask == (False,) * 4 + (True, True)


def test_memory_that_runs_out_splits_the_batch_and_is_paid_for_once() -> None:
    """Forward passes over more than 8 tokens fail: the losses are those of a run with a budget of 8 tokens."""
    config = SftConfig(steps=4, batch_size=3, learning_rate=1e-3)
    expected = train_sft(small(), EXAMPLES, config, seed=0)
    model, failed = small(), []

    def run_out(module, arguments, options) -> None:  # type: ignore[no-untyped-def]
        if options["input_ids"].shape[1] > 8:
            failed.append(options["input_ids"].shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.model.register_forward_pre_hook(run_out, with_kwargs=True)
    losses = train_sft(model, EXAMPLES, config, seed=0)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert 0 < len(failed) <= 2


def test_an_example_that_never_fits_is_one_clear_error() -> None:
    model = small()

    def run_out(module, arguments) -> None:  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.model.register_forward_pre_hook(run_out)
    with pytest.raises(MemoryBudgetError, match=r"in fine-tuning .*sft\.max_tokens"):
        train_sft(model, EXAMPLES, SftConfig(steps=1, batch_size=3), seed=0)
