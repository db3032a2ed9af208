// Instruction sets of the CPU kernels. One text of an op is compiled once per set, in a namespace
// of its own, and the set is chosen per op at run time: userip_fast/ops/isa.py measures.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace userip_fast::isa {

// vl: AVX-512's masks and 32 registers, on vectors of 256 bits.
enum Set : int { kBaseline, kAvx2, kAvx512vl, kAvx512 };

enum Op : int { kAssignCodes, kCrossEntropy, kFrozenBlock, kNf4, kProfilePosterior, kNumOps };

// The set that an op is to use: what was chosen, else AVX2. `kBaseline` where there is none.
Set chosen(Op op);

bool usable(Set set);

}  // namespace userip_fast::isa

// Code between BEGIN and END may use the instruction set; everything it calls must be above.
#if defined(__clang__)
#define USERIP_STRINGIZE(x) #x
#define USERIP_ISA_BEGIN(features) \
    _Pragma(USERIP_STRINGIZE(      \
        clang attribute push(__attribute__((target(features))), apply_to = function)))
#define USERIP_ISA_END _Pragma("clang attribute pop")
#else
#define USERIP_STRINGIZE(x) #x
#define USERIP_ISA_BEGIN(features) \
    _Pragma("GCC push_options") _Pragma(USERIP_STRINGIZE(GCC target(features)))
#define USERIP_ISA_END _Pragma("GCC pop_options")
#endif

#define USERIP_AVX2_FEATURES "avx2,fma,f16c"
#define USERIP_AVX512_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
