#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace actial {

// A mistake in the data of one row; the bindings put the row's name before the message.
struct RowError : std::invalid_argument {
    RowError(std::int64_t index, const std::string& what) : std::invalid_argument(what), row(index) {}
    std::int64_t row;
};

// Group g has prefix[g] tokens, suffixes of suffix[offsets[g]] ... suffix[offsets[g + 1] - 1] tokens, and patches[g] vision patches.
struct Groups {
    const std::int64_t *prefix, *suffix, *offsets, *patches;
    std::int64_t count;
};

// What one micro-batch holds at most, both in 1 ... 2**31 - 1.
struct Capacity {
    std::int64_t tokens, patches;
};

// Cost of a micro-batch = linear * tokens + quadratic * attention pairs + vision * patches + constant.
struct Costs {
    double linear, quadratic, vision, constant;
};

// Suffixes first ... end - 1 of a group after its prefix; a plain sequence is (group, 0, 0).
struct Piece {
    std::int64_t group;
    std::int32_t first, end, tokens, patches;
    double cost;
};

// Micro-batch i of rank r holds pieces offsets[r * per_rank + i] ... offsets[r * per_rank + i + 1] - 1, in the order of their groups.
struct Plan {
    std::int64_t per_rank;
    std::vector<Piece> pieces;
    std::vector<std::int64_t> offsets;
};

// Balances groups over ranks by cost, then packs those of each rank into micro-batches. Throws RowError when a row fits nowhere.
Plan plan(const Groups& groups, Capacity capacity, Costs costs, std::int64_t ranks, std::uint64_t seed);

}  // namespace actial
