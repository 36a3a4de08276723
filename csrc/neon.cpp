#include "kernels.h"

#if defined(__ARM_FEATURE_DOTPROD)
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL(n) _Pragma(OCTAVO_STRING(GCC unroll n))

#include <arm_neon.h>

namespace octavo::neon {
#include "isa_neon.h"
#include "kernels.inl"
}  // namespace octavo::neon

const octavo::Kernels* octavo::neon_kernels() { return &neon::kTable; }
#else
const octavo::Kernels* octavo::neon_kernels() { return nullptr; }
#endif
