// What the kernels promise, checked without Python or any library: build it with all of csrc but module.cpp, and run
//
//   check [all | quick | pool]
//
// A line for every failure, a summary, and exit code 1 if there was one; and a digest of results whose bits should be
// the same on every machine. `quick` takes fewer cases (for sanitizers and emulators), `pool` only the threads and what
// shares them (for the thread sanitizer).
//
// The promises, for every instruction set that this CPU has:
//   linear  is the product of the decoded weights and the rounded activations, within float32 rounding (reference.h)
//   moe     is what linear, silu_mul and linear give, added up by rising expert
//   parts   of a decode step (dot, attend, normalize, route) are what double precision gives, within float32 rounding
//   block   attend and mix are what their parts give one after another, to the bit
//   bits    do not depend on the number of threads, nor on how many tokens are computed at once; nor, at 8 bits and
//           below, on the instruction set
//   memory  is read and written up to the last byte of an argument and no further (arguments end at a guard page); of a
//           cache nothing is written but the new tokens' slots, and slots that are not seen may hold anything
//   NaN     or infinity in a token makes all its outputs NaN (not finite, at bfloat16), and changes no other token
//   threads may be changed at any time, and several callers may compute at once
//   reads   that are under way are waited for, and experts in two parts give the bits of whole ones
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <limits>
#include <thread>

#include "../pool.h"
#include "check_block.h"
#include "support.h"

using namespace octavo;
using namespace support;

namespace {

// ---------------------------------------- linear

void linear_f32(const Weights& w, float* x, int64_t tokens, float* y) {
    linear(rows_of(x, tokens, w.matrix.cols), w.matrix, rows_of(y, tokens, w.matrix.rows));
}

// bfloat16 in and out give what float32 gives for the same numbers, rounded.
void check_bf16_rows(const Weights& w, int64_t tokens, Random& random) {
    const int64_t rows = w.matrix.rows, cols = w.matrix.cols;
    Guarded<uint16_t> x16(tokens * cols), y16(tokens * rows);
    Guarded<float> x(tokens * cols), y(tokens * rows);
    for (int64_t i = 0; i < x.size(); ++i) {
        x16[i] = random.bf16();
        x[i] = float(reference::bf16_value(x16[i]));
    }
    linear(rows_of(x16.data(), tokens, cols), w.matrix, rows_of(y16.data(), tokens, rows));
    linear_f32(w, x.data(), tokens, y.data());
    for (int64_t i = 0; i < y.size(); ++i) {
        const uint16_t wanted = reference::to_bf16(y[i]);
        if (!expect(y16[i] == wanted, "bfloat16 y[%ld] is %04x, expected %04x", long(i), y16[i], wanted)) return;
    }
}

// The first, one in the middle and the last.
std::vector<int64_t> some_of(const std::vector<int64_t>& counts) {
    return {counts.front(), counts[counts.size() / 2], counts.back()};
}

void check_linear(Format f, int64_t rows, int64_t cols, const std::vector<int64_t>& counts) {
    Random random(uint32_t(1000 * rows + cols) + uint32_t(f));
    const Weights w(f, rows, cols, random);
    const reference::Weights decoded = reference::decode(w.matrix);
    const int64_t most = *std::max_element(counts.begin(), counts.end());
    Guarded<float> x(most * cols);
    std::vector<reference::Sum> wanted;
    for (int64_t t = 0; t < most; ++t) {
        fill_token(&x[t * cols], cols, t, random);
        const std::vector<double> rounded = reference::activations(f, &x[t * cols], cols);
        for (int64_t row = 0; row < rows; ++row) wanted.push_back(reference::dot(decoded, row, rounded));
    }

    std::vector<float> first;  // bits of the first instruction set
    for (const std::string& set : available_kernels()) {
        const std::string what = text("linear %s %s [%ld, %ld]", set.c_str(), name_of(f), long(rows), long(cols));
        choose_kernels(set);
        set_threads(1);
        std::vector<float> alone(size_t(most * rows));
        for (int64_t t = 0; t < most; ++t) {
            where = text("%s token %ld alone", what.c_str(), long(t));
            Guarded<float> y(rows);
            spoil(y);
            linear_f32(w, &x[t * cols], 1, y.data());
            std::copy(y.begin(), y.end(), alone.begin() + t * rows);
            for (int64_t row = 0; row < rows && expect_near(y[row], wanted[size_t(t * rows + row)], t, row); ++row) {}
        }
        where = what;
        if (f != Format::bf16) expect_same_on_all(alone, first, rows);
        for (const int n : {1, 2, 3}) {
            set_threads(n);
            for (const int64_t tokens : n == 1 ? counts : some_of(counts)) {
                where = text("%s T=%ld threads=%d", what.c_str(), long(tokens), n);
                Guarded<float> y(tokens * rows);
                spoil(y);
                const int64_t begin = most - tokens;  // so that reading on after the last token is noticed
                linear_f32(w, &x[begin * cols], tokens, y.data());
                expect_same_bits(y.data(), &alone[size_t(begin * rows)], y.size(), rows, "alone on one thread");
            }
        }
        for (const int64_t tokens : {1, 10}) check_bf16_rows(w, tokens, random);
    }
}

// ---------------------------------------- the feed-forward of a mixture of experts

// Every token's choice: K different experts in any order, never the last one; the first is popular.
struct Choice {
    int64_t K;
    Guarded<int64_t> ids;
    Guarded<float> weights;

