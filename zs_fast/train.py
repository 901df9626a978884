"""Train a policy to search: set-up, then the loop, top to bottom.

A step plays `train.questions_per_step` questions `train.group_size` times against the search backend, turns rewards
into advantages, and takes one or more optimizer steps. Everything is built once in `_Run`; nothing in the loop asks
which backend it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from zs_fast.config import RunConfig, write_config
from zs_fast.errors import (
    CheckpointError,
    CheckpointUnusableError,
    ConfigError,
    EngineError,
    NonFiniteError,
    PreflightError,
    SimulatorError,
)
from zs_fast.evaluate import evaluate, evaluation_sets
from zs_fast.learn.algorithms import credit, has_signal
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.models.attention import use_attention
from zs_fast.models.load import DTYPES, save_model
from zs_fast.offloading import offloads
from zs_fast.ranks import (
    check_recipe,
    check_sharding,
    hold_run_folder,
    pack_share,
    play,
    publisher,
    trained_policy,
)
from zs_fast.replay import Journalled, Played, run_journal
from zs_fast.report.page import write_report
from zs_fast.report.plots import reward_curve
from zs_fast.rollout.engine import StepCounts
from zs_fast.rollout.play import Player, Refill
from zs_fast.run_models import (
    check_same_models,
    check_same_tokenizer,
    critic_of,
    frozen_copy,
    load_policy_weights,
    model_digests,
    reference_of,
    tokenizer_digest,
)
from zs_fast.run_numbers import jsonable, step_rates, summary_key
from zs_fast.search.curriculum import noise_probability
from zs_fast.search.data import QuestionOrder, load_questions
from zs_fast.search.statistics import search_statistics
from zs_fast.setup import build_arena, load_policy, use_device
from zs_fast.step_profile import StepProfile
from zs_fast.system.checkpoint import Checkpoint, CheckpointStore, check_same_run
from zs_fast.system.distributed import check_same_bits, from_main, is_main, largest, process_group, rank, together
from zs_fast.system.environment import write_environment
from zs_fast.system.files import FileOperations, replace_file
from zs_fast.system.hardware import present_machine
from zs_fast.system.memory import Memory, Phase
from zs_fast.system.metrics import RunLog, SilentLog
from zs_fast.system.plan_report import brief, plan_run, refuse_if_too_large, with_plan
from zs_fast.system.rollout_metrics import rollout_metrics, staleness_metrics
from zs_fast.system.signals import OrderlyStop
from zs_fast.system.watchdog import Watchdog
from zs_fast.system.weights import check_finite
from zs_fast.types import Group, StepStats


def train(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run the recipe to its end and return the summary, which also lies in `<output>/summary.json`.

    With `resume`, go on from the newest sound checkpoint in the output folder, or start where there is none.
    Under torchrun the processes share the work (ranks.py); the main one writes.
    """
    output = output_folder(config)
    with process_group(config.model.device, timeout_s=config.train.rank_timeout_s), ExitStack() as stack:
        check_recipe(config)
        check_sharding(config)
        store = CheckpointStore(output, config.train.keep_checkpoints)
        hold_run_folder(output, stack, store)
        with together():
            found = _checkpoint_to_resume(store, config, resume=resume) if is_main() else None
        step = from_main(found.step if found else None)
        with together():
            checkpoint = found if is_main() or step is None else store.at(step)
            run = _Run(config, output, store, checkpoint, stack, resume=resume)
        with run.stop.handling(), closing(run.watchdog):
            return run.loop()


def output_folder(config: RunConfig) -> Path:
    return config.output if config.output is not None else Path("runs") / config.name


def _checkpoint_to_resume(store: CheckpointStore, config: RunConfig, *, resume: bool) -> Checkpoint | None:
    checkpoint = store.newest()
    if checkpoint is None:
        return None
    if not resume:
        raise ConfigError(
            f"The run folder {store.root} already holds a run (checkpoint of step {checkpoint.step}). Add --resume to "
            "go on with it, choose another --output, or remove the folder."
        )
    check_same_run(checkpoint.state["config"], config.model_dump(mode="json"))
    return checkpoint


