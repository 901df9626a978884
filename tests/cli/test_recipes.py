"""Recipes: what is right loads and survives a round trip; what is wrong is named, with the nearest right name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_fast import recipe_files
from zs_fast.config import RunConfig, write_config
from zs_fast.errors import ConfigError
from zs_fast.recipe_files import allowed, fields, load_recipe, recipe_names

FIELDS = fields()


def value_of(config: RunConfig, name: str):
    value = config
    for key in name.split("."):
        value = getattr(value, key)
    return value


def as_words(value) -> list[str]:
    if isinstance(value, tuple):
        return [str(one) for one in value]
    return ["none" if value is None else str(value)]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_come_back_equal(name, tmp_path):
    config = load_recipe([name])
    write_config(config, tmp_path / "config.toml")
    assert load_recipe([tmp_path / "config.toml"]) == config
    assert config.name == name, "the run folder is named after the recipe"


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_explained(name):
    assert FIELDS[name].description, f"{name} has no text under it in config.py"
    assert allowed(FIELDS[name])


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_can_be_given_as_a_flag(name):
    """The words that a person would type for the default give the default."""
    words = as_words(FIELDS[name].default)
    if words == [] or words == [""]:
        return
    assert value_of(load_recipe([], {name: words}), name) == FIELDS[name].default


@pytest.mark.parametrize("name", FIELDS)
def test_left_out_means_none(name):
    """TOML has no null, so a field at None is left out of a written config; its default must then be None."""
    if type(None) in getattr(FIELDS[name].annotation, "__args__", ()):
        assert FIELDS[name].default is None


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.text(max_size=8).filter(lambda text: "\r" not in text),
            "seed": st.integers(0, 2**62),
            "output": st.sampled_from(["runs/x", "/tmp/é"]),
            "train.learning_rate": st.floats(1e-12, 1.0),
            "train.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
            "model.chat_template": st.booleans(),
            "engine.batch_invariant": st.booleans(),
            "eval.search": st.lists(st.sampled_from(["simulator", "bm25", "none"]), min_size=1, max_size=3),
            "algorithm.mask_stop_reasons": st.lists(st.sampled_from(["turn_limit", "length_limit"]), max_size=2),
        },
    )
)
def test_overrides_round_trip(tmp_path_factory, values):
    overrides = {name: as_words(tuple(v) if isinstance(v, list | tuple) else v) for name, v in values.items()}
    config = load_recipe([], overrides)
    for name, value in values.items():
        found = value_of(config, name)
        assert (str(found) if name == "output" else found) == (tuple(value) if isinstance(value, list) else value)
    path = tmp_path_factory.mktemp("recipe") / "config.toml"
    write_config(config, path)
    assert load_recipe([path]) == config


def test_recipes_merge_left_to_right_and_flags_win(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1\n[train]\nsteps = 10\nepochs = 2\n")
    (tmp_path / "b.toml").write_text("[train]\nsteps = 20\n")
    config = load_recipe([tmp_path / "a.toml", tmp_path / "b.toml"], {"seed": ["7"]})
    assert (config.seed, config.train.steps, config.train.epochs) == (7, 20, 2)
    assert load_recipe([tmp_path / "b.toml", tmp_path / "a.toml"]).train.steps == 10


# Recipe text, then what the error must name: the key, the value, what is allowed, the nearest valid name.
WRONG = {
    "unknown key": (
        "[train]\nstepz = 3",
        ["train.stepz = 3", "steps, questions_per_step", "did you mean train.steps?"],
    ),
    "key in the wrong place": ("group_size = 3", ["group_size = 3", "did you mean train.group_size?"]),
    "unknown section": (
        "[tain]\nsteps = 3",
        ["unknown key tain", "algorithm, bm25, collect, critic, curriculum", "did you mean train?"],
    ),
    "section as a value": ("train = 5", ["train = 5", "takes a section", "[train]", "steps"]),
    "text for a number": ('seed = "1"', ['seed = "1"', "a whole number >= 0"]),
    "fraction for a whole number": ("[train]\nsteps = 1.5", ["train.steps = 1.5", "a whole number >= 1"]),
    "true for a whole number": ("[train]\nsteps = true", ["train.steps = true", "a whole number >= 1"]),
    "number for a switch": ("[model]\nchat_template = 1", ["model.chat_template = 1", "true or false"]),
    "too small": ("[game]\nmax_turns = 0", ["game.max_turns = 0", "a whole number >= 1"]),
    "too large": ("[simulator]\ndocuments = 21", ["simulator.documents = 21", ">= 1 and <= 20"]),
    "not a number": ("[train]\nlearning_rate = nan", ["train.learning_rate = nan", "a number > 0"]),
    "infinite": ("[train]\nlearning_rate = inf", ["train.learning_rate = inf", "a number > 0"]),
    "wrong choice": ('[algorithm]\nname = "grpp"', ['"grpp"', "'reinforce' or 'grpo'", "did you mean grpo?"]),
    "wrong choice in a list": ('[eval]\nsearch = ["bm26"]', ['eval.search = ["bm26"]', "did you mean bm25?"]),
    "text for a list": ('[eval]\nsearch = "bm25"', ['eval.search = "bm25"', "a list of"]),
    "short list": ("[train]\nbetas = [0.9]", ["train.betas = [0.9]", "a list of 2"]),
    "date": ("seed = 2020-01-01", ["2020-01-01", "date"]),
    "rule over two fields": ("[train]\ngroup_size = 1", ["train.group_size is 1", "grpo", "at least 2"]),
    "rloo with a group of one": (
        '[algorithm]\nname = "rloo"\n[train]\ngroup_size = 1',
        ["train.group_size is 1", "'rloo'", "at least 2"],
    ),
    "dual clip of a weight": (
        '[algorithm]\nname = "cispo"\ndual_clip = 3.0',
        ["dual_clip is 3.0", "'cispo'", "no clip"],
    ),
    "target of no KL": (
        '[algorithm]\nname = "gspo"\nkl_target = 0.1',
        ["kl_target is 0.1", "kl_coefficient", "'gspo'"],
    ),
    "ratios of documents": (
        '[algorithm]\nmask_documents = false\nold_logprobs = "sampler"',
        ["mask_documents = false", "old_logprobs", "Take 'trainer'"],
    ),
    "length of documents": (
        "[algorithm]\nmask_documents = false\noverlong_limit = 9",
        ["overlong_limit is 9", "mask_documents = false"],
    ),
    "not TOML": ("seed = = 1", ["recipe.toml", "not valid TOML", "line 1"]),
    "twice the same key": ("seed = 1\nseed = 2", ["recipe.toml", "not valid TOML"]),
}


@pytest.mark.parametrize("text, expected", WRONG.values(), ids=WRONG)
def test_wrong_recipes_are_named(text, expected, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe([path])
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in expected:
        assert part in message, message


def test_every_problem_is_listed_once_with_its_origin(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('seed = "1"\n[game]\nmax_turns = 0\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe([path], {"train.steps": ["zero"]})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert sum("(in mine.toml)" in line for line in lines) == 2
    assert sum("(on the command line)" in line for line in lines) == 1


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe([tmp_path / "nowhere.toml"])
    with pytest.raises(ConfigError, match="can't be read"):
        load_recipe([f"{tmp_path}/"])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe([tmp_path / "binary.toml"])


def test_unknown_recipe_name_gets_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "quickstart.toml").write_text("")
    monkeypatch.setattr(recipe_files, "RECIPES", tmp_path)
    with pytest.raises(ConfigError, match=re.escape("did you mean quickstart?")):
        load_recipe(["quickstrat"])
