"""The updates that are to be learned have the rank and the size that they are said to have."""

import pytest
import torch

from benchmarks import known_update


@pytest.mark.parametrize(("kind", "rank"), [("rank 4", 4), ("full rank", 24), ("scales", 24)])
def test_rank_and_size_of_an_update(kind, rank):
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    delta = known_update.update(weight, kind)
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == rank
    torch.testing.assert_close(delta.norm(), known_update.STRENGTH * weight.norm())
