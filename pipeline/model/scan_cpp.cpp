// The 2-D selective scan on the CPU (scan.py says what it computes, scan_torch.py gives the adjoint equations).
//
// Plain C interface for ctypes, no torch headers, compiles in seconds, for the instruction set that scan_cpp.py names
// (AVX-512, AVX2 with FMA, or what the architecture always has). No OpenMP.
//
// Letters: W lanes of a vector, N states, T steps in a chunk, K = 4 directions, L = height * width pixels.
// Lanes are channels. A unit of work is one sample and one group of channels; its directions run one after the other
// and add into y and dx in place, so that results do not depend on the number of threads. The forward pass keeps the
// state at the start of every chunk; the backward pass computes the chunk's states again and then walks it backwards.
// Sums over a whole sequence (dA, dD, dbias) are float within a chunk and double across chunks.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "scan_simd.h"

struct Strides {  // in floats, of the sample, the pixel and the direction; the last axis is contiguous
  int64_t sample, pixel, direction;
};

struct Problem {  // mirrored by `_Problem` in scan_cpp.py
  int64_t batch, height, width, channels, states, threads;
  const float *x, *delta, *power, *b, *c, *skip, *bias;  // x [B, L, D]; power = A log2(e) [K, N, D]; skip, bias [K, D]
  Strides delta_at, b_at, c_at, ddelta_at;
  float *y, *kept;                          // y [B, L, D]; states between chunks
  const float *dy;                          // from here on only for the backward pass
  float *dx, *ddelta, *dA, *db, *dc, *dskip, *dbias;  // dA [B, K, N, D]; db, dc [groups, B, L, K, N]; the last [B, K, D]
};

