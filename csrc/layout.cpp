// The parts of one micro-batch -> every index that its forward and backward need, on plain buffers.
//
// The hidden state of row i predicts token i + 1; a suffix's first token is predicted by the last row of its prefix. So the last token of a
// suffix or of a plain sequence is only a target and has no row, and a suffix of one token no segment. Rows run [prefixes of parts whose
// suffixes have rows | these suffixes, in the same order | the other parts], so that what the suffixes attend to and the suffixes
// themselves are two contiguous blocks without an empty segment. A sample's loss rows are those that it would have alone.
#include "layout.h"

#include <algorithm>

namespace actial {

namespace {

void check_images(const Part& part, std::int64_t row, std::int64_t image_token) {
    std::int64_t needed = 0, at = 0;
    for (const Image& image : part.images) needed += image.tokens();
    const std::int64_t* ids = part.prefix.ids;
    const std::int64_t found = std::count(ids, ids + part.prefix.length, image_token);
    if (found != needed) {
        throw RowError(row, std::to_string(found) + " image placeholder tokens, but its " + std::to_string(part.images.size()) +
                                " images need " + std::to_string(needed) + "; a row is never cut: encode it whole or leave it out");
    }
    for (std::size_t i = 0; i < part.images.size(); ++i) {
        at = std::find(ids + at, ids + part.prefix.length, image_token) - ids;
        const std::int64_t end = std::find_if(ids + at, ids + part.prefix.length, [=](std::int64_t id) { return id != image_token; }) - ids;
        const std::int64_t tokens = part.images[i].tokens();
        if (end - at < tokens) {
            throw RowError(row, "image " + std::to_string(i) + " needs " + std::to_string(tokens) +
                                    " adjacent placeholder tokens and has " + std::to_string(end - at) + "; encode the row again");
        }
        at += tokens;
    }
}

void check(const Part& part, std::int64_t row, std::int64_t image_token) {
    if (part.prefix.length < 1) throw RowError(row, "no tokens; leave the row out");
    check_images(part, row, image_token);
    for (std::size_t s = 0; s < part.suffixes.size(); ++s) {
        const Text& text = part.suffixes[s];
        const std::string name = "sample " + std::to_string(part.sample + static_cast<std::int64_t>(s));
        if (text.length < 1) throw RowError(row, name + " has an empty suffix; leave it out");
        if (std::find(text.ids, text.ids + text.length, image_token) != text.ids + text.length) {
            throw RowError(row, name + " has an image placeholder token in its suffix; images belong to the prefix, "
                                       "and sampling must ban it");
        }
    }
}

// Of a prefix before suffixes every row predicts. A plain sequence keeps one row, and its image spans whole.
std::int64_t prefix_rows(const Part& part, std::int64_t image_token) {
    const Text& text = part.prefix;
    const bool whole = !part.suffixes.empty() || text.length == 1 || text.ids[text.length - 1] == image_token;
    return whole ? text.length : text.length - 1;
}

std::int64_t suffix_rows(const Part& part) {
    std::int64_t rows = 0;
    for (const Text& text : part.suffixes) rows += text.length - 1;
    return rows;
}

std::int64_t trained_after_first(const Text& text) { return std::count(text.trained + 1, text.trained + text.length, true); }

class Writer {
  public:
    Writer(std::int64_t image_token, const Sizes& sizes, const Buffers& out) : image_token_(image_token), rows_(sizes.rows), out_(out) {
        *out_.cu++ = 0;
        *out_.cu_loss++ = 0;
    }

    // Places a prefix and returns its first row.
    std::int64_t prefix(const Part& part) {
        const std::int64_t rows = prefix_rows(part, image_token_), start = place(part.prefix, rows);
        if (part.positions) {
            for (int i = 0; i < 3; ++i) std::copy_n(part.positions + i * part.prefix.length, rows, position(i, start));
        } else {
            mrope(part, start, rows);
        }
        features(part, start);
        return start;
    }

    // Places the suffixes of a part, or ends its only sample when it has none.
    void samples(const Part& part, std::int64_t prefix_start) {
        std::int64_t sample = part.sample;
        for (const Text& text : part.suffixes) suffix(part, prefix_start, text, sample++);
        if (!part.suffixes.empty()) return;
        losses(part.prefix, prefix_start, sample);
        end_sample(sample);
    }

  private:
    std::int64_t* position(int axis, std::int64_t row) const { return out_.position_ids + axis * rows_ + row; }

    static void count_up(std::int64_t* to, std::int64_t count, std::int64_t from) {
        for (std::int64_t i = 0; i < count; ++i) to[i] = from + i;
    }

    void suffix(const Part& part, std::int64_t prefix_start, const Text& text, std::int64_t sample) {
        const std::int64_t rows = text.length - 1, start = place(text, rows), from = after(prefix_start, part.prefix.length);
        for (int i = 0; i < 3; ++i) count_up(position(i, start), rows, from);
        losses(part.prefix, prefix_start, sample);
        if (text.trained[0]) loss(prefix_start + part.prefix.length - 1, text.ids[0], sample);
        losses(text, start, sample);
        end_sample(sample);
    }

