"""csrc/cuda without a GPU: the kernel run on the CPU against float64, compiled by nvcc where it is, its limits.

tests/ops/cuda_on_cpu has stand-ins for CUDA's headers: blocks are threads, CUDA threads are fibres.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zs_kernels import _cuda
from zs_kernels._policy_terms import PolicyLossSettings, policy_terms_reference
from zs_kernels.testing import seeded

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "csrc/cuda/policy_rows.cu"
SHARED_MEMORY = 227 << 10


class Kl(ctypes.Structure):
    _fields_ = [
        ("estimator", ctypes.c_int),
        ("straight_through", ctypes.c_bool),
        ("bound", ctypes.c_float),
        ("output_bound", ctypes.c_float),
    ]


NUMBERS = ("ratio_low", "ratio_high", "dual_clip", "ratio_cap", "min_log_ratio", "max_log_ratio")
COEFFICIENTS = ("kl_coefficient", "entropy_coefficient")
COLUMNS = ("old_logprobs", "advantages", "weights", "ref_logprobs", "importance_weights")
RESULTS = ("logprobs", "logsumexps", "entropies")


class Settings(ctypes.Structure):
    _fields_ = [
        ("form", ctypes.c_int),
        *((name, ctypes.c_float) for name in (*NUMBERS, *COEFFICIENTS)),
        ("kl", Kl),
    ]


class Work(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "row_stride", "out_stride")),
        *((name, ctypes.c_void_p) for name in ("index", "inverse_temperatures")),
        ("inverse_temperature", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*COLUMNS, "gradient_scale", *RESULTS)),
        ("settings", Settings),
    ]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The launcher, its kernel compiled for this CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    library = tmp_path_factory.mktemp("cuda") / "policy_rows.so"
    folders = [f"-I{ROOT / one}" for one in ("tests/ops/cuda_on_cpu", "csrc/include", "csrc/cuda")]
    source = ROOT / "tests/ops/cuda_on_cpu/policy_rows.cpp"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *folders, source, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).zs_policy_rows
    function.restype = ctypes.c_char_p
    return function


def settings_of(settings: PolicyLossSettings, *, has_ref: bool) -> Settings:
    """What the operator is given, in the C++ struct."""
    given = _cuda.settings_arguments(settings, has_ref=has_ref)
    kl = [given.pop(name) for name in ("kl_estimator", "kl_straight_through", "kl_bound", "kl_output_bound")]
    return Settings(kl=Kl(*kl), **given)


def run(launch, logits: Tensor, index: Tensor, columns: dict[str, Tensor], settings: Settings, *, blocks: int, **more):
    """(gradient, logprobs, logsumexps, entropies) by the kernel; in place where `out` is `logits`."""
    rows, vocabulary = logits.shape
    out = more.get("out", torch.full_like(logits, torch.nan))
    made = torch.full((3, rows), torch.nan)
    work = Work(
        logits=logits.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        vocabulary=vocabulary,
        row_stride=logits.stride(0),
        out_stride=out.stride(0),
        index=index.data_ptr(),
        inverse_temperature=more.get("inverse", 1.0),
        logprobs=made[0].data_ptr(),
        logsumexps=made[1].data_ptr(),
        entropies=made[2].data_ptr(),
        settings=settings,
        **{name: tensor.data_ptr() for name, tensor in columns.items()},
    )
    assert launch(ctypes.byref(work), blocks, None) is None
    return out, *made


def exact(logits, index, columns, settings: PolicyLossSettings, inverse: Tensor | float = 1.0):
    """(gradient, logprobs, logsumexps, entropies) in float64: softmax by autograd, the token's slopes by reference."""
    leaf = logits.double().requires_grad_()
    z = leaf * (inverse.double()[:, None] if isinstance(inverse, Tensor) else inverse)
    every = torch.log_softmax(z, -1)
    logprobs = every.gather(1, index[:, None]).squeeze(1)
    entropies = -(every.exp() * every.masked_fill(every == -torch.inf, 0.0)).sum(-1)
    given = {name: columns[name].double() if name in columns else None for name in COLUMNS}
    old = logprobs.detach() if given["old_logprobs"] is None else given["old_logprobs"]
    terms = policy_terms_reference(
        logprobs.detach(),
        logprobs.detach() - old,
        given["advantages"],
        given["weights"],
        entropies.detach(),
        given["ref_logprobs"],
        given["importance_weights"],
        None,
        settings,
    )
    slopes = [(terms.grad_logprobs * logprobs).sum()]
    if settings.entropy_coefficient:
        slopes.append((terms.grad_entropy * entropies).sum())
    gradient = torch.autograd.grad(sum(slopes), leaf)[0]
    scale = columns.get("gradient_scale", torch.ones(1)).double()
    return gradient * scale, logprobs.detach(), torch.logsumexp(z, -1).detach(), entropies.detach()


