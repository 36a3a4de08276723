// What each instruction set provides: one table of functions, made from the same templates (kernels.inl).
//
// Activations come in tiles of a few tokens. A tile of T tokens is a sequence of units of 64 columns, each
// {int8 q[T][64]; float scale[T]; int32 offset[T][3];}: x[t][64 u + k] = q[t][k] * scale[t], and the offsets are -64 times
// the sum of q over the unit's first half, its second half, and both.
#pragma once

#include "formats.h"

#define OCTAVO_STRING(x) #x

namespace octavo {

constexpr int kDirectTokens = 8;  // so many are multiplied while the codes are unpacked
constexpr int kTileTokens = 6;    // of a tile, where there are more
constexpr int kSpanUnits = 8;     // units that are unpacked at a time for many tokens: what L1 holds
constexpr int kMaxPanels = 2;     // multiplied side by side

constexpr int kLanes = 16;        // of a vector of floats
constexpr int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

enum class Float { f32, bf16 };
constexpr int64_t bytes_of(Float dtype) { return dtype == Float::f32 ? 4 : 2; }

constexpr int64_t unit_bytes(int tokens) { return int64_t(tokens) * (kUnit + 4 + 12); }

struct Tile {
    const uint8_t* data;
    int tokens;
};

// Unpacked codes [unit][lot][panel][64] and scales [unit][group][panel][16] of up to two panels.
struct Span {
    alignas(64) uint8_t lots[kSpanUnits * kUnitLots * kMaxPanels * kLotBytes];
    alignas(64) float scales[kSpanUnits * 2 * kMaxPanels * kPanelRows];
};

// Numbers in memory.
struct Numbers {
    Float dtype;
    const void* data;

    Numbers from(int64_t i) const { return {dtype, static_cast<const uint8_t*>(data) + i * bytes_of(dtype)}; }
};

struct Kernels {
    const char* name;

    // One token's x[0..n) into place t of a tile of T tokens, from unit `first` on; padded with zeros to whole units.
    void (*quantize)(const float* x, int64_t n, uint8_t* tile, int T, int t, int64_t first, int64_t n_units);
    // y[t * stride + r] = row r of the panel times token t of a tile of at most kDirectTokens.
    void (*direct)(Format f, const uint8_t* panel, int64_t n_units, Tile x, float* y, int64_t stride);
    // y[t * stride + 16 * p + r]: one or two panels, and a row of tiles of at most kTileTokens, t counted over all.
    void (*many)(Format f, const uint8_t* const* panels, int n, int64_t n_units, const Tile* tiles,
                 int64_t n_tiles, float* y, int64_t stride, Span* span);
    // y[t * 16 + r] = bfloat16 row r of at most 16 times bfloat16 token t.
    void (*bf16)(const uint16_t* w, int rows, int64_t cols, const uint16_t* const* x, int64_t tokens, float* y);
    // h[i] = silu(a[i]) * b[i], in float32
    void (*silu_mul)(const float* a, const float* b, float* h, int64_t n);
    // The sum of a[i] * b[i]; b is float32 or bfloat16.
    float (*dot)(const float* a, Numbers b, int64_t n);
    // Attention of some queries over one head's keys and values, rows `stride` apart, of which slots[0..n) are seen;
    // null for 0..n - 1. Rows of q and out are padded(head_dim) apart, q's with zeros, and those of scores padded(n).
    void (*attend)(const float* q, int queries, int64_t head_dim, Numbers k, Numbers v, int64_t stride,
                   const int32_t* slots, int64_t n, float* scores, float* out);
    // XOR of all 64-byte words, so that a read can be timed; and dot products in registers, whose number is returned.
    uint64_t (*read)(const uint8_t* data, int64_t nbytes);
    uint64_t (*dot_peak)(int64_t rounds, int32_t* sink);
};

// Null where the compiler does not target the instruction set.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* avx512vbmi_kernels();
const Kernels* neon_kernels();

}  // namespace octavo
