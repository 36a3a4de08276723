// The promises in check.cpp's head for the operations of a decode step: attend, mix, several products at once, and the
// time and bytes that are counted.
#include "check_block.h"

#include <unistd.h>

#include <atomic>
#include <numbers>
#include <thread>

#include "support.h"

using namespace octavo;
using namespace support;

namespace {

constexpr Format q8 = Format::q8, q4 = Format::q4, q3 = Format::q3, q2 = Format::q2, bf16 = Format::bf16;
constexpr float kEps = 1e-5f;
constexpr int64_t kTokens = 9;  // more than one thread or the direct kernels would do

// ---------------------------------------- attention

struct Shape {
    std::array<Format, 4> formats;  // of wq, wk, wv and wo
    int64_t D, n_heads, n_kv_heads, head_dim;
    int64_t rows, tokens, end;
    bool masked, slots_outside;  // of heads, in memory
};

std::string text_of(const Shape& s) {
    return text("%s,%s,%s,%s D=%ld heads=%ld/%ld dim=%ld tokens=%ldx%ld end=%ld%s%s", name_of(s.formats[0]),
                name_of(s.formats[1]), name_of(s.formats[2]), name_of(s.formats[3]), long(s.D), long(s.n_heads),
                long(s.n_kv_heads), long(s.head_dim), long(s.rows), long(s.tokens), long(s.end),
                s.masked ? " masked" : "", s.slots_outside ? " slots outside" : "");
}

// Keys and values of all layers, rows, heads and slots.
template <class T>
struct Memory {
    Guarded<T> k, v;

    explicit Memory(int64_t n) : k(n), v(n) {}
    Memory(const Memory& other) : Memory(other.k.size()) {
        std::copy(other.k.begin(), other.k.end(), k.begin());
        std::copy(other.v.begin(), other.v.end(), v.begin());
    }
};

// A block's attention, and new tokens of some rows, one slot after another. In memory all is NaN but what they see; and
// where their keys and values go, there is NaN too.
template <class T>
struct Block {
    static constexpr int64_t kLayer = 1;
    Shape shape;
    int64_t D, dim, n;  // tokens in all
    std::deque<Weights> weights;
    Guarded<T> norm, x;
    Guarded<float> rotation;
    Guarded<int64_t> slots;
    Guarded<bool> mask;
    Attention attention;
    Cache strides{};
    Memory<T> memory;

    Block(const Shape& s, Random& random)
        : shape(s), D(s.D), dim(s.head_dim), n(s.rows * s.tokens), norm(D), x(n * D), rotation(n * dim), slots(n),
          mask(s.masked ? n * s.end : 0), attention(matrices(s, random)), memory(lay(s)) {
        // Weights are large: with this norm, queries and keys are not.
        const float size = s.formats[0] == bf16 ? 0.05f : 0.002f;
        for (T& weight : norm) weight = rounded<T>(size * random.normal());
        fill(x, random);
        for (int64_t i = 0; i < rotation.size(); i += 2) {
            const double angle = std::numbers::pi * random.uniform();
            rotation[i] = float(std::cos(angle)), rotation[i + 1] = float(std::sin(angle));
        }
        for (int64_t row = 0; row < s.rows; ++row) {
            const int64_t last = s.end - s.tokens;
            const int64_t first = row == 0 ? last : row + 1 == s.rows ? 0 : random.below(last + 1);
            for (int64_t t = 0; t < s.tokens; ++t) slots[row * s.tokens + t] = first + t;
        }
        for (int64_t i = 0; i < mask.size(); ++i) mask[i] = random.below(3) == 0 || i % s.end == slots[i / s.end];
        std::fill(memory.k.begin(), memory.k.end(), nan<T>());
        std::fill(memory.v.begin(), memory.v.end(), nan<T>());
        for (int64_t t = 0; t < n; ++t) {
            for (const int64_t slot : seen_by(t)) {
                for (int64_t i = 0; !is_new(t, slot) && i < s.n_kv_heads * dim; ++i) {
                    const int64_t at = place(t, i / dim, slot) + i % dim;
                    memory.k[at] = random_number<T>(random), memory.v[at] = random_number<T>(random);
                }
            }
        }
    }

