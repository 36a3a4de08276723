// The kernels of one instruction set. Included by one translation unit for each, inside a namespace of its own, after
// a struct `Isa` has been defined there:
//
//   Lot: 64 bytes; Sum: 16 int32; Vec: 16 float (in every instruction set, whatever its registers hold)
//   load, shr<n>, shl<n> (within bytes or 16 bits, as it pleases), merge(a, b, mask) = (a & mask) | (b & ~mask)
//   lookup(book, v): by the low four bits of every byte, whatever the others are; or six where kWideLookup
//   dot(sum, lot, four): adds four products to each of 16 sums; broadcast gives the four int8
//
// Integer sums are exact, and floats are computed in the same order everywhere, so all of them give the same bits.
// No standard library here: an inline function compiled for AVX-512 must not end up in the generic code.


using Lot = Isa::Lot;
using Sum = Isa::Sum;
using Vec = Isa::Vec;

struct NoBook {};

template <Format F>
struct Codes;

// Calls each(group, lot, codes) for the 16 lots of a unit; the codes are as Isa::dot wants them.
template <>
struct Codes<Format::q8> {
    static constexpr int kGroups = 1;
    static constexpr uint16_t kScaleMask = 0xffff;
    static INLINE NoBook book() { return {}; }
    template <class Each>
    static INLINE void unpack(const uint8_t* codes, const uint8_t*, NoBook, Each each) {
        UNROLL(16)
        for (int lot = 0; lot < kUnitLots; ++lot) each(0, lot, Isa::load_codes8(codes + lot * kLotBytes));
    }
};

template <>
struct Codes<Format::q4> {
    static constexpr int kGroups = 1;
    static constexpr uint16_t kScaleMask = 0xffff;
    static INLINE Lot book() { return Isa::book(kBook4); }
    template <class Each>
    static INLINE void unpack(const uint8_t* codes, const uint8_t*, Lot book, Each each) {
        UNROLL(8)
        for (int i = 0; i < 8; ++i) {
            const Lot v = Isa::load(codes + i * kLotBytes);
            each(0, 2 * i, Isa::lookup(book, v));
            each(0, 2 * i + 1, Isa::lookup(book, Isa::template shr<4>(v)));
        }
    }
};

// Three vectors hold eight lots: six in the lower bits of their nibbles, the last two in the nibbles' highest bits.
template <>
struct Codes<Format::q3> {
    static constexpr int kGroups = 2;
    static constexpr uint16_t kScaleMask = 0xfff0;
    static INLINE Lot book() { return Isa::book(kBook3); }
    template <class Each>
    static INLINE void unpack(const uint8_t* codes, const uint8_t* scales, Lot book, Each each) {
        UNROLL(2)
        for (int g = 0; g < 2; ++g, codes += 3 * kLotBytes) {
            const Lot a = Isa::load(codes), b = Isa::load(codes + 64), c = Isa::load(codes + 128);
            // Bit j of the scale: book of lots 2j and 2j + 1. In both nibbles, because a byte holds codes of two lots.
            const Lot bits = Isa::low_bytes(scales + 32 * g);
            const Lot select = Isa::merge(bits, Isa::template shl<4>(bits), 0x0f);
            const auto two = [&](int lot, Lot pair, Lot s) INLINE_LAMBDA {
                const Lot v = Isa::merge(pair, s, 0x77);
                each(g, 8 * g + lot, Isa::lookup(book, v));
                each(g, 8 * g + lot + 1, Isa::lookup(book, Isa::template shr<4>(v)));
            };
            two(0, a, Isa::template shl<3>(select));
            two(2, b, Isa::template shl<2>(select));
            two(4, c, Isa::template shl<1>(select));
            const Lot last = Isa::merge(Isa::template shr<2>(b), Isa::template shr<1>(c), 0x22);
            two(6, Isa::merge(Isa::template shr<3>(a), last, 0x11), select);
        }
    }
};

template <>
struct Codes<Format::q2> {
    static constexpr int kGroups = 2;
    static constexpr uint16_t kScaleMask = 0xfff0;

