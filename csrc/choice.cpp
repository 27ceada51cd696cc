#include "choice.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "choice_kernel.hpp"

namespace leakfast {
namespace {

constexpr std::int64_t kMaxChunk = 256;          // rows of hidden that go together over the head
constexpr std::int64_t kMaxPacked = 4 << 20;     // bytes of them, packed
constexpr std::int64_t kMaxSplits = 128;         // parts of the head with a maximum and sum of their own
constexpr std::int64_t kTileBytes = 192 << 10;   // of the head: with the next tile it stays in a 1 MB L2
constexpr std::int64_t kOneThread = 10'000'000;  // multiply-adds below which threads cost more than they bring

std::vector<const ChoiceKernel*> kernels(bool both_bfloat16) {
    std::vector<const ChoiceKernel*> found;
#ifdef LEAKFAST_CHOICE_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f");
    if (both_bfloat16 && avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&choice_avx512_bf16());
    if (avx512) found.push_back(&choice_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&choice_avx2());
#else
    (void)both_bfloat16;
#endif
    found.push_back(&choice_portable());
    return found;
}

const ChoiceKernel& find_kernel(const std::string& path, bool both_bfloat16) {
    for (const ChoiceKernel* kernel : kernels(both_bfloat16))
        if (path.empty() || path == kernel->name) return *kernel;
    throw std::invalid_argument("path '" + path + "' does not run on this processor with these dtypes");
}

struct Buffer {  // 64-byte aligned, uninitialised
    explicit Buffer(std::int64_t bytes) : raw(new char[bytes + 64]) {
        const auto address = reinterpret_cast<std::uintptr_t>(raw.get());
        data = raw.get() + (64 - address % 64) % 64;
    }
    std::unique_ptr<char[]> raw;
    char* data;
};

struct Block {  // up to max_vectors · lanes rows of hidden, packed
    std::int64_t first;  // its first row within the chunk
    std::int64_t rows;
    int vectors;
    const float* packed;
};

struct Wanted {
    std::int64_t id, row, slot;  // token, row within the chunk, place in logprobs
};

std::uint32_t unit_of(const Rows& from, std::int64_t row, std::int64_t unit, bool pairs, std::int64_t d) {
    const char* start = static_cast<const char*>(from.data) + row * from.stride;
    std::uint16_t halves[2] = {0, 0};
    std::uint32_t bits;
    if (pairs) {
        std::memcpy(halves, start + 4 * unit, 2 * unit + 1 < d ? 4 : 2);
        std::memcpy(&bits, halves, 4);
    } else if (from.element == Element::bfloat16) {
        std::memcpy(halves + 1, start + 2 * unit, 2);
        bits = static_cast<std::uint32_t>(halves[1]) << 16;
    } else {
        std::memcpy(&bits, start + 4 * unit, 4);
    }
    return bits;
}

// One chunk of rows against the whole head.
class Chunk {
  public:
    Chunk(const ChoiceKernel& kernel, const Rows& hidden, const Rows& head, const ChoiceSizes& sizes,
          std::int64_t first, std::int64_t rows)
        : kernel_(kernel), head_(head), sizes_(sizes), rows_(rows),
          units_(kernel.pairs ? (sizes.d + 1) / 2 : sizes.d), width_(padded(kernel, rows)),
          packed_(4 * units_ * width_) {
        const std::int64_t unit_bytes = head.element == Element::bfloat16 && !kernel.pairs ? 2 : 4;
        tile_rows_ = std::clamp<std::int64_t>(kTileBytes / (unit_bytes * units_) / 12 * 12,
                                              12, kMaxTileRows);
        tiles_ = (sizes.v + tile_rows_ - 1) / tile_rows_;
        splits_ = std::min(tiles_, kMaxSplits);
        maximum_.assign(splits_ * width_, -std::numeric_limits<float>::infinity());
        sum_.assign(splits_ * width_, 0.0);
        pack(hidden, first);
    }

