// fp32 vectors of eight, included inside a namespace (see isa.h): the names that vec_isa.h and the
// ops' texts are written in. Of both lengths every function gives a lane the same bits.
typedef __m256 Vec;
typedef __m256i Lanes;  // all or no bits of each
constexpr int64_t kLanes = 8;

inline Vec splat(float x) {
    return _mm256_set1_ps(x);
}
inline Vec add(Vec a, Vec b) {
    return _mm256_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
    return _mm256_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
    return _mm256_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
    return _mm256_div_ps(a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {  // a b + c
    return _mm256_fmadd_ps(a, b, c);
}
inline Vec fnma(Vec a, Vec b, Vec c) {  // c - a b
    return _mm256_fnmadd_ps(a, b, c);
}
inline Vec greatest(Vec a, Vec b) {  // b where either is NaN
    return _mm256_max_ps(a, b);
}
inline Vec least(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
inline Vec nearest_integer(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec power_of_two(Vec n) {  // 2^n of integers
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec exponent(Vec x) {  // n of x = m 2^n, 1 <= m < 2, of a positive normal number
    const __m256i n = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(n, _mm256_set1_epi32(127)));
}
inline Vec mantissa(Vec x) {  // and m
    const __m256i m = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffff));
    return _mm256_castsi256_ps(_mm256_or_si256(m, _mm256_set1_epi32(0x3f800000)));
}
inline Vec zero_where_less(Vec x, Vec bound, Vec value) {  // value, but 0 where x < bound
    return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), value);
}
inline Vec where_less(Vec x, Vec bound, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
}
// Lanes [0, left) of a vector that runs past the end of a row; the others are `other`.
inline Lanes first_lanes(int64_t left) {
    const Lanes lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), lane);
}
inline Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline Vec load(const float* p, int64_t left, float other) {
    if (left >= kLanes) return load(p);
    const Lanes mask = first_lanes(left);
    return _mm256_blendv_ps(splat(other), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
inline void store(float* p, int64_t left, Vec x) {
    left >= kLanes ? _mm256_storeu_ps(p, x) : _mm256_maskstore_ps(p, first_lanes(left), x);
}
// Rounded to nearest even, of finite numbers: in 16 bits, or in fp32 with their precision.
inline __m256i bf16_above(Vec x) {  // in the upper 16 bits
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline __m128i fp16_of(Vec x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
inline void store_bf16(uint16_t* p, Vec x) {
    const __m256i high = _mm256_srli_epi32(bf16_above(x), 16);
    const __m128i low = _mm256_castsi256_si128(high), rest = _mm256_extracti128_si256(high, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, rest));
}
inline void store_fp16(uint16_t* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), fp16_of(x));
}
inline Vec as_bf16(Vec x) {
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_above(x), _mm256_set1_epi32(~0xffff)));
}
inline Vec as_fp16(Vec x) {
    return _mm256_cvtph_ps(fp16_of(x));
}
// Sixteen numbers, v[0] before v[1], to eight: those eight apart are joined.
template <class Join>
inline __m256 fold(const Vec (&v)[2], const Join& join) {
    return join(v[0], v[1]);
}

// The same of as many doubles: to = from + x, and x - high rounded to fp32.
inline void add_wide(double* to, const double* from, Vec x) {
    const __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(from), _mm256_cvtps_pd(low)));
    _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(from + 4), _mm256_cvtps_pd(high)));
}
inline Vec narrow_difference(const double* x, double high) {
    const __m256d h = _mm256_set1_pd(high);
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_sub_pd(_mm256_loadu_pd(x + 4), h)),
                           _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_loadu_pd(x), h)));
}
inline double greatest_of(const double* x, int64_t n) {  // n a multiple of sixteen
    __m256d top = _mm256_loadu_pd(x);
    for (int64_t k = 4; k < n; k += 4) top = _mm256_max_pd(top, _mm256_loadu_pd(x + k));
    const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(top), _mm256_extractf128_pd(top, 1));
    return std::max(_mm_cvtsd_f64(two), _mm_cvtsd_f64(_mm_permute_pd(two, 1)));
}
// Whether all of four numbers (of eight, with AVX-512) are at least 0 and at most `last`.
constexpr int64_t kNumbers = 4;
inline bool all_within(const int64_t* p, int64_t last) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i sign = _mm256_or_si256(x, _mm256_sub_epi64(_mm256_set1_epi64x(last), x));
    return _mm256_movemask_pd(_mm256_castsi256_pd(sign)) == 0;
}