    // Where a table has 64 entries, the selector lies in bits 4 and 5, and the code in bits 0 and 1, or 2 and 3.
    struct Book {
        Lot low, high;
    };
    static INLINE Book book() {
        if constexpr (!Isa::kWideLookup) return {Isa::book(kBook2), Isa::book(kBook2)};
        int8_t low[64], high[64];
        for (int i = 0; i < 64; ++i) {
            low[i] = kBook2[4 * (i >> 4) + (i & 3)];
            high[i] = kBook2[4 * (i >> 4) + (i >> 2 & 3)];
        }
        return {Isa::wide_book(low), Isa::wide_book(high)};
    }

    template <class Each>
    static INLINE void unpack(const uint8_t* codes, const uint8_t* scales, const Book& book, Each each) {
        UNROLL(2)
        for (int g = 0; g < 2; ++g) {  // bits 2i, 2i + 1 of the scale: book of lots 4i to 4i + 3
            Lot select = Isa::low_bytes(scales + 32 * g);
            if constexpr (!Isa::kWideLookup) select = Isa::merge(select, Isa::template shl<4>(select), 0x0f);
            UNROLL(2)
            for (int i = 0; i < 2; ++i, codes += kLotBytes) {
                const Lot v = Isa::load(codes);
                const int lot = 8 * g + 4 * i;
                if constexpr (Isa::kWideLookup) {
                    const Lot s = i ? Isa::template shl<2>(select) : Isa::template shl<4>(select);
                    const Lot first = Isa::merge(v, s, 0x0f), second = Isa::merge(Isa::template shr<4>(v), s, 0x0f);
                    each(g, lot, Isa::lookup(book.low, first));
                    each(g, lot + 1, Isa::lookup(book.high, first));
                    each(g, lot + 2, Isa::lookup(book.low, second));
                    each(g, lot + 3, Isa::lookup(book.high, second));
                } else {
                    const Lot s = i ? select : Isa::template shl<2>(select);
                    const Lot even = Isa::merge(v, s, 0x33), odd = Isa::merge(Isa::template shr<2>(v), s, 0x33);
                    each(g, lot, Isa::lookup(book.low, even));
                    each(g, lot + 1, Isa::lookup(book.low, odd));
                    each(g, lot + 2, Isa::lookup(book.low, Isa::template shr<4>(even)));
                    each(g, lot + 3, Isa::lookup(book.low, Isa::template shr<4>(odd)));
                }
            }
        }
    }
};

// Where unit u's scales and codes lie in a panel.
template <Format F>
struct Place {
    const uint8_t *scales, *codes;
    INLINE Place(const uint8_t* panel, int64_t u) {
        if constexpr (block_cols(F) == kUnit) {
            scales = panel + u * block_bytes(F);
            codes = scales + 64;
        } else {
            const uint8_t* block = panel + (u >> 1) * block_bytes(F);
            scales = block + (u & 1) * 32;
            codes = block + 64 + (u & 1) * group_bytes(F);
        }
    }
};

static INLINE int32_t load_i32(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
}

static INLINE float load_f32(const uint8_t* p) {
    float v;
    __builtin_memcpy(&v, p, 4);
    return v;
}

// A unit of a tile of T tokens.
template <int T>
struct Unit {
    const uint8_t* p;
    INLINE const uint8_t* lot(int t, int i) const { return p + t * kUnit + i * 4; }
    INLINE float scale(int t) const { return load_f32(p + T * kUnit + t * 4); }
    // Where the sum of a group's products begins: codes are offset where the instruction wants them unsigned.
    template <Format F>
    INLINE Sum start(int t, int group) const {
        constexpr int kOffset = Isa::offset(F);
        if constexpr (kOffset == 0) return Isa::sum(0);
        const int which = Codes<F>::kGroups == 2 ? group : 2;
        const Sum s = Isa::sum(load_i32(p + T * (kUnit + 4) + t * 12 + which * 4));
        if constexpr (kOffset == 128) return Isa::add(s, s);
        return s;
    }
};

// ---------------------------------------- a few tokens: codes are unpacked and used at once