    Choice(int64_t T, int64_t k, int64_t n_experts, Random& random) : K(k), ids(T * k), weights(T * k) {
        for (int64_t t = 0; t < T; ++t) {
            std::vector<int64_t> order;
            for (int64_t e = 0; e + 1 < n_experts; ++e) order.push_back(e);
            for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[size_t(random.below(int64_t(i) + 1))]);
            if (t % 2 == 0) std::iter_swap(order.begin(), std::find(order.begin(), order.end(), 0));
            for (int64_t i = 0; i < K; ++i) ids[t * K + i] = order[size_t(i)], weights[t * K + i] = random.uniform();
        }
    }
};

// w2 h for one token, h = silu(w1 x) * (w3 x) being the kernels' own: linear and silu_mul are checked elsewhere.
std::vector<reference::Sum> expert_output(const Layer& layer, size_t e, float* x) {
    const int64_t H = layer.hidden_dim;
    std::vector<float> a(static_cast<size_t>(H)), b(static_cast<size_t>(H)), h(static_cast<size_t>(H));
    linear_f32(layer.weights[3 * e], x, 1, a.data());
    linear_f32(layer.weights[3 * e + 1], x, 1, b.data());
    kernels().silu_mul(a.data(), b.data(), h.data(), H);
    const reference::Weights w2 = reference::decode(layer.experts[e].w2);
    const std::vector<double> rounded = reference::activations(w2.format, h.data(), H);
    std::vector<reference::Sum> out;
    for (int64_t d = 0; d < layer.dim; ++d) out.push_back(reference::dot(w2, d, rounded));
    return out;
}

void moe_f32(const Layer& layer, const Choice& choice, float* x, int64_t first, int64_t tokens, float* y) {
    const int64_t K = choice.K, D = layer.dim;
    moe(rows_of(x + first * D, tokens, D), choice.ids.data() + first * K, choice.weights.data() + first * K, K,
        layer.experts, rows_of(y, tokens, D));
}

