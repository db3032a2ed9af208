// Decoding and multiplying of nf4.cpp, once per instruction set. Products are summed in sixteen
// lanes whatever a vector holds, so all sets give the same bits.

// How a value leaves the decoder. `Rounded<T>` keeps fp32 storage but the precision of T, which is
// what a product in T with fp32 accumulation reads. Scales are finite, so no NaN comes here.
struct StoreFloat {
    using Out = float;
    static void put(float* out, Vec x) { store(out, kLanes, x); }
};

struct StoreBf16 {
    using Out = uint16_t;
    static void put(uint16_t* out, Vec x) { store_bf16(out, x); }
};
struct StoreFp16 {
    using Out = uint16_t;
    static void put(uint16_t* out, Vec x) { store_fp16(out, x); }
};
struct StoreRoundedBf16 {
    using Out = float;
    static void put(float* out, Vec x) { store(out, kLanes, as_bf16(x)); }
};
struct StoreRoundedFp16 {
    using Out = float;
    static void put(float* out, Vec x) { store(out, kLanes, as_fp16(x)); }
};

#if USERIP_WIDE

// 64 levels from 32 bytes. Every lane gets the four bytes its code is in, shifts it to the front,
// and picks its level out of a register of 16.
constexpr int64_t kStep = 64;
inline void levels(const uint8_t* packed, Vec* out) {
    const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i bytes =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    const __m512i by = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const Vec table = _mm512_loadu_ps(kLevels);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        const __m512i at = _mm512_add_epi32(order, _mm512_set1_epi32(2 * q));
        const __m512i code = _mm512_srlv_epi32(_mm512_permutexvar_epi32(at, bytes), by);
        out[q] = _mm512_permutexvar_ps(code, table);  // which looks at four bits
    }
}

#else

// 32 levels from 16 bytes: one vpshufb per byte of the float (a table of 16), and the four planes
// interleaved. The bytes are dealt to the halves of the register so that interleaving, which works
// within a half, ends with consecutive values.
constexpr int64_t kStep = 32;
inline void levels(const uint8_t* packed, Vec* out) {
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
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// 16-bit values of a block: its sixteen are rounded once and looked up byte by byte, not their
// levels.
struct HalfTable {
    __m256i low, high;  // the bytes of each, twice

    template <class Store>
    static HalfTable of(Vec scale) {
        uint16_t values[16];
        Store::put(values, mul(load(kLevels), scale));
        Store::put(values + 8, mul(load(kLevels + 8), scale));
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8));
        const __m128i byte = _mm_set1_epi16(0xff);
        const __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
        const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
        return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
    }

    // 32 values from 16 bytes, dealt so that interleaving within halves ends with consecutive ones.
    void put(const uint8_t* packed, uint16_t* out) const {
        const __m256i twice =
            _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11,  //
                             4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15);
        const __m256i bytes = _mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))),
            twice);
        const __m256i even =
            _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f));
        const __m256i odd = _mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00));
        const __m256i code = _mm256_or_si256(even, odd);
        const __m256i l = _mm256_shuffle_epi8(low, code), h = _mm256_shuffle_epi8(high, code);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi8(l, h));
    }
};

#endif

// Codes [begin, begin + count) of the flattened weight, count <= kMaxDecode.
template <class Store>
void decode(const Weight& w, int64_t begin, int64_t count, typename Store::Out* out) {
    float scales[kMaxDecode / kMinBlock + 1];
    const int64_t first = begin / w.blocksize, end = begin + count;
    block_scales(w, first, (end - 1) / w.blocksize - first + 1, scales);
    auto one = [&](int64_t i, float scale) {  // the ends of a run, through a vector
        const float value = kLevels[code_at(w, i)] * scale;
        typename Store::Out lanes[kLanes];
        Store::put(lanes, splat(value));
        *out++ = lanes[0];
    };
    for (int64_t i = begin, block = 0; i < end; ++block) {
        const int64_t stop = std::min(end, (first + block + 1) * w.blocksize);
        const float scale = scales[block];
        if (i % 2 == 1) one(i++, scale);
        const Vec all = splat(scale);
#if !USERIP_WIDE
        if constexpr (sizeof(typename Store::Out) == 2) {
            const auto table = HalfTable::of<Store>(all);
            for (; i + kStep <= stop; i += kStep, out += kStep) table.put(w.packed + i / 2, out);
        }
#endif
        for (; i + kStep <= stop; i += kStep, out += kStep) {
            Vec level[kStep / kLanes];
            levels(w.packed + i / 2, level);
            for (int64_t q = 0; q < kStep / kLanes; ++q) {
                Store::put(out + q * kLanes, mul(level[q], all));
            }
        }
        while (i < stop) one(i++, scale);
    }
}

