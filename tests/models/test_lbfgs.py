"""Batched L-BFGS: each problem reaches its own minimum."""

import torch

from project.models.lbfgs import minimize


def quadratics(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices ``(K, size, size)`` of condition numbers up to 1e4, and minima ``(K, size)``."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for index in range(count):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        matrices.append(basis * torch.logspace(0, index, size) @ basis.T)
    return torch.stack(matrices), torch.randn(count, size, generator=generator)


def test_each_problem_reaches_its_minimum() -> None:
    matrices, minima = quadratics(5, 20)
    evaluated: list[list[int]] = []

    def objective(x: torch.Tensor, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        evaluated.append(problems.tolist())
        difference = x - minima[problems]
        gradient = torch.einsum("kij,kj->ki", matrices[problems], difference)
        return (difference * gradient).sum(1) / 2 + 1, gradient

    result = minimize(objective, torch.zeros(5, 20), torch.ones(5, 20), 1e-8, 500)
    assert result.converged.all()
    torch.testing.assert_close(result.parameters, minima, atol=2e-3, rtol=0)
    assert result.passes == len(evaluated)
    assert len(evaluated[-1]) < len(evaluated[0])  # problems that have converged are evaluated no more


def test_a_step_that_increases_the_value_is_shortened() -> None:
    def objective(x: torch.Tensor, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (1000 * x**2).sum(1) + 1, 2000 * x  # a gradient step overshoots a thousandfold

    result = minimize(objective, torch.ones(1, 1), torch.ones(1, 1), 1e-7, 50)
    assert result.converged.all()
    assert abs(float(result.parameters)) < 1e-3


def test_the_number_of_passes_is_limited() -> None:
    matrices, minima = quadratics(5, 20)

    def objective(x: torch.Tensor, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = x - minima[problems]
        gradient = torch.einsum("kij,kj->ki", matrices[problems], difference)
        return (difference * gradient).sum(1) / 2 + 1, gradient

    result = minimize(objective, torch.zeros(5, 20), torch.ones(5, 20), 1e-7, 5)
    assert result.passes == 5
    assert not result.converged.all()