    // Where a number of a token's row lies.
    int64_t place(int64_t t, int64_t head, int64_t slot) const {
        const Cache& c = strides;
        return kLayer * c.layer_stride + t / c.tokens * c.row_stride + head * c.head_stride + slot * c.slot_stride;
    }

    bool sees(int64_t t, int64_t slot) const { return shape.masked ? mask[t * shape.end + slot] : slot <= slots[t]; }

    std::vector<int64_t> seen_by(int64_t t) const {
        std::vector<int64_t> out;
        for (int64_t slot = 0; slot < shape.end; ++slot) {
            if (sees(t, slot)) out.push_back(slot);
        }
        return out;
    }

    // Whether one of its row's tokens goes there.
    bool is_new(int64_t t, int64_t slot) const {
        const int64_t first = slots[t / shape.tokens * shape.tokens];
        return first <= slot && slot < first + shape.tokens;
    }

    // The operation, for some of the rows.
    void attend(const Memory<T>& in, int64_t first, int64_t count, T* y) const {
        const int64_t t = first * shape.tokens;
        Cache cache = strides;
        cache.k = reinterpret_cast<uint8_t*>(in.k.data() + first * cache.row_stride);
        cache.v = reinterpret_cast<uint8_t*>(in.v.data() + first * cache.row_stride);
        cache.slots = slots.data() + t;
        cache.mask = shape.masked ? mask.data() + t * shape.end : nullptr;
        octavo::attend(rows_of(&x[t * D], count * shape.tokens, D), attention, &rotation[t * dim], cache, kLayer,
                       rows_of(y, count * shape.tokens, D));
    }

  private:
    Attention matrices(const Shape& s, Random& random) {
        const int64_t of_queries = s.n_heads * dim, of_keys = s.n_kv_heads * dim;
        const Matrix& wq = weights.emplace_back(s.formats[0], of_queries, D, random).matrix;
        const Matrix& wk = weights.emplace_back(s.formats[1], of_keys, D, random).matrix;
        const Matrix& wv = weights.emplace_back(s.formats[2], of_keys, D, random).matrix;
        const Matrix& wo = weights.emplace_back(s.formats[3], D, of_queries, random).matrix;
        return {{numbers(norm.data()), kEps}, wq, wk, wv, wo, s.n_heads, s.n_kv_heads, dim};
    }

