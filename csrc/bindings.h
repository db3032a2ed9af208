// One binder per op, defined beside the op. Add a line here and one in bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace userip_fast {

namespace py = pybind11;

// csrc/cpu/
void bind_assign_codes(py::module_& m);
void bind_bank(py::module_& m);
void bind_cross_entropy(py::module_& m);
void bind_features(py::module_& m);
void bind_frozen_block(py::module_& m);
void bind_nf4(py::module_& m);
void bind_profile_posterior(py::module_& m);
void bind_sparse_adam(py::module_& m);
void bind_threads(py::module_& m);

#ifdef USERIP_FAST_WITH_CUDA
// csrc/cuda/
void bind_device(py::module_& m);
void bind_nf4_cuda(py::module_& m);
#endif

}  // namespace userip_fast
