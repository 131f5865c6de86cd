// uint8 image -> normalised float32 patches in Qwen2-VL's merge order, on plain buffers.
//
// Row r of the output is one patch; rows run over (gh/m, gw/m, m, m) so that the m*m patches that the vision merger joins are
// adjacent. A row is (C, T, p, p) with the single frame repeated T times. One read of the image, one write of the patches.
#include "patchify.h"

#include <cstring>

namespace actial {

void patchify(const std::uint8_t* image, const PatchGrid& grid, const float* scale, const float* shift, float* out) {
    const std::int64_t p = grid.patch, m = grid.merge, frame = p * p, width = grid.cols * p;
    const std::int64_t row_floats = 3 * grid.frames * frame;
    for (std::int64_t block_y = 0; block_y < grid.rows / m; ++block_y) {
        for (std::int64_t block_x = 0; block_x < grid.cols / m; ++block_x) {
            for (std::int64_t in_y = 0; in_y < m; ++in_y) {
                for (std::int64_t in_x = 0; in_x < m; ++in_x, out += row_floats) {
                    const std::int64_t top = (block_y * m + in_y) * p, left = (block_x * m + in_x) * p;
                    for (std::int64_t c = 0; c < 3; ++c) {
                        float* first = out + c * grid.frames * frame;
                        for (std::int64_t y = 0; y < p; ++y) {
                            const std::uint8_t* pixels = image + ((top + y) * width + left) * 3 + c;
                            for (std::int64_t x = 0; x < p; ++x) first[y * p + x] = pixels[3 * x] * scale[c] + shift[c];
                        }
                        for (std::int64_t t = 1; t < grid.frames; ++t) {
                            std::memcpy(first + t * frame, first, frame * sizeof(float));
                        }
                    }
                }
            }
        }
    }
}

}  // namespace actial
