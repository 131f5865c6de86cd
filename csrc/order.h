#pragma once
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace actial {

// Splitmix64: a number for each position.
inline std::uint64_t mixed(std::uint64_t seed, std::int64_t position) {
    std::uint64_t x = seed + 0x9e3779b97f4a7c15ULL * static_cast<std::uint64_t>(position);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

// 0 ... count - 1 in an order that the seed decides: the order of groups of equal size, as sort_falling is stable.
inline std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed) {
    std::vector<std::int64_t> out(count);
    for (std::int64_t i = 0; i < count; ++i) out[i] = i;
    for (std::int64_t i = count - 1; i > 0; --i) {
        std::swap(out[i], out[static_cast<std::int64_t>(mixed(seed, i) % static_cast<std::uint64_t>(i + 1))]);
    }
    return out;
}

// Sorts by falling `bits`, by digits, lowest first; digits in which no two differ are skipped.
template <class T>
void sort_falling(std::vector<T>& values) {
    constexpr int kDigit = 11;
    constexpr std::uint64_t kMask = (1 << kDigit) - 1;
    std::uint64_t differ = 0;
    for (const T& value : values) differ |= value.bits ^ values[0].bits;
    std::vector<T> sorted(values.size());
    for (int shift = 0; shift < 64; shift += kDigit) {
        if (!(differ >> shift & kMask)) continue;
        std::array<std::size_t, kMask + 2> next{};
        for (const T& value : values) ++next[(~value.bits >> shift & kMask) + 1];
        for (std::size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
        for (const T& value : values) sorted[next[~value.bits >> shift & kMask]++] = value;
        values.swap(sorted);
    }
}

}  // namespace actial
