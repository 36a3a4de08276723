// What the kernels should give, in double precision and element by element: written from the table in docs/formats.md,
// sharing nothing with the kernels but the names of the formats.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "../ops.h"

namespace reference {

using octavo::Format;

constexpr double kHalfUlp = 0x1p-24;    // a float32 operation's relative error
constexpr double kSmallest = 0x1p-126;  // bfloat16 products on some CPUs take smaller numbers for zero

inline double bf16_value(uint16_t bits16) {
    const uint32_t bits = uint32_t(bits16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The nearer of the two bfloat16 around a finite x; the even one of equally near ones.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t down = uint16_t(bits >> 16), up = uint16_t(down + 1);
    // Beyond the largest there is infinity, which rounds as if it were the next power of two.
    const double above = std::isinf(bf16_value(up)) ? std::copysign(0x1p128, x) : bf16_value(up);
    const double to_down = std::fabs(x - bf16_value(down)), to_up = std::fabs(above - x);
    return to_down < to_up || (to_down == to_up && down % 2 == 0) ? down : up;
}

// ---------------------------------------- weights

constexpr int kBooks4[1][16] = {{-63, -47, -37, -30, -23, -17, -11, -5, 0, 5, 11, 17, 23, 30, 39, 53}};
constexpr int kBooks3[2][8] = {{-63, -40, -24, -11, 1, 13, 27, 49}, {-41, -24, -14, -6, 1, 8, 16, 30}};
constexpr int kBooks2[4][4] = {{-63, -18, 3, 32}, {-42, -14, 3, 24}, {-27, -9, 2, 16}, {-26, -3, 15, 44}};

// Columns of a scale group; bytes of a group's codes in a panel of 16 rows; bytes of a block of two groups.
inline int64_t columns_of_group(Format f) { return f == Format::q8 || f == Format::q4 ? 64 : 32; }
inline int64_t bytes_of_codes(Format f) { return 16 * columns_of_group(f) * int(f) / 8; }
inline int64_t bytes_of_block(Format f) { return 64 + 2 * bytes_of_codes(f); }
inline int64_t columns_of_block(Format f) { return 2 * columns_of_group(f); }
inline int64_t blocks(Format f, int64_t cols) { return (cols + columns_of_block(f) - 1) / columns_of_block(f); }
inline int64_t bytes_of_matrix(Format f, int64_t rows, int64_t cols) {
    return f == Format::bf16 ? 2 * rows * cols : (rows + 15) / 16 * blocks(f, cols) * bytes_of_block(f);
}

// The code of a panel's row and a group's column.
inline int code(Format f, const uint8_t* codes, int64_t row, int64_t col) {
    const int lot = int(col / 4);
    const auto byte = [&](int vector) { return int(codes[64 * vector + 4 * row + col % 4]); };
    switch (f) {
        case Format::q8: return byte(lot);
        case Format::q4: return byte(lot / 2) >> 4 * (lot % 2) & 15;
        case Format::q2: return byte(lot / 4) >> 2 * (lot % 4) & 3;
        default: break;
    }
    if (lot < 6) return byte(lot / 2) >> 4 * (lot % 2) & 7;
    const int bit = lot == 6 ? 3 : 7;
    return (byte(0) >> bit & 1) | (byte(1) >> bit & 1) << 1 | (byte(2) >> bit & 1) << 2;
}

// One weight of a matrix.
inline double weight(Format f, const uint8_t* data, int64_t cols, int64_t row, int64_t col) {
    if (f == Format::bf16) {
        uint16_t bits;
        std::memcpy(&bits, data + 2 * (row * cols + col), 2);
        return bf16_value(bits);
    }
    const uint8_t* block = data + (row / 16 * blocks(f, cols) + col / columns_of_block(f)) * bytes_of_block(f);
    const int64_t group = col / columns_of_group(f) % 2, c = col % columns_of_group(f);
    const uint8_t* word = block + 32 * group + 2 * (row % 16);
    const int scale = word[0] | word[1] << 8;
    const int k = code(f, block + 64 + group * bytes_of_codes(f), row % 16, c);
    switch (f) {
        case Format::q8: return bf16_value(uint16_t(scale)) * (k - 128);
        case Format::q4: return bf16_value(uint16_t(scale)) * kBooks4[0][k];
        case Format::q3: return bf16_value(scale & 0xfff0) * kBooks3[scale >> (c / 8) & 1][k];
        default: return bf16_value(scale & 0xfff0) * kBooks2[scale >> (2 * (c / 16)) & 3][k];
    }
}

struct Weights {
    Format format;
    int64_t rows, cols;
    std::vector<double> values;  // [rows, cols]
};

inline Weights decode(const octavo::Matrix& m) {
    Weights out{m.format, m.rows, m.cols, {}};
    for (int64_t row = 0; row < m.rows; ++row) {
        for (int64_t col = 0; col < m.cols; ++col) out.values.push_back(weight(m.format, m.data, m.cols, row, col));
    }
    return out;
}

// ---------------------------------------- activations

// A token as the kernels see it. Before low-bit weights every 64 columns are int8 times their largest magnitude / 127,
// in float32; before bfloat16 ones a column is rounded to bfloat16.
inline std::vector<double> activations(Format f, const float* x, int64_t n) {
    std::vector<double> out(static_cast<size_t>(n));
    if (f == Format::bf16) {
        for (int64_t i = 0; i < n; ++i) out[size_t(i)] = bf16_value(to_bf16(x[i]));
        return out;
    }
    for (int64_t first = 0; first < n; first += 64) {
        const int64_t end = std::min(n, first + 64);
        float most = 0;
        for (int64_t i = first; i < end; ++i) most = std::max(most, std::fabs(x[i]));
        if (most < 1e-36f) continue;  // whose inverse is not finite; counts as zeros
        const float scale = most / 127.0f, inverse = 127.0f / most;
        for (int64_t i = first; i < end; ++i) {
            const float q = std::nearbyint(x[i] * inverse);  // half to even
            out[size_t(i)] = double(std::clamp(q, -127.0f, 127.0f)) * scale;
        }
    }
    return out;
}

// ---------------------------------------- products

// A sum, and how far float32 arithmetic may be from it: so many roundings, each of at most all terms' magnitudes, and
// what the terms were wrong by already.
struct Sum {
    double value = 0, magnitude = 0, roundings = 0, underflow = 0, carried = 0;
    double bound() const { return roundings * kHalfUlp * magnitude + underflow + carried; }
};

// Three roundings in a group of columns, and one for each 64 columns that are added; products of int8 are exact. At
// bfloat16, one for each of the numbers that a lane adds up, and some for the lanes.
inline Sum dot(const Weights& w, int64_t row, const std::vector<double>& x) {
    Sum sum;
    const double* of_row = w.values.data() + row * w.cols;
    for (int64_t i = 0; i < w.cols; ++i) {
        const double term = of_row[i] * x[size_t(i)];
        sum.value += term;
        sum.magnitude += std::fabs(term);
        if (w.format == Format::bf16) sum.underflow += kSmallest * (1 + std::fabs(of_row[i]));
    }
    sum.roundings = w.format == Format::bf16 ? double(w.cols) / 16 + 24 : double(w.cols) / 64 + 5;
    sum.underflow += kSmallest;
    return sum;
}

inline double silu(double x) { return x / (1 + std::exp(-x)); }

// ---------------------------------------- around the products

using Vector = std::vector<double>;

// Each of 64 lanes adds up every 64th product, and they are added in six steps.
inline Sum dot(const Vector& a, const Vector& b) {
    Sum sum;
    for (size_t i = 0; i < a.size(); ++i) {
        sum.value += a[i] * b[i];
        sum.magnitude += std::fabs(a[i] * b[i]);
    }
    sum.roundings = double(a.size()) / 64 + 7;
    sum.underflow = kSmallest;
    return sum;
}

// x / rms(x) * weight. A square root halves what its argument is wrong by, and three roundings follow it.
inline std::vector<Sum> normalize(const Vector& x, const Vector& weight, double eps) {
    const Sum squares = dot(x, x);
    const double scale = 1 / std::sqrt(squares.value / double(x.size()) + eps);
    std::vector<Sum> out;
    for (size_t i = 0; i < x.size(); ++i) {
        const double y = x[i] * scale * weight[i];
        out.push_back({y, std::fabs(y), (squares.roundings + 2) / 2 + 4, kSmallest * (1 + std::fabs(weight[i])), 0});
    }
    return out;
}

// Scores to weights that add up to one. The difference from the highest score is rounded, and the exponential is wrong
// by 2 ulp; below e^-87 it stops falling. Then the weights' sum, in 16 lanes, and a division.
inline std::vector<Sum> softmax(const std::vector<Sum>& scores) {
    double highest = scores[0].value, sum = 0, wrong = 0;
    for (const Sum& score : scores) highest = std::max(highest, score.value);
    std::vector<Sum> out;
    for (const Sum& score : scores) {
        const double below = highest - score.value, e = std::exp(-below);
        const double off = e * std::expm1(score.bound() + kHalfUlp * std::min(below, 88.0)) + std::exp(-87.0);
        out.push_back({e, e, 0, kSmallest, off});
        sum += e;
        wrong += off;
    }
    for (Sum& weight : out) {
        weight.value /= sum;
        weight.magnitude = weight.value;
        weight.roundings = 2 * 4 + double(scores.size()) / 16 + 7;
        weight.carried = weight.carried / sum + weight.value * wrong / sum;
    }
    return out;
}

// What one query sees: columns of the values, weighed by the softmax of query times keys / sqrt(dim).
inline std::vector<Sum> attend(const Vector& query, const std::vector<Vector>& keys,
                               const std::vector<Vector>& values) {
    const double scale = 1 / std::sqrt(double(query.size()));
    std::vector<Sum> scores;
    for (const Vector& key : keys) {
        Sum score = dot(query, key);
        score.roundings = double(query.size()) / 16 + 8;  // 16 lanes here, and the scale's own
        score.value *= scale;
        score.magnitude *= scale;
        scores.push_back(score);
    }
    const std::vector<Sum> weights = softmax(scores);
    std::vector<Sum> out(query.size());
    for (size_t c = 0; c < query.size(); ++c) {
        for (size_t i = 0; i < keys.size(); ++i) {
            const double size = std::fabs(values[i][c]);
            out[c].value += weights[i].value * values[i][c];
            out[c].magnitude += weights[i].value * size;
            out[c].carried += weights[i].carried * size;
            out[c].underflow += kSmallest * (1 + size);
        }
        out[c].roundings = weights[0].roundings + double(keys.size());
    }
    return out;
}

// Two numbers of a head, turned; each product and each sum is rounded to float32.
inline std::array<float, 2> turn(float a, float b, float cosine, float sine) {
    const auto times = [](double x, double y) { return double(float(x * y)); };
    return {float(times(a, cosine) - times(b, sine)), float(times(a, sine) + times(b, cosine))};
}

// Logits' indices, best first: NaN above all, the lower index of equal ones.
inline std::vector<int64_t> best(const float* logits, int64_t n) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < n; ++i) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return std::isnan(logits[a]) ? !std::isnan(logits[b]) : logits[a] > logits[b];
    });
    return order;
}

}  // namespace reference
