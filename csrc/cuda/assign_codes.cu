// Nearest of at most 32 codewords in one read of x, counts and sums included.
//
// A cluster of 1, 2, 4 or 8 blocks owns a run of rows; each block owns a slab of columns and keeps
// that slab of the codebook, and of the fp32 sums, in shared memory. For a tile of 32 rows:
//
//   x slab -> shared -> dots of the slab (a warp: 4 rows x all codes, in registers)
//     -> partial scores, exchanged through distributed shared memory -> best two codes of a row
//     -> their direct distance, partial and exchanged likewise -> code id
//     -> rows added to their code's sums in row order
//
// Partials are added in rank order by every block alike, so no block can disagree, nothing is
// atomic, and results repeat bitwise. Each cluster's sums go to global memory once, at the end.
// Clusters need sm_90 and code built for it; elsewhere one block must hold all columns.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/assign_codes.h"
#include "cuda/launch_check.cuh"

namespace userip_fast {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowsPerWarp = 4, kTileRows = kWarps * kRowsPerWarp;
constexpr int kMaxCluster = 8;
constexpr int kChunk = 128;  // columns a warp takes at a time: a float4 per lane

__device__ float to_float(float x) {
    return x;
}
__device__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ float to_float(__half x) {
    return __half2float(x);
}

__host__ __device__ int slab_columns(int dim, int cluster) {  // a multiple of kChunk
    return ((dim + cluster - 1) / cluster + kChunk - 1) / kChunk * kChunk;
}

// Shared memory of a block, in floats: codewords and sums [size, slab], x [kTileRows, slab], and
// what is exchanged or kept per row of a tile.
template <int kCodes>
struct Layout {
    static constexpr int kSmall = kTileRows * (kCodes + 2 + 2) + 2 * kTileRows;
    static int64_t bytes(int size, int slab) {
        return (int64_t(2 * size + kTileRows) * slab + kSmall) * sizeof(float) +
               (kTileRows * 2 + kCodes) * sizeof(int);
    }
};

// v[i] summed over the warp, for all i at once: each step trades half of the values for half of
// the lanes. Lane l ends with the sums of i = l * (kCount / 32) + (0, 1, ...) in v[0], v[1], ...
// Recursive, so that every index is a constant and v stays in registers.
template <int kHalf, int kOffset, int kCount>
__device__ void warp_sums(float (&v)[kCount], int lane) {
    const bool upper = (lane & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
        const float sent = upper ? v[i] : v[i + kHalf];
        const float kept = upper ? v[i + kHalf] : v[i];
        v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kOffset);
    }
    if constexpr (kOffset > 1) warp_sums<kHalf / 2, kOffset / 2>(v, lane);
}

// kCodes: 16 or 32, the most codes.
// kCluster: whether there is more than one block per row.
template <class T, int kCodes, bool kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    assign_codes_kernel(AssignCodesParams p, int slab, int groups) {
    extern __shared__ float4 shared_memory[];
    float* words = reinterpret_cast<float*>(shared_memory);  // [kCodes' size, slab]
    float* sums = words + p.size * slab;
    float* tile = sums + p.size * slab;          // [kTileRows, slab]
    float* scores = tile + kTileRows * slab;     // [kTileRows, kCodes]
    float* norms = scores + kTileRows * kCodes;  // [2, kTileRows], |x|^2; then |x|
    float* distances = norms + 2 * kTileRows;    // [kTileRows, 2]
    int* best = reinterpret_cast<int*>(distances + 2 * kTileRows);  // [kTileRows, 2]
    int* counts = best + 2 * kTileRows;                             // [kCodes]

    int rank = 0, ranks = 1;
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster) {
        rank = int(cg::this_cluster().block_rank());
        ranks = int(cg::this_cluster().num_blocks());
    }
