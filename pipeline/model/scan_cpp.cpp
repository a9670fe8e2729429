// The 2-D selective scan on the CPU (scan.py says what it computes, scan_torch.py gives the adjoint equations).
//
// Plain C interface for ctypes, no torch headers, compiles in seconds, for the instruction set that scan_cpp.py names
// (AVX-512, AVX2 with FMA, or what the architecture always has). Vector types of GCC and Clang; no -ffast-math, no
// OpenMP.
//
// Letters: W lanes of a vector, N states, T steps in a chunk, K = 4 directions, L = height * width pixels.
// Lanes are channels. A unit of work is one sample and one group of channels; its directions run one after the other
// and add into y and dx in place, so that results do not depend on the number of threads. The forward pass keeps the
// state at the start of every chunk; the backward pass computes the chunk's states again and then walks it backwards.
// Sums over a whole sequence (dA, dD, dbias) are float within a chunk and double across chunks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
constexpr int kNumbers = 256;  // lanes times steps of a chunk: its states and decays, N times as many, stay in the cache
constexpr int kGroup = 96;   // channels of a unit: more make fewer partial sums for dB and dC, fewer make more units
#if defined(__AVX512F__)
constexpr int kWide = 16, kNarrow = 8;  // lanes
#elif defined(__AVX2__)
constexpr int kWide = 8, kNarrow = 8;
#else
constexpr int kWide = 4, kNarrow = 4;
#endif
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994531;

template <int W>
struct Simd {
  static constexpr int kSteps = kNumbers / W;  // T
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef double D __attribute__((vector_size(8 * W)));
  typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

template <int W>
inline typename Simd<W>::F load(const float *from, int count) {
  if (count == W) return *reinterpret_cast<const typename Simd<W>::Unaligned *>(from);
  typename Simd<W>::F result = {};
  for (int lane = 0; lane < count; lane++) result[lane] = from[lane];
  return result;
}

template <int W>
inline void store(float *to, int count, typename Simd<W>::F value) {
  if (count == W) {
    *reinterpret_cast<typename Simd<W>::Unaligned *>(to) = value;
    return;
  }
  for (int lane = 0; lane < count; lane++) to[lane] = value[lane];
}

template <int W>
inline void put(float *to, int count, typename Simd<W>::F value, bool add) {
  store<W>(to, count, add ? load<W>(to, count) + value : value);
}

// The larger of x and `low`, NaN for NaN.
template <int W>
inline typename Simd<W>::F at_least(typename Simd<W>::F x, float low) {
  const typename Simd<W>::F limit = typename Simd<W>::F{} + low;
#if defined(__AVX512F__)
  if constexpr (W == 16) return (typename Simd<W>::F)_mm512_max_ps((__m512)limit, (__m512)x);
#endif
#if defined(__AVX2__)
  if constexpr (W == 8) return (typename Simd<W>::F)_mm256_max_ps((__m256)limit, (__m256)x);
#endif
  return limit > x ? limit : x;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

template <int W>
inline typename Simd<W>::F nearest(typename Simd<W>::F x) {
  return (x + kRound) - kRound;
}

// p * 2^n for an integer n >= -127 and 1/2 < p < 2.
template <int W>
inline typename Simd<W>::F scale(typename Simd<W>::F p, typename Simd<W>::F n) {
  using F = typename Simd<W>::F;
  using I = typename Simd<W>::I;
#if defined(__AVX512F__)
  if constexpr (W == 16) return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#endif
#if defined(__AVX512VL__)
  if constexpr (W == 8) return (F)_mm256_scalef_ps((__m256)p, (__m256)n);
#endif
  return (F)((I)p + ((I)(n + kRound) << 23));
}

// 2^f for |f| <= 1/2. The polynomial for (2^f - 1) / f is a Chebyshev interpolation (relative error 2e-8), so that
// decays near 1 keep their distance from 1.
template <int W>
inline typename Simd<W>::F fraction(typename Simd<W>::F f) {
  typename Simd<W>::F p = f * 1.545316294e-04f + 1.339086336e-03f;
  p = p * f + 9.618082557e-03f;
  p = p * f + 5.550357114e-02f;
  p = p * f + 2.402265076e-01f;
  p = p * f + 6.931471880e-01f;
  return p * f + 1.0f;
}

// 2^x for x <= 0; 0 below 2^-127, NaN for NaN.
template <int W>
inline typename Simd<W>::F exp2(typename Simd<W>::F x) {
  x = at_least<W>(x, -127.0f);
  const typename Simd<W>::F n = nearest<W>(x);
  return scale<W>(fraction<W>(x - n), n);
}

// softplus(v) and its derivative. exp(-|v|) subtracts n ln 2 in two parts, because v log2(e) alone would lose bits;
// log1p(e) is the series of 2 artanh(e / (2 + e)), exact to 1.4e-8 for e in [0, 1].
template <int W>
inline typename Simd<W>::F softplus(typename Simd<W>::F v, typename Simd<W>::F *derivative) {
  using F = typename Simd<W>::F;
  const F zero = {}, x = at_least<W>(v > zero ? -v : v, -87.0f), n = nearest<W>(x * kLog2e);
  const F rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const F e = scale<W>(fraction<W>(rest * kLog2e), n);
  const F s = e / (e + 2.0f), s2 = s * s;
  F series = s2 * (1.0f / 13) + 1.0f / 11;
  series = series * s2 + 1.0f / 9;
  series = series * s2 + 1.0f / 7;
  series = series * s2 + 1.0f / 5;
  series = series * s2 + 1.0f / 3;
  series = (series * s2 + 1.0f) * s;
  if (derivative) *derivative = (v >= zero ? zero + 1.0f : e) / (e + 1.0f);
  return (v > zero ? v : zero) + (series + series);
}

template <class V, int... Index>
inline V pick(V a, V b, std::integer_sequence<int, Index...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index...);
#else
  typedef int32_t Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{Index...});
#endif
}

