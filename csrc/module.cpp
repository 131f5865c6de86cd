// Python bindings of the host code. Arguments are checked here; the functions below it take plain buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "decode.h"
#include "layout.h"
#include "patchify.h"
#include "planner.h"
#include "rows.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
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

template <class T>
using Exact = py::array_t<T, py::array::c_style>;
// keys and values are written in place, so nothing here may be a converted copy (noconvert); shapes are the caller's to keep.
py::array_t<float> decode_step(const Exact<float>& qkv, const Exact<float>& cos, const Exact<float>& sin, Exact<float> keys,
                               Exact<float> values, const Exact<std::int64_t>& slots, const Exact<std::int64_t>& row, const Exact<std::int32_t>& own_table,
                               const Exact<std::int32_t>& own_tokens, const Exact<std::int32_t>& members,
                               const Exact<std::int32_t>& prefix_table, const Exact<std::int32_t>& prefix_tokens, float scale) {
    if (qkv.ndim() != 2 || keys.ndim() != 4 || own_table.ndim() != 2 || members.ndim() != 2 || prefix_table.ndim() != 2) {
        throw py::value_error("decode_step: expected qkv (R, (H + 2 K) D), keys (blocks, S, K, D) and tables of two dimensions");
    }
    const std::int64_t kv_heads = keys.shape(2), dim = keys.shape(3), heads = qkv.shape(1) / dim - 2 * kv_heads;
    if (heads < 1 || heads % kv_heads || (heads + 2 * kv_heads) * dim != qkv.shape(1)) {
        throw py::value_error("decode_step: qkv is not a multiple of key-value heads wide");
    }
    const actial::StepSizes sizes{slots.size(),  qkv.shape(0),     heads,            kv_heads,           dim,
                                  keys.shape(1), members.shape(0), members.shape(1), own_table.shape(1), prefix_table.shape(1)};
    const actial::StepReads reads{slots.data(), row.data(), own_table.data(), own_tokens.data(), members.data(), prefix_table.data(),
                                  prefix_tokens.data()};
    py::array_t<float> out({sizes.rows, heads * dim});
    float *to = out.mutable_data(), *held_keys = keys.mutable_data(), *held_values = values.mutable_data();
    {
        py::gil_scoped_release released;
        actial::decode_step(sizes, reads, qkv.data(), cos.data(), sin.data(), scale, held_keys, held_values, to);
    }
    return out;
}

py::array_t<float> add_norm(Exact<float> x, const py::object& more, const Exact<float>& weight, float eps) {
    const auto added = more.is_none() ? Exact<float>() : py::cast<Exact<float>>(more);
    if (x.ndim() != 2 || weight.size() != x.shape(1) || (!more.is_none() && added.size() != x.size())) {
        throw py::value_error("add_norm: expected x and more (R, H) and weight (H,)");
    }
    py::array_t<float> out({x.shape(0), x.shape(1)});
    actial::add_norm(x.mutable_data(), more.is_none() ? nullptr : added.data(), weight.data(), eps, x.shape(0), x.shape(1), out.mutable_data());
    return out;
}

py::array_t<float> gated(const Exact<float>& x) {
    if (x.ndim() != 2 || x.shape(1) % 2) throw py::value_error("gated: expected x (R, 2 I)");
    py::array_t<float> out({x.shape(0), x.shape(1) / 2});
    actial::gated(x.data(), x.shape(0), x.shape(1) / 2, out.mutable_data());
    return out;
}

py::tuple draw(const Exact<float>& logits, const Exact<std::int64_t>& row, const py::object& uniforms, float temperature,
               const Exact<std::int64_t>& banned) {
    const auto numbers = uniforms.is_none() ? Exact<double>() : py::cast<Exact<double>>(uniforms);
    if (logits.ndim() != 2 || logits.shape(1) < 1 || !(temperature > 0) || (!uniforms.is_none() && numbers.size() != row.size())) {
        throw py::value_error("draw: expected logits (R, V), row and uniforms (W,), and a temperature above 0");
    }
    const auto check = [](const Exact<std::int64_t>& x, std::int64_t limit, const char* name) {
        for (py::ssize_t i = 0; i < x.size(); ++i)
            if (x.data()[i] < 0 || x.data()[i] >= limit) throw py::value_error(std::string("draw: ") + name + " out of range");
    };
    check(row, logits.shape(0), "row");
    check(banned, logits.shape(1), "banned");
    py::array_t<std::int64_t> token(row.size());
    py::array_t<float> logp(row.size());
    const actial::Drawing given{row.size(),  logits.shape(0), logits.shape(1),
                                banned.size(), row.data(),    banned.data(),
                                uniforms.is_none() ? nullptr : numbers.data(), temperature};
    std::int64_t* tokens = token.mutable_data();
    float* logps = logp.mutable_data();
    {
        py::gil_scoped_release released;
        actial::draw(given, logits.data(), tokens, logps);
    }
    return py::make_tuple(token, logp);
}