def tokens(rows: int, logits: Tensor, index: Tensor, *names: str) -> dict[str, Tensor]:
    """Columns of plausible numbers; ratios reach past the clips."""
    now = torch.log_softmax(logits.float(), -1).gather(1, index[:, None]).squeeze(1)
    made = {
        "advantages": seeded(rows, seed=1),
        "weights": seeded(rows, seed=2).abs() + 0.1,
        "old_logprobs": now + seeded(rows, seed=3, scale=0.4),
        "ref_logprobs": now + seeded(rows, seed=4, scale=0.4),
        "importance_weights": seeded(rows, seed=5).abs(),
        "gradient_scale": torch.tensor([0.75]),
        "inverse_temperatures": 1.0 / (0.5 + seeded(rows, seed=6).abs()),
    }
    return {name: made[name] for name in ("advantages", "weights", *names)}


def aligned(rows: int, vocabulary: int, *, seed: int, scale: float = 3.0) -> Tensor:
    """bf16 logits whose rows begin at multiples of 16 bytes."""
    stride = -(-vocabulary // 8) * 8
    return seeded(rows, stride, seed=seed, scale=scale, dtype=torch.bfloat16)[:, :vocabulary]


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    gradient, *statistics = found
    for got, want in zip(statistics, wanted[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)
    assert torch.isfinite(gradient).all(), "a column was not written"
    error = (gradient.double() - wanted[0]).abs()
    assert bool((error <= 0.005 * wanted[0].abs() + 2e-6).all()), f"off by {float(error.max()):.2e}"


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 511, 4096, 20_000, 20_003])
def test_rows_of_any_length_by_any_number_of_blocks(launch, vocabulary, blocks):
    rows = 2
    logits = aligned(rows, vocabulary, seed=vocabulary)
    index = torch.tensor([0, vocabulary - 1])
    columns = tokens(rows, logits, index, "old_logprobs")
    settings = PolicyLossSettings(entropy_coefficient=0.01)
    found = run(launch, logits, index, columns, settings_of(settings, has_ref=False), blocks=blocks)
    close(found, exact(logits, index, columns, settings))


@pytest.mark.parametrize(
    "settings",
    [
        PolicyLossSettings(),
        PolicyLossSettings(dual_clip=1.2, ratio_cap=1.1, clip_low=0.1, clip_high=0.3),
        PolicyLossSettings(form="cispo"),
        PolicyLossSettings(form="cispo_cap", ratio_cap=1.1),
        PolicyLossSettings(form="reinforce", entropy_coefficient=0.1),
        PolicyLossSettings(min_log_ratio=-0.1, max_log_ratio=0.1),
        *(
            PolicyLossSettings(kl_coefficient=0.5, kl_estimator=one, kl_clamp=clamp)
            for one in ("k1", "k2", "k3", "k3+")
            for clamp in ("none", "verl")
        ),
    ],
    ids=lambda one: "-".join(f"{v}" for v, d in zip(one, PolicyLossSettings(), strict=True) if v != d) or "default",
)
def test_every_form_of_the_loss(launch, settings):
    rows, vocabulary = 8, 40
    logits = aligned(rows, vocabulary, seed=0)
    index = torch.arange(rows) * 3
    columns = tokens(rows, logits, index, "old_logprobs", "ref_logprobs", "importance_weights", "gradient_scale")
    given = settings_of(settings, has_ref=True)
    found = run(launch, logits, index, columns, given, blocks=2)
    close(found, exact(logits, index, columns, settings))