    // Sets the strides, with some room between what they are for; returns how many numbers there are to the last slot.
    int64_t lay(const Shape& s) {
        const int64_t capacity = s.end + 2;
        strides.tokens = s.tokens;
        strides.end = s.end;
        strides.head_stride = s.slots_outside ? dim : capacity * dim;
        strides.slot_stride = s.slots_outside ? s.n_kv_heads * dim + 3 : dim;
        strides.row_stride = s.slots_outside ? capacity * strides.slot_stride : s.n_kv_heads * strides.head_stride + 5;
        strides.layer_stride = s.rows * strides.row_stride;
        return place(n - 1, s.n_kv_heads - 1, s.end - 1) + dim;
    }
};

template <class T>
void turn_heads(T* x, int64_t n, const float* rotation, int64_t dim) {
    for (int64_t i = 0; i < n; i += 2) {
        const auto [a, b] = reference::turn(float(value(x[i])), float(value(x[i + 1])), rotation[i % dim],
                                            rotation[i % dim + 1]);
        x[i] = rounded<T>(a), x[i + 1] = rounded<T>(b);
    }
}

// What one head of a token gives, by the kernel with the keys and values side by side; it is near the reference.
template <class T>
std::vector<float> mix_of_head(const Block<T>& block, const Memory<T>& memory, const T* q, int64_t t, int64_t head) {
    const int64_t dim = block.dim, shared = block.shape.n_heads / block.shape.n_kv_heads;
    const std::vector<int64_t> seen = block.seen_by(t);
    const int64_t n = int64_t(seen.size());
    Guarded<float> query(padded(dim)), scores(padded(n)), out(padded(dim));
    Guarded<T> k(n * dim), v(n * dim);
    for (int64_t c = 0; c < padded(dim); ++c) query[c] = c < dim ? float(value(q[head * dim + c])) : 0.0f;
    std::vector<reference::Vector> keys, values;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = block.place(t, head / shared, seen[size_t(i)]);
        std::copy(&memory.k[at], &memory.k[at] + dim, &k[i * dim]);
        std::copy(&memory.v[at], &memory.v[at] + dim, &v[i * dim]);
        keys.push_back(values_of(&k[i * dim], dim));
        values.push_back(values_of(&v[i * dim], dim));
    }
    kernels().attend(query.data(), 1, dim, numbers(k.data()), numbers(v.data()), dim, nullptr, n, scores.data(),
                     out.data());
    const std::vector<reference::Sum> wanted = reference::attend(values_of(query.data(), dim), keys, values);
    for (int64_t c = 0; c < dim && expect_near(out[c], wanted[size_t(c)], head, c); ++c) {}
    return {out.begin(), out.begin() + dim};
}

// The operation in its parts, a token at a time: first all keys and values, then what each sees.
template <class T>
void attend_in_parts(const Block<T>& block, const Memory<T>& memory, T* y) {
    const Attention& a = block.attention;
    const int64_t D = block.D, dim = block.dim, of_queries = a.wq.rows;
    Guarded<T> q(block.n * of_queries), normed(D), k(a.wk.rows), v(a.wv.rows), mixed(of_queries);
    for (int64_t t = 0; t < block.n; ++t) {
        const Rows in = rows_of(normed.data(), 1, D);
        normalize(rows_of(&block.x[t * D], 1, D), a.norm, in);
        linear(in, a.wq, rows_of(&q[t * of_queries], 1, of_queries));
        linear(in, a.wk, rows_of(k.data(), 1, k.size()));
        linear(in, a.wv, rows_of(v.data(), 1, v.size()));
        turn_heads(&q[t * of_queries], of_queries, &block.rotation[t * dim], dim);
        turn_heads(k.data(), k.size(), &block.rotation[t * dim], dim);
        for (int64_t i = 0; i < k.size(); ++i) {
            const int64_t at = block.place(t, i / dim, block.slots[t]) + i % dim;
            memory.k[at] = k[i], memory.v[at] = v[i];
        }
    }
    for (int64_t t = 0; t < block.n; ++t) {
        for (int64_t head = 0; head < a.n_heads; ++head) {
            const std::vector<float> of_head = mix_of_head(block, memory, &q[t * of_queries], t, head);
            std::ranges::transform(of_head, &mixed[head * dim], rounded<T>);
        }
        linear(rows_of(mixed.data(), 1, of_queries), a.wo, rows_of(y + t * D, 1, D));
        for (int64_t i = t * D; i < (t + 1) * D; ++i) y[i] = rounded<T>(float(value(block.x[i])) + float(value(y[i])));
    }
}

