// The promises in check.cpp's head for what a decode step is made of, besides products: dot, attend, normalize, route.
#include "check_block.h"
#include "support.h"

using namespace octavo;
using namespace support;

namespace {

constexpr float kNaN = nan<float>(), kInf = std::numeric_limits<float>::infinity();

// ---------------------------------------- dot

template <class T>
void check_dot(int64_t n) {
    Random random{uint32_t(n)};
    Guarded<float> a(n);
    Guarded<T> b(n);
    fill(a, random), fill(b, random);
    const reference::Sum wanted = reference::dot(values_of(a.data(), n), values_of(b.data(), n));
    std::vector<float> first;
    with_every_set(text("dot %s n=%ld", name_of_type<T>(), long(n)), [&](const std::string&) {
        const float got = kernels().dot(a.data(), numbers(b.data()), n);
        expect_near(got, wanted, 0, 0);
        expect_same_on_all({got}, first, 1);
        for (const int64_t i : {int64_t(0), n / 2, n - 1}) {
            T bad = nan<T>();
            std::swap(b[i], bad);
            const float harmed = kernels().dot(a.data(), numbers(b.data()), n);
            expect(std::isnan(harmed), "NaN at %ld gives %g", long(i), double(harmed));
            std::swap(b[i], bad);
        }
    });
}

// ---------------------------------------- attention of one head

// Keys and values of n slots that are seen, every other one where they are listed, backwards. All else is NaN.
template <class T>
struct Head {
    int64_t dim, n, stride;
    Guarded<int32_t> slots;
    Guarded<T> k, v;

    Head(int64_t dim_, int64_t n_, int64_t stride_, bool listed)
        : dim(dim_), n(n_), stride(stride_), slots(listed ? n : 0), k(((listed ? 2 : 1) * n - 1) * stride + dim),
          v(k.size()) {
        for (int64_t i = 0; i < slots.size(); ++i) slots[i] = int32_t(2 * (n - i) - 1);
        std::fill(k.begin(), k.end(), nan<T>());
        std::fill(v.begin(), v.end(), nan<T>());
    }
    Head(int64_t dim_, int64_t n_, int64_t stride_, bool listed, Random& random) : Head(dim_, n_, stride_, listed) {
        for (int64_t i = 0; i < n * dim; ++i) {
            key(i / dim)[i % dim] = random_number<T>(random);
            mine(i / dim)[i % dim] = random_number<T>(random);
        }
    }

    int64_t slot(int64_t i) const { return slots.size() > 0 ? slots[i] : i; }
    T* key(int64_t i) const { return k.data() + slot(i) * stride; }
    T* mine(int64_t i) const { return v.data() + slot(i) * stride; }

    // The results of queries that lie padded(dim) apart, without the padding.
    std::vector<float> seen_by(const float* q, int queries) const {
        Guarded<float> scores(queries * padded(n)), out(queries * padded(dim));
        spoil(scores), spoil(out);
        kernels().attend(q, queries, dim, numbers(k.data()), numbers(v.data()), stride,
                         slots.size() > 0 ? slots.data() : nullptr, n, scores.data(), out.data());
        std::vector<float> y;
        for (int64_t i = 0; i < queries * dim; ++i) y.push_back(out[i / dim * padded(dim) + i % dim]);
        return y;
    }

