// choice_logprobs for AVX-512: 24 of 32 registers hold sums.
#include "choice_kernel.hpp"

#ifdef LEAKFAST_CHOICE_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif

#define LEAKFAST_LANES 16
#define LEAKFAST_VECTORS 4
#define LEAKFAST_ROWS 6
#include "choice_tile.hpp"
#include "divergence_tile.hpp"

namespace leakfast {

const ChoiceKernel& choice_avx512() {
    static const ChoiceKernel kernel{"avx512", false, kLanes, kMaxVectors, multiply, reduce, widen, compare};
    return kernel;
}

}  // namespace leakfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