    // A segment of the text's first `rows` tokens, if any; returns its first row.
    std::int64_t place(const Text& text, std::int64_t rows) {
        const std::int64_t start = row_;
        std::copy_n(text.ids, rows, out_.input_ids + start);
        row_ += rows;
        if (rows) *out_.cu++ = static_cast<std::int32_t>(row_);
        return start;
    }

    // The position after a prefix: one past the largest of its three rows.
    std::int64_t after(std::int64_t start, std::int64_t length) const {
        std::int64_t most = 0;
        for (int i = 0; i < 3; ++i) most = std::max(most, *std::max_element(position(i, start), position(i, start) + length));
        return most + 1;
    }

    void mrope(const Part& part, std::int64_t start, std::int64_t rows) {
        const std::int64_t* ids = part.prefix.ids;
        std::int64_t at = 0, next = 0;
        const auto text_until = [&](std::int64_t end) {
            for (int i = 0; i < 3; ++i) count_up(position(i, start + at), end - at, next);
            next += end - at;
            at = end;
        };
        for (const Image& image : part.images) {
            text_until(std::find(ids + at, ids + part.prefix.length, image_token_) - ids);
            for (std::int64_t t = 0; t < image.frames; ++t) {
                for (std::int64_t y = 0; y < image.rows; ++y) {
                    for (std::int64_t x = 0; x < image.cols; ++x, ++at) {
                        *position(0, start + at) = next + t;
                        *position(1, start + at) = next + y;
                        *position(2, start + at) = next + x;
                    }
                }
            }
            next += std::max(image.rows, image.cols);
        }
        text_until(rows);
    }

    void features(const Part& part, std::int64_t start) {
        const std::int64_t* ids = part.prefix.ids;
        std::int64_t at = 0;
        for (const Image& image : part.images) {
            at = std::find(ids + at, ids + part.prefix.length, image_token_) - ids;
            count_up(out_.image_slots, image.tokens(), start + at);
            count_up(out_.image_rows, image.tokens(), image.feature);
            out_.image_slots += image.tokens();
            out_.image_rows += image.tokens();
            at += image.tokens();
        }
    }

    void loss(std::int64_t row, std::int64_t target, std::int64_t sample) {
        *out_.loss_rows++ = row;
        *out_.targets++ = target;
        *out_.owner++ = sample;
        ++losses_;
    }

    void losses(const Text& text, std::int64_t start, std::int64_t sample) {
        for (std::int64_t i = 1; i < text.length; ++i) {
            if (text.trained[i]) loss(start + i - 1, text.ids[i], sample);
        }
    }

    void end_sample(std::int64_t sample) {
        *out_.samples++ = sample;
        *out_.cu_loss++ = losses_;
    }

    std::int64_t image_token_, rows_, row_ = 0, losses_ = 0;
    Buffers out_;  // each pointer moves on, but those that are indexed by row
};

}  // namespace

Sizes measure(const std::vector<Part>& parts, std::int64_t image_token) {
    Sizes sizes{};
    for (std::size_t p = 0; p < parts.size(); ++p) {
        const Part& part = parts[p];
        check(part, static_cast<std::int64_t>(p), image_token);
        const std::int64_t rows = prefix_rows(part, image_token), after = suffix_rows(part);
        const std::int64_t samples = std::max<std::int64_t>(static_cast<std::int64_t>(part.suffixes.size()), 1);
        sizes.rows += rows + after;
        sizes.suffix_rows += after;
        if (after) {
            sizes.prefix_rows += rows;
            ++sizes.groups;
        }
        ++sizes.segments;
        sizes.samples += samples;
        sizes.losses += samples * trained_after_first(part.prefix);
        for (const Image& image : part.images) sizes.image_tokens += image.tokens();
        for (const Text& text : part.suffixes) {
            sizes.segments += text.length > 1;
            sizes.losses += text.trained[0] + trained_after_first(text);
        }
    }
    if (sizes.rows > INT32_MAX) throw std::invalid_argument("a micro-batch holds at most 2**31 - 1 tokens; lower the token capacity");
    return sizes;
}

void fill(const std::vector<Part>& parts, std::int64_t image_token, const Sizes& sizes, const Buffers& buffers) {
    Writer writer(image_token, sizes, buffers);
    std::vector<std::int64_t> starts(parts.size());
    std::int32_t *cross_q = buffers.cross_q, *cross_k = buffers.cross_k, queries = 0, keys = 0;
    *cross_q++ = *cross_k++ = 0;
    for (std::size_t p = 0; p < parts.size(); ++p) {
        const std::int64_t after = suffix_rows(parts[p]);
        if (!after) continue;
        starts[p] = writer.prefix(parts[p]);
        *cross_k++ = keys += static_cast<std::int32_t>(parts[p].prefix.length);
        *cross_q++ = queries += static_cast<std::int32_t>(after);
    }
    for (std::size_t p = 0; p < parts.size(); ++p) {
        if (suffix_rows(parts[p])) writer.samples(parts[p], starts[p]);
    }
    for (const Part& part : parts) {
        if (!suffix_rows(part)) writer.samples(part, writer.prefix(part));
    }
}

}  // namespace actial