def test_in_place_with_a_temperature_per_row_and_no_old_logprobs(launch):
    rows, vocabulary = 4, 1000
    logits = aligned(rows, vocabulary, seed=9)
    index = torch.tensor([3, 999, 500, 0])
    columns = tokens(rows, logits, index, "inverse_temperatures")
    settings = PolicyLossSettings(entropy_coefficient=0.05)
    wanted = exact(logits, index, columns, settings, columns["inverse_temperatures"])
    found = run(launch, logits, index, columns, settings_of(settings, has_ref=False), blocks=4, out=logits)
    close(found, wanted)


def test_rows_with_infinities_and_nan(launch):
    logits = torch.zeros(4, 16, dtype=torch.bfloat16)
    logits[0] = -torch.inf
    logits[1, ::2] = -torch.inf
    logits[2, 3] = torch.nan
    index = torch.tensor([1, 1, 1, 99])  # the last one is no column
    columns = tokens(4, torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64), "old_logprobs")
    columns["old_logprobs"] = torch.full((4,), -2.0)
    given = settings_of(PolicyLossSettings(entropy_coefficient=0.1), has_ref=False)
    gradient, logprobs, logsumexps, entropies = run(launch, logits, index, columns, given, blocks=2)
    assert logprobs[0] == -torch.inf and logsumexps[0] == -torch.inf and entropies[0] == 0 and not gradient[0].any()
    assert gradient[1].isfinite().all() and not gradient[1, ::2].any() and gradient[1, 1::2].any()
    assert entropies[1] == pytest.approx(torch.tensor(8.0).log().item())
    assert logprobs[2].isnan() and logprobs[3].isnan()


def test_the_launcher_refuses_what_does_not_fit(launch):
    work = Work(rows=1, vocabulary=4_000_000)
    assert b"does not fit" in launch(ctypes.byref(work), 0, None)
    work = Work(rows=2**30, vocabulary=8)
    assert b"too many rows" in launch(ctypes.byref(work), 8, None)


@pytest.mark.parametrize("architecture", ["90a", "100"])
def test_it_compiles_without_spills(architecture, tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc here")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [compiler, "-std=c++17", "-O3", target, "-Xptxas=-v", f"-I{ROOT / 'csrc/include'}", "-c", SOURCE]
    done = subprocess.run([*command, "-o", tmp_path / "policy_rows.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    static = int(re.search(r"(\d+) bytes smem", done.stderr)[1])
    dynamic = int(re.search(r"kMostBytes = (\d+) << 10", SOURCE.read_text())[1]) << 10
    assert registers <= 64, "two blocks of 512 threads no longer fit on a multiprocessor"
    assert static + dynamic <= SHARED_MEMORY


def test_the_operators_arguments_stand_in_the_order_of_its_schema():
    """No CUDA device takes them here, so their names are compared."""
    schema = (ROOT / "csrc/torch/policy_rows_cuda.cpp").read_text().split('"policy_rows(', 1)[1].split("->", 1)[0]
    names = re.findall(r"\b(?:Tensor\??|Tensor\(a!\)|int|float|bool) (\w+)", schema.replace('"', ""))
    given = list(_cuda.settings_arguments(PolicyLossSettings(), has_ref=False))
    first = names.index(given[0])
    assert names[first:] == [*given, "blocks", "stream"]
    assert names[:first] == [
        "logits", "out", "index", "inverse_temperatures", "inverse_temperature", *COLUMNS, "gradient_scale",
    ]  # fmt: skip
