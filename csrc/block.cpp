// A block around its products: norms, rotation, attention over the cache, routing. Little work next to them, and done
// here because a library's calls run from cold caches between kernels that stream gigabytes.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "activations.h"

namespace octavo {
namespace {

constexpr int64_t kRowsAlone = 2;       // so many are sooner done than shared out
constexpr int64_t kBlockTokens = 512;  // at a time, so that memory is bounded

template <class Fn>
void for_rows(int64_t count, const Fn& fn) {
    if (count > kRowsAlone) return parallel(count, [&](int64_t row, int) { fn(row); });
    for (int64_t row = 0; row < count; ++row) fn(row);
}

// Memory of the operations here; those within them have an arena of their own.
Arena& own_arena() {
    static thread_local Arena of_this_thread;
    return of_this_thread;
}

template <class T>
T* take(int64_t n) {
    return reinterpret_cast<T*>(own_arena().take(n * int64_t(sizeof(T))));
}

Rows take_rows(Float dtype, int64_t count, int64_t cols) {
    return {dtype, own_arena().take(count * cols * bytes_of(dtype)), count, cols};
}

void round_all(Float dtype, float* x, int64_t n) {
    if (dtype == Float::f32) return;
    for (int64_t i = 0; i < n; ++i) x[i] = from_bf16(to_bf16(x[i]));
}

// One row as float32, in place of which nothing else may be asked for until it has been used.
const float* row_of(const Rows& x, int64_t row, int which = 0) {
    static thread_local std::vector<float> scratch[2];
    scratch[which].resize(size_t(x.cols));
    return row_as_float(x, row, scratch[which].data());
}

void norm_row(const Rows& x, int64_t row, const Norm& norm, const Rows& y) {
    const float* from = row_of(x, row);
    const float* weight = row_of({norm.weight.dtype, const_cast<void*>(norm.weight.data), 1, x.cols}, 0, 1);
    const float squares = kernels().dot(from, {Float::f32, from}, x.cols);
    const float scale = 1.0f / std::sqrt(squares / float(x.cols) + norm.eps);
    static thread_local std::vector<float> out;
    out.resize(size_t(x.cols));
    for (int64_t i = 0; i < x.cols; ++i) out[size_t(i)] = from[i] * scale;
    round_all(x.dtype, out.data(), x.cols);
    for (int64_t i = 0; i < x.cols; ++i) out[size_t(i)] *= weight[i];
    store_row(y, row, 0, out.data(), x.cols);
}

// Turns the pairs of every head of a row; heads of the result are padded(dim) apart.
void rotate(const Rows& x, int64_t row, const float* rotation, int64_t dim, float* out) {
    const float* from = row_of(x, row);
    for (int64_t head = 0; head < x.cols / dim; ++head, from += dim, out += padded(dim)) {
        for (int64_t i = 0; i < dim; i += 2) {
            const float c = rotation[i], s = rotation[i + 1];
            out[i] = from[i] * c - from[i + 1] * s;
            out[i + 1] = from[i] * s + from[i + 1] * c;
        }
        round_all(x.dtype, out, dim);
        std::fill(out + dim, out + padded(dim), 0.0f);
    }
}

Rows some(const Rows& x, int64_t first, int64_t count) {
    return {x.dtype, static_cast<uint8_t*>(x.data) + first * x.cols * bytes_of(x.dtype), count, x.cols};
}

// y = x + y
void add(Rows x, Rows y) {
    for_rows(x.count, [&](int64_t row) {
        const float *a = row_of(x, row), *b = row_of(y, row, 1);
        static thread_local std::vector<float> out;
        out.resize(size_t(x.cols));
        for (int64_t i = 0; i < x.cols; ++i) out[size_t(i)] = a[i] + b[i];
        store_row(y, row, 0, out.data(), x.cols);
    });
}

// A block's attention for tokens begin..begin + x.count - 1 of a step.
struct Attending {
    const Attention& a;
    Cache cache;  // of the layer
    int64_t begin;
    Float dtype;

    int64_t row(int64_t t) const { return (begin + t) / cache.tokens; }
    int64_t slot(int64_t t) const { return cache.slots[begin + t]; }
    const bool* mask(int64_t t) const { return cache.mask ? cache.mask + (begin + t) * cache.end : nullptr; }

    // Stores a token's rotated keys and its values.
    void remember(int64_t t, const float* keys, const Rows& values) const {
        const int64_t dim = a.head_dim;
        const Rows mine = some(values, t, 1);
        const int64_t head_bytes = dim * bytes_of(dtype);
        for (int64_t head = 0; head < a.n_kv_heads; ++head) {
            const int64_t at = row(t) * cache.row_stride + head * cache.head_stride + slot(t) * cache.slot_stride;
            store_row({dtype, cache.k + at * bytes_of(dtype), 1, dim}, 0, 0, keys + head * padded(dim), dim);
            std::memcpy(cache.v + at * bytes_of(dtype), static_cast<uint8_t*>(mine.data) + head * head_bytes,
                        size_t(head_bytes));
        }
    }

