// NF4 on CPU: dequantise, and the linear layer for few rows with the decoding fused in. The format
// is described in userip_fast/nf4.py.
//
// A level is looked up as its exact fp32 value, so level * scale has the bits of the reference.
#include "bindings.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/threads.h"

#define USERIP_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace userip_fast {
namespace {

constexpr int64_t kNestedBlock = 256;
constexpr int64_t kMaxDecode = 4096;  // codes per decode() call: bounds the scales on its stack
constexpr int64_t kMinBlock = 32;

alignas(32) constexpr float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Byte b of level i at plane[b][i].
struct LevelBytes {
    alignas(16) uint8_t plane[4][16];
    constexpr LevelBytes() : plane() {
        for (int i = 0; i < 16; ++i) {
            const auto bits = std::bit_cast<uint32_t>(kLevels[i]);
            for (int b = 0; b < 4; ++b) plane[b][i] = static_cast<uint8_t>(bits >> (8 * b));
        }
    }
};
constexpr LevelBytes kLevelBytes;

struct Weight {
    const uint8_t* packed;
    const void* absmax;  // float, or uint8_t with nested_absmax
    const float* nested_absmax;
    const float* nested_map;
    const float* offset;
    int64_t rows, cols, blocksize;
};

// Not inlined into the FMA code below: there a compiler may join the product and the sum, and the
// bits would differ from the reference's two roundings.
__attribute__((noinline)) void block_scales(const Weight& w, int64_t first, int64_t count,
                                            float* out) {
    if (w.nested_absmax == nullptr) {
        std::copy_n(static_cast<const float*>(w.absmax) + first, count, out);
        return;
    }
    const auto* codes = static_cast<const uint8_t*>(w.absmax) + first;
    const float offset = *w.offset;
    for (int64_t i = 0; i < count; ++i) {
        out[i] = w.nested_map[codes[i]] * w.nested_absmax[(first + i) / kNestedBlock] + offset;
    }
}

// How a value leaves the decoder. `Rounded<T>` keeps fp32 storage but the precision of T, which is
// what a product in T with fp32 accumulation reads.
struct StoreFloat {
    using Out = float;
    USERIP_AVX2 static void store(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
};

// Round to nearest even on the upper 16 bits. Scales are finite, so no NaN comes here.
USERIP_AVX2 inline __m256i round_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

struct StoreBf16 {
    using Out = uint16_t;
    USERIP_AVX2 static void store(uint16_t* out, __m256 x) {
        const __m256i high = _mm256_srli_epi32(round_bf16(x), 16);
        const __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    }
};

struct StoreFp16 {
    using Out = uint16_t;
    USERIP_AVX2 static void store(uint16_t* out, __m256 x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
};

struct StoreRoundedBf16 {
    using Out = float;
    USERIP_AVX2 static void store(float* out, __m256 x) {
        const __m256i kept = _mm256_and_si256(round_bf16(x), _mm256_set1_epi32(~0xffff));
        _mm256_storeu_ps(out, _mm256_castsi256_ps(kept));
    }
};

struct StoreRoundedFp16 {
    using Out = float;
    USERIP_AVX2 static void store(float* out, __m256 x) {
        _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)));
    }
};

