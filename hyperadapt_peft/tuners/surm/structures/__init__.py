"""The structured matrices of SURM: each product beside a dense builder of the same matrix.

Everything uses the first-column convention: `Z_f(v)` is the n x n matrix with first column `v` whose diagonals wrap
around with the factor `f`, so entry (i, j) is `v[i - j]` for i >= j and `f * v[n + i - j]` else. `Z_1` is circulant,
`Z_-1` skew-circulant. A rectangular circulant or LDR matrix is the top left block of the square one of width
max(in, out); Toeplitz and Kronecker matrices are rectangular by nature.

    structure   matrix (out x in)                 trained parameters, square of width n
    circulant   Z_1(A * B)                        2n
    toeplitz    T(B) @ T(A), T_ij = t_|i-j|       2n, or 2 (2n - 1) in the general form
    kronecker   A (x) B                           the fewest over all factor shapes: 2 * 24 * 32 for n = 768
    ldr         sum_i Z_1(A_i) @ Z_-1(B_i)        2nr

Source: Sehanobish et al., "Structured Unrestricted-Rank Matrices for Parameter Efficient Fine-tuning", NeurIPS 2024,
arXiv 2406.17740.
"""

from .circulant import Circulant
from .kronecker import Kronecker
from .ldr import LDR
from .structure import Structure
from .toeplitz import Toeplitz


STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")


def get_structure(name: str, rank: int = 1, symmetric: bool = True) -> Structure:
    """Return the structure of a name in `STRUCTURES`; `rank` is of LDR and `symmetric` of Toeplitz matrices."""
    table = {"circulant": Circulant(), "toeplitz": Toeplitz(symmetric), "kronecker": Kronecker(), "ldr": LDR(rank)}
    return table[name]


__all__ = ["LDR", "STRUCTURES", "Circulant", "Kronecker", "Structure", "Toeplitz", "get_structure"]
