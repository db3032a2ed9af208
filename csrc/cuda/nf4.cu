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

using namespace nf4;

constexpr int kThreads = 256, kUnroll = 4, kGroup = 8;

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
__device__ float block_scale(const Weight& w, int64_t block) {
    if constexpr (kNested) {
        const uint8_t code = static_cast<const uint8_t*>(w.absmax)[block];
        const float* nested = w.nested_absmax + (block >> kNestedShift);
        return __fadd_rn(__fmul_rn(__ldg(w.nested_map + code), __ldg(nested)), __ldg(w.offset));
    } else {
        return static_cast<const float*>(w.absmax)[block];
    }
}

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(Weight w, int64_t values, T* out, int block_shift) {
    constexpr unsigned kAll = 0xffffffffu;
    const float level = kLevels[threadIdx.x % 16];
    const int64_t groups = values / kGroup;  // whole ones; the rest is at the end
    const int64_t base = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;

    uint32_t codes[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int64_t group = base + u * kThreads;
        const bool inside = group < groups;
        codes[u] = inside ? __ldg(reinterpret_cast<const uint32_t*>(w.packed) + group) : 0u;
        scale[u] = inside ? block_scale<kNested>(w, (group * kGroup) >> block_shift) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int64_t group = base + u * kThreads;
        alignas(16) T some[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int shift = (i / 2) * 8 + (i % 2 == 0 ? 4 : 0);  // high nibble first
            // All lanes take part in a shuffle, also those past the end. The source lane is taken
            // modulo 32, so bit 4 of what lies above the nibble only picks the other copy.
            const float x = __shfl_sync(kAll, level, static_cast<int>(codes[u] >> shift));
            some[i] = rounded<T>(__fmul_rn(x, scale[u]));
        }
        if (group < groups) {
            auto* to = reinterpret_cast<uint4*>(out + group * kGroup);
            const auto* from = reinterpret_cast<const uint4*>(some);
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(some) / sizeof(uint4)); ++i)
                to[i] = from[i];
        }
    }
    // Fewer than 8 values are left over: one thread each.
    const int64_t last = groups * kGroup + threadIdx.x;
    if (blockIdx.x == 0 && last < values) {
        const float x = kLevels[code_at(w, last)];
        out[last] = rounded<T>(__fmul_rn(x, block_scale<kNested>(w, last >> block_shift)));
    }
}

template <class T>
void launch(const Weight& w, void* out, cudaStream_t stream) {
    int block_shift = 0;
    while ((int64_t{1} << block_shift) < w.blocksize) ++block_shift;
    const int64_t values = w.rows * w.cols, per_block = int64_t{kThreads} * kUnroll * kGroup;
    const auto grid = static_cast<unsigned>((values + per_block - 1) / per_block);
    const auto kernel = w.nested_absmax == nullptr ? nf4_dequantize_kernel<T, false>
                                                   : nf4_dequantize_kernel<T, true>;
    kernel<<<grid, kThreads, 0, stream>>>(w, values, static_cast<T*>(out), block_shift);
    USERIP_LAUNCH_CHECK("nf4_dequantize");
}

}  // namespace

void nf4_dequantize_launch(const Weight& weight, void* out, int dtype, cudaStream_t stream) {
    if (dtype == 0) {
        launch<float>(weight, out, stream);
    } else if (dtype == 1) {
        launch<__nv_bfloat16>(weight, out, stream);
    } else {
        launch<__half>(weight, out, stream);
    }
}

}  // namespace userip_fast
