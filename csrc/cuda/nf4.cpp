// Python binder of csrc/cuda/nf4.cu.
#include "cuda/nf4.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/launch_check.cuh"

namespace userip_fast {
namespace {

void nf4_dequantize_cuda(const nf4::Addresses& addresses, const nf4::Sizes& sizes, uintptr_t out,
                         int dtype, int device, uintptr_t stream) {
    const nf4::Weight weight = nf4::weight_from(addresses, sizes, dtype);
    USERIP_CHECK(addresses[0] % 4 == 0 && out % 16 == 0, "packed, out", "4- and 16-byte alignment",
                 addresses[0]);
    const DeviceGuard guard(device);
    nf4_dequantize_launch(weight, reinterpret_cast<void*>(out), dtype,
                          reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_nf4_cuda(py::module_& m) {
    m.def("nf4_dequantize_cuda", &nf4_dequantize_cuda, py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast
