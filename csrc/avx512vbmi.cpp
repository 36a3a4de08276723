#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL(n) _Pragma(OCTAVO_STRING(GCC unroll n))

#include <immintrin.h>

namespace octavo::avx512vbmi {
#include "isa_avx512.h"
#include "kernels.inl"
}  // namespace octavo::avx512vbmi

const octavo::Kernels* octavo::avx512vbmi_kernels() { return &avx512vbmi::kTable; }
#else
const octavo::Kernels* octavo::avx512vbmi_kernels() { return nullptr; }
#endif
