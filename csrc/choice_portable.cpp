// choice_logprobs for any processor: vectors of 4 floats (SSE2, NEON, or what the compiler makes of them).
#include "choice_kernel.hpp"

#define LEAKFAST_LANES 4
#define LEAKFAST_VECTORS 2
#define LEAKFAST_ROWS 4
#include "choice_tile.hpp"
#include "divergence_tile.hpp"

namespace leakfast {

const ChoiceKernel& choice_portable() {
    static const ChoiceKernel kernel{"portable", false, kLanes, kMaxVectors, multiply, reduce, widen, compare};
    return kernel;
}

}  // namespace leakfast