def plan_line(config: RunConfig, device: str) -> str:
    """The memory that the run will take, in a line or, where that may not fit, with advice. Raises MemoryBudgetError
    where it can't fit at all, unless `train.check_memory` is off."""
    try:
        plan = plan_run(config, present_machine(device, config.threads))
    except PreflightError as error:
        return f"no plan of the memory: {error}"
    if config.train.check_memory:
        refuse_if_too_large(config, plan)
    return brief(plan)


class _Run:
    """One run's objects, and the loop over them."""

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        store: CheckpointStore,
        checkpoint: Checkpoint | None,
        stack: ExitStack,
        *,
        resume: bool,
    ) -> None:
        self.config, self.output, self.store = config, output, store
        self.stop = OrderlyStop()
        self.watchdog = Watchdog(config.train.phase_timeout_s, output / f"stacks{rank() or ''}.txt")
        self.failed_saves = self.nonfinite_steps = 0
        self.first_step = checkpoint.step + 1 if checkpoint else 1
        self.started = time.perf_counter()
        # Data first: a bad file must not wait for models to load, nor too small a one for an evaluation.
        self.order = QuestionOrder(load_questions(config.data), config.seed)
        self.order.batch(0, config.train.questions_per_step)
        eval_sets = evaluation_sets(config)
        self.eval_questions = [question for questions in eval_sets.values() for question in questions]
        device = use_device(config)
        planned = plan_line(config, str(device))
        self.policy = load_policy(config, device)
        if checkpoint:
            check_same_tokenizer(checkpoint, self.policy)
        self.tokenizer_digest = tokenizer_digest(self.policy.tokenizer)
        self.model_digests = model_digests(config, self.policy)
        frozen = frozen_copy(config, self.policy, device)
        journal = run_journal(config, output, on_cpu=device.type == "cpu", warn=self._note)
        self.journal = Journalled(journal, keeps_outcomes=config.train.max_staleness > 0)
        with with_plan(planned):
            self.arena = build_arena(
                config, self.policy, device=device, base=frozen, eval_sets=eval_sets, journal=journal
            )
        stack.callback(self.arena.close)
        reference = reference_of(config, self.policy, frozen)
        if checkpoint:
            load_policy_weights(self.policy, checkpoint.model_path, config)
            check_same_models(checkpoint, self.model_digests, config)
        weights = checkpoint.model_path if checkpoint else config.model.path
        self.trained = trained_policy(config, self.policy, weights, device)
        self.roles = Roles(
            policy=self.trained,
            reference=reference,
            critic=critic_of(config, self.policy, device),
            temperature=config.sampling.temperature,
        )
        longest = config.game.max_turns * config.game.max_new_tokens
        self.updater = Updater(
            self.roles,
            config.train,
            config.algorithm,
            total_steps=config.train.steps,
            longest=longest,
            critic=config.critic,
        )
        saves = sum(
            self._is_due(config.train.save_every, step) for step in range(self.first_step, config.train.steps + 1)
        )
        crowded = store.check_room(self.updater.saved_bytes(), saves) if is_main() else ""
        self.publisher = publisher(config, self.arena, self.trained)
        self.counts = StepCounts(self.arena.engine)
        offloading = offloads(config, self.arena.engine, self.updater, device)
        self.memory = Memory(
            device,
            engine=self.arena.engine if config.engine.release_kv else None,
            offloads=offloading.parts,
            copies=offloading.copies,
        )
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.saved_step = self.evaluated_step = self.batches_played = self.first_step - 1
        self.carried: list[dict[str, Any]] = []
        self.earlier_seconds = 0.0
        if checkpoint:
            self._restore(checkpoint)
        self.log = stack.enter_context(self._open_log())
        self.log.note(planned)
        for warning in self.log.truncate(checkpoint.step if checkpoint else -1) + store.warnings:
            self.log.note(warning)
        for choice in (crowded, *self.arena.choices, *offloading.choices):
            if choice:
                self.log.note(choice)
        if device.type == "cuda":
            dtype = DTYPES[config.model.dtype]
            self.log.note(f"attention of the update: {use_attention(config.model.attention, device, dtype)}")
        if is_main():
            if not resume:
                self.journal.forget_all()
            write_config(config, output / "config.toml")
            write_environment(output, device)

    def _open_log(self) -> RunLog:
        if not is_main():
            return SilentLog()
        return RunLog(
            self.output,
            self.config.log,
            decode=self.arena.codec.decode,
            total_steps=self.config.train.steps,
            name=self.config.name,
            config=self.config.model_dump(mode="json"),
        )

    def _note(self, message: str) -> None:
        self.log.note(message)

    def loop(self) -> dict[str, Any]:
        config, log = self.config, self.log
        self._evaluate_before_the_loop(self.first_step - 1)
        for step in range(self.first_step, config.train.steps + 1):
            noise = noise_probability(step, config.curriculum, config.train.steps)
            profile = self._profile() if step == config.log.profile_step and is_main() else None
            with self._kept_on_failure(step - 1), self.stop.allowed(), self._phase(Phase.ROLLOUT):
                self.publisher.check()
                played = self._play(step, noise)
            groups, self.batches_played, self.carried = played.groups, played.batches_played, played.carried
            packed = pack_share(played.chosen, config)
            with self._phase(Phase.SCORE):
                scored = score(packed, self.roles, **self.updater.needs)
            with self._phase(Phase.UPDATE):
                batch = credit(scored, config.algorithm, kl_coefficient=self.updater.kl_coefficient)
                stats = self.updater.update(batch)
            with self._phase(Phase.SYNC):
                check_finite(self.trained.model, f"the policy after step {step}")
                self.publisher.publish(step)
            if profile is not None:
                log.note(profile.finish(self.output))
            searches = [turn.search for group in groups for t in group.trajectories for turn in t.turns if turn.search]
            metrics = {"curriculum/noise_probability": noise} | rollout_metrics(groups) | search_statistics(searches)
            if config.train.max_staleness:
                metrics |= staleness_metrics(groups, version=step - 1, max_staleness=config.train.max_staleness)
            copied = {"sync/copied_bytes": float(self.publisher.copied_bytes)}
            timings = largest(self.memory.take() | copied | self.updater.timings() | self.counts.take())
            log.step(
                step,
                metrics | dict(stats.values),
                timings | step_rates(groups, timings, scores=self.roles.scores_before_update),
                groups,
            )
            if self._is_due(config.train.eval_every, step):
                with self._kept_on_failure(step), self.stop.allowed():
                    self._evaluate(step)
            if self._is_due(config.train.save_every, step):
                self._save_together(step)
            self._stop_without_updates(step, stats)
        return self._finish()

    def _profile(self) -> StepProfile:
        return StepProfile(
            step=self.config.log.profile_step,
            player=self.arena.training_player,
            engine=self.arena.engine,
            memory=self.memory,
            roles=self.roles,
            updater=self.updater,
        )

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        with self.watchdog.phase(phase), self.memory.phase(phase):
            yield

    def _progress(self, label: str, done: int, total: int) -> None:
        self.watchdog.beat()
        self.log.progress(label, done, total)

    def _stop_without_updates(self, step: int, stats: StepStats) -> None:
        """All ranks have the same numbers, so they stop together."""
        values, limit = stats.values, self.config.train.max_nonfinite_steps
        skipped = values["update/nonfinite_losses"] + values["update/nonfinite_grad_norms"]
        self.nonfinite_steps = self.nonfinite_steps + 1 if skipped and not values["update/optimizer_steps"] else 0
        if not limit or self.nonfinite_steps < limit:
            return
        if step > self.saved_step:
            self._save_together(step)
        error = NonFiniteError(
            f"No update could be taken in {limit} steps in a row, the last one {step}: their losses or gradients are "
            "not finite (train.max_nonfinite_steps). The weights are as they were before and saved. Look at "
            "rollouts.jsonl of those steps; --resume goes on."
        )
        error.is_shared = True
        raise error

    def _play(self, step: int, noise: float) -> Played:
        """Play the step's questions; with `train.max_staleness`, begin those of coming steps where slots come free.

        With `algorithm.max_resampled_batches`, groups without signal make room for those of further batches.
        """
        player = self.arena.training_player
        with self.journal.rollout(step, player) as known:
            played = known or self._play_batches(step, noise, player)
            if known is None:
                self.journal.keep(played)
        return played

    def _play_batches(self, step: int, noise: float, player: Player) -> Played:
        number, algorithm, refill = self.config.train.questions_per_step, self.config.algorithm, None
        played: list[Group] = []
        live: list[Group] = []
        batches = 0
        while batches <= algorithm.max_resampled_batches and len(live) < number:
            progress = partial(self._progress, f"rollout, batch {batches + 1}" if batches else "rollout")
            batch = self.batches_played + batches
            questions = self.order.batch(batch, number)
            if self.config.train.max_staleness:
                refill = Refill(partial(self._begin_ahead, step, batch), self.config.engine.slots)
            else:
                # Across the end of an epoch a question may come again, and a step would play it with the same draws.
                # Not with questions begun ahead: those are known by their place in the batch, under their own step.
                known = {group.question.id for group in played}
                questions = [question for question in questions if question.id not in known]
            if questions:
                played += play(player, questions, step=step, noise=noise, on_progress=progress, refill=refill)
            live = [group for group in played if has_signal(group, algorithm.mask_stop_reasons)]
            batches += 1
        chosen = played
        if batches > 1:
            dead = [group for group in played if not has_signal(group, algorithm.mask_stop_reasons)]
            chosen = (live + dead)[:number]
        player.pause()
        return Played(played, chosen, self.batches_played + batches, player.carried())

    def _begin_ahead(self, step: int, batch: int) -> bool:
        """While `batch` is played in `step`: submit the next question of a coming step; False when none may begin."""
        train, player = self.config.train, self.arena.training_player
        ahead, place = divmod(player.num_groups, train.questions_per_step)
        coming = step + ahead
        if coming > min(step + train.max_staleness, train.steps):
            return False
        question = self.order.batch(batch + ahead, train.questions_per_step)[place]
        noise = noise_probability(coming, self.config.curriculum, train.steps)
        player.submit(question, step=coming, noise_probability=noise)
        return True

    def _is_due(self, every: int, step: int) -> bool:
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _evaluate_before_the_loop(self, step: int) -> None:
        """The evaluation of the start; on resume, one that was due after `step` steps and was not finished."""
        if step == 0:
            if self.config.eval.at_start:
                with self.stop.allowed():
                    self._evaluate(0)
        elif self.evaluated_step < step and self._is_due(self.config.train.eval_every, step):
            with self.stop.allowed():
                self._evaluate(step)
            self._save_together(step)

    @contextmanager
    def _kept_on_failure(self, step: int) -> Iterator[None]:
        """Save the `step` finished steps when the engine or the simulator fails in the block, or a person stops it.

        Of an error that all ranks raise, all wait for the save: the first that leaves makes torchrun end the others.
        Where weights are in pieces only such an error lets them be gathered.
        """
        try:
            yield
        except (EngineError, SimulatorError, KeyboardInterrupt) as error:
            if step > self.saved_step and getattr(error, "is_shared", False):
                self._save_together(step)
            elif step > self.saved_step and self.config.train.sharding == "none":
                self._save(step, self.updater.state_tensors())
            raise

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.updater.load_state_tensors(checkpoint.tensors())
        self.updater.load_state(checkpoint.state["updater"])
        self.evaluations = dict(checkpoint.state["evaluations"])
        self.evaluated_step = checkpoint.state.get("evaluated_step", checkpoint.step)
        self.batches_played = checkpoint.state.get("batches_played", checkpoint.step)
        self.carried = list(checkpoint.state.get("carried", ()))
        self.arena.training_player.restore(self.carried)
        self.earlier_seconds = checkpoint.state.get("seconds", 0.0)
        self.publisher.announce(checkpoint.step)

    def _save_together(self, step: int) -> None:
        """`_save`, once it is sure that all ranks hold the same weights; what goes wrong there stops all of them."""
        trained = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        check_same_bits(trained, f"the policy after step {step}")
        tensors = self.updater.state_tensors()
        with together():
            self._save_or_go_on(step, tensors)
        self.saved_step = from_main(self.saved_step)

    def _save_or_go_on(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """`_save`; where it fails, earlier checkpoints are as they were, and the next one may succeed."""
        train = self.config.train
        try:
            self._save(step, tensors)
        except CheckpointUnusableError:
            raise
        except CheckpointError as error:
            self.failed_saves += 1
            if step == train.steps or self.failed_saves > train.max_failed_saves:
                raise
            self.log.note(
                f"{error} The run goes on: {self.failed_saves} in a row failed, train.max_failed_saves is "
                f"{train.max_failed_saves}."
            )
        else:
            self.failed_saves = 0

    def _save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        if not is_main():
            self.saved_step = step
            return
        self.log.sync()
        self.store.save(
            step,
            write_model=partial(save_model, self.policy),
            tensors=tensors,
            state={
                "config": self.config.model_dump(mode="json"),
                "tokenizer": self.tokenizer_digest,
                "models": self.model_digests,
                "updater": self.updater.state(),
                "evaluations": self.evaluations,
                "evaluated_step": self.evaluated_step,
                "batches_played": self.batches_played,
                "carried": self.carried,
                "seconds": self._seconds(),
            },
        )
        self.saved_step = step
        for warning in self.store.warnings:
            self.log.note(warning)
        self.journal.journal.forget(rollouts=step, evaluations=self.evaluated_step)

    def _evaluate(self, step: int) -> None:
        """Play the evaluation questions against each search of `eval.search`; recorded as of `step` finished steps.

        Recorded once all are played, so that a resume finds every one of them or none.
        """
        played = []
        for name, player in self.arena.evaluation_players.items() if self.eval_questions else ():
            started = time.perf_counter()
            progress = partial(self._progress, f"evaluation, {name}")
            with self.watchdog.phase("evaluation"), self.journal.evaluation(step, name, player):
                evaluation, _ = evaluate(player, self.eval_questions, step=step, on_progress=progress)
            played.append((name, evaluation, time.perf_counter() - started))
        for name, evaluation, seconds in played:
            metrics, timings = evaluation.metrics(f"eval/{name}"), {f"eval/{name}/seconds": seconds}
            self.log.record(step, metrics, timings, message=evaluation.line(name))
            when = "before" if step == 0 else "after"
            self.evaluations.setdefault(name, {})[when] = jsonable(evaluation)
        self.evaluated_step = step
        self.counts.take()  # an evaluation's are no step's

    def _seconds(self) -> float:
        """Of this process and, after a resume, of those before it up to their last checkpoint."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def _finish(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "name": self.config.name,
            "seed": self.config.seed,
            "steps": self.config.train.steps,
            "seconds": round(self._seconds(), 2),
        }
        for name, results in self.evaluations.items():
            for when, result in results.items():
                summary[summary_key(name, when)] = result["f1"]
        summary["evaluations"] = self.evaluations
        if is_main():
            replace_file(FileOperations(), self.output / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
            reward_curve(self.output / "metrics.jsonl", self.output / "reward.png")
            write_report([self.output])
        return summary