void check_moe(const Three& formats, int64_t D, int64_t H, int64_t K, const std::vector<int64_t>& counts) {
    constexpr int64_t kExperts = 5;
    Random random(uint32_t(100 * D + H + K));
    const Layer layer(formats, kExperts, D, H, random);
    const int64_t most = *std::max_element(counts.begin(), counts.end());
    const Choice choice(most, K, kExperts, random);
    Guarded<float> x(most * D);
    for (int64_t t = 0; t < most; ++t) {
        fill_token(&x[t * D], D, t % 9 == 4 ? 0 : t, random);  // not 1e30, whose square is infinite
    }
    const bool has_bf16 = std::find(formats.begin(), formats.end(), Format::bf16) != formats.end();

    std::vector<float> first;
    for (const std::string& set : available_kernels()) {
        const std::string what = text("moe %s %s,%s,%s D=%ld H=%ld K=%ld", set.c_str(), name_of(formats[0]),
                                      name_of(formats[1]), name_of(formats[2]), long(D), long(H), long(K));
        choose_kernels(set);
        set_threads(1);
        std::vector<float> alone(size_t(most * D));
        for (int64_t t = 0; t < most; ++t) {
            where = text("%s token %ld alone", what.c_str(), long(t));
            moe_f32(layer, choice, x.data(), t, 1, alone.data() + t * D);
            std::vector<reference::Sum> sums(static_cast<size_t>(D));
            for (int64_t i = t * K; i < (t + 1) * K; ++i) {
                const std::vector<reference::Sum> part = expert_output(layer, size_t(choice.ids[i]), &x[t * D]);
                const double weight = choice.weights[i];
                for (size_t d = 0; d < sums.size(); ++d) {
                    sums[d].value += weight * part[d].value;
                    sums[d].magnitude += std::fabs(weight) * part[d].magnitude;
                    sums[d].underflow += std::fabs(weight) * part[d].underflow + reference::kSmallest;
                    sums[d].roundings = part[d].roundings + 2 * double(K);  // a product and an addition for each
                }
            }
            for (int64_t d = 0; d < D && expect_near(alone[size_t(t * D + d)], sums[size_t(d)], t, d); ++d) {}
        }
        where = what;
        if (!has_bf16) expect_same_on_all(alone, first, D);
        for (const int n : {1, 2, 3}) {
            set_threads(n);
            for (const int64_t tokens : counts) {
                where = text("%s T=%ld threads=%d", what.c_str(), long(tokens), n);
                Guarded<float> y(tokens * D);
                spoil(y);
                moe_f32(layer, choice, x.data(), most - tokens, tokens, y.data());
                expect_same_bits(y.data(), &alone[size_t((most - tokens) * D)], y.size(), D, "alone on one thread");
            }
        }
    }
}

// An expert that a token names twice counts twice.
void check_repeated_expert() {
    Random random(7);
    const Layer layer({Format::q4, Format::q4, Format::q4}, 3, 70, 40, random);
    for (const int64_t T : {1, 2, 12}) {
        Choice choice(T, 3, 3 + 1, random), merged(T, 2, 3, random);
        Guarded<float> x(T * 70), y(T * 70), wanted(T * 70);
        for (int64_t t = 0; t < T; ++t) {
            fill_token(&x[t * 70], 70, 0, random);
            for (int64_t i = 0; i < 3; ++i) choice.ids[3 * t + i] = i > 0, choice.weights[3 * t + i] = 0.25f;
            for (int64_t i = 0; i < 2; ++i) merged.ids[2 * t + i] = i, merged.weights[2 * t + i] = i ? 0.5f : 0.25f;
        }
        for (const std::string& set : available_kernels()) {
            where = text("moe %s T=%ld with an expert named twice", set.c_str(), long(T));
            choose_kernels(set);
            moe_f32(layer, choice, x.data(), 0, T, y.data());
            moe_f32(layer, merged, x.data(), 0, T, wanted.data());
            for (int64_t i = 0; i < y.size(); ++i) {
                const float near = 1e-5f * (1 + std::fabs(wanted[i]));
                if (!expect(std::fabs(y[i] - wanted[i]) <= near, "y[%ld] is %.9g, expected %.9g", long(i), double(y[i]),
                            double(wanted[i]))) {
                    break;
                }
            }
        }
    }
}

// ---------------------------------------- special numbers and sizes

