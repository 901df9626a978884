"""How an op is held to its reference: errors against float64, poisoned memory, seeded inputs.

Source of the acceptance rule: a fast path may err as much as plain torch errs in the same type, plus a small floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


def error_against(exact: Tensor, found: Tensor) -> float:
    """Largest |found - exact| over the finite entries of `exact`, as a share of their largest size (at least 1e-6).

    Raises AssertionError where the two differ in shape, or in which entries are infinite or NaN.
    """
    assert found.shape == exact.shape, f"shape {list(found.shape)} instead of {list(exact.shape)}"
    exact, found = exact.detach().double().cpu(), found.detach().double().cpu()
    finite = exact.isfinite()
    strange = ~finite
    assert torch.equal(found.isfinite(), finite), "other entries are infinite or NaN than in the exact result"
    assert torch.equal(found[strange].nan_to_num(), exact[strange].nan_to_num()), "an infinity has the wrong sign"
    if not finite.any():
        return 0.0
    return float((found - exact)[finite].abs().max() / exact[finite].abs().max().clamp(min=1e-6))


def assert_no_worse_than_torch(found: Tensor, by_torch: Tensor, exact: Tensor, *, floor: float, name: str = "") -> None:
    """`found` errs at most 1.1 times as much as plain torch does in the same type, plus `floor` (relative)."""
    ours, theirs = error_against(exact, found), error_against(exact, by_torch)
    assert ours <= 1.1 * theirs + floor, f"{name}: error {ours:.3e}; torch's own is {theirs:.3e}, the floor {floor:.1e}"


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill what `torch.empty*` and `Tensor.new_empty` return with NaN (integers: their lowest value).

    A kernel that leaves a slot unwritten, or reads one it never wrote, then shows it.
    """

    def poisoned(made: Tensor) -> Tensor:
        with torch.no_grad():
            if made.is_floating_point():
                made.fill_(torch.nan)
            elif made.dtype != torch.bool:
                made.fill_(torch.iinfo(made.dtype).min)
        return made

    originals = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    new_empty = Tensor.new_empty
    with (
        mock.patch.multiple(
            torch,
            **{name: (lambda *a, _of=of, **k: poisoned(_of(*a, **k))) for name, of in originals.items()},
        ),
        mock.patch.object(Tensor, "new_empty", lambda self, *a, **k: poisoned(new_empty(self, *a, **k))),
    ):
        yield


def seeded(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