template <Format F, int T>
static void direct_t(const uint8_t* panel, int64_t n_units, const uint8_t* x, float* y, int64_t stride) {
    constexpr int kSums = T == 1 ? 2 : 1;  // one chain of sums alone would wait for itself
    constexpr int kLots = kUnitLots / Codes<F>::kGroups;
    const auto book = Codes<F>::book();
    Vec out[T];
    for (int t = 0; t < T; ++t) out[t] = Isa::vec(0.0f);
    for (int64_t u = 0; u < n_units; ++u, x += unit_bytes(T)) {
        const Place<F> at(panel, u);
        const Unit<T> unit{x};
        Sum sums[T][kSums];
        Vec part[T];
        Codes<F>::unpack(at.codes, at.scales, book, [&](int group, int lot, Lot w) INLINE_LAMBDA {
            if (lot % kLots == 0) {
                UNROLL(8)
                for (int t = 0; t < T; ++t) {
                    sums[t][0] = unit.template start<F>(t, group);
                    if constexpr (kSums == 2) sums[t][1] = Isa::sum(0);
                }
            }
            UNROLL(8)
            for (int t = 0; t < T; ++t) {
                Sum& s = sums[t][lot % kSums];
                s = Isa::template dot<F>(s, w, unit.lot(t, lot));
            }
            if (lot % kLots == kLots - 1) {
                const Vec scale = Isa::scales(at.scales + 32 * group, Codes<F>::kScaleMask);
                UNROLL(8)
                for (int t = 0; t < T; ++t) {
                    Sum s = sums[t][0];
                    if constexpr (kSums == 2) s = Isa::add(s, sums[t][1]);
                    const Vec f = Isa::to_float(s);
                    part[t] = group == 0 ? Isa::mul(f, scale) : Isa::fma(f, scale, part[t]);
                }
            }
        });
        UNROLL(8)
        for (int t = 0; t < T; ++t) out[t] = Isa::fma(part[t], Isa::vec(unit.scale(t)), out[t]);
    }
    for (int t = 0; t < T; ++t) Isa::store(y + t * stride, out[t]);
}

template <Format F>
static void direct_f(const uint8_t* panel, int64_t n_units, Tile x, float* y, int64_t stride) {
    switch (x.tokens) {
        case 1: return direct_t<F, 1>(panel, n_units, x.data, y, stride);
        case 2: return direct_t<F, 2>(panel, n_units, x.data, y, stride);
        case 3: return direct_t<F, 3>(panel, n_units, x.data, y, stride);
        case 4: return direct_t<F, 4>(panel, n_units, x.data, y, stride);
        case 5: return direct_t<F, 5>(panel, n_units, x.data, y, stride);
        case 6: return direct_t<F, 6>(panel, n_units, x.data, y, stride);
        case 7: return direct_t<F, 7>(panel, n_units, x.data, y, stride);
        case 8: return direct_t<F, 8>(panel, n_units, x.data, y, stride);
    }
}

static void direct(Format f, const uint8_t* panel, int64_t n_units, Tile x, float* y, int64_t stride) {
    switch (f) {
        case Format::q8: return direct_f<Format::q8>(panel, n_units, x, y, stride);
        case Format::q4: return direct_f<Format::q4>(panel, n_units, x, y, stride);
        case Format::q3: return direct_f<Format::q3>(panel, n_units, x, y, stride);
        case Format::q2: return direct_f<Format::q2>(panel, n_units, x, y, stride);
        case Format::bf16: return;
    }
}

// ---------------------------------------- many tokens: a span of columns is unpacked once, then used by every tile

template <Format F, int P>
static void unpack_span(const uint8_t* const* panels, int64_t first, int n, Span* span) {
    const auto book = Codes<F>::book();
    for (int p = 0; p < P; ++p) {
        for (int u = 0; u < n; ++u) {
            const Place<F> at(panels[p], first + u);
            uint8_t* lots = span->lots + (u * kUnitLots * P + p) * kLotBytes;
            Codes<F>::unpack(at.codes, at.scales, book, [&](int, int lot, Lot w) INLINE_LAMBDA {
                Isa::store_lot(lots + lot * P * kLotBytes, w);
            });
            for (int g = 0; g < Codes<F>::kGroups; ++g) {
                const Vec scale = Isa::scales(at.scales + 32 * g, Codes<F>::kScaleMask);
                Isa::store(span->scales + ((u * Codes<F>::kGroups + g) * P + p) * kPanelRows, scale);
            }
        }
    }
}

