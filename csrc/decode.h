// One decoding step of one layer on the CPU: new tokens' queries over keys and values in blocks.
#pragma once

#include <cstdint>

namespace actial {

// W replies in R rows, H query heads, K key-value heads (K divides H), D dimensions (even), S tokens a block, G prompts of up to M rows each.
struct StepSizes {
    std::int64_t replies, rows, heads, kv_heads, dim, block, groups, members, own_blocks, prefix_blocks;
};

// Where keys and values go, and what a row reads: its own reply's blocks and its prompt's. Replies that are the same so far share a row, and
// each keeps its key and value. members (G, M), -1 where a prompt has fewer rows.
struct StepReads {
    const std::int64_t* slots;         // (W,) block * S + place: where a reply's key and value go
    const std::int64_t* row;           // (W,) a reply's row
    const std::int32_t* own_table;     // (R, own_blocks)
    const std::int32_t* own_tokens;    // (R,) the new one among them
    const std::int32_t* members;       // (G, M)
    const std::int32_t* prefix_table;  // (G, prefix_blocks)
    const std::int32_t* prefix_tokens; // (G,)
};

// qkv (R, (H + 2 K) D), a row's queries, keys and values one behind the other, cos and sin (R, D) -> out (R, H D). Queries and keys are turned by their positions first; keys and
// values (blocks, S, K, D) get the rows' own before any is read.
void decode_step(const StepSizes& sizes, const StepReads& reads, const float* qkv, const float* cos, const float* sin, float scale,
                 float* keys, float* values, float* out);

}  // namespace actial
