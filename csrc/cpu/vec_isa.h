// Exponential, hyperbolic tangent and sums in the names of vec_avx2.h or vec_avx512.h, included
// after it inside the namespace of an instruction set.
//
// Sums run in sixteen lanes whatever a vector holds, and are then joined in one order: an op gives
// the same bits in every set.

constexpr int64_t kSixteen = 16, kVecs = kSixteen / kLanes;

inline float join_lanes(__m256 x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    float out = lanes[0];
    for (int i = 1; i < 8; ++i) out += lanes[i];
    return out;
}
inline float sum_lanes(const Vec (&v)[kVecs]) {
    return join_lanes(fold(v, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }));
}
inline float greatest_lane(const Vec (&v)[kVecs]) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, fold(v, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); }));
    return *std::max_element(lanes, lanes + 8);
}

// visit(v, k) for every vector of a row of n: vector v of sixteen lanes, from column k on.
template <class Visit>
inline void each(int64_t n, const Visit& visit) {
    for (int64_t k = 0; k < n; k += kSixteen) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < kVecs; ++v) {
            if (v == 0 || k + v * kLanes < n) visit(v, k + v * kLanes);
        }
    }
}

// exp(x) to about 1 ulp for x <= 88; below -87.3 it returns 0 (x = -inf included). Reduction to
// |r| <= ln2 / 2 and a degree-6 polynomial (Cephes).
inline Vec exp(Vec x) {
    const Vec clamped = least(splat(88.0f), x);  // this order keeps NaN
    const Vec n = nearest_integer(mul(clamped, splat(1.44269504f)));
    Vec r = fnma(n, splat(0.693359375f), clamped);
    r = fnma(n, splat(-2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, splat(1.0f)));
    return zero_where_less(x, splat(-87.3f), mul(p, power_of_two(n)));
}

// log(x) of normal numbers x >= 1 to about 1 ulp (Cephes): x = m 2^n with m about 1, and a
// polynomial in m - 1. Of anything else, NaN included, it is NaN or worse.
inline Vec log(Vec x) {
    const Vec root = splat(1.41421356f), one = splat(1.0f), whole = mantissa(x);
    const Vec half = mul(whole, splat(0.5f));
    const Vec m = sub(where_less(whole, root, whole, half), one);
    const Vec n = where_less(whole, root, exponent(x), add(exponent(x), one));
    const Vec m2 = mul(m, m);
    Vec p = splat(7.0376836292e-2f);
    p = fma(p, m, splat(-1.1514610310e-1f));
    p = fma(p, m, splat(1.1676998740e-1f));
    p = fma(p, m, splat(-1.2420140846e-1f));
    p = fma(p, m, splat(1.4249322787e-1f));
    p = fma(p, m, splat(-1.6668057665e-1f));
    p = fma(p, m, splat(2.0000714765e-1f));
    p = fma(p, m, splat(-2.4999993993e-1f));
    p = fma(p, m, splat(3.3333331174e-1f));
    p = mul(p, mul(m, m2));
    p = fma(n, splat(-2.12194440e-4f), p);
    p = fnma(splat(0.5f), m2, p);
    return fma(n, splat(0.693359375f), add(m, p));
}

// tanh(x): by its series where 1 - 2 / (exp(2x) + 1) would cancel.
inline Vec tanh(Vec x) {
    const Vec one = splat(1.0f), x2 = mul(x, x);
    const Vec bound = least(splat(40.0f), add(x, x));
    const Vec far = sub(one, div(splat(2.0f), add(exp(bound), one)));
    Vec p = splat(62.0f / 2835);
    p = fma(p, x2, splat(-17.0f / 315));
    p = fma(p, x2, splat(2.0f / 15));
    p = fma(p, x2, splat(-1.0f / 3));
    return where_less(x2, splat(0.09f), fma(mul(p, x2), x, x), far);
}
