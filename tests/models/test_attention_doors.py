"""Each door gives its package what the package documents, and the choice among them is said and never silent.

The kernels need a GPU, so stand-ins with the packages' own signatures compute what those document, segment by segment;
tests/gpu/test_gpu_attention.py holds the real ones to the same.
"""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen as torch_varlen

from zs_fast.doctor import examine, render
from zs_fast.errors import PreflightError
from zs_fast.models import attention, varlen
from zs_fast.models.attention import PackedAttention, use_attention
from zs_fast.models.varlen import DOORS, Choice, choose, describe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LENGTHS = [1, 7, 64, 3]
BOUNDS = [0, 1, 8, 72, 75]


SHARED = {"rows": torch.tensor([0, *range(1, 8), *range(8, 72), 8, 9, 72]), "computed_cu_seqlens": [0, 1, 8, 72, 73]}
"""The last segment begins with two tokens of the one before it."""


def reference(query, key, value, bounds, scale, query_bounds=None):
    """[T, heads, D], causal inside each segment, keys' heads repeated as grouped attention has it. With fewer queries
    than keys the last query sees the last key, as flash-attn documents from 2.1 on."""
    times = query.shape[1] // key.shape[1]
    parts = []
    for (start, stop), (first, last) in zip(pairwise(bounds), pairwise(query_bounds or bounds), strict=True):
        q, (k, v) = query[first:last].transpose(0, 1), (t[start:stop].transpose(0, 1) for t in (key, value))
        k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
        scores = (q @ k.transpose(1, 2)) * scale
        seen = torch.ones(last - first, stop - start, dtype=torch.bool).tril(stop - start - (last - first))
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def check_varlen_arguments(query, key, value, offsets_q, offsets_k, longest_q, longest_k):
    assert query.dim() == key.dim() == value.dim() == 3 and key.shape == value.shape
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    for offsets in (offsets_q, offsets_k):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == query.device
    assert offsets_k.tolist() == BOUNDS and type(longest_q) is int and longest_q == longest_k == max(LENGTHS)
    if query.shape[0] == BOUNDS[-1]:
        assert offsets_q is offsets_k
    else:
        assert offsets_q.tolist() == SHARED["computed_cu_seqlens"]


@pytest.fixture
def offered(monkeypatch):
    """The offsets that each layer was given."""
    return []


