// The NF4 format, for C++ and CUDA alike; userip_fast/ops/nf4_format.py describes it, and a test
// holds the two equal.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "check.h"

#ifdef __CUDACC__
#define USERIP_NF4_TABLE __constant__ const
#define USERIP_NF4_INLINE __device__ inline
#else
#define USERIP_NF4_TABLE alignas(64) inline constexpr
#define USERIP_NF4_INLINE inline
#endif

namespace userip_fast::nf4 {

constexpr int64_t kMinBlock = 32;  // values per scale; always a power of two
constexpr int kNestedShift = 8;
constexpr int64_t kNestedBlock = 1 << kNestedShift;  // scales per scale, with double quantisation

USERIP_NF4_TABLE float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

struct Weight {
    const uint8_t* packed;
    const void* absmax;          // float, or uint8_t with nested_absmax
    const float* nested_absmax;  // nullptr without double quantisation, like the next two
    const float* nested_map;
    const float* offset;
    int64_t rows, cols, blocksize;
};

// The code of value i of the flattened weight: two to a byte, the even one in the high nibble.
USERIP_NF4_INLINE int code_at(const Weight& w, int64_t i) {
    const uint8_t byte = w.packed[i / 2];
    return i % 2 == 0 ? byte >> 4 : byte & 15;
}

// What Python passes: addresses of (packed, absmax, nested_absmax, nested_map, offset), the last
// three 0 without double quantisation; (rows, cols, blocksize); and the dtype of a value, 0
// float32, 1 bfloat16, 2 float16.
using Addresses = std::array<uintptr_t, 5>;
using Sizes = std::array<int64_t, 3>;

inline Weight weight_from(const Addresses& a, const Sizes& s, int dtype) {
    USERIP_CHECK(a[0] != 0 && a[1] != 0, "weight", "addresses", 0);
    USERIP_CHECK((a[2] == 0) == (a[3] == 0) && (a[2] == 0) == (a[4] == 0), "nested scales",
                 "all three addresses or none", "some");
    USERIP_CHECK(s[0] > 0 && s[1] > 0, "rows, cols", "positive", std::min(s[0], s[1]));
    USERIP_CHECK(s[2] >= kMinBlock && (s[2] & (s[2] - 1)) == 0, "blocksize",
                 "a power of two, at least 32", s[2]);
    USERIP_CHECK(0 <= dtype && dtype <= 2, "dtype", "0, 1 or 2", dtype);
    return {reinterpret_cast<const uint8_t*>(a[0]),
            reinterpret_cast<const void*>(a[1]),
            reinterpret_cast<const float*>(a[2]),
            reinterpret_cast<const float*>(a[3]),
            reinterpret_cast<const float*>(a[4]),
            s[0],
            s[1],
            s[2]};
}

}  // namespace userip_fast::nf4
