// The prefix forest planner: token sequences in, packed batches out. Integers only.
// Knows nothing of models, personas or torch.
#pragma once

#include <cstdint>
#include <vector>

namespace leakfast {

// See plan_forest. Offsets have one entry more than what they delimit.
struct ForestPlan {
    std::vector<std::int64_t> segment_of;      // (N) which segment holds sequence i
    std::vector<std::int32_t> tokens;          // (T) packed token ids, batch after batch
    std::vector<std::int32_t> positions;       // (T) position of each packed token, from its root
    std::vector<std::int64_t> batch_tokens;    // (B+1) batch b owns packed tokens [b, b+1)
    std::vector<std::int64_t> batch_segments;  // (B+1) batch b owns segments [b, b+1)
    std::vector<std::int64_t> q_offsets;       // (S+1) segment s computes packed tokens [s, s+1)
    std::vector<std::int64_t> k_offsets;       // (S+1) segment s attends to k_rows [s, s+1)
    std::vector<std::int32_t> k_rows;          // (K) rows within the batch, in order of position
};

// Sequence i is tokens[offsets[i] .. offsets[i+1]). Distinct sequences, in lexicographic order, are
// one segment each: the tokens that the sequence before it in the batch did not already bring.
// A segment's keys are its whole path from the root, so its queries are the last rows of its keys.
// A batch is closed before it would exceed `budget` tokens, and within the last eighth of that where
// the next sequence shares least with it, because what is shared across is computed twice; a sequence
// longer than the budget stands alone.
// The plan depends on the set of sequences, not on their order, except for segment_of.
// Throws std::invalid_argument on an empty sequence, offsets that do not fit, or budget < 1.
ForestPlan plan_forest(const std::int32_t* tokens, std::int64_t n_tokens, const std::int64_t* offsets,
                       std::int64_t n_sequences, std::int64_t budget);

}  // namespace leakfast
