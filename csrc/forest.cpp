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
    plan.batch_tokens = {0};
    plan.batch_segments = {0};
    plan.q_offsets = {0};
    plan.k_offsets = {0};
    std::vector<std::int32_t> path;  // batch row of each position of the latest segment

    const auto packed = [&] { return static_cast<std::int64_t>(plan.tokens.size()); };
    const auto segments = [&] { return static_cast<std::int64_t>(plan.q_offsets.size()) - 1; };

    for (std::int64_t at = 0; at < n_sequences; ++at) {
        const Span sequence = span(order[at]);
        std::int64_t shared = at ? common_prefix(span(order[at - 1]), sequence) : 0;
        if (at && shared == sequence.size()) {  // equal to the one before: sorted, so never its prefix
            plan.segment_of[order[at]] = segments() - 1;
            continue;
        }
        const std::int64_t in_batch = packed() - plan.batch_tokens.back();
        if (in_batch > 0 && in_batch + sequence.size() - shared > budget) {
            plan.batch_tokens.push_back(packed());
            plan.batch_segments.push_back(segments());
        }
        const std::int64_t start = plan.batch_tokens.back();
        if (packed() == start) shared = 0;

        path.resize(shared);
        for (std::int64_t position = shared; position < sequence.size(); ++position) {
            path.push_back(static_cast<std::int32_t>(packed() - start));
            plan.tokens.push_back(sequence.begin[position]);
            plan.positions.push_back(static_cast<std::int32_t>(position));
        }
        plan.k_rows.insert(plan.k_rows.end(), path.begin(), path.end());
        plan.k_offsets.push_back(static_cast<std::int64_t>(plan.k_rows.size()));
        plan.q_offsets.push_back(packed());
        plan.segment_of[order[at]] = segments() - 1;
    }
    if (n_sequences > 0) {
        plan.batch_tokens.push_back(packed());
        plan.batch_segments.push_back(segments());
    }
    return plan;
}

}  // namespace leakfast
