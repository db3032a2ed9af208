// The element-wise half of linear_cross_entropy on CPU: logits of a chunk of rows become each row's
// NLL and, in place, the gradient with respect to the product hidden W^T.
//
// A row is walked three times while it lies in L2 (128 KB at a vocabulary of 32000): bias, soft cap
// and maximum; sum of exponentials; gradient. In the op's terms, with l the capped logit and w the
// token's weight:
//     nll = w (log sum exp l - l[target]),   d = w (exp(l - lse) - [k == target]) (1 - (l / cap)^2)
#include "bindings.h"

#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "cpu/avx2.h"
#include "cpu/threads.h"

namespace userip_fast {
namespace {

template <class Join>
USERIP_AVX2 float reduce8(__m256 x, Join join) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    float out = lanes[0];
    for (int i = 1; i < 8; ++i) out = join(out, lanes[i]);
    return out;
}

USERIP_AVX2 float row(float* l, int64_t vocab, const float* bias, float softcap, int64_t target,
                      float weight, bool need_grad) {
    constexpr float kLow = -std::numeric_limits<float>::infinity();
    const bool changed = bias != nullptr || softcap > 0;
    const __m256 cap = _mm256_set1_ps(softcap);
    __m256 top = _mm256_set1_ps(kLow);
    for (int64_t k = 0; k < vocab; k += 8) {
        const int64_t left = vocab - k;
        __m256 x = load(l + k, left, kLow);
        if (changed) {
            if (bias != nullptr) x = _mm256_add_ps(x, load(bias + k, left, 0.0f));
            if (softcap > 0) x = _mm256_mul_ps(cap, tanh8(_mm256_div_ps(x, cap)));
            store(l + k, left, x);
            if (left < 8) x = load(l + k, left, kLow);
        }
        top = _mm256_max_ps(x, top);
    }
    const float high = reduce8(top, [](float a, float b) { return a > b ? a : b; });
    const __m256 high8 = _mm256_set1_ps(high);
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t k = 0; k < vocab; k += 8) {
        const __m256 x = load(l + k, vocab - k, kLow);
        __m256& s = sum[k / 8 % 2];
        s = _mm256_add_ps(s, exp8(_mm256_sub_ps(x, high8)));
    }
    const float total =
        reduce8(_mm256_add_ps(sum[0], sum[1]), [](float a, float b) { return a + b; });
    const float lse = high + std::log(total);
    const float nll = weight * (lse - l[target]);
    if (!need_grad) return nll;
    const float at_target = l[target];
    const float slope = softcap > 0 ? 1 - (at_target / softcap) * (at_target / softcap) : 1.0f;
    // exp(l - high) / total, not exp(l - lse): the division does not lose what lse rounds away.
    const __m256 scale = _mm256_set1_ps(weight / total), one = _mm256_set1_ps(1.0f);
    for (int64_t k = 0; k < vocab; k += 8) {
        const __m256 x = load(l + k, vocab - k, kLow);
        __m256 g = _mm256_mul_ps(exp8(_mm256_sub_ps(x, high8)), scale);
        if (softcap > 0) {
            const __m256 t = _mm256_div_ps(x, cap);
            g = _mm256_mul_ps(g, _mm256_fnmadd_ps(t, t, one));
        }
        store(l + k, vocab - k, g);
    }
    l[target] -= weight * slope;
    return nll;
}

void cross_entropy_rows(uintptr_t logits, int64_t num_rows, int64_t vocab, uintptr_t bias,
                        float softcap, uintptr_t target, uintptr_t weight, uintptr_t nll,
                        bool need_grad) {
    const auto* targets = reinterpret_cast<const int64_t*>(target);
    for (int64_t r = 0; r < num_rows; ++r) {
        USERIP_CHECK(targets[r] >= 0 && targets[r] < vocab, "target",
                     "ids below the vocabulary size", targets[r]);
    }
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