    std::vector<reference::Sum> reference_of(const float* q) const {
        std::vector<reference::Vector> keys, values;
        for (int64_t i = 0; i < n; ++i) {
            keys.push_back(values_of(key(i), dim));
            values.push_back(values_of(mine(i), dim));
        }
        return reference::attend(values_of(q, dim), keys, values);
    }
};

// Queries lie padded(dim) apart; every third one is large, so that few slots count.
void fill_queries(const Guarded<float>& q, int64_t dim, Random& random) {
    for (int64_t i = 0; i < q.size(); ++i) {
        const float size = i / padded(dim) % 3 == 1 ? 20.0f : 1.0f;
        q[i] = i % padded(dim) < dim ? size * random.normal() : 0.0f;
    }
}

template <class T>
void check_attend(int64_t dim, int queries, int64_t n, bool listed) {
    Random random(uint32_t(1000 * dim + 100 * queries + n));
    const int64_t width = padded(dim);
    const Head<T> head(dim, n, dim + 3 * (queries % 2), listed, random);
    Head<T> packed(dim, n, dim, false);
    for (int64_t i = 0; i < n; ++i) {
        std::copy(head.key(i), head.key(i) + dim, packed.key(i));
        std::copy(head.mine(i), head.mine(i) + dim, packed.mine(i));
    }
    Guarded<float> q(queries * width);
    fill_queries(q, dim, random);
    std::vector<reference::Sum> wanted;
    for (int r = 0; r < queries; ++r) {
        for (const reference::Sum& sum : head.reference_of(&q[r * width])) wanted.push_back(sum);
    }

    std::vector<float> first;
    const std::string what = text("attend %s dim=%ld queries=%d n=%ld%s", name_of_type<T>(), long(dim), queries,
                                  long(n), listed ? " listed" : "");
    with_every_set(what, [&](const std::string&) {
        const std::vector<float> y = head.seen_by(q.data(), queries);
        for (int64_t i = 0; i < queries * dim; ++i) {
            if (!expect_near(y[size_t(i)], wanted[size_t(i)], i / dim, i % dim)) break;
        }
        expect_same_on_all(y, first, dim);
        for (int r = 0; r < queries; ++r) {
            const std::vector<float> alone = packed.seen_by(&q[r * width], 1);
            expect_same_bits(&y[size_t(r * dim)], alone.data(), dim, dim, "alone, with all slots in a row");
        }
    });
}

// Where one score is far above the others, the value there is the result, to the bit; even if all scores are negative.
template <class T>
void check_hard_maximum(int64_t dim, int64_t n) {
    constexpr int kQueries = 5;
    Random random(11);
    const Head<T> head(dim, n, dim, false, random);
    Guarded<float> q(kQueries * padded(dim));
    fill_queries(q, dim, random);
    for (int r = 0; r < kQueries; ++r) {
        for (int64_t c = 0; c < dim; ++c) q[r * padded(dim) + c] = r == 0 ? -1e4f : 1e4f;
    }
    for (int64_t i = 0; i < n; ++i) {  // all numbers of a key are alike; -0.25 is the highest, and -4 the lowest
        const float size = i == n - 1 ? -0.25f : i == n / 2 - 1 ? -4.0f : -1.0f - 0.25f * float(i % 3);
        for (int64_t c = 0; c < dim; ++c) {
            head.key(i)[c] = rounded<T>(size);
            head.mine(i)[c] = rounded<T>(float(1 + random.below(100)));
        }
    }
    with_every_set(text("hard maximum %s dim=%ld n=%ld", name_of_type<T>(), long(dim), long(n)), [&](const auto&) {
        const std::vector<float> y = head.seen_by(q.data(), kQueries);
        for (int64_t i = 0; i < kQueries * dim; ++i) {
            const T wanted = head.mine(i < dim ? n / 2 - 1 : n - 1)[i % dim];
            const double got = y[size_t(i)];
            if (!expect(got == value(wanted), "y[%ld] is %.9g, not %g", long(i), got, value(wanted))) break;
        }
    });
}

// NaN harms the query that it is in, all where it is in a key, and one column where it is in a value. An infinite score
// is NaN as well.
template <class T>
void check_attend_not_finite(int64_t dim, int64_t n, bool listed) {
    constexpr int kQueries = 5;
    Random random(12);
    const Head<T> head(dim, n, dim + 1, listed, random);
    const int64_t width = padded(dim);
    Guarded<float> q(kQueries * width);
    fill_queries(q, dim, random);
    const std::string what = text("attend %s dim=%ld n=%ld with NaN in ", name_of_type<T>(), long(dim), long(n));
    with_every_set("", [&](const std::string& set) {
        const std::vector<float> clean = head.seen_by(q.data(), kQueries);
        const auto check = [&](const char* place, auto& number, auto bad, auto is_harmed) {
            where = what + place + set;
            std::swap(number, bad);
            const std::vector<float> y = head.seen_by(q.data(), kQueries);
            std::swap(number, bad);
            for (int64_t i = 0; i < int64_t(y.size()); ++i) {
                const float got = y[size_t(i)];
                const bool right = is_harmed(i / dim, i % dim) ? std::isnan(got) : got == clean[size_t(i)];
                if (!expect(right, "y[%ld][%ld] is %g", long(i / dim), long(i % dim), double(got))) return;
            }
        };
        for (const int64_t c : {int64_t(0), dim - 1}) {
            for (const int64_t r : {0, 4}) {
                check("a query", q[r * width + c], kNaN, [&](int64_t row, int64_t) { return row == r; });
            }
            for (const int64_t i : {int64_t(0), n / 2, n - 1}) {
                check("a key", head.key(i)[c], nan<T>(), [](int64_t, int64_t) { return true; });
                check("a key (infinite)", head.key(i)[c], rounded<T>(kInf), [](int64_t, int64_t) { return true; });
                check("a value", head.mine(i)[c], nan<T>(), [&](int64_t, int64_t col) { return col == c; });
            }
        }
    });
}

// ---------------------------------------- norms and routes

constexpr float kEps = 1e-5f;
constexpr int64_t kRows = 9;  // more than one thread or the direct kernels would do

void check_normalize(int64_t n) {
    Random random(uint32_t(n) + 20);
    Guarded<float> x(kRows * n), weight(n), ones(n);
    Guarded<uint16_t> x16(kRows * n), weight16(n);
    for (int64_t t = 0; t < kRows; ++t) fill_token(&x[t * n], n, t % 9 == 4 ? 0 : t, random);  // not 1e30, squared
    fill(weight, random), fill(x16, random), fill(weight16, random);
    std::fill(ones.begin(), ones.end(), 1.0f);
    const Norm norm{numbers(weight.data()), kEps}, norm16{numbers(weight16.data()), kEps};
    std::vector<float> first;
    std::vector<uint16_t> first16;
    with_every_set(text("normalize n=%ld", long(n)), [&](const std::string& what) {
        std::vector<float> y(size_t(x.size()));
        std::vector<uint16_t> y16(size_t(x.size()));
        for (int64_t t = 0; t < kRows; ++t) {
            normalize(rows_of(&x[t * n], 1, n), norm, rows_of(&y[size_t(t * n)], 1, n));
            const auto wanted = reference::normalize(values_of(&x[t * n], n), values_of(weight.data(), n), kEps);
            for (int64_t i = 0; i < n; ++i) expect_near(y[size_t(t * n + i)], wanted[size_t(i)], t, i);
            // In bfloat16 it is what float32 gives, rounded before it is multiplied by the weight, and after.
            normalize(rows_of(&x16[t * n], 1, n), norm16, rows_of(&y16[size_t(t * n)], 1, n));
            std::vector<float> wide, scaled(static_cast<size_t>(n));
            for (int64_t i = 0; i < n; ++i) wide.push_back(float(value(x16[t * n + i])));
            normalize(rows_of(wide.data(), 1, n), {numbers(ones.data()), kEps}, rows_of(scaled.data(), 1, n));
            std::vector<uint16_t> wanted16;
            for (int64_t i = 0; i < n; ++i) {
                const double inner = value(rounded<uint16_t>(scaled[size_t(i)]));
                wanted16.push_back(rounded<uint16_t>(float(inner * value(weight16[i]))));
            }
            expect_same_bits(&y16[size_t(t * n)], wanted16.data(), n, n, "rounded from float32");
        }
        expect_same_on_all(y, first, n);
        expect_same_on_all(y16, first16, n);
        expect_same_in_company(what, y, n, [&](int64_t begin, int64_t count, float* to) {
            normalize(rows_of(&x[begin * n], count, n), norm, rows_of(to, count, n));
        });
        expect_same_in_company(what + " bfloat16", y16, n, [&](int64_t begin, int64_t count, uint16_t* to) {
            normalize(rows_of(&x16[begin * n], count, n), norm16, rows_of(to, count, n));
        });
        float bad = kNaN;
        std::swap(x[3 * n - 1], bad);
        std::vector<float> harmed(y.size());
        normalize(rows_of(x.data(), kRows, n), norm, rows_of(harmed.data(), kRows, n));
        expect_harmed(harmed, y, n, [](int64_t row) { return row == 2; });
        std::swap(x[3 * n - 1], bad);
    });
}

// For every row: ids and logits, and weights, which depend on the C library's exponential.
struct Routes {
    std::vector<float> exact, weights;
};

template <class X, class G>
Routes routes(X* x, int64_t count, const Guarded<G>& gate, int64_t E, int64_t K) {
    const int64_t D = gate.size() / E;
    Guarded<int64_t> ids(count * K);
    Guarded<float> weights(count * K), logits(count * E);
    std::fill(ids.begin(), ids.end(), -1);
    spoil(weights), spoil(logits);
    route(rows_of(x, count, D), rows_of(gate.data(), E, D), K, {ids.data(), weights.data(), logits.data()});
    Routes out;
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < K; ++i) out.exact.push_back(float(ids[t * K + i]));
        for (int64_t e = 0; e < E; ++e) out.exact.push_back(logits[t * E + e]);
    }
    out.weights.assign(weights.begin(), weights.end());
    return out;
}

