// The operations, for any instruction set and any number of threads: the same bits for both.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace octavo {

// The kernels in use: the best that this CPU has, unless another set is chosen by name.
const Kernels& kernels();
std::string kernels_reason();
std::vector<std::string> available_kernels();  // best first
bool choose_kernels(const std::string& name);  // "" for the best; false where this CPU lacks it

enum class Float { f32, bf16 };

// A weight matrix [rows, cols] in one of the formats.
struct Matrix {
    Format format;
    const uint8_t* data;
    int64_t rows, cols;
};

// Rows of numbers, `cols` apart.
struct Rows {
    Float dtype;
    void* data;
    int64_t count, cols;
};

struct Expert {
    Matrix w1, w3, w2;
};

// y = x w^T
void linear(Rows x, const Matrix& w, Rows y);

// y[t] = sum over k of weights[t * K + k] * w2 (silu(w1 x[t]) * (w3 x[t])) of expert ids[t * K + k],
// added up in float32 by rising expert.
void moe(Rows x, const int64_t* ids, const float* weights, int64_t K, const std::vector<Expert>& experts, Rows y);

// Bytes a second of a plain read, one pass by all threads; int8 operations a second of dot products in registers.
double read_bandwidth(const std::vector<Matrix>& matrices);
double dot_peak(double seconds);

}  // namespace octavo
