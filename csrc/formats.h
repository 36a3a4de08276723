// The low-bit formats as the kernels see them; docs/formats.md is the specification.
//
// A matrix [rows, cols] is cut into panels of 16 rows and blocks of two scale groups, both padded at the end. A block
// is 64 bytes of scales (16 rows of its first group, then 16 of its second) and the codes of the two groups. Columns
// come in lots of four: in a lot, byte 4 * row + column % 4 belongs to that row, so that one 64-byte vector of codes
// meets one broadcast of four activations.
#pragma once

#include <cstdint>

namespace octavo {

constexpr int kPanelRows = 16;
constexpr int kUnit = 64;  // columns that share a scale of the activations
constexpr int kUnitLots = 16;
constexpr int kLotBytes = 64;  // 16 rows, 4 columns

enum class Format : int { bf16 = 16, q8 = 8, q4 = 4, q3 = 3, q2 = 2 };

// Code values; a weight is scale * book[code]. At 8 bits it is scale * (code - 128).
constexpr int8_t kBook4[16] = {-63, -47, -37, -30, -23, -17, -11, -5, 0, 5, 11, 17, 23, 30, 39, 53};
// At 3 and 2 bits several books share a table; bits of the scale select one for every 8 or 16 columns of a row.
constexpr int8_t kBook3[16] = {-63, -40, -24, -11, 1, 13, 27, 49, -41, -24, -14, -6, 1, 8, 16, 30};
constexpr int8_t kBook2[16] = {-63, -18, 3, 32, -42, -14, 3, 24, -27, -9, 2, 16, -26, -3, 15, 44};

// Columns that share a scale.
constexpr int group_cols(Format f) { return f == Format::q3 || f == Format::q2 ? 32 : 64; }
constexpr int block_cols(Format f) { return 2 * group_cols(f); }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of 16 rows of a group's codes, of a block, of a panel, of a matrix.
constexpr int64_t group_bytes(Format f) { return int64_t(kPanelRows) * group_cols(f) * int(f) / 8; }
constexpr int64_t block_bytes(Format f) { return 64 + 2 * group_bytes(f); }
constexpr int64_t panel_bytes(Format f, int64_t cols) {
    return f == Format::bf16 ? kPanelRows * cols * 2 : ceil_div(cols, block_cols(f)) * block_bytes(f);
}
constexpr int64_t matrix_bytes(Format f, int64_t rows, int64_t cols) {
    return f == Format::bf16 ? rows * cols * 2 : ceil_div(rows, kPanelRows) * panel_bytes(f, cols);
}
// Units of 64 columns, padding included.
constexpr int64_t units(Format f, int64_t cols) { return ceil_div(cols, block_cols(f)) * block_cols(f) / kUnit; }

}  // namespace octavo
