"""A decoder's pieces by the C++ row operators: as the references say, and the same bits whatever comes with a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.instruction_sets import printed_by_each
from zs_kernels import native_status, use_backend
from zs_kernels.decoder_rows import (
    NO_ADAPTERS,
    Adapter,
    Adapters,
    LayerWeights,
    Places,
    Tenant,
    attend_rows,
    draw_rows,
    layer_rows,
    layer_rows_reference,
    linear_rows,
    norm_rows,
    rotate_rows,
    silu_rows,
)
from zs_kernels.testing import seeded

pytestmark = pytest.mark.skipif(not native_status().available, reason=f"no compiled part: {native_status().reason}")

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Relative (Euclidean) distance from float64 that rounding explains."""
ROWS = [1, 2, 3, 4, 5, 7, 33]
"""Fewer than a tile of four, one, and more; of two with AVX2."""


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (5, 16), (6, 17), (13, 48), (64, 100)])
def test_products_are_those_of_float64(dtype, rows, outer, inner):
    x, weight, gate = (
        seeded(size, inner, seed=size + place, dtype=dtype) for place, size in enumerate((rows, outer, outer))
    )
    bias = seeded(outer, seed=3, dtype=dtype)
    exact = x.double() @ weight.double().T
    assert distance(linear_rows(x, weight), exact) < ROUNDING[dtype]
    assert distance(linear_rows(x, weight, bias), exact + bias.double()) < ROUNDING[dtype]
    assert distance(linear_rows(x, weight, gate=gate), F.silu(x.double() @ gate.double().T) * exact) < ROUNDING[dtype]
    wide = seeded(rows, outer + 9, seed=4, dtype=dtype)
    expected = wide.clone().double()
    expected[:, 2 : outer + 2] += exact
    linear_rows(x, weight, out=wide[:, 2 : outer + 2], add=True)
    assert distance(wide, expected) < ROUNDING[dtype]
    assert torch.equal(wide[:, outer + 2 :].double(), expected[:, outer + 2 :]), "only the columns of out are written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_product_is_the_same_in_any_company(dtype):
    """More rows than stay in the cache at once, too."""
    inner = 1000
    x = seeded(150, inner, seed=0, dtype=dtype)
    weight, gate = seeded(50, inner, seed=1, dtype=dtype), seeded(50, inner, seed=2, dtype=dtype)
    for options in ({}, {"gate": gate}):
        together = linear_rows(x, weight, **options)
        for rows in ([0], [149], [5, 6], [7, 3, 1], [140, 1, 2, 3, 4], list(range(99, 150))):
            assert torch.equal(linear_rows(x[rows], weight, **options), together[rows]), rows
    strided = seeded(150, 2 * inner, seed=0, dtype=dtype)[:, ::1]
    strided[:, :inner] = x
    assert torch.equal(linear_rows(strided[:, :inner], weight), linear_rows(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 576])
