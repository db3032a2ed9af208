// Python binder of csrc/cuda/assign_codes.cu.
#include "cuda/assign_codes.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings.h"
#include "check.h"
#include "cuda/launch_check.cuh"

namespace userip_fast {

void bind_assign_codes_cuda(py::module_& m) {
    m.def(
        "assign_codes_cuda_plan",
        [](int64_t rows, int dim, int size, int device) {
            USERIP_CHECK(rows > 0 && dim > 0, "rows, dim", "positive counts", rows);
            USERIP_CHECK(0 < size && size <= 32, "size", "1 to 32 codes", size);
            const AssignCodesPlan plan = assign_codes_plan(rows, dim, size, device);
            return std::array<int, 3>{plan.cluster, plan.groups, plan.shared};
        },
        "(blocks of a cluster, clusters, shared bytes of a block); cluster 0: it does not fit.",
        py::arg("rows"), py::arg("dim"), py::arg("size"), py::arg("device"));
    m.def(
        "assign_codes_cuda",
        [](const std::array<int, 3>& plan, uintptr_t x, int dtype, int64_t rows, int dim,
           int64_t stride_row, uintptr_t codewords, uintptr_t half_norm, int size, bool normalize,
           uintptr_t code_ids, uintptr_t sq_distance, uintptr_t second_sq_distance,
           uintptr_t partial_counts, uintptr_t partial_sums, int device, uintptr_t stream) {
            USERIP_CHECK(plan[0] > 0, "plan", "one that fits", plan[0]);
            USERIP_CHECK(rows > 0 && dim > 0, "rows, dim", "positive counts", rows);
            USERIP_CHECK(0 < size && size <= 32, "size", "1 to 32 codes", size);
            USERIP_CHECK(0 <= dtype && dtype <= 2, "dtype", "0 (fp32), 1 (bf16) or 2 (fp16)",
                         dtype);
            USERIP_CHECK((partial_counts == 0) == (partial_sums == 0), "partial_counts",
                         "given with partial_sums or not at all", partial_counts);
            const DeviceGuard guard(device);
            AssignCodesParams p;
            p.x = reinterpret_cast<const void*>(x);
            p.codewords = reinterpret_cast<const float*>(codewords);
            p.half_norm = reinterpret_cast<const float*>(half_norm);
            p.code_ids = reinterpret_cast<int64_t*>(code_ids);
            p.sq_distance = reinterpret_cast<float*>(sq_distance);
            p.second_sq_distance = reinterpret_cast<float*>(second_sq_distance);
            p.partial_counts = reinterpret_cast<int64_t*>(partial_counts);
            p.partial_sums = reinterpret_cast<float*>(partial_sums);
            p.rows = rows;
            p.stride_row = stride_row;
            p.dim = dim;
            p.size = size;
            p.dtype = dtype;
            p.normalize = normalize;
            assign_codes_launch(p, {plan[0], plan[1], plan[2]},
                                reinterpret_cast<cudaStream_t>(stream));
        },
        "One book of at most 32 codes; see csrc/cuda/assign_codes.h.", py::arg("plan"),
        py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("dim"), py::arg("stride_row"),
        py::arg("codewords"), py::arg("half_norm"), py::arg("size"), py::arg("normalize"),
        py::arg("code_ids"), py::arg("sq_distance"), py::arg("second_sq_distance"),
        py::arg("partial_counts"), py::arg("partial_sums"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast
