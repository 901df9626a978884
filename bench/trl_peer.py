"""TRL's GRPOTrainer takes the step of a `Stage`: the same questions, tokens, documents and rewards, in TRL's way.

Its own door for games is used (`rollout_func`, with a mask over what the policy did not write) and its own method to
generate, which computes each turn's whole context again, as its tool loop does. What is sampled is replaced by what our
step wrote, so that both do the same work: the update's gradients must then agree, which is checked. Game, parser and
reward are ours, in all ways.

An adapter is our module, on TRL's side too: two small products beside each layer's, as peft's.

In TRL's favour: the searches of a turn are asked all at once (its tool loop calls one tool after the other);
activations are kept (its default computes them again); and what `Trainer.train` does around the step is not counted.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import peers
from bench.turns import TurnGame
from zs_fast.errors import EngineError
from zs_fast.models.load import LoadedModel, load_model
from zs_fast.rollout.engine import LocalEngine
from zs_fast.search.backends import SearchBackend
from zs_fast.search.codec import Codec
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.setup import simulator_name
from zs_fast.system.memory import Memory, Phase
from zs_fast.types import Completion, Group, Role, Sampling

if TYPE_CHECKING:
    from bench.whole_step import Played, Stage

MICRO_BATCH = 8
"""Trajectories in a forward and backward at most: TRL's default."""
NO_TOKEN = -1
"""An id that is never sampled."""
Written = Mapping[int, Completion]
"""Seed of a draw -> what was sampled by it."""


def why_not(stage: Stage) -> str:
    """Why TRL can't take this step; empty where it can."""
    config = stage.config
    if peers.find("trl", "GRPOTrainer") is None:
        return f"TRL is not installed: {peers.INSTALL}"
    if config.algorithm.name != "grpo" or config.algorithm.policy_loss != "ppo" or config.train.mini_batches > 1:
        return "GRPO with one update a step is what both have"
    if config.engine.kind != "transformers":
        return "recipes with the embedded engine are compared"
    if config.simulator.kind not in ("model", "policy") or config.simulator.adapter:
        return f"simulator.kind = {config.simulator.kind!r}, simulator.adapter = {config.simulator.adapter!r}"
    return ""


@contextmanager
def recording(engine: LocalEngine) -> Iterator[dict[int, Completion]]:
    """What an engine writes in the block, by the seed of the draw."""
    written: dict[int, Completion] = {}
    seeds: dict[tuple[Role, int], int] = {}
    add, step = engine.add, engine.step

    def recorded_add(request_id: int, prompt_ids: list[int], sampling: Sampling, **more: Any) -> None:
        seeds[more["role"], request_id] = sampling.seed
        add(request_id, prompt_ids, sampling, **more)

    def recorded_step() -> list[Completion]:
        completions = step()
        for one in completions:
            written[seeds.pop((one.role, one.request_id))] = one
        return completions

    engine.add, engine.step = recorded_add, recorded_step  # type: ignore[method-assign]
    try:
        yield written
    finally:
        del engine.add, engine.step  # those of the class come back


Generate = Callable[[list[list[int]], list[tuple[int, ...]]], None]
"""Prompts and what is to be written behind each."""


class GeneratingEngine:
    """For games in turns: the roles in `generate` write all their waiting requests at once, by transformers'
    generate, and the rest goes to `engine`."""

    def __init__(self, engine: LocalEngine, generate: Mapping[Role, Generate], written: Written) -> None:
        self._engine, self._generate, self._written = engine, generate, written
        self._waiting: dict[Role, list[tuple[int, list[int], int]]] = {role: [] for role in generate}
        self.counts = {
            f"{role}/{name}": 0.0 for role in generate for name in ("prefill_tokens", "decode_tokens", "steps")
        }

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        if role in self._waiting:
            self._waiting[role].append((request_id, prompt_ids, sampling.seed))
        else:
            self._engine.add(request_id, prompt_ids, sampling, role=role)

    def step(self) -> list[Completion]:
        completions = self._engine.step()
        for role, waiting in self._waiting.items():
            if waiting:
                completions += self._write(role, waiting)
                self._waiting[role] = []
        return completions

    def _write(self, role: Role, waiting: Sequence[tuple[int, list[int], int]]) -> list[Completion]:
        prompts = [prompt_ids for _, prompt_ids, _ in waiting]
        written = [self._written[seed] for *_, seed in waiting]
        texts = [one.token_ids for one in written]
        self._generate[role](prompts, texts)
        self.counts[f"{role}/prefill_tokens"] += max(map(len, prompts)) * len(prompts)
        self.counts[f"{role}/decode_tokens"] += sum(map(len, texts))
        self.counts[f"{role}/steps"] += max(map(len, texts))
        return [replace(one, request_id=request[0]) for request, one in zip(waiting, written, strict=True)]

    @property
    def num_unfinished(self) -> int:
        return self._engine.num_unfinished + sum(map(len, self._waiting.values()))

    def end(self, role: Role, cache_salt: str) -> None:
        pass

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        raise AssertionError("a game in turns gives up nothing")

    def publish(self, version: int) -> None:
        pass


class Forced:
    """A logits processor and a stopping criterion by which generate writes given ids, each row up to its own end."""

    def __init__(self) -> None:
        self.ids = torch.zeros(0)
        self.lengths = torch.zeros(0)
        self.start = 0

    def set(self, prompts: list[list[int]], texts: list[tuple[int, ...]]) -> None:
        self.start = max(map(len, prompts))  # prompts are padded on the left
        self.lengths = torch.tensor([len(text) for text in texts])
        rows = [torch.tensor(text) for text in texts]
        self.ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = self.ids[:, input_ids.shape[1] - self.start, None].to(scores.device)
        return scores.fill_(-math.inf).scatter_(1, column, 0.0)

    def is_over(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids.shape[1] - self.start >= self.lengths).to(input_ids.device)

    def force(self, model: Any) -> None:
        """Let every `generate` of this module write what is set."""
        model.generate = partial(model.generate, logits_processor=[self.process], stopping_criteria=[self.is_over])


def tree(loaded: LoadedModel) -> Any:
    """A module of its own over the same weights, with transformers' attention, and no token that ends a text."""
    shared = {id(tensor): tensor for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}
    model = copy.deepcopy(loaded.model, shared)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = NO_TOKEN
    return model


@dataclass(kw_only=True, slots=True)
class TrlPeer:
    """TRL's way to take the step that `written` has the tokens of. `searches_by_generate`: the simulator speaks
    through transformers' generate too, all searches of a turn in one batch; else through our engine."""

    stage: Stage
    written: Written
    searches_by_generate: bool = False
    simulator: Any = None
    """The simulator's module, once it was needed."""

    def step(self, memory: Memory) -> Played:
        """The step; phases are told to `memory`."""
        import trl

        from bench.whole_step import Played

        stage = self.stage
        number = len(stage.questions) * stage.config.train.group_size
        groups: list[Group] = []
        counts: dict[str, float] = {}
        clock = Phases(memory)
        forced = Forced()
        model = tree(stage.policy)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl.GRPOTrainer(
                model=model,
                args=self._settings(folder, number),
                processing_class=stage.policy.tokenizer,
                train_dataset=self._data(),
                reward_funcs=_reward_of_the_game,
                rollout_func=lambda prompts, trainer: self._play(trainer, forced, groups, counts),
            )
            forced.force(trainer.model)
            # Rows end where `forced` says; an id that ends texts elsewhere may stand in the middle here.
            trainer.eos_token_ids = [NO_TOKEN]
            trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = NO_TOKEN
            if stage.roles.reference is not None:
                self._give_reference(trainer)
            clock.follow(trainer)
            trainer.train()
        norm = next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
        return Played(groups, float(norm), counts)

    def _settings(self, folder: str, number: int) -> Any:
        import trl

        config = self.stage.config
        micro = max(size for size in range(1, MICRO_BATCH + 1) if number % size == 0)
        return trl.GRPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=number // micro,
            num_generations=config.train.group_size,
            max_completion_length=config.game.max_context_tokens,
            shuffle_dataset=False,
            temperature=config.sampling.temperature,
            learning_rate=config.train.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=config.train.weight_decay,
            max_grad_norm=config.train.max_grad_norm,
            loss_type="dapo",  # a mean over the step's tokens
            epsilon=config.algorithm.clip_low,
            epsilon_high=config.algorithm.clip_high,
            beta=0.0,  # the reference is given afterwards: its weights are here already
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=self.stage.device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
        )

    def _data(self) -> Any:
        import datasets

        return datasets.Dataset.from_dict({"prompt": [question.text for question in self.stage.questions]})

    def _give_reference(self, trainer: Any) -> None:
        from trl.trainer.utils import add_fused_lm_head

        reference = self.stage.roles.reference
        assert reference is not None
        trainer.beta = self.stage.config.algorithm.kl_coefficient
        trainer.ref_model = tree(reference)
        add_fused_lm_head(trainer.ref_model, temperature=self.stage.config.sampling.temperature)

    def _play(self, trainer: Any, forced: Forced, groups: list[Group], counts: dict[str, float]) -> dict[str, Any]:
        """TRL's `rollout_func`: all prompts of the step, which are ours in order."""
        stage = self.stage

        def generate(prompts: list[list[int]], texts: list[tuple[int, ...]]) -> None:
            forced.set(prompts, texts)
            found, _ = trainer._generate_single_turn(prompts, None, {}, 1)
            if [tuple(ids[: len(text)]) for ids, text in zip(found, texts, strict=True)] != texts:
                raise EngineError("bench: TRL's generate did not write what it was given.")

        generators: dict[Role, Generate] = {Role.POLICY: generate}
        if self.searches_by_generate:
            generators[Role.SIMULATOR] = self._simulate
        engine = GeneratingEngine(stage.arena.engine, generators, self.written)
        game = TurnGame(
            engine,  # type: ignore[arg-type]  # has what a game in turns uses
            self._search(engine),
            stage.arena.codec,
            stage.questions,
            game=stage.config.game,
            sampling=stage.config.sampling,
            group_size=stage.config.train.group_size,
            run_seed=stage.config.seed,
            step=1,
            noise_probability=stage.noise,
            calls=None,
            keep_prefix=True,
        )
        while game.live:
            game.act()
            game.search()
        groups[:] = game.groups()
        counts.update(engine.counts)
        played = [trajectory for group in groups for trajectory in group.trajectories]
        turns = [[(turn.completion.token_ids, turn.observation_ids) for turn in one.turns] for one in played]
        longest = max(len(one.prompt_ids) for one in played) + max(
            one.num_tokens - len(one.prompt_ids) for one in played
        )
        counts["score/tokens"] = float(longest * len(played)) if trainer.beta else 0.0
        return {
            "prompt_ids": [list(one.prompt_ids) for one in played],
            "completion_ids": [[token for pair in one for ids in pair for token in ids] for one in turns],
            "env_mask": [[*mask_of(one)] for one in turns],
            "logprobs": None,
            "game_reward": [one.reward for one in played],
        }

    def _search(self, engine: GeneratingEngine) -> SearchBackend:
        if not self.searches_by_generate:
            return self.stage.arena.training_search
        config = self.stage.config
        speaker = self.stage.speaker or Codec(self._simulator_model().tokenizer, chat_template=True)
        return SimulatedSearch(
            engine,
            speaker,
            config.simulator,
            run_seed=config.seed,
            max_query_characters=config.game.max_query_characters,
        )

    def _simulator_model(self) -> LoadedModel:
        if self.simulator is None:
            config = self.stage.config
            path = simulator_name(config, training=True, policy=self.stage.policy)
            self.simulator = load_model(path, dtype=config.model.dtype, device=self.stage.device)
        return self.simulator  # type: ignore[no-any-return]

    def _simulate(self, prompts: list[list[int]], texts: list[tuple[int, ...]]) -> None:
        """One batch, padded on the left, as one writes it with transformers."""
        model, forced = tree(self._simulator_model()), Forced()
        forced.set(prompts, texts)
        forced.force(model)
        rows = [torch.tensor(prompt) for prompt in prompts]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        with torch.no_grad():
            found = model.generate(
                input_ids=pad(rows).to(self.stage.device),
                attention_mask=pad([torch.ones_like(row) for row in rows]).to(self.stage.device),
                max_new_tokens=max(map(len, texts)),
                do_sample=True,
                top_k=0,
                temperature=self.stage.config.simulator.temperature or 1.0,
                pad_token_id=0,
            )
        if not torch.equal(found[0, forced.start :][: len(texts[0])].cpu(), torch.tensor(texts[0])):
            raise EngineError("bench: generate did not write what it was given.")


class Phases:
    """Tells a `Memory` which phase TRL is in: generating, then scoring and rewards, then the update."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._open: AbstractContextManager[None] | None = None

    def begin(self, phase: Phase | None) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None if phase is None else self._memory.phase(phase)
        if self._open is not None:
            self._open.__enter__()

    def follow(self, trainer: Any) -> None:
        from transformers import PrinterCallback, TrainerCallback

        clock = self

        class Edges(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.begin(Phase.ROLLOUT)

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.begin(None)

        def then(call: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
            def called(*given: Any) -> Any:
                found = call(*given)
                clock.begin(phase)
                return found

            return called

        trainer._generate = then(trainer._generate, Phase.SCORE)
        trainer._generate_and_score_completions = then(trainer._generate_and_score_completions, Phase.UPDATE)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Edges())


def mask_of(turns: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[int]:
    """1 for what the policy wrote, 0 for what it read."""
    for written, observed in turns:
        yield from [1] * len(written)
        yield from [0] * len(observed)


def _reward_of_the_game(completions: list[str], game_reward: list[float], **_: Any) -> list[float]:
    return game_reward
