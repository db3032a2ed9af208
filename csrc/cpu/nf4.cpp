// NF4 on CPU: dequantise, and the linear layer for few rows with the decoding fused in. The format
// is described in userip_fast/ops/nf4_format.py.
//
// A level is looked up as its exact fp32 value, so level * scale has the bits of the reference.
#include "bindings.h"

#if defined(__x86_64__)

#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "nf4_format.h"

namespace userip_fast {
namespace {

using namespace nf4;

constexpr int64_t kMaxDecode = 4096;  // codes per decode() call: bounds the scales on its stack

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

constexpr int64_t kRows = 4, kDepth = 1024;  // of the tile of W that the few-rows product is at

// What is compiled once per instruction set, by dtype: 0 float32, 1 bfloat16, 2 float16.
using Decode = void(const Weight& w, int64_t begin, int64_t count, float* out);
using DecodeHalf = void(const Weight& w, int64_t begin, int64_t count, uint16_t* out);
using LinearRows = void(const Weight& w, const float* x, int64_t ldx, int64_t batch,
                        const float* bias, float* y, int64_t n0, float* sums);
struct Kernels {
    Decode* decode[3];
    DecodeHalf* decode_half[2];  // of 1 and 2
    LinearRows* linear[3];
};

#define USERIP_TEXT "cpu/nf4_isa.h"
#include "cpu/every_isa.h"

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
template <class Out>
void dequantize(const Weight& w, int64_t r0, int64_t r1, int64_t c0, int64_t c1, Out* out,
                void (*decode)(const Weight&, int64_t, int64_t, Out*)) {
    const int64_t width = c1 - c0;
    advise_huge_pages(out, (r1 - r0) * width * sizeof(*out));
    if (width == w.cols) {  // one run of codes: cut where it balances
        const int64_t begin = r0 * w.cols, total = (r1 - r0) * w.cols;
        threads::parallel_runs(total, 1, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; i += kMaxDecode) {
                decode(w, begin + i, std::min(kMaxDecode, to - i), out + i);
            }
        });
        return;
    }
    threads::parallel_runs(r1 - r0, width, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r) {
            for (int64_t c = 0; c < width; c += kMaxDecode) {
                decode(w, (r0 + r) * w.cols + c0 + c, std::min(kMaxDecode, width - c),
                       out + r * width + c);
            }
        }
    });
}

// x: [batch, ldx].
void linear(const Weight& w, const float* x, int64_t ldx, int64_t batch, const float* bias,
            float* y, LinearRows* linear_rows) {
    const int64_t groups = (w.rows + kRows - 1) / kRows;
    threads::parallel_runs(groups, kRows * w.cols * (2 + batch) / 2, [&](int64_t from, int64_t to) {
        std::vector<float> sums(batch * kRows * 16);
        for (int64_t g = from; g < to; ++g) {
            linear_rows(w, x, ldx, batch, bias, y, g * kRows, sums.data());
        }
    });
}

void nf4_dequantize(const Addresses& addresses, const Sizes& sizes, int64_t r0, int64_t r1,
                    int64_t c0, int64_t c1, uintptr_t out, int dtype, bool as_float) {
    const Weight w = weight_from(addresses, sizes, dtype);
    USERIP_CHECK(0 <= r0 && r0 <= r1 && r1 <= w.rows, "rows", "a range of the weight's", r1);
    USERIP_CHECK(0 <= c0 && c0 <= c1 && c1 <= w.cols, "columns", "a range of the weight's", c1);
    auto* wide = reinterpret_cast<float*>(out);
    auto* half = reinterpret_cast<uint16_t*>(out);
    const Kernels k = USERIP_OF_SET(kNf4, kernels)();
    if (dtype == 0 || as_float) {
        dequantize(w, r0, r1, c0, c1, wide, k.decode[dtype]);
    } else {
        dequantize(w, r0, r1, c0, c1, half, k.decode_half[dtype - 1]);
    }
}

void nf4_linear(const Addresses& addresses, const Sizes& sizes, uintptr_t x, int64_t ldx,
                int64_t batch, uintptr_t bias, uintptr_t y, int dtype) {
    const Weight w = weight_from(addresses, sizes, dtype);
    USERIP_CHECK(ldx >= w.cols, "ldx", "at least cols", ldx);
    linear(w, reinterpret_cast<const float*>(x), ldx, batch, reinterpret_cast<const float*>(bias),
           reinterpret_cast<float*>(y), USERIP_OF_SET(kNf4, kernels)().linear[dtype]);
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
