// Log-probabilities of chosen rows of a head, streamed over the head so that no (N, V) array exists.
// Floats in, floats out. Knows nothing of models or torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "head_product.hpp"

namespace leakfast {

struct ChoiceSizes {
    std::int64_t n;  // rows of hidden
    std::int64_t d;  // their width
    std::int64_t v;  // rows of the head
    std::int64_t c;  // choices a row
};

// The instruction sets of choice_logprobs that this processor runs, best first. "avx512_bf16" multiplies
// pairs of bfloat16 and takes no float32.
std::vector<std::string> choice_paths(bool both_bfloat16);

// logits = hidden·headᵀ in float32; lse (n) is their log-sum-exp over the head's rows, and
// logprobs (n, c) is logits[i, token_ids[i, c]] − lse[i]. Both in nats. A NaN in a row of hidden reaches
// that row alone; a NaN in the head reaches all. A row whose logits overflow to infinity comes out as NaN.
// The order of additions is fixed by d and v and the path: the bits depend neither on `threads` nor on n.
// Takes at most 5 MB plus 64 KB a thread (more only where 16 rows of hidden are longer than 4 MB).
// Throws std::invalid_argument on an id outside 0…v-1, an empty head, threads < 1 or a path not to be had.
void choice_logprobs(const Rows& hidden, const Rows& head, const std::int64_t* token_ids,
                     const ChoiceSizes& sizes, int threads, const std::string& path, float* logprobs,
                     float* lse);

}  // namespace leakfast
