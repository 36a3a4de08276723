// Activations of some tokens, made ready for the kernels: int8 tiles, or bfloat16 rows.
#pragma once

#include <cstring>

#include "ops.h"
#include "pool.h"

namespace octavo {

constexpr int64_t kTokensAtATime = 1024;  // in an operation, so that the results of a task stay in the cache
constexpr int64_t kPairRows = kMaxPanels * kPanelRows;

// Memory that is kept from call to call, so that large activations do not fault in their pages every time.
class Arena {
  public:
    uint8_t* take(int64_t nbytes);
    void reset();

  private:
    struct Block {
        std::vector<uint8_t> bytes;
        int64_t used = 0;
    };
    std::vector<Block> blocks_;
};

Arena& arena();  // of the calling thread; operations reset it when they begin

// What each thread of a job needs besides: room for floats, and for unpacked codes where there are many tokens.
class Workspace {
  public:
    Workspace(int64_t n_floats, bool spans);
    float* floats(int thread) const { return floats_ + thread * n_floats_; }
    Span* span(int thread) const { return spans_ ? spans_ + thread : nullptr; }

  private:
    int64_t n_floats_;
    float* floats_;
    Span* spans_ = nullptr;
};

// Some tokens' activations of `cols` columns for matrices of one format.
class Activations {
  public:
    Activations(Format format, int64_t tokens, int64_t cols);

    // Columns [first, first + n) of one token; first is a multiple of 64, and n too unless the row ends there.
    void set(int64_t token, const float* x, int64_t first, int64_t n);
    // All columns of one token.
    void set_row(int64_t token, const Rows& from, int64_t row);

    Format format() const { return format_; }

    // Multiplies with panels first..first + n - 1 of w, at most two: y[token * stride + 16 * p + r].
    void times(const Matrix& w, int64_t first, int n, float* y, int64_t stride, Span* span) const;

  private:
    Format format_;
    int64_t tokens_, cols_, units_ = 0;
    int64_t n_tiles_ = 0;
    Tile* tiles_ = nullptr;
    uint8_t** places_ = nullptr;  // each token's tile, writable
    int* in_tile_ = nullptr;      // each token's place there
    int* tile_size_ = nullptr;
    uint16_t** rows_ = nullptr;   // of bfloat16
};

// Calls fn(token), by all threads unless a few are sooner done by one.
template <class Fn>
void for_tokens(int64_t tokens, const Fn& fn) {
    if (tokens > kDirectTokens) return parallel(tokens, [&](int64_t t, int) { fn(t); });
    for (int64_t t = 0; t < tokens; ++t) fn(t);
}

// How many panels of nbytes each a task takes of so many bytes that all threads stream from memory: long stretches, for
// threads that take turns within a megabyte are slower than one alone, and yet many enough to share out evenly.
int64_t panels_of_task(int64_t panel_nbytes, int64_t total_nbytes);

float* row_as_float(const Rows& from, int64_t row, float* scratch);
void store_row(const Rows& to, int64_t row, int64_t first, const float* x, int64_t n);

// To the nearest, the even one of two; NaN stays NaN. Without branches, so that compilers make vectors of it.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}
inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

}  // namespace octavo
