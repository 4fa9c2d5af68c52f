// separable_attention: the layer branch of MobileViTv2 with its norm and residual, x + W_o(ReLU(W_v n + b_v) * context) + b_o.
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
};

// The parameters, packed once for a version of them; the norm is part of score, key and value (identity C of the design).
struct SeparableAttentionWeights {
  Scratch<float> score, key_bias, value_bias, out_bias;
  float score_bias;
  PackedWeight key, value, out;

  // `qkv` holds the score, the keys and the values, (1 + 2D, D); `out` is (D, D).
  SeparableAttentionWeights(const NormLinearParameters& qkv, const FloatMatrix& out, const std::optional<Tensor>& out_bias);

 private:
  SeparableAttentionWeights(
      const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out_weight, const std::optional<Tensor>& out_bias, int64_t channels);
};

// What the forward pass leaves for the backward pass, with L = lanes: mean and 1 / deviation of each sample or token; the softmax of the
// scores (samples, positions, patches), null where nobody wants it; and for each position the weighted mean of the normalised tokens and
// the context, (samples, positions, L).
struct SeparableAttentionKept {
  float *mean, *rstd, *scores, *pooled, *context;
};

struct SeparableAttentionDropout {
  Dropout score, output;

  SeparableAttentionDropout() = default;
  SeparableAttentionDropout(double score, double output, const std::optional<Tensor>& seed)
      : score("attention_dropout", score, seed, 0), output("output_dropout", output, seed, 1) {}
};

// For float, BFloat16 and Float16. Allocates nothing after the first call of a size.
template <typename T>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeights& weights, const SeparableAttentionDropout& dropout, const T* x,
    T* y, const SeparableAttentionKept& kept);

// The same where no backward pass follows.
template <typename T>
void separable_attention(const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeights& weights, const T* x, T* y);

}  // namespace mvit3
