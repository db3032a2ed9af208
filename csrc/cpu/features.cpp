// What this processor can run, and which instruction set each op uses of it. The module itself is
// compiled for the baseline of the architecture.
#include <omp.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <string>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"

namespace userip_fast {
namespace isa {
namespace {

constexpr const char* kSets[] = {"baseline", "avx2", "avx512vl", "avx512"};
constexpr const char* kOps[] = {"assign_codes", "cross_entropy", "frozen_block", "nf4",
                                "profile_posterior"};
static_assert(sizeof kOps / sizeof *kOps == kNumOps);

std::atomic<int> choice[kNumOps];  // kBaseline until one is made

// Those an op is compiled for and this processor has, plainest first.
std::vector<Set> sets(Op op) {
    std::vector<Set> out;
    for (const Set set : {kBaseline, kAvx2, kAvx512vl, kAvx512}) {
        if (usable(set) && (set != kBaseline || op == kAssignCodes)) out.push_back(set);
    }
    return out;
}

}  // namespace

bool usable(Set set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (set == kAvx2) return avx2;
    if (set != kBaseline) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
#endif
    return set == kBaseline;
}

Set chosen(Op op) {
    const int made = choice[op].load(std::memory_order_relaxed);
    if (made != kBaseline) return static_cast<Set>(made);
    static const Set fallback = usable(kAvx2) ? kAvx2 : kBaseline;
    return fallback;
}

}  // namespace isa

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

std::map<std::string, std::vector<std::string>> instruction_sets() {
    std::map<std::string, std::vector<std::string>> out;
    for (int op = 0; op < isa::kNumOps; ++op) {
        auto& names = out[isa::kOps[op]];
        for (const isa::Set set : isa::sets(static_cast<isa::Op>(op))) {
            names.emplace_back(isa::kSets[set]);
        }
    }
    return out;
}

void use_instruction_set(const std::string& op, const std::string& set) {
    for (int o = 0; o < isa::kNumOps; ++o) {
        if (op != isa::kOps[o]) continue;
        for (const isa::Set s : isa::sets(static_cast<isa::Op>(o))) {
            if (set != isa::kSets[s]) continue;
            isa::choice[o] = s;
            return;
        }
        USERIP_CHECK(false, "set", "one of instruction_sets() of " + op, set);
    }
    USERIP_CHECK(false, "op", "one of instruction_sets()", op);
}

}  // namespace

void bind_features(py::module_& m) {
    m.def("cpu_features", &cpu_features, "Instruction sets of this processor: {name: present}.");
    m.def("instruction_sets", &instruction_sets,
          "{op: instruction sets that it can use here, plainest first}.");
    m.def("use_instruction_set", &use_instruction_set, py::arg("op"), py::arg("set"),
          "From now on; AVX2 until then.");
    m.def(
        "omp_max_threads", &omp_get_max_threads,
        "Threads OpenMP would use; torch.set_num_threads rules it where torch shares the runtime.");
}

}  // namespace userip_fast
