"""Optimizers that move unit vectors along great circles, so that no projection onto the sphere is needed.

Each row (or column, depending on `dim`) of a weight in `GPT.sphere_weights` is a point on a unit sphere, which a step
rotates by an angle of its own. Weight decay acts along the radius, so it has no effect and there is none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ngpt.model.norm import l2_normalize
from ngpt.optim.batching import Group, group_by, layout, stack, trained, write_back
from ngpt.optim.muon import orthogonalize

BLOCK_BYTES = 2**18  # per tensor, for the block that a CPU updates at a time


def tangent(points: Tensor, x: Tensor, *, dim: int) -> Tensor:
    """Projects `x` onto the tangent spaces at the unit vectors `points` (along `dim`): x - <x, p> p, same shape."""
    return torch.addcmul(x, points, (points * x).sum(dim, keepdim=True), value=-1)


def walk(points: Tensor, velocity: Tensor, *, dim: int) -> Tensor:
    """Exponential map of the sphere: follows great circles from unit vectors `points` along tangents `velocity`.

    Returns p cos(a) + u sin(a), of the same shape, with angle a = |velocity| along `dim` and u = velocity / a (Absil,
    Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, section 5.4).
    """
    direction, angle = _polar(velocity, dim)
    return (points * angle.cos()).addcmul_(direction, angle.sin())


def transport(points: Tensor, velocity: Tensor, carried: Tensor, *, dim: int) -> Tensor:
    """Parallel-transports the tangents `carried` along `walk(points, velocity)` (same source, section 8.1).

    The component along the great circle rotates with it and the rest is unchanged, which preserves lengths and angles.
    """
    direction, angle = _polar(velocity, dim)
    along = (carried * direction).sum(dim, keepdim=True)
    return carried + along * (direction * (angle.cos() - 1) - points * angle.sin())


def _polar(velocity: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.linalg.vector_norm(velocity, dim=dim, keepdim=True)
    return velocity / angle.clamp_min(1e-12), angle  # the direction is irrelevant for zero velocity


class GeodesicMuon(torch.optim.Optimizer):
    """Muon on the sphere: orthogonalized momentum, applied as an exact rotation of each unit vector.

    A source report mentions it ("exact manifold updates using rotation matrices") without defining it. Muown (arXiv
    2605.10797), AngularMuown (2606.23637) and Mano (2601.23000) are related. One step:

        m = momentum * m + (1 - momentum) * gradient
        d = (1 - momentum) * gradient + momentum * m if nesterov, else m
        t = tangent component of orthogonalize(d)    a = lr * sqrt(max(1, N / D)) * |t|, for each vector
        w = w cos(a) - t / |t| sin(a)

    N is the number of unit vectors of the weight, D their dimension. The vectors of the N x D matrix U V^T have root
    mean square length sqrt(min(1, D / N)), so for any shape `lr` is about the root mean square rotation angle in
    radians, less what the tangent projection removes. (Muon uses rows / columns of the stored weight instead of N / D.)

    As in Muon, the momentum is kept in the ambient space; only the orthogonalized update is projected onto the tangent
    space, which gave a lower loss than tangent momentum (docs/benchmarks.md). So a step is not always a descent
    direction: a square W with orthonormal rows and gradient W A, A positive definite, does not move.

    Each parameter group needs the key `dim`, the dimension along which its 2-D weights have unit length. The other
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
        self.orthogonalize: Callable[..., Tensor] = orthogonalize
        _check_groups(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the weights; weights of equal shape are one batch."""
        if closure is not None:
            raise ValueError("GeodesicMuon does not take a closure")
        for group, weights, states in _batches(self, "momentum"):
            axis = group["dim"] - 2  # counted from the end, since the batch dimension comes first
            batch, running = stack(weights), stack([state["momentum"] for state in states])
            points = l2_normalize(batch, axis)  # without this, rounding errors reach 7e-5 in 10 000 steps
            gradient = stack([weight.grad for weight in weights])
            running.lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(running, group["momentum"]) if group["nesterov"] else running
            matrix = layout(weights[0])
            update = self.orthogonalize(direction, steps=group["ns_steps"], split=matrix.split)
            update = tangent(points, update, dim=axis)
            length, count = matrix.shape[axis], matrix.shape[-3 - axis]
            step_size = group["lr"] * max(1.0, count / length) ** 0.5
            write_back(weights, batch.copy_(walk(points, -step_size * update, dim=axis)))
            write_back([state["momentum"] for state in states], running)


class RiemannianAdamW(torch.optim.Optimizer):
    """AdamW on the sphere, after Becigneul and Ganea (arXiv 1810.00760).

        g = tangent component of the gradient        m = beta1 * m + (1 - beta1) * g
                                                     v = beta2 * v + (1 - beta2) * g^2, entry by entry
        t = tangent part of m^ / (sqrt(v^) + eps)    a = lr * |t|, for each vector; ^ is Adam's bias correction
        w = w cos(a) - t / |t| sin(a)                m = parallel transport of m along this rotation

    As in AdamW, an entry of t is about 1 if successive gradients agree, so `lr` has the same meaning: a vector rotates
    by up to about lr * sqrt(D) radians, and a small step along tangent gradients equals an AdamW step with projection.

    Unlike in the paper, the second moment is per entry and is not transported. The paper keeps one per vector, since a
    sphere has no preferred coordinates; those of nGPT have a meaning, since each has its own alpha, and one moment per
    entry gave a lower loss (docs/benchmarks.md).

    Each parameter group needs the key `dim`, as for `GeodesicMuon`; `betas` and `eps` are Adam's.
    """

    def __init__(
        self, params: Iterable[Group], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        _check_groups(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the weights; weights of equal shape are one batch."""
        if closure is not None:
            raise ValueError("RiemannianAdamW does not take a closure")
        for group, weights, states in _batches(self, "mean", "square"):
            means, squares = ([state[name] for state in states] for name in ("mean", "square"))
            stacked = [stack(tensors) for tensors in (weights, [w.grad for w in weights], means, squares)]
            for w, gradient, mean, square in _in_cache(stacked, group["dim"]):
                _update(w, gradient, mean, square, group, steps=states[0]["step"])
            for tensors, batch in zip((weights, means, squares), (stacked[0], *stacked[2:]), strict=True):
                write_back(tensors, batch)


def _update(w: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, group: Group, *, steps: int) -> None:
    """Applies one RiemannianAdamW update to weights and moments in place."""
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
    """Yields matching blocks of the vectors (along `dim`) of all tensors (n, rows, columns), sized for CPU caches."""
    first, other = tensors[0], -1 - dim  # the dimension that counts the vectors
    count = first.shape[other]
    if first.device.type == "cpu":
        count = max(1, BLOCK_BYTES * count // max(1, first.nbytes))
    yield from zip(*(tensor.split(count, other) for tensor in tensors), strict=True)


def _batches(optimizer: torch.optim.Optimizer, *moments: str) -> Iterator[tuple[Group, list[Tensor], list[Group]]]:
    """Yields (group, weights, states) with weights of one group, shape and step count; adds missing moments."""
    for group in optimizer.param_groups:
        for weight in trained(group):
            if not optimizer.state[weight]:
                optimizer.state[weight].update({"step": 0} | {name: torch.zeros_like(weight) for name in moments})
        for weights in group_by(trained(group), lambda w: (layout(w), optimizer.state[w]["step"])).values():
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
