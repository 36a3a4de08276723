#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL(n) _Pragma(OCTAVO_STRING(GCC unroll n))

#include <immintrin.h>

namespace octavo::avx2 {
#include "isa_avx2.h"
#include "kernels.inl"
}  // namespace octavo::avx2

const octavo::Kernels* octavo::avx2_kernels() { return &avx2::kTable; }
#else
const octavo::Kernels* octavo::avx2_kernels() { return nullptr; }
#endif