@pytest.fixture
def flash_attn(monkeypatch, offered):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        check_varlen_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert causal and dropout_p == 0.0 and window_size == (-1, -1) and not return_attn_probs
        offered.append(cu_seqlens_q)
        return reference(q, k, v, cu_seqlens_k.tolist(), softmax_scale, cu_seqlens_q.tolist())

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.fixture
def xformers(monkeypatch, offered):
    class BlockDiagonalCausalMask:
        def __init__(self, lengths):
            self.lengths = lengths

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert isinstance(q_seqlen, list) and kv_seqlen is None and device == CPU
            return cls(q_seqlen)

    class BlockDiagonalCausalFromBottomRightMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen, *, device=None):
            assert isinstance(q_seqlen, list) and device == CPU
            assert all(asking <= length for asking, length in zip(q_seqlen, kv_seqlen, strict=True))
            made = cls()
            made.query_lengths, made.lengths = q_seqlen, kv_seqlen
            return made

    masks = (BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert key.shape == value.shape and query.shape[2:] == key.shape[2:] and query.dim() == 4
        assert query.shape[0] == 1 and isinstance(attn_bias, masks) and p == 0.0
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        offered.append(attn_bias)
        keys = [0, *torch.tensor(attn_bias.lengths).cumsum(0).tolist()]
        queries = [0, *torch.tensor(getattr(attn_bias, "query_lengths", attn_bias.lengths)).cumsum(0).tolist()]
        return reference(query[0], key[0], value[0], keys, scale, queries)[None]

    modules = {
        name: types.ModuleType(name)
        for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    }
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    for mask in masks:
        setattr(modules["xformers.ops.fmha.attn_bias"], mask.__name__, mask)
    modules["xformers.ops.fmha"].attn_bias = modules["xformers.ops.fmha.attn_bias"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def torch_before_2_11(offered):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        assert is_causal and query.shape[1] == key.shape[1]
        check_varlen_arguments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        offered.append(cu_seq_q)
        return reference(query, key, value, cu_seq_k.tolist(), scale, cu_seq_q.tolist())

    return varlen_attn


def torch_2_11(offered):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert window_size == (-1, 0) and query.shape[1] == key.shape[1]
        check_varlen_arguments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        offered.append(cu_seq_q)
        return reference(query, key, value, cu_seq_k.tolist(), scale, cu_seq_q.tolist())

    return varlen_attn


def torch_2_12(offered):
    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert window_size == (-1, 0) and (enable_gqa or query.shape[1] == key.shape[1])
        assert seqused_k is None and block_table is None and return_aux is None
        check_varlen_arguments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        offered.append(cu_seq_q)
        return reference(query, key, value, cu_seq_k.tolist(), scale, cu_seq_q.tolist())

    return varlen_attn


def tensors(kv_heads, dtype, number):
    """As a decoder layer has them: [1, heads, number, D], not contiguous."""
    draws = torch.Generator().manual_seed(0)
    made = []
    for heads in (6, kv_heads, kv_heads):
        values = torch.randn(1, number, heads, 16, generator=draws).to(dtype)
        made.append(values.transpose(1, 2).requires_grad_())
    return made


def through(door, kv_heads, dtype, shared=None):
    """Output and gradients of two layers' calls by one state."""
    shared = shared or {}
    state = PackedAttention(BOUNDS, **shared)
    state._choice = Choice(door, "", DOORS.get(door))
    number = shared["computed_cu_seqlens"][-1] if shared else BOUNDS[-1]
    inputs = tensors(kv_heads, dtype, number)
    outputs = [state.attend(layer, *inputs, 0.3) for layer in range(2)]
    assert outputs[0].shape == (1, number, 6, 16)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad((outputs[0] * weights).sum(), inputs)
    return [outputs[0], outputs[1], *gradients]


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "door, version",
    [
        ("flash_attn", None),
        ("xformers", None),
        ("torch_varlen", torch_before_2_11),
        ("torch_varlen", torch_2_11),
        ("torch_varlen", torch_2_12),
    ],
)
@pytest.mark.parametrize("shared", [None, SHARED], ids=["apart", "shared"])
def test_door_is_per_segment_attention(
    shared, door, version, kv_heads, dtype, tolerance, offered, flash_attn, xformers, monkeypatch
):
    if version is not None:
        monkeypatch.setattr(torch_varlen, "varlen_attn", version(offered))
    expected = through("per_segment", kv_heads, dtype, shared)
    found = through(door, kv_heads, dtype, shared)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance * scale)
    assert len(offered) == 2 and offered[0] is offered[1]  # made once, for all layers


def test_the_installed_torch_takes_what_its_door_gives():
    """Up to the kernel itself, which needs CUDA."""
    query, key, value = tensors(2, torch.bfloat16, BOUNDS[-1])
    state = PackedAttention(BOUNDS)
    state._choice = Choice("torch_varlen", "", DOORS["torch_varlen"])
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        state.attend(0, query, key, value, 0.3)


def test_on_a_cpu_every_type_goes_segment_by_segment():
    for dtype in (torch.float32, torch.bfloat16):
        choice = choose("auto", CPU, dtype)
        assert choice.name == "per_segment" and "CUDA only" in choice.reason


@pytest.fixture
def capability(monkeypatch):
    """A card of this compute capability; returned so that a test may change it."""
    held = {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: held["capability"])
    return held


@pytest.fixture
def installed(monkeypatch):
    """Only these doors' packages are there."""

    def only(*names):
        for name, door in DOORS.items():
            monkeypatch.setitem(door.__dict__, "missing", "" if name in names else f"no module {name} is installed")

    return only


