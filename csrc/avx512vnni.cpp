#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL(n) _Pragma(OCTAVO_STRING(GCC unroll n))

#include <immintrin.h>

namespace octavo::avx512vnni {
#include "isa_avx512.h"
#include "kernels.inl"
}  // namespace octavo::avx512vnni

const octavo::Kernels* octavo::avx512vnni_kernels() { return &avx512vnni::kTable; }
#else
const octavo::Kernels* octavo::avx512vnni_kernels() { return nullptr; }
#endif