// The largest codes of either sign meet the largest activations: no sum on the way may overflow.
void check_extremes(Format f) {
    constexpr int64_t kRows = 16, kCols = 128, kTokens = 3;
    Random random(9);
    Guarded<float> x(kTokens * kCols), y(kTokens * kRows);
    for (int64_t i = 0; i < kCols; ++i) x[i] = 1, x[kCols + i] = -1, x[2 * kCols + i] = i % 2 ? 1 : -1;
    for (const int byte : {0x00, 0xff}) {
        const Weights w(f, kRows, kCols, random);
        const int64_t block = reference::bytes_of_block(f);
        for (int64_t i = 0; i < w.bytes.size(); ++i) {
            if (i % block >= 64) w.bytes[i] = uint8_t(byte);
        }
        const reference::Weights decoded = reference::decode(w.matrix);
        for (const std::string& set : available_kernels()) {
            where = text("extremes %s %s %02x", set.c_str(), name_of(f), byte);
            choose_kernels(set);
            linear_f32(w, x.data(), kTokens, y.data());
            for (int64_t t = 0; t < kTokens; ++t) {
                const std::vector<double> rounded = reference::activations(f, &x[t * kCols], kCols);
                for (int64_t row = 0; row < kRows; ++row) {
                    expect_near(y[t * kRows + row], reference::dot(decoded, row, rounded), t, row);
                }
            }
        }
    }
}

// Some tokens hold a NaN or an infinity; the others must not notice.
void check_not_finite(Format f) {
    constexpr int64_t D = 130, H = 72, T = 12;
    constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
    Random random(5);
    const Layer layer({f, f, f}, 4, D, H, random);
    const Choice choice(T, 2, 4, random);
    Guarded<float> x(T * D);
    for (int64_t t = 0; t < T; ++t) fill_token(&x[t * D], D, 0, random);
    std::vector<float> bad(x.begin(), x.end());
    bad[1 * D + 3] = kNaN;
    bad[4 * D + 70] = kInf;
    bad[5 * D + 129] = -kInf;
    bad[11 * D] = kInf, bad[11 * D + 1] = kNaN;
    const auto check = [&](const char* what, int64_t cols, const auto& compute) {
        std::vector<float> wanted(size_t(T * cols)), y(size_t(T * cols));
        for (const int64_t first : {int64_t(0), T - 1}) {  // many tokens, and one alone
            compute(x.data(), first, wanted.data());
            compute(bad.data(), first, y.data());
            for (int64_t t = first; t < T; ++t) {
                const bool harmed = t == 1 || t == 4 || t == 5 || t == 11;
                for (int64_t i = (t - first) * cols; i < (t - first + 1) * cols; ++i) {
                    const float got = y[size_t(i)];
                    const bool right = !harmed           ? got == wanted[size_t(i)]
                                       : f == Format::bf16 ? !std::isfinite(got)
                                                           : std::isnan(got);
                    if (!expect(right, "%s of token %ld is %g", what, long(t), double(got))) return;
                }
            }
        }
    };
    for (const std::string& set : available_kernels()) {
        where = text("not finite %s %s", set.c_str(), name_of(f));
        choose_kernels(set);
        check("linear", H, [&](float* from, int64_t first, float* y) {
            linear_f32(layer.weights[0], from + first * D, T - first, y);
        });
        check("moe", D, [&](float* from, int64_t first, float* y) {
            moe_f32(layer, choice, from, first, T - first, y);
        });
    }
}

// Activations before bfloat16 weights are rounded to the nearest, half to even; NaN stays NaN, whatever its bits.
void check_bf16_rounding() {
    const uint16_t one = 0x3f80;
    const Matrix w{Format::bf16, reinterpret_cast<const uint8_t*>(&one), 1, 1};
    std::vector<float> x;
    for (const uint32_t high : {0x3f800000u, 0x3f810000u, 0xc2ff0000u, 0x7f7e0000u, 0x7f7f0000u, 0xff7f0000u}) {
        for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
            x.push_back(std::bit_cast<float>(high | low));
        }
    }
    for (const uint32_t nan : {0x7f800001u, 0xff80ffffu, 0x7fffffffu}) x.push_back(std::bit_cast<float>(nan));
    const int64_t n = int64_t(x.size());
    for (const std::string& set : available_kernels()) {
        where = "bfloat16 rounding " + set;
        choose_kernels(set);
        Guarded<float> y(n);
        linear(rows_of(x.data(), n, 1), w, rows_of(y.data(), n, 1));
        for (int64_t i = 0; i < n; ++i) {
            const float from = x[size_t(i)];
            const bool right = std::isnan(from) ? std::isnan(y[i])
                                                : y[i] == float(reference::bf16_value(reference::to_bf16(from)));
            expect(right, "%08x became %08x", std::bit_cast<uint32_t>(from), std::bit_cast<uint32_t>(y[i]));
        }
    }
}

