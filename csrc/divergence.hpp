// KL both ways and Jensen-Shannon divergence between next-token distributions of pairs of states under one head.
// Floats in, floats out. Knows nothing of models or torch.
#pragma once

#include <cstdint>
#include <string>

#include "head_product.hpp"

namespace leakfast {

struct DivergenceSizes {
    std::int64_t n;  // pairs: rows of q
    std::int64_t d;  // their width
    std::int64_t v;  // rows of the head
};

// p = softmax(states_p·headᵀ), q = softmax(states_q·headᵀ), logits in float32; pair i is row i of q and row of[i] of p (of
// null: row i). Writes out (3, n) in nats: KL(p‖q), KL(q‖p), JS. Neighbouring pairs with one row of p have its logits made
// once. The logits of as many rows as 14 MB hold are kept, so that the head is multiplied once:
// JS needs both log-sum-exps first, and a second product would cost more than keeping them. At most 16 MB in all, more
// only where one vector of rows over v is longer: v above 229,000 for AVX-512, 458,000 for AVX2.
// A NaN in a row reaches its pairs alone; a NaN in the head reaches all. Logits that overflow give NaN. The order
// of additions is fixed by d and v and the path: the bits depend neither on `threads` nor on n nor on a pair's neighbours.
// Throws std::invalid_argument on an empty head, threads < 1 or a path not to be had.
void divergences(const Rows& states_p, const Rows& states_q, const Rows& head, const std::int64_t* of,
                 const DivergenceSizes& sizes, int threads, const std::string& path, float* out);

}  // namespace leakfast
