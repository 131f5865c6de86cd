// Python bindings of the host code. Arguments are checked here; the functions below it take plain buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "patchify.h"

namespace py = pybind11;

namespace {

using Pixels = py::array_t<std::uint8_t, py::array::c_style>;
using Triple = std::array<float, 3>;

py::array_t<float> patchify(const Pixels& image, std::int64_t patch, std::int64_t merge, std::int64_t frames, Triple scale, Triple shift) {
    if (image.ndim() != 3 || image.shape(2) != 3) throw py::value_error("image: expected uint8 (H, W, 3)");
    const std::int64_t factor = patch * merge;
    if (patch < 1 || merge < 1 || frames < 1) throw py::value_error("patch, merge and frames must be at least 1");
    if (image.shape(0) % factor || image.shape(1) % factor || image.size() == 0) {
        throw py::value_error("image: height and width must be positive multiples of patch * merge = " + std::to_string(factor) +
                              "; resize it first");
    }
    const actial::PatchGrid grid{image.shape(0) / patch, image.shape(1) / patch, patch, merge, frames};
    py::array_t<float> out({grid.rows * grid.cols, 3 * frames * patch * patch});
    const std::uint8_t* in = image.data();
    float* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        actial::patchify(in, grid, scale.data(), shift.data(), to);
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "actial_fast host code";
    m.def("patchify", &patchify, py::arg("image").noconvert(), py::arg("patch"), py::arg("merge"), py::arg("frames"), py::arg("scale"),
          py::arg("shift"));
}
