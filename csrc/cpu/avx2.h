// fp32 vectors of eight: exponential, hyperbolic tangent, and loads and stores that end with a row.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define USERIP_AVX2 __attribute__((target("avx2,fma")))

namespace userip_fast {

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

}  // namespace userip_fast
