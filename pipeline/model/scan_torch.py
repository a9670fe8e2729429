"""The scan in plain torch operations: works everywhere, linear cost, memory that does not grow with N.

Letters: B batch, H W rows and columns, L = H W, K = 4 directions, D channels, N states, T steps in a chunk.

A loop over single steps that also computes decay, input and readout step by step is bound by Python and by
memory. Here only the recurrence itself, one fused multiply-add a step, is such a loop; everything else is
done for a chunk of T steps at once, small enough to stay in the cache. The forward pass keeps the state at
the start of every chunk; the backward pass computes the chunk's states again from it and runs the adjoint
recurrence

    g_l = C_l dy_l + a_{l+1} g_{l+1},   a_l = exp(dt_l A)

from the end to the beginning. All gradients are sums over g (with w_l = g_l a_l h_{l-1}):

    dC_l = sum_D dy_l h_l    dB_l = sum_D dt_l x_l g_l    dx_l = dt_l sum_N g_l B_l + D dy_l
    ddt_l = x_l sum_N g_l B_l + sum_N w_l A               dA = sum_L w_l dt_l

Two choices make it fast: states have the channels innermost ([N, D], long vectors for every operation), and
powers are taken of two (exp2 with A log2 e), which torch computes about three times faster than exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.model.scan_reference import paths

CHUNK = 16  # steps computed at once; the kept states are 1/CHUNK of all states
STEP = (
    1 << 15
)  # numbers in one step of the recurrence above which the batch is taken in parts, to stay in the cache


@dataclass(frozen=True)
class Walk:
    """The order in which the directions visit the pixels of a [B, H, W, ...] tensor, and back."""

    height: int
    width: int
    device: torch.device

    def forth(self, x: Tensor) -> Tensor:
        """What the directions meet, pixel by pixel: [B, H, W, F] or [B, H, W, K, F] -> [B, L, K, F]."""
        path = paths(self.height, self.width, self.device)  # [K, L]
        directions, length = path.shape
        if x.dim() == 5:  # each direction reads its own
            path = path * directions + torch.arange(directions, device=self.device)[:, None]
        flat = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, L or L K, F]
        return flat.index_select(1, path.t().reshape(-1)).view(x.shape[0], length, directions, x.shape[-1])

    def back(self, walked: Tensor) -> Tensor:
        """Inverse of `forth` for one value per direction: [B, L, K, F] -> [B, H, W, K, F]."""
        batch, _, directions, features = walked.shape
        when = paths(self.height, self.width, self.device).argsort(1)  # step of each pixel [K, L]
        source = when * directions + torch.arange(directions, device=self.device)[:, None]
        pixels = walked.view(batch, -1, features).index_select(1, source.t().reshape(-1))
        return pixels.view(batch, self.height, self.width, directions, features)


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` in chunks; its own backward pass, once differentiable."""
    result: Tensor = _Scan.apply(x, delta, A, B, C, D, delta_bias)  # type: ignore[no-untyped-call]
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        x, delta, A, B, C, D, delta_bias = tensors
        walk = Walk(x.shape[1], x.shape[2], x.device)
        u, Bw, Cw = walk.forth(x), walk.forth(B), walk.forth(C)  # [B, L, K, D], [B, L, K, N] twice
        step = F.softplus(walk.forth(delta) + delta_bias)  # [B, L, K, D]
        y = torch.empty_like(u)
        kept = [_forward(u[part], step[part], A, Bw[part], Cw[part], y[part]) for part in _parts(u, A)]
        ctx.save_for_backward(*tensors, *kept)
        y = walk.back(y.addcmul_(u, D))  # [B, H, W, K, D]
        return y.sum(3)  # [B, H, W, D]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, D, delta_bias, *kept = ctx.saved_tensors
        walk = Walk(x.shape[1], x.shape[2], x.device)
        u, Bw, Cw, dy = walk.forth(x), walk.forth(B), walk.forth(C), walk.forth(dy)
        biased = walk.forth(delta) + delta_bias  # [B, L, K, D]
        step = F.softplus(biased)
        du, dstep, dB, dC, dA = map(torch.empty_like, (u, u, Bw, Cw, A))
        dA.zero_()
        for part, states in zip(_parts(u, A), kept, strict=True):
            inputs = (u[part], step[part], A, Bw[part], Cw[part], dy[part])
            _backward(inputs, states, (du[part], dstep[part], dA, dB[part], dC[part]))
        dD = torch.linalg.vecdot(dy, u, dim=1).sum(0)  # [K, D]
        ddelta = dstep.mul_(biased.sigmoid_())  # softplus' = sigmoid
        dx = walk.back(du.addcmul_(dy, D)).sum(3)  # [B, H, W, D]
        return dx, walk.back(ddelta), dA, walk.back(dB), walk.back(dC), dD, ddelta.sum((0, 1))


def _parts(u: Tensor, A: Tensor) -> list[slice]:
    """Slices of the batch, each with at most `STEP` numbers in one step (and at least one sample)."""
    size = max(1, STEP // A.numel())
    return [slice(start, start + size) for start in range(0, u.shape[0], size)]


def _chunks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _decay(step: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """exp(dt A): step [T, B, K, 1, D] and A log2(e) [K, N, D] -> [T, B, K, N, D]."""
    return torch.mul(step, A, out=out).exp2_()


def _forward(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, y: Tensor) -> Tensor:
    """Fill y [B, L, K, D] with C . h and return the states at the chunks' starts [chunks, B, K, N, D]."""
    power = A.transpose(1, 2).mul(math.log2(math.e))  # [K, N, D]
    u, step, B, C, y = (tensor.transpose(0, 1) for tensor in (u, step, B, C, y))  # [L, B, K, .]
    chunks = _chunks(u.shape[0])
    drive = step * u  # [L, B, K, D]
    kept = u.new_zeros(len(chunks), *u.shape[1:3], *power.shape[1:])
    decay, states = (
        u.new_empty(min(CHUNK, u.shape[0]), *kept.shape[1:]) for _ in range(2)
    )  # [T, B, K, N, D]
    for index, (start, end) in enumerate(chunks):
        steps = end - start
        _decay(step[start:end, :, :, None], power, decay[:steps])
        torch.mul(drive[start:end, :, :, None], B[start:end, ..., None], out=states[:steps])
        state = kept[index]
        for decay_l, state_l in zip(decay.unbind(0)[:steps], states.unbind(0), strict=False):
            state = state_l.addcmul_(decay_l, state)
        if end < u.shape[0]:
            kept[index + 1] = state
        y[start:end] = states[:steps].mul_(C[start:end, ..., None]).sum(3)
    return kept


def _backward(inputs: tuple[Tensor, ...], kept: Tensor, grads: tuple[Tensor, ...]) -> None:
    """Fill du, dstep [B, L, K, D], dB, dC [B, L, K, N] and add to dA [K, D, N], chunk by chunk."""
    u, step, A, B, C, dy = inputs
    A = A.transpose(1, 2)  # [K, N, D]
    u, step, B, C, dy = (tensor.transpose(0, 1) for tensor in (u, step, B, C, dy))  # [L, B, K, .]
    du, dstep, dA, dB, dC = grads
    du, dstep, dB, dC = (tensor.transpose(0, 1) for tensor in (du, dstep, dB, dC))
    power, drive = A * math.log2(math.e), step * u
    size = (min(CHUNK, u.shape[0]), *kept.shape[1:])
    decay, adjoint, work = (u.new_empty(size) for _ in range(3))  # [T, B, K, N, D]
    states = u.new_empty(size[0] + 1, *size[1:])  # [T + 1, B, K, N, D], the first is the state before
    carry, dA_sum = torch.zeros_like(kept[0]), torch.zeros_like(A)
    for (start, end), before in zip(reversed(_chunks(u.shape[0])), reversed(kept.unbind(0)), strict=True):
        span, steps = slice(start, end), end - start
        a, h, g, w = decay[:steps], states[1 : steps + 1], adjoint[:steps], work[:steps]
        _decay(step[span, :, :, None], power, a)
        _recompute(before, a, torch.mul(drive[span, :, :, None], B[span, ..., None], out=h), states)
        _adjoint(carry, a, torch.mul(dy[span, :, :, None], C[span, ..., None], out=g))
        dC[span] = (dy[span, :, :, None] @ h.mT).squeeze(3)  # [T, B, K, N]
        dB[span] = (drive[span, :, :, None] @ g.mT).squeeze(3)
        inner = torch.mul(g, B[span, ..., None], out=w).sum(3)  # sum_N g B [T, B, K, D]
        g.mul_(a)
        carry.copy_(g[0])
        g.mul_(states[:steps])  # w_l of the module's text
        torch.mul(inner, step[span], out=du[span])
        torch.add(torch.mul(g, A, out=w).sum(3), inner * u[span], out=dstep[span])
        dA_sum += g.mul_(step[span, :, :, None]).sum((0, 1))
    dA += dA_sum.transpose(1, 2)


def _recompute(before: Tensor, decay: Tensor, drive: Tensor, states: Tensor) -> None:
    """Turn dt B x, lying in states[1:], into the states after each step; states[0] is the one before."""
    state = states[0].copy_(before)
    for decay_l, state_l in zip(decay.unbind(0), drive.unbind(0), strict=True):
        state = state_l.addcmul_(decay_l, state)


def _adjoint(carry: Tensor, decay: Tensor, adjoint: Tensor) -> None:
    """Turn C dy, lying in `adjoint`, into g; `carry` is a g of the step behind the chunk."""
    steps = adjoint.unbind(0)
    state = steps[-1].add_(carry)
    for decay_l, adjoint_l in zip(reversed(decay.unbind(0)[1:]), reversed(steps[:-1]), strict=True):
        state = adjoint_l.addcmul_(decay_l, state)
