"""Every product against its dense twin, every dense twin against scipy or the definition."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.checkpoint import checkpoint

from hyperadapt_peft.tuners.surm.structures import (
    STRUCTURES,
    circulant_dense,
    circulant_matmul,
    factor_shapes,
    kronecker_dense,
    kronecker_matmul,
    ldr_dense,
    ldr_matmul,
    toeplitz_dense,
    toeplitz_matmul,
)


# name: (structure, product, dense twin, keywords of factor_shapes, keywords of both functions)
CASES = {
    "circulant": ("circulant", circulant_matmul, circulant_dense, {}, {}),
    "toeplitz": ("toeplitz", toeplitz_matmul, toeplitz_dense, {}, {}),
    "toeplitz-general": (
        "toeplitz",
        toeplitz_matmul,
        toeplitz_dense,
        {"symmetric": False},
        {"symmetric": False},
    ),
    "kronecker": ("kronecker", kronecker_matmul, kronecker_dense, {}, {}),
    "ldr1": ("ldr", ldr_matmul, ldr_dense, {"rank": 1}, {}),
    "ldr3": ("ldr", ldr_matmul, ldr_dense, {"rank": 3}, {}),
}
SHAPES = [(n, n) for n in (1, 2, 3, 7, 64, 97, 768)] + [(64, 17), (17, 64), (1, 5), (5, 1)]
every_case = pytest.mark.parametrize("case", CASES)


def draw(case, out_features, in_features, dtype=torch.float64, scale=1.0):
    structure, _, _, shape_keywords, _ = CASES[case]
    generator = torch.Generator().manual_seed(out_features * 10007 + in_features)
    shapes = factor_shapes(structure, out_features, in_features, **shape_keywords)
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def methods(case):
    return [{}] if case == "kronecker" else [{"method": "fft"}, {"method": "dense"}, {"method": "auto"}]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def wrapped(v, f):
    """Z_f(v), entry by entry from the definition."""
    n = len(v)
    return np.array([[v[i - j] if i >= j else f * v[n + i - j] for j in range(n)] for i in range(n)])


# ---------------------------------------------------------------------------------------------------------------------
# The right matrix
# ---------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("out_features,in_features", SHAPES, ids=lambda n: str(n))
def test_product_equals_dense_twin(case, out_features, in_features):
    _, product, dense, _, keywords = CASES[case]
    factors = draw(case, out_features, in_features)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    expected = x @ dense(*factors, out_features, in_features, **keywords).T
    for method in methods(case):
        found = product(x, *factors, out_features, **keywords, **method)
        assert found.shape == (2, 3, out_features)
        torch.testing.assert_close(found / expected.norm(), expected / expected.norm(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case != "ldr3"])
def test_product_equals_columns_of_the_twin_at_2048_by_8192(case):
    """Too large to build; a few unit vectors pick out columns, which the definitions give cheaply."""
    _, product, _, _, keywords = CASES[case]
    out_features, in_features = 2048, 8192
    factors = draw(case, out_features, in_features)
    columns = [0, 1, 2047, 2048, 5000, 8191]
    x = torch.zeros(len(columns), in_features, dtype=torch.float64)
    x[range(len(columns)), columns] = 1
    found = product(x, *factors, out_features, **keywords)
    first, second = (factor.numpy() for factor in factors)
    i = np.arange(out_features)
    for row, j in zip(found.numpy(), columns, strict=True):
        if case == "circulant":
            expected = (first * second)[(i - j) % in_features]
        elif case == "toeplitz":
            inner = first[abs(np.arange(in_features) - j)]
            expected = scipy.linalg.matmul_toeplitz((second[:out_features], second), inner)
        elif case == "toeplitz-general":
            inner = first[np.arange(in_features) - j + in_features - 1]
            expected = scipy.linalg.matmul_toeplitz((second[in_features - 1 :], second[in_features - 1 :: -1]), inner)
        elif case == "kronecker":
            expected = np.kron(first[:, j // second.shape[1]], second[:, j % second.shape[1]])
        else:
            k = np.arange(in_features) - j
            skew = np.where(k >= 0, second[0][k], -second[0][k % in_features])
            expected = np.fft.irfft(np.fft.rfft(first[0]) * np.fft.rfft(skew), n=in_features)[:out_features]
        np.testing.assert_allclose(row, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_square_twins_against_scipy(n):
    left, right = draw("circulant", n, n)
    expected = scipy.linalg.circulant((left * right).numpy())
    np.testing.assert_allclose(circulant_dense(left, right, n, n), expected, atol=1e-12)

    inner, outer = draw("toeplitz", n, n)
    expected = scipy.linalg.toeplitz(outer.numpy()) @ scipy.linalg.toeplitz(inner.numpy())
    np.testing.assert_allclose(toeplitz_dense(inner, outer, n, n), expected, atol=1e-12)

    a, b = draw("kronecker", n, n)
    np.testing.assert_allclose(kronecker_dense(a, b, n, n), np.kron(a, b), atol=1e-12)

    g, h = draw("ldr3", n, n)
    expected = sum(wrapped(g[i].numpy(), 1) @ wrapped(h[i].numpy(), -1) for i in range(3))
    np.testing.assert_allclose(ldr_dense(g, h, n, n), expected, atol=1e-12)


@pytest.mark.parametrize("out_features,in_features", [(6, 4), (4, 6), (1, 5), (5, 1)])
def test_rectangular_twins_against_scipy(out_features, in_features):
    block = np.s_[:out_features, :in_features]
    left, right = draw("circulant", out_features, in_features)
    expected = scipy.linalg.circulant((left * right).numpy())[block]
    np.testing.assert_allclose(circulant_dense(left, right, out_features, in_features), expected, atol=1e-12)

    g, h = draw("ldr1", out_features, in_features)
    expected = (wrapped(g[0].numpy(), 1) @ wrapped(h[0].numpy(), -1))[block]
    np.testing.assert_allclose(ldr_dense(g, h, out_features, in_features), expected, atol=1e-12)

    inner, outer = (factor.numpy() for factor in draw("toeplitz", out_features, in_features))
    expected = scipy.linalg.toeplitz(outer[:out_features], outer[:in_features]) @ scipy.linalg.toeplitz(inner)
    found = toeplitz_dense(torch.tensor(inner), torch.tensor(outer), out_features, in_features)
    np.testing.assert_allclose(found, expected, atol=1e-12)

    inner, outer = (factor.numpy() for factor in draw("toeplitz-general", out_features, in_features))
    k = in_features - 1
    expected = scipy.linalg.toeplitz(outer[k:], outer[k::-1]) @ scipy.linalg.toeplitz(inner[k:], inner[k::-1])
    found = toeplitz_dense(torch.tensor(inner), torch.tensor(outer), out_features, in_features, symmetric=False)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_every_skew_size_parity():
    """The skew-circulant transform has one branch for even and one for odd widths: all small widths."""
    for n in range(1, 20):
        e = torch.zeros(1, n, dtype=torch.float64)
        e[0, 0] = 1
        h = torch.randn(1, n, dtype=torch.float64)
        found = ldr_matmul(torch.eye(n, dtype=torch.float64), e, h, n, method="fft").T
        np.testing.assert_allclose(found, wrapped(h[0].numpy(), -1), atol=1e-13)


def test_no_leading_dimensions_and_no_tokens():
    for case, (_, product, _, _, keywords) in CASES.items():
        factors = draw(case, 5, 8)
        for method in methods(case):
            assert product(torch.randn(8).double(), *factors, 5, **keywords, **method).shape == (5,)
            assert product(torch.randn(0, 8).double(), *factors, 5, **keywords, **method).shape == (0, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and ranks
# ---------------------------------------------------------------------------------------------------------------------


def count(structure, out_features, in_features, **keywords):
    return sum(torch.Size(shape).numel() for shape in factor_shapes(structure, out_features, in_features, **keywords))


def test_parameter_counts_of_the_paper():
    assert 36 * count("circulant", 768, 768) == 55_296
    assert 36 * count("toeplitz", 768, 768) == 55_296
    assert 36 * count("kronecker", 768, 768) == 55_296
    assert 24 * count("circulant", 768, 768) == 36_864
    assert factor_shapes("kronecker", 768, 768) == ((24, 32), (32, 24))
    assert count("toeplitz", 768, 768, symmetric=False) == 2 * (2 * 768 - 1)
    assert count("ldr", 768, 768, rank=4) == 2 * 768 * 4


def test_kronecker_shapes_have_the_fewest_numbers():
    for out_features, in_features in [(1, 1), (7, 7), (12, 18), (30, 7), (97, 64), (48, 48)]:
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in (out_features, in_features)]
        fewest = min(a * c + out_features // a * (in_features // c) for a in divisors[0] for c in divisors[1])
        assert count("kronecker", out_features, in_features) == fewest


@every_case
def test_unrestricted_rank(case):
    _, _, dense, _, keywords = CASES[case]
    rank = torch.linalg.matrix_rank(dense(*draw(case, 64, 64), 64, 64, **keywords)).item()
    (a, c), (b, d) = factor_shapes("kronecker", 64, 64)
    assert rank == (min(a, c) * min(b, d) if case == "kronecker" else 64)


@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_displacement_rank_is_exactly_the_rank(n, rank):
    g, h = torch.randn(2, rank, n, dtype=torch.float64)
    dense = ldr_dense(g, h, n, n).numpy()
    unit = np.eye(n)[0 if n == 1 else 1]
    displacement = wrapped(unit, 1) @ dense - dense @ wrapped(unit, -1)
    assert np.linalg.matrix_rank(displacement) == rank


@pytest.mark.parametrize("structure", STRUCTURES)
def test_wrong_shapes_are_refused(structure):
    product = {"circulant": circulant_matmul, "toeplitz": toeplitz_matmul}.get(
        structure, kronecker_matmul if structure == "kronecker" else ldr_matmul
    )
    first, second = factor_shapes(structure, 12, 8)
    with pytest.raises(ValueError, match=structure):
        product(torch.randn(3, 13), torch.randn(first), torch.randn(second), 12)
    with pytest.raises(ValueError, match="at least 1"):
        factor_shapes(structure, 12, 0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown structure"):
        factor_shapes("hankel", 4, 4)
    with pytest.raises(ValueError, match="method"):
        circulant_matmul(torch.randn(4), torch.randn(4), torch.randn(4), 4, method="gemm")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("out_features,in_features", [(6, 6), (5, 5), (3, 6), (7, 4), (1, 1)], ids=lambda n: str(n))
def test_gradients(case, out_features, in_features):
    _, product, _, _, keywords = CASES[case]
    inputs = [torch.randn(3, in_features, dtype=torch.float64), *draw(case, out_features, in_features)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    for method in methods(case)[:2]:

        def run(x, *factors, method=method):
            return product(x, *factors, out_features, **keywords, **method)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_input(case, dtype):
    """fp32 factors, half precision activations: the type is kept, the error is one rounding of the result."""
    _, product, dense, _, keywords = CASES[case]
    factors = draw(case, 97, 64, torch.float32, scale=0.1)
    x = torch.randn(5, 64).to(dtype)
    expected = x.double() @ dense(*(factor.double() for factor in factors), 97, 64, **keywords).T
    for method in methods(case):
        x.grad = None
        found = product(x.requires_grad_(), *factors, 97, **keywords, **method)
        found.sum().backward()
        assert found.dtype == x.grad.dtype == dtype
        assert relative(found.double(), expected) < max(1e-6, torch.finfo(dtype).eps)


@every_case
def test_autocast(case):
    _, product, dense, _, keywords = CASES[case]
    factors = [factor.requires_grad_() for factor in draw(case, 64, 97, torch.float32, scale=0.1)]
    x = torch.randn(5, 97)
    expected = x @ dense(*factors, 64, 97, **keywords).T
    for method in methods(case):
        for factor in factors:
            factor.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = product(x, *factors, 64, **keywords, **method)
            found.sum().backward()
        assert found.dtype == torch.float32 and all(factor.grad.isfinite().all() for factor in factors)
        assert relative(found, expected) < (1e-5 if method.get("method") == "fft" else 2e-2)


@every_case
def test_gradient_checkpointing(case):
    _, product, _, _, keywords = CASES[case]
    factors = [factor.requires_grad_() for factor in draw(case, 9, 9)]
    x = torch.randn(4, 9, dtype=torch.float64)
    for method in methods(case):

        def run(x, *factors, method=method):
            return product(x, *factors, 9, **keywords, **method).tanh()

        direct = torch.autograd.grad(run(x, *factors).sum(), factors)
        again = torch.autograd.grad(checkpoint(run, x, *factors, use_reentrant=False).sum(), factors)
        torch.testing.assert_close(again, direct)


@pytest.mark.parametrize("case", ["circulant", "toeplitz", "kronecker", "ldr3"])
def test_compiles_in_one_graph(case):
    """fullgraph: not one graph break, forward and backward. The aot_eager backend needs no C++ compiler."""
    _, product, _, _, keywords = CASES[case]
    factors = [factor.requires_grad_() for factor in draw(case, 12, 9)]
    x = torch.randn(4, 9, dtype=torch.float64)
    for method in methods(case)[:1]:

        def run(x, *factors, method=method):
            return product(x, *factors, 12, **keywords, **method)

        torch.compiler.reset()
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, *factors)
        torch.testing.assert_close(found, run(x, *factors))
        gradients = torch.autograd.grad(found.square().sum(), factors)
        expected = torch.autograd.grad(run(x, *factors).square().sum(), factors)
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("case", ["circulant", "ldr1"])
def test_second_derivatives_are_refused_not_wrong(case):
    _, product, _, _, keywords = CASES[case]
    factors = [factor.requires_grad_() for factor in draw(case, 8, 8)]
    y = product(torch.randn(2, 8, dtype=torch.float64), *factors, 8, **keywords, method="fft")
    (gradient,) = torch.autograd.grad(y.square().sum(), factors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