// Forward for few rows of x: kRows rows of W at a time, kDepth columns of them decoded into L1 and
// multiplied with rows of x, as many of either at once as there are registers for their sums.
constexpr int kManyX = USERIP_REGISTERS == 32 && USERIP_WIDE ? 6 : 3;
constexpr int kManyW = USERIP_WIDE || USERIP_REGISTERS == 32 ? 4 : 2;

// Of B rows of x and R of W; sums: [B][kRows][16].
template <int B, int R>
void dot_tile(const float* x, int64_t ldx, const float* w, int64_t depth, float* sums) {
    Vec acc[B][R][kVecs];
    const auto at = [&](int b, int r, int v) {
        return sums + (b * kRows + r) * kSixteen + v * kLanes;
    };
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kVecs; ++v) acc[b][r][v] = load(at(b, r, v));
        }
    }
    const auto columns = [&](int64_t k, int64_t left, int v) {
        Vec wk[R];
        for (int r = 0; r < R; ++r) wk[r] = load(w + r * kDepth + k, left, 0.0f);
        for (int b = 0; b < B; ++b) {
            const Vec xk = load(x + b * ldx + k, left, 0.0f);
            for (int r = 0; r < R; ++r) acc[b][r][v] = fma(xk, wk[r], acc[b][r][v]);
        }
    };
    int64_t k = 0;
    for (; k + kSixteen <= depth; k += kSixteen) {
        for (int v = 0; v < kVecs; ++v) columns(k + v * kLanes, kLanes, v);
    }
    for (int v = 0; v < kVecs; ++v) {
        if (k + v * kLanes < depth) columns(k + v * kLanes, depth - k - v * kLanes, v);
    }
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kVecs; ++v) store(at(b, r, v), kLanes, acc[b][r][v]);
        }
    }
}

inline float sum_of(const float* p) {
    __m128 s = _mm_setzero_ps();
    for (int64_t i = 0; i < kSixteen; i += 4) s = _mm_add_ps(s, _mm_loadu_ps(p + i));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// y of W's rows [n0, n0 + kRows); `sums` has room for [batch][kRows][16].
template <class Store>
void linear_rows(const Weight& w, const float* x, int64_t ldx, int64_t batch, const float* bias,
                 float* y, int64_t n0, float* sums) {
    alignas(64) float tile[kRows * kDepth];
    const int64_t rows = std::min(kRows, w.rows - n0);
    std::fill_n(sums, batch * kRows * kSixteen, 0.0f);
    if (rows < kRows) std::fill_n(tile, kRows * kDepth, 0.0f);
    for (int64_t k0 = 0; k0 < w.cols; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, w.cols - k0);
        for (int64_t r = 0; r < rows; ++r) {
            decode<Store>(w, (n0 + r) * w.cols + k0, depth, tile + r * kDepth);
        }
        int64_t b = 0;
        for (; b + kManyX <= batch; b += kManyX) {
            for (int r = 0; r < kRows; r += kManyW) {
                dot_tile<kManyX, kManyW>(x + b * ldx + k0, ldx, tile + r * kDepth, depth,
                                         sums + (b * kRows + r) * kSixteen);
            }
        }
        for (; b < batch; ++b) {
            dot_tile<1, kRows>(x + b * ldx + k0, ldx, tile, depth, sums + b * kRows * kSixteen);
        }
    }
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t r = 0; r < rows; ++r) {
            const float dot = sum_of(sums + (b * kRows + r) * kSixteen);
            y[b * w.rows + n0 + r] = bias == nullptr ? dot : dot + bias[n0 + r];
        }
    }
}

inline Kernels kernels() {
    return {
        {decode<StoreFloat>, decode<StoreRoundedBf16>, decode<StoreRoundedFp16>},
        {decode<StoreBf16>, decode<StoreFp16>},
        {linear_rows<StoreFloat>, linear_rows<StoreRoundedBf16>, linear_rows<StoreRoundedFp16>}};
}