template <Format F, int P, int T>
static void tile_t(const Span* span, int n, const uint8_t* x, float* y, int64_t stride, bool fresh) {
    constexpr int G = Codes<F>::kGroups, kLots = kUnitLots / G;
    Vec out[T][P];
    UNROLL(8)
    for (int t = 0; t < T; ++t)
        UNROLL(2)
        for (int p = 0; p < P; ++p) out[t][p] = fresh ? Isa::vec(0.0f) : Isa::load_vec(y + t * stride + 16 * p);
    const uint8_t* lots = span->lots;
    const float* scales = span->scales;
    for (int u = 0; u < n; ++u, x += unit_bytes(T)) {
        const Unit<T> unit{x};
        Vec part[T][P];
        UNROLL(2)
        for (int g = 0; g < G; ++g, scales += P * kPanelRows) {
            Sum sums[T][P];
            UNROLL(8)
            for (int t = 0; t < T; ++t)
                UNROLL(2)
                for (int p = 0; p < P; ++p) sums[t][p] = unit.template start<F>(t, g);
            UNROLL(4)
            for (int i = 0; i < kLots; ++i, lots += P * kLotBytes) {
                Lot w[P];
                UNROLL(2)
                for (int p = 0; p < P; ++p) w[p] = Isa::load(lots + p * kLotBytes);
                UNROLL(8)
                for (int t = 0; t < T; ++t) {
                    const auto four = Isa::broadcast(unit.lot(t, g * kLots + i));
                    UNROLL(2)
                    for (int p = 0; p < P; ++p) sums[t][p] = Isa::template dot<F>(sums[t][p], w[p], four);
                }
            }
            UNROLL(2)
            for (int p = 0; p < P; ++p) {
                const Vec scale = Isa::load_vec(scales + p * kPanelRows);
                UNROLL(8)
                for (int t = 0; t < T; ++t) {
                    const Vec f = Isa::to_float(sums[t][p]);
                    part[t][p] = g == 0 ? Isa::mul(f, scale) : Isa::fma(f, scale, part[t][p]);
                }
            }
        }
        UNROLL(8)
        for (int t = 0; t < T; ++t) {
            const Vec scale = Isa::vec(unit.scale(t));
            UNROLL(2)
            for (int p = 0; p < P; ++p) out[t][p] = Isa::fma(part[t][p], scale, out[t][p]);
        }
    }
    UNROLL(8)
    for (int t = 0; t < T; ++t)
        UNROLL(2)
        for (int p = 0; p < P; ++p) Isa::store(y + t * stride + 16 * p, out[t][p]);
}

template <Format F, int P>
static void tile_p(const Span* span, int n, Tile x, const uint8_t* at, float* y, int64_t stride, bool fresh) {
    switch (x.tokens) {
        case 1: return tile_t<F, P, 1>(span, n, at, y, stride, fresh);
        case 2: return tile_t<F, P, 2>(span, n, at, y, stride, fresh);
        case 3: return tile_t<F, P, 3>(span, n, at, y, stride, fresh);
        case 4: return tile_t<F, P, 4>(span, n, at, y, stride, fresh);
        case 5: return tile_t<F, P, 5>(span, n, at, y, stride, fresh);
        case 6: return tile_t<F, P, 6>(span, n, at, y, stride, fresh);
    }
}

// Asks for a share of the next span's bytes while this one is computed with, so that they are there in time.
template <Format F, int P>
static INLINE void prefetch_share(const uint8_t* const* panels, int64_t first, int64_t n_units, int64_t i, int64_t n) {
    const int64_t units = n_units - first < kSpanUnits ? n_units - first : kSpanUnits;
    if (units <= 0) return;
    const int64_t begin = Place<F>(panels[0], first).scales - panels[0];
    const int64_t lines = ceil_div(units * kUnit * block_bytes(F) / block_cols(F), 64);
    for (int64_t line = lines * i / n; line < lines * (i + 1) / n; ++line) {
        for (int p = 0; p < P; ++p) __builtin_prefetch(panels[p] + begin + 64 * line, 0, 2);
    }
}

