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
