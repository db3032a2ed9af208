// Includes USERIP_TEXT, an op's inner loops, once per instruction set: namespaces avx2, avx512vl
// and avx512. No include guard.
USERIP_ISA_BEGIN(USERIP_AVX2_FEATURES)
#define USERIP_WIDE 0
#define USERIP_REGISTERS 16
namespace avx2 {
#include "cpu/vec_avx2.h"
//
#include "cpu/vec_isa.h"
#include USERIP_TEXT
}  // namespace avx2
USERIP_ISA_END
#undef USERIP_REGISTERS
#define USERIP_REGISTERS 32
USERIP_ISA_BEGIN(USERIP_AVX512_FEATURES)
namespace avx512vl {
#include "cpu/vec_avx2.h"
//
#include "cpu/vec_isa.h"
#include USERIP_TEXT
}  // namespace avx512vl
#undef USERIP_WIDE
#define USERIP_WIDE 1
namespace avx512 {
#include "cpu/vec_avx512.h"
//
#include "cpu/vec_isa.h"
#include USERIP_TEXT
}  // namespace avx512
USERIP_ISA_END
#undef USERIP_TEXT
#undef USERIP_WIDE
#undef USERIP_REGISTERS
// Of what the op has by one name in each of them, that of the set chosen for it.
#define USERIP_OF_SET(op, name)                                \
    (isa::chosen(isa::op) == isa::kAvx512     ? avx512::name   \
     : isa::chosen(isa::op) == isa::kAvx512vl ? avx512vl::name \
                                              : avx2::name)
