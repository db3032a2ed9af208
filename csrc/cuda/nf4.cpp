// Python binder of csrc/cuda/nf4.cu.
#include "cuda/nf4.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "check.h"
#include "cuda/launch_check.cuh"

namespace userip_fast {
namespace {

// Addresses of (packed, absmax, nested_absmax, nested_map, offset), the last three 0 without double
// quantisation; sizes are (rows, cols, blocksize); dtype of `out` is 0 float32, 1 bfloat16, 2
// float16.
void nf4_dequantize_cuda(const std::array<uintptr_t, 5>& a, const std::array<int64_t, 3>& sizes,
                         uintptr_t out, int dtype, int device, uintptr_t stream) {
    const int64_t blocksize = sizes[2];
    USERIP_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0, "blocksize",
                 "a power of two, at least 32", blocksize);
    USERIP_CHECK(sizes[0] > 0 && sizes[1] > 0, "rows", "positive sizes", sizes[0]);
    USERIP_CHECK(0 <= dtype && dtype <= 2, "dtype", "0, 1 or 2", dtype);
    USERIP_CHECK(a[0] % 4 == 0 && out % 16 == 0, "packed, out", "4- and 16-byte alignment", a[0]);
    USERIP_CHECK((a[2] == 0) == (a[3] == 0) && (a[2] == 0) == (a[4] == 0), "nested scales",
                 "all three addresses or none", "some");
    const DeviceGuard guard(device);
    nf4_dequantize_launch(
        {reinterpret_cast<const uint8_t*>(a[0]), reinterpret_cast<const void*>(a[1]),
         reinterpret_cast<const float*>(a[2]), reinterpret_cast<const float*>(a[3]),
         reinterpret_cast<const float*>(a[4]), reinterpret_cast<void*>(out), sizes[0] * sizes[1],
         blocksize, dtype},
        reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_nf4_cuda(py::module_& m) {
    m.def("nf4_dequantize_cuda", &nf4_dequantize_cuda, py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast
