"""The scan's two kernels in Triton: one program walks one direction over one sample for a block of 32 channels.

Letters: B batch, P = H W pixels, L = P steps, K directions, D channels, N states; a section is M chunks of T steps.

A program is one warp, so it waits for no other. Which lane holds which of the 32 N states of a step is chosen by the
shape of the tiles: Triton lays the axis along which loads are contiguous into registers (V, NV, DV), and the last of
the others on the lanes.

- forward [R, V, 32]: a lane owns a channel, N = R V, so that the sum over states crosses no lanes, and B and C are
  loaded V numbers at once.
- backward [NL, NV, DV, DL], N = NL NV, 32 = DV DL: sums over states and sums over channels are needed of every state;
  with a square of NV x DV in each of the NL x DL lanes, the two together cross the fewest lanes.

Maps are read and written where they lie: a direction only changes the pixel that comes next. The forward pass keeps the
states in front of every section. The backward pass takes sections from the last to the first; in each it walks forward
once and notes the states in front of every chunk, in memory of its own that stays in the cache; then it takes the
chunks from the last to the first and computes the states and decays of one again, into registers.

Each program has its own slot in what it shares with others (y and dx by direction, dB and dC by block of channels):
these are added afterwards, in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(z):
    # log1p of e in (0, 1] from log alone: the error of 1 + e cancels in the quotient (Kahan's identity)
    e = tl.exp(-tl.abs(z))
    near = 1.0 + e
    small = tl.where(near == 1.0, e, tl.log(near) * (e / tl.where(near == 1.0, 1.0, near - 1.0)))
    return tl.maximum(z, 0.0) + small


@triton.jit
def _pixel(step, k, height, width):
    """The pixel (row * width + column) that direction k visits at a step: rows, columns, then both backwards."""
    at = tl.where(k >= 2, height * width - 1 - step, step)
    return tl.where(k % 2 == 1, (at % height) * width + at // height, at)


@triton.jit
def _after(pixel, k, height, width):
    """The pixel after this one: a pixel or a row on, and from the end of a column to the beginning of the next."""
    stride = tl.where(k % 2 == 1, width, 1)
    there = tl.where(k >= 2, pixel - stride, pixel + stride)
    turn = height * width - 1
    return tl.where(there > turn, there - turn, tl.where(there < 0, there + turn, there))


@triton.jit
def forward(
    x, delta, power, B, C, skip, bias, y, kept, height, width, channels, sections,
    delta_b, delta_p, delta_k, B_b, B_p, B_k, C_b, C_p, C_k,
    N: tl.constexpr, S: tl.constexpr, G: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Fill y [K, B, P, D] and kept [B, K, L / S, N, D], the states in front of each section of S steps.

    x [B, P, D]; delta [B, P, K, D], B and C [B, P, K, N] by strides of sample, pixel and direction; power [K, N, D] is
    A log2(e); skip and bias [K, D]. What G steps need is asked for before any of it is used; S is a multiple of G.
    """
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, R)[:, None, None] * V + tl.arange(0, V)[None, :, None]  # [R, V, 1]
    d = tl.program_id(0) * 32 + tl.arange(0, 32)[None, None, :]  # [1, 1, 32]
    has_d, has_n = d < channels, n < N
    length = height * width
    x, delta = x + b * length * channels + d, delta + b * delta_b + k * delta_k + d
    B, C = B + b * B_b + k * B_k + n + tl.zeros_like(d), C + b * C_b + k * C_k + n + tl.zeros_like(d)  # [R, V, 32]
    y += (k * tl.num_programs(2) + b) * length * channels + d
    kept += (b * 4 + k) * sections * N * channels + n * channels + d
    rates = tl.load(power + (k * N + n) * channels + d, mask=has_n & has_d, other=0.0)
    through = tl.load(skip + k * channels + d, mask=has_d, other=0.0)
    shift = tl.load(bias + k * channels + d, mask=has_d, other=0.0)
    h = tl.zeros([R, V, 32], tl.float32)
    pixel = _pixel(0, k, height, width)
    for group in range(sections * (S // G)):
        if group % (S // G) == 0:
            tl.store(kept + group // (S // G) * N * channels, h, mask=has_n & has_d)
        rows = ()
        for i in tl.static_range(G):
            inside = group * G + i < length
            u = tl.load(x + pixel * channels, mask=has_d & inside, other=0.0)
            z = tl.load(delta + pixel * delta_p, mask=has_d & inside, other=0.0)
            b_l = tl.load(B + pixel * B_p, mask=has_n & inside, other=0.0)
            c_l = tl.load(C + pixel * C_p, mask=has_n & inside, other=0.0)
            rows = rows + ((inside, pixel, u, z, b_l, c_l),)
            pixel = _after(pixel, k, height, width)
        for i in tl.static_range(G):
            inside, at, u, z, b_l, c_l = rows[i]
            u = u.to(tl.float32)
            dt = tl.where(has_d & inside, _softplus(z.to(tl.float32) + shift), 0.0)
            h = tl.exp2(dt * rates) * h + (dt * u) * b_l.to(tl.float32)
            read = tl.sum(tl.sum(h * c_l.to(tl.float32), 0, keep_dims=True), 1, keep_dims=True)
            tl.store(y + at * channels, read + u * through, mask=has_d & inside)


@triton.jit
def _over_states(values):
    """Sum over N, in registers first: [NL, NV, DV, DL] -> [1, 1, DV, DL]."""
    return tl.sum(tl.sum(values, 1, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _over_channels(values):
    """Sum over the block's channels, in registers first: [NL, NV, DV, DL] -> [NL, NV, 1, 1]."""
    return tl.sum(tl.sum(values, 2, keep_dims=True), 3, keep_dims=True)


@triton.jit
def _note(
    x, delta, B, notes, h, rates, shift, has_n, has_d, first, walk, states, T: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Walk over a section from step `first` with the states h, and note the states in front of its M chunks."""
    k, height, width, delta_p, B_p, channels = walk
    pixel = _pixel(first, k, height, width)
    for step in range((M - 1) * T):
        if step % T == 0:
            tl.store(notes + step // T * states, h, mask=has_n & has_d)
        inside = first + step < height * width
        u = tl.load(x + pixel * channels, mask=has_d & inside, other=0.0).to(tl.float32)
        z = tl.load(delta + pixel * delta_p, mask=has_d & inside, other=0.0).to(tl.float32) + shift
        b_l = tl.load(B + pixel * B_p, mask=has_n & inside, other=0.0).to(tl.float32)
        dt = tl.where(has_d & inside, _softplus(z), 0.0)
        h = tl.exp2(dt * rates) * h + (dt * u) * b_l
        pixel = _after(pixel, k, height, width)
    tl.store(notes + (M - 1) * states, h, mask=has_n & has_d)
    tl.debug_barrier()  # what one lane has written another may read


@triton.jit
def backward(
    x, delta, power, B, C, skip, bias, kept, notes, dy, dx, ddelta, dA, dB, dC, dskip, dbias,
    height, width, channels, sections, delta_b, delta_p, delta_k, B_b, B_p, B_k, C_b, C_p, C_k,
    N: tl.constexpr, T: tl.constexpr, M: tl.constexpr,
    NL: tl.constexpr, NV: tl.constexpr, DV: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    """Fill the gradients: dx [K, B, P, D], ddelta [B, P, K, D], dA [B, K, N, D], dskip and dbias [B, K, D].

    And for each block of channels dB and dC [D / 32, B, P, K, N]. dy is [B, P, D]; notes [B, K, M, N, D] is working
    space; the rest is as in `forward`, with sections of S = M T steps.

    With g_l = dL/dh_l = C_l dy_l + a_{l+1} g_{l+1}, a_l = exp(dt_l A), r_l = a_l h_{l-1} and w_l = g_l r_l:
    dC = sum_D dy h, dB = sum_D dt x g, dx = dt sum_N g B + D dy, ddt = x sum_N g B + sum_N w A, dA = sum_L w dt.
    """
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane_n, lane_d = tl.arange(0, NL)[:, None, None, None], tl.arange(0, DL)[None, None, None, :]
    lanes = tl.zeros([NL, 1, 1, DL], tl.int32)
    n = lane_n * NV + tl.arange(0, NV)[None, :, None, None] + lanes  # [NL, NV, 1, DL]
    d = (tl.program_id(0) * DL + lane_d) * DV + tl.arange(0, DV)[None, None, :, None] + lanes  # [NL, 1, DV, DL]
    has_d, has_n = d < channels, n < N
    by_channel, by_state = has_d & (lane_n == 0), has_n & (lane_d == 0)  # one lane of those that hold the same
    length, states = height * width, N * channels
    x, dy, delta = x + b * length * channels + d, dy + b * length * channels + d, delta + b * delta_b + k * delta_k + d
    B, C = B + b * B_b + k * B_k + n, C + b * C_b + k * C_k + n
    dx, ddelta = dx + (k * tl.num_programs(2) + b) * length * channels + d, ddelta + (b * length * 4 + k) * channels + d
    own = ((tl.program_id(0) * tl.num_programs(2) + b) * length * 4 + k) * N + n
    dB, dC = dB + own, dC + own
    kept += (b * 4 + k) * sections * states + n * channels + d
    notes += (b * 4 + k) * M * states + n * channels + d
    rates = tl.load(power + (k * N + n) * channels + d, mask=has_n & has_d, other=0.0)
    through = tl.load(skip + k * channels + d, mask=has_d, other=0.0)
    shift = tl.load(bias + k * channels + d, mask=has_d, other=0.0)
    carry = tl.zeros([NL, NV, DV, DL], tl.float32)  # a_l g_l of the step that was done last
    sum_A = tl.zeros([NL, NV, DV, DL], tl.float32)
    sum_skip, sum_bias = tl.zeros([NL, 1, DV, DL], tl.float32), tl.zeros([NL, 1, DV, DL], tl.float32)
    for back in range(sections * M):
        chunk = sections * M - 1 - back
        if chunk % M == M - 1:
            h = tl.load(kept + chunk // M * states, mask=has_n & has_d, other=0.0)
            first, walk = (chunk - (M - 1)) * T, (k, height, width, delta_p, B_p, channels)
            _note(x, delta, B, notes, h, rates, shift, has_n, has_d, first, walk, states, T, M)
        h = tl.load(notes + chunk % M * states, mask=has_n & has_d, other=0.0)
        pixel = _pixel(chunk * T, k, height, width)
        rows = ()
        for i in tl.static_range(T):
            inside = chunk * T + i < length
            u = tl.load(x + pixel * channels, mask=has_d & inside, other=0.0)
            z = tl.load(delta + pixel * delta_p, mask=has_d & inside, other=0.0)
            b_l = tl.load(B + pixel * B_p, mask=has_n & inside, other=0.0)
            c_l = tl.load(C + pixel * C_p, mask=has_n & inside, other=0.0)
            dy_l = tl.load(dy + pixel * channels, mask=has_d & inside, other=0.0)
            rows = rows + ((inside, pixel, u, z, b_l, c_l, dy_l),)
            pixel = _after(pixel, k, height, width)
        before = ()
        for i in tl.static_range(T):
            inside, at, u, z, b_l, c_l, dy_l = rows[i]
            dt = tl.where(has_d & inside, _softplus(z.to(tl.float32) + shift), 0.0)
            before = before + (h,)
            h = tl.exp2(dt * rates) * h + (dt * u.to(tl.float32)) * b_l.to(tl.float32)
        for j in tl.static_range(T):
            inside, at, u, z, b_l, c_l, dy_l = rows[T - 1 - j]
            u, b_l, z = u.to(tl.float32), b_l.to(tl.float32), z.to(tl.float32) + shift
            dt = tl.where(has_d & inside, _softplus(z), 0.0)
            drive = dt * u
            a = tl.exp2(dt * rates)
            r = a * before[T - 1 - j]
            g = dy_l * c_l.to(tl.float32) + carry
            carry = a * g
            w = g * r
            inner = _over_states(g * b_l)
            ddt = u * inner + LN2 * _over_states(w * rates)
            dz = tl.where(has_d & inside, ddt / (1.0 + tl.exp(-z)), 0.0)  # softplus' is the logistic function
            sum_A, sum_skip, sum_bias = sum_A + w * dt, sum_skip + dy_l * u, sum_bias + dz
            tl.store(dx + at * channels, dt * inner + dy_l * through, mask=by_channel & inside)
            tl.store(ddelta + at * 4 * channels, dz, mask=by_channel & inside)
            tl.store(dB + at * 4 * N, _over_channels(g * drive), mask=by_state & inside)
            tl.store(dC + at * 4 * N, _over_channels((r + drive * b_l) * dy_l), mask=by_state & inside)
    tl.store(dA + ((b * 4 + k) * N + n) * channels + d, sum_A, mask=has_n & has_d)
    tl.store(dskip + (b * 4 + k) * channels + d, sum_skip, mask=by_channel)
    tl.store(dbias + (b * 4 + k) * channels + d, sum_bias, mask=by_channel)
