// Loops that vectorise: sums run over eight lanes in a fixed order, so a result does not depend on the width of the machine's vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define ACTIAL_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define ACTIAL_CLONES
#endif

namespace actial {

constexpr std::int64_t LANES = 8;

// exp(x) for x <= 0 to about two units in the last place (Cody-Waite reduction, a polynomial of degree 6); 0 below about -87.7, where other
// implementations take their time over numbers that are as good as none. Without a branch, so that loops over it vectorise.
inline float exponential(float x) {
    const float a = x > -88.0f ? x : -88.0f;
    const std::int32_t whole = static_cast<std::int32_t>(a * 1.44269504f - 0.5f);  // at least -127, whose power is 0
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
    return p * power;
}

// Eight numbers side by side, which stay in a register from one round of a loop to the next; arrays would not, with some compilers.
#if defined(__GNUC__) && !defined(ACTIAL_PLAIN)
using Eight = float __attribute__((vector_size(LANES * sizeof(float))));
#else
struct Eight {
    float x[LANES];
    float& operator[](std::int64_t i) { return x[i]; }
};
inline Eight operator*(float scale, Eight y) {
    for (float& x : y.x) x *= scale;
    return y;
}
inline void operator+=(Eight& to, const Eight& y) {
    for (std::int64_t i = 0; i < LANES; ++i) to.x[i] += y.x[i];
}
#endif

// sums[i] += scale * x[8 i .. 8 i + 7].
template <std::int64_t N>
inline void accumulate(Eight (&sums)[N], float scale, const float* x) {
    for (std::int64_t i = 0; i < N; ++i) {
        Eight next;
        std::memcpy(&next, x + i * LANES, sizeof next);
        sums[i] += scale * next;
    }
}

// The largest of n numbers, n at least 1.
inline float largest(const float* x, std::int64_t n) {
    float lanes[LANES];
    std::fill(lanes, lanes + LANES, x[0]);
    std::int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (std::int64_t j = 0; j < LANES; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (std::int64_t j = 1; j < LANES; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    return lanes[0];
}

// The sum of eight numbers.
template <class T>
inline T folded(const T* lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

}  // namespace actial
