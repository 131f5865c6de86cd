// Groups -> micro-batches per rank: balanced over ranks by cost, packed by best fit in two resources, LM tokens and vision patches.
//
// 1. A group that does not fit is cut into pieces, suffixes in order, each with the prefix again.
// 2. Groups go to ranks, largest cost first, each to the least loaded one; then the most and the least loaded rank swap groups.
// 3. Per rank, a cut group opens one micro-batch per piece; whole groups, the largest sum of shares of both capacities first, go into
//    the open micro-batch with the fewest tokens left that still holds them.
// 4. Micro-batches run by falling cost, so that those that ranks run at the same time are alike; those of a cut group stay adjacent.
#include "planner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <queue>
#include <utility>

#include "order.h"
#include "space.h"

namespace actial {

namespace {

constexpr double kBalanced = 1e-4;  // ranks closer than this, relative to the most loaded one, are left as they are
constexpr std::int64_t kSwapsPerRank = 16;

// ---- 1. pieces

void check(const Groups& groups, std::int64_t g, Capacity capacity) {
    const std::int64_t prefix = groups.prefix[g];
    if (prefix < 1) throw RowError(g, "no tokens; leave the row out");
    if (groups.patches[g] < 0) throw RowError(g, "a negative number of patches");
    if (prefix > capacity.tokens) {
        throw RowError(g, std::to_string(prefix) + " tokens do not fit into a micro-batch of " + std::to_string(capacity.tokens) +
                              "; raise the token capacity or leave the row out");
    }
    if (groups.patches[g] > capacity.patches) {
        throw RowError(g, std::to_string(groups.patches[g]) + " vision patches do not fit into a micro-batch of " +
                              std::to_string(capacity.patches) + "; raise the patch capacity, shrink the images or leave the row out");
    }
    for (std::int64_t s = groups.offsets[g]; s < groups.offsets[g + 1]; ++s) {
        const std::string name = "suffix " + std::to_string(s - groups.offsets[g]);
        if (groups.suffix[s] < 1) throw RowError(g, name + " has no tokens; leave it out");
        if (groups.suffix[s] > capacity.tokens - prefix) {
            throw RowError(g, name + " of " + std::to_string(groups.suffix[s]) + " tokens does not fit after its prefix of " +
                                  std::to_string(prefix) + " into a micro-batch of " + std::to_string(capacity.tokens) +
                                  "; raise the token capacity or leave the row out");
        }
    }
}

Piece piece_of(const Groups& groups, std::int64_t g, std::int64_t first, std::int64_t end, Costs costs) {
    const std::int64_t prefix = groups.prefix[g];
    std::int64_t tokens = prefix, twice_pairs = prefix * prefix;
    for (std::int64_t s = groups.offsets[g] + first; s < groups.offsets[g] + end; ++s) {
        const std::int64_t n = groups.suffix[s];
        tokens += n;
        twice_pairs += n * (n + 2 * prefix);
    }
    const double pairs = 0.5 * static_cast<double>(twice_pairs);
    const double cost = costs.linear * tokens + costs.quadratic * pairs + costs.vision * groups.patches[g];
    const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    return {g, narrow(first), narrow(end), narrow(tokens), narrow(groups.patches[g]), cost};
}

struct Pieces {
    std::vector<Piece> all;            // by group, then by first suffix
    std::vector<std::int64_t> starts;  // (groups + 1): where those of a group start
};

Pieces cut(const Groups& groups, Capacity capacity, Costs costs) {
    Pieces out;
    out.all.reserve(groups.count);
    out.starts.reserve(groups.count + 1);
    out.starts.push_back(0);
    for (std::int64_t g = 0; g < groups.count; ++g) {
        check(groups, g, capacity);
        const std::int64_t suffixes = groups.offsets[g + 1] - groups.offsets[g];
        std::int64_t first = 0, tokens = groups.prefix[g];
        for (std::int64_t s = 0; s < suffixes; ++s) {
            const std::int64_t n = groups.suffix[groups.offsets[g] + s];
            if (tokens + n > capacity.tokens) {
                out.all.push_back(piece_of(groups, g, first, s, costs));
                first = s;
                tokens = groups.prefix[g];
            }
            tokens += n;
        }
        out.all.push_back(piece_of(groups, g, first, suffixes, costs));
        out.starts.push_back(static_cast<std::int64_t>(out.all.size()));
    }
    return out;
}

// ---- 2. ranks

// A group and the bits of its cost: costs are not negative, so their bits sort as they do.
struct Costly {
    std::uint64_t bits;
    std::int64_t group;
    double cost() const {
        double value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

using Order = std::vector<Costly>;  // by falling cost; a place is an index into it

struct Swap {
    std::int64_t from, to;  // indices into the places of the two ranks; to = -1: nothing comes back
};

// The exchange that brings two loads closest together; from = -1 when none brings them closer.
Swap best_swap(const Order& order, const std::vector<std::int64_t>& high, const std::vector<std::int64_t>& low, double gap) {
    const double half = gap / 2;
    double best = half;
    Swap found{-1, -1};
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(high.size()); ++i) {
        const double cost = order[high[i]].cost();
        const auto consider = [&](double back, std::int64_t j) {
            const double error = std::abs(cost - back - half);
            if (error < best) {
                best = error;
                found = {i, j};
            }
        };
        const auto at = std::partition_point(low.begin(), low.end(), [&](std::int64_t place) { return order[place].cost() > cost - half; });
        const std::int64_t j = at - low.begin();
        if (j > 0) consider(order[low[j - 1]].cost(), j - 1);
        if (at != low.end()) consider(order[*at].cost(), j);
        consider(0.0, -1);
    }
    return found;
}

void move_place(std::vector<std::int64_t>& from, std::int64_t index, std::vector<std::int64_t>& to) {
    const std::int64_t place = from[index];
    from.erase(from.begin() + index);
    to.insert(std::lower_bound(to.begin(), to.end(), place), place);
}

void refine(const Order& order, std::vector<std::vector<std::int64_t>>& places, std::vector<double>& loads) {
    for (std::int64_t swap = 0; swap < kSwapsPerRank * static_cast<std::int64_t>(loads.size()); ++swap) {
        const std::int64_t high = std::max_element(loads.begin(), loads.end()) - loads.begin();
        const std::int64_t low = std::min_element(loads.begin(), loads.end()) - loads.begin();
        const double gap = loads[high] - loads[low];
        if (gap <= kBalanced * loads[high]) return;
        const Swap found = best_swap(order, places[high], places[low], gap);
        if (found.from < 0) return;
        const double there = order[places[high][found.from]].cost();
        const double back = found.to < 0 ? 0.0 : order[places[low][found.to]].cost();
        const std::int64_t returned = found.to < 0 ? -1 : places[low][found.to];
        move_place(places[high], found.from, places[low]);
        if (returned >= 0) {
            move_place(places[low], std::lower_bound(places[low].begin(), places[low].end(), returned) - places[low].begin(), places[high]);
        }
        loads[high] = loads[high] - there + back;
        loads[low] = loads[low] + there - back;
    }
}

Order by_cost(const Pieces& pieces, const std::vector<std::int64_t>& groups) {
    Order order;
    order.reserve(groups.size());
    for (const std::int64_t g : groups) {
        double cost = 0;
        for (std::int64_t p = pieces.starts[g]; p < pieces.starts[g + 1]; ++p) cost += pieces.all[p].cost;
        order.push_back({0, g});
        std::memcpy(&order.back().bits, &cost, sizeof cost);
    }
    sort_falling(order);
    return order;
}

// The groups of each rank, by falling cost when there is more than one rank.
std::vector<std::vector<std::int64_t>> balance(const Pieces& pieces, std::vector<std::int64_t> groups, std::int64_t ranks) {
    if (ranks == 1) return {std::move(groups)};
    const Order order = by_cost(pieces, groups);
    using Load = std::pair<double, std::int64_t>;
    std::priority_queue<Load, std::vector<Load>, std::greater<Load>> least;
    for (std::int64_t r = 0; r < ranks; ++r) least.push({0.0, r});
    std::vector<double> loads(ranks, 0.0);
    std::vector<std::vector<std::int64_t>> out(ranks);
    for (std::size_t place = 0; place < order.size(); ++place) {
        const std::int64_t rank = least.top().second;
        least.pop();
        out[rank].push_back(static_cast<std::int64_t>(place));
        loads[rank] += order[place].cost();
        least.push({loads[rank], rank});
    }
    refine(order, out, loads);
    for (auto& places : out) {
        for (auto& place : places) place = order[place].group;
    }
    return out;
}

// ---- 3. micro-batches of one rank

struct Bins {
    std::vector<double> costs;
    std::vector<std::int64_t> chains;  // the first of the adjacent micro-batches that this one belongs to
};

// The first piece of a group, with what placing it needs next to what it is sorted by.
struct Item {
    std::uint64_t bits;  // the sum of its shares of both capacities, in units of 1 / (tokens * patches)
    std::int64_t piece;
    std::int32_t tokens, patches;
};

// Fills bin_of for the pieces of these groups.
Bins pack(const Pieces& pieces, const std::vector<std::int64_t>& groups, Capacity capacity, std::vector<std::int64_t>& bin_of) {
    std::vector<Item> whole, cut;
    whole.reserve(groups.size());
    for (const std::int64_t g : groups) {
        const std::int64_t p = pieces.starts[g];
        const std::int32_t tokens = pieces.all[p].tokens, patches = pieces.all[p].patches;
        const std::int64_t shares = tokens * capacity.patches + patches * capacity.tokens;
        (pieces.starts[g + 1] - p > 1 ? cut : whole).push_back({static_cast<std::uint64_t>(shares), p, tokens, patches});
    }
    sort_falling(whole);
    sort_falling(cut);

    Bins bins;
    Space space(capacity);
    const auto put = [&](std::int64_t p, Open open, std::int64_t tokens, std::int64_t patches) {
        bin_of[p] = open.bin;
        if (open.tokens > tokens) space.add({open.patches - patches, open.tokens - tokens, open.bin});
    };
    const auto fresh = [&](std::int64_t chain) -> Open {
        const std::int64_t bin = static_cast<std::int64_t>(bins.chains.size());
        bins.chains.push_back(chain < 0 ? bin : chain);
        return {capacity.patches, capacity.tokens, bin};
    };
    for (const Item& item : cut) {
        const std::int64_t chain = static_cast<std::int64_t>(bins.chains.size()), group = pieces.all[item.piece].group;
        for (std::int64_t p = item.piece; p < pieces.starts[group + 1]; ++p) {
            put(p, fresh(chain), pieces.all[p].tokens, pieces.all[p].patches);
        }
    }
    for (const Item& item : whole) {
        const Open open = space.take(item.tokens, item.patches);
        put(item.piece, open.bin < 0 ? fresh(-1) : open, item.tokens, item.patches);
    }
    bins.costs.assign(bins.chains.size(), 0.0);
    return bins;
}

// ---- 4. order

// place[b]: when micro-batch b runs.
std::vector<std::int64_t> run_order(const Bins& bins) {
    const std::int64_t count = static_cast<std::int64_t>(bins.costs.size());
    std::vector<double> most(count, 0.0);  // of the chain, kept at its first
    for (std::int64_t b = 0; b < count; ++b) most[bins.chains[b]] = std::max(most[bins.chains[b]], bins.costs[b]);
    std::vector<std::int64_t> order(count), place(count);
    for (std::int64_t b = 0; b < count; ++b) order[b] = b;
    std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        const std::int64_t x = bins.chains[a], y = bins.chains[b];
        if (x == y) return a < b;
        return most[x] != most[y] ? most[x] > most[y] : x < y;
    });
    for (std::int64_t i = 0; i < count; ++i) place[order[i]] = i;
    return place;
}

}  // namespace

