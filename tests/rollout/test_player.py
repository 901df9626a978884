"""The player: trajectories advance on their own, a search comes back to its own, nothing hangs, failures stop it."""

from __future__ import annotations

import json
import random
import time

import pytest

from zs_fast.config import GameConfig, SamplingConfig, SimulatorConfig
from zs_fast.errors import CheckpointUnusableError, EngineError, SimulatorError
from zs_fast.rollout import play
from zs_fast.rollout.play import JournalKey, Player, Refill
from zs_fast.search.codec import Codec
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.testing import ScriptedEngine, ScriptedSearch, byte_tokenizer, tiny_model
from zs_fast.types import Question, Role, StopReason

CODEC = Codec(byte_tokenizer(), chat_template=True)
GAME = GameConfig(max_turns=3)


def questions(count: int) -> list[Question]:
    return [Question(id=f"q{i}", text=f"what is {i}?", answers=(f"thing {i}",), source="s") for i in range(count)]


def policy(ids: list[int]) -> str:
    """Searches for its own question's number, then answers with what the document says."""
    text = CODEC.decode(ids)
    number = text.rpartition("what is ")[2].partition("?")[0]
    if "<information>Doc 1" not in text:
        return f"<think>hm</think><search> number {number} </search> and more"
    document = text.rpartition("Doc 1: ")[2].partition("\n")[0].partition("<")[0]
    return f"<think>ah</think><answer> {document} </answer>"


def player_for(engine, search, **settings) -> Player:
    defaults = {"game": GAME, "sampling": SamplingConfig(), "group_size": 2, "run_seed": 5, "max_failed_share": 0.1}
    return Player(engine, search, CODEC, **(defaults | settings))


def play_all(player: Player, asked: list[Question], step: int = 1):
    for question in asked:
        player.submit(question, step=step, noise_probability=0.0)
    return player.collect(len(asked))


def documents(request) -> list[str]:
    assert request.query == f"number {request.question.id[1:]}", "a search met another trajectory's question"
    return [f"thing {request.query.split()[1]}", "other"]


@pytest.mark.parametrize("seed", range(5))
def test_groups_come_back_in_order_whatever_the_order_of_replies(seed):
    draws = random.Random(seed)
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC, steps_needed=lambda _: draws.randint(1, 9))
    search = ScriptedSearch(documents, polls_needed=lambda _: draws.randint(1, 9))
    asked = questions(12)
    groups = play_all(player_for(engine, search), asked)
    assert [group.question for group in groups] == asked
    for group in groups:
        assert [trajectory.sample for trajectory in group.trajectories] == [0, 1]
        for trajectory in group.trajectories:
            assert trajectory.question == group.question and trajectory.reward == 1.0
            assert trajectory.stop_reason is StopReason.ANSWER and trajectory.num_searches == 1
            assert trajectory.turns[0].search.request.sample == trajectory.sample


def test_there_is_no_barrier_between_turns():
    """While one trajectory's first completion is still being written, another finishes its whole game."""
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC, steps_needed=lambda request: 50 if request == 0 else 1)
    player = player_for(engine, ScriptedSearch(documents), group_size=1)
    slow, fast = questions(2)
    player.submit(slow, step=1, noise_probability=0.0)
    player.submit(fast, step=1, noise_probability=0.0)
    for _ in range(6):
        player._play_on()
    assert [group.num_unfinished for group in player._groups] == [1, 0]
    assert len(player.collect(2)) == 2


def test_progress_counts_the_trajectories_that_were_asked_for():
    draws = random.Random(0)
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC, steps_needed=lambda _: draws.randint(1, 9))
    player = player_for(engine, ScriptedSearch(documents))
    for question in questions(4):
        player.submit(question, step=1, noise_probability=0.0)
    told = []
    player.collect(3, on_progress=lambda done, total: told.append((done, total)))
    counts = [done for done, _ in told]
    assert counts[0] == 0 and counts[-1] == 6 and counts == sorted(set(counts)) and len(counts) > 3
    assert {total for _, total in told} == {6}, "the fourth question is none of this call's"


def test_each_group_is_told_once_at_once_when_it_is_finished():
    """The slow first one, for which collect waits, holds no other back."""
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC, steps_needed=lambda request: 50 if request < 2 else 1)
    player = player_for(engine, ScriptedSearch(documents))
    for question in questions(4):
        player.submit(question, step=1, noise_probability=0.0)
    told = []
    groups = player.collect(3, on_group=lambda group: told.append((group, engine.num_unfinished)))
    assert [group.question.id for group, _ in told] == ["q1", "q2", "q0"]
    assert {group.question.id: group for group, _ in told} == {group.question.id: group for group in groups}
    assert [left for _, left in told] == [2, 2, 0]