template <class T>
void check_attend(const Shape& shape) {
    Random random(uint32_t(shape.D + shape.end));
    const Block<T> block(shape, random);
    const int64_t D = block.D;
    const bool has_bf16 = std::ranges::find(shape.formats, bf16) != shape.formats.end();
    std::vector<T> first;
    with_every_set(text("block %s %s", name_of_type<T>(), text_of(shape).c_str()), [&](const std::string& what) {
        std::vector<T> y(size_t(block.n * D));
        const Memory<T> after(block.memory);
        attend_in_parts(block, after, y.data());
        if (!has_bf16) expect_same_on_all(y, first, D);
        expect_same_in_company(what, y, shape.tokens * D, [&](int64_t begin, int64_t count, T* to) {
            const Memory<T> memory(block.memory);
            block.attend(memory, begin, count, to);
            // Nothing of other rows, layers or slots has been written.
            const int64_t n = Block<T>::kLayer * block.strides.layer_stride + begin * block.strides.row_stride;
            expect_same_bits(memory.k.data(), block.memory.k.data(), n, D, "before (keys)");
            expect_same_bits(memory.v.data(), block.memory.v.data(), n, D, "before (values)");
            expect_same_bits(&memory.k[n], &after.k[n], memory.k.size() - n, D, "(keys)");
            expect_same_bits(&memory.v[n], &after.v[n], memory.v.size() - n, D, "(values)");
        });

        // NaN in a token, or in a key or value that is there, harms those of its row that see its slot, and no other.
        const int64_t t = shape.tokens * (shape.rows - 2) + shape.tokens / 2;
        const auto check = [&](const char* place, T& number, int64_t slot) {
            where = text("%s NaN in %s", what.c_str(), place);
            T bad = nan<T>();
            std::swap(number, bad);
            const Memory<T> memory(block.memory);
            std::vector<T> got(y.size());
            block.attend(memory, 0, shape.rows, got.data());
            std::swap(number, bad);
            expect_harmed(got, y, D, [&](int64_t other) {
                return other / shape.tokens == t / shape.tokens && block.sees(other, slot);
            });
        };
        check("a token", block.x[t * D + D / 2], block.slots[t]);
        for (const int64_t slot : block.seen_by(t)) {
            if (block.is_new(t, slot)) continue;  // which is overwritten
            const int64_t at = block.place(t, shape.n_kv_heads - 1, slot);
            check("a key", block.memory.k[at], slot);
            check("a value", block.memory.v[at + 1], slot);
            break;
        }
    });
}

// So many slots that what the threads need side by side is more than there was. The row's own key goes to the first
// slot, and it sees far more.
void check_many_slots() {
    Random random(30);
    const Block<float> block({{q4, q4, q4, q4}, 16, 16, 2, 2, 2, 1, 20000, true, false}, random);
    std::vector<float> alone(size_t(block.D)), y(alone.size());
    choose_kernels("");
    where = "many slots";
    const Memory<float> memory(block.memory);
    set_threads(1);
    block.attend(memory, 1, 1, alone.data());
    set_threads(2);
    block.attend(memory, 1, 1, y.data());
    expect_same_bits(y.data(), alone.data(), block.D, block.D, "on one thread");
}

// ---------------------------------------- the experts

template <class T>
struct Mixed {
    Layer layer;
    Guarded<T> norm, x, gate;
    Mixture mixture;

    Mixed(const Three& formats, int64_t tokens, int64_t D, int64_t H, int64_t E, int64_t K, Random& random)
        : layer(formats, E, D, H, random), norm(D), x(tokens * D), gate(E * D),
          mixture{{numbers(norm.data()), kEps}, rows_of(gate.data(), E, D), K, layer.experts} {
        for (T& weight : norm) weight = rounded<T>(0.1f * random.normal());
        fill(x, random), fill(gate, random);
    }

    void mix(int64_t first, int64_t count, T* y) const {
        const int64_t D = layer.dim;
        Guarded<T> rows(count * D);  // which are replaced
        std::copy(&x[first * D], &x[first * D] + rows.size(), rows.begin());
        Guarded<int64_t> ids(count * mixture.top_k);
        Guarded<float> weights(count * mixture.top_k), logits(count * mixture.gate.count);
        Routing seen{ids.data(), weights.data(), logits.data()};  // now and then nobody looks
        if (first % 2) seen = {};
        octavo::mix(rows_of(rows.data(), count, D), mixture, seen);
        std::copy(rows.begin(), rows.end(), y);
    }