// 32 levels from 16 bytes: one vpshufb per byte of the float (a table of 16), and the four planes
// interleaved. The bytes are dealt to the halves of the register so that interleaving, which works
// within a half, ends with consecutive values.
USERIP_AVX2 inline void levels_of_32(const uint8_t* packed, __m256* levels) {
    const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                           2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    const __m256i bytes = _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))),
        twice);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f));
    const __m256i odd = _mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00));
    const __m256i code = _mm256_or_si256(even, odd);
    __m256i plane[4];
    for (int b = 0; b < 4; ++b) {
        const auto* table = reinterpret_cast<const __m128i*>(kLevelBytes.plane[b]);
        plane[b] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(table)), code);
    }
    const __m256i low0 = _mm256_unpacklo_epi8(plane[0], plane[1]);
    const __m256i low1 = _mm256_unpackhi_epi8(plane[0], plane[1]);
    const __m256i high0 = _mm256_unpacklo_epi8(plane[2], plane[3]);
    const __m256i high1 = _mm256_unpackhi_epi8(plane[2], plane[3]);
    levels[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    levels[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    levels[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    levels[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// Codes [begin, begin + count) of the flattened weight, count <= kMaxDecode.
template <class Store>
USERIP_AVX2 void decode(const Weight& w, int64_t begin, int64_t count, typename Store::Out* out) {
    float scales[kMaxDecode / kMinBlock + 1];
    const int64_t first = begin / w.blocksize, end = begin + count;
    block_scales(w, first, (end - 1) / w.blocksize - first + 1, scales);
    auto one = [&](int64_t i, float scale) USERIP_AVX2 {  // the ends of a run, through a vector
        const uint8_t byte = w.packed[i / 2];
        const float value = kLevels[i % 2 == 0 ? byte >> 4 : byte & 15] * scale;
        typename Store::Out lanes[8];
        Store::store(lanes, _mm256_set1_ps(value));
        *out++ = lanes[0];
    };
    for (int64_t i = begin, block = 0; i < end; ++block) {
        const int64_t stop = std::min(end, (first + block + 1) * w.blocksize);
        const float scale = scales[block];
        if (i % 2 == 1) one(i++, scale);
        const __m256 scale8 = _mm256_set1_ps(scale);
        for (; i + 32 <= stop; i += 32, out += 32) {
            __m256 levels[4];
            levels_of_32(w.packed + i / 2, levels);
            for (int q = 0; q < 4; ++q) {
                Store::store(out + 8 * q, _mm256_mul_ps(levels[q], scale8));
            }
        }
        while (i < stop) one(i++, scale);
    }
}

// Asks for 2 MiB pages under an output larger than malloc recycles: that is fresh memory, and
// touching it in 4 KiB pages takes several times as long as the decoding.
void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
    if (bytes >= 32 << 20) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// out[r - r0][c - c0] = W[r][c], rows of `out` c1 - c0 apart.
template <class Store>
void dequantize(const Weight& w, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                typename Store::Out* out) {
    const int64_t width = c1 - c0;
    advise_huge_pages(out, (r1 - r0) * width * sizeof(*out));
    if (width == w.cols) {  // one run of codes: cut where it balances
        const int64_t begin = r0 * w.cols, total = (r1 - r0) * w.cols;
        threads::parallel_runs(total, 1, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; i += kMaxDecode) {
                decode<Store>(w, begin + i, std::min(kMaxDecode, to - i), out + i);
            }
        });
        return;
    }
    threads::parallel_runs(r1 - r0, width, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r) {
            for (int64_t c = 0; c < width; c += kMaxDecode) {
                decode<Store>(w, (r0 + r) * w.cols + c0 + c, std::min(kMaxDecode, width - c),
                              out + r * width + c);
            }
        }
    });
}

USERIP_AVX2 inline float sum8(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Forward for few rows of x. A thread takes kRows rows of W at a time, decodes kDepth columns of
// them into L1 and multiplies them with every row of x, kBatch at once (12 sums in registers).
constexpr int64_t kRows = 4, kBatch = 3, kDepth = 1024;

template <int B>
USERIP_AVX2 void dot_tile(const float* x, int64_t ldx, const float* w, int64_t depth,
                          float* sums /* [B][kRows][8] */) {
    __m256 acc[B][kRows];
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < kRows; ++r) acc[b][r] = _mm256_loadu_ps(sums + (b * kRows + r) * 8);
    }
    for (int64_t k = 0; k < depth; k += 8) {
        __m256 wk[kRows];
        for (int r = 0; r < kRows; ++r) wk[r] = _mm256_load_ps(w + r * kDepth + k);
        for (int b = 0; b < B; ++b) {
            const __m256 xk = _mm256_loadu_ps(x + b * ldx + k);
            for (int r = 0; r < kRows; ++r) acc[b][r] = _mm256_fmadd_ps(xk, wk[r], acc[b][r]);
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(sums + (b * kRows + r) * 8, acc[b][r]);
    }
}

template <class Store>
USERIP_AVX2 void linear_rows(const Weight& w, const float* x, int64_t ldx, int64_t batch,
                             const float* bias, float* y, int64_t n0, std::vector<float>& sums) {
    alignas(32) float tile[kRows * kDepth];
    const int64_t rows = std::min(kRows, w.rows - n0);
    std::fill_n(sums.begin(), batch * kRows * 8, 0.0f);
    if (rows < kRows) std::fill_n(tile, kRows * kDepth, 0.0f);
    for (int64_t k0 = 0; k0 < w.cols; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, w.cols - k0), padded = (depth + 7) / 8 * 8;
        for (int64_t r = 0; r < rows; ++r) {
            decode<Store>(w, (n0 + r) * w.cols + k0, depth, tile + r * kDepth);
            std::fill(tile + r * kDepth + depth, tile + r * kDepth + padded, 0.0f);
        }
        int64_t b = 0;
        for (; b + kBatch <= batch; b += kBatch) {
            dot_tile<kBatch>(x + b * ldx + k0, ldx, tile, padded, &sums[b * kRows * 8]);
        }
        for (; b < batch; ++b) {
            dot_tile<1>(x + b * ldx + k0, ldx, tile, padded, &sums[b * kRows * 8]);
        }
    }
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t r = 0; r < rows; ++r) {
            const float dot = sum8(_mm256_loadu_ps(&sums[(b * kRows + r) * 8]));
            y[b * w.rows + n0 + r] = bias == nullptr ? dot : dot + bias[n0 + r];
        }
    }
}