def test_later_groups_stay_for_the_next_collect():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    player = player_for(engine, ScriptedSearch(documents))
    asked = questions(5)
    for question in asked:
        player.submit(question, step=1, noise_probability=0.0)
    assert [group.question.id for group in player.collect(2)] == ["q0", "q1"]
    assert [group.question.id for group in player.collect(3)] == ["q2", "q3", "q4"]
    with pytest.raises(EngineError, match=r"collect\(1\) of 0"):
        player.collect(1)


def test_each_turn_extends_the_last_context_under_one_salt_that_is_ended():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    (group,) = play_all(player_for(engine, ScriptedSearch(documents), group_size=1), questions(1))
    (_, _, first, sampling, salt), (_, _, second, _, again) = engine.requests
    turn = group.trajectories[0].turns[0]
    assert salt == again and engine.ended == [(Role.POLICY, salt)]
    assert second == first + list(turn.completion.token_ids) + list(turn.observation_ids)
    assert sampling.stop == ("</search>", "</answer>")


def test_every_completion_has_a_seed_of_its_own_even_for_a_repeated_question():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    (question,) = questions(1)
    groups = play_all(player_for(engine, ScriptedSearch(documents)), [question, question])
    assert len(groups) == 2
    seeds = [sampling.seed for _, _, _, sampling, _ in engine.requests]
    assert len(set(seeds)) == len(seeds) == 8


def test_seeds_are_a_function_of_the_run_seed_and_the_step_alone():
    def seeds(run_seed: int, step: int) -> set[int]:
        engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
        play_all(player_for(engine, ScriptedSearch(documents), run_seed=run_seed), questions(3), step)
        return {sampling.seed for _, _, _, sampling, _ in engine.requests}

    assert seeds(1, 1) == seeds(1, 1)
    assert not seeds(1, 1) & seeds(2, 1) and not seeds(1, 1) & seeds(1, 2)


def test_a_sampling_override_is_for_that_group_only():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    player = player_for(engine, ScriptedSearch(documents), group_size=1)
    first, second = questions(2)
    player.submit(first, step=1, noise_probability=0.0, sampling=SamplingConfig(temperature=0.0))
    player.submit(second, step=1, noise_probability=0.0)
    player.collect(2)
    temperatures = {tuple(ids[:80]): sampling.temperature for _, _, ids, sampling, _ in engine.requests}
    assert sorted(s.temperature for _, _, _, s, _ in engine.requests) == [0.0, 0.0, 1.0, 1.0], temperatures


def fails_for(failing: set[str]):
    return lambda request: None if request.question.id in failing else documents(request)


def test_failed_searches_end_their_trajectory_untrained_and_few_of_them_do_not_stop_the_run():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    groups = play_all(player_for(engine, ScriptedSearch(fails_for({"q3"}))), questions(10))
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    failed = [t for t in trajectories if t.stop_reason is StopReason.SEARCH_FAILED]
    assert len(failed) == 2 and not any(t.trainable for t in failed)
    assert sum(t.trainable for t in trajectories) == 18


@pytest.mark.parametrize(("share", "num_failing"), [(0.1, 2), (0.0, 1)])
def test_more_failed_searches_than_the_share_stop_the_run(share, num_failing):
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    failing = {f"q{i}" for i in range(num_failing)}
    with pytest.raises(SimulatorError, match=rf"{2 * num_failing} of 20 searches failed.*max_failed_share.*scripted"):
        play_all(player_for(engine, ScriptedSearch(fails_for(failing)), max_failed_share=share), questions(10))


def test_a_single_failed_search_stops_nothing_while_the_share_is_positive():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    (group,) = play_all(player_for(engine, ScriptedSearch(fails_for({"q0"})), group_size=1), questions(1))
    assert group.trajectories[0].stop_reason is StopReason.SEARCH_FAILED


def test_a_failed_policy_completion_is_an_error():
    def broken(ids):
        raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        play_all(player_for(ScriptedEngine({Role.POLICY: broken}, CODEC), ScriptedSearch(documents)), questions(1))


def test_a_lost_request_raises_instead_of_hanging():
    class Forgetful(ScriptedEngine):
        def step(self):
            super().step()
            return []

    with pytest.raises(EngineError, match="request was lost"):
        play_all(player_for(Forgetful({Role.POLICY: policy}, CODEC), ScriptedSearch(documents)), questions(1))


def test_a_search_that_never_comes_back_raises_after_the_limit_and_waits_asleep(monkeypatch):
    monkeypatch.setattr(play, "STALL_TIMEOUT_S", 0.3)
    player = player_for(
        ScriptedEngine({Role.POLICY: policy}, CODEC), ScriptedSearch(documents, polls_needed=lambda _: 10**9)
    )
    player.submit(questions(1)[0], step=1, noise_probability=0.0)
    used = time.process_time()
    with pytest.raises(SimulatorError, match="gave no result"):
        player.collect(1)
    assert time.process_time() - used < 0.25


