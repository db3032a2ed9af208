// NF4 to fp32, bf16 or fp16, double quantisation included, in one launch. The format is described
// in userip_fast/ops/nf4_format.py.
//
// A thread decodes 8 consecutive codes: one 4-byte load, so that a warp reads one full 128-byte
// line, and 16-byte stores, 512 contiguous bytes per warp in 16 bits. Eight codes never cross a
// block of 32 or more, so they share a scale. kUnroll groups a thread, a grid's worth apart, keep
// that many loads in flight. Levels are shuffled out of lane registers (lane i holds level i % 16):
// no memory table.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch_check.cuh"
#include "cuda/nf4.h"

namespace userip_fast {
namespace {

constexpr int kThreads = 256, kUnroll = 4, kGroup = 8, kNestedShift = 8;

__constant__ const float kLevels[16] = {
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

template <class T>
__device__ T rounded(float x);
template <>
__device__ float rounded<float>(float x) {
    return x;
}
template <>
__device__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __half rounded<__half>(float x) {
    return __float2half_rn(x);
}

// The product and the sum are rounded one after the other, as in the reference: no FMA.
template <bool kNested>
__device__ float block_scale(const Nf4Params& p, int64_t block) {
    if constexpr (kNested) {
        const uint8_t code = static_cast<const uint8_t*>(p.absmax)[block];
        return __fadd_rn(
            __fmul_rn(__ldg(p.nested_map + code), __ldg(p.nested_absmax + (block >> kNestedShift))),
            __ldg(p.offset));
    } else {
        return static_cast<const float*>(p.absmax)[block];
    }
}

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads) nf4_dequantize_kernel(Nf4Params p, int block_shift) {
    constexpr unsigned kAll = 0xffffffffu;
    const float level = kLevels[threadIdx.x % 16];
    const int64_t groups = p.values / kGroup;  // whole ones; the rest is at the end
    const int64_t base = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
    auto* out = static_cast<T*>(p.out);

    uint32_t codes[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int64_t group = base + u * kThreads;
        const bool inside = group < groups;
        codes[u] = inside ? __ldg(reinterpret_cast<const uint32_t*>(p.packed) + group) : 0u;
        scale[u] = inside ? block_scale<kNested>(p, (group * kGroup) >> block_shift) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int64_t group = base + u * kThreads;
        alignas(16) T values[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int shift = (i / 2) * 8 + (i % 2 == 0 ? 4 : 0);  // high nibble first
            // All lanes take part in a shuffle, also those past the end. The source lane is taken
            // modulo 32, so bit 4 of what lies above the nibble only picks the other copy.
            const float x = __shfl_sync(kAll, level, static_cast<int>(codes[u] >> shift));
            values[i] = rounded<T>(__fmul_rn(x, scale[u]));
        }
        if (group < groups) {
            auto* to = reinterpret_cast<uint4*>(out + group * kGroup);
            const auto* from = reinterpret_cast<const uint4*>(values);
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(values) / sizeof(uint4)); ++i)
                to[i] = from[i];
        }
    }
    // Fewer than 8 values are left over: one thread each.
    const int64_t last = groups * kGroup + threadIdx.x;
    if (blockIdx.x == 0 && last < p.values) {
        const uint8_t byte = p.packed[last / 2];
        const float x = kLevels[last % 2 == 0 ? byte >> 4 : byte & 15];
        out[last] = rounded<T>(__fmul_rn(x, block_scale<kNested>(p, last >> block_shift)));
    }
}

template <class T>
void launch(const Nf4Params& p, cudaStream_t stream) {
    int block_shift = 0;
    while ((int64_t{1} << block_shift) < p.blocksize) ++block_shift;
    const int64_t per_block = int64_t{kThreads} * kUnroll * kGroup;
    const auto grid = static_cast<unsigned>((p.values + per_block - 1) / per_block);
    const auto kernel = p.nested_absmax == nullptr ? nf4_dequantize_kernel<T, false>
                                                   : nf4_dequantize_kernel<T, true>;
    kernel<<<grid, kThreads, 0, stream>>>(p, block_shift);
    USERIP_LAUNCH_CHECK("nf4_dequantize");
}

}  // namespace

void nf4_dequantize_launch(const Nf4Params& params, cudaStream_t stream) {
    if (params.values == 0) return;
    if (params.dtype == 0) {
        launch<float>(params, stream);
    } else if (params.dtype == 1) {
        launch<__nv_bfloat16>(params, stream);
    } else {
        launch<__half>(params, stream);
    }
}

}  // namespace userip_fast