template <Format F, int P>
static void many_p(const uint8_t* const* panels, int64_t n_units, const Tile* tiles, int64_t n_tiles, float* y,
                   int64_t stride, Span* span) {
    for (int64_t first = 0; first < n_units; first += kSpanUnits) {
        const int n = int(n_units - first < kSpanUnits ? n_units - first : kSpanUnits);
        unpack_span<F, P>(panels, first, n, span);
        float* to = y;
        for (int64_t i = 0; i < n_tiles; ++i) {
            const Tile tile = tiles[i];
            prefetch_share<F, P>(panels, first + n, n_units, i, n_tiles);
            tile_p<F, P>(span, n, tile, tile.data + first * unit_bytes(tile.tokens), to, stride, first == 0);
            to += tile.tokens * stride;
        }
    }
}

template <Format F>
static void many_f(const uint8_t* const* panels, int n_panels, int64_t n_units, const Tile* tiles, int64_t n_tiles,
                   float* y, int64_t stride, Span* span) {
    if (n_panels == 2) return many_p<F, 2>(panels, n_units, tiles, n_tiles, y, stride, span);
    many_p<F, 1>(panels, n_units, tiles, n_tiles, y, stride, span);
}

static void many(Format f, const uint8_t* const* panels, int n_panels, int64_t n_units, const Tile* tiles,
                 int64_t n_tiles, float* y, int64_t stride, Span* span) {
    switch (f) {
        case Format::q8: return many_f<Format::q8>(panels, n_panels, n_units, tiles, n_tiles, y, stride, span);
        case Format::q4: return many_f<Format::q4>(panels, n_panels, n_units, tiles, n_tiles, y, stride, span);
        case Format::q3: return many_f<Format::q3>(panels, n_panels, n_units, tiles, n_tiles, y, stride, span);
        case Format::q2: return many_f<Format::q2>(panels, n_panels, n_units, tiles, n_tiles, y, stride, span);
        case Format::bf16: return;
    }
}

// ---------------------------------------- activations

static void quantize(const float* x, int64_t n, uint8_t* tile, int T, int t, int64_t first, int64_t n_units) {
    for (int64_t u = 0; u < n_units; ++u) {
        uint8_t* unit = tile + (first + u) * unit_bytes(T);
        alignas(64) float padded[kUnit];
        const float* from = x + u * kUnit;
        const int64_t left = n - u * kUnit;
        if (left < kUnit) {
            for (int i = 0; i < kUnit; ++i) padded[i] = i < left ? from[i] : 0.0f;
            from = padded;
        }
        const float most = Isa::max_abs(from);  // NaN if one is
        // An infinity makes the scale NaN. Numbers so small that the inverse would be infinite count as zeros.
        const float scale = most / 127.0f + (most - most), inverse = most >= 1e-36f ? 127.0f / most : 0.0f;
        int32_t sums[3];
        Isa::round_to_int8(from, inverse, reinterpret_cast<int8_t*>(unit + t * kUnit), sums);
        __builtin_memcpy(unit + T * kUnit + t * 4, &scale, 4);
        sums[0] *= -64;
        sums[1] *= -64;
        sums[2] = sums[0] + sums[1];
        __builtin_memcpy(unit + T * (kUnit + 4) + t * 12, sums, 12);
    }
}

// exp(x) to about 2 ulp: 2^n * polynomial on [-ln2/2, ln2/2] (Cody and Waite's reduction; Taylor to the 7th power).
static INLINE Vec exp_vec(Vec x) {
    x = Isa::max(Isa::min(x, Isa::vec(88.0f)), Isa::vec(-87.0f));
    const Vec n = Isa::round(Isa::mul(x, Isa::vec(1.44269504f)));
    Vec r = Isa::fma(n, Isa::vec(-0.693359375f), x);
    r = Isa::fma(n, Isa::vec(2.12194440e-4f), r);
    Vec p = Isa::vec(1.0f / 5040);
    p = Isa::fma(p, r, Isa::vec(1.0f / 720));
    p = Isa::fma(p, r, Isa::vec(1.0f / 120));
    p = Isa::fma(p, r, Isa::vec(1.0f / 24));
    p = Isa::fma(p, r, Isa::vec(1.0f / 6));
    p = Isa::fma(p, r, Isa::vec(0.5f));
    p = Isa::fma(p, r, Isa::vec(1.0f));
    p = Isa::fma(p, r, Isa::vec(1.0f));
    return Isa::times_power_of_2(p, n);
}

