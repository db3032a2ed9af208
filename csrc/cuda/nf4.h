// What csrc/cuda/nf4.cu offers to its binder.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace userip_fast {

struct Nf4Params {
    const uint8_t* packed;
    const void* absmax;          // float, or uint8_t with nested_absmax
    const float* nested_absmax;  // nullptr without double quantisation, like the next two
    const float* nested_map;
    const float* offset;
    void* out;
    int64_t values;     // rows * cols
    int64_t blocksize;  // a power of two, at least 32
    int dtype;          // of out: 0 float32, 1 bfloat16, 2 float16
};

void nf4_dequantize_launch(const Nf4Params& params, cudaStream_t stream);

}  // namespace userip_fast
