// separable_attention: the layer branch of MobileViTv2 with its norm and residual, x + W_o(ReLU(W_v n + b_v) * context)
// + b_o.
#pragma once

#include "norm_linear.h"
#include "random.h"

namespace mvit3 {

// `samples` maps of height x width tokens. Tokens that share their position inside a patch attend to each other.
struct PatchedMap {
  int64_t samples, height, width, channels, patch_height, patch_width;

  int64_t tokens() const { return height * width; }
  int64_t positions() const { return patch_height * patch_width; }
  int64_t patches() const { return tokens() / positions(); }
  int64_t lanes() const { return lanes_of(channels); }
  int64_t norms(bool per_sample) const { return per_sample ? samples : samples * tokens(); }
};

// The parameters, packed once for a version of them; the norm is part of score, key and value (identity C of the
// design). The products of all tokens are made of E, those of the values of V: a value that is rounded before ReLU may
// change its sign, which costs its whole gradient. Keys meet a few means alone.
template <typename E, typename V = E>
struct SeparableAttentionWeightsOf {
  Scratch<float> score, key_bias, value_bias, out_bias;
  float score_bias;
  PackedWeight key;
  PackedWeightOf<V> value;
  PackedWeightOf<E> out;

  // `qkv` holds the score, the keys and the values, (1 + 2D, D); `out` is (D, D).
  SeparableAttentionWeightsOf(
      const NormLinearParameters& qkv, const FloatMatrix& out, const std::optional<Tensor>& out_bias);

 private:
  SeparableAttentionWeightsOf(
      const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out_weight,
      const std::optional<Tensor>& out_bias, int64_t channels);
};

// Of an op whose maps are T.
template <typename T>
using SeparableAttentionWeights = SeparableAttentionWeightsOf<Multiplied<T>, float>;

// What the forward pass leaves for the backward pass, with L = lanes: mean and 1 / deviation of each sample or token;
// the softmax of the scores (samples, positions, patches), null where nobody wants it; and for each position the
// weighted mean of the normalised tokens and the context, (samples, positions, L).
struct SeparableAttentionKept {
  float *mean, *rstd, *scores, *pooled, *context;
};

struct SeparableAttentionDropout {
  Dropout score, output;

  SeparableAttentionDropout() = default;
  explicit SeparableAttentionDropout(const DropoutArguments& a)
      : score("attention_dropout", a.first, a.seed, 0), output("output_dropout", a.output, a.seed, 1) {}
};

// For float, BFloat16 and Float16 as an op has them; for float also of products of BFloat16. Allocates nothing after
// the first call of a size.
template <typename T, typename E, typename V>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E, V>& weights,
    const SeparableAttentionDropout& dropout, const T* x, T* y, const SeparableAttentionKept& kept);

// The same where no backward pass follows.
template <typename T, typename E, typename V>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E, V>& weights, const T* x,
    T* y);

// The parallel loops of such a call.
template <typename E, typename V>
std::vector<Region> separable_attention_regions(
    const PatchedMap& map, const SeparableAttentionWeightsOf<E, V>& weights);

}  // namespace mvit3
