from __future__ import annotations

import pytest

import zs_fast.train


@pytest.fixture(scope="module")
def no_pictures():
    """Runs without curve and report: drawing takes longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zs_fast.train, "reward_curve", lambda *_: None)
        patch.setattr(zs_fast.train, "write_report", lambda *_: None)
        yield