def test_norms_and_activations_are_those_of_the_reference(dtype, width):
    x, weight = seeded(5, width, seed=0, dtype=dtype), seeded(width, seed=1, dtype=dtype)
    exact = weight.double() * (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert distance(norm_rows(x, weight, 1e-5), exact) < ROUNDING[dtype]
    other = seeded(5, width, seed=2, dtype=dtype)
    assert distance(silu_rows(x, other), F.silu(x.double()) * other.double()) < 2 * ROUNDING[dtype]
    kept = silu_rows(x, other)
    assert torch.equal(silu_rows(x, other, out=x), kept)
    assert torch.equal(silu_rows(kept[3:4], other[3:4]), silu_rows(kept, other)[3:4])


class Stored(NamedTuple):
    """Tokens in slots, with q, k and v of the next ones."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor

    def rotate(self, **norms: Tensor) -> None:
        rotate_rows(
            self.q, self.k, self.v, self.cos, self.sin, slots=self.slots, positions=self.positions, keys=self.keys,
            values=self.values, eps=1e-6, **norms,
        )  # fmt: skip


def stored(dtype: torch.dtype, *, heads: int = 6, kv_heads: int = 2, size: int = 32) -> Stored:
    places = [(0, 0), (2, 8), (2, 9), (1, 62), (3, 5), (3, 6), (3, 7)]
    tokens = len(places)
    wide = seeded(tokens, (heads + 2 * kv_heads) * size, seed=0, dtype=dtype)
    q, k, v = wide.split([heads * size, kv_heads * size, kv_heads * size], dim=1)
    angles = torch.arange(64)[:, None] / 10.0 ** torch.linspace(0, 3, size // 2)
    keys, values = (seeded(4, kv_heads, 64, size, seed=seed, dtype=dtype) for seed in (1, 2))
    slots, positions = torch.tensor(places).T.contiguous()
    return Stored(q, k, v, angles.cos().to(dtype), angles.sin().to(dtype), slots, positions, keys, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_is_that_of_the_reference(dtype, size, normed):
    norms = {name: 1 + seeded(size, seed=9, dtype=dtype) for name in ("q_norm", "k_norm")} if normed else {}
    ours, plain = stored(dtype, size=size), stored(dtype, size=size)
    ours.rotate(**norms)
    with use_backend("reference"):
        plain.rotate(**norms)
    for name in ("q", "keys", "values"):
        assert distance(getattr(ours, name), getattr(plain, name).double()) < ROUNDING[dtype], name
    if dtype == torch.float32 and not normed:
        assert torch.equal(ours.q, plain.q) and torch.equal(ours.keys, plain.keys), "the same products and sums"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 32), (3, 3, 16), (7, 1, 64), (4, 2, 80), (2, 1, 128)])
def test_attention_is_that_of_the_reference_and_a_tokens_own(dtype, heads, kv_heads, size):
    given = stored(dtype, heads=heads, kv_heads=kv_heads, size=size)
    scale = size**-0.5
    places = {"slots": given.slots, "positions": given.positions}
    found = attend_rows(given.q, given.keys, given.values, scale=scale, **places)
    with use_backend("reference"):
        exact = attend_rows(given.q, given.keys, given.values, scale=scale, **places)
    assert distance(found, exact.double()) < ROUNDING[dtype]
    for t in range(len(found)):
        alone = {name: one[t : t + 1] for name, one in places.items()}
        assert torch.equal(attend_rows(given.q[t : t + 1], given.keys, given.values, scale=scale, **alone)[0], found[t])
    given.keys[3, :, 8:] = torch.nan  # beyond every position there
    given.values[3, :, 8:] = torch.nan
    assert torch.equal(attend_rows(given.q, given.keys, given.values, scale=scale, **places), found)


LAYERS = {
    "llama": {},
    "qwen2": {"q_bias", "k_bias", "v_bias"},
    "qwen3": {"q_norm", "k_norm"},
    "llama with biases": {"q_bias", "k_bias", "v_bias", "o_bias"},
}


def layer_weights(dtype: torch.dtype, given: Stored, hidden: int, inner: int, optional: set[str]) -> LayerWeights:
    width, kv_width, size = given.q.shape[1], given.k.shape[1], given.keys.shape[3]
    shapes = {
        "input_norm": (hidden,),
        "q": (width, hidden),
        "q_bias": (width,),
        "k": (kv_width, hidden),
        "k_bias": (kv_width,),
        "v": (kv_width, hidden),
        "v_bias": (kv_width,),
        "q_norm": (size,),
        "k_norm": (size,),
        "o": (hidden, width),
        "o_bias": (hidden,),
        "post_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    made = {name: 0.3 * seeded(*shape, seed=20 + n, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())}
    absent = {"q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"} - optional
    return LayerWeights(**{name: None if name in absent else tensor for name, tensor in made.items()})


def places_of(given: Stored) -> Places:
    return Places(given.cos, given.sin, given.slots, given.positions, given.keys, given.values)


def layer_of(given: Stored, adapters: Adapters = NO_ADAPTERS) -> dict[str, Any]:
    return {"tenants": [Tenant(len(given.slots), places_of(given), adapters)], "eps": 1e-6, "scale": 0.2}


PRODUCTS = {
    "q": (192, 48),
    "k": (64, 48),
    "v": (64, 48),
    "o": (48, 192),
    "gate": (70, 48),
    "up": (70, 48),
    "down": (48, 70),
}
"""[out, in] of a layer of 48 hidden numbers, 70 inner ones, and the heads of `stored`."""


def adapters_on(*names: str, dtype: torch.dtype, rank: int = 5, seed: int = 40) -> Adapters:
    made = {}
    for place, name in enumerate(names):
        wide, narrow = PRODUCTS[name]
        a = 0.3 * seeded(rank, narrow, seed=seed + place, dtype=dtype)
        made[name] = Adapter(a, 0.3 * seeded(wide, rank, seed=seed + 10 + place, dtype=dtype))
    return Adapters(**made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optional", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("due", [None, [6, 0, 3], []], ids=["all", "some", "none"])
def test_a_layer_is_its_pieces_bit_for_bit(dtype, optional, due):
    found, stores = [], []
    for way in (layer_rows, layer_rows_reference):
        given = stored(dtype)
        weights = layer_weights(dtype, given, 48, 70, set(optional))
        x = seeded(7, 53, seed=5, dtype=dtype)[:, :48]  # rows that do not touch
        rows = None if due is None else torch.tensor(due, dtype=torch.int64)
        found.append(way(x, weights, **layer_of(given), due=rows))
        stores.append((given.keys, given.values))
        assert torch.equal(x, seeded(7, 53, seed=5, dtype=dtype)[:, :48]), "x stays"
    assert torch.equal(*found) and found[0].shape == (7 if due is None else len(due), 48)
    assert torch.equal(stores[0][0], stores[1][0]) and torch.equal(stores[0][1], stores[1][1])
    assert not torch.equal(stores[0][0], stored(dtype).keys), "all tokens are stored, whoever is due"


ADAPTED = {"all": tuple(PRODUCTS), "attention": ("q", "v"), "up": ("up",), "gate": ("gate",), "down": ("o", "down")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", ADAPTED.values(), ids=ADAPTED)
def test_a_layer_with_adapters_is_its_pieces_bit_for_bit_and_that_of_merged_weights(dtype, names):
    found = []
    adapters = adapters_on(*names, dtype=dtype)
    x = seeded(7, 48, seed=5, dtype=dtype)
    for way in (layer_rows, layer_rows_reference):
        given = stored(dtype)
        weights = layer_weights(dtype, given, 48, 70, {"q_bias", "k_norm"})
        found.append((way(x, weights, **layer_of(given, adapters)), given.keys))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    plain = stored(dtype)
    assert not torch.equal(layer_rows(x, weights, **layer_of(plain)), found[0][0])
    if dtype == torch.float32:  # merged, bfloat16 weights would be rounded once more
        merged = {
            name: getattr(weights, name) + getattr(adapters, name).b @ getattr(adapters, name).a for name in names
        }
        exact = layer_rows(x, weights._replace(**merged), **layer_of(stored(dtype)))
        assert distance(found[0][0], exact.double()) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("due", [None, [2, 6, 9, 7], [8], []], ids=["all", "some", "the second's", "none"])
@pytest.mark.parametrize("adapted", ["one", "both", "none"])
def test_tenants_of_a_layer_have_the_bits_that_each_has_alone(dtype, due, adapted):
    """Of other slots, other adapters and other ranks; the second one brings fewer tokens."""

    def tenants() -> list[Tenant]:
        one, other = stored(dtype), stored(dtype)
        other.keys.mul_(0.5)
        few = places_of(other)._replace(slots=other.slots[3:].contiguous(), positions=other.positions[3:].contiguous())
        own = {
            "one": (NO_ADAPTERS, adapters_on(*PRODUCTS, dtype=dtype)),
            "both": (adapters_on("q", "up", dtype=dtype, rank=3, seed=90), adapters_on(*PRODUCTS, dtype=dtype)),
            "none": (NO_ADAPTERS, NO_ADAPTERS),
        }[adapted]
        return [Tenant(7, places_of(one), own[0]), Tenant(4, few, own[1])]

    x = seeded(11, 48, seed=5, dtype=dtype)
    weights = layer_weights(dtype, stored(dtype), 48, 70, {"k_bias", "q_norm"})
    rows = None if due is None else torch.tensor(due, dtype=torch.int64)
    together = tenants()
    found = layer_rows(x, weights, together, eps=1e-6, scale=0.2, due=rows)
    alone = tenants()
    own_due = [None, None] if rows is None else [rows[rows < 7], rows[rows >= 7] - 7]
    parts = [
        layer_rows(x[first:last], weights, [one], eps=1e-6, scale=0.2, due=of_one)
        for one, first, last, of_one in zip(alone, (0, 7), (7, 11), own_due, strict=True)
    ]
    assert torch.equal(found, torch.cat(parts)) and len(found) == (11 if due is None else len(due))
    again = tenants()
    assert torch.equal(layer_rows_reference(x, weights, again, eps=1e-6, scale=0.2, due=rows), found)
    for one, other, third in zip(together, alone, again, strict=True):
        for name in ("keys", "values"):
            stores = [getattr(tenant.places, name) for tenant in (one, other, third)]
            assert torch.equal(stores[0], stores[1]) and torch.equal(stores[0], stores[2])


def test_a_gate_wider_than_the_layer_is_refused_before_anything_is_written():
    given = stored(torch.float32)
    weights = layer_weights(torch.float32, given, 48, 70, set())._replace(gate=torch.zeros(400_000, 48))
    with pytest.raises(RuntimeError, match="fit each other"):
        adapters = adapters_on("up", dtype=torch.float32)
        layer_rows(seeded(7, 48, seed=5), weights, **layer_of(given, adapters))


def test_reference_and_operator_refuse_tokens_of_nobody():
    given = stored(torch.float32)
    weights = layer_weights(torch.float32, given, 48, 70, set())
    for way in (layer_rows, layer_rows_reference):
        with pytest.raises((RuntimeError, ValueError), match="tenants"):
            way(seeded(8, 48, seed=5), weights, **layer_of(given))


@pytest.mark.parametrize(
    ("tokens", "due", "adapter", "message"),
    [
        ((7, 3), None, None, "10 tokens, but x has 11"),
        ((7, -4), None, None, "fewer than 0"),
        ((7, 4), [8, 2], None, "earlier tenant"),
        ((7, 4), None, Adapter(torch.zeros(5, 48), torch.zeros(191, 5)), "B is"),
        ((7, 4), None, Adapter(torch.zeros(5, 47), torch.zeros(192, 5)), "K = 48"),
        ((7, 4), None, Adapter(torch.zeros(5, 48), torch.zeros(192, 4)), "K = 5"),
        ((7, 4), None, Adapter(torch.zeros(0, 48), torch.zeros(192, 0)), "K = 0"),
        ((7, 4), None, Adapter(torch.zeros(5, 48), None), "an A and a B"),
    ],
)
def test_tenants_that_do_not_fit_are_refused(tokens, due, adapter, message):
    one, other = stored(torch.float32), stored(torch.float32)
    few = places_of(other)._replace(slots=other.slots[3:].contiguous(), positions=other.positions[3:].contiguous())
    tenants = [Tenant(tokens[0], places_of(one), Adapters(q=adapter)), Tenant(tokens[1], few)]
    weights = layer_weights(torch.float32, one, 48, 70, set())
    rows = None if due is None else torch.tensor(due)
    with pytest.raises(RuntimeError, match=message):
        layer_rows(seeded(11, 48, seed=5), weights, tenants, eps=1e-6, scale=0.2, due=rows)


def test_a_layer_is_that_of_the_reference():
    results = []
    for backend in ("native", "reference"):
        given = stored(torch.float32)
        weights = layer_weights(torch.float32, given, 48, 70, {"q_bias", "k_norm", "o_bias"})
        with use_backend(backend):
            results.append(layer_rows(seeded(7, 48, seed=5), weights, **layer_of(given), due=torch.tensor([1, 6])))
    assert distance(results[0], results[1].double()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(32, 48)}, "fit each other"),
        ({"o": torch.zeros(40, 192)}, "fit each other"),
        ({"down": torch.zeros(48, 71)}, "K = 70"),
        ({"gate": torch.zeros(71, 48)}, "fit each other"),
        ({"post_norm": torch.zeros(47)}, "norm"),
        ({"input_norm": None}, "weight 0 is absent"),
        ({"q_bias": torch.zeros(191)}, "bias"),
    ],
)
def test_a_layer_of_weights_that_do_not_fit_is_refused(change, message):
    given = stored(torch.float32)
    weights = layer_weights(torch.float32, given, 48, 70, set())._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        layer_rows(seeded(7, 48, seed=5), weights, **layer_of(given))


def test_a_layer_refuses_rows_that_are_not_there():
    given = stored(torch.float32)
    weights = layer_weights(torch.float32, given, 48, 70, set())
    for row in (7, -1):
        with pytest.raises(RuntimeError, match="row of `due`"):
            layer_rows(seeded(7, 48, seed=5), weights, **layer_of(given), due=torch.tensor([row]))


def test_large_scores_do_not_overflow():
    given = stored(torch.float32)
    given.q.mul_(1e4)
    out = attend_rows(given.q, given.keys, given.values, slots=given.slots, positions=given.positions, scale=1.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_draws_are_those_of_the_reference(dtype, vocabulary):
    rows = 40
    logits = (3 * seeded(rows, vocabulary + 3, seed=vocabulary)).to(dtype)[:, :vocabulary]
    temperatures = torch.tensor([1.0, 0.5, 1.7, 1.0] * 10)
    draws = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[::5] = -1.0
    draws[1], draws[2] = 0.0, 1.0 - 2.0**-53
    ids, logprobs = draw_rows(logits, temperatures, draws)
    with use_backend("reference"):
        expected, _ = draw_rows(logits, temperatures, draws)
    # Weights and their sums are rounded differently: a draw may land on the other side of a border, rarely.
    assert (ids != expected).sum() <= 1 and torch.equal(ids[::5], expected[::5])
    exact = torch.log_softmax(logits.double() / temperatures[:, None], -1).gather(-1, ids[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), exact, atol=3e-6)
    for row in (0, 1, 17, 39):
        alone = draw_rows(logits[row : row + 1], temperatures[row : row + 1], draws[row : row + 1])
        assert torch.equal(alone[0][0], ids[row]) and torch.equal(alone[1][0], logprobs[row])


def test_frequencies_are_the_softmax_across_blocks():
    """Tokens with weight lie in three blocks of 1024; chi-square with 4 degrees of freedom, 30 has a chance of 5e-6."""
    places, count = [3, 1023, 1024, 2047, 2500], 20_000
    logits = torch.full((count, 2501), -torch.inf)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.35], dtype=torch.float64)
    logits[:, places] = weights.log().float()
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, _ = draw_rows(logits, torch.ones(count), draws)
    observed = torch.bincount(ids, minlength=2501)[places].double()
    assert observed.sum() == count, "a token of weight 0 is never drawn"
    assert (((observed - count * weights) ** 2) / (count * weights)).sum() < 30


def test_the_last_draw_takes_a_token_with_weight():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [-torch.inf, -200.0, 0.0]]).repeat(1, 1000)
    ids, logprobs = draw_rows(logits, torch.ones(2), torch.tensor([1.0 - 2.0**-53] * 2, dtype=torch.float64))
    assert ids[0] % 3 in (0, 1) and ids[1] % 3 == 2 and logprobs.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, "K"),
        ({"weight": torch.zeros(3, 4, dtype=torch.bfloat16)}, "type"),
        ({"x": torch.zeros(2, 8)[:, ::2]}, "dense rows"),
        ({"x": torch.zeros(2, 4, dtype=torch.float16), "weight": torch.zeros(3, 4, dtype=torch.float16)}, "bfloat16"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"gate": torch.zeros(3, 4), "bias": torch.zeros(3)}, "gate"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(RuntimeError, match=message):
        linear_rows(given.pop("x"), given.pop("weight"), given.pop("bias", None), **given)


def test_places_outside_the_slots_are_refused():
    given = stored(torch.float32)
    for name, value in (("slots", 4), ("slots", -1), ("positions", 64), ("positions", -1)):
        places = {"slots": given.slots.clone(), "positions": given.positions.clone()}
        places[name][2] = value
        with pytest.raises(RuntimeError, match="outside"):
            attend_rows(given.q, given.keys, given.values, scale=1.0, **places)


DIGESTS = """
import hashlib, sys
sys.path.insert(0, {folder!r})
import torch
from test_decoder_rows import *
def digest(*tensors):
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()
for dtype in DTYPES:
    for rows in (1, 3, 10):
        x, weight = seeded(rows, 70, seed=1, dtype=dtype), seeded(11, 70, seed=2, dtype=dtype)
        bias, gate = seeded(11, seed=3, dtype=dtype), seeded(11, 70, seed=4, dtype=dtype)
        print(digest(linear_rows(x, weight, bias)), digest(linear_rows(x, weight, gate=gate)))
    one = stored(dtype)
    one.rotate(q_norm=seeded(32, seed=5, dtype=dtype), k_norm=seeded(32, seed=6, dtype=dtype))
    places = dict(slots=one.slots, positions=one.positions)
    print(digest(one.q, one.keys), digest(attend_rows(one.q, one.keys, one.values, scale=0.2, **places)))
    print(digest(norm_rows(one.k, seeded(64, seed=7, dtype=dtype), 1e-5)), digest(silu_rows(one.k, one.v)))
    layer = layer_weights(dtype, one, 48, 70, {{"q_bias", "k_norm"}})
    x, adapters = seeded(7, 48, seed=8, dtype=dtype), adapters_on(*PRODUCTS, dtype=dtype)
    print(digest(layer_rows(x, layer, **layer_of(one)), one.keys, one.values))
    print(digest(layer_rows(x, layer, **layer_of(one, adapters)), one.keys, one.values))
    print(digest(*draw_rows(3 * one.q, torch.full((7,), 0.9), torch.linspace(-0.1, 0.9, 7, dtype=torch.float64))))
"""


def test_every_instruction_set_gives_the_same_bits():
    outputs = printed_by_each(DIGESTS.format(folder=str(Path(__file__).parent)))
    assert outputs[0].count("\n") == 16
    assert outputs[0].splitlines() == outputs[1].splitlines() == outputs[2].splitlines()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    x, weight = seeded(40, 256, seed=0, dtype=dtype), seeded(700, 256, seed=1, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, layer_alone = linear_rows(x, weight), whole_layer(dtype)
        torch.set_num_threads(3)
        assert torch.equal(linear_rows(x, weight), alone)
        assert torch.equal(whole_layer(dtype), layer_alone)
    finally:
        torch.set_num_threads(threads)


def whole_layer(dtype: torch.dtype) -> Tensor:
    given = stored(dtype)
    weights = layer_weights(dtype, given, 256, 700, {"q_bias", "k_norm"})
    return layer_rows(seeded(7, 256, seed=5, dtype=dtype), weights, **layer_of(given))