    // The operation in its parts, for one row.
    void mix_in_parts(int64_t row, T* y) const {
        const int64_t D = layer.dim, K = mixture.top_k, E = mixture.gate.count;
        Guarded<T> normed(D);
        Guarded<int64_t> ids(K);
        Guarded<float> weights(K), logits(E);
        const Rows in = rows_of(normed.data(), 1, D);
        normalize(rows_of(&x[row * D], 1, D), mixture.norm, in);
        route(in, mixture.gate, K, {ids.data(), weights.data(), logits.data()});
        moe(in, ids.data(), weights.data(), K, layer.experts, rows_of(y, 1, D));
        for (int64_t i = 0; i < D; ++i) y[i] = rounded<T>(float(value(x[row * D + i])) + float(value(y[i])));
    }
};

template <class T>
void check_mix(const Three& formats, int64_t D, int64_t H, int64_t E, int64_t K) {
    Random random(uint32_t(D + 10 * E + K));
    const Mixed<T> mixed(formats, kTokens, D, H, E, K, random);
    const bool has_bf16 = std::ranges::find(formats, bf16) != formats.end();
    std::vector<T> first;
    const std::string what = text("mix %s %s,%s,%s D=%ld H=%ld top %ld of %ld", name_of_type<T>(), name_of(formats[0]),
                                  name_of(formats[1]), name_of(formats[2]), long(D), long(H), long(K), long(E));
    with_every_set(what, [&](const std::string& name) {
        std::vector<T> y(size_t(kTokens * D));
        for (int64_t row = 0; row < kTokens; ++row) mixed.mix_in_parts(row, &y[size_t(row * D)]);
        if (!has_bf16) expect_same_on_this_machine(y, first, D);
        expect_same_in_company(name, y, D, [&](int64_t begin, int64_t count, T* to) { mixed.mix(begin, count, to); });

        where = name + " NaN";
        T bad = nan<T>();
        std::swap(mixed.x[4 * D - 1], bad);
        std::vector<T> got(y.size());
        mixed.mix(0, kTokens, got.data());
        expect_harmed(got, y, D, [](int64_t row) { return row == 3; });
        std::swap(mixed.x[4 * D - 1], bad);
    });
}

// More tokens than are computed at a time have the bits that they have in steps.
void check_many_tokens(bool masked) {
    constexpr int64_t kHalf = 301;
    Random random(34);
    const Block<float> block({{q4, q4, q4, q4}, 16, 2, 1, 2, 2, 2 * kHalf, 2 * kHalf, masked, false}, random);
    const Shape& shape = block.shape;
    const int64_t D = block.D, n = block.n * D;
    for (int64_t i = 0; i < block.mask.size(); ++i) {  // nothing that comes in a later step
        block.mask[i] = block.mask[i] && i % shape.end <= block.slots[i / shape.end];
    }
    choose_kernels("");
    set_threads(2);
    where = masked ? "many tokens masked" : "many tokens";
    std::vector<float> y(static_cast<size_t>(n)), wanted(static_cast<size_t>(n));
    const Memory<float> memory(block.memory), other(block.memory);
    block.attend(memory, 0, 2, y.data());
    for (int64_t t = 0; t < block.n; t += kHalf) {
        Cache cache = block.strides;
        const int64_t row = t / shape.tokens * cache.row_stride;
        cache.k = reinterpret_cast<uint8_t*>(&other.k[row]);
        cache.v = reinterpret_cast<uint8_t*>(&other.v[row]);
        cache.tokens = kHalf;
        cache.slots = &block.slots[t];
        cache.mask = masked ? &block.mask[t * shape.end] : nullptr;
        attend(rows_of(&block.x[t * D], kHalf, D), block.attention, &block.rotation[t * block.dim], cache,
               Block<float>::kLayer, rows_of(&wanted[size_t(t * D)], kHalf, D));
    }
    expect_same_bits(y.data(), wanted.data(), n, D, "in steps");
    expect_same_bits(memory.k.begin(), other.k.begin(), memory.k.size(), D, "in steps (keys)");
    expect_same_bits(memory.v.begin(), other.v.begin(), memory.v.size(), D, "in steps (values)");

    const Mixed<float> mixed({q4, q4, q4}, block.n, D, 20, 3, 2, random);
    mixed.mix(0, block.n, y.data());
    for (int64_t t = 0; t < block.n; t += kHalf) mixed.mix(t, kHalf, &wanted[size_t(t * D)]);
    expect_same_bits(y.data(), wanted.data(), n, D, "in steps (mix)");
}

