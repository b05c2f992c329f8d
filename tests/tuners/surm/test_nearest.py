"""What lies in a structure is found exactly; what does not is approximated no worse than by anything nearby."""

import pytest
import scipy.linalg
import torch

from hyperadapt_peft.tuners.surm.nearest import displacement, nearest
from hyperadapt_peft.tuners.surm.structures import LDR, Circulant, Kronecker, Toeplitz


GENERAL = Toeplitz(symmetric=False)
CASES = [Circulant(), Toeplitz(), GENERAL, Kronecker(), LDR(), LDR(3)]
every_case = pytest.mark.parametrize("structure", CASES, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (2, 2), (16, 16), (13, 13), (8, 5), (5, 8)], ids=str)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def draw(structure, shape):
    return structure.dense(*(randn(*size) for size in structure.factor_shapes(*shape)), *shape)


@every_case
@SHAPES
def test_factors_give_the_matrix_and_the_error(structure, shape):
    target = randn(*shape)
    found = nearest(target, structure, steps=20)
    assert [tuple(factor.shape) for factor in found.factors] == list(structure.factor_shapes(*shape))
    torch.testing.assert_close(structure.dense(*found.factors, *shape), found.dense)
    assert found.error == pytest.approx(((found.dense - target).norm() / target.norm()).item(), abs=1e-12)
    assert found.error <= 1


@every_case
@pytest.mark.parametrize("shape", [(2, 2), (9, 9), (8, 5)], ids=str)
def test_no_perturbation_is_better(structure, shape):
    target = randn(*shape)
    found = nearest(target, structure)
    for scale in (1e-3, 1e-2, 1e-1):
        for _ in range(5):
            moved = [factor + scale * torch.randn_like(factor) for factor in found.factors]
            error = (structure.dense(*moved, *shape) - target).norm() / target.norm()
            # Descent stops near, not at, its minimum.
            assert error >= found.error - 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What is structured is recovered
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Circulant(), Kronecker()], ids=str)
@SHAPES
def test_closed_forms_recover(structure, shape):
    assert nearest(draw(structure, shape), structure).error < 1e-12


@pytest.mark.parametrize("n,rank", [(1, 1), (2, 1), (13, 1), (16, 3), (64, 4)])
def test_ldr_recovers_square_matrices(n, rank):
    target = LDR(rank).dense(randn(rank, n), randn(rank, n) + 0.1, n, n)
    assert nearest(target, LDR(rank)).error < 1e-10


@pytest.mark.parametrize("rows,columns", [(1, 1), (13, 13), (16, 16), (8, 5), (5, 8)])
def test_single_toeplitz_matrices_are_recovered(rows, columns):
    column, row = randn(rows), randn(columns)
    target = torch.tensor(scipy.linalg.toeplitz(column, row))
    assert nearest(target, GENERAL).error < 1e-12
    shared = randn(max(rows, columns))
    target = torch.tensor(scipy.linalg.toeplitz(shared[:rows], shared[:columns]))
    assert nearest(target, Toeplitz()).error < 1e-12


@pytest.mark.parametrize("n", [2, 3, 12])
def test_ldr_of_rank_two_contains_all_toeplitz_matrices(n):
    target = torch.tensor(scipy.linalg.toeplitz(randn(n), randn(n + 1)[:n]))
    assert nearest(target, LDR(2), steps=0).error < 1e-12


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_ldr_of_full_rank_contains_all_matrices(n):
    assert nearest(randn(n, n), LDR(n), steps=0).error < 1e-11
    assert nearest(randn(n, n), LDR(n + 1), steps=0).error < 1e-11


# ---------------------------------------------------------------------------------------------------------------------
# What is not
# ---------------------------------------------------------------------------------------------------------------------


def test_closed_forms_are_projections():
    """The residual is orthogonal to every matrix of a linear structure, which makes it the exact minimum."""
    target = randn(9, 6)
    residual = nearest(target, Circulant()).dense - target
    for k in range(9):
        unit = torch.zeros(9, dtype=torch.float64)
        unit[k] = 1
        assert abs((residual * Circulant().dense(unit, torch.ones_like(unit), 9, 6)).sum()) < 1e-12
    found = nearest(target, Toeplitz(), steps=0)
    for k in range(9):
        mask = torch.tensor(scipy.linalg.toeplitz(range(9), range(6))) == k
        assert abs((found.dense - target)[mask].sum()) < 1e-12


@pytest.mark.parametrize("shape", [(16, 16), (13, 13), (8, 5), (5, 8)], ids=str)
def test_larger_families_are_no_worse(shape):
    target = randn(*shape)
    circulant = nearest(target, Circulant()).error
    toeplitz = nearest(target, GENERAL, steps=0).error
    assert nearest(target, GENERAL, steps=20).error <= toeplitz <= circulant
    assert nearest(target, LDR(1), steps=20).error <= circulant + 1e-9
    assert nearest(target, LDR(2), steps=20).error <= toeplitz + 1e-9


def test_descent_lowers_the_error():
    target = randn(16, 16)
    for structure in (Toeplitz(), LDR()):
        assert nearest(target, structure).error < nearest(target, structure, steps=0).error - 1e-3


def test_displacement_rank_of_the_nearest_ldr_matrix():
    for rank in (1, 2, 5):
        found = nearest(randn(13, 13), LDR(rank))
        assert torch.linalg.matrix_rank(displacement(found.dense), rtol=1e-9) == rank


def test_ldr_factors_are_balanced():
    circulant, skew = nearest(randn(16, 16), LDR(3)).factors
    torch.testing.assert_close(circulant @ circulant.T, skew @ skew.T)


# ---------------------------------------------------------------------------------------------------------------------
# Any input
# ---------------------------------------------------------------------------------------------------------------------


@every_case
def test_zero_is_found(structure):
    found = nearest(torch.zeros(6, 4), structure)
    assert found.error == 0 and not found.dense.any() and all(factor.isfinite().all() for factor in found.factors)


@every_case
def test_types_and_gradients(structure):
    for given, returned in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]:
        target = randn(6, 6).to(given).requires_grad_()
        found = nearest(target, structure, steps=5)
        assert {found.dense.dtype, *(factor.dtype for factor in found.factors)} == {returned}
        assert not found.dense.requires_grad and target.grad is None


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="matrix"):
        nearest(torch.zeros(3), Circulant())
    with pytest.raises(ValueError, match="floating point"):
        nearest(torch.zeros(3, 3, dtype=torch.int64), Circulant())
    with pytest.raises(ValueError, match="finite"):
        nearest(torch.full((3, 3), float("nan")), Circulant())