def test_auto_takes_the_first_that_serves(capability, installed):
    installed("torch_varlen", "flash_attn", "xformers")
    assert choose("auto", CUDA, torch.bfloat16).name == "torch_varlen"
    installed("xformers", "flash_attn")
    taken = choose("auto", CUDA, torch.bfloat16)
    assert taken.name == "flash_attn" and "torch_varlen: no module" in taken.reason
    installed("xformers")
    assert choose("auto", CUDA, torch.bfloat16, 128).name == "xformers"
    installed()
    choice = choose("auto", CUDA, torch.bfloat16)
    assert choice.name == "per_segment" and all(name in choice.reason for name in DOORS)


@pytest.mark.parametrize(
    "dtype, head_dim, reason",
    [
        (torch.float32, 64, "take bfloat16 and float16 only, and the weights are float32"),
        (torch.bfloat16, 320, "head_dim up to 256 in steps of 8, and the model's is 320"),
        (torch.bfloat16, 36, "the model's is 36"),
    ],
)
def test_what_no_kernel_takes_is_named(capability, installed, dtype, head_dim, reason):
    installed(*DOORS)
    choice = choose("auto", CUDA, dtype, head_dim)
    assert choice.name == "per_segment" and reason in choice.reason
    with pytest.raises(PreflightError, match=r"flash_attn.*Change that, or set model\.attention = 'auto'"):
        choose("flash_attn", CUDA, dtype, head_dim)


def test_older_cards(capability, installed):
    installed(*DOORS)
    capability["capability"] = (7, 5)
    choice = choose("auto", CUDA, torch.float16)
    assert choice.name == "xformers" and "needs compute capability 8.0, and cuda:0 has 7.5" in choice.reason
    assert choose("auto", CUDA, torch.bfloat16).name == "per_segment"


@pytest.mark.parametrize(
    "door, line",
    [
        ("torch_varlen", "pip install 'torch>=2.11'"),
        ("flash_attn", "pip install flash-attn --no-build-isolation"),
        ("xformers", "pip install xformers"),
    ],
)
def test_a_named_door_that_is_missing_is_one_error_with_its_command(capability, installed, door, line):
    installed()
    with pytest.raises(PreflightError) as error:
        choose(door, CUDA, torch.bfloat16)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_package_built_for_another_torch_is_named(monkeypatch, capability):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(varlen.importlib, "import_module", broken)
    for door in DOORS.values():
        monkeypatch.delitem(door.__dict__, "missing", raising=False)
        assert door.missing == f"{door.module} can't be imported: undefined symbol: _ZN3c10"
        monkeypatch.delitem(door.__dict__, "missing", raising=False)


def test_a_named_door_on_a_cpu_is_an_error():
    with pytest.raises(PreflightError, match="CUDA only"):
        use_attention("flash_attn", CPU, torch.bfloat16)
    assert attention._Wanted.door == "auto"


def test_the_setting_is_the_process_s(monkeypatch):
    monkeypatch.setattr(attention._Wanted, "door", "auto")
    assert use_attention("per_segment", CPU, torch.float32).startswith("per_segment")
    assert PackedAttention([0, 2])._wanted == "per_segment"
    assert PackedAttention([0, 2], "auto")._wanted == "auto"


def test_the_doctor_says_which_for_each_device(monkeypatch, capability, installed):
    report = examine()
    assert report["attention"]["cpu"].startswith("per_segment (")
    assert "attention  cpu: per_segment" in render(report)
    installed("xformers")
    said = describe("cuda:0")
    assert said.startswith("bfloat16: xformers (") and "float32: per_segment (" in said


def test_no_segment_sees_a_mask(monkeypatch):
    given = []
    whole = F.scaled_dot_product_attention

    def watched(*arguments, **options):
        given.append((len(arguments), set(options)))
        return whole(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    through("per_segment", 2, torch.float32)
    assert given and all(count == 3 and "attn_mask" not in names for count, names in given)
