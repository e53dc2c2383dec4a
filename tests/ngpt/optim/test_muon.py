"""Muon against singular value decompositions and torch.optim.Muon."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt.optim.muon import Muon, orthogonalize, step_muons

SHAPES = [(8, 8), (24, 6), (6, 24), (40, 13)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 500), st.floats(1e-3, 1e3))
def test_orthogonalization_brings_singular_values_near_one_and_keeps_singular_vectors(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    # Singular values are 0.1 to 1 times the largest. Much smaller ones would need more than five iterations.
    u, _, vt = torch.linalg.svd(random(*shape, seed=seed).double(), full_matrices=False)
    s = torch.linspace(1, 0.1, min(shape), dtype=torch.float64)
    result = orthogonalize((scale * u * s @ vt).float()).double()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    inner = u.T @ result @ vt.T  # diagonal if and only if the singular vectors are the same
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert inner.diagonal().min() > 0.6 and off_diagonal.abs().max() < 1e-4


def test_small_singular_values_grow_in_every_iteration() -> None:
    u, _, vt = torch.linalg.svd(random(6, 6))
    matrix = u * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-3]) @ vt
    smallest = [float(torch.linalg.svdvals(orthogonalize(matrix, steps=steps)).min()) for steps in range(6)]
    assert all(3 * before < after for before, after in pairwise(smallest))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_gives_the_same_result_as_single_matrices(shape: tuple[int, int]) -> None:
    batch = random(2, 3, *shape)
    one_by_one = torch.stack([torch.stack([orthogonalize(matrix) for matrix in row]) for row in batch])
    torch.testing.assert_close(orthogonalize(batch), one_by_one, atol=1e-5, rtol=1e-5)


def test_transposed_input_gives_the_transposed_result() -> None:
    matrix = random(9, 5)
    torch.testing.assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T, atol=1e-6, rtol=0)


def test_zero_matrix_stays_zero_and_keeps_its_dtype() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert orthogonalize(random(3, 4).bfloat16()).dtype == torch.bfloat16


def parameters(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]


def set_gradients(group: list[torch.nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(group):
        parameter.grad = random(*parameter.shape, seed=100 * step + i)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_steps_match_torch_muon(
    nesterov: bool, weight_decay: float, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon would round on a CPU, too
    shapes = [*SHAPES, (8, 8)]
    actual, reference_weights = parameters(shapes), parameters(shapes)
    how = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizers = (Muon(actual, **how), torch.optim.Muon(reference_weights, adjust_lr_fn="original", **how))
    start = [parameter.detach().clone() for parameter in actual]
    for step in range(4):
        for group, optimizer in zip((actual, reference_weights), optimizers, strict=True):
            set_gradients(group, step)
            optimizer.step()
    for mine, other, initial in zip(actual, reference_weights, start, strict=True):
        moved = (other - initial).norm()
        assert (mine - other).norm() < 1e-4 * moved
        assert moved > 0.2


@pytest.mark.parametrize(("shape", "length"), [((30, 6), 0.1 * 5**0.5), ((6, 30), 0.1), ((7, 7), 0.1)])
def test_update_has_the_documented_length(shape: tuple[int, int], length: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = 1e-3 * random(*shape)
    Muon([parameter], lr=0.1).step()
    assert 0.7 * length < torch.linalg.matrix_norm(parameter.detach(), 2) < 1.3 * length


def test_matrices_updated_together_move_as_if_updated_separately() -> None:
    together, alone = parameters([(6, 9)] * 3), parameters([(6, 9)] * 3)
    optimizers = [Muon(together)] + [Muon([parameter]) for parameter in alone]
    for step in range(2):
        set_gradients(together, step)
        set_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_matrix_without_a_gradient_is_unchanged() -> None:
    first, second = parameters([(4, 4), (4, 4)])
    first.grad = random(4, 4)
    before = second.detach().clone()
    Muon([first, second], weight_decay=0.1).step()
    assert torch.equal(second, before)


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4)])
def test_parameter_that_is_not_a_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(shape))])


def test_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        Muon(parameters([(2, 2)])).step(lambda: 0.0)


def test_restored_optimizer_continues_bit_for_bit() -> None:
    straight, resumed = parameters([(6, 4), (4, 4)]), parameters([(6, 4), (4, 4)])
    first, second = Muon(straight, lr=0.3), Muon(resumed)
    for step in range(2):
        set_gradients(straight, step)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for parameter, weights in zip(resumed, straight, strict=True):
            parameter.copy_(weights)
    for group, optimizer in ((straight, first), (resumed, second)):
        set_gradients(group, 2)
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_under_autocast_match_torch_muon_in_bfloat16(nesterov: bool) -> None:
    shapes = [*SHAPES, (8, 8)]
    actual, reference_weights = parameters(shapes), parameters(shapes)
    how = {"lr": 0.1, "nesterov": nesterov, "weight_decay": 0.1}
    optimizers = (Muon(actual, **how), torch.optim.Muon(reference_weights, adjust_lr_fn="original", **how))
    start = [parameter.detach().clone() for parameter in actual]
    for step in range(4):
        for group, optimizer in zip((actual, reference_weights), optimizers, strict=True):
            set_gradients(group, step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                optimizer.step()
    for mine, other, initial in zip(actual, reference_weights, start, strict=True):
        assert (mine - other).norm() < 0.03 * (other - initial).norm()


def test_muon_computes_in_bfloat16_only_under_autocast() -> None:
    matrix = random(16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = orthogonalize(matrix)
    exact = orthogonalize(matrix)
    assert rounded.dtype == exact.dtype == torch.float32
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert not torch.equal(exact.bfloat16().float(), exact)


def test_several_optimizers_stepped_together_match_separate_steps() -> None:
    settings = [
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": 0.05, "nesterov": False},
        {"lr": 0.01, "momentum": 0.5, "ns_steps": 3},
    ]
    owners = [[random(*shape, seed=10 * k + i) for i, shape in enumerate(SHAPES)] for k in range(len(settings))]
    copies = [[parameter.clone() for parameter in parameters] for parameters in owners]
    members = [Muon(own, **how) for own, how in zip(owners, settings, strict=True)]
    references = [
        torch.optim.Muon(own, **({"weight_decay": 0.0} | how), adjust_lr_fn="original")
        for own, how in zip(copies, settings, strict=True)
    ]
    for turn in range(3):
        for own, copied in zip(owners, copies, strict=True):
            for i, (parameter, other) in enumerate(zip(own, copied, strict=True)):
                parameter.grad = random(*parameter.shape, seed=100 * turn + i)
                other.grad = parameter.grad.clone()
        step_muons(members)
        for reference in references:
            reference.step()
    for own, copied, how in zip(owners, copies, settings, strict=True):
        for parameter, other in zip(own, copied, strict=True):  # torch iterates in bfloat16
            torch.testing.assert_close(parameter, other, atol=0.1 * how["lr"], rtol=0.02)