void check_silu() {
    std::vector<float> a, b;
    for (double x = -120; x <= 120; x += 0.0137) a.push_back(float(x));
    for (double x = 1e-40; x < 1e38; x *= 7.3) a.push_back(float(x)), a.push_back(float(-x));
    for (size_t i = 0; i < a.size(); ++i) b.push_back(i % 2 ? 1.0f : -0.5f);
    std::vector<float> first;
    for (const std::string& set : available_kernels()) {
        where = "silu_mul " + set;
        choose_kernels(set);
        const int64_t n = int64_t(a.size()) - 3;  // not a multiple of 16
        Guarded<float> h(n);
        kernels().silu_mul(a.data(), b.data(), h.data(), n);
        double worst = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double x = a[size_t(i)], wanted = reference::silu(x) * b[size_t(i)];
            // Below -87 the exponential is held back from overflowing: what should vanish is at most |x| / e^87.
            const double bound = 2 * 2 * reference::kHalfUlp * std::fabs(wanted) + reference::kSmallest +
                                 (x < -87 ? -x * std::exp(-87.0) : 0);
            if (x > -87 && std::fabs(wanted) > 1e-30) worst = std::max(worst, std::fabs(h[i] / wanted - 1));
            expect(std::fabs(h[i] - wanted) <= bound, "silu(%.9g) * %g is %.9g, expected %.9g", x, double(b[size_t(i)]),
                   double(h[i]), wanted);
        }
        std::printf("silu_mul %s: at most %.2f ulp wrong\n", set.c_str(), worst / (2 * reference::kHalfUlp));
        expect_same_on_all({h.begin(), h.end()}, first, n);
    }
}

// No tokens at all, and more than are computed at a time.
void check_counts() {
    Random random(3);
    const Weights w(Format::q4, 17, 65, random);
    const Layer layer({Format::q3, Format::q2, Format::q8}, 3, 20, 24, random);
    constexpr int64_t kMany = 1030;
    const Choice choice(kMany, 2, 3 + 1, random);
    Guarded<float> x(kMany * 65), y(kMany * 17), z(kMany * 20), one(20);
    for (int64_t t = 0; t < kMany; ++t) fill_token(&x[t * 65], 65, 0, random);
    choose_kernels("");
    for (const int n : {1, 3}) {
        set_threads(n);
        where = text("token counts, threads=%d", n);
        linear(rows_of<float>(nullptr, 0, 65), w.matrix, rows_of<float>(nullptr, 0, 17));
        moe(rows_of<float>(nullptr, 0, 20), nullptr, nullptr, 2, layer.experts, rows_of<float>(nullptr, 0, 20));
        linear_f32(w, x.data(), kMany, y.data());
        moe_f32(layer, choice, x.data(), 0, kMany, z.data());
        for (const int64_t t : {int64_t(0), int64_t(1023), int64_t(1024), kMany - 1}) {
            linear_f32(w, &x[t * 65], 1, one.data());
            expect_same_bits(&y[t * 17], one.data(), 17, 17, "alone (linear)");
            moe_f32(layer, choice, x.data(), t, 1, one.data());
            expect_same_bits(&z[t * 20], one.data(), 20, 20, "alone (moe)");
        }
    }
}

// The measurements of the machine's limits read what they are given, however little.
void check_limits() {
    Random random(4);
    const Weights tiny(Format::bf16, 1, 1, random), odd(Format::bf16, 33, 67, random), low(Format::q3, 20, 100, random);
    for (const std::string& set : available_kernels()) {
        where = "limits " + set;
        choose_kernels(set);
        set_threads(2);
        expect(read_bandwidth({tiny.matrix, odd.matrix, low.matrix}) > 0, "no bandwidth");
        expect(dot_peak(0.001) > 0, "no operations");
    }
}

