"""Optimizers that move unit vectors along great circles: exact steps on the sphere instead of a step and a projection.

Each row of a weight of `GPT.sphere_weights` (or column, depending on `dim`) is a point on the unit sphere of the
model's dimension D. A step rotates each point by its own angle, so there is nothing to project. Weight decay would act
along the radius, which a rotation does not change; neither optimizer has it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ngpt.model.norm import l2_normalize
from ngpt.optim.batching import Group, group_by, stack, trained, write_back
from ngpt.optim.muon import orthogonalize

BLOCK_BYTES = 2**18  # of each tensor that are updated at once on a CPU


def tangent(points: Tensor, x: Tensor, *, dim: int) -> Tensor:
    """The part of `x` at right angles to the unit vectors `points` (along `dim`): x - <x, p> p, same shape."""
    return torch.addcmul(x, points, (points * x).sum(dim, keepdim=True), value=-1)


def walk(points: Tensor, velocity: Tensor, *, dim: int) -> Tensor:
    """The end of great circles from unit vectors `points` (along `dim`) along the tangents `velocity`, same shape.

    p cos(a) + u sin(a) with the angle a = |velocity| and u = velocity / a: the exponential map of the sphere (Absil,
    Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, section 5.4).
    """
    direction, angle = _polar(velocity, dim)
    return (points * angle.cos()).addcmul_(direction, angle.sin())


def transport(points: Tensor, velocity: Tensor, carried: Tensor, *, dim: int) -> Tensor:
    """Parallel transport of the tangents `carried` along the `walk` from `points` by `velocity` (same, section 8.1).

    The part along the walk turns with it and the rest stays, so lengths and angles between tangents are kept.
    """
    direction, angle = _polar(velocity, dim)
    along = (carried * direction).sum(dim, keepdim=True)
    return carried + along * (direction * (angle.cos() - 1) - points * angle.sin())


def _polar(velocity: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.linalg.vector_norm(velocity, dim=dim, keepdim=True)
    return velocity / angle.clamp_min(1e-12), angle  # the direction of a zero velocity does not matter


class GeodesicMuon(torch.optim.Optimizer):
    """Muon on the sphere: orthogonalized momentum, applied as an exact rotation of each unit vector.

    A source report names it ("exact manifold updates using rotation matrices") without a definition. Muown (arXiv
    2605.10797), AngularMuown (2606.23637) and Mano (2601.23000) are related. One step:

        m = momentum * m + (1 - momentum) * gradient
        d = (1 - momentum) * gradient + momentum * m if nesterov, else m
        t = tangent part of orthogonalize(d)         a = lr * sqrt(max(1, N / D)) * |t|, for each vector
        w = w cos(a) - t / |t| sin(a)

    N is the number of unit vectors of the weight, D their length. The N x D matrix U V^T has vectors of root mean
    square length sqrt(min(1, D / N)), so `lr` is about the root mean square angle in radians of a turn, whatever the
    shape, less what the tangent part drops. (Muon uses rows / columns of the stored weight instead of N / D.)

    As in Muon, the momentum is ambient; only the orthogonalized update is made tangent. In 400 steps of a model with 2
    layers of width 64, at 3 rates with 2 seeds, tangent momentum was worse in all 6 pairs, by 0.13 nats on average. A
    likely reason: gradients are nearly of low rank, the multiples of w that the tangent part subtracts have full rank,
    and orthogonalizing raises them to the size of the rest. The cost: a step need not descend a smooth loss. A square W
    with orthonormal rows and the gradient W A, A positive definite, does not move; nor under Muon with projection.

    Each group of `params` has the key `dim`, along which its weights (2-D, on the sphere) have length 1. The other
    settings are those of `Muon`.
    """

    def __init__(
        self,
        params: Iterable[Group],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps})
        _check_groups(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Weights of equal shape are one batch."""
        if closure is not None:
            raise ValueError("GeodesicMuon does not take a closure")
        for group, weights, states in _batches(self, "momentum"):
            axis, momentum = group["dim"] - 2, group["momentum"]  # from the end, since the batch comes first
            batch, running = stack(weights), stack([state["momentum"] for state in states])
            points = l2_normalize(batch, axis)  # else rounding errors add up to 7e-5 in 10 000 steps
            gradient = stack([weight.grad for weight in weights])
            running.lerp_(gradient, 1 - momentum)
            ahead = gradient.lerp(running, momentum) if group["nesterov"] else running
            update = tangent(points, orthogonalize(ahead, steps=group["ns_steps"]), dim=axis)
            length, count = points.shape[axis], points.shape[-3 - axis]
            size = group["lr"] * max(1.0, count / length) ** 0.5
            write_back(weights, batch.copy_(walk(points, -size * update, dim=axis)))
            write_back([state["momentum"] for state in states], running)