// Runs work without the GIL; a RowError becomes a ValueError that begins with the row's name.
template <class Work, class Name>
auto unlocked(Work work, Name name) {
    try {
        py::gil_scoped_release released;
        return work();
    } catch (const actial::RowError& error) {
        throw py::value_error(name(error.row) + ": " + error.what());
    }
}

// The vector's own memory as an array.
template <class T>
py::array_t<T> moved(std::vector<T>&& values) {
    auto* kept = new std::vector<T>(std::move(values));
    const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>({static_cast<py::ssize_t>(kept->size())}, kept->data(), owner);
}

using Limits = std::pair<std::int64_t, std::int64_t>;
using Coefficients = std::array<double, 4>;

void check_groups(const Array<std::int64_t>& prefix, const Array<std::int64_t>& suffix, const Array<std::int64_t>& offsets,
                  const Array<std::int64_t>& patches) {
    const py::ssize_t n = prefix.size();
    if (prefix.ndim() != 1 || suffix.ndim() != 1 || offsets.ndim() != 1 || patches.ndim() != 1 || patches.size() != n) {
        throw py::value_error("prefix, suffix, offsets and patches: expected one dimension, and as many patches as prefixes");
    }
    const std::int64_t* at = offsets.data();
    bool rising = offsets.size() == n + 1 && at[0] == 0 && at[n] == suffix.size();
    for (py::ssize_t i = 0; rising && i < n; ++i) rising = at[i] <= at[i + 1];
    if (suffix.size() > INT32_MAX) throw py::value_error("suffix: expected at most 2**31 - 1 suffixes");
    if (!rising) throw py::value_error("offsets: expected one more than groups, rising from 0 to the number of suffixes");
}

py::tuple plan(const Array<std::int64_t>& prefix, const Array<std::int64_t>& suffix, const Array<std::int64_t>& offsets,
               const Array<std::int64_t>& patches, Limits capacity, Coefficients costs, std::int64_t ranks, std::uint64_t seed,
               const py::object& names) {
    check_groups(prefix, suffix, offsets, patches);
    for (const std::int64_t limit : {capacity.first, capacity.second}) {
        if (limit < 1 || limit > INT32_MAX) throw py::value_error("capacity: expected 1 to 2**31 - 1 tokens and patches");
    }
    for (const double cost : costs) {
        if (!(cost >= 0 && std::isfinite(cost))) throw py::value_error("costs: expected finite coefficients of at least 0");
    }
    if (ranks < 1) throw py::value_error("ranks: expected at least 1");
    const actial::Groups groups{prefix.data(), suffix.data(), offsets.data(), patches.data(), prefix.size()};
    const auto work = [&] {
        return actial::plan(groups, {capacity.first, capacity.second}, {costs[0], costs[1], costs[2], costs[3]}, ranks, seed);
    };
    const auto name = [&](std::int64_t row) -> std::string {
        return names.is_none() ? "row " + std::to_string(row) : std::string(py::str(names[py::int_(row)]));
    };
    actial::Plan out = unlocked(work, name);
    return py::make_tuple(out.per_rank, moved(std::move(out.pieces)), moved(std::move(out.offsets)));
}

// The arrays that the parts point into.
using Kept = std::vector<py::array>;

template <class T>
const T* kept(Kept& arrays, const py::handle& value, std::vector<py::ssize_t> shape, const char* what) {
    auto array = py::cast<Array<T>>(value);
    if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
        throw py::value_error(std::string(what) + ": expected the shape that goes with the number of ids");
    }
    const T* data = array.data();
    arrays.push_back(std::move(array));
    return data;
}

