// The inner loops of choice_logprobs over vectors of LEAKFAST_LANES floats, for the instruction set that is
// in force where this file is included. Include the standard headers before setting one, so that none of
// their inline functions is compiled for it. All names are local to the including file.

namespace leakfast {
namespace {

constexpr int kLanes = LEAKFAST_LANES;
constexpr int kMaxVectors = LEAKFAST_VECTORS;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline __attribute__((always_inline)) Floats load(const float* p) {
    Floats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

inline __attribute__((always_inline)) void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

#ifdef LEAKFAST_PAIRS
inline __attribute__((always_inline)) Floats multiply_add(Floats sum, Floats a, const char* unit) {
    std::int32_t pair;
    __builtin_memcpy(&pair, unit, sizeof pair);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(pair));
}
#else
inline __attribute__((always_inline)) Floats multiply_add(Floats sum, Floats a, const char* unit) {
    float scalar;
    __builtin_memcpy(&scalar, unit, sizeof scalar);
    return sum + a * scalar;
}
#endif

// A group of kRows rows of the head against kVectors vectors of hidden, all sums in registers.
template <int kVectors, int kRows>
void multiply_group(const float* packed, const char* const* head, int units, bool first,
                    std::ptrdiff_t ahead, float* out) {
    Floats sums[kRows][kVectors] = {};
    for (int begin = 0; begin < units; begin += 16) {
        const int end = begin + 16 < units ? begin + 16 : units;
        if (ahead)
            for (int r = 0; r < kRows; ++r) __builtin_prefetch(head[r] + ahead + 4 * begin, 0, 2);
        for (int k = begin; k < end; ++k) {
            Floats a[kVectors];
            for (int z = 0; z < kVectors; ++z) a[z] = load(packed + (k * kVectors + z) * kLanes);
            for (int r = 0; r < kRows; ++r)
                for (int z = 0; z < kVectors; ++z) sums[r][z] = multiply_add(sums[r][z], a[z], head[r] + 4 * k);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int z = 0; z < kVectors; ++z) {
            float* place = out + (r * kVectors + z) * kLanes;
            store(place, first ? sums[r][z] : load(place) + sums[r][z]);
        }
}

template <int kVectors>
void multiply_rows(const float* packed, const char* head, std::ptrdiff_t stride, int rows, int units,
                   bool first, std::ptrdiff_t ahead, float* out) {
    constexpr int kRows = LEAKFAST_ROWS;
    static_assert(kMaxTileRows % kRows == 0, "a tile is whole groups");
    for (int r = 0; r < rows; r += kRows) {
        const char* group[kRows];
        for (int i = 0; i < kRows; ++i)  // past the end: the last row again, into rows that nobody reads
            group[i] = head + stride * (r + i < rows ? r + i : rows - 1);
        multiply_group<kVectors, kRows>(packed, group, units, first, ahead, out + r * kVectors * kLanes);
    }
}

void multiply(const float* packed, int vectors, const char* head, std::ptrdiff_t stride, int rows, int units,
              bool first, std::ptrdiff_t ahead, float* out) {
    switch (vectors) {
        case 1: return multiply_rows<1>(packed, head, stride, rows, units, first, ahead, out);
        case 2: return multiply_rows<2>(packed, head, stride, rows, units, first, ahead, out);
#if LEAKFAST_VECTORS >= 4
        case 3: return multiply_rows<3>(packed, head, stride, rows, units, first, ahead, out);
        default: return multiply_rows<4>(packed, head, stride, rows, units, first, ahead, out);
#endif
    }
}

// exp(x) for x ≤ 0 within 2 units in the last place: 2ⁿ · eʳ with |r| ≤ ln 2 / 2, eʳ by its series to r⁷.
// Below −87 it stays at e⁻⁸⁷, which is nothing beside a sum of at least 1. NaN stays NaN.
template <typename F, typename I>
inline __attribute__((always_inline)) F exp_negative_of(F x) {
    const F lowest = F{} - 87.0f;
    x = x < lowest ? lowest : x;
    const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2²³: the integer lands in the low bits
    const F n = shifted - 12582912.0f;
    F r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    I bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;
    F scale;
    __builtin_memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

inline __attribute__((always_inline)) Floats exp_negative(Floats x) { return exp_negative_of<Floats, Ints>(x); }

void reduce(const float* logits, int rows, int vectors, float* maximum, double* sum) {
    const int width = vectors * kLanes;
    for (int z = 0; z < width; z += kLanes) {
        const Floats before = load(maximum + z);
        Floats top = before;
        for (int r = 0; r < rows; ++r) {
            const Floats x = load(logits + r * width + z);
            top = x > top ? x : top;
        }
        Floats sums[4] = {};
        int r = 0;
        for (; r + 4 <= rows; r += 4)
            for (int i = 0; i < 4; ++i) sums[i] += exp_negative(load(logits + (r + i) * width + z) - top);
        for (; r < rows; ++r) sums[0] += exp_negative(load(logits + r * width + z) - top);
        float scale[kLanes], added[kLanes];
        store(scale, exp_negative(before - top));
        store(added, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        store(maximum + z, top);
        for (int i = 0; i < kLanes; ++i) sum[z + i] = sum[z + i] * scale[i] + added[i];
    }
}

void widen(const char* head, std::ptrdiff_t stride, int rows, int units, std::ptrdiff_t ahead, float* out) {
    typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    for (int r = 0; r < rows; ++r) {
        const char* row = head + stride * r;
        float* to = out + static_cast<std::ptrdiff_t>(r) * kBlockUnits;
        if (ahead)
            for (int k = 0; k < units; k += 32) __builtin_prefetch(row + ahead + 2 * k, 0, 2);
        int k = 0;
        for (; k + kLanes <= units; k += kLanes) {
            Halves halves;
            __builtin_memcpy(&halves, row + 2 * k, sizeof halves);
            const Ints bits = __builtin_convertvector(halves, Ints) << 16;
            __builtin_memcpy(to + k, &bits, sizeof bits);
        }
        for (; k < units; ++k) {
            std::uint16_t half;
            __builtin_memcpy(&half, row + 2 * k, sizeof half);
            const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
            __builtin_memcpy(to + k, &bits, sizeof bits);
        }
    }
}

}  // namespace
}  // namespace leakfast
