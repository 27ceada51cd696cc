// The inner loop of divergences. A block holds the second states of its pairs in its first lanes, and behind them the first
// states, each once for all neighbouring pairs that have it. Include after choice_tile.hpp, whose vectors and exp it takes.
//
// A token of log-probabilities lp and lq, the larger one L, u = |lp − lq|, adds to KL(p‖q) the number
// p·(lp − lq) − p + q, to KL(q‖p) the same with the letters changed, and to JS ½·[p·log(p/m) + q·log(q/m)] with
// m = (p + q)/2. All three are 0 or more, and −p + q sums to 0 over the vocabulary while it cancels what an error of
// a log-sum-exp adds to the first order. Up to u = log √2 they come from series in w = tanh(u/2) = |p − q|/(p + q),
// since the differences would lose all digits there.

namespace leakfast {
namespace {

struct Terms {
    Floats forward, backward, js;
};

inline __attribute__((always_inline)) Terms terms_of(Floats lp, Floats lq) {
    const Floats x = lp - lq, top = lp < lq ? lq : lp, u = x < 0.0f ? -x : x;
    const Floats large = exp_negative_of<Floats, Ints>(top);

    Floats lost = u * (-1.0f / 5040) + (1.0f / 720);  // lost = 1 − exp(−u), by its series
    lost = lost * u - (1.0f / 120);
    lost = lost * u + (1.0f / 24);
    lost = lost * u - (1.0f / 6);
    lost = lost * u + 0.5f;
    lost = lost * u - 1.0f;
    lost = -(lost * u);
    const Floats w = lost / (2.0f - lost), square = w * w;
    const Floats mean = large - large * lost * 0.5f;
    Floats atanh_rest = square * (1.0f / 9) + (1.0f / 7);  // atanh w = w + w³ · this
    atanh_rest = (atanh_rest * square + (1.0f / 5)) * square + (1.0f / 3);
    const Floats lead = 2.0f * mean * square, rest = w * atanh_rest;
    const Floats near_down = lead * (1.0f + (1.0f + w) * rest), near_up = lead * (1.0f - (1.0f - w) * rest);
    Floats near_js = square * (1.0f / 56) + (1.0f / 30);
    near_js = (near_js * square + (1.0f / 12)) * square + 0.5f;
    near_js = mean * square * near_js;

    const Floats e = exp_negative_of<Floats, Ints>(-u), small = large * e;
    const Floats y = e / (2.0f + e), y2 = y * y;  // log(1 + e) = 2 · atanh y
    Floats log1p = y2 * (1.0f / 11) + (1.0f / 9);
    log1p = ((log1p * y2 + (1.0f / 7)) * y2 + (1.0f / 5)) * y2 + (1.0f / 3);
    log1p = 2.0f * y * (log1p * y2 + 1.0f);
    const Floats between = large - small, under = small * u;
    const Floats far_js = 0.5f * ((large + small) * (0.69314718f - log1p) - under);

    const Ints is_near = u < 0.34657359f, first_is_larger = x > 0.0f;
    const Floats down = is_near ? near_down : large * u - between;  // of the larger from the smaller
    const Floats up = is_near ? near_up : between - under;
    return {first_is_larger ? down : up, first_is_larger ? up : down, is_near ? near_js : far_js};
}

enum class Partners { one, neighbours, any };  // lanes that the first states of a vector's pairs lie in

// `from` holds the lane of the first state of each of the vector's pairs, of which there are `pairs`.
Partners partners_of(const std::int32_t* from, int pairs) {
    bool one = true, neighbours = true;
    for (int i = 1; i < pairs; ++i) {
        one &= from[i] == from[0];
        neighbours &= from[i] == from[0] + i;
    }
    return one ? Partners::one : neighbours ? Partners::neighbours : Partners::any;
}

inline __attribute__((always_inline)) Floats take(const float* row, const std::int32_t* from, Partners partners) {
    if (partners == Partners::one) return row[from[0]] - Floats{};
    if (partners == Partners::neighbours) return load(row + from[0]);
    float taken[kLanes];
    for (int i = 0; i < kLanes; ++i) taken[i] = row[from[i]];
    return load(taken);
}

void compare(const float* logits, int rows, int vectors, int pairs, const std::int32_t* from, const float* maximum,
             const float* log_sum, double* sums) {
    const int width = vectors * kLanes;
    for (int z = 0; z < pairs; z += kLanes) {
        const Partners partners = partners_of(from + z, pairs - z < kLanes ? pairs - z : kLanes);
        const Floats p_top = take(maximum, from + z, partners), p_log = take(log_sum, from + z, partners);
        const Floats q_top = load(maximum + z), q_log = load(log_sum + z);
        Terms total{};
        for (int r = 0; r < rows; ++r) {
            const float* row = logits + r * width;
            const Terms here = terms_of((take(row, from + z, partners) - p_top) - p_log, (load(row + z) - q_top) - q_log);
            total.forward += here.forward;
            total.backward += here.backward;
            total.js += here.js;
        }
        const Floats found[3] = {total.forward, total.backward, total.js};
        for (int kind = 0; kind < 3; ++kind) {
            float added[kLanes];
            store(added, found[kind]);
            for (int i = 0; i < kLanes; ++i) sums[kind * width + z + i] += added[i];
        }
    }
}

}  // namespace
}  // namespace leakfast
