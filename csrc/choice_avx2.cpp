// choice_logprobs for AVX2 with FMA: 12 of 16 registers hold sums.
#include "choice_kernel.hpp"

#ifdef LEAKFAST_CHOICE_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LEAKFAST_LANES 8
#define LEAKFAST_VECTORS 2
#define LEAKFAST_ROWS 6
#include "choice_tile.hpp"
#include "divergence_tile.hpp"

namespace leakfast {

const ChoiceKernel& choice_avx2() {
    static const ChoiceKernel kernel{"avx2", false, kLanes, kMaxVectors, multiply, reduce, widen, compare};
    return kernel;
}

}  // namespace leakfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