// ---------------------------------------- several products at once, and what is counted

void check_products() {
    constexpr int64_t kCols = 130, kTokens = 20;
    Random random(31);
    std::deque<Weights> weights;
    weights.emplace_back(q4, 17, kCols, random);
    weights.emplace_back(q3, 40, kCols, random);
    weights.emplace_back(bf16, 5, kCols, random);
    weights.emplace_back(q4, 300, kCols, random);
    weights.emplace_back(q8, 1, kCols, random);
    Guarded<float> x(kTokens * kCols);
    for (int64_t t = 0; t < kTokens; ++t) fill_token(&x[t * kCols], kCols, t, random);
    with_every_set("several products", [&](const std::string& what) {
        for (const int n : {1, 2, 3}) {
            for (const int64_t tokens : {1, 8, 20}) {
                where = text("%s tokens=%ld threads=%d", what.c_str(), long(tokens), n);
                const Rows in = rows_of(&x[(kTokens - tokens) * kCols], tokens, kCols);
                std::deque<Guarded<float>> together;
                std::vector<Product> products;
                for (const Weights& w : weights) {
                    spoil(together.emplace_back(tokens * w.matrix.rows));
                    products.push_back({&w.matrix, rows_of(together.back().data(), tokens, w.matrix.rows)});
                }
                set_threads(n);
                linear(in, products);
                set_threads(1);
                for (size_t i = 0; i < products.size(); ++i) {
                    const int64_t rows = weights[i].matrix.rows;
                    Guarded<float> alone(tokens * rows);
                    linear(in, weights[i].matrix, rows_of(alone.data(), tokens, rows));
                    expect_same_bits(together[i].data(), alone.data(), alone.size(), rows, "alone");
                }
            }
        }
    });
}

// Every matrix that is multiplied with counts once for a call, experts where somebody chose them; and so does the time.
void check_spent() {
    Random random(32);
    const Layer layer({q4, q3, bf16}, 4, 40, 70, random);
    const Block<float> block({{q8, q4, q2, q3}, 40, 4, 2, 8, 3, 3, 6, true, false}, random);
    const auto nbytes = [](const Matrix& m) { return reference::bytes_of_matrix(m.format, m.rows, m.cols); };
    int64_t of_expert = 0;
    for (size_t i = 0; i < 3; ++i) of_expert += nbytes(layer.weights[i].matrix);
    Guarded<float> x(12 * 40), y(12 * 70), z(12 * 70), weights(24);
    Guarded<int64_t> ids(24);
    fill(x, random), fill(weights, random);
    for (int64_t i = 0; i < ids.size(); ++i) ids[i] = i % 2 ? 3 : 1;
    const auto check = [&](const char* what, int64_t wanted, const auto& compute) {
        where = text("spent in %s", what);
        const auto begin = std::chrono::steady_clock::now();
        const Spent before = spent();
        compute();
        const Spent after = spent();
        const double seconds = after.seconds - before.seconds;
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
        const int64_t read = after.nbytes - before.nbytes;
        expect(read == wanted, "%ld bytes, not %ld", long(read), long(wanted));
        expect(seconds > 0 && seconds < passed.count() + 1e-6, "%g of %g seconds", seconds, passed.count());
    };
    choose_kernels("");
    set_threads(2);
    const Matrix &first = layer.weights[0].matrix, &second = layer.weights[1].matrix;
    check("linear", nbytes(first), [&] { linear(rows_of(x.data(), 12, 40), first, rows_of(y.data(), 12, 70)); });
    check("linear of two", nbytes(first) + nbytes(second), [&] {
        linear(rows_of(x.data(), 3, 40), {{&first, rows_of(y.data(), 3, 70)}, {&second, rows_of(z.data(), 3, 70)}});
    });
    for (const int64_t n : {1, 12}) {
        check("moe", 2 * of_expert, [&] {
            moe(rows_of(x.data(), n, 40), ids.data(), weights.data(), 2, layer.experts, rows_of(y.data(), n, 40));
        });
    }
    const Attention& a = block.attention;
    check("attend", nbytes(a.wq) + nbytes(a.wk) + nbytes(a.wv) + nbytes(a.wo), [&] {
        block.attend(Memory<float>(block.memory), 0, 3, y.data());
    });
}

}  // namespace

