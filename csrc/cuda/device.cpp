// Whether the driver on this machine can run the kernels in this module.
#include "bindings.h"
#include "cuda/launch_check.cuh"

namespace userip_fast {

void bind_device(py::module_& m) {
    m.def(
        "cuda_device_count",
        [] {
            int count = 0;
            USERIP_CUDA_CHECK(cudaGetDeviceCount(&count));
            return count;
        },
        "Devices the driver offers. Raises RuntimeError with CUDA's words where there is no "
        "driver.");
}

}  // namespace userip_fast
