#include "kernels.h"

#define INLINE inline
#define INLINE_LAMBDA
#define UNROLL(n)

#include <math.h>

namespace octavo::generic {
#include "isa_generic.h"
#include "kernels.inl"
}  // namespace octavo::generic

const octavo::Kernels* octavo::generic_kernels() { return &generic::kTable; }