// ---------------------------------------- threads

// Every task is done once, by a thread whose number is below threads(), before parallel returns.
void check_tasks() {
    for (const int n : {1, 2, 3, 5, 2}) {
        set_threads(n);
        for (const int64_t tasks : {0, 1, 2, 7, 1000}) {
            where = text("parallel(%ld) on %d threads", long(tasks), n);
            std::vector<int> done(static_cast<size_t>(tasks)), by(static_cast<size_t>(tasks));
            parallel(tasks, [&](int64_t task, int thread) { ++done[size_t(task)], by[size_t(task)] = thread; });
            for (int64_t i = 0; i < tasks; ++i) {
                expect(done[size_t(i)] == 1, "task %ld was done %d times", long(i), done[size_t(i)]);
                expect(by[size_t(i)] >= 0 && by[size_t(i)] < n, "task %ld by thread %d", long(i), by[size_t(i)]);
            }
        }
    }
    set_threads(3);
    where = "short jobs";
    int64_t sums[3] = {};
    for (int job = 0; job < 2000; ++job) {
        if (job % 200 == 0) usleep(500);  // the workers fall asleep
        parallel(8, [&](int64_t task, int thread) { sums[thread] += task; });
    }
    expect(sums[0] + sums[1] + sums[2] == 2000 * 28, "tasks were lost");
}

// Several callers at once, while somebody else changes the number of threads all the time.
void check_callers(int rounds) {
    Random random(6);
    const Weights w(Format::q4, 200, 130, random);
    const Layer layer({Format::q3, Format::q3, Format::q2}, 4, 130, 70, random);
    constexpr int64_t T = 20;
    const Choice choice(T, 2, 4, random);
    Guarded<float> x(T * 130);
    for (int64_t t = 0; t < T; ++t) fill_token(&x[t * 130], 130, 0, random);
    std::vector<float> y(size_t(T * 200)), z(size_t(T * 130));
    choose_kernels("");
    set_threads(1);
    linear_f32(w, x.data(), T, y.data());
    moe_f32(layer, choice, x.data(), 0, T, z.data());

    std::atomic<int> wrong{0}, running{2};
    const auto call = [&](int64_t tokens) {
        std::vector<float> mine(size_t(T * 200));
        for (int i = 0; i < rounds; ++i) {
            linear_f32(w, x.data(), tokens, mine.data());
            wrong += std::memcmp(mine.data(), y.data(), size_t(tokens) * 200 * 4) != 0;
            moe_f32(layer, choice, x.data(), 0, tokens, mine.data());
            wrong += std::memcmp(mine.data(), z.data(), size_t(tokens) * 130 * 4) != 0;
        }
        --running;
    };
    std::thread few(call, 3), many(call, T);
    for (int n = 0; running > 0; ++n) {
        set_threads(1 + n % 4);
        usleep(300);
    }
    few.join();
    many.join();
    where = "several callers";
    expect(wrong == 0, "%d results were wrong", wrong.load());
}

bool forked = false;

// A forked process has none of the threads: it makes its own, or ends without. Another thread may be computing.
void check_fork() {
    Random random(8);
    const Weights w(Format::q8, 300, 70, random);
    Guarded<float> x(9 * 70), y(9 * 300);
    for (int64_t t = 0; t < 9; ++t) fill_token(&x[t * 70], 70, 0, random);
    const auto right = [&] {
        Guarded<float> again(9 * 300);
        linear_f32(w, x.data(), 9, again.data());
        return std::memcmp(y.data(), again.data(), size_t(y.size()) * 4) == 0;
    };
    choose_kernels("");
    set_threads(2);
    linear_f32(w, x.data(), 9, y.data());
    std::fflush(stdout);
    for (const bool busy : {false, true}) {
        std::atomic<bool> stop{false};
        std::thread other([&] {
            while (busy && !stop) right();
        });
        for (int i = 0; i < 20; ++i) {
            const bool computes = busy || i % 2 == 0;
            where = text("a fork that %s while another thread %s", computes ? "computes" : "only ends",
                         busy ? "computes" : "sleeps");
            const pid_t child = fork();
            if (child == 0) {
                forked = true;
                alarm(10);  // so ends a child that waits for threads it does not have
                if (!computes) std::exit(0);
                _exit(!right());
            }
            int status = -1;
            waitpid(child, &status, 0);
            if (!expect(status == 0, "it ended with status %d", status)) break;
        }
        stop = true;
        other.join();
        expect(right(), "after the forks the results are wrong");
    }
}