// The highest logits in their order, and weights that are their softmax; NaN where the highest logit is.
void expect_right_choice(const float* exact, const float* weights, int64_t E, int64_t K, int64_t row) {
    const float* logits = exact + K;
    const std::vector<int64_t> best = reference::best(logits, E);
    std::vector<reference::Sum> scores;
    for (int64_t i = 0; i < K; ++i) {
        expect(exact[i] == float(best[size_t(i)]), "choice %ld of row %ld is %g, not %ld", long(i), long(row),
               double(exact[i]), long(best[size_t(i)]));
        reference::Sum score;
        score.value = logits[best[size_t(i)]];
        scores.push_back(score);
    }
    const std::vector<reference::Sum> wanted = reference::softmax(scores);
    for (int64_t i = 0; i < K; ++i) {
        if (std::isfinite(scores[0].value)) expect_near(weights[i], wanted[size_t(i)], row, i);
        else expect(std::isnan(weights[i]), "weight %ld of row %ld is %g", long(i), long(row), double(weights[i]));
    }
}

template <class X, class G>
void check_route(int64_t E, int64_t K, int64_t D) {
    Random random(uint32_t(100 * E + K));
    Guarded<X> x(kRows * D);
    Guarded<G> gate(E * D);
    fill(x, random);
    // By bfloat16, the exponentials of the logits themselves would be infinite.
    for (G& g : gate) g = rounded<G>((sizeof(G) == 4 ? 0.2f : 20.0f) * random.normal());
    for (int64_t e = 3; e < E; e += 3) std::copy(&gate[(e - 2) * D], &gate[(e - 1) * D], &gate[e * D]);  // equals
    Routes first;
    const std::string what =
        text("route %s by %s, top %ld of %ld", name_of_type<X>(), name_of_type<G>(), long(K), long(E));
    with_every_set(what, [&](const std::string& name) {
        Routes all;
        for (int64_t t = 0; t < kRows; ++t) {
            const Routes one = routes(&x[t * D], 1, gate, E, K);
            expect_right_choice(one.exact.data(), one.weights.data(), E, K, t);
            for (int64_t e = 0; e < E; ++e) {
                const reference::Vector row = values_of(&gate[e * D], D);
                expect_near(one.exact[size_t(K + e)], reference::dot(values_of(&x[t * D], D), row), t, e);
            }
            all.exact.insert(all.exact.end(), one.exact.begin(), one.exact.end());
            all.weights.insert(all.weights.end(), one.weights.begin(), one.weights.end());
        }
        expect_same_on_all(all.exact, first.exact, K + E);
        expect_same_on_this_machine(all.weights, first.weights, K);
        expect_same_in_company(name + " exact", all.exact, K + E, [&](int64_t begin, int64_t count, float* y) {
            std::ranges::copy(routes(&x[begin * D], count, gate, E, K).exact, y);
        });
        expect_same_in_company(name + " weights", all.weights, K, [&](int64_t begin, int64_t count, float* y) {
            std::ranges::copy(routes(&x[begin * D], count, gate, E, K).weights, y);
        });

        where = name + " with NaN in a row";
        X bad = nan<X>();
        std::swap(x[3 * D - 1], bad);
        Routes harmed = routes(x.data(), kRows, gate, E, K);
        std::swap(x[3 * D - 1], bad);
        expect_harmed(harmed.weights, all.weights, K, [](int64_t row) { return row == 2; });
        for (int64_t t = 0; t < kRows; ++t) {
            expect_right_choice(&harmed.exact[size_t(t * (K + E))], &harmed.weights[size_t(t * K)], E, K, t);
        }
        where = name + " with NaN in the gate";
        G worse = nan<G>();
        std::swap(gate[E * D - 1], worse);
        harmed = routes(x.data(), kRows, gate, E, K);
        std::swap(gate[E * D - 1], worse);
        for (int64_t t = 0; t < kRows; ++t) {
            expect_right_choice(&harmed.exact[size_t(t * (K + E))], &harmed.weights[size_t(t * K)], E, K, t);
        }
    });
}

}  // namespace

