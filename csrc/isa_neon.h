// NEON with the dot product extension (ARMv8.2): 64 bytes, or 16 numbers, are four registers.

struct Isa {
    static constexpr const char* kName = "neon-dotprod";
    static constexpr bool kWideLookup = false;
    static constexpr int kPeakChains = 6;

    struct Lot {
        uint8x16_t v[4];
    };
    struct Sum {
        int32x4_t v[4];
    };
    struct Vec {
        float32x4_t v[4];
    };

    static constexpr int offset(Format) { return 0; }  // the instruction takes signed codes

    static INLINE Lot load(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
    template <class Fn>
    static INLINE Lot each(Lot v, Fn fn) {
        for (auto& r : v.v) r = fn(r);
        return v;
    }
    static INLINE Lot load_codes8(const uint8_t* p) {
        return each(load(p), [](uint8x16_t r) { return veorq_u8(r, vdupq_n_u8(0x80)); });
    }
    static INLINE void store_lot(uint8_t* p, const Lot& v) {
        for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, v.v[i]);
    }
    static INLINE Lot exclusive_or(Lot a, const Lot& b) {
        for (int i = 0; i < 4; ++i) a.v[i] = veorq_u8(a.v[i], b.v[i]);
        return a;
    }
    template <int n>
    static INLINE Lot shr(Lot v) { return each(v, [](uint8x16_t r) { return vshrq_n_u8(r, n); }); }
    template <int n>
    static INLINE Lot shl(Lot v) { return each(v, [](uint8x16_t r) { return vshlq_n_u8(r, n); }); }
    static INLINE Lot merge(Lot a, const Lot& b, int mask) {
        const uint8x16_t m = vdupq_n_u8(uint8_t(mask));
        for (int i = 0; i < 4; ++i) a.v[i] = vbslq_u8(m, a.v[i], b.v[i]);
        return a;
    }
    static INLINE Lot book(const int8_t* values) {
        const uint8x16_t v = vreinterpretq_u8_s8(vld1q_s8(values));
        return {{v, v, v, v}};
    }
    static INLINE Lot wide_book(const int8_t* values) { return book(values); }
    static INLINE Lot lookup(const Lot& book, Lot index) {  // unlike x86's, a table of 16 gives 0 beyond it
        const uint8x16_t table = book.v[0], m = vdupq_n_u8(15);
        return each(index, [=](uint8x16_t r) { return vqtbl1q_u8(table, vandq_u8(r, m)); });
    }
    static INLINE uint32x4_t halves(const uint8_t* p) { return vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))); }
    static INLINE Lot low_bytes(const uint8_t* scales) {
        const uint8x16_t spread = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
        Lot out;
        for (int i = 0; i < 4; ++i) out.v[i] = vqtbl1q_u8(vreinterpretq_u8_u32(halves(scales + 8 * i)), spread);
        return out;
    }
    static INLINE Vec scales(const uint8_t* p, uint16_t mask) {
        const uint32x4_t m = vdupq_n_u32(mask);
        Vec out;
        for (int i = 0; i < 4; ++i) {
            out.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(vandq_u32(halves(p + 8 * i), m), 16));
        }
        return out;
    }

    static INLINE Sum sum(int32_t v) { return {{vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}}; }
    static INLINE Sum add(Sum a, const Sum& b) {
        for (int i = 0; i < 4; ++i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
        return a;
    }
    static INLINE void store_sum(int32_t* p, const Sum& s) {
        for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, s.v[i]);
    }
    static INLINE int8x16_t broadcast(const uint8_t* p) {
        int32_t v;
        __builtin_memcpy(&v, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(v));
    }
    template <Format F>
    static INLINE Sum dot(Sum s, const Lot& w, int8x16_t four) {
        for (int i = 0; i < 4; ++i) s.v[i] = vdotq_s32(s.v[i], vreinterpretq_s8_u8(w.v[i]), four);
        return s;
    }
    template <Format F>
    static INLINE Sum dot(Sum s, const Lot& w, const uint8_t* x) { return dot<F>(s, w, broadcast(x)); }

    template <class Fn>
    static INLINE Vec zip(Vec a, const Vec& b, Fn fn) {
        for (int i = 0; i < 4; ++i) a.v[i] = fn(a.v[i], b.v[i]);
        return a;
    }
    static INLINE Vec vec(float f) { return {{vdupq_n_f32(f), vdupq_n_f32(f), vdupq_n_f32(f), vdupq_n_f32(f)}}; }
    static INLINE Vec load_vec(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
    static INLINE void store(float* p, const Vec& v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.v[i]);
    }
    static INLINE Vec to_float(const Sum& s) {
        Vec out;
        for (int i = 0; i < 4; ++i) out.v[i] = vcvtq_f32_s32(s.v[i]);
        return out;
    }
    static INLINE Vec add(Vec a, const Vec& b) { return zip(a, b, [](auto x, auto y) { return vaddq_f32(x, y); }); }
    static INLINE Vec sub(Vec a, const Vec& b) { return zip(a, b, [](auto x, auto y) { return vsubq_f32(x, y); }); }
    static INLINE Vec mul(Vec a, const Vec& b) { return zip(a, b, [](auto x, auto y) { return vmulq_f32(x, y); }); }
    static INLINE Vec div(Vec a, const Vec& b) { return zip(a, b, [](auto x, auto y) { return vdivq_f32(x, y); }); }
    // As on x86, the second where one is NaN.
    static INLINE Vec min(Vec a, const Vec& b) {
        return zip(a, b, [](auto x, auto y) { return vbslq_f32(vcltq_f32(x, y), x, y); });
    }
    static INLINE Vec max(Vec a, const Vec& b) {
        return zip(a, b, [](auto x, auto y) { return vbslq_f32(vcgtq_f32(x, y), x, y); });
    }
    static INLINE float total(const Vec& v) {
        const float32x4_t four = vaddq_f32(vaddq_f32(v.v[0], v.v[2]), vaddq_f32(v.v[1], v.v[3]));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static INLINE Vec fma(const Vec& a, const Vec& b, Vec c) {
        for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
        return c;
    }
    static INLINE Vec round(Vec v) {
        for (auto& r : v.v) r = vrndnq_f32(r);
        return v;
    }
    static INLINE Vec times_power_of_2(Vec v, const Vec& n) {
        return zip(v, n, [](auto x, auto y) {
            const int32x4_t shift = vshlq_n_s32(vcvtq_s32_f32(y), 23);
            return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), shift));
        });
    }

    static INLINE float max_abs(const float* p) {
        uint32x4_t most = vdupq_n_u32(0);
        for (int i = 0; i < 16; ++i) {
            const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(p + 4 * i));
            most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
        }
        const uint32_t bits = vmaxvq_u32(most);
        float out;
        __builtin_memcpy(&out, &bits, 4);
        return out;
    }
    static INLINE void round_to_int8(const float* p, float inverse, int8_t* q, int32_t* sums) {
        for (int half = 0; half < 2; ++half) {
            sums[half] = 0;
            for (int i = 8 * half; i < 8 * half + 8; ++i) {
                int32x4_t v = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + 4 * i), inverse));
                v = vmaxq_s32(vminq_s32(v, vdupq_n_s32(127)), vdupq_n_s32(-127));
                int32_t lanes[4];
                vst1q_s32(lanes, v);
                for (int j = 0; j < 4; ++j) q[4 * i + j] = int8_t(lanes[j]);
                sums[half] += vaddvq_s32(v);
            }
        }
    }

    struct Half {
        uint16x8_t v[4];
    };
    using Dot = Vec;
    static INLINE Half load_half(const uint16_t* p) {
        return {{vld1q_u16(p), vld1q_u16(p + 8), vld1q_u16(p + 16), vld1q_u16(p + 24)}};
    }
    static INLINE Dot bf16_zero() { return vec(0.0f); }
    static INLINE float32x4_t even(uint16x8_t v) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(v), 16)); }
    static INLINE float32x4_t odd(uint16x8_t v) {
        return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(v), vdupq_n_u32(0xffff0000)));
    }
    static INLINE Dot bf16_dot(Dot s, const Half& a, const Half& b) {
        for (int i = 0; i < 4; ++i) {
            s.v[i] = vfmaq_f32(s.v[i], even(a.v[i]), even(b.v[i]));
            s.v[i] = vfmaq_f32(s.v[i], odd(a.v[i]), odd(b.v[i]));
        }
        return s;
    }
    static INLINE float bf16_sum(const Dot& s) {
        return vaddvq_f32(vaddq_f32(vaddq_f32(s.v[0], s.v[1]), vaddq_f32(s.v[2], s.v[3])));
    }
};