// ---------------------------------------- which cases

constexpr Format kFormats[] = {Format::q8, Format::q4, Format::q3, Format::q2, Format::bf16};

void check_pool() {
    check_tasks();
    check_callers(30);
    check_block_callers(15);
    check_reader(false);
    check_linear(Format::q3, 100, 70, {1, 3, 20});
    check_moe({Format::q4, Format::q4, Format::q4}, 40, 70, 2, {1, 3, 20});
}

void check_quickly() {
    check_tasks();
    check_callers(30);
    check_block_callers(15);
    check_fork();
    check_bf16_rounding();
    check_silu();
    check_counts();
    check_limits();
    check_repeated_expert();
    for (const Format f : kFormats) {
        check_not_finite(f);
        if (f != Format::bf16) check_extremes(f);
        check_linear(f, 17, 65, {1, 2, 8, 9, 13});
        check_linear(f, 40, 577, {1, 2, 8, 9, 13});  // more columns than are unpacked at a time
        check_moe({f, f, f}, 70, 100, 2, {1, 2, 20});
    }
    for (const int64_t K : {1, 2, 3}) {
        check_moe({Format::q4, Format::q3, Format::q2}, 48, 90, K, {1, 2, 9});
        check_moe({Format::q8, Format::bf16, Format::q4}, 48, 90, K, {1, 2, 9});
        check_moe({Format::q2, Format::q2, Format::bf16}, 48, 90, K, {1, 2, 9});
        check_moe({Format::bf16, Format::q8, Format::q3}, 48, 90, K, {1, 2, 9});
    }
    check_parts(false);
    check_block(false);
    check_reader(false);
}

void check_more() {
    const std::vector<int64_t> counts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33};
    const std::vector<std::array<int64_t, 2>> shapes = {{1, 1},    {1, 200},  {5, 128}, {16, 64},   {31, 190}, {32, 3},
                                                        {33, 129}, {40, 577}, {48, 31}, {16, 1100}, {300, 96}};
    for (const Format f : kFormats) {
        for (const auto& [rows, cols] : shapes) check_linear(f, rows, cols, counts);
        check_moe({f, f, f}, 64, 128, 2, {1, 2, 9, 40});
        check_moe({f, f, f}, 1, 1, 1, {1, 2, 17});
        check_moe({f, f, f}, 33, 200, 3, {1, 3, 8, 40});
    }
    check_parts(true);
    check_block(true);
    check_reader(true);
}

}  // namespace

// Asked by the leak checker of the address sanitizer, which would miss what the lost threads of a fork own.
extern "C" int __lsan_is_turned_off() { return forked; }

int main(int argc, char** argv) {
    const std::string argument = argc > 1 ? argv[1] : "all";
    if (argument == "pool") {
        check_pool();
    } else if (argument == "quick" || argument == "all") {
        check_quickly();
        std::printf("bits %016lx\n", static_cast<unsigned long>(digest));
        if (argument == "all") check_more();
    } else {
        std::fprintf(stderr, "usage: check [all | quick | pool]\n");
        return 2;
    }
    std::string sets;
    for (const std::string& set : available_kernels()) sets += (sets.empty() ? "" : ", ") + set;
    std::printf("%ld checks on %s: %ld failed\n", long(n_checked), sets.c_str(), long(n_failed));
    return n_failed > 0;
}
