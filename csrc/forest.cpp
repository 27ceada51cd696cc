#include "forest.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace leakfast {
namespace {

struct Span {
    const std::int32_t* begin;
    const std::int32_t* end;
    std::int64_t size() const { return end - begin; }
};

std::int64_t common_prefix(Span a, Span b) {
    const auto n = std::min(a.size(), b.size());
    return std::mismatch(a.begin, a.begin + n, b.begin).first - a.begin;
}

// One past the last of the distinct sequences in the batch that begins at `first`.
std::int64_t batch_end(const std::vector<Span>& distinct, const std::vector<std::int64_t>& shared,
                       std::int64_t first, std::int64_t budget) {
    const auto n = static_cast<std::int64_t>(distinct.size());
    const auto own = [&](std::int64_t s) { return distinct[s].size() - shared[s]; };
    std::int64_t cost = distinct[first].size(), end = first + 1;
    while (end < n && cost + own(end) <= budget) cost += own(end++);
    if (end == n) return n;
    std::int64_t best = end;
    for (std::int64_t cut = end; cut > first + 1;) {  // what an earlier end would save, nearest first
        cost -= own(--cut);
        if (cost < budget - budget / 8) break;
        if (shared[cut] < shared[best]) best = cut;
    }
    return best;
}

}  // namespace

ForestPlan plan_forest(const std::int32_t* tokens, std::int64_t n_tokens, const std::int64_t* offsets,
                       std::int64_t n_sequences, std::int64_t budget) {
    if (budget < 1) throw std::invalid_argument("budget must be at least 1 token");
    if (offsets[0] != 0 || offsets[n_sequences] != n_tokens)
        throw std::invalid_argument("offsets must start at 0 and end at the number of tokens");
    for (std::int64_t i = 0; i < n_sequences; ++i)
        if (offsets[i + 1] <= offsets[i])
            throw std::invalid_argument("sequence " + std::to_string(i) + " is empty");

    const auto span = [&](std::int64_t i) { return Span{tokens + offsets[i], tokens + offsets[i + 1]}; };
    std::vector<std::int64_t> order(n_sequences);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
        const Span a = span(i), b = span(j);
        return std::lexicographical_compare(a.begin, a.end, b.begin, b.end);
    });

    ForestPlan plan;
    plan.segment_of.resize(n_sequences);
    std::vector<Span> distinct;
    std::vector<std::int64_t> shared;  // leading tokens shared with the distinct sequence before
    for (const std::int64_t index : order) {
        const Span sequence = span(index);
        const std::int64_t common = distinct.empty() ? 0 : common_prefix(distinct.back(), sequence);
        if (distinct.empty() || common < sequence.size()) {  // sorted, so never a prefix of the one before
            distinct.push_back(sequence);
            shared.push_back(common);
        }
        plan.segment_of[index] = static_cast<std::int64_t>(distinct.size()) - 1;
    }

    plan.batch_tokens = {0};
    plan.batch_segments = {0};
    plan.q_offsets = {0};
    plan.k_offsets = {0};
    std::vector<std::int32_t> path;  // batch row of each position of the latest segment
    const auto packed = [&] { return static_cast<std::int64_t>(plan.tokens.size()); };
    const auto n_segments = static_cast<std::int64_t>(distinct.size());

    for (std::int64_t first = 0; first < n_segments;) {
        const std::int64_t end = batch_end(distinct, shared, first, budget), start = packed();
        for (std::int64_t s = first; s < end; ++s) {
            const Span sequence = distinct[s];
            const std::int64_t keep = s > first ? shared[s] : 0;
            path.resize(keep);
            for (std::int64_t position = keep; position < sequence.size(); ++position) {
                path.push_back(static_cast<std::int32_t>(packed() - start));
                plan.tokens.push_back(sequence.begin[position]);
                plan.positions.push_back(static_cast<std::int32_t>(position));
            }
            plan.k_rows.insert(plan.k_rows.end(), path.begin(), path.end());
            plan.k_offsets.push_back(static_cast<std::int64_t>(plan.k_rows.size()));
            plan.q_offsets.push_back(packed());
        }
        plan.batch_tokens.push_back(packed());
        plan.batch_segments.push_back(end);
        first = end;
    }
    return plan;
}

}  // namespace leakfast
