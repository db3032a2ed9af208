// The element-wise half of linear_cross_entropy on CPU: logits of a chunk of rows become each row's
// NLL and, in place, the gradient with respect to the product hidden W^T.
//
// A row is walked three times while it lies in L2 (128 KB at a vocabulary of 32000): bias, soft cap
// and maximum; sum of exponentials; gradient. In the op's terms, with l the capped logit and w the
// token's weight:
//     nll = w (log sum exp l - l[target]),   d = w (exp(l - lse) - [k == target]) (1 - (l / cap)^2)
#include "bindings.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"

#define USERIP_AVX2 __attribute__((target("avx2,fma")))

namespace userip_fast {
namespace {

// exp(x) to about 1 ulp for x <= 88; below -87.3 it returns 0 (x = -inf included). Reduction to
// |r| <= ln2 / 2 and a degree-6 polynomial (Cephes).
USERIP_AVX2 inline __m256 exp8(__m256 x) {
    const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(88.0f), x);  // this order keeps NaN
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(clamped, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), clamped);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    const __m256i power =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// tanh(x): by its series where 1 - 2 / (exp(2x) + 1) would cancel.
USERIP_AVX2 inline __m256 tanh8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), x2 = _mm256_mul_ps(x, x);
    const __m256 bound = _mm256_min_ps(_mm256_set1_ps(40.0f), _mm256_add_ps(x, x));
    const __m256 far =
        _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(exp8(bound), one)));
    __m256 p = _mm256_set1_ps(62.0f / 2835);
    p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(-17.0f / 315));
    p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(2.0f / 15));
    p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(-1.0f / 3));
    const __m256 near = _mm256_fmadd_ps(_mm256_mul_ps(p, x2), x, x);
    const __m256 small = _mm256_cmp_ps(x2, _mm256_set1_ps(0.09f), _CMP_LT_OQ);
    return _mm256_blendv_ps(far, near, small);
}

// Lanes [0, left) of a vector that runs past the end of a row.
USERIP_AVX2 inline __m256i first_lanes(int64_t left) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), lane);
}

USERIP_AVX2 inline __m256 load(const float* p, int64_t left, float other) {
    if (left >= 8) return _mm256_loadu_ps(p);
    const __m256i mask = first_lanes(left);
    return _mm256_blendv_ps(_mm256_set1_ps(other), _mm256_maskload_ps(p, mask),
                            _mm256_castsi256_ps(mask));
}

USERIP_AVX2 inline void store(float* p, int64_t left, __m256 x) {
    left >= 8 ? _mm256_storeu_ps(p, x) : _mm256_maskstore_ps(p, first_lanes(left), x);
}

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
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) {
        reinterpret_cast<float*>(nll)[r] =
            row(reinterpret_cast<float*>(logits) + r * vocab, vocab,
                reinterpret_cast<const float*>(bias), softcap, targets[r],
                reinterpret_cast<const float*>(weight)[r], need_grad);
    }
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
    m.def("cross_entropy_rows", &cross_entropy_rows, py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast

#else  // other processors run the reference

void userip_fast::bind_cross_entropy(py::module_&) {}

#endif
