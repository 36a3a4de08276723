// Plain C++, for every other machine, and the obvious version of what the others do.

struct Isa {
    static constexpr const char* kName = "generic";
    static constexpr bool kWideLookup = false;
    static constexpr int kPeakChains = 4;

    struct Lot {
        uint8_t v[64];
    };
    struct Sum {
        int32_t v[16];
    };
    struct Vec {
        float v[16];
    };

    static constexpr int offset(Format) { return 0; }  // codes are kept as signed bytes

    static INLINE Lot load(const uint8_t* p) {
        Lot out;
        __builtin_memcpy(out.v, p, 64);
        return out;
    }
    static INLINE Lot load_codes8(const uint8_t* p) { return each(load(p), [](uint8_t b) { return b ^ 0x80; }); }
    static INLINE void store_lot(uint8_t* p, Lot v) { __builtin_memcpy(p, v.v, 64); }
    template <class Fn>
    static INLINE Lot each(Lot v, Fn fn) {
        for (uint8_t& b : v.v) b = uint8_t(fn(b));
        return v;
    }
    static INLINE Lot exclusive_or(Lot a, Lot b) {
        for (int i = 0; i < 64; ++i) a.v[i] ^= b.v[i];
        return a;
    }
    template <int n>
    static INLINE Lot shr(Lot v) { return each(v, [](uint8_t b) { return b >> n; }); }
    template <int n>
    static INLINE Lot shl(Lot v) { return each(v, [](uint8_t b) { return b << n; }); }
    static INLINE Lot merge(Lot a, Lot b, int mask) {
        for (int i = 0; i < 64; ++i) a.v[i] = uint8_t((a.v[i] & mask) | (b.v[i] & ~mask));
        return a;
    }
    static INLINE Lot book(const int8_t* values) {
        Lot out{};
        __builtin_memcpy(out.v, values, 16);
        return out;
    }
    static INLINE Lot wide_book(const int8_t* values) { return book(values); }
    static INLINE Lot lookup(const Lot& book, Lot index) {
        return each(index, [&](uint8_t i) { return book.v[i & 15]; });
    }
    static INLINE uint16_t half(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }
    static INLINE Lot low_bytes(const uint8_t* scales) {
        Lot out;
        for (int i = 0; i < 64; ++i) out.v[i] = scales[i / 4 * 2];
        return out;
    }
    static INLINE float wide(uint16_t bits16) {
        const uint32_t bits = uint32_t(bits16) << 16;
        float out;
        __builtin_memcpy(&out, &bits, 4);
        return out;
    }
    static INLINE Vec scales(const uint8_t* p, uint16_t mask) {
        Vec out;
        for (int i = 0; i < 16; ++i) out.v[i] = wide(half(p + 2 * i) & mask);
        return out;
    }

    static INLINE Sum sum(int32_t v) {
        Sum out;
        for (int32_t& s : out.v) s = v;
        return out;
    }
    static INLINE Sum add(Sum a, Sum b) {
        for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
        return a;
    }
    static INLINE void store_sum(int32_t* p, Sum v) { __builtin_memcpy(p, v.v, 64); }
    static INLINE const uint8_t* broadcast(const uint8_t* p) { return p; }
    template <Format F>
    static INLINE Sum dot(Sum s, const Lot& w, const uint8_t* x) {
        for (int r = 0; r < 16; ++r) {
            for (int k = 0; k < 4; ++k) s.v[r] += int32_t(int8_t(w.v[4 * r + k])) * int8_t(x[k]);
        }
        return s;
    }

    template <class Fn>
    static INLINE Vec zip(Vec a, const Vec& b, Fn fn) {
        for (int i = 0; i < 16; ++i) a.v[i] = fn(a.v[i], b.v[i]);
        return a;
    }
    static INLINE Vec vec(float v) {
        Vec out;
        for (float& f : out.v) f = v;
        return out;
    }
    static INLINE Vec load_vec(const float* p) {
        Vec out;
        __builtin_memcpy(out.v, p, 64);
        return out;
    }
    static INLINE void store(float* p, Vec v) { __builtin_memcpy(p, v.v, 64); }
    static INLINE Vec to_float(Sum s) {
        Vec out;
        for (int i = 0; i < 16; ++i) out.v[i] = float(s.v[i]);
        return out;
    }
    static INLINE Vec add(Vec a, Vec b) { return zip(a, b, [](float x, float y) { return x + y; }); }
    static INLINE Vec sub(Vec a, Vec b) { return zip(a, b, [](float x, float y) { return x - y; }); }
    static INLINE Vec mul(Vec a, Vec b) { return zip(a, b, [](float x, float y) { return x * y; }); }
    static INLINE Vec div(Vec a, Vec b) { return zip(a, b, [](float x, float y) { return x / y; }); }
    static INLINE Vec min(Vec a, Vec b) { return zip(a, b, [](float x, float y) { return x < y ? x : y; }); }
    static INLINE Vec max(Vec a, Vec b) { return zip(a, b, [](float x, float y) { return x > y ? x : y; }); }
    static INLINE float total(Vec v) {  // in this order everywhere
        for (int n = 8; n; n /= 2) {
            for (int i = 0; i < n; ++i) v.v[i] += v.v[i + n];
        }
        return v.v[0];
    }
    static INLINE Vec fma(Vec a, const Vec& b, const Vec& c) {
        for (int i = 0; i < 16; ++i) a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
        return a;
    }
    static INLINE Vec round(Vec v) {
        for (float& f : v.v) f = rintf(f);
        return v;
    }
    static INLINE Vec times_power_of_2(Vec v, const Vec& n) {
        for (int i = 0; i < 16; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, &v.v[i], 4);
            bits += uint32_t(int32_t(n.v[i])) << 23;
            __builtin_memcpy(&v.v[i], &bits, 4);
        }
        return v;
    }

    static INLINE float max_abs(const float* p) {
        uint32_t most = 0;
        for (int i = 0; i < kUnit; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, p + i, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float out;
        __builtin_memcpy(&out, &most, 4);
        return out;
    }
    static INLINE void round_to_int8(const float* p, float inverse, int8_t* q, int32_t* sums) {
        for (int half = 0; half < 2; ++half) {
            sums[half] = 0;
            for (int i = 32 * half; i < 32 * half + 32; ++i) {
                const float scaled = rintf(p[i] * inverse);
                const int v = scaled > 127.0f ? 127 : scaled > -127.0f ? int(scaled) : -127;  // NaN: -127
                q[i] = int8_t(v);
                sums[half] += v;
            }
        }
    }

    struct Half {
        float v[32];
    };
    struct Dot {
        float v[16];
    };
    static INLINE Half load_half(const uint16_t* p) {
        Half out;
        for (int i = 0; i < 32; ++i) out.v[i] = wide(p[i]);
        return out;
    }
    static INLINE Dot bf16_zero() { return {}; }
    static INLINE Dot bf16_dot(Dot s, const Half& a, const Half& b) {
        for (int i = 0; i < 16; ++i) s.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
        return s;
    }
    static INLINE float bf16_sum(const Dot& s) {
        float out = 0;
        for (const float f : s.v) out += f;
        return out;
    }
};
