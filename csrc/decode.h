// One decoding step of one layer on the CPU: new tokens' queries over keys and values in blocks.
#pragma once

#include <cstdint>

namespace actial {

// R rows, H query heads, K key-value heads (K divides H), D dimensions (even), S tokens a block, G prompts of up to M rows each.
struct StepSizes {
    std::int64_t rows, heads, kv_heads, dim, block, groups, members, own_blocks, prefix_blocks;
};

// What a row reads: its own reply's blocks and its prompt's. members (G, M), -1 where a prompt has fewer rows.
struct StepReads {
    const std::int64_t* slots;         // (R,) block * S + place: where the row's key and value go
    const std::int32_t* own_table;     // (R, own_blocks)
    const std::int32_t* own_tokens;    // (R,) the new one among them
    const std::int32_t* members;       // (G, M)
    const std::int32_t* prefix_table;  // (G, prefix_blocks)
    const std::int32_t* prefix_tokens; // (G,)
};

// q (R, H, D), k and v (R, K, D), cos and sin (R, D) -> out (R, H, D). Queries and keys are turned by their positions first; keys and
// values (blocks, S, K, D) get the rows' own before any is read.
void decode_step(const StepSizes& sizes, const StepReads& reads, const float* q, const float* k, const float* v, const float* cos,
                 const float* sin, float scale, float* keys, float* values, float* out);

}  // namespace actial
