// Rows of states against a head, tile by tile of the head's rows: what choice_logprobs and divergences share.
// Packs the rows, multiplies one tile with one block of them, and lets threads share the tiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "choice_kernel.hpp"

namespace leakfast {

enum class Element { float32, bfloat16 };

// A matrix of rows with contiguous elements; `stride` is the distance of two rows in bytes.
struct Rows {
    const void* data;
    Element element;
    std::ptrdiff_t stride;
};

// The kernels that this processor runs, best first, and the one named `path` (empty: the best). Throws
// std::invalid_argument if it does not run here.
std::vector<const ChoiceKernel*> choice_kernels(bool all_bfloat16);
const ChoiceKernel& find_choice_kernel(const std::string& path, bool all_bfloat16);

struct Buffer {  // 64-byte aligned, uninitialised
    explicit Buffer(std::int64_t bytes);
    std::unique_ptr<char[]> raw;
    char* data;
};

struct Block {  // up to max_vectors · lanes rows of states, packed
    std::int64_t first;  // its first lane
    int vectors;
    float* packed;
};

// `work(split, scratch)` for each of 0…splits-1, by up to `threads` threads with scratch of their own.
void share_out(int threads, std::int64_t splits, std::int64_t scratch_bytes,
               const std::function<void(std::int64_t, char*)>& work);

class HeadProduct {
  public:
    // lanes: how many rows of states there is place for, rounded up to whole vectors.
    HeadProduct(const ChoiceKernel& kernel, const Rows& head, std::int64_t v, std::int64_t d, std::int64_t lanes);

    // A row of `from` in a lane; lanes without one hold zeros.
    void put(std::int64_t lane, const Rows& from, std::int64_t row);

    // Logits (rows rounded up to a group, lanes of the block) of rows begin… of the head; `staged` holds
    // staged_bytes(). The first block also fetches the tile after this one.
    void multiply(std::int64_t begin, int rows, const Block& block, char* staged, float* logits) const;

    static std::int64_t staged_bytes() { return 4 * kMaxTileRows * kBlockUnits; }
    std::int64_t lanes_of(const Block& block) const { return std::int64_t{block.vectors} * kernel_.lanes; }
    const std::vector<Block>& blocks() const { return blocks_; }
    std::int64_t width() const { return width_; }          // lanes, whole vectors
    std::int64_t tile_rows() const { return tile_rows_; }  // rows of the head a tile has, a multiple of 12
    std::int64_t tiles() const { return tiles_; }
    std::int64_t splits() const { return splits_; }  // parts of the head with sums of their own
    std::int64_t first_tile(std::int64_t split) const { return split * tiles_ / splits_; }
    int rows_of(std::int64_t tile) const;

  private:
    const ChoiceKernel& kernel_;
    const Rows& head_;
    const std::int64_t v_, d_, units_, width_;
    Buffer packed_;
    std::int64_t tile_rows_, tiles_, splits_;
    std::vector<Block> blocks_;
};

}  // namespace leakfast
