from __future__ import annotations

import pytest
import torch

from zs_kernels import masked_mean, masked_sum, masked_var, masked_whiten


def poisoned(shape: tuple[int, ...], share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < share
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + 3.0
    return torch.where(mask, values, float("nan")), mask


@pytest.mark.parametrize("shape", [(7,), (5, 13), (3, 4, 5)])
def test_equal_torch_on_the_unmasked_entries(shape: tuple[int, ...]) -> None:
    values, mask = poisoned(shape, 0.6)
    chosen = values[mask]
    torch.testing.assert_close(masked_sum(values, mask), chosen.sum())
    torch.testing.assert_close(masked_mean(values, mask), chosen.mean())
    torch.testing.assert_close(masked_var(values, mask), chosen.var())
    torch.testing.assert_close(masked_var(values, mask, ddof=0), chosen.var(correction=0))
    whitened = masked_whiten(values, mask)
    torch.testing.assert_close(whitened[mask], (chosen - chosen.mean()) / (chosen.var() + 1e-8).sqrt())
    assert (whitened[~mask] == 0).all()
    kept = masked_whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask].mean(), chosen.mean())


def test_along_a_dimension() -> None:
    values, mask = poisoned((6, 9), 0.5, seed=3)
    for row in range(6):
        own = values[row][mask[row]]
        assert float(masked_mean(values, mask, dim=1)[row]) == pytest.approx(float(own.mean()))
        assert float(masked_var(values, mask, dim=1)[row]) == pytest.approx(float(own.var()))
        assert float(masked_whiten(values, mask, dim=1)[row].sum()) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kept", [0, 1])
def test_none_or_one_entry_is_finite_with_a_finite_gradient(kept: int) -> None:
    values = torch.full((4,), float("nan"))
    values[:kept] = 2.0
    values.requires_grad_()
    mask = torch.arange(4) < kept
    results = [masked_mean(values, mask), masked_var(values, mask), masked_whiten(values, mask).sum()]
    assert [float(result.detach()) for result in results] == [2.0 * kept, 0.0, 0.0]
    sum(results).backward()
    assert torch.isfinite(values.grad).all()


def test_micro_batch_means_with_the_whole_count_add_up() -> None:
    values, mask = poisoned((40,), 0.5, seed=5)
    count = float(mask.sum())
    parts = [masked_mean(values[a:b], mask[a:b], denominator=count) for a, b in ((0, 1), (1, 30), (30, 40))]
    torch.testing.assert_close(sum(parts), masked_mean(values, mask))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"masked_mean: argument 'mask' must be a bool tensor of shape \[3\]"):
        masked_mean(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="'ddof'"):
        masked_var(torch.zeros(3), torch.ones(3, dtype=torch.bool), ddof=3)
