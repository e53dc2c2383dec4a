"""Steps on the sphere against NumPy and singular value decompositions, and their invariances."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ngpt.optim import riemannian as geodesic
from ngpt.optim.muon import Muon
from ngpt.optim.riemannian import GeodesicMuon, RiemannianAdamW, tangent, transport, walk

OPTIMIZERS = [GeodesicMuon, RiemannianAdamW]
SHAPES = [(8, 8), (24, 6), (6, 24), (40, 13)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on_sphere(*shape: int, dim: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    x = random(*shape, seed=1000 + seed)  # another seed than that of the gradient, which would be radial
    return torch.nn.Parameter((x / x.norm(dim=dim, keepdim=True)).to(dtype))


def norm_error(weight: torch.Tensor, dim: int) -> float:
    return float((weight.detach().double().norm(dim=dim) - 1).abs().max())


def numpy_tangent(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The tangential part of each row at its point."""
    return np.stack([row - np.dot(row, point) * point for point, row in zip(points, x, strict=True)])


def numpy_turn(point: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """The rotation matrix (D, D) by the angle |velocity| in the plane of `point` and `velocity`."""
    angle = np.linalg.norm(velocity)
    u = velocity / angle
    plane = np.outer(u, point) - np.outer(point, u)
    return np.eye(len(point)) + np.sin(angle) * plane + (1 - np.cos(angle)) * plane @ plane  # Rodrigues' formula


# ---- the sphere --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 12), st.floats(1e-6, 30.0), st.integers(0, 500))
def test_walk_matches_a_rotation_matrix_and_transports_tangents(width: int, angle: float, seed: int) -> None:
    point = on_sphere(1, width, seed=seed, dtype=torch.float64).detach()
    velocity = tangent(point, random(1, width, seed=seed + 1), dim=1)
    velocity *= angle / velocity.norm()
    carried = tangent(point, random(1, width, seed=seed + 2), dim=1)
    end, moved = walk(point, velocity, dim=1), transport(point, velocity, carried, dim=1)
    turn = numpy_turn(point[0].numpy(), velocity[0].numpy())
    np.testing.assert_allclose(end[0].numpy(), turn @ point[0].numpy(), atol=1e-12)
    np.testing.assert_allclose(moved[0].numpy(), turn @ carried[0].numpy(), atol=1e-12)
    assert abs(float(end.norm()) - 1) < 1e-12
    assert abs(float((end * moved).sum())) < 1e-12  # still tangential and of the same length
    assert float(moved.norm()) == pytest.approx(float(carried.norm()), rel=1e-12)


def test_walk_of_length_zero_does_not_move() -> None:
    point, carried = on_sphere(5, 4).detach(), random(5, 4, seed=1, dtype=torch.float32)
    for length in (0.0, 1e-30):
        velocity = torch.full((5, 4), length)
        assert torch.equal(walk(point, velocity, dim=1), point)
        assert torch.equal(transport(point, velocity, carried, dim=1), carried)


def test_walk_along_columns_equals_walk_along_rows_of_the_transpose() -> None:
    point, velocity, carried = (random(6, 4, seed=seed) for seed in range(3))
    along = walk(point.T, velocity.T, dim=1), transport(point.T, velocity.T, carried.T, dim=1)
    torch.testing.assert_close(walk(point, velocity, dim=0), along[0].T, atol=1e-13, rtol=0)
    torch.testing.assert_close(transport(point, velocity, carried, dim=0), along[1].T, atol=1e-13, rtol=0)
    torch.testing.assert_close(tangent(point, carried, dim=0), tangent(point.T, carried.T, dim=1).T)


# ---- both optimizers ---------------------------------------------------------------------------


def build(kind: Any, weights: list[torch.nn.Parameter], *, dim: int = 1, **options: Any) -> torch.optim.Optimizer:
    return kind([{"params": weights, "dim": dim}], **options)


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(
    st.sampled_from(OPTIMIZERS), st.floats(-4, 1).map(lambda x: 10.0**x), st.sampled_from([0, 1]), st.integers(0, 99)
)
def test_vectors_keep_unit_length_for_1000_steps_of_any_size(kind: Any, lr: float, dim: int, seed: int) -> None:
    weight = on_sphere(12, 8, dim=dim, seed=seed)
    optimizer = build(kind, [weight], dim=dim, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        weight.grad = torch.randn(12, 8, generator=generator) + 0.5 * weight.detach()
        optimizer.step()
    assert norm_error(weight, dim) < 1e-6


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_steps_along_columns_equal_steps_along_rows(kind: Any, dim: int) -> None:
    weight, other = on_sphere(9, 5, dim=dim), torch.nn.Parameter(on_sphere(9, 5, dim=dim).detach().T.contiguous())
    optimizers = build(kind, [weight], dim=dim, lr=0.3), build(kind, [other], dim=1 - dim, lr=0.3)
    for step in range(5):
        weight.grad = random(9, 5, seed=step, dtype=torch.float32)
        other.grad = weight.grad.T.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(weight, other.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_scaling_the_gradients_does_not_change_the_step(kind: Any, scale: float) -> None:
    plain, scaled = on_sphere(6, 4), on_sphere(6, 4)
    optimizers = [build(kind, [weight], lr=0.2) for weight in (plain, scaled)]
    for step in range(4):
        for weight, factor, optimizer in zip((plain, scaled), (1.0, scale), optimizers, strict=True):
            weight.grad = factor * random(6, 4, seed=step, dtype=torch.float32)
            optimizer.step()
    torch.testing.assert_close(plain, scaled, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_doubling_a_small_learning_rate_doubles_the_distance(kind: Any) -> None:
    moves = []
    for lr in (1e-4, 2e-4):
        weight = on_sphere(6, 4)
        before = weight.detach().double()
        weight.grad = random(6, 4, seed=1, dtype=torch.float32)
        build(kind, [weight], lr=lr).step()
        moves.append(weight.detach().double() - before)
    assert float((moves[1] - 2 * moves[0]).norm() / moves[1].norm()) < 2e-3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_updated_together_move_as_if_updated_separately(kind: Any) -> None:
    shapes = [(6, 9), (6, 9), (4, 4), (6, 9)]
    together, alone = [[on_sphere(*shape, seed=i) for i, shape in enumerate(shapes)] for _ in range(2)]
    optimizers = [build(kind, together, lr=0.2), *(build(kind, [weight], lr=0.2) for weight in alone)]
    for step in range(3):
        for i, pair in enumerate(zip(together, alone, strict=True)):
            for weight in pair:
                weight.grad = random(*weight.shape, seed=10 * step + i, dtype=torch.float32)
        together[1].grad = alone[1].grad = (
            None if step == 0 else together[1].grad
        )  # gets its first gradient later than the others
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_with_no_gradient_or_a_zero_gradient_does_not_move(kind: Any) -> None:
    weights = [on_sphere(4, 3, seed=seed) for seed in range(2)]
    before = [weight.detach().clone() for weight in weights]
    weights[1].grad = torch.zeros(4, 3)
    build(kind, weights, lr=1.0).step()
    assert torch.equal(weights[0], before[0])
    torch.testing.assert_close(weights[1].detach(), before[1], atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_optimizer_continues_bit_for_bit(kind: Any) -> None:
    straight, resumed = ([on_sphere(6, 4), on_sphere(6, 4, seed=1), on_sphere(3, 4)] for _ in range(2))
    first, second = build(kind, straight, lr=0.3), build(kind, resumed, lr=0.1)

    def step(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        for i, weight in enumerate(weights):
            weight.grad = random(*weight.shape, seed=10 * number + i, dtype=torch.float32)
        optimizer.step()

    for number in range(3):
        step(straight, first, number)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for weight, value in zip(resumed, straight, strict=True):
            weight.copy_(value)
    for number in range(3, 6):
        step(straight, first, number)
        step(resumed, second, number)
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("kind", [*OPTIMIZERS, Muon])
def test_step_never_copies_a_value_from_the_device(kind: Any) -> None:
    with FakeTensorMode():  # meta tensors have no values, so reading one is an error
        weights = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(6, 4))]
        optimizer = build(kind, weights)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn(6, 4)
            optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_invalid_use_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"groups of matrices with dim 0 or 1, got dim 1, shapes \[\(5,\)\]"):
        build(kind, [torch.nn.Parameter(torch.ones(5))])
    with pytest.raises(ValueError, match="got dim None"):
        kind([on_sphere(2, 2)])
    with pytest.raises(ValueError, match="closure"):
        build(kind, [on_sphere(2, 2)]).step(lambda: 0.0)


# ---- geodesic Muon -----------------------------------------------------------------------------


def newton_schulz_by_svd(matrix: np.ndarray, steps: int) -> np.ndarray:
    """Newton-Schulz, computed exactly: an odd polynomial of the singular values, with the same singular vectors."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


def numpy_geodesic_muon(
    points: np.ndarray, gradients: list[np.ndarray], *, lr: float, momentum: float, nesterov: bool, steps: int
) -> np.ndarray:
    """The formulas of the docstring in float64, one row at a time, with explicit rotation matrices."""
    running = np.zeros_like(points)
    for gradient in gradients:
        running = momentum * running + (1 - momentum) * gradient
        d = (1 - momentum) * gradient + momentum * running if nesterov else running
        t = numpy_tangent(points, newton_schulz_by_svd(d, steps)) * -lr * np.sqrt(max(1, len(points) / points.shape[1]))
        points = np.stack([numpy_turn(point, velocity) @ point for point, velocity in zip(points, t, strict=True)])
    return points


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("lr", [0.02, 1.0])
def test_geodesic_muon_steps_match_explicit_rotation_matrices(
    shape: tuple[int, int], nesterov: bool, lr: float
) -> None:
    weight = on_sphere(*shape)
    gradients = [random(*shape, seed=step) for step in range(4)]
    how = {"lr": lr, "momentum": 0.8, "nesterov": nesterov}
    expected = numpy_geodesic_muon(weight.detach().double().numpy(), [g.numpy() for g in gradients], steps=5, **how)
    optimizer = build(GeodesicMuon, [weight], ns_steps=5, **how)
    for gradient in gradients:
        weight.grad = gradient.float()
        optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=2e-4 if lr == 1.0 else 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_direction_is_close_to_the_exact_orthogonal_factor(shape: tuple[int, int]) -> None:
    weight, gradient = on_sphere(*shape), random(*shape, seed=3)
    before = weight.detach().double().numpy()
    u, _, vt = np.linalg.svd(gradient.numpy(), full_matrices=False)
    weight.grad = gradient.float()
    build(GeodesicMuon, [weight], lr=1e-3, ns_steps=12).step()
    move, exact = weight.detach().double().numpy() - before, -numpy_tangent(before, u @ vt)
    cosine = (move * exact).sum() / np.linalg.norm(move) / np.linalg.norm(exact)
    assert cosine > 0.97


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(60, 20), (40, 40), (20, 60)])
def test_lr_approximates_the_rotation_angle(shape: tuple[int, int], dim: int) -> None:
    weight = on_sphere(*shape, dim=dim)
    before = weight.detach().clone()
    weight.grad = random(*shape, seed=1, dtype=torch.float32)
    build(GeodesicMuon, [weight], dim=dim, lr=0.1).step()
    angles = (weight.detach() * before).sum(dim).clamp(-1, 1).acos()
    assert 0.07 < float(angles.square().mean().sqrt()) < 0.12


def test_small_step_matches_step_and_projection_to_second_order() -> None:
    errors = []
    for lr in (0.1, 0.01):
        walked, projected = on_sphere(12, 8), on_sphere(12, 8)
        for weight in (walked, projected):
            weight.grad = random(12, 8, seed=1, dtype=torch.float32)
        build(GeodesicMuon, [walked], lr=lr).step()
        Muon([projected], lr=lr).step()
        landed = projected.detach() / projected.detach().norm(dim=1, keepdim=True)
        errors.append(float((walked.detach() - landed).norm()))
    assert (
        errors[0] < 0.1**2 * 12 and errors[1] < 0.02 * errors[0]
    )  # a ten times smaller step gives a hundred times smaller difference


def test_geodesic_muon_finds_the_nearest_orthonormal_vectors() -> None:
    target, _ = torch.linalg.qr(random(8, 5, seed=2))
    weight = on_sphere(5, 8)
    optimizer = build(GeodesicMuon, [weight], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        weight.grad = -target.T.float()  # of the loss -<weight, target>
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), target.T, atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 500), st.floats(0.01, 3.0))
def test_geodesic_muon_is_equivariant_under_rotation(seed: int, lr: float) -> None:
    q, _ = torch.linalg.qr(random(6, 6, seed=seed))
    plain = on_sphere(10, 6, dtype=torch.float64)
    turned = torch.nn.Parameter(plain.detach() @ q)
    optimizers = [build(GeodesicMuon, [weight], lr=lr) for weight in (plain, turned)]
    for step in range(3):
        plain.grad = random(10, 6, seed=seed + step)
        turned.grad = plain.grad @ q
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(plain @ q, turned, atol=1e-3, rtol=0)


# ---- Riemannian AdamW --------------------------------------------------------------------------


def numpy_riemannian_adamw(
    points: np.ndarray, gradients: list[np.ndarray], *, lr: float, betas: tuple[float, float], eps: float
) -> np.ndarray:
    """The formulas of the docstring in float64, one row at a time, with explicit rotation matrices."""
    mean, square = np.zeros_like(points), np.zeros_like(points)
    for step, gradient in enumerate(gradients, start=1):
        g = numpy_tangent(points, gradient)
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g**2
        quotient = mean / (1 - betas[0] ** step) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
        turns = [numpy_turn(p, v) for p, v in zip(points, -lr * numpy_tangent(points, quotient), strict=True)]
        points = np.stack([turn @ point for turn, point in zip(turns, points, strict=True)])
        mean = np.stack([turn @ row for turn, row in zip(turns, mean, strict=True)])
    return points


@pytest.mark.parametrize("lr", [1e-3, 0.3])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_riemannian_adamw_steps_match_explicit_rotation_matrices(lr: float, eps: float) -> None:
    weight = on_sphere(7, 5)
    gradients = [random(7, 5, seed=step) for step in range(6)]
    how = {"lr": lr, "betas": (0.8, 0.9), "eps": eps}
    expected = numpy_riemannian_adamw(weight.detach().double().numpy(), [g.numpy() for g in gradients], **how)
    optimizer = build(RiemannianAdamW, [weight], **how)
    for gradient in gradients:
        weight.grad = gradient.float()
        optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=2e-5)


def test_small_steps_match_torch_adamw_and_projection_where_the_sphere_is_nearly_flat() -> None:
    """Gradients are tangential at the start of the walk, which stays close to it."""
    differences = []
    for lr in (1e-3, 1e-4):
        walked, projected = on_sphere(6, 8), on_sphere(6, 8)
        start = walked.detach().clone()
        reference = torch.optim.AdamW([projected], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        optimizer = build(RiemannianAdamW, [walked], lr=lr)
        for step in range(5):
            projected.grad = tangent(start, random(6, 8, seed=step, dtype=torch.float32), dim=1)
            walked.grad = projected.grad.clone()
            optimizer.step()
            reference.step()
            with torch.no_grad():
                projected.div_(projected.norm(dim=1, keepdim=True))
        moved = float((walked.detach() - start).norm())
        differences.append(float((walked.detach() - projected.detach()).norm()) / moved)
    assert differences[0] < 0.02 and differences[1] < 0.15 * differences[0] + 1e-4


def test_riemannian_adamw_rotation_angle_is_lr_times_the_root_of_the_dimension() -> None:
    weight = on_sphere(50, 400)
    before = weight.detach().clone()
    weight.grad = random(50, 400, seed=1, dtype=torch.float32)
    build(RiemannianAdamW, [weight], lr=1e-3).step()
    angles = (weight.detach() * before).sum(1).double().clamp(-1, 1).acos()
    np.testing.assert_allclose(angles.numpy(), 1e-3 * 400**0.5, rtol=0.02)


def test_riemannian_adamw_ignores_the_radial_part_of_a_gradient() -> None:
    ends = []
    for radial in (0.0, 7.0):
        weight = on_sphere(6, 4, dtype=torch.float64)
        optimizer = build(RiemannianAdamW, [weight], lr=0.1)
        for step in range(3):
            weight.grad = random(6, 4, seed=step) + radial * weight.detach()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)  # l2_normalize works in float32


@pytest.mark.parametrize("dim", [0, 1])
def test_minimizing_the_rayleigh_quotient_finds_the_first_eigenvector(dim: int) -> None:
    factor = random(6, 6, seed=3)
    matrix = factor @ factor.T
    leading = np.linalg.eigh(matrix.numpy())[1][:, -1]
    weight = on_sphere(6, 6, dim=dim)
    optimizer = build(RiemannianAdamW, [weight], dim=dim, lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        rows = weight if dim == 1 else weight.T
        optimizer.zero_grad()
        (-(rows @ matrix.float() * rows).sum()).backward()
        optimizer.step()
    vectors = weight.detach().double().numpy()
    alignment = np.abs((vectors if dim == 1 else vectors.T) @ leading)
    np.testing.assert_allclose(alignment, 1.0, atol=1e-3)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_cache_sized_blocks_give_the_same_steps(dim: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for block_bytes in (1, 130, 2**18):  # one vector at a time, some of them, all
        monkeypatch.setattr(geodesic, "BLOCK_BYTES", block_bytes)
        weights = [on_sphere(13, 7, dim=dim, seed=seed) for seed in range(count)]
        optimizer = build(RiemannianAdamW, weights, dim=dim, lr=0.2)
        for step in range(3):
            for i, weight in enumerate(weights):
                weight.grad = random(13, 7, seed=10 * step + i, dtype=torch.float32)
            optimizer.step()
        moments = [optimizer.state[weight][name] for weight in weights for name in ("mean", "square")]
        ends.append([tensor.detach() for tensor in (*weights, *moments)])
    for other in ends[1:]:
        for one, two in zip(ends[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_step_does_not_change_the_gradients() -> None:
    for kind in OPTIMIZERS:
        weight = on_sphere(6, 4)
        weight.grad = random(6, 4, dtype=torch.float32)
        build(kind, [weight]).step()
        assert torch.equal(weight.grad, random(6, 4, dtype=torch.float32)), kind