void check_parts(bool thoroughly) {
    for (int64_t n = 1; n <= 100; ++n) check_dot<float>(n), check_dot<uint16_t>(n);
    for (const int64_t n : {127, 128, 129, 320, 500, 777}) check_dot<float>(n), check_dot<uint16_t>(n);
    int any = 0;
    for (const int64_t dim : {1, 8, 16, 20, 64, 80, 112, 128}) {
        for (const int64_t n : {1, 2, 15, 16, 17, 100}) {
            const bool listed = ++any % 2;
            check_attend<float>(dim, 1 + any % 9, n, listed);
            check_attend<uint16_t>(dim, 1 + 2 * any % 9, n, !listed);
            for (int queries = 1; thoroughly && queries <= 9; ++queries) {
                check_attend<float>(dim, queries, n, !listed);
                check_attend<uint16_t>(dim, queries, n, listed);
            }
        }
        for (const int64_t n : {2, 16, 39}) check_hard_maximum<float>(dim, n), check_hard_maximum<uint16_t>(dim, n);
    }
    for (const int64_t n : {1, 17, 40}) {
        for (const bool listed : {false, true}) {
            check_attend_not_finite<float>(20, n, listed);
            check_attend_not_finite<uint16_t>(80, n, listed);
        }
    }
    for (const int64_t n : {1, 2, 15, 16, 64, 65, 200, 577}) check_normalize(n);
    std::vector<std::array<int64_t, 2>> choices = {{1, 1}, {8, 2}, {9, 9}};
    if (thoroughly) choices.insert(choices.end(), {{2, 1}, {64, 6}});
    for (const auto& [E, K] : choices) {
        check_route<float, float>(E, K, 70);
        check_route<uint16_t, uint16_t>(E, K, 64);
        check_route<float, uint16_t>(E, K, 3);
    }
}