    static std::int64_t padded(const ChoiceKernel& kernel, std::int64_t rows) {
        return (rows + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
    }

    void want(const std::int64_t* token_ids, float* logits) {
        logits_ = logits;
        wanted_.resize(rows_ * sizes_.c);
        for (std::int64_t i = 0; i < rows_ * sizes_.c; ++i) wanted_[i] = {token_ids[i], i / sizes_.c, i};
        std::sort(wanted_.begin(), wanted_.end(), [](const Wanted& a, const Wanted& b) {
            return a.id != b.id ? a.id < b.id : a.slot < b.slot;
        });
    }

    void run(int threads) {
        threads = static_cast<int>(std::min<std::int64_t>(threads, splits_));
        if (rows_ * sizes_.v * sizes_.d < kOneThread) threads = 1;
        std::vector<std::unique_ptr<Buffer>> scratch;
        for (int t = 0; t < threads; ++t) scratch.push_back(std::make_unique<Buffer>(scratch_bytes()));
        std::atomic<std::int64_t> next{0};
        auto work = [&](char* own) {
            for (std::int64_t split; (split = next.fetch_add(1)) < splits_;) do_split(split, own);
        };
        std::vector<std::thread> others;
        others.reserve(threads);
        try {
            for (int t = 1; t < threads; ++t) others.emplace_back(work, scratch[t]->data);
        } catch (const std::system_error&) {  // no more threads to be had: those there are share the work
        }
        work(scratch[0]->data);
        for (std::thread& other : others) other.join();
    }

    // Second pass, in the order of the head: all parts of a row to one maximum and one sum.
    void finish(float* lse) {
        for (std::int64_t row = 0; row < rows_; ++row) {
            double top = -std::numeric_limits<double>::infinity(), sum = 0;
            for (std::int64_t s = 0; s < splits_; ++s) top = std::max(top, double(maximum_[s * width_ + row]));
            for (std::int64_t s = 0; s < splits_; ++s)
                sum += sum_[s * width_ + row] * std::exp(maximum_[s * width_ + row] - top);
            const double log_sum = std::log(sum);
            lse[row] = static_cast<float>(top + log_sum);
            for (std::int64_t c = 0; c < sizes_.c; ++c) {
                float& place = logits_[row * sizes_.c + c];
                place = static_cast<float>((place - top) - log_sum);
            }
        }
    }

  private:
    void pack(const Rows& hidden, std::int64_t first) {
        const std::int64_t widest = kernel_.lanes * kernel_.max_vectors;
        char* to = packed_.data;
        for (std::int64_t begin = 0; begin < rows_; begin += widest) {
            const std::int64_t rows = std::min(widest, rows_ - begin), lanes = padded(kernel_, rows);
            blocks_.push_back({begin, rows, static_cast<int>(lanes / kernel_.lanes), reinterpret_cast<float*>(to)});
            std::memset(to, 0, 4 * units_ * lanes);
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t k = 0; k < units_; ++k) {
                    const std::uint32_t bits = unit_of(hidden, first + begin + r, k, kernel_.pairs, sizes_.d);
                    std::memcpy(to + 4 * (k * lanes + r), &bits, 4);
                }
            to += 4 * units_ * lanes;
        }
    }

    std::int64_t logits_bytes() const { return 4 * kMaxTileRows * kernel_.lanes * kernel_.max_vectors; }
    std::int64_t scratch_bytes() const { return logits_bytes() + 4 * kMaxTileRows * kBlockUnits; }

    void do_split(std::int64_t split, char* scratch) {
        const std::int64_t last = (split + 1) * tiles_ / splits_;
        for (std::int64_t tile = split * tiles_ / splits_; tile < last; ++tile) {
            const std::int64_t begin = tile * tile_rows_;
            const int rows = static_cast<int>(std::min(tile_rows_, sizes_.v - begin));
            for (const Block& block : blocks_) do_tile(split, begin, rows, block, scratch);
        }
    }

