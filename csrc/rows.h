// What a decoding step does to rows between its matrix products, on the CPU: norms, gates, and the drawing of tokens.
#pragma once

#include <cstdint>

namespace actial {

// x (R, H) += more, unless that is null; out = x / sqrt(mean(x^2) + eps) * weight, by rows; weight (H,).
void add_norm(float* x, const float* more, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out);

// out (R, I) = silu(gate) up, x (R, 2 I) with a row's gate and up one behind the other.
void gated(const float* x, std::int64_t rows, std::int64_t width, float* out);

// One token for each of W replies from its row of logits (R, V), and its log-prob under softmax(logits / temperature). row (W,): a reply's;
// uniforms (W,) in [0, 1), or null for the likeliest token; banned: ids that are never drawn, though the log-prob counts them.
struct Drawing {
    std::int64_t replies, rows, vocabulary, bans;
    const std::int64_t *row, *banned;
    const double* uniforms;
    float temperature;
};
void draw(const Drawing& given, const float* logits, std::int64_t* token, float* logp);

}  // namespace actial