actial::Text text_of(Kept& arrays, const py::handle& ids, const py::handle& trained) {
    const py::ssize_t length = py::len(ids);
    return {kept<std::int64_t>(arrays, ids, {length}, "ids"), kept<bool>(arrays, trained, {length}, "trained"), length};
}

// (name, ids, trained, positions or None, ((ids, trained), ...), ((frames, rows, columns, feature), ...), sample)
actial::Part part_of(Kept& arrays, const py::tuple& given) {
    actial::Part part{text_of(arrays, given[1], given[2]), nullptr, {}, {}, given[6].cast<std::int64_t>()};
    if (!given[3].is_none()) part.positions = kept<std::int64_t>(arrays, given[3], {3, part.prefix.length}, "positions");
    for (const py::handle& suffix : given[4]) {
        const auto pair = suffix.cast<py::tuple>();
        part.suffixes.push_back(text_of(arrays, pair[0], pair[1]));
    }
    for (const py::handle& image : given[5]) {
        const auto grid = image.cast<std::array<std::int64_t, 4>>();
        if (std::min({grid[0], grid[1], grid[2]}) < 1) throw py::value_error("grids: expected at least one merged token along each side");
        part.images.push_back({grid[0], grid[1], grid[2], grid[3]});
    }
    return part;
}

py::dict layout(const py::list& given, std::int64_t image_token) {
    Kept arrays;
    std::vector<actial::Part> parts;
    for (const py::handle& part : given) parts.push_back(part_of(arrays, part.cast<py::tuple>()));
    const auto name = [&](std::int64_t row) -> std::string { return py::str(given[row].cast<py::tuple>()[0]); };
    const actial::Sizes sizes = unlocked([&] { return actial::measure(parts, image_token); }, name);

    py::dict out;
    const auto array = [&](const char* field, std::vector<py::ssize_t> shape) {
        py::array_t<std::int64_t> made(shape);
        out[field] = made;
        return made.mutable_data();
    };
    const auto offsets = [&](const char* field, std::int64_t count) {
        py::array_t<std::int32_t> made(count + 1);
        out[field] = made;
        return made.mutable_data();
    };
    const actial::Buffers buffers{array("input_ids", {sizes.rows}),      array("position_ids", {3, sizes.rows}),
                                  offsets("cu", sizes.segments),         offsets("cross_q", sizes.groups),
                                  offsets("cross_k", sizes.groups),      array("image_slots", {sizes.image_tokens}),
                                  array("image_rows", {sizes.image_tokens}), array("loss_rows", {sizes.losses}),
                                  array("targets", {sizes.losses}),      array("owner", {sizes.losses}),
                                  array("samples", {sizes.samples}),     array("cu_loss", {sizes.samples + 1})};
    {
        py::gil_scoped_release released;
        actial::fill(parts, image_token, sizes, buffers);
    }
    out["prefix_rows"] = sizes.prefix_rows;
    out["suffix_rows"] = sizes.suffix_rows;
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "actial_fast host code";
    PYBIND11_NUMPY_DTYPE_EX(actial::Piece, group, "group", first, "first", end, "end", tokens, "tokens", patches, "patches", cost, "cost");
    m.def("patchify", &patchify, py::arg("image").noconvert(), py::arg("patch"), py::arg("merge"), py::arg("frames"), py::arg("scale"),
          py::arg("shift"));
    m.def("decode_step", &decode_step, py::arg("qkv").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("slots").noconvert(), py::arg("row").noconvert(), py::arg("own_table").noconvert(), py::arg("own_tokens").noconvert(),
          py::arg("members").noconvert(), py::arg("prefix_table").noconvert(), py::arg("prefix_tokens").noconvert(), py::arg("scale"));
    m.def("add_norm", &add_norm, py::arg("x").noconvert(), py::arg("more").noconvert(), py::arg("weight").noconvert(), py::arg("eps"));
    m.def("gated", &gated, py::arg("x").noconvert());
    m.def("draw", &draw, py::arg("logits").noconvert(), py::arg("row").noconvert(), py::arg("uniforms").noconvert(), py::arg("temperature"),
          py::arg("banned").noconvert());
    m.def("plan", &plan, py::arg("prefix"), py::arg("suffix"), py::arg("offsets"), py::arg("patches"), py::arg("capacity"),
          py::arg("costs"), py::arg("ranks"), py::arg("seed"), py::arg("names"));
    m.def("layout", &layout, py::arg("parts"), py::arg("image_token"));
}