static void silu_mul(const float* a, const float* b, float* h, int64_t n) {
    alignas(64) float in[2][kPanelRows] = {}, out[kPanelRows];
    for (int64_t i = 0; i < n; i += kPanelRows) {
        const bool whole = n - i >= kPanelRows;
        if (!whole) {
            for (int64_t j = 0; j < n - i; ++j) in[0][j] = a[i + j], in[1][j] = b[i + j];
        }
        const Vec x = Isa::load_vec(whole ? a + i : in[0]), y = Isa::load_vec(whole ? b + i : in[1]);
        const Vec gate = Isa::div(x, Isa::add(Isa::vec(1.0f), exp_vec(Isa::sub(Isa::vec(0.0f), x))));
        Isa::store(whole ? h + i : out, Isa::mul(gate, y));
        if (!whole) {
            for (int64_t j = 0; j < n - i; ++j) h[i + j] = out[j];
        }
    }
}

// ---------------------------------------- bfloat16 rows

template <int R, int T>
static INLINE void bf16_t(const uint16_t* w, int64_t cols, const uint16_t* const* x, float* y) {
    Isa::Dot sums[R][T];
    UNROLL(4)
    for (int r = 0; r < R; ++r)
        UNROLL(4)
        for (int t = 0; t < T; ++t) sums[r][t] = Isa::bf16_zero();
    int64_t k = 0;
    for (; k + 32 <= cols; k += 32) {
        Isa::Half v[T];
        UNROLL(4)
        for (int t = 0; t < T; ++t) v[t] = Isa::load_half(x[t] + k);
        UNROLL(4)
        for (int r = 0; r < R; ++r) {
            const Isa::Half row = Isa::load_half(w + r * cols + k);
            __builtin_prefetch(w + r * cols + k + 512);
            UNROLL(4)
            for (int t = 0; t < T; ++t) sums[r][t] = Isa::bf16_dot(sums[r][t], row, v[t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            Isa::Dot s = sums[r][t];
            if (k < cols) {
                uint16_t a[32] = {}, b[32] = {};
                __builtin_memcpy(a, w + r * cols + k, (cols - k) * 2);
                __builtin_memcpy(b, x[t] + k, (cols - k) * 2);
                s = Isa::bf16_dot(s, Isa::load_half(a), Isa::load_half(b));
            }
            y[t * kPanelRows + r] = Isa::bf16_sum(s);
        }
    }
}

template <int R>
static void bf16_r(const uint16_t* w, int64_t cols, const uint16_t* const* x, int64_t tokens, float* y) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) bf16_t<R, 4>(w, cols, x + t, y + t * kPanelRows);
    for (; t < tokens; ++t) bf16_t<R, 1>(w, cols, x + t, y + t * kPanelRows);
}

static void bf16(const uint16_t* w, int rows, int64_t cols, const uint16_t* const* x, int64_t tokens, float* y) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) bf16_r<4>(w + r * cols, cols, x, tokens, y + r);
    for (; r < rows; ++r) bf16_r<1>(w + r * cols, cols, x, tokens, y + r);
}

// ---------------------------------------- around the products

static INLINE Vec load_wide(const float* p) { return Isa::load_vec(p); }
static INLINE Vec load_wide(const uint16_t* p) { return Isa::scales(reinterpret_cast<const uint8_t*>(p), 0xffff); }

// Up to 16 numbers, then zeros.
template <class T>
static INLINE Vec load_some(const T* p, int64_t left) {
    if (left >= kLanes) return load_wide(p);
    alignas(64) T some[kLanes] = {};
    for (int64_t i = 0; i < left; ++i) some[i] = p[i];
    return load_wide(some);
}