// x: [batch, ldx] with ldx a multiple of 8 and zeros past cols, so that no tail is needed.
template <class Store>
void linear(const Weight& w, const float* x, int64_t ldx, int64_t batch, const float* bias,
            float* y) {
    const int64_t groups = (w.rows + kRows - 1) / kRows;
    threads::parallel_runs(groups, kRows * w.cols * (2 + batch) / 2, [&](int64_t from, int64_t to) {
        std::vector<float> sums(batch * kRows * 8);
        for (int64_t g = from; g < to; ++g) {
            linear_rows<Store>(w, x, ldx, batch, bias, y, g * kRows, sums);
        }
    });
}

// What Python passes: addresses of (packed, absmax, nested_absmax, nested_map, offset), the last
// three 0 without double quantisation; and (rows, cols, blocksize).
using Addresses = std::array<uintptr_t, 5>;
using Sizes = std::array<int64_t, 3>;

Weight weight_from(const Addresses& a, const Sizes& s) {
    USERIP_CHECK(a[0] != 0 && a[1] != 0, "weight", "addresses", 0);
    USERIP_CHECK((a[2] == 0) == (a[3] == 0) && (a[2] == 0) == (a[4] == 0), "nested scales",
                 "all three addresses or none", "some");
    USERIP_CHECK(s[0] > 0 && s[1] > 0, "rows, cols", "positive", std::min(s[0], s[1]));
    USERIP_CHECK(s[2] >= kMinBlock, "blocksize", "at least 32", s[2]);
    return {reinterpret_cast<const uint8_t*>(a[0]),
            reinterpret_cast<const void*>(a[1]),
            reinterpret_cast<const float*>(a[2]),
            reinterpret_cast<const float*>(a[3]),
            reinterpret_cast<const float*>(a[4]),
            s[0],
            s[1],
            s[2]};
}

// dtype of a weight value: 0 float32, 1 bfloat16, 2 float16.
void nf4_dequantize(const Addresses& addresses, const Sizes& sizes, int64_t r0, int64_t r1,
                    int64_t c0, int64_t c1, uintptr_t out, int dtype, bool as_float) {
    const Weight w = weight_from(addresses, sizes);
    USERIP_CHECK(0 <= r0 && r0 <= r1 && r1 <= w.rows, "rows", "a range of the weight's", r1);
    USERIP_CHECK(0 <= c0 && c0 <= c1 && c1 <= w.cols, "columns", "a range of the weight's", c1);
    auto* wide = reinterpret_cast<float*>(out);
    auto* half = reinterpret_cast<uint16_t*>(out);
    if (dtype == 0) {
        dequantize<StoreFloat>(w, r0, r1, c0, c1, wide);
    } else if (dtype == 1) {
        as_float ? dequantize<StoreRoundedBf16>(w, r0, r1, c0, c1, wide)
                 : dequantize<StoreBf16>(w, r0, r1, c0, c1, half);
    } else {
        USERIP_CHECK(dtype == 2, "dtype", "0, 1 or 2", dtype);
        as_float ? dequantize<StoreRoundedFp16>(w, r0, r1, c0, c1, wide)
                 : dequantize<StoreFp16>(w, r0, r1, c0, c1, half);
    }
}

void nf4_linear(const Addresses& addresses, const Sizes& sizes, uintptr_t x, int64_t ldx,
                int64_t batch, uintptr_t bias, uintptr_t y, int dtype) {
    const Weight w = weight_from(addresses, sizes);
    USERIP_CHECK(ldx >= w.cols && ldx % 8 == 0, "ldx", "cols, rounded up to 8", ldx);
    USERIP_CHECK(0 <= dtype && dtype <= 2, "dtype", "0, 1 or 2", dtype);
    constexpr auto run =
        std::array{linear<StoreFloat>, linear<StoreRoundedBf16>, linear<StoreRoundedFp16>};
    run[dtype](w, reinterpret_cast<const float*>(x), ldx, batch,
               reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(y));
}

}  // namespace

void bind_nf4(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("nf4_dequantize", &nf4_dequantize, release());
    m.def("nf4_linear", &nf4_linear, release());
}

}  // namespace userip_fast

#else  // other processors run the reference

void userip_fast::bind_nf4(py::module_&) {}

#endif
