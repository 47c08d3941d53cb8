// Training: the c×c map, the block's parameters, and the sums over pixels, with their gradients.
#pragma once

#include "training_dfgb.h"
#include "training_gemm.h"

namespace {

// What the map of a head and its gradient need of a row of c scores; c is a multiple of 8.
template <class N>
class MapRow {
 public:
  using S = typename N::S;
  using V = typename N::V;

  MapRow(const Training& t, int64_t c)
      : c_(c), score_(t.score), thresholds_(t.thresholds), weights_(static_cast<const S*>(t.weights)), above_(c),
        positive_(c), step_(c), share_(t.thresholds) {
    for (int64_t n = 0; n < thresholds_; ++n) top_k_.push_back(S(t.top_k[n]));
  }

  // Σ_n W_n φ(T_{k_n}(A)).
  void map(const S* A, S* out) {
    prepare(A);
    for (int64_t j = 0; j < c_; j += N::L) store<N>(out + j, load<N>(&positive_[j]) * load<N>(&step_[j]));
  }

  // dA from the gradient of the map; adds to that of W_n.
  void gradient(const S* A, const S* d, S* dA, S* d_weights) {
    prepare(A);
    // with softmax over some entries, the share of each set and the mean of d over it
    const int64_t sets = std::max<int64_t>(thresholds_, 1);
    for (int64_t j = 0; j < c_; j += N::L) {
      const V a = load<N>(A + j), slope = score_ == RELU2 ? 2 * a : splat<N>(1);
      const V value = score_ == SOFTMAX ? load<N>(&positive_[j]) : a > 0 ? slope : splat<N>(0);
      store<N>(dA + j, load<N>(d + j) * value * load<N>(&step_[j]));
    }
    for (int64_t n = 0; n < sets; ++n) {
      if (!thresholds_ && score_ != SOFTMAX) break;
      V total = {};
      for (int64_t j = 0; j < c_; j += N::L)
        total += kept(n, j, load<N>(d + j) * load<N>(&positive_[j]));
      const S share = thresholds_ ? share_[n] : whole_, mean = sum<N>(total) * share;
      if (thresholds_) d_weights[n] += mean;
      if (score_ != SOFTMAX) continue;
      const S part = mean * share * (thresholds_ ? weights_[n] : 1);
      for (int64_t j = 0; j < c_; j += N::L)
        store<N>(dA + j, load<N>(dA + j) - kept(n, j, load<N>(&positive_[j]) * part));
    }
  }

 private:
  // v where the n-th threshold keeps an entry, which fewer than k others exceed.
  V kept(int64_t n, int64_t j, V v) const {
    return thresholds_ ? load<N>(&above_[j]) < top_k_[n] ? v : V{} : v;
  }

  void prepare(const S* A) {
    const S largest = score_ == SOFTMAX ? *std::max_element(A, A + c_) : 0;
    V total = {};
    for (int64_t j = 0; j < c_; j += N::L) {
      const V a = load<N>(A + j), relu = a < 0 ? V{} : a;
      V positive = score_ == RELU2 ? relu * relu : relu;
      if (score_ == SOFTMAX)
        for (int i = 0; i < N::L; ++i) positive[i] = std::exp(a[i] - largest);
      store<N>(&positive_[j], positive);
      total += positive;
    }
    whole_ = 1 / sum<N>(total);
    for (int64_t j = 0; j < c_; j += N::L) {
      const V own = load<N>(A + j);
      V above = {};
      if (thresholds_)
        for (int64_t i = 0; i < c_; ++i) above += A[i] > own ? splat<N>(1) : V{};
      store<N>(&above_[j], above);
      store<N>(&step_[j], thresholds_ ? V{} : splat<N>(score_ == SOFTMAX ? whole_ : 1));
    }
    for (int64_t n = 0; n < thresholds_; ++n) {
      share_[n] = 1;
      if (score_ == SOFTMAX) {
        V sums = {};
        for (int64_t j = 0; j < c_; j += N::L) sums += kept(n, j, load<N>(&positive_[j]));
        share_[n] = 1 / sum<N>(sums);
      }
      const V weight = splat<N>(weights_[n] * share_[n]);
      for (int64_t j = 0; j < c_; j += N::L) store<N>(&step_[j], load<N>(&step_[j]) + kept(n, j, weight));
    }
  }

