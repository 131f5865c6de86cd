#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "planner.h"

namespace actial {

// What is left in an open micro-batch; of two with as many patches and tokens left, the first is greater.
struct Open {
    std::int64_t patches, tokens, bin;
    bool operator<(const Open& other) const {
        if (patches != other.patches) return patches < other.patches;
        if (tokens != other.tokens) return tokens < other.tokens;
        return bin > other.bin;
    }
};

// Open micro-batches in buckets of (nearly) the same number of tokens left, most patches left on top, and over the buckets a tree of
// maxima: the lowest bucket whose top holds an item is found in the logarithm of the number of buckets.
class Space {
  public:
    explicit Space(Capacity capacity) : unit_(capacity.tokens / kBuckets + 1), heaps_(capacity.tokens / unit_ + 1), leaves_(1) {
        while (leaves_ < static_cast<std::int64_t>(heaps_.size())) leaves_ *= 2;
        most_.assign(2 * leaves_, -1);
    }

    void add(const Open& open) {
        const std::int64_t bucket = open.tokens / unit_;
        heaps_[bucket].push_back(open);
        std::push_heap(heaps_[bucket].begin(), heaps_[bucket].end());
        update(bucket);
    }

    // Takes out the tightest micro-batch that holds the item; bin is -1 when there is none.
    Open take(std::int64_t tokens, std::int64_t patches) {
        std::int64_t bucket = tokens / unit_;
        const bool first = !heaps_[bucket].empty() && heaps_[bucket].front().tokens >= tokens && heaps_[bucket].front().patches >= patches;
        if (!first) bucket = above(bucket, patches);
        if (bucket < 0) return {0, 0, -1};
        std::pop_heap(heaps_[bucket].begin(), heaps_[bucket].end());
        const Open found = heaps_[bucket].back();
        heaps_[bucket].pop_back();
        update(bucket);
        return found;
    }

  private:
    void update(std::int64_t bucket) {
        std::int64_t i = leaves_ + bucket;
        most_[i] = heaps_[bucket].empty() ? -1 : heaps_[bucket].front().patches;
        for (i /= 2; i > 0; i /= 2) {
            const std::int64_t most = std::max(most_[2 * i], most_[2 * i + 1]);
            if (most_[i] == most) return;
            most_[i] = most;
        }
    }

    // The lowest bucket above this one with a micro-batch that has so many patches left, or -1.
    std::int64_t above(std::int64_t bucket, std::int64_t patches) const {
        std::int64_t i = leaves_ + bucket;
        while (i > 1 && (i % 2 || most_[i + 1] < patches)) i /= 2;
        if (i <= 1) return -1;
        for (++i; i < leaves_;) {
            i *= 2;
            if (most_[i] < patches) ++i;
        }
        return i - leaves_;
    }

    static constexpr std::int64_t kBuckets = 1 << 16;
    std::int64_t unit_;
    std::vector<std::vector<Open>> heaps_;
    std::int64_t leaves_;
    std::vector<std::int64_t> most_;
};

}  // namespace actial
