#include "head_product.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace leakfast {
namespace {

constexpr std::int64_t kMaxSplits = 128;        // parts of the head with sums of their own
constexpr std::int64_t kTileBytes = 192 << 10;  // of the head: with the next tile it stays in a 1 MB L2

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

}  // namespace

std::vector<const ChoiceKernel*> choice_kernels(bool all_bfloat16) {
    std::vector<const ChoiceKernel*> found;
#ifdef LEAKFAST_CHOICE_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f");
    if (all_bfloat16 && avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&choice_avx512_bf16());
    if (avx512) found.push_back(&choice_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&choice_avx2());
#else
    (void)all_bfloat16;
#endif
    found.push_back(&choice_portable());
    return found;
}

const ChoiceKernel& find_choice_kernel(const std::string& path, bool all_bfloat16) {
    for (const ChoiceKernel* kernel : choice_kernels(all_bfloat16))
        if (path.empty() || path == kernel->name) return *kernel;
    throw std::invalid_argument("path '" + path + "' does not run on this processor with these dtypes");
}

Buffer::Buffer(std::int64_t bytes) : raw(new char[bytes + 64]) {
    const auto address = reinterpret_cast<std::uintptr_t>(raw.get());
    data = raw.get() + (64 - address % 64) % 64;
}

void share_out(int threads, std::int64_t splits, std::int64_t scratch_bytes,
               const std::function<void(std::int64_t, char*)>& work) {
    threads = static_cast<int>(std::min<std::int64_t>(threads, splits));
    std::vector<std::unique_ptr<Buffer>> scratch;
    for (int t = 0; t < threads; ++t) scratch.push_back(std::make_unique<Buffer>(scratch_bytes));
    std::atomic<std::int64_t> next{0};
    auto loop = [&](char* own) {
        for (std::int64_t split; (split = next.fetch_add(1)) < splits;) work(split, own);
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int t = 1; t < threads; ++t) others.emplace_back(loop, scratch[t]->data);
    } catch (const std::system_error&) {  // no more threads to be had: those there are share the work
    }
    loop(scratch[0]->data);
    for (std::thread& other : others) other.join();
}

HeadProduct::HeadProduct(const ChoiceKernel& kernel, const Rows& head, std::int64_t v, std::int64_t d,
                         std::int64_t lanes)
    : kernel_(kernel), head_(head), v_(v), d_(d), units_(kernel.pairs ? (d + 1) / 2 : d),
      width_((lanes + kernel.lanes - 1) / kernel.lanes * kernel.lanes), packed_(4 * units_ * width_) {
    const std::int64_t unit_bytes = head.element == Element::bfloat16 && !kernel.pairs ? 2 : 4;
    tile_rows_ = std::clamp<std::int64_t>(kTileBytes / (unit_bytes * units_) / 12 * 12, 12, kMaxTileRows);
    tiles_ = (v + tile_rows_ - 1) / tile_rows_;
    splits_ = std::min(tiles_, kMaxSplits);
    std::memset(packed_.data, 0, 4 * units_ * width_);
    const std::int64_t widest = kernel.lanes * kernel.max_vectors;
    char* to = packed_.data;
    for (std::int64_t first = 0; first < width_; first += widest) {
        const std::int64_t here = std::min(widest, width_ - first);
        blocks_.push_back({first, static_cast<int>(here / kernel.lanes), reinterpret_cast<float*>(to)});
        to += 4 * units_ * here;
    }
}

void HeadProduct::put(std::int64_t lane, const Rows& from, std::int64_t row) {
    const Block& block = blocks_[lane / (kernel_.lanes * kernel_.max_vectors)];
    const std::int64_t lanes = lanes_of(block);
    char* to = reinterpret_cast<char*>(block.packed + (lane - block.first));
    for (std::int64_t k = 0; k < units_; ++k) {
        const std::uint32_t bits = unit_of(from, row, k, kernel_.pairs, d_);
        std::memcpy(to + 4 * k * lanes, &bits, 4);
    }
}

int HeadProduct::rows_of(std::int64_t tile) const {
    return static_cast<int>(std::min(tile_rows_, v_ - tile * tile_rows_));
}

void HeadProduct::multiply(std::int64_t begin, int rows, const Block& block, char* staged_bytes,
                           float* logits) const {
    float* staged = reinterpret_cast<float*>(staged_bytes);
    const char* head = static_cast<const char*>(head_.data) + begin * head_.stride;
    const std::int64_t lanes = lanes_of(block);
    const std::ptrdiff_t ahead = block.first == 0 ? tile_rows_ * head_.stride : 0;
    const bool widen = head_.element == Element::bfloat16 && !kernel_.pairs;
    for (std::int64_t k = 0; k < units_; k += kBlockUnits) {
        const int units = static_cast<int>(std::min<std::int64_t>(kBlockUnits, units_ - k));
        const float* packed = block.packed + k * lanes;
        const bool half_pair = kernel_.pairs && d_ % 2 && k + units == units_;
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
            kernel_.multiply(packed, block.vectors, head + 4 * k, head_.stride, rows, units, k == 0, ahead,
                             logits);
    }
}

}  // namespace leakfast
