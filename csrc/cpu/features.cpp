// What this processor can run. Kernels choose their instruction set by these at run time; the
// module itself is compiled for the baseline of the architecture.
#include <omp.h>

#include "bindings.h"

namespace userip_fast {
namespace {

py::dict cpu_features() {
    py::dict features;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define USERIP_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
    USERIP_FEATURE("avx2");
    USERIP_FEATURE("fma");
    USERIP_FEATURE("f16c");
    USERIP_FEATURE("avx512f");
    USERIP_FEATURE("avx512bw");
    USERIP_FEATURE("avx512vl");
    USERIP_FEATURE("avx512vnni");
    USERIP_FEATURE("avx512bf16");
#undef USERIP_FEATURE
#elif defined(__aarch64__)
    features["neon"] = true;  // part of the architecture's baseline
#endif
    return features;
}

}  // namespace

void bind_features(py::module_& m) {
    m.def("cpu_features", &cpu_features, "Instruction sets of this processor: {name: present}.");
    m.def(
        "omp_max_threads", &omp_get_max_threads,
        "Threads OpenMP would use; torch.set_num_threads rules it where torch shares the runtime.");
}

}  // namespace userip_fast
