#pragma once
#include <cstdint>

namespace actial {

// The patch grid of one image: rows x cols patches of patch x patch pixels, merged in squares of merge x merge, repeated over frames.
struct PatchGrid {
    std::int64_t rows, cols, patch, merge, frames;
};

// image: (rows*patch, cols*patch, 3) uint8, C order. scale, shift: 3 floats; a value v of channel c becomes v * scale[c] + shift[c].
// out: (rows*cols, 3*frames*patch*patch) float32, every element written. rows and cols are multiples of merge.
void patchify(const std::uint8_t* image, const PatchGrid& grid, const float* scale, const float* shift, float* out);

}  // namespace actial
