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

struct States {
    const Rows &p, &q;
    const std::int64_t* of;
    std::int64_t n;

    std::int64_t row_of_p(std::int64_t pair) const { return of ? of[pair] : pair; }
    bool is_new(std::int64_t pair) const { return row_of_p(pair) != row_of_p(pair - 1); }
};

// The pairs of one block, and how many rows of p they have.
struct Share {
    std::int64_t first, pairs, owners;

    std::int64_t lanes() const { return pairs + owners; }
};

Share share_of(const States& states, std::int64_t first, std::int64_t lanes) {
    Share share{first, 0, 0};
    for (std::int64_t pair = first; pair < states.n; ++pair) {
        const bool next = pair == first || states.is_new(pair);
        if (share.lanes() + 1 + next > lanes) break;
        ++share.pairs;
        share.owners += next;
    }
    return share;
}

// What goes over the head together: blocks of `widest` lanes, fewer in the last.
std::vector<Share> shares_of(const States& states, std::int64_t first, std::int64_t lanes, std::int64_t widest) {
    std::vector<Share> shares;
    for (; lanes > 1 && first < states.n; lanes -= widest) {
        shares.push_back(share_of(states, first, std::min(lanes, widest)));
        first += shares.back().pairs;
    }
    return shares;
}

// One chunk of pairs against the whole head.
class PairChunk {
  public:
    PairChunk(const ChoiceKernel& kernel, const States& states, const std::vector<Share>& shares, const Rows& head,
              const DivergenceSizes& sizes, float* logits)
        : kernel_(kernel), shares_(shares),
          product_(kernel, head, sizes.v, sizes.d,
                   (static_cast<std::int64_t>(shares.size()) - 1) * kernel.lanes * kernel.max_vectors +
                       shares.back().lanes()),
          work_(product_.width() * sizes.v * sizes.d), logits_(logits) {
        const std::int64_t cells = product_.splits() * product_.width();
        maximum_.assign(cells, -std::numeric_limits<float>::infinity());
        sum_.assign(cells, 0.0);
        top_.assign(product_.width() + kernel.lanes, 0.0f);  // a vector of neighbours may read past the last lane
        log_sum_.assign(product_.width() + kernel.lanes, 0.0f);
        found_.assign(3 * cells, 0.0);
        from_.assign(product_.width() + kernel.lanes, 0);
        for (std::size_t b = 0; b < shares.size(); ++b) {
            const Share& share = shares[b];
            const std::int64_t block = product_.blocks()[b].first;
            std::int64_t owner = share.pairs - 1;
            for (std::int64_t i = 0; i < share.pairs; ++i) {
                const std::int64_t pair = share.first + i;
                if (i == 0 || states.is_new(pair)) product_.put(block + ++owner, states.p, states.row_of_p(pair));
                product_.put(block + i, states.q, pair);
                from_[block + i] = static_cast<std::int32_t>(owner);
            }
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
        for (std::size_t b = 0; b < shares_.size(); ++b) {
            const Block& block = product_.blocks()[b];
            for (std::int64_t i = 0; i < shares_[b].pairs; ++i)
                for (std::int64_t kind = 0; kind < 3; ++kind) {
                    double total = 0;
                    for (std::int64_t s = 0; s < product_.splits(); ++s)
                        total += found_[found_place(s, block) + kind * product_.lanes_of(block) + i];
                    out[kind * n + shares_[b].first + i] = static_cast<float>(total);
                }
        }
    }

  private:
    std::int64_t found_place(std::int64_t split, const Block& block) const {
        return 3 * (split * product_.width() + block.first);
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
            for (std::size_t b = 0; b < shares_.size(); ++b) {
                const Block& block = product_.blocks()[b];
                kernel_.compare(logits_of(tile, block), product_.rows_of(tile), block.vectors,
                                static_cast<int>(shares_[b].pairs), &from_[block.first], &top_[block.first],
                                &log_sum_[block.first], &found_[found_place(split, block)]);
            }
    }

    const ChoiceKernel& kernel_;
    const std::vector<Share>& shares_;
    HeadProduct product_;
    const std::int64_t work_;
    float* logits_;               // tile after tile, within it block after block
    std::vector<float> maximum_;  // (splits, width)
    std::vector<double> sum_;
    std::vector<float> top_, log_sum_;  // (width)
    std::vector<double> found_;         // (splits, blocks, 3, lanes of the block)
    std::vector<std::int32_t> from_;    // (width), the lane in its block of each pair's row of p
};

}  // namespace

void divergences(const Rows& states_p, const Rows& states_q, const Rows& head, const std::int64_t* of,
                 const DivergenceSizes& sizes, int threads, const std::string& path, float* out) {
    if (sizes.v < 1 || sizes.d < 1 || threads < 1)
        throw std::invalid_argument("the head must have rows and columns, and threads be 1 or more");
    bool all_bfloat16 = true;
    for (const Rows* rows : {&states_p, &states_q, &head}) all_bfloat16 &= rows->element == Element::bfloat16;
    const ChoiceKernel& kernel = find_choice_kernel(path, all_bfloat16);
    const std::int64_t whole = (2 * sizes.n + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
    const std::int64_t lanes = std::min(lanes_for(kernel, sizes), std::max<std::int64_t>(whole, kernel.lanes));
    // past its end a vector of neighbours may read
    const Buffer logits(4 * (lanes * (sizes.v + kMaxTileRows) + kernel.lanes));
    const States states{states_p, states_q, of, sizes.n};
    for (std::int64_t first = 0; first < sizes.n;) {
        const std::vector<Share> shares =
            shares_of(states, first, lanes, std::int64_t{kernel.lanes} * kernel.max_vectors);
        PairChunk part(kernel, states, shares, head, sizes, reinterpret_cast<float*>(logits.data));
        part.run(threads);
        part.finish(out, sizes.n);
        first = shares.back().first + shares.back().pairs;
    }
}

}  // namespace leakfast
