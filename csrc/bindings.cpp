// userip_fast._C: names only. Functions take raw addresses (tensor.data_ptr()), sizes, strides in
// elements and, on CUDA, device and stream; outputs are allocated by Python and passed in; the GIL
// is released. (The bank's look-up takes arrays: one key is found faster than an address is asked
// for.)
#include "bindings.h"

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
    using namespace userip_fast;
    m.doc() = "Compiled kernels of userip_fast; call them through userip_fast.ops.";
    bind_assign_codes(m);
    bind_bank(m);
    bind_cross_entropy(m);
    bind_features(m);
    bind_frozen_block(m);
    bind_nf4(m);
    bind_profile_posterior(m);
    bind_sparse_adam(m);
    bind_threads(m);
#ifdef USERIP_FAST_WITH_CUDA
    m.attr("cuda_architectures") = USERIP_FAST_CUDA_ARCHITECTURES;
    bind_device(m);
    bind_nf4_cuda(m);
#else
    m.attr("cuda_architectures") = pybind11::none();
#endif
}
