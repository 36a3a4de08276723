// The operations, for any instruction set and any number of threads: the same bits for both.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "kernels.h"
#include "reader.h"

namespace octavo {

// The kernels in use: the best that this CPU has, unless another set is chosen by name.
const Kernels& kernels();
std::string kernels_reason();
std::vector<std::string> available_kernels();  // best first
bool choose_kernels(const std::string& name);  // "" for the best; false where this CPU lacks it

// A weight matrix [rows, cols] in one of the formats. It may lie in two places, which may still be being read.
struct Matrix {
    Format format;
    const uint8_t* data;
    int64_t rows, cols;
    int64_t split = INT64_MAX;      // panels from here on...
    const uint8_t* tail = nullptr;  // ...begin there
    std::shared_ptr<Read> data_read = nullptr, tail_read = nullptr;

    // Where a panel of 16 rows begins, once it is there.
    const uint8_t* panel(int64_t p) const {
        const int64_t nbytes = panel_bytes(format, cols);
        const uint8_t* begin = p < split ? data + p * nbytes : tail + (p - split) * nbytes;
        if (const Read* read = (p < split ? data_read : tail_read).get()) read->wait(begin, begin + nbytes);
        return begin;
    }
    bool waits() const { return (data_read && !data_read->done()) || (tail_read && !tail_read->done()); }
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
struct Product {
    const Matrix* w;
    Rows y;
};
void linear(Rows x, const std::vector<Product>& products);
void linear(Rows x, const Matrix& w, Rows y);

// y[t] = sum over k of weights[t * K + k] * w2 (silu(w1 x[t]) * (w3 x[t])) of expert ids[t * K + k],
// added up in float32 by rising expert.
void moe(Rows x, const int64_t* ids, const float* weights, int64_t K, const std::vector<Expert>& experts, Rows y);

// Some experts' part of that, added to y, which is float32: all of them by rising number give the same bits as at once.
// What is computed with is waited for; while it is being read, what is there comes first.
void moe_part(Rows x, const int64_t* ids, const float* weights, int64_t K,
              const std::vector<std::pair<int64_t, Expert>>& experts, Rows y);

// What a block does around the products. Numbers are rounded to x's dtype wherever torch would store them.

// x / rms(x) * weight
struct Norm {
    Numbers weight;
    float eps;
};

struct Attention {
    Norm norm;
    Matrix wq, wk, wv, wo;
    int64_t n_heads, n_kv_heads, head_dim;
};

struct Mixture {
    Norm norm;
    Rows gate;
    int64_t top_k;
    std::vector<Expert> experts;
};

// Keys and values [layer, row, head, slot, head_dim] of x's dtype; strides count numbers. Row r's new tokens are
// r * tokens..(r + 1) * tokens - 1.
struct Cache {
    uint8_t *k, *v;
    int64_t layer_stride, row_stride, head_stride, slot_stride;
    int64_t tokens, end;   // slots 0..end - 1 are there
    const int64_t* slots;  // where each token's key and value go
    const bool* mask;      // [token, end], what each sees, nothing of later tokens; null for all up to its own slot
};

// y = norm(x)
void normalize(Rows x, const Norm& norm, Rows y);

// What a router chose for each row: ids and weights [row, K], logits [row, E].
struct Routing {
    int64_t* ids;
    float *weights, *logits;
};

// The K experts with the highest logits gate x, ids and weights (softmax over the K) best first; equals by index.
void route(Rows x, Rows gate, int64_t K, Routing to);

// y = x + wo attention(rotated wq x', rotated wk x', wv x') with x' = norm(x), after the new keys and values have been
// stored; rotation holds cosine and sine of each pair of a head's numbers, for every token.
void attend(Rows x, const Attention& attention, const float* rotation, const Cache& cache, int64_t layer, Rows y);

// x = x + moe(norm(x), route(norm(x))); the routing is left in `seen`, if it has pointers.
void mix(Rows x, const Mixture& mixture, Routing seen);

// Seconds that this process has spent in linear and moe, and bytes of weights that those multiplied with.
struct Spent {
    double seconds;
    int64_t nbytes;
};
Spent spent();

// While it lives, time is counted there.
class Stopwatch {
  public:
    ~Stopwatch();
    void read(const Matrix& w) { nbytes_ += matrix_bytes(w.format, w.rows, w.cols); }

  private:
    const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
    int64_t nbytes_ = 0;
};

// Bytes a second of a plain read, one pass by all threads; int8 operations a second of dot products in registers.
double read_bandwidth(const std::vector<Matrix>& matrices);
double dot_peak(double seconds);

}  // namespace octavo