template <class T>
static float dot_t(const float* a, const T* b, int64_t n) {
    Vec sums[4];
    UNROLL(4)
    for (int j = 0; j < 4; ++j) sums[j] = Isa::vec(0.0f);
    for (int64_t i = 0; i < n; i += 4 * kLanes) {
        UNROLL(4)
        for (int j = 0; j < 4; ++j) {
            const int64_t at = i + j * kLanes;
            if (at < n) sums[j] = Isa::fma(load_some(a + at, n - at), load_some(b + at, n - at), sums[j]);
        }
    }
    return Isa::total(Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3])));
}

static float dot(const float* a, Numbers b, int64_t n) {
    if (b.dtype == Float::f32) return dot_t(a, static_cast<const float*>(b.data), n);
    return dot_t(a, static_cast<const uint16_t*>(b.data), n);
}

// scores[r * padded(n) + i] = scale * (q[r] . k[slot i])
template <class T, int R>
static void scores_t(const float* q, int64_t dim, const T* k, int64_t stride, const int32_t* slots, int64_t n,
                     float scale, float* scores) {
    const int64_t width = padded(dim);
    for (int64_t i = 0; i < n; ++i) {
        const T* key = k + (slots ? slots[i] : i) * stride;
        Vec sums[R];
        UNROLL(4)
        for (int r = 0; r < R; ++r) sums[r] = Isa::vec(0.0f);
        for (int64_t c = 0; c < dim; c += kLanes) {
            const Vec some = load_some(key + c, dim - c);
            UNROLL(4)
            for (int r = 0; r < R; ++r) sums[r] = Isa::fma(Isa::load_vec(q + r * width + c), some, sums[r]);
        }
        UNROLL(4)
        for (int r = 0; r < R; ++r) scores[r * padded(n) + i] = scale * Isa::total(sums[r]);
    }
}

// scores to exp(scores - their maximum); returns the sum. NaN and infinities make NaN.
static float exponentials(float* scores, int64_t n) {
    alignas(64) float lanes[kLanes];
    for (int64_t i = n; i < padded(n); ++i) scores[i] = scores[0];
    Vec most = Isa::load_vec(scores);
    for (int64_t i = kLanes; i < n; i += kLanes) most = Isa::max(Isa::load_vec(scores + i), most);
    Isa::store(lanes, most);
    float highest = lanes[0];
    for (const float lane : lanes) highest = lane > highest ? lane : highest;
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec below = Isa::sub(Isa::load_vec(scores + i), Isa::vec(highest));
        Isa::store(scores + i, Isa::add(exp_vec(below), Isa::sub(below, below)));
    }
    for (int64_t i = n; i < padded(n); ++i) scores[i] = 0.0f;
    Vec sum = Isa::vec(0.0f);
    for (int64_t i = 0; i < n; i += kLanes) sum = Isa::add(sum, Isa::load_vec(scores + i));
    return Isa::total(sum);
}

