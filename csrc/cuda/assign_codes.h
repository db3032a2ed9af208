// What csrc/cuda/assign_codes.cu offers to its binder.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace userip_fast {

struct AssignCodesParams {
    const void* x;           // [rows, dim], columns contiguous
    const float* codewords;  // [size, dim]
    const float* half_norm;  // [size], |c|^2 / 2; Inf for retired codes
    int64_t* code_ids;       // [rows]; -1 where the distance is not finite
    float* sq_distance;
    float* second_sq_distance;  // or null
    int64_t* partial_counts;    // [groups, size], or null like the next
    float* partial_sums;        // [groups, size, dim]
    int64_t rows;
    int64_t stride_row;
    int dim;
    int size;   // at most 32
    int dtype;  // of x: 0 float32, 1 bfloat16, 2 float16
    bool normalize;
};

struct AssignCodesPlan {
    int cluster;  // blocks that share a row, each with a slab of its columns; 0: does not fit
    int groups;   // clusters of the launch; each takes one run of rows
    int shared;   // bytes per block
};

// Fits codebook, sums and a tile of rows into the shared memory of the smallest possible cluster.
AssignCodesPlan assign_codes_plan(int64_t rows, int dim, int size, int device);

void assign_codes_launch(const AssignCodesParams& params, const AssignCodesPlan& plan,
                         cudaStream_t stream);

}  // namespace userip_fast