#endif
    const auto sync = [] {
#if __CUDA_ARCH__ >= 900
        if constexpr (kCluster) {
            cg::this_cluster().sync();
            return;
        }
#endif
        __syncthreads();
    };
    // Sum over the cluster of the float at `address` of each block, in rank order.
    const auto total = [&](float* address) {
#if __CUDA_ARCH__ >= 900
        if constexpr (kCluster) {
            float sum = 0;
            for (int r = 0; r < ranks; ++r) sum += *cg::this_cluster().map_shared_rank(address, r);
            return sum;
        }
#endif
        return *address;
    };

    const int group = int(blockIdx.x) / ranks, lane = int(threadIdx.x) % 32;
    const int warp = int(threadIdx.x) / 32;
    const int first_column = rank * slab;
    const int columns = max(0, min(slab, p.dim - first_column));
    const int64_t begin = p.rows * group / groups, end = p.rows * (group + 1) / groups;
    for (int i = int(threadIdx.x); i < p.size * slab; i += kThreads) {
        const int d = i % slab;
        const int64_t at = int64_t(i / slab) * p.dim + first_column + d;
        words[i] = d < columns ? p.codewords[at] : 0.0f;
        sums[i] = 0.0f;
    }
    if (threadIdx.x < kCodes) counts[threadIdx.x] = 0;

    for (int64_t n0 = begin; n0 < end; n0 += kTileRows) {
        const int rows = int(min(int64_t(kTileRows), end - n0));
        const T* x = static_cast<const T*>(p.x) + n0 * p.stride_row + first_column;
        for (int r = warp; r < kTileRows; r += kWarps) {
            for (int d = lane; d < slab; d += 32) {
                const bool inside = r < rows && d < columns;
                tile[r * slab + d] = inside ? to_float(x[r * p.stride_row + d]) : 0.0f;
            }
        }
        __syncthreads();

        if (p.normalize) {
            for (int r = warp; r < kTileRows; r += kWarps) {
                float square = 0;
                for (int d = lane; d < slab; d += 32)
                    square += tile[r * slab + d] * tile[r * slab + d];
                for (int o = 16; o > 0; o /= 2) square += __shfl_xor_sync(0xffffffffu, square, o);
                if (lane == 0) norms[r] = square;
            }
            sync();
            if (threadIdx.x < kTileRows) {
                norms[kTileRows + threadIdx.x] = fmaxf(sqrtf(total(norms + threadIdx.x)), 1e-12f);
            }
            sync();
            for (int r = warp; r < kTileRows; r += kWarps) {
                for (int d = lane; d < slab; d += 32) tile[r * slab + d] /= norms[kTileRows + r];
            }
            __syncthreads();
        }

        float dots[kRowsPerWarp * kCodes] = {};
        for (int d = 4 * lane; d < slab; d += kChunk) {
            float4 row[kRowsPerWarp];
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r) {
                row[r] =
                    *reinterpret_cast<const float4*>(tile + (warp * kRowsPerWarp + r) * slab + d);
            }
#pragma unroll
            for (int k = 0; k < kCodes; ++k) {
                const float4 c = *reinterpret_cast<const float4*>(
                    words + min(k, p.size - 1) * slab + d);  // the last one again past the end
#pragma unroll
                for (int r = 0; r < kRowsPerWarp; ++r) {
                    float& dot = dots[r * kCodes + k];
                    dot = fmaf(row[r].x, c.x, dot);
                    dot = fmaf(row[r].y, c.y, dot);
                    dot = fmaf(row[r].z, c.z, dot);
                    dot = fmaf(row[r].w, c.w, dot);
                }
            }
        }
        warp_sums<kRowsPerWarp * kCodes / 2, 16>(dots, lane);
        constexpr int kPerLane = kRowsPerWarp * kCodes / 32;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            scores[warp * kRowsPerWarp * kCodes + lane * kPerLane + i] = dots[i];
        }
        sync();

        if (threadIdx.x < kTileRows) {
            const int r = int(threadIdx.x);
            float top = -INFINITY, next = -INFINITY;
            int top_id = -1, next_id = -1;
            for (int k = 0; k < p.size; ++k) {
                const float score = total(scores + r * kCodes + k) - p.half_norm[k];
                if (score > top) {
                    next = top, next_id = top_id;
                    top = score, top_id = k;
                } else if (score > next) {
                    next = score, next_id = k;
                }
            }
            best[2 * r] = top_id, best[2 * r + 1] = next_id;
        }
        __syncthreads();

        for (int i = warp; i < 2 * kTileRows; i += kWarps) {
            const int k = best[i];
            float sum = 0;
            if (k >= 0) {
                for (int d = lane; d < slab; d += 32) {
                    const float e = tile[i / 2 * slab + d] - words[k * slab + d];
                    sum = fmaf(e, e, sum);
                }
            }
            for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            if (lane == 0) distances[i] = sum;
        }
        sync();

        if (threadIdx.x < rows) {
            const int r = int(threadIdx.x);
            int id = best[2 * r], other = best[2 * r + 1];
            float near = id < 0 ? INFINITY : total(distances + 2 * r);
            float far = other < 0 ? INFINITY : total(distances + 2 * r + 1);
            if (far < near || (far == near && other >= 0 && other < id)) {
                const float swap = near;
                near = far, far = swap;
                const int swap_id = id;
                id = other, other = swap_id;
            }
            if (!isfinite(near)) id = -1;  // NaN, Inf or overflow in x; the caller refuses the row
            best[2 * r] = id;
            if (rank == 0) {
                p.code_ids[n0 + r] = id;
                p.sq_distance[n0 + r] = near;
                if (p.second_sq_distance != nullptr) p.second_sq_distance[n0 + r] = far;
            }
        }
        sync();  // peers have read `distances`, and everybody may write the tile again below

        if (p.partial_sums == nullptr) continue;
        for (int d = int(threadIdx.x); d < columns; d += kThreads) {
            for (int r = 0; r < rows; ++r) {
                if (best[2 * r] >= 0) sums[best[2 * r] * slab + d] += tile[r * slab + d];
            }
        }
        if (threadIdx.x == 0) {
            for (int r = 0; r < rows; ++r) {
                if (best[2 * r] >= 0) ++counts[best[2 * r]];
            }
        }
        __syncthreads();
    }

    if (p.partial_sums != nullptr) {
        __syncthreads();
        for (int i = int(threadIdx.x); i < p.size * slab; i += kThreads) {
            const int d = i % slab;
            const int64_t k = int64_t(group) * p.size + i / slab;
            if (d < columns) p.partial_sums[k * p.dim + first_column + d] = sums[i];
        }
        if (rank == 0 && threadIdx.x < p.size) {
            p.partial_counts[int64_t(group) * p.size + threadIdx.x] = counts[threadIdx.x];
        }
    }
    sync();  // no block leaves while a peer may still read its shared memory
}