Plan plan(const Groups& groups, Capacity capacity, Costs costs, std::int64_t ranks, std::uint64_t seed) {
    const Pieces pieces = cut(groups, capacity, costs);
    const auto shares = balance(pieces, shuffled(groups.count, seed), ranks);
    std::vector<std::int64_t> rank_of(groups.count), bin_of(pieces.all.size());
    std::vector<Bins> bins(ranks);
    Plan out{0, std::vector<Piece>(pieces.all.size()), {}};
    for (std::int64_t r = 0; r < ranks; ++r) {
        for (const std::int64_t g : shares[r]) rank_of[g] = r;
        bins[r] = pack(pieces, shares[r], capacity, bin_of);
        out.per_rank = std::max(out.per_rank, static_cast<std::int64_t>(bins[r].chains.size()));
    }

    const std::int64_t count = static_cast<std::int64_t>(pieces.all.size());
    for (std::int64_t p = 0; p < count; ++p) bins[rank_of[pieces.all[p].group]].costs[bin_of[p]] += pieces.all[p].cost;
    std::vector<std::vector<std::int64_t>> places(ranks);
    for (std::int64_t r = 0; r < ranks; ++r) places[r] = run_order(bins[r]);
    out.offsets.assign(ranks * out.per_rank + 1, 0);
    for (std::int64_t p = 0; p < count; ++p) {
        const std::int64_t rank = rank_of[pieces.all[p].group];
        bin_of[p] = rank * out.per_rank + places[rank][bin_of[p]];
        ++out.offsets[bin_of[p] + 1];
    }
    for (std::size_t i = 1; i < out.offsets.size(); ++i) out.offsets[i] += out.offsets[i - 1];
    std::vector<std::int64_t> next(out.offsets.begin(), out.offsets.end() - 1);
    for (std::int64_t p = 0; p < count; ++p) out.pieces[next[bin_of[p]]++] = pieces.all[p];
    return out;
}

}  // namespace actial
