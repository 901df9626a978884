"""Swapping functions of a framework for ours: everywhere, and back; on a made-up framework and on the real ones."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from zs_kernels.compat import openrlhf as our_openrlhf
from zs_kernels.compat import trl as our_trl
from zs_kernels.compat import verl as our_verl
from zs_kernels.compat._patching import Patcher, autograd_function, function, network


def theirs(x):
    return x + 1


def ours(x):
    return x + 100


class TheirFunction:
    @staticmethod
    def apply(x):
        return x + 1


class TheirLayer(torch.nn.Module):
    def forward(self, x):
        return x + 1


class OurLayer(torch.nn.Module):
    def forward(self, x):
        return x + 100


SWAPS = (
    function("add", "madeup.core", ours),
    autograd_function("Function", "madeup.core", ours),
    network("Layer", "madeup.core", OurLayer),
)


@pytest.fixture
def madeup(monkeypatch):
    """A package `madeup` with a core, a module that imported from it, and a registry; and a user's module."""
    package, core, user, script = (ModuleType(name) for name in ("madeup", "madeup.core", "madeup.user", "a_script"))
    package.__path__ = []
    core.add, core.Function, core.Layer, core.REGISTRY = theirs, TheirFunction, TheirLayer, {"add": theirs, "n": 1}
    user.renamed = script.add = theirs
    for module in (package, core, user, script):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return core, user, script


@pytest.fixture
def patcher():
    return Patcher("madeup", "1.2.3", lambda: SWAPS)


def test_every_holder_gets_ours_and_theirs_back(madeup, patcher):
    core, user, script = madeup
    with patcher(None) as patched:
        assert core.add(1) == user.renamed(1) == script.add(1) == core.REGISTRY["add"](1) == 101
        assert core.Function.apply(1) == 101
        assert core.Layer()(1) == 101
        assert patched.names == {"add", "Function", "Layer"}
    assert patched.calls == {"add": 4, "Function": 1, "Layer": 1}
    assert core.add is user.renamed is script.add is core.REGISTRY["add"] is theirs
    assert core.Function is TheirFunction and core.Layer is TheirLayer
    assert not patched.names


def test_an_error_inside_restores(madeup, patcher):
    with pytest.raises(ZeroDivisionError), patcher(None):
        raise ZeroDivisionError
    assert madeup[0].add is theirs


def test_entering_again_inside(madeup, patcher):
    core = madeup[0]
    with patcher(["add"]) as outer:
        first = core.add
        with patcher(None) as inner:
            assert inner is outer
            assert core.add is first, "not wrapped twice"
            core.add(1)
        assert core.add is first, "the outer block still needs it"
        assert core.Layer is TheirLayer, "the inner block alone asked for it"
        core.add(1)
    assert outer.calls == {"add": 2}
    assert core.add is theirs


def test_calls_count_from_the_outermost_entry(madeup, patcher):
    with patcher(None):
        madeup[0].add(1)
    with patcher(None) as patched:
        assert not patched.calls


def test_a_module_imported_meanwhile_gets_theirs_back(madeup, patcher, monkeypatch):
    late = ModuleType("madeup.late")
    with patcher(None):
        late.add = madeup[0].add
        monkeypatch.setitem(sys.modules, "madeup.late", late)
        assert late.add(1) == 101
    assert late.add is theirs


def test_a_module_that_uses_ours_by_name_keeps_it(madeup, patcher):
    madeup[2].own = ours
    with patcher(None):
        pass
    assert madeup[2].own is ours


def test_a_missing_name_changes_nothing(madeup, patcher):
    core = madeup[0]
    del core.Layer
    with (
        pytest.raises(
            ImportError, match=r"madeup \(unknown version\) has no madeup.core.Layer; .* madeup 1.2.3.*only=\["
        ),
        patcher(None),
    ):
        pass
    assert core.add is theirs, "the names before it are untouched"
    with patcher(["add"]):
        assert core.add(1) == 101


def test_a_missing_module_of_an_installed_framework(madeup, monkeypatch):
    patcher = Patcher("madeup", "1.2.3", lambda: [function("add", "madeup.gone", ours)])
    with pytest.raises(ImportError, match=r"has no madeup.gone.add"), patcher(None):
        pass


def test_a_framework_that_is_not_installed():
    patcher = Patcher("madeup", "1.2.3", lambda: SWAPS)
    with pytest.raises(ImportError, match=r"madeup is not installed; `pip install madeup==1.2.3`"), patcher(None):
        pass


def test_unknown_names_are_refused(patcher):
    wanted = r"'only' must hold names of \['Function', 'Layer', 'add'\], got \['ad'\]"
    with pytest.raises(ValueError, match=wanted), patcher(["add", "ad"]):
        pass


def test_threads_may_enter_side_by_side(madeup, patcher):
    core, results = madeup[0], []
    inside = threading.Barrier(2, timeout=10)

    def work():
        with patcher(None):
            inside.wait()
            results.append(core.add(1))
            inside.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [101, 101]
    assert core.add is theirs


