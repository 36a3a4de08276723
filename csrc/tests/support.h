// What a check needs: failures, memory that ends at a guard page, random arguments, comparisons.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <random>
#include <string>

#include "../pool.h"
#include "reference.h"

namespace support {

using namespace octavo;

// ---------------------------------------- failures, memory, random numbers

inline std::string where;  // what is being checked
inline int64_t n_checked = 0, n_failed = 0;
inline uint64_t digest = 0;  // of results whose bits every machine should give

[[gnu::format(printf, 2, 3)]] inline bool expect(bool holds, const char* format, ...) {
    ++n_checked;
    if (holds) return true;
    if (++n_failed > 50) return false;
    std::printf("FAIL %s: ", where.c_str());
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
    return false;
}

[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
    char out[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(out, sizeof out, format, arguments);
    va_end(arguments);
    return out;
}

inline const char* name_of(Format f) {
    switch (f) {
        case Format::bf16: return "bf16";
        case Format::q8: return "q8";
        case Format::q4: return "q4";
        case Format::q3: return "q3";
        case Format::q2: return "q2";
    }
    return "?";
}

// n numbers that end where a page begins that can be neither read nor written.
template <class T>
class Guarded {
  public:
    explicit Guarded(int64_t n) : n_(n) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), nbytes = size_t(n) * sizeof(T);
        const size_t used = (nbytes + page - 1) / page * page;
        size_ = used + page;
        base_ = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + used, page, PROT_NONE) != 0) std::abort();
        data_ = reinterpret_cast<T*>(base_ + used - nbytes);
    }
    ~Guarded() { munmap(base_, size_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    T* data() const { return data_; }
    int64_t size() const { return n_; }
    T& operator[](int64_t i) const { return data_[i]; }
    T* begin() const { return data_; }
    T* end() const { return data_ + n_; }

  private:
    int64_t n_;
    size_t size_;
    uint8_t* base_;
    T* data_;
};

class Random {
  public:
    explicit Random(uint32_t seed) : engine_(seed) {}
    uint32_t bits() { return uint32_t(engine_()); }
    int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
    float uniform() { return float(int32_t(bits())) * 0x1p-31f; }  // -1 to 1
    float normal() { return uniform() + uniform() + uniform(); }  // about so, of variance 1
    // A bfloat16 between 2^-12 and 2^3, of either sign; sometimes zero.
    uint16_t bf16() {
        const uint32_t b = bits();
        return b % 16 == 0 ? 0 : uint16_t((b >> 16 & 0x807f) | (115 + (b >> 8) % 15) << 7);
    }

  private:
    std::mt19937 engine_;
};

// ---------------------------------------- arguments

// A random matrix. Any bytes are codes, and padding holds some too: it must not matter. Scales are finite; at 3 and 2
// bits their low four bits select books.
struct Weights {
    Guarded<uint8_t> bytes;
    Matrix matrix;

    Weights(Format f, int64_t rows, int64_t cols, Random& random)
        : bytes(reference::bytes_of_matrix(f, rows, cols)), matrix{f, bytes.data(), rows, cols} {
        for (uint8_t& byte : bytes) byte = uint8_t(random.bits() >> 11);
        const int64_t step = f == Format::bf16 ? bytes.size() : reference::bytes_of_block(f);
        for (int64_t at = 0; at < bytes.size(); at += step) {
            for (int64_t i = 0; i < (f == Format::bf16 ? step : 64); i += 2) {
                uint16_t scale = random.bf16();
                if (f == Format::q3 || f == Format::q2) scale = uint16_t((scale & 0xfff0) | random.below(16));
                std::memcpy(bytes.data() + at + i, &scale, 2);
            }
        }
    }
};

using Three = std::array<Format, 3>;  // of w1, w3 and w2

struct Layer {
    int64_t dim, hidden_dim;
    std::deque<Weights> weights;  // w1, w3, w2 of each expert
    std::vector<Expert> experts;

    Layer(const Three& formats, int64_t n, int64_t D, int64_t H, Random& random) : dim(D), hidden_dim(H) {
        for (int64_t e = 0; e < n; ++e) {
            const Matrix& w1 = weights.emplace_back(formats[0], H, D, random).matrix;
            const Matrix& w3 = weights.emplace_back(formats[1], H, D, random).matrix;
            const Matrix& w2 = weights.emplace_back(formats[2], D, H, random).matrix;
            experts.push_back({w1, w3, w2});
        }
    }
};

// Tokens of several kinds, in turn.
inline void fill_token(float* x, int64_t n, int64_t kind, Random& random) {
    for (int64_t i = 0; i < n; ++i) {
        switch (kind % 9) {
            case 3: x[i] = 0.0f; break;
            case 4: x[i] = 1e30f * random.normal(); break;
            case 5: x[i] = 1e-30f * random.normal(); break;
            case 6: x[i] = 1e-40f * random.normal(); break;
            case 7: x[i] = i % 64 == 0 ? 127.0f : float(random.below(508) - 254) / 2; break;  // many halves
            case 8: x[i] = random.below(n) == 0 ? 1000.0f : random.normal(); break;
            default: x[i] = random.normal();
        }
    }
}

// A number in memory is a float or the bits of a bfloat16.
inline double value(float x) { return x; }
inline double value(uint16_t x) { return reference::bf16_value(x); }

template <class T>
T rounded(float x) {
    if constexpr (sizeof(T) == 4) return x;
    return T(reference::to_bf16(x));
}

template <class T>
T random_number(Random& random) {
    if constexpr (sizeof(T) == 4) return random.normal();
    return T(random.bf16());
}

template <class T>
const char* name_of_type() {
    return sizeof(T) == 4 ? "float32" : "bfloat16";
}

template <class T>
constexpr T nan() {
    if constexpr (sizeof(T) == 4) return std::numeric_limits<float>::quiet_NaN();
    return 0x7fc0;
}

template <class T>
void fill(const Guarded<T>& to, Random& random) {
    for (T& x : to) x = random_number<T>(random);
}

template <class T>
Numbers numbers(const T* data) {
    return {sizeof(T) == 4 ? Float::f32 : Float::bf16, data};
}

template <class T>
Rows rows_of(T* data, int64_t count, int64_t cols) {
    return {numbers(data).dtype, data, count, cols};
}

template <class T>
reference::Vector values_of(const T* x, int64_t n) {
    reference::Vector out;
    for (int64_t i = 0; i < n; ++i) out.push_back(value(x[i]));
    return out;
}

// Results are expected in memory that held something else.
template <class T>
void spoil(const Guarded<T>& y) {
    std::fill(y.begin(), y.end(), rounded<T>(-12345.0f));
}

template <class T>
void expect_same_bits(const T* got, const T* wanted, int64_t n, int64_t cols, const char* as) {
    const bool same = std::memcmp(got, wanted, size_t(n) * sizeof(T)) == 0;
    for (int64_t i = same ? n : 0; i < n; ++i) {
        if (std::memcmp(got + i, wanted + i, sizeof(T)) == 0) continue;
        expect(false, "y[%ld][%ld] is %.9g, but %.9g %s", long(i / cols), long(i % cols), value(got[i]),
               value(wanted[i]), as);
        return;
    }
    ++n_checked;
}

// The bits are those of the first instruction set.
template <class T>
void expect_same_on_this_machine(const std::vector<T>& got, std::vector<T>& first, int64_t cols) {
    if (first.empty()) first = got;
    expect_same_bits(got.data(), first.data(), int64_t(got.size()), cols, "with the first set");
}

// And every other machine should have them too.
template <class T>
void expect_same_on_all(const std::vector<T>& got, std::vector<T>& first, int64_t cols) {
    if (first.empty()) {
        for (const T x : got) {
            uint32_t bits = 0;
            std::memcpy(&bits, &x, sizeof x);
            digest = digest * 0x9e3779b97f4a7c15u + bits;
        }
    }
    expect_same_on_this_machine(got, first, cols);
}

inline bool expect_near(float got, const reference::Sum& sum, int64_t token, int64_t row) {
    const bool near = std::fabs(got - sum.value) <= sum.bound();  // false for NaN
    return expect(near, "y[%ld][%ld] is %.9g, expected %.9g within %.3g", long(token), long(row), double(got),
                  sum.value, sum.bound());
}

// Calls fn(name) with every instruction set in use, one after another.
template <class Fn>
void with_every_set(const std::string& what, const Fn& fn) {
    for (const std::string& set : available_kernels()) {
        choose_kernels(set);
        set_threads(1);
        const std::string name = what + " " + set;
        where = name;
        fn(name);
    }
}

// compute(first, count, y) gives rows the bits that they have alone on one thread, in any company, by any threads.
template <class T, class Fn>
void expect_same_in_company(const std::string& what, const std::vector<T>& alone, int64_t cols, const Fn& compute) {
    const int64_t most = int64_t(alone.size()) / cols;
    const std::vector<int64_t> counts[] = {{2, most}, {1, 3, most}, {2, 3}};  // each on one more thread
    for (int n = 1; n <= 3; ++n) {
        set_threads(n);
        for (const int64_t count : counts[n - 1]) {
            where = text("%s rows=%ld threads=%d", what.c_str(), long(count), n);
            Guarded<T> y(count * cols);
            spoil(y);
            compute(most - count, count, y.data());
            expect_same_bits(y.data(), &alone[size_t((most - count) * cols)], y.size(), cols, "alone on one thread");
        }
    }
    set_threads(1);
    where = what;
}

// Rows that are harmed are NaN, and the others have kept their bits.
template <class T, class Fn>
void expect_harmed(const std::vector<T>& got, const std::vector<T>& wanted, int64_t cols, const Fn& is_harmed) {
    for (int64_t i = 0; i < int64_t(got.size()); ++i) {
        const T x = got[size_t(i)], y = wanted[size_t(i)];
        const bool right = is_harmed(i / cols) ? std::isnan(value(x)) : std::memcmp(&x, &y, sizeof x) == 0;
        if (!expect(right, "y[%ld][%ld] is %g", long(i / cols), long(i % cols), value(x))) return;
    }
}

}  // namespace support