def test_an_answer_to_nobody_is_an_error():
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC)
    first, second = player_for(engine, ScriptedSearch(documents)), player_for(engine, ScriptedSearch(documents))
    first.submit(questions(1)[0], step=1, noise_probability=0.0)
    with pytest.raises(EngineError, match=r"[Tt]wo players|added twice"):
        play_all(second, questions(2)[1:])


class DictJournal:
    def __init__(self) -> None:
        self.completions, self.searches = {}, {}

    def lookup(self, key, context_ids):
        return self.completions.get(key)

    def record(self, key, context_ids, completion):
        assert key not in self.completions
        self.completions[key] = completion

    def record_end(self, key):
        pass

    def lookup_search(self, key, request):
        return self.searches.get(key)

    def record_search(self, key, result):
        assert key not in self.searches
        self.searches[key] = result


def test_a_journal_that_knows_everything_asks_nobody():
    journal = DictJournal()
    played = play_all(
        player_for(ScriptedEngine({Role.POLICY: policy}, CODEC), ScriptedSearch(documents), journal=journal),
        [*questions(3), questions(1)[0]],
    )
    assert JournalKey(1, "q0", 3, 1, Role.POLICY) in journal.completions and len(journal.searches) == 8
    engine, search = ScriptedEngine({Role.POLICY: policy}, CODEC), ScriptedSearch(documents)
    again = play_all(player_for(engine, search, journal=journal), [*questions(3), questions(1)[0]])
    assert again == played and engine.requests == [] and search.requests == []


def test_half_a_journal_plays_on_from_there():
    journal = DictJournal()
    make = lambda: (ScriptedEngine({Role.POLICY: policy}, CODEC), ScriptedSearch(documents))  # noqa: E731
    played = play_all(player_for(*make(), journal=journal), questions(3))
    for key in [key for key in journal.completions if key.turn == 1 or key.question_id == "q2"]:
        del journal.completions[key]
    for key in [key for key in journal.searches if key.question_id in ("q1", "q2")]:
        del journal.searches[key]
    again = play_all(player_for(*make(), journal=journal), questions(3))
    assert [[t.turns[-1].action for t in g.trajectories] for g in again] == [
        [t.turns[-1].action for t in g.trajectories] for g in played
    ]


def test_policy_and_simulator_of_one_real_engine_play_together_reproducibly():
    from zs_fast.rollout.transformers_engine import TransformersEngine

    loaded = {Role.POLICY: tiny_model("llama"), Role.SIMULATOR: tiny_model("qwen2")}
    game = GameConfig(max_turns=3, max_new_tokens=20, max_context_tokens=1500, max_observation_tokens=120)
    simulator = SimulatorConfig(max_new_tokens=16, documents=2)

    def groups(slots: int):
        engine = TransformersEngine(loaded, slots=slots, max_context_tokens=2000)
        search = SimulatedSearch(engine, CODEC, simulator, run_seed=0)
        played = play_all(player_for(engine, search, game=game, max_failed_share=1.0), questions(4))
        assert engine.num_unfinished == 0
        turns = [turn for group in played for t in group.trajectories for turn in t.turns]
        # Request ids follow the order of events, which may differ; what was sampled may not.
        return [(turn.completion.token_ids, turn.completion.logprobs, turn.observation) for turn in turns]

    assert groups(8) == groups(3)


# Pauses, and groups that are carried over them


def slow_parts(seed: int = 0) -> tuple[ScriptedEngine, ScriptedSearch]:
    draws = random.Random(seed)
    engine = ScriptedEngine({Role.POLICY: policy}, CODEC, steps_needed=lambda _: draws.randint(1, 9))
    return engine, ScriptedSearch(documents, polls_needed=lambda _: draws.randint(1, 9))


def said(groups) -> list:
    """What was sampled and found; request ids follow the order of events."""
    return [[[(t.completion.token_ids, t.observation) for t in p.turns] for p in g.trajectories] for g in groups]


@pytest.mark.parametrize("rounds", [0, 1, 3, 6, 9, 12])
def test_a_pause_leaves_engines_idle_and_changes_nothing_that_is_played(rounds):
    engine, search = slow_parts()
    player = player_for(engine, search)
    for question in questions(4):
        player.submit(question, step=1, noise_probability=0.0)
    for _ in range(rounds):
        player._play_on()
    before = [playing.episode.turns for group in player._groups for playing in group.playing]
    player.pause()
    assert engine.num_unfinished == 0 and search.poll() == []
    assert [playing.episode.turns for group in player._groups for playing in group.playing] == before
    assert said(player.collect(4)) == said(play_all(player_for(*slow_parts()), questions(4)))
    salts = {salt for *_, salt in engine.requests}
    assert {(Role.POLICY, salt) for salt in salts} == set(engine.ended), "every context is ended, those cut off too"


