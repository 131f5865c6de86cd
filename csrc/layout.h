#pragma once
#include <cstdint>
#include <vector>

#include "planner.h"

namespace actial {

// `length` tokens, and for each whether it is a target.
struct Text {
    const std::int64_t* ids;
    const bool* trained;
    std::int64_t length;
};

// The grid of an image in merged tokens, and the row of the unique images' features where its own start.
struct Image {
    std::int64_t frames, rows, cols, feature;
    std::int64_t tokens() const { return frames * rows * cols; }
};

// A group's share of a micro-batch. positions: (3, prefix.length), or null to compute them. sample: number of the first sample.
struct Part {
    Text prefix;
    const std::int64_t* positions;
    std::vector<Image> images;
    std::vector<Text> suffixes;
    std::int64_t sample;
};

// rows: of prefix_rows + suffix_rows of parts whose suffixes have rows (groups of them), and of the other parts. segments: none is empty.
struct Sizes {
    std::int64_t rows, prefix_rows, suffix_rows, segments, groups, image_tokens, losses, samples;
};

// Where the layout goes; the comment gives the number of elements in terms of Sizes.
struct Buffers {
    std::int64_t* input_ids;     // rows
    std::int64_t* position_ids;  // 3 * rows
    std::int32_t* cu;            // segments + 1
    std::int32_t* cross_q;       // groups + 1
    std::int32_t* cross_k;       // groups + 1
    std::int64_t* image_slots;   // image_tokens
    std::int64_t* image_rows;    // image_tokens
    std::int64_t* loss_rows;     // losses
    std::int64_t* targets;       // losses
    std::int64_t* owner;         // losses
    std::int64_t* samples;       // samples
    std::int64_t* cu_loss;       // samples + 1
};

// Checks every part and counts. Throws RowError: an empty text, images and placeholders that disagree, a placeholder in a suffix.
Sizes measure(const std::vector<Part>& parts, std::int64_t image_token);

// Writes every element of the buffers. The parts have passed measure().
void fill(const std::vector<Part>& parts, std::int64_t image_token, const Sizes& sizes, const Buffers& buffers);

}  // namespace actial