def test_calls_inside_a_compiled_graph_compile_once(madeup, patcher):
    with patcher(["add"]) as patched:
        counter = CompileCounter()
        compiled = torch.compile(lambda x: madeup[0].add(x), backend=counter, fullgraph=True)
        for _ in range(3):
            assert compiled(torch.ones(())) == 101
        assert counter.frame_count == 1
        assert not patched.calls


def test_trl_is_patched_where_its_trainers_look(trl_utils):
    kernels = sys.modules["trl.kernels"]
    before = {name: getattr(trl_utils, name) for name in ("selective_log_softmax", "_ChunkedLogProbFunction")}
    fused = kernels.selective_log_softmax_and_entropy
    with our_trl.patch() as patched:
        assert trl_utils._ChunkedLogProbFunction is kernels.ChunkedLogProbFunction
        assert trl_utils._fused_logprob_entropy is kernels.selective_log_softmax_and_entropy is not fused
        trl_utils.entropy_from_logits(torch.randn(3, 5))
    assert patched.calls == {"entropy_from_logits": 1}
    assert {name: getattr(trl_utils, name) for name in before} == before
    assert kernels.selective_log_softmax_and_entropy is trl_utils._fused_logprob_entropy is fused


def test_verl_is_patched_in_its_registries_and_importers(verl):
    core, functional = verl.core, verl.functional
    vanilla, grpo = core.POLICY_LOSS_REGISTRY["vanilla"], core.ADV_ESTIMATOR_REGISTRY["grpo"]
    with our_verl.patch() as patched:
        assert core.POLICY_LOSS_REGISTRY["vanilla"] is core.compute_policy_loss_vanilla is not vanilla
        assert core.get_adv_estimator_fn("grpo") is core.compute_grpo_outcome_advantage is not grpo
        layer = verl.fused.FusedLinearForPPO(chunk_size=4)
        layer(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2]))
        verl.kernel.linear_cross_entropy(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2]))
        functional.masked_mean(torch.ones(3), torch.ones(3))
    assert patched.calls == {"FusedLinearForPPO": 1, "linear_cross_entropy": 1, "masked_mean": 1}
    assert core.POLICY_LOSS_REGISTRY["vanilla"] is core.compute_policy_loss_vanilla is vanilla
    assert core.ADV_ESTIMATOR_REGISTRY["grpo"] is grpo


def test_verls_own_gdpo_calls_our_grpo(verl):
    rewards, mask = torch.randn(4, 3), torch.ones(4, 3)
    groups = ["a", "a", "b", "b"]
    expected, _ = verl.core.compute_gdpo_outcome_advantage(rewards, mask, groups)
    with our_verl.patch() as patched:
        found, _ = verl.core.compute_gdpo_outcome_advantage(rewards, mask, groups)
    assert patched.calls["compute_grpo_outcome_advantage"] == 1
    torch.testing.assert_close(found, expected)


def test_openrlhf_is_patched_in_classes_and_importers(monkeypatch):
    """On a package with OpenRLHF's modules and names: the real one needs flash-attn and deepspeed to be imported."""
    names = ("models", "models.utils", "models.loss", "trainer", "trainer.ppo_utils")
    modules = {name: ModuleType(f"openrlhf.{name}") for name in (*names, "trainer.ppo_utils.experience_maker")}
    modules[""] = ModuleType("openrlhf")
    for module in modules.values():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    utils, loss = modules["models.utils"], modules["models.loss"]
    for name in ("compute_approx_kl", "compute_entropy", "log_probs_from_logits", "masked_mean", "masked_normalize"):
        setattr(utils, name, lambda *a, **k: None)
    loss.aggregate_loss, loss.PolicyLoss, loss.ValueLoss = (lambda: None), TheirLayer, TheirFunction
    loss.masked_mean = utils.masked_mean

    class RemoteExperienceMaker:
        def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
            return None

        def get_cumulative_returns(self, rewards, action_mask, gamma):
            return None

    modules["trainer.ppo_utils.experience_maker"].RemoteExperienceMaker = RemoteExperienceMaker
    original = RemoteExperienceMaker.get_cumulative_returns
    with our_openrlhf.patch() as patched:
        maker = RemoteExperienceMaker()
        returns = maker.get_cumulative_returns(torch.ones(1, 3), torch.ones(1, 3), 1.0)
        assert returns.tolist() == [[3.0, 2.0, 1.0]]
        assert loss.masked_mean is utils.masked_mean
        assert loss.masked_mean(torch.ones(2), torch.ones(2)) == 1.0
        assert isinstance(loss.PolicyLoss(), our_openrlhf.PolicyLoss)
    assert patched.calls == {"get_cumulative_returns": 1, "masked_mean": 1}
    assert RemoteExperienceMaker.get_cumulative_returns is original
    assert loss.PolicyLoss is TheirLayer


@pytest.mark.parametrize("module", [our_trl, our_verl, our_openrlhf], ids=["trl", "verl", "openrlhf"])
def test_what_is_exported_exists_and_is_said(module):
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert module.patch.__doc__ and module.VERSION
