#include "choice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace leakfast {
namespace {

constexpr std::int64_t kMaxChunk = 256;          // rows of hidden that go together over the head
constexpr std::int64_t kMaxPacked = 4 << 20;     // bytes of them, packed
constexpr std::int64_t kOneThread = 10'000'000;  // multiply-adds below which threads cost more than they bring

struct Wanted {
    std::int64_t id, row, slot;  // token, row within the chunk, place in logprobs
};

// One chunk of rows against the whole head.
class Chunk {
  public:
    Chunk(const ChoiceKernel& kernel, const Rows& hidden, const Rows& head, const ChoiceSizes& sizes,
          std::int64_t first, std::int64_t rows)
        : kernel_(kernel), sizes_(sizes), rows_(rows), product_(kernel, head, sizes.v, sizes.d, rows) {
        const std::int64_t width = product_.width();
        maximum_.assign(product_.splits() * width, -std::numeric_limits<float>::infinity());
        sum_.assign(product_.splits() * width, 0.0);
        for (std::int64_t r = 0; r < rows; ++r) product_.put(r, hidden, first + r);
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
        if (rows_ * sizes_.v * sizes_.d < kOneThread) threads = 1;
        share_out(threads, product_.splits(), logits_bytes() + HeadProduct::staged_bytes(),
                  [this](std::int64_t split, char* scratch) { do_split(split, scratch); });
    }

    // Second pass, in the order of the head: all parts of a row to one maximum and one sum.
    void finish(float* lse) {
        const std::int64_t width = product_.width(), splits = product_.splits();
        for (std::int64_t row = 0; row < rows_; ++row) {
            double top = -std::numeric_limits<double>::infinity(), sum = 0;
            for (std::int64_t s = 0; s < splits; ++s) top = std::max(top, double(maximum_[s * width + row]));
            for (std::int64_t s = 0; s < splits; ++s)
                sum += sum_[s * width + row] * std::exp(maximum_[s * width + row] - top);
            const double log_sum = std::log(sum);
            lse[row] = static_cast<float>(top + log_sum);
            for (std::int64_t c = 0; c < sizes_.c; ++c) {
                float& place = logits_[row * sizes_.c + c];
                place = static_cast<float>((place - top) - log_sum);
            }
        }
    }

  private:
    std::int64_t logits_bytes() const { return 4 * kMaxTileRows * kernel_.lanes * kernel_.max_vectors; }

    void do_split(std::int64_t split, char* scratch) {
        for (std::int64_t tile = product_.first_tile(split); tile < product_.first_tile(split + 1); ++tile)
            for (const Block& block : product_.blocks()) do_tile(split, tile, block, scratch);
    }

    void do_tile(std::int64_t split, std::int64_t tile, const Block& block, char* scratch) {
        float* logits = reinterpret_cast<float*>(scratch);
        const std::int64_t begin = tile * product_.tile_rows(), lanes = product_.lanes_of(block);
        const int rows = product_.rows_of(tile);
        product_.multiply(begin, rows, block, scratch + logits_bytes(), logits);
        const std::int64_t place = split * product_.width() + block.first;
        kernel_.reduce(logits, rows, block.vectors, &maximum_[place], &sum_[place]);
        auto it = std::lower_bound(wanted_.begin(), wanted_.end(), begin,
                                   [](const Wanted& a, std::int64_t id) { return a.id < id; });
        for (; it != wanted_.end() && it->id < begin + rows; ++it)
            if (it->row >= block.first && it->row < block.first + lanes)
                logits_[it->slot] = logits[(it->id - begin) * lanes + it->row - block.first];
    }

    const ChoiceKernel& kernel_;
    const ChoiceSizes& sizes_;
    const std::int64_t rows_;
    HeadProduct product_;
    std::vector<Wanted> wanted_;
    std::vector<float> maximum_;  // (splits, width)
    std::vector<double> sum_;
    float* logits_ = nullptr;
};

}  // namespace

std::vector<std::string> choice_paths(bool both_bfloat16) {
    std::vector<std::string> names;
    for (const ChoiceKernel* kernel : choice_kernels(both_bfloat16)) names.push_back(kernel->name);
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
    const ChoiceKernel& kernel = find_choice_kernel(path, both);
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
