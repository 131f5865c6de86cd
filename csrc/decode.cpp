// Attention of a decoding step, one pass over each row's keys and one over its values.
//
//     out = sum_t p_t v_t / sum_t p_t,   p_t = exp(q k_t scale - max),   t over the prompt's tokens and the reply's own
//
// A prompt's keys are laid out once for all its rows, dimension by dimension, so that scores of neighbouring tokens are computed side by
// side; each score, and each sum over tokens, runs in one order whatever the machine's vectors, and whatever else is decoded.
#include "decode.h"

#include <vector>

#include "lanes.h"

namespace actial {

namespace {

constexpr std::int64_t TILE = 32;  // tokens whose scores are computed side by side

// Rotary position embedding: x cos + (-second half, first half) sin, times scale.
inline void turn(const float* __restrict x, const float* cos, const float* sin, float scale, std::int64_t dim, float* __restrict out) {
    const std::int64_t half = dim / 2;
    for (std::int64_t d = 0; d < half; ++d) {
        out[d] = (x[d] * cos[d] - x[d + half] * sin[d]) * scale;
        out[d + half] = (x[d + half] * cos[d + half] + x[d] * sin[d + half]) * scale;
    }
}

// scores (total,) of a query (D,) over keys (D, width), width and the memory of scores multiples of TILE.
inline void score(const float* query, const float* across, std::int64_t dim, std::int64_t width, std::int64_t total, float* scores) {
    for (std::int64_t t = 0; t < total; t += TILE) {
        Eight sums[TILE / LANES] = {};
        for (std::int64_t d = 0; d < dim; ++d) accumulate(sums, query[d], across + d * width + t);
        std::memcpy(scores + t, sums, sizeof sums);
    }
}

// 8 N dimensions of the weighted sum of values, each `at` numbers on.
template <std::int64_t N>
inline void weigh(const float* weights, const float* values, const std::int64_t* at, std::int64_t total, float* out) {
    Eight sums[N] = {};
    for (std::int64_t t = 0; t < total; ++t) accumulate(sums, weights[t], values + at[t]);
    std::memcpy(out, sums, sizeof sums);
}

// All D dimensions of it.
inline void weigh(const float* weights, const float* values, const std::int64_t* at, std::int64_t total, std::int64_t dim, float* out) {
    std::int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) weigh<4>(weights, values + d, at, total, out + d);
    const std::int64_t rest = (dim - d) / LANES;
    if (rest == 3) weigh<3>(weights, values + d, at, total, out + d);
    if (rest == 2) weigh<2>(weights, values + d, at, total, out + d);
    if (rest == 1) weigh<1>(weights, values + d, at, total, out + d);
    for (d += rest * LANES; d < dim; ++d) {
        out[d] = 0;
        for (std::int64_t t = 0; t < total; ++t) out[d] += weights[t] * values[at[t] + d];
    }
}

}  // namespace

ACTIAL_CLONES void decode_step(const StepSizes& sizes, const StepReads& reads, const float* qkv, const float* cos, const float* sin,
                 float scale, float* keys, float* values, float* out) {
    const std::int64_t D = sizes.dim, K = sizes.kv_heads, share = sizes.heads / K, token = K * D, queries = sizes.heads * D, row = queries + 2 * token;
    for (std::int64_t w = 0; w < sizes.replies; ++w) {
        const std::int64_t r = reads.row[w];
        float* key = keys + reads.slots[w] * token;
        for (std::int64_t h = 0; h < K; ++h) turn(qkv + r * row + queries + h * D, cos + r * D, sin + r * D, 1.0f, D, key + h * D);
        std::memcpy(values + reads.slots[w] * token, qkv + r * row + queries + token, token * sizeof(float));
    }
    std::vector<float> query(D), scores, across;
    std::vector<std::int64_t> at;  // where each token's key begins in `keys`, and its value in `values`
    for (std::int64_t g = 0; g < sizes.groups; ++g) {
        const std::int64_t prefix = reads.prefix_tokens[g];
        std::int64_t most = 0;
        for (std::int64_t m = 0; m < sizes.members; ++m) {
            const std::int64_t r = reads.members[g * sizes.members + m];
            if (r >= 0) most = std::max<std::int64_t>(most, reads.own_tokens[r]);
        }
        const std::int64_t width = (prefix + most + TILE - 1) / TILE * TILE;
        at.resize(width);
        scores.resize(width);
        across.assign(K * D * width, 0.0f);
        const auto place = [&](std::int64_t t, std::int64_t block, std::int64_t within) {
            at[t] = (block * sizes.block + within) * token;
            for (std::int64_t d = 0; d < token; ++d) across[d * width + t] = keys[at[t] + d];
        };
        for (std::int64_t t = 0; t < prefix; ++t)
            place(t, reads.prefix_table[g * sizes.prefix_blocks + t / sizes.block], t % sizes.block);
        for (std::int64_t m = 0; m < sizes.members; ++m) {
            const std::int64_t r = reads.members[g * sizes.members + m];
            if (r < 0) continue;
            const std::int64_t total = prefix + reads.own_tokens[r];
            for (std::int64_t t = 0; t < reads.own_tokens[r]; ++t)
                place(prefix + t, reads.own_table[r * sizes.own_blocks + t / sizes.block], t % sizes.block);
            for (std::int64_t h = 0; h < sizes.heads; ++h) {
                const std::int64_t within = h / share * D;
                turn(qkv + r * row + h * D, cos + r * D, sin + r * D, scale, D, query.data());
                score(query.data(), across.data() + within * width, D, width, total, scores.data());
                const float most_of_all = largest(scores.data(), total);
                for (std::int64_t t = 0; t < total; ++t) scores[t] = exponential(scores[t] - most_of_all);
                float lanes[LANES] = {}, sum = 0;
                std::int64_t t = 0;
                for (; t + LANES <= total; t += LANES)
                    for (std::int64_t j = 0; j < LANES; ++j) lanes[j] += scores[t + j];
                for (; t < total; ++t) sum += scores[t];
                const float part = 1.0f / (folded(lanes) + sum);
                float* to = out + (r * sizes.heads + h) * D;
                weigh(scores.data(), values + within, at.data(), total, D, to);
                for (std::int64_t d = 0; d < D; ++d) to[d] *= part;
            }
        }
    }
}

}  // namespace actial