namespace {

constexpr int kDirections = 4;
constexpr int kStates = 16;  // states handled at once, in registers where there are enough
constexpr int kGroup = 96;   // channels of a unit: more make fewer partial sums for dB and dC, fewer make more units

template <int W>
constexpr int kSteps = 256 / W;  // T: the states and decays of a chunk stay in the cache

constexpr double kLn2 = 0.69314718055994531;

// What one walk of one direction over one group of channels needs; `first` states of `count` at once.
struct Walk {
  int64_t sample, k, begin, end;
  int first, count;
};

inline int64_t chunks(const Problem &p, int steps) { return (p.height * p.width + steps - 1) / steps; }

// Where the states before chunk m of a block of W channels are kept: N vectors.
template <int W>
inline float *kept(const Problem &p, const Walk &walk, int64_t m, int64_t channel) {
  const int64_t blocks = (p.channels + W - 1) / W, row = walk.sample * kDirections + walk.k;
  return p.kept + (((row * chunks(p, kSteps<W>) + m) * blocks + channel / W) * p.states + walk.first) * W;
}

inline int64_t at(const Strides &s, const Walk &walk, int64_t pixel, int64_t channel) {
  return walk.sample * s.sample + pixel * s.pixel + walk.k * s.direction + channel;
}

// Pixel at step l of the walk.
inline int64_t pixel_at(const Problem &p, const Walk &walk, int64_t l) {
  const int64_t forward = walk.k >= 2 ? p.height * p.width - 1 - l : l;
  return walk.k % 2 ? forward % p.height * p.width + forward / p.height : forward;
}

inline void prefetch(const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

// The pixels of chunk m and their B and C. Also asks for the data of chunk `next`: along columns every pixel lies on
// another page, where the processor does not look ahead by itself.
template <int W>
struct Chunk {
  int steps;
  int64_t pixel[kSteps<W>];
  float b[kSteps<W>][kStates], c[kSteps<W>][kStates];

  Chunk(const Problem &p, const Walk &walk, int64_t m, int64_t next, const float *outputs) {
    const int64_t length = p.height * p.width, channels = walk.end - walk.begin;
    steps = (int)std::min<int64_t>(kSteps<W>, length - m * kSteps<W>);
    for (int t = 0; t < steps; t++) {
      pixel[t] = pixel_at(p, walk, m * kSteps<W> + t);
      std::copy_n(p.b + at(p.b_at, walk, pixel[t], walk.first), walk.count, b[t]);
      std::copy_n(p.c + at(p.c_at, walk, pixel[t], walk.first), walk.count, c[t]);
    }
    for (int64_t l = std::max<int64_t>(0, next * kSteps<W>); l < std::min(length, (next + 1) * kSteps<W>); l++) {
      const int64_t ahead = pixel_at(p, walk, l), row = walk.sample * length + ahead;
      prefetch(p.x + row * p.channels + walk.begin, channels);
      prefetch(outputs + row * p.channels + walk.begin, channels);
      prefetch(p.delta + at(p.delta_at, walk, ahead, walk.begin), channels);
      prefetch(p.b + at(p.b_at, walk, ahead, walk.first), walk.count);
      prefetch(p.c + at(p.c_at, walk, ahead, walk.first), walk.count);
    }
  }
};

// One direction forward. Count = 16 has the number of states fixed for unrolling, 0 leaves it to the walk.
template <int W, int Count>
inline void forward(const Problem &p, const Walk &walk) {
  using F = typename Simd<W>::F;
  const int states = Count ? Count : walk.count;
  const int64_t total = chunks(p, kSteps<W>);
  for (int64_t m = 0; m < total; m++) {
    const Chunk<W> chunk(p, walk, m, m + 1, p.y);
    for (int64_t d = walk.begin; d < walk.end; d += W) {
      const int lanes = (int)std::min<int64_t>(W, walk.end - d);
      const F bias = load<W>(p.bias + walk.k * p.channels + d, lanes);
      const F skip = walk.first ? F{} : load<W>(p.skip + walk.k * p.channels + d, lanes);
      F power[kStates], h[kStates];
      float *before = kept<W>(p, walk, m, d);
      for (int n = 0; n < states; n++) {
        power[n] = load<W>(p.power + (walk.k * p.states + walk.first + n) * p.channels + d, lanes);
        h[n] = m ? load<W>(before + n * W, W) : F{};
      }
      for (int t = 0; t < chunk.steps; t++) {
        const int64_t pixel = chunk.pixel[t], here = (walk.sample * p.height * p.width + pixel) * p.channels + d;
        const F u = load<W>(p.x + here, lanes);
        const F dt = softplus<W>(load<W>(p.delta + at(p.delta_at, walk, pixel, d), lanes) + bias, nullptr);
        const F drive = dt * u;
        F sum = u * skip, other = {};
#pragma GCC unroll 16
        for (int n = 0; n < states; n++) {
          h[n] = exp2<W>(dt * power[n]) * h[n] + drive * chunk.b[t][n];
          (n % 2 ? other : sum) += h[n] * chunk.c[t][n];
        }
        put<W>(p.y + here, lanes, sum + other, walk.k || walk.first);
      }
      if (m + 1 < total) {
        float *after = kept<W>(p, walk, m + 1, d);
        for (int n = 0; n < states; n++) store<W>(after + n * W, W, h[n]);
      }
    }
  }
}

// Sums over a sequence for one block of channels, and the adjoint state at the front of the chunk behind.
template <int W>
struct Sums {
  typename Simd<W>::F carry[kStates];
  typename Simd<W>::D dA[kStates], skip, bias;
};

// Arrays of one chunk: states before and after each step, decays, and lane-wise sums for dB and dC.
template <int W>
struct Scratch {
  typename Simd<W>::F h[kSteps<W> + 1][kStates], decay[kSteps<W>][kStates], db[kSteps<W>][kStates], dc[kSteps<W>][kStates];
  typename Simd<W>::F u[kSteps<W>], dt[kSteps<W>], slope[kSteps<W>];
};

// The chunk's states again, from the kept one, into the scratch.
template <int W, int Count>
inline void recompute(const Problem &p, const Walk &walk, const Chunk<W> &chunk, int64_t m, int64_t d, int lanes,
                      const typename Simd<W>::F *power, Scratch<W> &s) {
  using F = typename Simd<W>::F;
  const int states = Count ? Count : walk.count;
  const F bias = load<W>(p.bias + walk.k * p.channels + d, lanes);
  const float *before = kept<W>(p, walk, m, d);
  for (int n = 0; n < states; n++) s.h[0][n] = m ? load<W>(before + n * W, W) : F{};
  for (int t = 0; t < chunk.steps; t++) {
    const int64_t pixel = chunk.pixel[t];
    s.u[t] = load<W>(p.x + (walk.sample * p.height * p.width + pixel) * p.channels + d, lanes);
    s.dt[t] = softplus<W>(load<W>(p.delta + at(p.delta_at, walk, pixel, d), lanes) + bias, &s.slope[t]);
    const F drive = s.dt[t] * s.u[t];
#pragma GCC unroll 16
    for (int n = 0; n < states; n++) {
      s.decay[t][n] = exp2<W>(s.dt[t] * power[n]);
      s.h[t + 1][n] = s.decay[t][n] * s.h[t][n] + drive * chunk.b[t][n];
    }
  }
}

// One chunk of one block of channels backwards; `power` is A log2(e), so sums with it are multiplied by ln 2.
template <int W, int Count>
inline void adjoint(const Problem &p, const Walk &walk, const Chunk<W> &chunk, int64_t d, int lanes,
                    const typename Simd<W>::F *power, Scratch<W> &s, Sums<W> &sums) {
  using F = typename Simd<W>::F;
  using D = typename Simd<W>::D;
  const int states = Count ? Count : walk.count;
  const F skip = walk.first ? F{} : load<W>(p.skip + walk.k * p.channels + d, lanes);
  F g[kStates], dA[kStates], dskip = {}, dbias = {};
  for (int n = 0; n < states; n++) g[n] = sums.carry[n], dA[n] = F{};
  for (int t = chunk.steps - 1; t >= 0; t--) {
    const int64_t pixel = chunk.pixel[t], here = (walk.sample * p.height * p.width + pixel) * p.channels + d;
    const F dy = load<W>(p.dy + here, lanes), dt = s.dt[t], u = s.u[t], drive = dt * u;
    F inner = {}, rate = {};
#pragma GCC unroll 16
    for (int n = 0; n < states; n++) {
      const F full = g[n] + dy * chunk.c[t][n];
      s.dc[t][n] += dy * s.h[t + 1][n];
      s.db[t][n] += full * drive;
      inner += full * chunk.b[t][n];
      g[n] = full * s.decay[t][n];
      const F w = g[n] * s.h[t][n];
      rate += w * power[n];
      dA[n] += w * dt;
    }
    const F ddelta = (u * inner + rate * (float)kLn2) * s.slope[t];
    dbias += ddelta;
    dskip += dy * u;
    put<W>(p.dx + here, lanes, dt * inner + dy * skip, walk.k || walk.first);
    put<W>(p.ddelta + at(p.ddelta_at, walk, pixel, d), lanes, ddelta, walk.first);
  }
  sums.bias += __builtin_convertvector(dbias, D);
  sums.skip += __builtin_convertvector(dskip, D);
  for (int n = 0; n < states; n++) {
    sums.carry[n] = g[n];
    sums.dA[n] += __builtin_convertvector(dA[n], D);
  }
}

// One direction backward.
template <int W, int Count>
inline void backward(const Problem &p, const Walk &walk) {
  using F = typename Simd<W>::F;
  const int states = Count ? Count : walk.count;
  Scratch<W> s;
  Sums<W> sums[kGroup / W] = {};
  for (int64_t m = chunks(p, kSteps<W>) - 1; m >= 0; m--) {
    const Chunk<W> chunk(p, walk, m, m - 1, p.dx);
    std::fill_n(&s.db[0][0], kSteps<W> * kStates, F{});
    std::fill_n(&s.dc[0][0], kSteps<W> * kStates, F{});
    for (int64_t d = walk.begin; d < walk.end; d += W) {
      const int lanes = (int)std::min<int64_t>(W, walk.end - d);
      F power[kStates];
      for (int n = 0; n < states; n++)
        power[n] = load<W>(p.power + (walk.k * p.states + walk.first + n) * p.channels + d, lanes);
      recompute<W, Count>(p, walk, chunk, m, d, lanes, power, s);
      adjoint<W, Count>(p, walk, chunk, d, lanes, power, s, sums[(d - walk.begin) / W]);
    }
    const int64_t part = walk.begin / kGroup * p.batch + walk.sample;
    for (int t = 0; t < chunk.steps; t++) {
      const int64_t to = ((part * p.height * p.width + chunk.pixel[t]) * kDirections + walk.k) * p.states + walk.first;
      for (int n = 0; n < states; n += W) {
        sum_lanes<W>(s.db[t] + n);
        sum_lanes<W>(s.dc[t] + n);
        store<W>(p.db + to + n, std::min(W, states - n), s.db[t][n]);
        store<W>(p.dc + to + n, std::min(W, states - n), s.dc[t][n]);
      }
    }
  }
  for (int64_t d = walk.begin; d < walk.end; d++) {
    const Sums<W> &sum = sums[(d - walk.begin) / W];
    const int lane = (d - walk.begin) % W;
    const int64_t row = walk.sample * kDirections + walk.k;
    for (int n = 0; n < states; n++) p.dA[(row * p.states + walk.first + n) * p.channels + d] = sum.dA[n][lane];
    if (walk.first == 0) p.dskip[row * p.channels + d] = sum.skip[lane];
    float &bias = p.dbias[row * p.channels + d];
    bias = (walk.first ? bias : 0.0f) + (float)sum.bias[lane];
  }
}

// All directions and states of one unit.
template <int W, bool Backward>
inline void unit(const Problem &p, int64_t index) {
  const int64_t groups = (p.channels + kGroup - 1) / kGroup, begin = index % groups * kGroup;
  const int64_t end = std::min(p.channels, begin + kGroup);
  for (int64_t k = 0; k < kDirections; k++)
    for (int first = 0; first < p.states; first += kStates) {
      const Walk walk = {index / groups, k, begin, end, first, (int)std::min<int64_t>(kStates, p.states - first)};
      if constexpr (Backward) {
        walk.count == kStates ? backward<W, kStates>(p, walk) : backward<W, 0>(p, walk);
      } else {
        walk.count == kStates ? forward<W, kStates>(p, walk) : forward<W, 0>(p, walk);
      }
    }
}

using Run = void (*)(const Problem &, int64_t);

// Whether the channels fill the wider of two vector widths; the narrow one wastes fewer lanes on few channels.
bool wide(const Problem &p) { return kWide > kNarrow && (p.channels % kWide == 0 || p.channels > 4 * kWide); }

void run(const Problem &p, Run kernel) {
  const int64_t units = p.batch * ((p.channels + kGroup - 1) / kGroup);
  const int64_t workers = std::max<int64_t>(1, std::min(p.threads, units));
  const auto work = [&](int64_t worker) {
    for (int64_t i = units * worker / workers; i < units * (worker + 1) / workers; i++) kernel(p, i);
  };
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < workers; worker++) others.emplace_back(work, worker);
  work(0);
  for (auto &thread : others) thread.join();
}

}  // namespace

extern "C" {

// Channels of a unit of work.
int64_t scan_group() { return kGroup; }

// Number of floats in `kept`.
int64_t scan_kept(const Problem *p) {
  const int64_t width = wide(*p) ? kWide : kNarrow, steps = wide(*p) ? kSteps<kWide> : kSteps<kNarrow>;
  const int64_t chunks = (p->height * p->width + steps - 1) / steps, blocks = (p->channels + width - 1) / width;
  return p->batch * kDirections * chunks * blocks * p->states * width;
}

void scan_forward(const Problem *p) { run(*p, wide(*p) ? unit<kWide, false> : unit<kNarrow, false>); }

void scan_backward(const Problem *p) { run(*p, wide(*p) ? unit<kWide, true> : unit<kNarrow, true>); }
}
