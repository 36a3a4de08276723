// AVX2 with FMA: 64 bytes, or 16 numbers, are two registers.

struct Isa {
    static constexpr const char* kName = "avx2";
    static constexpr bool kWideLookup = false;
    static constexpr int kPeakChains = 6;

    struct Lot {
        __m256i a, b;
    };
    struct Sum {
        __m256i a, b;
    };
    struct Vec {
        __m256 a, b;
    };

    // Sums of two products are 16 bits wide on the way: books are offset by 64, 8-bit codes made signed instead.
    static constexpr int offset(Format f) { return f == Format::q8 ? 0 : 64; }

    static INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static INLINE void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    static INLINE Lot load(const uint8_t* p) { return {load32(p), load32(p + 32)}; }
    static INLINE Lot exclusive_or(Lot v, Lot w) { return {_mm256_xor_si256(v.a, w.a), _mm256_xor_si256(v.b, w.b)}; }
    static INLINE Lot load_codes8(const uint8_t* p) {
        const __m256i sign = _mm256_set1_epi8(char(0x80));
        return exclusive_or(load(p), {sign, sign});
    }
    static INLINE void store_lot(uint8_t* p, Lot v) { store32(p, v.a), store32(p + 32, v.b); }
    template <int n>
    static INLINE Lot shr(Lot v) { return {_mm256_srli_epi16(v.a, n), _mm256_srli_epi16(v.b, n)}; }
    template <int n>
    static INLINE Lot shl(Lot v) { return {_mm256_slli_epi16(v.a, n), _mm256_slli_epi16(v.b, n)}; }
    static INLINE Lot merge(Lot v, Lot w, int mask) {
        const __m256i m = _mm256_set1_epi8(char(mask));
        return {_mm256_or_si256(_mm256_and_si256(m, v.a), _mm256_andnot_si256(m, w.a)),
                _mm256_or_si256(_mm256_and_si256(m, v.b), _mm256_andnot_si256(m, w.b))};
    }
    static INLINE Lot book(const int8_t* values) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const __m256i both = _mm256_broadcastsi128_si256(_mm_add_epi8(v, _mm_set1_epi8(64)));
        return {both, both};
    }
    static INLINE Lot wide_book(const int8_t* values) { return book(values); }
    static INLINE Lot lookup(Lot book, Lot index) {
        const __m256i m = _mm256_set1_epi8(0x0f);
        return {_mm256_shuffle_epi8(book.a, _mm256_and_si256(index.a, m)),
                _mm256_shuffle_epi8(book.b, _mm256_and_si256(index.b, m))};
    }
    static INLINE __m256i halves(const uint8_t* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static INLINE Lot low_bytes(const uint8_t* scales) {
        const __m256i spread = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808,
                                                 0x0c0c0c0c);
        return {_mm256_shuffle_epi8(halves(scales), spread), _mm256_shuffle_epi8(halves(scales + 16), spread)};
    }
    static INLINE Vec scales(const uint8_t* p, uint16_t mask) {
        const __m256i m = _mm256_set1_epi32(mask);
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(halves(p), m), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(halves(p + 16), m), 16))};
    }

    static INLINE Sum sum(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
    static INLINE Sum add(Sum v, Sum w) { return {_mm256_add_epi32(v.a, w.a), _mm256_add_epi32(v.b, w.b)}; }
    static INLINE void store_sum(int32_t* p, Sum v) { store32(p, v.a), store32(p + 8, v.b); }
    static INLINE __m256i broadcast(const uint8_t* p) {
        int32_t v;
        __builtin_memcpy(&v, p, 4);
        return _mm256_set1_epi32(v);
    }
    template <Format F>
    static INLINE __m256i dot8(__m256i s, __m256i w, __m256i x) {
        const __m256i pairs = F == Format::q8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                                              : _mm256_maddubs_epi16(w, x);
        return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    template <Format F>
    static INLINE Sum dot(Sum s, Lot w, __m256i four) { return {dot8<F>(s.a, w.a, four), dot8<F>(s.b, w.b, four)}; }
    template <Format F>
    static INLINE Sum dot(Sum s, Lot w, const uint8_t* x) { return dot<F>(s, w, broadcast(x)); }

    static INLINE Vec vec(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static INLINE Vec load_vec(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
    static INLINE Vec to_float(Sum s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }
    static INLINE Vec add(Vec v, Vec w) { return {_mm256_add_ps(v.a, w.a), _mm256_add_ps(v.b, w.b)}; }
    static INLINE Vec sub(Vec v, Vec w) { return {_mm256_sub_ps(v.a, w.a), _mm256_sub_ps(v.b, w.b)}; }
    static INLINE Vec mul(Vec v, Vec w) { return {_mm256_mul_ps(v.a, w.a), _mm256_mul_ps(v.b, w.b)}; }
    static INLINE Vec div(Vec v, Vec w) { return {_mm256_div_ps(v.a, w.a), _mm256_div_ps(v.b, w.b)}; }
    static INLINE Vec fma(Vec v, Vec w, Vec c) { return {_mm256_fmadd_ps(v.a, w.a, c.a), _mm256_fmadd_ps(v.b, w.b, c.b)}; }
    static INLINE Vec min(Vec v, Vec w) { return {_mm256_min_ps(v.a, w.a), _mm256_min_ps(v.b, w.b)}; }
    static INLINE Vec max(Vec v, Vec w) { return {_mm256_max_ps(v.a, w.a), _mm256_max_ps(v.b, w.b)}; }
    static INLINE float total(Vec v) {
        const __m256 eight = _mm256_add_ps(v.a, v.b);
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static INLINE Vec round(Vec v) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(v.a, kNearest), _mm256_round_ps(v.b, kNearest)};
    }
    static INLINE __m256 shifted(__m256 v, __m256 n) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
    }
    static INLINE Vec times_power_of_2(Vec v, Vec n) { return {shifted(v.a, n.a), shifted(v.b, n.b)}; }

    static INLINE float max_abs(const float* p) {
        __m256i most = _mm256_setzero_si256();
        for (int i = 0; i < 8; ++i) {
            most = _mm256_max_epu32(most, _mm256_and_si256(load32(p + 8 * i), _mm256_set1_epi32(0x7fffffff)));
        }
        uint32_t lanes[8], bits = 0;
        store32(lanes, most);
        for (const uint32_t lane : lanes) bits = lane > bits ? lane : bits;
        float out;
        __builtin_memcpy(&out, &bits, 4);
        return out;
    }
    static INLINE void round_to_int8(const float* p, float inverse, int8_t* q, int32_t* sums) {
        for (int half = 0; half < 2; ++half) {
            int32_t lanes[32];
            for (int i = 0; i < 4; ++i) {
                const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(p + 32 * half + 8 * i), _mm256_set1_ps(inverse));
                __m256i v = _mm256_cvtps_epi32(scaled);
                v = _mm256_max_epi32(_mm256_min_epi32(v, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
                store32(lanes + 8 * i, v);
            }
            sums[half] = 0;
            for (int i = 0; i < 32; ++i) {
                q[32 * half + i] = int8_t(lanes[i]);
                sums[half] += lanes[i];
            }
        }
    }

    using Half = Lot;
    using Dot = Vec;
    static INLINE Half load_half(const uint16_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
    static INLINE Dot bf16_zero() { return vec(0.0f); }
    static INLINE float bf16_sum(Dot s) {
        float lanes[16], out = 0;
        store(lanes, s);
        for (int i = 0; i < 8; ++i) out += lanes[i] + lanes[i + 8];
        return out;
    }
    static INLINE __m256 bf16_dot8(__m256 s, __m256i v, __m256i w) {
        const __m256i high = _mm256_set1_epi32(int(0xffff0000));
        s = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
                            _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), s);
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(v, high)),
                               _mm256_castsi256_ps(_mm256_and_si256(w, high)), s);
    }
    static INLINE Dot bf16_dot(Dot s, Half v, Half w) { return {bf16_dot8(s.a, v.a, w.a), bf16_dot8(s.b, v.b, w.b)}; }
};
