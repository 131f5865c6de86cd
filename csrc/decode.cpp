// Attention of a decoding step, one pass over each row's keys and one over its values; keys of a prompt stay in the cache for all its rows.
//
//     out = sum_t p_t v_t / sum_t p_t,   p_t = exp(q k_t scale - max),   t over the prompt's tokens and the reply's own
//
// Sums run over eight lanes in a fixed order, so a result does not depend on the width of the machine's vectors.
#include "decode.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define ACTIAL_CLONES __attribute__((target_clones("default", "avx2")))
#else
#define ACTIAL_CLONES
#endif

namespace actial {

namespace {

constexpr std::int64_t LANES = 8;

// exp(x) for x <= 0 to about two units in the last place (Cody-Waite reduction, a polynomial of degree 6); 0 below -87.
inline void exponentials(float* x, std::int64_t n, float shift) {
    for (std::int64_t i = 0; i < n; ++i) {
        const float a = std::max(x[i] - shift, -87.0f);
        const std::int32_t whole = static_cast<std::int32_t>(a * 1.44269504f - 0.5f);
        const float w = static_cast<float>(whole);
        const float r = (a - w * 0.693359375f) + w * 2.12194440e-4f;
        float p = 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const std::int32_t bits = (whole + 127) << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        x[i] = x[i] - shift < -87.0f ? 0.0f : p * power;
    }
}

inline float dot(const float* a, const float* b, std::int64_t n) {
    float lanes[LANES] = {};
    std::int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (std::int64_t j = 0; j < LANES; ++j) lanes[j] += a[i + j] * b[i + j];
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])) + rest;
}

inline void add(float* to, const float* from, float weight, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] += weight * from[i];
}

// Rotary position embedding: x cos + (-second half, first half) sin, times scale.
inline void turn(const float* x, const float* cos, const float* sin, float scale, std::int64_t dim, float* out) {
    const std::int64_t half = dim / 2;
    for (std::int64_t d = 0; d < half; ++d) {
        out[d] = (x[d] * cos[d] - x[d + half] * sin[d]) * scale;
        out[d + half] = (x[d + half] * cos[d + half] + x[d] * sin[d + half]) * scale;
    }
}

}  // namespace

ACTIAL_CLONES void decode_step(const StepSizes& sizes, const StepReads& reads, const float* q, const float* k, const float* v, const float* cos,
                 const float* sin, float scale, float* keys, float* values, float* out) {
    const std::int64_t D = sizes.dim, K = sizes.kv_heads, share = sizes.heads / K, token = K * D;
    for (std::int64_t r = 0; r < sizes.rows; ++r) {
        float* key = keys + reads.slots[r] * token;
        for (std::int64_t h = 0; h < K; ++h) turn(k + r * token + h * D, cos + r * D, sin + r * D, 1.0f, D, key + h * D);
        std::memcpy(values + reads.slots[r] * token, v + r * token, token * sizeof(float));
    }
    std::vector<float> query(D);
    std::vector<float> scores;
    std::vector<const float*> at;  // where each token's key begins; its value is as far into `values`
    for (std::int64_t g = 0; g < sizes.groups; ++g) {
        const std::int64_t prefix = reads.prefix_tokens[g];
        at.resize(prefix);
        for (std::int64_t t = 0; t < prefix; ++t) {
            const std::int64_t block = reads.prefix_table[g * sizes.prefix_blocks + t / sizes.block];
            at[t] = keys + (block * sizes.block + t % sizes.block) * token;
        }
        for (std::int64_t m = 0; m < sizes.members; ++m) {
            const std::int64_t r = reads.members[g * sizes.members + m];
            if (r < 0) continue;
            const std::int64_t total = prefix + reads.own_tokens[r];
            at.resize(total);
            for (std::int64_t t = 0; t < reads.own_tokens[r]; ++t) {
                const std::int64_t block = reads.own_table[r * sizes.own_blocks + t / sizes.block];
                at[prefix + t] = keys + (block * sizes.block + t % sizes.block) * token;
            }
            scores.resize(total);
            for (std::int64_t h = 0; h < sizes.heads; ++h) {
                const std::int64_t within = h / share * D;
                turn(q + (r * sizes.heads + h) * D, cos + r * D, sin + r * D, scale, D, query.data());
                for (std::int64_t t = 0; t < total; ++t) scores[t] = dot(query.data(), at[t] + within, D);
                exponentials(scores.data(), total, *std::max_element(scores.begin(), scores.end()));
                float sum = 0;
                float* to = out + (r * sizes.heads + h) * D;
                std::fill(to, to + D, 0.0f);
                for (std::int64_t t = 0; t < total; ++t) {
                    sum += scores[t];
                    add(to, values + (at[t] - keys) + within, scores[t], D);
                }
                for (std::int64_t d = 0; d < D; ++d) to[d] /= sum;
            }
        }
    }
}

}  // namespace actial