    // Every token's heads over what it sees; those that share keys together.
    void heads(const float* queries, const Rows& out) const {
        const int64_t dim = a.head_dim, width = padded(dim), shared = a.n_heads / a.n_kv_heads, T = out.count;
        int64_t most = cache.end;
        if (!cache.mask) most = *std::max_element(cache.slots + begin, cache.slots + begin + T) + 1;
        const int64_t room = shared * (padded(most) + width);
        float* space = take<float>(threads() * room);
        int32_t* lists = take<int32_t>(threads() * padded(most));
        parallel(T * a.n_kv_heads, [&](int64_t task, int thread) {  // a head's keys stay in the cache
            const int64_t t = task % T, head = task / T, first = head * shared;
            int32_t* list = lists + thread * padded(most);
            int64_t n = slot(t) + 1;
            if (const bool* seen = mask(t)) {
                n = 0;
                for (int64_t i = 0; i < cache.end; ++i) {
                    if (seen[i]) list[n++] = int32_t(i);
                }
            }
            const int64_t at = row(t) * cache.row_stride + head * cache.head_stride;
            const Numbers k{dtype, cache.k}, v{dtype, cache.v};
            float *scores = space + thread * room, *mixed = scores + shared * padded(most);
            kernels().attend(queries + (t * a.n_heads + first) * width, int(shared), dim, k.from(at), v.from(at),
                             cache.slot_stride, cache.mask ? list : nullptr, n, scores, mixed);
            for (int64_t i = 0; i < shared; ++i) store_row(out, t, (first + i) * dim, mixed + i * width, dim);
        });
    }

    void run(Rows x, const float* rotation, Rows y) const {
        own_arena().reset();
        const int64_t T = x.count, dim = a.head_dim, width = padded(dim);
        const Rows normed = take_rows(dtype, T, x.cols), q = take_rows(dtype, T, a.wq.rows);
        const Rows k = take_rows(dtype, T, a.wk.rows), v = take_rows(dtype, T, a.wv.rows);
        normalize(x, a.norm, normed);
        linear(normed, {{&a.wq, q}, {&a.wk, k}, {&a.wv, v}});
        float *queries = take<float>(T * a.n_heads * width), *keys = take<float>(T * a.n_kv_heads * width);
        for_rows(T, [&](int64_t t) {
            const float* turn = rotation + (begin + t) * dim;
            rotate(q, t, turn, dim, queries + t * a.n_heads * width);
            rotate(k, t, turn, dim, keys + t * a.n_kv_heads * width);
            remember(t, keys + t * a.n_kv_heads * width, v);
        });
        const Rows mixed = take_rows(dtype, T, a.wo.cols);
        heads(queries, mixed);
        linear(mixed, a.wo, y);
        add(x, y);
    }
};

}  // namespace

void normalize(Rows x, const Norm& norm, Rows y) {
    const Turn turn;
    for_rows(x.count, [&](int64_t row) { norm_row(x, row, norm, y); });
}

void attend(Rows x, const Attention& a, const float* rotation, const Cache& cache, int64_t layer, Rows y) {
    const Turn turn;
    Cache of_layer = cache;
    of_layer.k += layer * cache.layer_stride * bytes_of(x.dtype);
    of_layer.v += layer * cache.layer_stride * bytes_of(x.dtype);
    for (int64_t begin = 0; begin < x.count; begin += kBlockTokens) {
        const int64_t T = std::min(kBlockTokens, x.count - begin);
        Attending{a, of_layer, begin, x.dtype}.run(some(x, begin, T), rotation, some(y, begin, T));
    }
}

void route(Rows x, Rows gate, int64_t K, Routing to) {
    const Turn turn;
    const int64_t E = gate.count;
    for_rows(x.count, [&](int64_t row) {
        const float* from = row_of(x, row);
        float* of_row = to.logits + row * E;
        const Numbers matrix{gate.dtype, gate.data};
        for (int64_t e = 0; e < E; ++e) of_row[e] = kernels().dot(from, matrix.from(e * gate.cols), gate.cols);
        const auto above = [&](int64_t a, int64_t b) {  // NaN is above all, as torch sorts
            return of_row[a] > of_row[b] || (std::isnan(of_row[a]) && !std::isnan(of_row[b]));
        };
        int64_t* best = to.ids + row * K;
        for (int64_t n = 0; n < K; ++n) {
            int64_t found = -1;
            for (int64_t e = 0; e < E; ++e) {
                if (std::find(best, best + n, e) == best + n && (found < 0 || above(e, found))) found = e;
            }
            best[n] = found;
        }
        float *weights = to.weights + row * K, sum = 0.0f;
        for (int64_t n = 0; n < K; ++n) sum += weights[n] = std::exp(of_row[best[n]] - of_row[best[0]]);
        for (int64_t n = 0; n < K; ++n) weights[n] /= sum;
    });
}

void mix(Rows x, const Mixture& m, Routing seen) {
    const Turn turn;
    for (int64_t begin = 0; begin < x.count; begin += kBlockTokens) {
        own_arena().reset();
        const int64_t T = std::min(kBlockTokens, x.count - begin);
        const Rows these = some(x, begin, T);
        const Rows normed = take_rows(x.dtype, T, x.cols), mixed = take_rows(x.dtype, T, x.cols);
        const int64_t K = m.top_k, E = m.gate.count;
        const Routing to = seen.ids ? Routing{seen.ids + begin * K, seen.weights + begin * K, seen.logits + begin * E}
                                    : Routing{take<int64_t>(T * K), take<float>(T * K), take<float>(T * E)};
        normalize(these, m.norm, normed);
        route(normed, m.gate, K, to);
        moe(normed, to.ids, to.weights, K, m.experts, mixed);
        add(mixed, these);
    }
}

}  // namespace octavo
