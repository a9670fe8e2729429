"""The scan in plain torch operations: works everywhere, linear cost, memory that does not grow with N.

Letters: B batch, H W rows and columns, L = H W, K = 4 directions, D channels, N states, T steps in a chunk.

A loop that computes decay, input and readout pixel by pixel is bound by Python and by memory. Here only
the recurrence itself, one multiply-add a step, is such a loop; everything else is done for a chunk of T
steps at once, small enough to stay in the cache. The forward pass keeps the state at the start of every
chunk; the backward pass computes the chunk's states again from it and runs the adjoint recurrence

    g_l = C_l dy_l + a_{l+1} g_{l+1},   a_l = exp(dt_l A)

from the end to the beginning. All gradients are sums over g (with w_l = g_l a_l h_{l-1}):

    dC_l = sum_D dy_l h_l    dB_l = sum_D dt_l x_l g_l    dx_l = dt_l sum_N g_l B_l + D dy_l
    ddt_l = x_l sum_N g_l B_l + sum_N w_l A               dA = sum_L w_l dt_l

Two choices make it fast: a state has its channels innermost ([N, D], long vectors for every operation), and
powers are taken of two (exp2 with A log2 e), which torch computes about three times faster than exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.model.scan_reference import paths

CACHED = 1 << 18  # numbers in a chunk's working array: a chunk is as many steps as fit ...
STEPS = (16, 64)  # ... within these limits; the states that are kept are 1/T of all states
STEP = 1 << 15  # numbers in one step above which samples and directions are taken one after the other


class Walk:
    """The order in which the directions visit the pixels of a [B, H, W, ...] tensor, and the way back."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        """For images of height x width pixels."""
        path = paths(height, width, device)  # [K, L]
        directions = len(path)
        own = path * directions + torch.arange(directions, device=device)[:, None]
        self.height, self.width, self.directions = height, width, directions
        self.shared = path.t().reshape(-1)  # pixel at each step and direction [L K]
        self.own = own.t().reshape(-1)  # the same for a tensor that has the directions itself [L K]
        self.inverse = torch.empty_like(self.own)
        self.inverse[self.own] = torch.arange(len(self.own), device=device)

    def forth(self, x: Tensor) -> Tensor:
        """What the directions meet, step by step: [B, H, W, F] or [B, H, W, K, F] -> [B, L, K, F]."""
        index = self.shared if x.dim() == 4 else self.own
        flat = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, L or L K, F]
        return flat.index_select(1, index).unflatten(1, (-1, self.directions))  # type: ignore[no-untyped-call,no-any-return]

    def back(self, walked: Tensor) -> Tensor:
        """Inverse of `forth` for a tensor with directions: [B, L, K, F] -> [B, H, W, K, F]."""
        pixels = walked.flatten(1, 2).index_select(1, self.inverse)  # [B, L K, F]
        return pixels.view(len(walked), self.height, self.width, self.directions, walked.shape[-1])


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` in chunks; its own backward pass, once differentiable."""
    result: Tensor = _Scan.apply(x, delta, A, B, C, D, delta_bias)  # type: ignore[no-untyped-call]
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        x, delta, A, B, C, D, delta_bias = tensors
        ctx.walk = walk = Walk(x.shape[1], x.shape[2], x.device)
        u, Bw, Cw = walk.forth(x), walk.forth(B), walk.forth(C)  # [B, L, K, D], [B, L, K, N] twice
        step = F.softplus(walk.forth(delta).add_(delta_bias))  # [B, L, K, D]
        y = torch.empty_like(u)
        kept = [_forward(u[part], step[part], A[part[2]], Bw[part], Cw[part], y[part]) for part in _parts(u, A)]
        ctx.save_for_backward(*tensors, *kept)
        y = walk.back(y.addcmul_(u, D))  # [B, H, W, K, D]
        return y.sum(3)  # [B, H, W, D]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, D, delta_bias, *kept = ctx.saved_tensors
        walk: Walk = ctx.walk
        u, Bw, Cw, dy = walk.forth(x), walk.forth(B), walk.forth(C), walk.forth(dy)
        biased = walk.forth(delta).add_(delta_bias)  # [B, L, K, D]
        step = F.softplus(biased)
        du, dstep, dB, dC = (torch.empty_like(tensor) for tensor in (u, u, Bw, Cw))
        dA = torch.zeros_like(A)
        for part, states in zip(_parts(u, A), kept, strict=True):
            inputs = (u[part], step[part], A[part[2]], Bw[part], Cw[part], dy[part])
            dA[part[2]] += _backward(inputs, states, (du[part], dstep[part], dB[part], dC[part]))
        dD = torch.linalg.vecdot(dy, u, dim=1).sum(0)  # [K, D]
        ddelta = dstep.mul_(biased.sigmoid_())  # softplus' = sigmoid
        dx = walk.back(du.addcmul_(dy, D)).sum(3)  # [B, H, W, D]
        return dx, walk.back(ddelta), dA, walk.back(dB), walk.back(dC), dD, ddelta.sum((0, 1))


