"""Every product against its dense twin, every dense twin against scipy or the definition."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.checkpoint import checkpoint

from hyperadapt_peft.tuners.surm.structures import (
    LDR,
    STRUCTURES,
    Circulant,
    Kronecker,
    Toeplitz,
    get_structure,
)


CASES = {
    "circulant": Circulant(),
    "toeplitz": Toeplitz(),
    "toeplitz-general": Toeplitz(symmetric=False),
    "kronecker": Kronecker(),
    "ldr1": LDR(1),
    "ldr3": LDR(3),
}
SHAPES = [(n, n) for n in (1, 2, 3, 7, 64, 97, 768)] + [(64, 17), (17, 64), (1, 5), (5, 1)]
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=["fft", "dense"])
def method(request, monkeypatch):
    """Every product by FFTs, then every one by matrices."""
    for structure in (Circulant, Toeplitz, LDR):
        monkeypatch.setattr(structure, "dense_up_to", 0 if request.param == "fft" else float("inf"))
    return request.param


def draw(case, out_features, in_features, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(out_features * 10007 + in_features)
    shapes = CASES[case].factor_shapes(out_features, in_features)
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


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
def test_product_equals_dense_twin(case, out_features, in_features, method):
    a, b = draw(case, out_features, in_features)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    expected = x @ CASES[case].dense(a, b, out_features, in_features).T
    found = CASES[case].matmul(x, a, b, out_features)
    assert found.shape == (2, 3, out_features)
    torch.testing.assert_close(found / expected.norm(), expected / expected.norm(), atol=1e-10, rtol=1e-10)


@every_case
@pytest.mark.parametrize("shape", [(4, 9), (4, 2, 3, 9)], ids=str)
def test_a_matrix_per_sample(case, shape, method):
    structure = CASES[case]
    a, b = (torch.randn(4, *size, dtype=torch.float64) for size in structure.factor_shapes(6, 9))
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([structure.matmul(*sample, 6) for sample in zip(x, a, b, strict=True)])
    torch.testing.assert_close(structure.matmul(x, a, b, 6), expected)
    dense = torch.stack([structure.dense(*factors, 6, 9) for factors in zip(a, b, strict=True)])
    torch.testing.assert_close(structure.dense(a, b, 6, 9), dense)


@pytest.mark.parametrize("case", [case for case in CASES if case != "ldr3"])
def test_product_equals_columns_of_the_twin_at_2048_by_8192(case):
    """Too large to build; a few unit vectors pick out columns, which the definitions give cheaply."""
    out_features, in_features = 2048, 8192
    factors = draw(case, out_features, in_features)
    columns = [0, 1, 2047, 2048, 5000, 8191]
    x = torch.zeros(len(columns), in_features, dtype=torch.float64)
    x[range(len(columns)), columns] = 1
    found = CASES[case].matmul(x, *factors, out_features)
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
    np.testing.assert_allclose(Circulant().dense(left, right, n, n), expected, atol=1e-12)

    inner, outer = draw("toeplitz", n, n)
    expected = scipy.linalg.toeplitz(outer.numpy()) @ scipy.linalg.toeplitz(inner.numpy())
    np.testing.assert_allclose(Toeplitz().dense(inner, outer, n, n), expected, atol=1e-12)

    a, b = draw("kronecker", n, n)
    np.testing.assert_allclose(Kronecker().dense(a, b, n, n), np.kron(a, b), atol=1e-12)

    g, h = draw("ldr3", n, n)
    expected = sum(wrapped(g[i].numpy(), 1) @ wrapped(h[i].numpy(), -1) for i in range(3))
    np.testing.assert_allclose(LDR(3).dense(g, h, n, n), expected, atol=1e-12)


@pytest.mark.parametrize("out_features,in_features", [(6, 4), (4, 6), (1, 5), (5, 1)])
def test_rectangular_twins_against_scipy(out_features, in_features):
    block = np.s_[:out_features, :in_features]
    left, right = draw("circulant", out_features, in_features)
    expected = scipy.linalg.circulant((left * right).numpy())[block]
    np.testing.assert_allclose(Circulant().dense(left, right, out_features, in_features), expected, atol=1e-12)

    g, h = draw("ldr1", out_features, in_features)
    expected = (wrapped(g[0].numpy(), 1) @ wrapped(h[0].numpy(), -1))[block]
    np.testing.assert_allclose(LDR().dense(g, h, out_features, in_features), expected, atol=1e-12)

    inner, outer = (factor.numpy() for factor in draw("toeplitz", out_features, in_features))
    expected = scipy.linalg.toeplitz(outer[:out_features], outer[:in_features]) @ scipy.linalg.toeplitz(inner)
    found = Toeplitz().dense(torch.tensor(inner), torch.tensor(outer), out_features, in_features)
    np.testing.assert_allclose(found, expected, atol=1e-12)

    inner, outer = (factor.numpy() for factor in draw("toeplitz-general", out_features, in_features))
    k = in_features - 1
    expected = scipy.linalg.toeplitz(outer[k:], outer[k::-1]) @ scipy.linalg.toeplitz(inner[k:], inner[k::-1])
    found = Toeplitz(False).dense(torch.tensor(inner), torch.tensor(outer), out_features, in_features)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_every_skew_size_parity(method):
    """The skew-circulant transform has one branch for even and one for odd widths: all small widths."""
    for n in range(1, 20):
        e = torch.zeros(1, n, dtype=torch.float64)
        e[0, 0] = 1
        h = torch.randn(1, n, dtype=torch.float64)
        found = LDR().matmul(torch.eye(n, dtype=torch.float64), e, h, n).T
        np.testing.assert_allclose(found, wrapped(h[0].numpy(), -1), atol=1e-13)


@every_case
def test_no_leading_dimensions_and_no_tokens(case, method):
    factors = [factor.requires_grad_() for factor in draw(case, 5, 8)]
    for shape in ((), (0,), (2, 0)):
        x = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
        y = CASES[case].matmul(x, *factors, 5)
        assert y.shape == (*shape, 5)
        y.sum().backward()  # data parallel training waits for the gradients of every parameter
        assert all(tensor.grad.shape == tensor.shape for tensor in (x, *factors))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and ranks
# ---------------------------------------------------------------------------------------------------------------------


def count(structure, out_features, in_features):
    return sum(torch.Size(shape).numel() for shape in structure.factor_shapes(out_features, in_features))


def test_parameter_counts_of_the_paper():
    for structure in (Circulant(), Toeplitz(), Kronecker()):
        assert 36 * count(structure, 768, 768) == 55_296
    assert 24 * count(Circulant(), 768, 768) == 36_864
    assert Kronecker().factor_shapes(768, 768) == ((24, 32), (32, 24))
    assert count(Toeplitz(symmetric=False), 768, 768) == 2 * (2 * 768 - 1)
    assert count(LDR(4), 768, 768) == 2 * 768 * 4


def test_kronecker_shapes_have_the_fewest_parameters():
    for out_features, in_features in [(1, 1), (7, 7), (12, 18), (30, 7), (97, 64), (48, 48)]:
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in (out_features, in_features)]
        fewest = min(a * c + out_features // a * (in_features // c) for a in divisors[0] for c in divisors[1])
        assert count(Kronecker(), out_features, in_features) == fewest


@every_case
def test_unrestricted_rank(case):
    rank = torch.linalg.matrix_rank(CASES[case].dense(*draw(case, 64, 64), 64, 64)).item()
    (a, c), (b, d) = Kronecker().factor_shapes(64, 64)
    assert rank == (min(a, c) * min(b, d) if case == "kronecker" else 64)


@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_displacement_rank_is_exactly_the_rank(n, rank):
    g, h = torch.randn(2, rank, n, dtype=torch.float64)
    dense = LDR(rank).dense(g, h, n, n).numpy()
    unit = np.eye(n)[0 if n == 1 else 1]
    displacement = wrapped(unit, 1) @ dense - dense @ wrapped(unit, -1)
    assert np.linalg.matrix_rank(displacement) == rank


def test_every_structure_has_its_name():
    assert [type(get_structure(name)).__name__.lower() for name in STRUCTURES] == list(STRUCTURES)
    assert get_structure("ldr", rank=3) == LDR(3) and get_structure("toeplitz", symmetric=False) == Toeplitz(False)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("out_features,in_features", [(6, 6), (5, 5), (3, 6), (7, 4), (1, 1)], ids=lambda n: str(n))
def test_gradients(case, out_features, in_features, method):
    inputs = [torch.randn(3, in_features, dtype=torch.float64), *draw(case, out_features, in_features)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *inputs: CASES[case].matmul(*inputs, out_features), inputs, fast_mode=True)


@every_case
def test_gradients_of_a_matrix_per_sample(case, method):
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    factors = [torch.randn(2, *shape, dtype=torch.float64) for shape in CASES[case].factor_shapes(6, 5)]
    inputs = [tensor.requires_grad_() for tensor in (x, *factors)]
    assert torch.autograd.gradcheck(lambda *inputs: CASES[case].matmul(*inputs, 6), inputs, fast_mode=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_input(case, dtype, method):
    """fp32 factors, half precision activations: the type is kept, the error is one rounding of the result."""
    factors = draw(case, 97, 64, torch.float32, scale=0.1)
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    expected = x.double() @ CASES[case].dense(*(factor.double() for factor in factors), 97, 64).T
    found = CASES[case].matmul(x, *factors, 97)
    found.sum().backward()
    assert found.dtype == x.grad.dtype == dtype
    assert relative(found.double(), expected) < max(1e-6, torch.finfo(dtype).eps)


@every_case
def test_autocast(case, method):
    factors = [factor.requires_grad_() for factor in draw(case, 64, 97, torch.float32, scale=0.1)]
    x = torch.randn(5, 97)
    expected = x @ CASES[case].dense(*factors, 64, 97).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CASES[case].matmul(x, *factors, 64)
        found.sum().backward()
    assert found.dtype == torch.float32 and all(factor.grad.isfinite().all() for factor in factors)
    assert relative(found, expected) < (1e-5 if method == "fft" and case != "kronecker" else 2e-2)


@every_case
def test_gradient_checkpointing(case, method):
    factors = [factor.requires_grad_() for factor in draw(case, 9, 9)]
    x = torch.randn(4, 9, dtype=torch.float64)

    def run(x, *factors):
        return CASES[case].matmul(x, *factors, 9).tanh()

    direct = torch.autograd.grad(run(x, *factors).sum(), factors)
    again = torch.autograd.grad(checkpoint(run, x, *factors, use_reentrant=False).sum(), factors)
    torch.testing.assert_close(again, direct)


@pytest.mark.parametrize("case", ["circulant", "toeplitz", "kronecker", "ldr3"])
def test_compiles_in_one_graph(case, method):
    """fullgraph: not one graph break, forward and backward. The aot_eager backend needs no C++ compiler."""
    factors = [factor.requires_grad_() for factor in draw(case, 12, 9)]
    x = torch.randn(4, 9, dtype=torch.float64)

    def run(x, *factors):
        return CASES[case].matmul(x, *factors, 12)

    torch.compiler.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, *factors)
    torch.testing.assert_close(found, run(x, *factors))
    gradients = torch.autograd.grad(found.square().sum(), factors)
    expected = torch.autograd.grad(run(x, *factors).square().sum(), factors)
    torch.testing.assert_close(gradients, expected)


@every_case
@pytest.mark.parametrize("batched", [(0, None, None), (0, 0, 0), (None, 0, None), (1, None, 0)], ids=str)
def test_vmap_and_gradients_per_sample(case, batched, method):
    """`torch.func.vmap(grad(...))` of x, A and B, of which some are batched, equals a loop."""
    structure = CASES[case]
    inputs = [torch.randn(3, 6, dtype=torch.float64), *draw(case, 5, 6)]
    inputs = [
        tensor if dim is None else torch.randn(4, *tensor.shape, dtype=torch.float64).movedim(0, dim)
        for tensor, dim in zip(inputs, batched, strict=True)
    ]
    gradients = torch.func.grad(lambda x, a, b: structure.matmul(x, a, b, 5).square().sum(), argnums=(0, 1, 2))
    found = torch.func.vmap(gradients, in_dims=batched)(*inputs)
    for i in range(4):
        own = [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, batched, strict=True)]
        own = [tensor.detach().requires_grad_() for tensor in own]
        expected = torch.autograd.grad(structure.matmul(*own, 5).square().sum(), own)
        torch.testing.assert_close([gradient[i] for gradient in found], list(expected))


@pytest.mark.parametrize("case", ["circulant", "ldr1"])
def test_second_derivatives_are_refused_not_wrong(case, method):
    factors = [factor.requires_grad_() for factor in draw(case, 8, 8)]
    y = CASES[case].matmul(torch.randn(2, 8, dtype=torch.float64), *factors, 8)
    (gradient,) = torch.autograd.grad(y.square().sum(), factors[1], create_graph=True)
    if method == "fft":
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
    else:
        gradient.sum().backward()
