// Reads planning cases from stdin, plans each and lays out every micro-batch into buffers of the exact size; prints the plans.
// tests/packing/test_planning.py builds it with the address and undefined-behaviour sanitizers and compares what it prints with the Python twin.
// A case: ranks seed tokens patches groups, then per group: prefix patches suffixes, and each suffix's length.
// With the argument "overrun" it writes past a buffer instead, which a working sanitizer must catch.
#include <cstring>
#include <iostream>
#include <memory>

#include "layout.h"
#include "planner.h"

namespace {

constexpr std::int64_t kImage = 7;

struct Case {
    std::int64_t ranks, seed;
    actial::Capacity capacity;
    std::vector<std::int64_t> prefix, suffix, offsets{0}, patches;
};

bool read(Case& out) {
    std::int64_t groups = 0;
    if (!(std::cin >> out.ranks >> out.seed >> out.capacity.tokens >> out.capacity.patches >> groups)) return false;
    for (std::int64_t g = 0; g < groups; ++g) {
        std::int64_t prefix = 0, patches = 0, suffixes = 0;
        std::cin >> prefix >> patches >> suffixes;
        out.prefix.push_back(prefix);
        out.patches.push_back(patches);
        for (std::int64_t s = 0, n = 0; s < suffixes && std::cin >> n; ++s) out.suffix.push_back(n);
        out.offsets.push_back(static_cast<std::int64_t>(out.suffix.size()));
    }
    return true;
}

// An exact copy on the heap, so that reading past it is caught too.
template <class T>
const T* exact(std::vector<std::shared_ptr<void>>& kept, const std::vector<T>& values) {
    std::shared_ptr<T[]> copy(new T[values.size()]);
    std::copy(values.begin(), values.end(), copy.get());
    kept.push_back(copy);
    return copy.get();
}

actial::Text text(std::vector<std::shared_ptr<void>>& kept, std::int64_t length, std::int64_t image) {
    std::vector<std::int64_t> ids(length, 100);
    std::fill_n(ids.begin() + (length - image + 1) / 2, image, kImage);
    std::unique_ptr<bool[]> flags(new bool[length]);
    for (std::int64_t i = 0; i < length; ++i) flags[i] = i % 3 != 1;
    const std::shared_ptr<bool[]> trained(std::move(flags));
    kept.push_back(trained);
    return {exact(kept, ids), trained.get(), length};
}

// Lays out one micro-batch; a prefix of 2 or more tokens has an image of one row, between its first and last token or up to its end.
void lay_out(const Case& given, const actial::Plan& plan, std::int64_t begin, std::int64_t end) {
    std::vector<std::shared_ptr<void>> kept;
    std::vector<actial::Part> parts;
    for (std::int64_t p = begin; p < end; ++p) {
        const actial::Piece& piece = plan.pieces[p];
        const std::int64_t length = given.prefix[piece.group], image = std::max<std::int64_t>(length - 1 - length % 2, 0);
        actial::Part part{text(kept, length, image), nullptr, {}, {}, given.offsets[piece.group] + piece.first};
        if (image) part.images.push_back({1, 1, image, p});
        for (std::int64_t s = piece.first; s < piece.end; ++s) {
            part.suffixes.push_back(text(kept, given.suffix[given.offsets[piece.group] + s], 0));
        }
        parts.push_back(std::move(part));
    }
    const actial::Sizes n = actial::measure(parts, kImage);
    const auto wide = [&](std::int64_t count) {
        std::shared_ptr<std::int64_t[]> made(new std::int64_t[count]);
        kept.push_back(made);
        return made.get();
    };
    const auto narrow = [&](std::int64_t count) {
        std::shared_ptr<std::int32_t[]> made(new std::int32_t[count]);
        kept.push_back(made);
        return made.get();
    };
    actial::fill(parts, kImage, n,
                 {wide(n.rows), wide(3 * n.rows), narrow(n.segments + 1), narrow(n.groups + 1), narrow(n.groups + 1), wide(n.image_tokens),
                  wide(n.image_tokens), wide(n.losses), wide(n.losses), wide(n.losses), wide(n.samples), wide(n.samples + 1)});
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::strcmp(argv[1], "overrun") == 0) {
        std::vector<std::shared_ptr<void>> kept;
        const actial::Text small = text(kept, 4, 0);
        const actial::Part part{{small.ids, small.trained, 5}, nullptr, {}, {}, 0};
        return static_cast<int>(actial::measure({part}, kImage).rows);
    }
    for (Case given; read(given); given = Case()) {
        std::vector<std::shared_ptr<void>> kept;
        const actial::Groups groups{exact(kept, given.prefix), exact(kept, given.suffix), exact(kept, given.offsets),
                                    exact(kept, given.patches), static_cast<std::int64_t>(given.prefix.size())};
        try {
            const actial::Plan plan = actial::plan(groups, given.capacity, {1.0, 3.1e-5, 0.098, 5.0}, given.ranks, given.seed);
            std::cout << plan.per_rank;
            for (const std::int64_t offset : plan.offsets) std::cout << ' ' << offset;
            for (const actial::Piece& piece : plan.pieces) std::cout << ' ' << piece.group << ' ' << piece.first << ' ' << piece.end;
            for (std::size_t b = 0; b + 1 < plan.offsets.size(); ++b) lay_out(given, plan, plan.offsets[b], plan.offsets[b + 1]);
        } catch (const actial::RowError& error) {
            std::cout << "row " << error.row << ": " << error.what();
        }
        std::cout << '\n';
    }
}
