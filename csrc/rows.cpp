#include "rows.h"

#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

namespace actial {

namespace {

constexpr std::int64_t PART = 64;  // numbers that are summed before the next sum is begun: a token is looked for in one part alone

// The sum of n <= PART numbers in double precision.
inline double sum(const float* x, std::int64_t n) {
    double lanes[LANES] = {}, rest = 0;
    std::int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (std::int64_t j = 0; j < LANES; ++j) lanes[j] += x[i + j];
    for (; i < n; ++i) rest += x[i];
    return folded(lanes) + rest;
}

// Where the cumulative sum of weights passes `wanted`, which is below all of it; sums are those of the parts.
inline std::int64_t passed(const float* weights, std::int64_t n, const std::vector<double>& sums, double wanted) {
    double below = 0;
    std::int64_t part = 0, last = 0;
    while (part + 1 < static_cast<std::int64_t>(sums.size()) && below + sums[part] <= wanted) below += sums[part++];
    for (std::int64_t i = part * PART; i < std::min(n, (part + 1) * PART); ++i) {
        if (weights[i] == 0) continue;
        last = i;
        below += weights[i];
        if (below > wanted) break;
    }
    return last;  // a part summed in another order may end just short of `wanted`: then its last token that has a weight
}

}  // namespace

ACTIAL_CLONES void add_norm(float* x, const float* more, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out) {
    for (std::int64_t r = 0; r < rows; ++r) {
        float* row = x + r * width;
        if (more)
            for (std::int64_t i = 0; i < width; ++i) row[i] += more[r * width + i];
        float lanes[LANES] = {}, rest = 0;
        std::int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            for (std::int64_t j = 0; j < LANES; ++j) lanes[j] += row[i + j] * row[i + j];
        for (; i < width; ++i) rest += row[i] * row[i];
        const float scale = 1.0f / std::sqrt((folded(lanes) + rest) / static_cast<float>(width) + eps);
        for (i = 0; i < width; ++i) out[r * width + i] = row[i] * scale * weight[i];
    }
}

ACTIAL_CLONES void gated(const float* x, std::int64_t rows, std::int64_t width, float* out) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const float *a = x + 2 * r * width, *b = a + width;
        for (std::int64_t i = 0; i < width; ++i) {
            const float small = exponential(-std::fabs(a[i]));
            out[r * width + i] = a[i] * ((a[i] < 0 ? small : 1.0f) / (1.0f + small)) * b[i];
        }
    }
}

ACTIAL_CLONES void draw(const Drawing& given, const float* logits, std::int64_t* token, float* logp) {
    const std::int64_t V = given.vocabulary, parts = (V + PART - 1) / PART;
    const float inverse = 1.0f / given.temperature;
    std::vector<float> weights(V), others(std::max<std::int64_t>(given.bans, 1));
    std::vector<double> sums(parts);
    std::vector<std::int64_t> first(given.rows, -1), next(given.replies);  // the replies of each row
    for (std::int64_t w = given.replies - 1; w >= 0; --w) {
        next[w] = first[given.row[w]];
        first[given.row[w]] = w;
    }
    for (std::int64_t r = 0; r < given.rows; ++r) {
        const float* row = logits + r * V;
        std::copy(row, row + V, weights.begin());
        for (std::int64_t b = 0; b < given.bans; ++b) {
            others[b] = row[given.banned[b]];
            weights[given.banned[b]] = -std::numeric_limits<float>::infinity();
        }
        const float most = largest(weights.data(), V);
        const std::int64_t likeliest = given.uniforms ? 0 : std::find(weights.begin(), weights.end(), most) - weights.begin();
        for (std::int64_t i = 0; i < V; ++i) weights[i] = exponential((weights[i] - most) * inverse);
        double allowed = 0, rest = 0;
        for (std::int64_t p = 0; p < parts; ++p) {
            sums[p] = sum(weights.data() + p * PART, std::min(PART, V - p * PART));
            allowed += sums[p];
        }
        const float peak = given.bans ? std::max(most, largest(others.data(), given.bans)) : most;
        for (std::int64_t b = 0; b < given.bans; ++b) others[b] = exponential((others[b] - peak) * inverse);
        for (std::int64_t b = 0; b < given.bans; b += PART) rest += sum(others.data() + b, std::min(PART, given.bans - b));
        const double all = std::log(allowed * std::exp((static_cast<double>(most) - peak) * inverse) + rest);
        for (std::int64_t w = first[r]; w >= 0; w = next[w]) {
            std::int64_t found = std::min(likeliest, V - 1);
            if (given.uniforms) found = passed(weights.data(), V, sums, std::min(given.uniforms[w] * allowed, std::nextafter(allowed, 0.0)));
            token[w] = found;
            logp[w] = static_cast<float>((static_cast<double>(row[found]) - peak) * inverse - all);
        }
    }
}

}  // namespace actial
