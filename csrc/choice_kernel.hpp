// What an instruction set brings to choice_logprobs and divergences. choice_tile.hpp and divergence_tile.hpp hold the
// one implementation, which choice_<set>.cpp compile each for their own; head_product.cpp asks the processor and takes one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace leakfast {

constexpr int kBlockUnits = 64;   // units of 4 bytes along D between two partial sums
constexpr int kMaxTileRows = 48;  // rows of the head a tile holds at most: a multiple of every group below

// A packed block holds `vectors` · lanes rows of hidden, transposed: unit k of every row side by side. A
// unit is 4 bytes: one float32, or with `pairs` two bfloat16 neighbours along D.
struct ChoiceKernel {
    const char* name;
    bool pairs;
    int lanes;        // rows of hidden in a vector
    int max_vectors;  // vectors in the widest block
    // out (rows rounded up to a group, vectors · lanes) = or += packed · headᵀ over `units` units of D
    // (at most kBlockUnits); `ahead` is how far in bytes to prefetch the head, 0 for not.
    void (*multiply)(const float* packed, int vectors, const char* head, std::ptrdiff_t stride, int rows,
                     int units, bool first, std::ptrdiff_t ahead, float* out);
    // Folds the logits (rows, vectors · lanes) into each lane's running maximum and sum of exp(logit − maximum).
    void (*reduce)(const float* logits, int rows, int vectors, float* maximum, double* sum);
    // bfloat16 rows to float32 rows of kBlockUnits; `ahead` as above
    void (*widen)(const char* head, std::ptrdiff_t stride, int rows, int units, std::ptrdiff_t ahead,
                  float* out);
    // Logits (rows, vectors · lanes), the second state of pair i in lane i, its first state in lane from[i], with `lanes`
    // entries of `from` more than there are pairs to be read. Adds each pair's KL(first‖second), KL(second‖first) and JS of
    // these rows to sums (3, vectors · lanes), given each lane's maximum and log Σ exp(logit − maximum) over the whole head.
    void (*compare)(const float* logits, int rows, int vectors, int pairs, const std::int32_t* from,
                    const float* maximum, const float* log_sum, double* sums);
};

const ChoiceKernel& choice_portable();
#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define LEAKFAST_CHOICE_X86 1
const ChoiceKernel& choice_avx2();
const ChoiceKernel& choice_avx512();
const ChoiceKernel& choice_avx512_bf16();
#endif

}  // namespace leakfast