    void do_tile(std::int64_t split, std::int64_t begin, int rows, const Block& block, char* scratch) {
        float* logits = reinterpret_cast<float*>(scratch);
        float* staged = reinterpret_cast<float*>(scratch + logits_bytes());
        const char* head = static_cast<const char*>(head_.data) + begin * head_.stride;
        const std::int64_t lanes = std::int64_t{block.vectors} * kernel_.lanes;
        // the first block of a tile also fetches the tile after it
        const std::ptrdiff_t ahead = block.first == 0 ? tile_rows_ * head_.stride : 0;
        const bool widen = head_.element == Element::bfloat16 && !kernel_.pairs;
        for (std::int64_t k = 0; k < units_; k += kBlockUnits) {
            const int units = static_cast<int>(std::min<std::int64_t>(kBlockUnits, units_ - k));
            const float* packed = block.packed + k * lanes;
            const bool half_pair = kernel_.pairs && sizes_.d % 2 && k + units == units_;
            if (widen) {
                kernel_.widen(head + 2 * k, head_.stride, rows, units, ahead, staged);
            } else if (half_pair) {  // the last unit of a row is one element: fill it up with a zero
                for (int r = 0; r < rows; ++r) {
                    float* row = staged + r * kBlockUnits;
                    row[units - 1] = 0;
                    std::memcpy(row, head + r * head_.stride + 4 * k, 4 * units - 2);
                }
            }
            if (widen || half_pair)
                kernel_.multiply(packed, block.vectors, reinterpret_cast<const char*>(staged), 4 * kBlockUnits,
                                 rows, units, k == 0, 0, logits);
            else
                kernel_.multiply(packed, block.vectors, head + 4 * k, head_.stride, rows, units, k == 0,
                                 ahead, logits);
        }
        kernel_.reduce(logits, rows, block.vectors, &maximum_[split * width_ + block.first],
                       &sum_[split * width_ + block.first]);
        auto it = std::lower_bound(wanted_.begin(), wanted_.end(), begin,
                                   [](const Wanted& a, std::int64_t id) { return a.id < id; });
        for (; it != wanted_.end() && it->id < begin + rows; ++it)
            if (it->row >= block.first && it->row < block.first + block.rows)
                logits_[it->slot] = logits[(it->id - begin) * lanes + it->row - block.first];
    }

    const ChoiceKernel& kernel_;
    const Rows& head_;
    const ChoiceSizes& sizes_;
    const std::int64_t rows_, units_, width_;
    Buffer packed_;
    std::int64_t tile_rows_, tiles_, splits_;
    std::vector<Block> blocks_;
    std::vector<Wanted> wanted_;
    std::vector<float> maximum_;  // (splits, width)
    std::vector<double> sum_;
    float* logits_ = nullptr;
};

}  // namespace

std::vector<std::string> choice_paths(bool both_bfloat16) {
    std::vector<std::string> names;
    for (const ChoiceKernel* kernel : kernels(both_bfloat16)) names.push_back(kernel->name);
    return names;
}

void choice_logprobs(const Rows& hidden, const Rows& head, const std::int64_t* token_ids,
                     const ChoiceSizes& sizes, int threads, const std::string& path, float* logprobs,
                     float* lse) {
    if (sizes.v < 1 || sizes.d < 1 || threads < 1)
        throw std::invalid_argument("the head must have rows and columns, and threads be 1 or more");
    for (std::int64_t i = 0; i < sizes.n * sizes.c; ++i)
        if (token_ids[i] < 0 || token_ids[i] >= sizes.v)
            throw std::invalid_argument("token ids must lie in 0…" + std::to_string(sizes.v - 1));
    const bool both = hidden.element == Element::bfloat16 && head.element == Element::bfloat16;
    const ChoiceKernel& kernel = find_kernel(path, both);
    const std::int64_t row_bytes = 4 * sizes.d;
    const std::int64_t chunk = std::clamp<std::int64_t>(kMaxPacked / row_bytes / 64 * 64, 16, kMaxChunk);
    for (std::int64_t first = 0; first < sizes.n; first += chunk) {
        const std::int64_t rows = std::min(chunk, sizes.n - first);
        Chunk part(kernel, hidden, head, sizes, first, rows);
        part.want(token_ids + first * sizes.c, logprobs + first * sizes.c);
        part.run(threads);
        part.finish(lse + first);
    }
}

}  // namespace leakfast