template <class T, int kCodes, bool kCluster>
void launch(const AssignCodesParams& p, const AssignCodesPlan& plan, cudaStream_t stream) {
    const auto kernel = assign_codes_kernel<T, kCodes, kCluster>;
    USERIP_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(plan.groups * plan.cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(plan.shared);
    config.stream = stream;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(plan.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = kCluster ? 1 : 0;
    USERIP_CUDA_CHECK(
        cudaLaunchKernelEx(&config, kernel, p, slab_columns(p.dim, plan.cluster), plan.groups));
    USERIP_LAUNCH_CHECK("assign_codes_kernel");
}

template <class T>
void launch_for(const AssignCodesParams& p, const AssignCodesPlan& plan, cudaStream_t stream) {
    if (p.size <= 16) {
        plan.cluster > 1 ? launch<T, 16, true>(p, plan, stream)
                         : launch<T, 16, false>(p, plan, stream);
    } else {
        plan.cluster > 1 ? launch<T, 32, true>(p, plan, stream)
                         : launch<T, 32, false>(p, plan, stream);
    }
}

}  // namespace

AssignCodesPlan assign_codes_plan(int64_t rows, int dim, int size, int device) {
    int limit = 0, processors = 0, major = 0;
    USERIP_CUDA_CHECK(
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    USERIP_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    USERIP_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cudaFuncAttributes built;  // code for older chips, compiled by the driver, has no clusters
    USERIP_CUDA_CHECK(cudaFuncGetAttributes(&built, assign_codes_kernel<float, 16, true>));
    const int most = major >= 9 && built.ptxVersion >= 90 ? kMaxCluster : 1;
    for (int cluster = 1; cluster <= most; cluster *= 2) {
        const int slab = slab_columns(dim, cluster);
        const int64_t bytes =
            size <= 16 ? Layout<16>::bytes(size, slab) : Layout<32>::bytes(size, slab);
        if (bytes <= limit) {
            const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
            const int64_t groups = std::min<int64_t>(tiles, processors / cluster);
            return {cluster, int(std::max<int64_t>(groups, 1)), int(bytes)};
        }
    }
    return {0, 0, 0};
}

void assign_codes_launch(const AssignCodesParams& params, const AssignCodesPlan& plan,
                         cudaStream_t stream) {
    switch (params.dtype) {
        case 0:
            return launch_for<float>(params, plan, stream);
        case 1:
            return launch_for<__nv_bfloat16>(params, plan, stream);
        default:
            return launch_for<__half>(params, plan, stream);
    }
}

}  // namespace userip_fast