def _parts(u: Tensor, A: Tensor) -> list[tuple[slice, slice, slice]]:
    """Indices into [B, L, K, ...]: whole samples, or single directions, with at most `STEP` numbers in one step."""
    samples = max(1, STEP // A.numel())
    directions = max(1, min(len(A), STEP // A[0].numel()))
    return [
        (slice(sample, sample + samples), slice(None), slice(k, k + directions))
        for sample in range(0, len(u), samples)
        for k in range(0, len(A), directions)
    ]


def _chunk(length: int, step: int) -> int:
    """Steps in a chunk, T, for a sequence of `length` steps with `step` numbers each."""
    return min(length, max(STEPS[0], min(STEPS[1], CACHED // step)))


def _split(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors [B, L, ...] chunk by chunk, each [T, B, ...]."""
    return zip(*(torch.split(tensor.transpose(0, 1), chunk) for tensor in tensors), strict=True)


def _forward(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, y: Tensor) -> Tensor:
    """Fill y [B, L, K, D] with C . h; return the states between the chunks [chunks + 1, B, K, N, D]."""
    power = A.transpose(1, 2).mul(math.log2(math.e)).contiguous()  # [K, N, D]
    shape = (len(u), *power.shape)
    chunk = _chunk(u.shape[1], math.prod(shape))
    kept = u.new_zeros(1 + -(-u.shape[1] // chunk), *shape)
    decay, states = (u.new_empty(chunk, *shape) for _ in range(2))  # [T, B, K, N, D]
    rows = list(zip(decay.unbind(0), states.unbind(0), strict=True))
    pieces = _split(chunk, step[..., None, :], (step * u)[..., None, :], B[..., None], C[..., None], y)
    for before, after, piece in zip(kept[:-1], kept[1:], pieces, strict=True):
        step_c, drive_c, B_c, C_c, y_c = piece
        steps = len(y_c)
        torch.mul(step_c, power, out=decay[:steps]).exp2_()
        h = torch.mul(drive_c, B_c, out=states[:steps])
        state = before
        for decay_l, state_l in rows[:steps]:
            state = state_l.addcmul_(decay_l, state)
        after.copy_(state)
        torch.sum(h.mul_(C_c), 3, out=y_c)
    return kept


def _backward(inputs: tuple[Tensor, ...], kept: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    """Fill the gradients du, dstep [B, L, K, D], dB, dC [B, L, K, N] and return dA [K, D, N]."""
    u, step, A, B, C, dy = inputs
    A = A.transpose(1, 2).contiguous()  # [K, N, D]
    chunk = _chunk(u.shape[1], kept[0].numel())
    buffers = _Buffers(chunk, kept)
    power = A * math.log2(math.e)
    carry, dA = torch.zeros_like(kept[0]), torch.zeros_like(A)
    pieces = list(_split(chunk, u, step, B, C, dy, step * u, *grads))
    for before, piece in zip(reversed(kept[:-1]), reversed(pieces), strict=True):
        u_c, step_c, B_c, C_c, dy_c, drive_c, du_c, dstep_c, dB_c, dC_c = piece  # [T, B, K, D or N]
        a, h, g, w = buffers.cut(len(u_c))  # [T, B, K, N, D]
        torch.mul(step_c.unsqueeze(3), power, out=a).exp2_()
        torch.mul(drive_c.unsqueeze(3), B_c.unsqueeze(4), out=h)
        buffers.recur(before, len(u_c))
        torch.mul(dy_c.unsqueeze(3), C_c.unsqueeze(4), out=g)
        buffers.adjoin(carry, len(u_c))
        dC_c.copy_((dy_c.unsqueeze(3) @ h.mT).squeeze(3))
        dB_c.copy_((drive_c.unsqueeze(3) @ g.mT).squeeze(3))
        inner = torch.mul(g, B_c.unsqueeze(4), out=w).sum(3)  # sum_N g B [T, B, K, D]
        carry.copy_(g.mul_(a)[0])
        g.mul_(buffers.previous[: len(u_c)])  # w_l of the module's text
        torch.mul(inner, step_c, out=du_c)
        torch.sum(torch.mul(g, A, out=w), 3, out=dstep_c).addcmul_(inner, u_c)
        dA += g.mul_(step_c.unsqueeze(3)).sum((0, 1))
    return dA.transpose(1, 2)


class _Buffers:
    """Working arrays of the backward pass, used again for every chunk."""

    def __init__(self, chunk: int, kept: Tensor) -> None:
        shape = kept.shape[1:]  # [B, K, N, D]
        self.decay, self.adjoint, self.work = (kept.new_empty(chunk, *shape) for _ in range(3))
        states = kept.new_empty(chunk + 1, *shape)
        self.previous, self.states = states[:-1], states[1:]  # before and after each step [T, B, K, N, D]
        self.decays, self.adjoints = self.decay.unbind(0), self.adjoint.unbind(0)
        self.rows = list(zip(self.decays, self.states.unbind(0), strict=True))

    def cut(self, steps: int) -> tuple[Tensor, ...]:
        """The arrays for decay, state, adjoint and anything, cut to the steps of a chunk."""
        return self.decay[:steps], self.states[:steps], self.adjoint[:steps], self.work[:steps]

    def recur(self, before: Tensor, steps: int) -> None:
        """Turn dt B x, lying in `states`, into the states, beginning with the state `before`."""
        state = self.previous[0].copy_(before)
        for decay_l, state_l in self.rows[:steps]:
            state = state_l.addcmul_(decay_l, state)

    def adjoin(self, carry: Tensor, steps: int) -> None:
        """Turn C dy, lying in `adjoint`, into g; `carry` is a g of the step behind the chunk."""
        state = self.adjoints[steps - 1].add_(carry)
        for index in range(steps - 2, -1, -1):
            state = self.adjoints[index].addcmul_(self.decays[index + 1], state)