void check_block_callers(int rounds) {
    Random random(33);
    const Block<float> block({{q4, q4, q3, q4}, 40, 4, 2, 8, kTokens, 1, 6, true, false}, random);
    const Mixed<float> mixed({q4, q3, q2}, kTokens, 40, 30, 4, 2, random);
    const size_t n = size_t(kTokens * 40);
    std::vector<float> attended(n), done(n);
    choose_kernels("");
    set_threads(1);
    block.attend(Memory<float>(block.memory), 0, kTokens, attended.data());
    mixed.mix(0, kTokens, done.data());

    std::atomic<int> wrong{0}, running{2};
    const auto call = [&](int64_t count) {
        std::vector<float> mine(n);
        const size_t nbytes = size_t(count) * 40 * sizeof(float);
        for (int i = 0; i < rounds; ++i) {
            block.attend(Memory<float>(block.memory), 0, count, mine.data());
            wrong += std::memcmp(mine.data(), attended.data(), nbytes) != 0;
            mixed.mix(0, count, mine.data());
            wrong += std::memcmp(mine.data(), done.data(), nbytes) != 0;
        }
        --running;
    };
    std::thread few(call, 2), many(call, kTokens);
    for (int i = 0; running > 0; ++i) {
        set_threads(1 + i % 4);
        usleep(300);
    }
    few.join();
    many.join();
    where = "several callers of a block";
    expect(wrong == 0, "%d results were wrong", wrong.load());
}

void check_block(bool thoroughly) {
    check_products();
    check_spent();
    check_many_slots();
    check_many_tokens(true);
    for (const bool masked : {false, true}) {
        check_attend<float>({{q4, q4, q4, q4}, 48, 4, 2, 16, kTokens, 1, 9, masked, masked});
        check_attend<uint16_t>({{q8, q3, q2, q4}, 70, 6, 1, 20, 3, 4, 17, masked, !masked});
        check_attend<float>({{bf16, q4, bf16, q8}, 40, 3, 3, 2, 4, 1, 1, masked, false});
    }
    check_attend<uint16_t>({{bf16, bf16, bf16, bf16}, 64, 8, 2, 64, 3, 3, 18, true, true});
    check_mix<float>({q4, q4, q4}, 70, 100, 8, 2);
    check_mix<uint16_t>({q8, q3, q2}, 48, 66, 8, 2);
    check_mix<uint16_t>({bf16, q4, bf16}, 33, 40, 3, 3);
    if (!thoroughly) return;
    check_many_tokens(false);
    for (const bool masked : {false, true}) {
        check_attend<float>({{q8, q8, q8, q8}, 200, 14, 2, 80, kTokens, 1, 100, masked, masked});
        check_attend<uint16_t>({{q3, q3, q3, q3}, 130, 9, 1, 128, 4, 5, 40, masked, !masked});
        check_attend<float>({{q2, q2, q2, q2}, 64, 8, 8, 8, 5, 2, 300, masked, masked});
    }
    check_mix<float>({q2, q2, q2}, 200, 128, 64, 6);
}
