#include "divergence.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

namespace leakfast {
namespace {

constexpr std::int64_t kLogitsBytes = 14 << 20;  // kept at once; with packed rows and sums below 16 MB
constexpr std::int64_t kMaxLanes = 256;          // rows of both sides that go together over the head
constexpr std::int64_t kMaxPacked = 1 << 20;     // bytes of them, packed
constexpr std::int64_t kOneThread = 10'000'000;  // multiply-adds below which threads cost more than they bring

// Lanes of a chunk: as many as the limits allow, one vector at least.
std::int64_t lanes_for(const ChoiceKernel& kernel, const DivergenceSizes& sizes) {
    const std::int64_t kept = kLogitsBytes / (4 * (sizes.v + kMaxTileRows)), packed = kMaxPacked / (4 * sizes.d);
    const std::int64_t lanes = std::min({kMaxLanes, kept, packed}) / kernel.lanes * kernel.lanes;
    return std::max<std::int64_t>(lanes, kernel.lanes);
}

// One chunk of pairs against the whole head.
class PairChunk {
  public:
    PairChunk(const ChoiceKernel& kernel, const Rows& states_p, const Rows& states_q, const Rows& head,
              const DivergenceSizes& sizes, std::int64_t first, std::int64_t pairs, float* logits)
        : kernel_(kernel), first_(first), pairs_(pairs), product_(kernel, head, sizes.v, sizes.d, 2 * pairs),
          work_(2 * pairs * sizes.v * sizes.d), logits_(logits) {
        const std::int64_t cells = product_.splits() * product_.width();
        maximum_.assign(cells, -std::numeric_limits<float>::infinity());
        sum_.assign(cells, 0.0);
        top_.assign(product_.width(), 0.0f);
        log_sum_.assign(product_.width(), 0.0f);
        found_.assign(product_.splits() * 3 * product_.width() / 2, 0.0);
        for (std::int64_t pair = 0; pair < pairs; ++pair) {
            const auto [block, lane] = place_of(pair);
            product_.put(block->first + lane, states_p, first + pair);
            product_.put(block->first + product_.lanes_of(*block) / 2 + lane, states_q, first + pair);
        }
    }

    void run(int threads) {
        if (work_ < kOneThread) threads = 1;
        share_out(threads, product_.splits(), HeadProduct::staged_bytes(),
                  [this](std::int64_t split, char* scratch) { multiply(split, scratch); });
        normalise();
        share_out(threads, product_.splits(), 0, [this](std::int64_t split, char*) { compare(split); });
    }

    // All parts of a pair, in the order of the head.
    void finish(float* out, std::int64_t n) const {
        for (std::int64_t pair = 0; pair < pairs_; ++pair) {
            const auto [block, lane] = place_of(pair);
            const std::int64_t half = product_.lanes_of(*block) / 2;
            for (std::int64_t kind = 0; kind < 3; ++kind) {
                double total = 0;
                for (std::int64_t s = 0; s < product_.splits(); ++s)
                    total += found_[found_place(s, *block) + kind * half + lane];
                out[kind * n + first_ + pair] = static_cast<float>(total);
            }
        }
    }

  private:
    struct Place {
        const Block* block;
        std::int64_t lane;
    };

    Place place_of(std::int64_t pair) const {
        const std::int64_t widest = kernel_.lanes * kernel_.max_vectors / 2;
        return {&product_.blocks()[pair / widest], pair % widest};
    }

    std::int64_t found_place(std::int64_t split, const Block& block) const {
        return 3 * (split * product_.width() + block.first) / 2;
    }

    float* logits_of(std::int64_t tile, const Block& block) const {
        const std::int64_t rows = product_.tile_rows();
        return logits_ + tile * rows * product_.width() + block.first * rows;
    }

    void multiply(std::int64_t split, char* staged) {
        for (std::int64_t tile = product_.first_tile(split); tile < product_.first_tile(split + 1); ++tile)
            for (const Block& block : product_.blocks()) {
                float* logits = logits_of(tile, block);
                const int rows = product_.rows_of(tile);
                product_.multiply(tile * product_.tile_rows(), rows, block, staged, logits);
                const std::int64_t place = split * product_.width() + block.first;
                kernel_.reduce(logits, rows, block.vectors, &maximum_[place], &sum_[place]);
            }
    }

    void normalise() {
        const std::int64_t width = product_.width(), splits = product_.splits();
        for (std::int64_t lane = 0; lane < width; ++lane) {
            float top = -std::numeric_limits<float>::infinity();
            double sum = 0;
            for (std::int64_t s = 0; s < splits; ++s) top = std::max(top, maximum_[s * width + lane]);
            for (std::int64_t s = 0; s < splits; ++s)
                sum += sum_[s * width + lane] * std::exp(double(maximum_[s * width + lane]) - top);
            top_[lane] = top;
            log_sum_[lane] = static_cast<float>(std::log(sum));
        }
    }

    void compare(std::int64_t split) {
        for (std::int64_t tile = product_.first_tile(split); tile < product_.first_tile(split + 1); ++tile)
            for (const Block& block : product_.blocks())
                kernel_.compare(logits_of(tile, block), product_.rows_of(tile), block.vectors, &top_[block.first],
                                &log_sum_[block.first], &found_[found_place(split, block)]);
    }

    const ChoiceKernel& kernel_;
    const std::int64_t first_, pairs_;
    HeadProduct product_;
    const std::int64_t work_;
    float* logits_;               // tile after tile, within it block after block
    std::vector<float> maximum_;  // (splits, width)
    std::vector<double> sum_;
    std::vector<float> top_, log_sum_;  // (width)
    std::vector<double> found_;         // (splits, blocks, 3, pairs of the block)
};

}  // namespace

void divergences(const Rows& states_p, const Rows& states_q, const Rows& head, const DivergenceSizes& sizes,
                 int threads, const std::string& path, float* out) {
    if (sizes.v < 1 || sizes.d < 1 || threads < 1)
        throw std::invalid_argument("the head must have rows and columns, and threads be 1 or more");
    bool all_bfloat16 = true;
    for (const Rows* rows : {&states_p, &states_q, &head}) all_bfloat16 &= rows->element == Element::bfloat16;
    const ChoiceKernel& kernel = find_choice_kernel(path, all_bfloat16);
    const std::int64_t whole = (2 * sizes.n + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
    const std::int64_t lanes = std::min(lanes_for(kernel, sizes), std::max<std::int64_t>(whole, kernel.lanes));
    const Buffer logits(4 * lanes * (sizes.v + kMaxTileRows));
    for (std::int64_t first = 0; first < sizes.n; first += lanes / 2) {
        const std::int64_t pairs = std::min(lanes / 2, sizes.n - first);
        PairChunk part(kernel, states_p, states_q, head, sizes, first, pairs,
                       reinterpret_cast<float*>(logits.data));
        part.run(threads);
        part.finish(out, sizes.n);
    }
}

}  // namespace leakfast
