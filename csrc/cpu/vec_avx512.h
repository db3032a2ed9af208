// fp32 vectors of sixteen; see vec_avx2.h.
typedef __m512 Vec;
typedef __mmask16 Lanes;
constexpr int64_t kLanes = 16;

inline Vec splat(float x) {
    return _mm512_set1_ps(x);
}
inline Vec add(Vec a, Vec b) {
    return _mm512_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
    return _mm512_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
    return _mm512_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
    return _mm512_div_ps(a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Vec fnma(Vec a, Vec b, Vec c) {
    return _mm512_fnmadd_ps(a, b, c);
}
inline Vec greatest(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
inline Vec least(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
inline Vec nearest_integer(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec power_of_two(Vec n) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Vec exponent(Vec x) {
    const __m512i n = _mm512_srli_epi32(_mm512_castps_si512(x), 23);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(n, _mm512_set1_epi32(127)));
}
inline Vec mantissa(Vec x) {
    const __m512i m = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffff));
    return _mm512_castsi512_ps(_mm512_or_si512(m, _mm512_set1_epi32(0x3f800000)));
}
inline Vec zero_where_less(Vec x, Vec bound, Vec value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), value);
}
inline Vec where_less(Vec x, Vec bound, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), no, yes);
}
inline Lanes first_lanes(int64_t left) {
    return static_cast<Lanes>((1u << left) - 1);
}
inline Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline Vec load(const float* p, int64_t left, float other) {
    return left >= kLanes ? load(p) : _mm512_mask_loadu_ps(splat(other), first_lanes(left), p);
}
inline void store(float* p, int64_t left, Vec x) {
    left >= kLanes ? _mm512_storeu_ps(p, x) : _mm512_mask_storeu_ps(p, first_lanes(left), x);
}
inline __m512i bf16_above(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline __m256i fp16_of(Vec x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
inline void store_bf16(uint16_t* p, Vec x) {
    const __m512i high = _mm512_srli_epi32(bf16_above(x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
inline void store_fp16(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), fp16_of(x));
}
inline Vec as_bf16(Vec x) {
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_above(x), _mm512_set1_epi32(~0xffff)));
}
inline Vec as_fp16(Vec x) {
    return _mm512_cvtph_ps(fp16_of(x));
}
template <class Join>
inline __m256 fold(const Vec (&v)[1], const Join& join) {
    return join(_mm512_castps512_ps256(v[0]), _mm512_extractf32x8_ps(v[0], 1));
}

inline void add_wide(double* to, const double* from, Vec x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(from), low));
    _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(from + 8), high));
}
inline Vec narrow_difference(const double* x, double high) {
    const __m512d h = _mm512_set1_pd(high);
    const __m256 low = _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_loadu_pd(x), h));
    const __m256 rest = _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_loadu_pd(x + 8), h));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), rest, 1);
}
inline double greatest_of(const double* x, int64_t n) {
    __m512d top = _mm512_max_pd(_mm512_loadu_pd(x), _mm512_loadu_pd(x + 8));
    for (int64_t k = 16; k < n; k += 8) top = _mm512_max_pd(top, _mm512_loadu_pd(x + k));
    return _mm512_reduce_max_pd(top);
}
constexpr int64_t kNumbers = 8;
inline bool all_within(const int64_t* p, int64_t last) {  // a negative one is a large one
    return _mm512_cmpgt_epu64_mask(_mm512_loadu_si512(p), _mm512_set1_epi64(last)) == 0;
}
