// The inner loop of divergences over vectors of half the lanes (a block holds the first states of its pairs in one
// half, the second in the other). Include after choice_tile.hpp, whose instruction set and exp it takes.
//
// A token of log-probabilities lp and lq, the larger one L, u = |lp − lq|, adds to KL(p‖q) the number
// p·(lp − lq) − p + q, to KL(q‖p) the same with the letters changed, and to JS ½·[p·log(p/m) + q·log(q/m)] with
// m = (p + q)/2. All three are 0 or more, and −p + q sums to 0 over the vocabulary while it cancels what an error of
// a log-sum-exp adds to the first order. Up to u = log √2 they come from series in w = tanh(u/2) = |p − q|/(p + q),
// since the differences would lose all digits there.

namespace leakfast {
namespace {

constexpr int kHalf = kLanes / 2;
typedef float HalfFloats __attribute__((vector_size(4 * kHalf)));
typedef std::int32_t HalfInts __attribute__((vector_size(4 * kHalf)));

inline __attribute__((always_inline)) HalfFloats load_half(const float* p) {
    HalfFloats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

struct Terms {
    HalfFloats forward, backward, js;
};

inline __attribute__((always_inline)) Terms terms_of(HalfFloats lp, HalfFloats lq) {
    const HalfFloats x = lp - lq, top = lp < lq ? lq : lp, u = x < 0.0f ? -x : x;
    const HalfFloats large = exp_negative_of<HalfFloats, HalfInts>(top);

    HalfFloats lost = u * (-1.0f / 5040) + (1.0f / 720);  // lost = 1 − exp(−u), by its series
    lost = lost * u - (1.0f / 120);
    lost = lost * u + (1.0f / 24);
    lost = lost * u - (1.0f / 6);
    lost = lost * u + 0.5f;
    lost = lost * u - 1.0f;
    lost = -(lost * u);
    const HalfFloats w = lost / (2.0f - lost), square = w * w;
    const HalfFloats mean = large - large * lost * 0.5f;
    HalfFloats atanh_rest = square * (1.0f / 9) + (1.0f / 7);  // atanh w = w + w³ · this
    atanh_rest = (atanh_rest * square + (1.0f / 5)) * square + (1.0f / 3);
    const HalfFloats lead = 2.0f * mean * square, rest = w * atanh_rest;
    const HalfFloats near_down = lead * (1.0f + (1.0f + w) * rest), near_up = lead * (1.0f - (1.0f - w) * rest);
    HalfFloats near_js = square * (1.0f / 56) + (1.0f / 30);
    near_js = (near_js * square + (1.0f / 12)) * square + 0.5f;
    near_js = mean * square * near_js;

    const HalfFloats e = exp_negative_of<HalfFloats, HalfInts>(-u), small = large * e;
    const HalfFloats y = e / (2.0f + e), y2 = y * y;  // log(1 + e) = 2 · atanh y
    HalfFloats log1p = y2 * (1.0f / 11) + (1.0f / 9);
    log1p = ((log1p * y2 + (1.0f / 7)) * y2 + (1.0f / 5)) * y2 + (1.0f / 3);
    log1p = 2.0f * y * (log1p * y2 + 1.0f);
    const HalfFloats between = large - small, under = small * u;
    const HalfFloats far_js = 0.5f * ((large + small) * (0.69314718f - log1p) - under);

    const HalfInts is_near = u < 0.34657359f, first_is_larger = x > 0.0f;
    const HalfFloats down = is_near ? near_down : large * u - between;  // of the larger from the smaller
    const HalfFloats up = is_near ? near_up : between - under;
    return {first_is_larger ? down : up, first_is_larger ? up : down, is_near ? near_js : far_js};
}

void compare(const float* logits, int rows, int vectors, const float* maximum, const float* log_sum, double* sums) {
    const int half = vectors * kHalf, width = 2 * half;
    for (int z = 0; z < half; z += kHalf) {
        const HalfFloats p_top = load_half(maximum + z), q_top = load_half(maximum + half + z);
        const HalfFloats p_log = load_half(log_sum + z), q_log = load_half(log_sum + half + z);
        Terms total{};
        for (int r = 0; r < rows; ++r) {
            const float* row = logits + r * width + z;
            const Terms here = terms_of((load_half(row) - p_top) - p_log, (load_half(row + half) - q_top) - q_log);
            total.forward += here.forward;
            total.backward += here.backward;
            total.js += here.js;
        }
        const HalfFloats found[3] = {total.forward, total.backward, total.js};
        for (int kind = 0; kind < 3; ++kind) {
            float added[kHalf];
            __builtin_memcpy(added, &found[kind], sizeof added);
            for (int i = 0; i < kHalf; ++i) sums[kind * half + z + i] += added[i];
        }
    }
}

}  // namespace
}  // namespace leakfast
