// AVX-512 with VNNI; with VBMI and bfloat16 dot products too where the unit is compiled for them.

struct Isa {
#ifdef __AVX512VBMI__
    static constexpr const char* kName = "avx512-vbmi";
#else
    static constexpr const char* kName = "avx512-vnni";
#endif
    static constexpr int kPeakChains = 12;

#ifdef __AVX512VBMI__
    static constexpr bool kWideLookup = true;
#else
    static constexpr bool kWideLookup = false;
#endif

    using Lot = __m512i;
    using Sum = __m512i;
    using Vec = __m512;

    // The instruction takes unsigned codes: 128 is added at 8 bits by the format, 64 to every book here.
    static constexpr int offset(Format f) { return f == Format::q8 ? 128 : 64; }

    static INLINE Lot load(const uint8_t* p) {
        Lot v = _mm512_loadu_si512(p);
        __asm__("" : "+v"(v));  // load once: every use would else come from memory, and loads are what is scarce
        return v;
    }
    static INLINE Lot load_codes8(const uint8_t* p) { return load(p); }
    static INLINE void store_lot(uint8_t* p, Lot v) { _mm512_storeu_si512(p, v); }
    static INLINE Lot exclusive_or(Lot a, Lot b) { return _mm512_xor_si512(a, b); }
    template <int n>
    static INLINE Lot shr(Lot v) { return _mm512_srli_epi16(v, n); }
    template <int n>
    static INLINE Lot shl(Lot v) { return _mm512_slli_epi16(v, n); }
    static INLINE Lot merge(Lot a, Lot b, int mask) {
        return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(char(mask)), 0xe4);
    }
    static INLINE Lot book(const int8_t* values) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm512_broadcast_i32x4(_mm_add_epi8(v, _mm_set1_epi8(64)));
    }
    static INLINE Lot lookup(Lot book, Lot index) {
#ifdef __AVX512VBMI__
        return _mm512_permutexvar_epi8(index, book);  // of 64 entries, four times the same 16
#else
        return _mm512_shuffle_epi8(book, _mm512_and_si512(index, _mm512_set1_epi8(0x0f)));
#endif
    }
    static INLINE Lot wide_book(const int8_t* values) {
        return _mm512_add_epi8(_mm512_loadu_si512(values), _mm512_set1_epi8(64));
    }
#ifdef __AVX512VBMI__
    // Bytes of 16 scales to 16 rows of four: one shuffle, because those are scarce.
    static INLINE __m512i spread(const uint8_t* scales, __mmask64 kept, uint64_t byte0_3) {
        const __m512i rows = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i places = _mm512_add_epi8(_mm512_shuffle_epi8(rows, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)),
                                               _mm512_set1_epi32(int(byte0_3)));
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
        return _mm512_maskz_permutexvar_epi8(kept, places, _mm512_castsi256_si512(v));
    }
    static INLINE Lot low_bytes(const uint8_t* scales) { return spread(scales, ~0ull, 0); }
    static INLINE Vec scales(const uint8_t* p, uint16_t mask) {
        __m512i v = spread(p, 0xccccccccccccccccull, 0x01000000);  // to the upper half
        if (mask != 0xffff) v = _mm512_and_si512(v, _mm512_set1_epi32(int(uint32_t(mask) << 16)));
        return _mm512_castsi512_ps(v);
    }
#else
    static INLINE __m512i halves(const uint8_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // The low byte of each row's scale, in the row's four bytes.
    static INLINE Lot low_bytes(const uint8_t* scales) {
        const __m512i four = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0x00000000);
        return _mm512_shuffle_epi8(halves(scales), four);
    }
    static INLINE Vec scales(const uint8_t* p, uint16_t mask) {
        __m512i v = halves(p);
        if (mask != 0xffff) v = _mm512_and_si512(v, _mm512_set1_epi32(mask));
        return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    }
#endif

    static INLINE Sum sum(int32_t v) { return _mm512_set1_epi32(v); }
    static INLINE Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static INLINE void store_sum(int32_t* p, Sum v) { _mm512_storeu_si512(p, v); }
    static INLINE __m512i broadcast(const uint8_t* p) {
        int32_t v;
        __builtin_memcpy(&v, p, 4);
        return _mm512_set1_epi32(v);
    }
    template <Format F>
    static INLINE Sum dot(Sum s, Lot w, __m512i four) { return _mm512_dpbusd_epi32(s, w, four); }
    // Four activations that are used once come straight from memory; the compiler would load them to a register.
    template <Format F>
    static INLINE Sum dot(Sum s, Lot w, const uint8_t* x) {
        struct Four {
            uint8_t v[4];
        };
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(s) : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
        return s;
    }

    static INLINE Vec vec(float v) { return _mm512_set1_ps(v); }
    static INLINE Vec load_vec(const float* p) { return _mm512_loadu_ps(p); }
    static INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
    static INLINE Vec to_float(Sum s) { return _mm512_cvtepi32_ps(s); }
    static INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where one is NaN
    static INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static INLINE float total(Vec v) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static INLINE Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static INLINE Vec times_power_of_2(Vec v, Vec n) {
        return _mm512_castsi512_ps(
            _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
    }

    static INLINE float max_abs(const float* p) {
        __m512i most = _mm512_setzero_si512();
        for (int i = 0; i < 4; ++i) {
            const __m512i bits = _mm512_loadu_si512(p + 16 * i);
            most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
        }
        const uint32_t bits = _mm512_reduce_max_epu32(most);
        float out;
        __builtin_memcpy(&out, &bits, 4);
        return out;
    }
    static INLINE void round_to_int8(const float* p, float inverse, int8_t* q, int32_t* sums) {
        for (int half = 0; half < 2; ++half) {
            __m512i sum = _mm512_setzero_si512();
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + 16 * i), _mm512_set1_ps(inverse)));
                v = _mm512_max_epi32(_mm512_min_epi32(v, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_cvtepi32_epi8(v));
                sum = _mm512_add_epi32(sum, v);
            }
            sums[half] = _mm512_reduce_add_epi32(sum);
        }
    }

    using Half = __m512i;
    using Dot = __m512;
    static INLINE Half load_half(const uint16_t* p) { return _mm512_loadu_si512(p); }
    static INLINE Dot bf16_zero() { return _mm512_setzero_ps(); }
    static INLINE float bf16_sum(Dot s) { return _mm512_reduce_add_ps(s); }
    static INLINE Dot bf16_dot(Dot s, Half a, Half b) {
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
#else
        const __m512i high = _mm512_set1_epi32(int(0xffff0000));
        s = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), s);
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                               _mm512_castsi512_ps(_mm512_and_si512(b, high)), s);
#endif
    }
};
