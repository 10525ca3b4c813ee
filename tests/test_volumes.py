"""Log-determinants, singular values and Gram matrices of samples, against the matrices themselves."""

import pytest
import torch
from torch import nn

import jacops
import layer_cases
from jacops.errors import InputError, InputTypeError
from jacops.linalg import Diagonal, Matrix, logdet, singular_values
from small import draw, settled

NAMES = ("without bias", "mixed tokens", "called twice", "words", "convolutions", "depthwise", "tied embedding",
         "lstm", "turned and used both ways", "no layer at all")  # fmt: skip


def rows(name: str) -> jacops.linalg.LayerFactors:
    make, x = layer_cases.MODELS[name]
    return jacops.sample_jacobians(settled(make()).eval(), x)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_diagonal_blocks_of_the_gram_matrix(name: str) -> None:
    J = rows(name)
    n = J.codomain.shapes[0][0]
    blocks = J.dense().view(n, -1, J.shape[1])
    expected = blocks @ blocks.mT
    torch.testing.assert_close(J.sample_grams(), expected, rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(blocks)
    found = singular_values(J, by_sample=True)
    torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-7 * float(values.max()))
    volumes = 0.5 * torch.linalg.slogdet(expected)[1]
    some = values[:, -1] > 1e-4 * values[:, 0]
    assert bool(some.any())
    torch.testing.assert_close(logdet(J, by_sample=True)[some], volumes[some], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (6, 8), (5, 5)])
def test_singular_values_of_any_shape(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    torch.testing.assert_close(singular_values(Matrix(matrix)), torch.linalg.svdvals(matrix), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 40), (6, 8), (5, 5)])
def test_determinants_are_products_of_singular_values(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    expected = torch.linalg.svdvals(matrix).log().sum()
    torch.testing.assert_close(logdet(Matrix(matrix)), expected, rtol=1e-9, atol=1e-10)


def test_factored_curvature_adds_up_logarithms() -> None:
    model, x = settled(nn.Linear(3, 2)), draw(9, 3)
    factors = jacops.kronecker_factors(model, nn.MSELoss(), x, draw(9, 2)).to_operator()
    torch.testing.assert_close(logdet(factors), torch.linalg.slogdet(factors.dense())[1], rtol=1e-9, atol=1e-9)
    entries = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(logdet(Diagonal(entries)).exp(), torch.tensor(8.0, dtype=torch.float64))


def test_what_has_no_volume_is_refused() -> None:
    with pytest.raises(InputError, match="more rows than columns"):
        logdet(Matrix(draw(4, 3)))
    with pytest.raises(InputTypeError, match="rows by samples"):
        logdet(Matrix(draw(3, 4)), by_sample=True)
    singular = Matrix(torch.zeros(2, 2, dtype=torch.float64))
    assert float(logdet(singular)) == -float("inf")