class RiemannianAdamW(torch.optim.Optimizer):
    """AdamW on the sphere, after Becigneul and Ganea (arXiv 1810.00760).

        g = tangent part of the gradient             m = beta1 * m + (1 - beta1) * g
                                                     v = beta2 * v + (1 - beta2) * g^2, entry by entry
        t = tangent part of m^ / (sqrt(v^) + eps)    a = lr * |t|, for each vector; ^ is Adam's bias correction
        w = w cos(a) - t / |t| sin(a)                m = parallel transport of m along this turn

    An entry of t is about 1 if gradients agree from step to step, as in AdamW, so `lr` means the same: a vector turns
    by up to about lr * sqrt(D) radians, and a small step along tangent gradients is an AdamW step with projection.

    Unlike in the paper, the second moment is per entry and stays in place, while points and m move. The paper has one
    per vector, because a sphere has no preferred coordinates and entries cannot be transported. But the coordinates of
    the model have a meaning, since alpha acts on each: in 400 steps of a model with 2 layers of width 64, at 4 rates
    with 2 seeds, the loss was lower per entry in all 8 pairs, by 0.07 nats on average.

    Each group of `params` has the key `dim`, as for `GeodesicMuon`; `betas` and `eps` are Adam's.
    """

    def __init__(
        self, params: Iterable[Group], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        _check_groups(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Weights of equal shape are one batch."""
        if closure is not None:
            raise ValueError("RiemannianAdamW does not take a closure")
        for group, weights, states in _batches(self, "mean", "square"):
            means, squares = ([state[name] for state in states] for name in ("mean", "square"))
            whole = [stack(tensors) for tensors in (weights, [w.grad for w in weights], means, squares)]
            for w, gradient, mean, square in _in_cache(whole, group["dim"]):
                _turn(w, gradient, mean, square, group, steps=states[0]["step"])
            for tensors, batch in zip((weights, means, squares), (whole[0], *whole[2:]), strict=True):
                write_back(tensors, batch)


def _turn(w: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, group: Group, *, steps: int) -> None:
    """One update of RiemannianAdamW; weights and moments change in place."""
    axis, (beta1, beta2) = group["dim"] - 2, group["betas"]
    points = l2_normalize(w, axis)
    gradient = tangent(points, gradient, dim=axis)
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square_(), 1 - beta2)
    root = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    velocity = tangent(points, mean / root, dim=axis).mul_(-group["lr"] / (1 - beta1**steps))
    w.copy_(walk(points, velocity, dim=axis))
    mean.copy_(transport(points, velocity, mean, dim=axis))


def _in_cache(tensors: Sequence[Tensor], dim: int) -> Iterator[tuple[Tensor, ...]]:
    """The same vectors (along `dim`) of all tensors (n, rows, columns), as many at a time as fit a CPU's cache."""
    first, other = tensors[0], -1 - dim  # vectors are counted along the other dimension
    count = first.shape[other]
    if first.device.type == "cpu":
        count = max(1, BLOCK_BYTES * count // max(1, first.nbytes))
    yield from zip(*(tensor.split(count, other) for tensor in tensors), strict=True)


def _batches(optimizer: torch.optim.Optimizer, *moments: str) -> Iterator[tuple[Group, list[Tensor], list[Group]]]:
    """Group, weights and states that can be updated as one batch: of one group, one shape and one step count.

    New moments are zero. `step` is a number on the host, so reading it does not wait for the device.
    """
    for group in optimizer.param_groups:
        for weight in trained(group):
            if not optimizer.state[weight]:
                optimizer.state[weight].update({"step": 0} | {name: torch.zeros_like(weight) for name in moments})
        for weights in group_by(trained(group), lambda w: (*w.shape, optimizer.state[w]["step"])).values():
            states = [optimizer.state[weight] for weight in weights]
            for state in states:
                state["step"] += 1
            yield group, weights, states


def _check_groups(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        shapes = [tuple(weight.shape) for weight in group["params"] if weight.ndim != 2]
        if shapes or group.get("dim") not in (0, 1):
            text = f"takes groups of matrices with dim 0 or 1, got dim {group.get('dim')}, shapes {shapes}"
            raise ValueError(f"{type(optimizer).__name__} {text}")
