// What csrc/cuda/nf4.cu offers to its binder.
#pragma once

#include <cuda_runtime.h>

#include "nf4_format.h"

namespace userip_fast {

// dtype of `out` [rows * cols]: 0 float32, 1 bfloat16, 2 float16.
void nf4_dequantize_launch(const nf4::Weight& weight, void* out, int dtype, cudaStream_t stream);

}  // namespace userip_fast