// out[r] = sum of scores[r][i] * v[slot i] / sums[r], for columns first..first + 16 J.
template <class T, int R, int J>
static void values_t(const float* scores, const float* sums, const T* v, int64_t stride, const int32_t* slots, int64_t n,
                     int64_t first, int64_t dim, float* out) {
    Vec sum[R][J];
    UNROLL(4)
    for (int r = 0; r < R; ++r)
        UNROLL(4)
        for (int j = 0; j < J; ++j) sum[r][j] = Isa::vec(0.0f);
    for (int64_t i = 0; i < n; ++i) {
        const T* row = v + (slots ? slots[i] : i) * stride + first;
        Vec some[J];
        UNROLL(4)
        for (int j = 0; j < J; ++j) some[j] = load_some(row + j * kLanes, dim - first - j * kLanes);
        UNROLL(4)
        for (int r = 0; r < R; ++r) {
            const Vec weight = Isa::vec(scores[r * padded(n) + i]);
            UNROLL(4)
            for (int j = 0; j < J; ++j) sum[r][j] = Isa::fma(weight, some[j], sum[r][j]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < J; ++j) {
            Isa::store(out + r * padded(dim) + first + j * kLanes, Isa::div(sum[r][j], Isa::vec(sums[r])));
        }
    }
}

template <class T, int R>
static void attend_t(const float* q, int64_t dim, const T* k, const T* v, int64_t stride, const int32_t* slots,
                     int64_t n, float* scores, float* out) {
    float sums[R];
    scores_t<T, R>(q, dim, k, stride, slots, n, 1.0f / __builtin_sqrtf(float(dim)), scores);
    for (int r = 0; r < R; ++r) sums[r] = exponentials(scores + r * padded(n), n);
    int64_t c = 0;
    for (; c + 4 * kLanes <= dim; c += 4 * kLanes) values_t<T, R, 4>(scores, sums, v, stride, slots, n, c, dim, out);
    for (; c < dim; c += kLanes) values_t<T, R, 1>(scores, sums, v, stride, slots, n, c, dim, out);
}

template <class T>
static void attend_all(const float* q, int queries, int64_t dim, const T* k, const T* v, int64_t stride,
                       const int32_t* slots, int64_t n, float* scores, float* out) {
    const int64_t width = padded(dim);
    int r = 0;
    for (; r + 4 <= queries; r += 4) attend_t<T, 4>(q + r * width, dim, k, v, stride, slots, n, scores, out + r * width);
    for (; r < queries; ++r) attend_t<T, 1>(q + r * width, dim, k, v, stride, slots, n, scores, out + r * width);
}

static void attend(const float* q, int queries, int64_t dim, Numbers k, Numbers v, int64_t stride, const int32_t* slots,
                   int64_t n, float* scores, float* out) {
    if (k.dtype == Float::f32) {
        const auto *keys = static_cast<const float*>(k.data), *values = static_cast<const float*>(v.data);
        return attend_all(q, queries, dim, keys, values, stride, slots, n, scores, out);
    }
    const auto *keys = static_cast<const uint16_t*>(k.data), *values = static_cast<const uint16_t*>(v.data);
    attend_all(q, queries, dim, keys, values, stride, slots, n, scores, out);
}

// ---------------------------------------- the machine's limits

static uint64_t read_all(const uint8_t* data, int64_t nbytes) {
    static constexpr uint8_t kZeros[64] = {};
    Lot x[4];
    for (auto& v : x) v = Isa::load(kZeros);  // there may be fewer bytes than a lot
    int64_t i = 0;
    for (; i + 256 <= nbytes; i += 256) {
        UNROLL(4)
        for (int j = 0; j < 4; ++j) {
            x[j] = Isa::exclusive_or(x[j], Isa::load(data + i + 64 * j));
        }
    }
    uint8_t bytes[64];
    uint64_t sum = 0;
    for (const auto& v : x) {
        Isa::store_lot(bytes, v);
        for (const uint8_t b : bytes) sum = sum * 31 + b;
    }
    return sum;
}

static uint64_t dot_peak(int64_t rounds, int32_t* sink) {
    constexpr int kChains = Isa::kPeakChains;
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i + sink[0]);
    const Lot w = Isa::load(bytes);
    auto x = Isa::broadcast(bytes);
    Sum sums[kChains];
    UNROLL(16)
    for (int i = 0; i < kChains; ++i) sums[i] = Isa::sum(i);
    for (int64_t round = 0; round < rounds; ++round) {
        __asm__ volatile("" : "+m"(bytes));
        UNROLL(16)
        for (int i = 0; i < kChains; ++i) sums[i] = Isa::template dot<Format::q4>(sums[i], w, x);
    }
    UNROLL(16)
    for (int i = 1; i < kChains; ++i) sums[0] = Isa::add(sums[0], sums[i]);
    int32_t lanes[16];
    Isa::store_sum(lanes, sums[0]);
    for (const int32_t lane : lanes) sink[0] ^= lane;
    return uint64_t(rounds) * kChains * kPanelRows * 4 * 2;
}

static constexpr Kernels kTable = {
    Isa::kName, quantize, direct, many, bf16, silu_mul, dot, attend, read_all, dot_peak,
};