@pytest.mark.parametrize("rounds", range(0, 16, 3))
def test_carried_groups_play_on_in_another_player_as_in_their_own(rounds):
    player = player_for(*slow_parts())
    for question in [*questions(4), questions(1)[0]]:
        player.submit(question, step=1, noise_probability=0.25)
    for _ in range(rounds):
        player._play_on()
    player.pause()
    carried = json.loads(json.dumps(player.carried(), allow_nan=False))
    other = player_for(*slow_parts(1))
    other.restore(carried)
    assert other.carried() == carried and other.num_groups == 5 and other.num_unfinished == player.num_unfinished
    asked = len(other._engine.requests)
    ours, theirs = player.collect(5), other.collect(5)
    assert asked == 0 and said(theirs) == said(ours)
    assert [[t.scores for t in group.trajectories] for group in theirs] == [
        [t.scores for t in group.trajectories] for group in ours
    ]
    seeds = {sampling.seed for *_, sampling, _ in other._engine.requests}
    assert seeds <= {sampling.seed for *_, sampling, _ in player._engine.requests}


def test_damaged_carried_groups_are_refused_in_words():
    player = player_for(*slow_parts())
    player.submit(questions(1)[0], step=1, noise_probability=0.0)
    while player._play_on() or not player._groups[0].playing[0].episode.turns:
        pass
    player.pause()
    for damage in ({"trajectories": [[]]}, {"question": {"id": "q"}}, {"trajectories": [[{"token_ids": [1]}], []]}):
        with pytest.raises(CheckpointUnusableError, match="use another checkpoint"):
            player_for(*slow_parts()).restore([player.carried()[0] | damage])


def test_refill_begins_further_questions_where_places_come_free_and_no_earlier():
    engine, search = slow_parts()
    player = player_for(engine, search)
    coming = iter(questions(9)[4:])
    most, begun = 0, []

    def start() -> bool:
        nonlocal most
        question = next(coming, None)
        if question is None:
            return False
        begun.append(player.num_unfinished)
        player.submit(question, step=2, noise_probability=0.0)
        most = max(most, player.num_unfinished)
        return True

    for question in questions(4):
        player.submit(question, step=1, noise_probability=0.0)
    groups = player.collect(4, refill=Refill(start, 9))
    assert [group.question.id for group in groups] == ["q0", "q1", "q2", "q3"]
    assert begun and max(begun) <= 7 and most == 9
    assert player.num_groups == len(begun)


def test_no_completion_rests_on_keys_and_values_of_older_weights():
    """Weights change in the middle of trajectories; every token's log-probability is that of the weights it names."""
    import torch

    from zs_fast.models.attention import PackedAttention
    from zs_fast.rollout.transformers_engine import TransformersEngine

    loaded = tiny_model("llama")
    versions = [{name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}]
    game = GameConfig(max_turns=4, max_new_tokens=12, max_context_tokens=1500, max_observation_tokens=120)
    engine = TransformersEngine({Role.POLICY: loaded}, slots=3, max_context_tokens=2000)
    player = player_for(engine, ScriptedSearch(lambda _: ["a"]), game=game, max_failed_share=1.0)
    for question in questions(4):
        player.submit(question, step=1, noise_probability=0.0)
    generator = torch.Generator().manual_seed(0)
    for version in (1, 2):
        player._go_on()
        for _ in range(20):
            player._play_on()
        player.pause()
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        versions.append({name: tensor.clone() for name, tensor in loaded.model.state_dict().items()})
        engine.publish(version)
    seen = set()
    trajectories = [trajectory for group in player.collect(4) for trajectory in group.trajectories]
    for trajectory in trajectories:
        ids = list(trajectory.prompt_ids)
        for turn in trajectory.turns:
            loaded.model.load_state_dict(versions[turn.completion.policy_version])
            seen.add(turn.completion.policy_version)
            whole = torch.tensor([ids + list(turn.completion.token_ids)])
            state = PackedAttention([0, whole.shape[1]])
            with torch.no_grad():
                logits = loaded.model(whole, use_cache=False, attention_state=state).logits
            logits = logits[0, len(ids) - 1 : -1, : len(loaded.tokenizer)]
            expected = logits.float().log_softmax(-1).gather(-1, torch.tensor(turn.completion.token_ids)[:, None])
            assert torch.allclose(torch.tensor(turn.completion.logprobs), expected[:, 0], atol=1e-4)
            ids += [*turn.completion.token_ids, *turn.observation_ids]
    assert seen == {0, 1, 2}