  const int64_t c_, score_, thresholds_;
  const S* weights_;
  std::vector<S> above_, positive_, step_, share_, top_k_;
  S whole_ = 0;  // 1 / Σ positive
};

template <class S>
using Narrow = std::conditional_t<std::is_same_v<S, double>, D8, F8>;

template <class S>
constexpr S LEAST_SQUARES = S(1e-24);  // of a row of Q or K

// 1/norm of the rows of Q and of K.
template <class S>
std::vector<S> inverse_norms(const Training& t, const S* gram) {
  const int64_t C = t.channels;
  std::vector<S> result(2 * C);
  for (int64_t i = 0; i < 2 * C; ++i)
    result[i] = 1 / std::sqrt(std::max(gram[C * C / t.heads + i], LEAST_SQUARES<S>));
  return result;
}

// A = Q Kᵀ / α of row i of all heads, from `gram`.
template <class S>
void score_row(const Training& t, const S* gram, const std::vector<S>& inverse, int64_t i, S* A) {
  const int64_t C = t.channels, c = C / t.heads, head = i / c;
  const S scale = inverse[i] / static_cast<const S*>(t.temperature)[head];
  const S* k = inverse.data() + C + head * c;
  for (int64_t j = 0; j < c; ++j) A[j] = gram[i * c + j] * k[j] * scale;
}

// The maps, (C, c), of an image.
template <class S>
void sparse_maps(const Training& t, const S* gram, S* maps) {
  const int64_t c = t.channels / t.heads;
  const auto inverse = inverse_norms(t, gram);
  MapRow<Narrow<S>> row(t, c);
  std::vector<S> A(c);
  for (int64_t i = 0; i < t.channels; ++i) {
    score_row(t, gram, inverse, i, A.data());
    row.map(A.data(), maps + i * c);
  }
}

// The gradients of Q Kᵀ and of the sums of squares, laid out as `gram`, from those of the maps.
template <class S>
void maps_gradient(const Training& t, const S* gram, const S* d_maps, S* d_gram, S* d_temperature, S* d_weights) {
  const int64_t C = t.channels, c = C / t.heads;
  const S *q_squares = gram + C * c, *k_squares = q_squares + C;
  S *dq = d_gram + C * c, *dk = dq + C;
  std::fill(dq, dk + C, S(0));
  const auto inverse = inverse_norms(t, gram);
  MapRow<Narrow<S>> row(t, c);
  std::vector<S> A(c), dA(c);
  for (int64_t i = 0; i < C; ++i) {
    const int64_t head = i / c;
    const S alpha = static_cast<const S*>(t.temperature)[head], scale = inverse[i] / alpha;
    score_row(t, gram, inverse, i, A.data());
    row.gradient(A.data(), d_maps + i * c, dA.data(), d_weights);
    S along = 0;
    for (int64_t j = 0; j < c; ++j) {
      const S product = dA[j] * A[j];
      d_gram[i * c + j] = dA[j] * inverse[C + head * c + j] * scale;
      dk[head * c + j] -= product;
      along += product;
    }
    dq[i] = q_squares[i] >= LEAST_SQUARES<S> ? -along / (2 * q_squares[i]) : 0;
    d_temperature[head] -= along / alpha;
  }
  for (int64_t j = 0; j < C; ++j) dk[j] = k_squares[j] >= LEAST_SQUARES<S> ? dk[j] / (2 * k_squares[j]) : 0;
}

template <class S, class T>
struct Parameters {
  const T *in, *in_back;    // W_p for C → 4C and for 4C → C
  const T *out, *out_back;  // W_p'
  const S *norm_weight, *norm_bias;
  const S* depthwise;  // (9, 4C)
  const S* mask;       // (8, 5, C), as `inverse` takes it

  Parameters(const Training& t, Scratch& scratch) {
    const int64_t C = t.channels;
    const auto* W_in = static_cast<const S*>(t.project_in);
    const auto* W_out = static_cast<const S*>(t.project_out);
    T* packs = scratch.take<T>(10 * C * C);
    // Q and K, then V and U: a product each
    pack(packs, W_in, C, 2 * C, true);
    pack(packs + 2 * C * C, W_in + 2 * C * C, C, 2 * C, true);
    pack(packs + 4 * C * C, W_in, 4 * C, C, false);
    pack(packs + 8 * C * C, W_out, C, C, true);
    pack(packs + 9 * C * C, W_out, C, C, false);
    in = packs, in_back = packs + 4 * C * C, out = packs + 8 * C * C, out_back = packs + 9 * C * C;
    norm_weight = static_cast<const S*>(t.norm_weight);
    norm_bias = static_cast<const S*>(t.norm_bias);
    S* kernels = scratch.take<S>(9 * 4 * C);
    for (int64_t c = 0; c < 4 * C; ++c)
      for (int64_t i = 0; i < 9; ++i) kernels[i * 4 * C + c] = static_cast<const S*>(t.depthwise)[c * 9 + i];
    depthwise = kernels;
    mask = nullptr;
    if (t.gate != DFGB) return;
    // `irfft2` leaves the mean of ±u in the columns 0 and 4, and divides by 64.
    const auto* M = static_cast<const S*>(t.mask);
    S* folded = scratch.take<S>(BLOCK * HALF * C);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t u = 0; u < BLOCK; ++u)
        for (int64_t v = 0; v < HALF; ++v) {
          const int64_t other = v % 4 == 0 ? (BLOCK - u) % BLOCK : u;
          folded[(u * HALF + v) * C + c] =
              (M[(c * BLOCK + u) * HALF + v] + M[(c * BLOCK + other) * HALF + v]) / (2 * PIXELS);
        }
    mask = folded;
  }
};

// A thread's sums of the parameters' gradients.
template <class S>
struct Sums {
  S *project_in, *depthwise, *project_out, *norm, *mask, *temperature, *weights;
  int64_t size;

  Sums(const Training& t, Scratch& scratch) {
    const int64_t C = t.channels;
    const int64_t sizes[] = {4 * C * C, 9 * 4 * C, C * C, 2 * C, BLOCK * HALF * C, t.heads, t.thresholds};
    size = 0;
    for (const int64_t s : sizes) size += s;
    S* at = scratch.zeros<S>(size);
    S** parts[] = {&project_in, &depthwise, &project_out, &norm, &mask, &temperature, &weights};
    for (int i = 0; i < 7; ++i) *parts[i] = at, at += sizes[i];
  }
};

}  // namespace
