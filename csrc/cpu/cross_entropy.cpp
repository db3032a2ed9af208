// The element-wise half of linear_cross_entropy on CPU: logits of a chunk of rows become each row's
// NLL and, in place, the gradient with respect to the product hidden W^T.
//
// A row is walked three times while it lies in L2 (128 KB at a vocabulary of 32000): bias, soft cap
// and maximum; sum of exponentials; gradient. In the op's terms, with l the capped logit and w the
// token's weight:
//     nll = w (log sum exp l - l[target]),   d = w (exp(l - lse) - [k == target]) (1 - (l / cap)^2)
#include "bindings.h"

#if defined(__x86_64__)

#include <cstdint>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace userip_fast {
namespace {

#define USERIP_TEXT "cpu/cross_entropy_isa.h"
#include "cpu/every_isa.h"

void cross_entropy_rows(uintptr_t logits, int64_t num_rows, int64_t vocab, uintptr_t bias,
                        float softcap, uintptr_t target, uintptr_t weight, uintptr_t nll,
                        bool need_grad) {
    const auto* targets = reinterpret_cast<const int64_t*>(target);
    for (int64_t r = 0; r < num_rows; ++r) {
        USERIP_CHECK(targets[r] >= 0 && targets[r] < vocab, "target",
                     "ids below the vocabulary size", targets[r]);
    }
    const auto row = USERIP_OF_SET(kCrossEntropy, row);
    threads::parallel_runs(num_rows, 8 * vocab, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            reinterpret_cast<float*>(nll)[r] =
                row(reinterpret_cast<float*>(logits) + r * vocab, vocab,
                    reinterpret_cast<const float*>(bias), softcap, targets[r],
                    reinterpret_cast<const float*>(weight)[r], need_grad);
        }
    });
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
    m.def("cross_entropy_rows", &cross_entropy_rows, py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast

#else  // other processors run the reference

void userip_fast::bind_cross_entropy(py::module_&) {}

#endif