// Lanes of (a, b), in blocks of `Step`: even blocks of the result from a, odd ones from b, the lower or higher half.
template <int W, int Step, int Half, class V, int... Lane>
inline V halves(V a, V b, std::integer_sequence<int, Lane...>) {
  return pick(a, b, std::integer_sequence<int, ((Lane / Step & ~1) * Step + Lane % Step + Half * Step +
                                                (Lane / Step % 2) * W)...>());
}

// Sum the lanes of W vectors; lane i of v[0] becomes the sum of v[i].
template <int W, int Step = 1>
inline void sum_lanes(typename Simd<W>::F *v) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  for (int i = 0; i < W / (2 * Step); i++)
    v[i] = halves<W, Step, 0>(v[2 * i], v[2 * i + 1], lanes) + halves<W, Step, 1>(v[2 * i], v[2 * i + 1], lanes);
  if constexpr (2 * Step < W) sum_lanes<W, 2 * Step>(v);
}

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
  return p.kept + (((row * chunks(p, Simd<W>::kSteps) + m) * blocks + channel / W) * p.states + walk.first) * W;
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
  static constexpr int kSteps = Simd<W>::kSteps;
  int steps;
  int64_t pixel[kSteps];
  float b[kSteps][kStates], c[kSteps][kStates];

  Chunk(const Problem &p, const Walk &walk, int64_t m, int64_t next, const float *outputs) {
    const int64_t length = p.height * p.width, channels = walk.end - walk.begin;
    steps = (int)std::min<int64_t>(kSteps, length - m * kSteps);
    for (int t = 0; t < steps; t++) {
      pixel[t] = pixel_at(p, walk, m * kSteps + t);
      std::copy_n(p.b + at(p.b_at, walk, pixel[t], walk.first), walk.count, b[t]);
      std::copy_n(p.c + at(p.c_at, walk, pixel[t], walk.first), walk.count, c[t]);
    }
    for (int64_t l = std::max<int64_t>(0, next * kSteps); l < std::min(length, (next + 1) * kSteps); l++) {
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
  const int64_t total = chunks(p, Simd<W>::kSteps);
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
  static constexpr int kSteps = Simd<W>::kSteps;
  typename Simd<W>::F h[kSteps + 1][kStates], decay[kSteps][kStates], db[kSteps][kStates], dc[kSteps][kStates];
  typename Simd<W>::F u[kSteps], dt[kSteps], slope[kSteps];
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
  for (int64_t m = chunks(p, Simd<W>::kSteps) - 1; m >= 0; m--) {
    const Chunk<W> chunk(p, walk, m, m - 1, p.dx);
    std::fill_n(&s.db[0][0], Simd<W>::kSteps * kStates, F{});
    std::fill_n(&s.dc[0][0], Simd<W>::kSteps * kStates, F{});
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
  const int64_t width = wide(*p) ? kWide : kNarrow, steps = kNumbers / width;
  const int64_t chunks = (p->height * p->width + steps - 1) / steps, blocks = (p->channels + width - 1) / width;
  return p->batch * kDirections * chunks * blocks * p->states * width;
}

void scan_forward(const Problem *p) { run(*p, wide(*p) ? unit<kWide, false> : unit<kNarrow, false>); }

void scan_backward(const Problem *p) { run(*p, wide(*p) ? unit<kWide, true> : unit<kNarrow, true>); }
}
