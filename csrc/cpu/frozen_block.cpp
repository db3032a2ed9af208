// The element-wise parts of a frozen transformer block in fp32: RMSNorm (with the residual sum),
// the gated activation, and RoPE; each forward and for the gradient of its inputs. Formulas are in
// userip_fast/ops/frozen_block.py. A thread owns whole rows, so results do not depend on their
// number.
#include "bindings.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "check.h"
#include "cpu/avx2.h"
#include "cpu/threads.h"

namespace userip_fast {
namespace {

USERIP_AVX2 inline float sum8(__m256 x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    float out = 0.0f;
    for (float lane : lanes) out += lane;
    return out;
}

USERIP_AVX2 float norm_row(const float* x, const float* residual, const float* weight, float* y,
                           float* total, int64_t dim, float eps, float offset) {
    __m256 squares = _mm256_setzero_ps();
    for (int64_t k = 0; k < dim; k += 8) {
        __m256 v = load(x + k, dim - k, 0.0f);
        if (residual != nullptr) {
            v = _mm256_add_ps(v, load(residual + k, dim - k, 0.0f));
            store(total + k, dim - k, v);
        }
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    const float rstd = 1.0f / std::sqrt(sum8(squares) / static_cast<float>(dim) + eps);
    const __m256 scale = _mm256_set1_ps(rstd), shift = _mm256_set1_ps(offset);
    const float* source = residual == nullptr ? x : total;
    for (int64_t k = 0; k < dim; k += 8) {
        const __m256 w = _mm256_add_ps(load(weight + k, dim - k, 0.0f), shift);
        const __m256 v = _mm256_mul_ps(load(source + k, dim - k, 0.0f), scale);
        store(y + k, dim - k, _mm256_mul_ps(v, w));
    }
    return rstd;
}

USERIP_AVX2 void norm_row_backward(const float* dy, const float* d_total, const float* x,
                                   float rstd, const float* weight, float* dx, int64_t dim,
                                   float offset) {
    const __m256 scale = _mm256_set1_ps(rstd), shift = _mm256_set1_ps(offset);
    __m256 dot = _mm256_setzero_ps();
    for (int64_t k = 0; k < dim; k += 8) {
        const __m256 w = _mm256_add_ps(load(weight + k, dim - k, 0.0f), shift);
        const __m256 g = _mm256_mul_ps(load(dy + k, dim - k, 0.0f), w);
        dot = _mm256_fmadd_ps(g, _mm256_mul_ps(load(x + k, dim - k, 0.0f), scale), dot);
    }
    const __m256 mean = _mm256_set1_ps(sum8(dot) / static_cast<float>(dim));
    for (int64_t k = 0; k < dim; k += 8) {
        const __m256 w = _mm256_add_ps(load(weight + k, dim - k, 0.0f), shift);
        const __m256 g = _mm256_mul_ps(load(dy + k, dim - k, 0.0f), w);
        const __m256 unit = _mm256_mul_ps(load(x + k, dim - k, 0.0f), scale);
        __m256 d = _mm256_mul_ps(scale, _mm256_fnmadd_ps(unit, mean, g));
        if (d_total != nullptr) d = _mm256_add_ps(d, load(d_total + k, dim - k, 0.0f));
        store(dx + k, dim - k, d);
    }
}

// Value and slope of the activation at g.
struct Silu {
    USERIP_AVX2 static void at(__m256 g, __m256& value, __m256& slope) {
        const __m256 one = _mm256_set1_ps(1.0f);
        const __m256 sigmoid =
            _mm256_div_ps(one, _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), g))));
        value = _mm256_mul_ps(g, sigmoid);
        slope = _mm256_mul_ps(sigmoid, _mm256_fmadd_ps(g, _mm256_sub_ps(one, sigmoid), one));
    }
};

struct GeluTanh {
    USERIP_AVX2 static void at(__m256 g, __m256& value, __m256& slope) {
        const __m256 one = _mm256_set1_ps(1.0f), half = _mm256_set1_ps(0.5f);
        const __m256 c = _mm256_set1_ps(0.7978845608f), cubic = _mm256_set1_ps(0.044715f);
        const __m256 g2 = _mm256_mul_ps(g, g);
        const __m256 inner = _mm256_mul_ps(_mm256_mul_ps(c, g), _mm256_fmadd_ps(cubic, g2, one));
        const __m256 t = tanh8(inner);
        const __m256 rise = _mm256_mul_ps(half, _mm256_add_ps(one, t));
        value = _mm256_mul_ps(g, rise);
        const __m256 inner_slope =
            _mm256_mul_ps(c, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(3.0f), cubic), g2, one));
        const __m256 fall = _mm256_mul_ps(_mm256_mul_ps(half, g), _mm256_fnmadd_ps(t, t, one));
        slope = _mm256_fmadd_ps(fall, inner_slope, rise);
    }
};

constexpr int64_t kChunk = 4096;  // values a thread takes at a time

template <class Act>
USERIP_AVX2 void gate_chunk(const float* gate, const float* up, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        __m256 value, slope;
        Act::at(load(gate + i, n - i, 0.0f), value, slope);
        store(y + i, n - i, _mm256_mul_ps(value, load(up + i, n - i, 0.0f)));
    }
}

template <class Act>
USERIP_AVX2 void gate_chunk_backward(const float* dy, const float* gate, const float* up,
                                     float* d_gate, float* d_up, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        __m256 value, slope;
        Act::at(load(gate + i, n - i, 0.0f), value, slope);
        const __m256 d = load(dy + i, n - i, 0.0f);
        const __m256 du = _mm256_mul_ps(d, value);
        const __m256 dg = _mm256_mul_ps(_mm256_mul_ps(d, load(up + i, n - i, 0.0f)), slope);
        store(d_up + i, n - i, du);
        store(d_gate + i, n - i, dg);
    }
}

USERIP_AVX2 void rotate(const float* x, const float* cosine, const float* sine, float* y,
                        int64_t half, float sign) {
    const __m256 turn = _mm256_set1_ps(sign);
    for (int64_t k = 0; k < half; k += 8) {
        const int64_t left = half - k;
        const __m256 a = load(x + k, left, 0.0f), b = load(x + half + k, left, 0.0f);
        __m256 sa = load(sine + k, left, 0.0f), sb = load(sine + half + k, left, 0.0f);
        const __m256 ca = load(cosine + k, left, 0.0f), cb = load(cosine + half + k, left, 0.0f);
        if (sign < 0) std::swap(sa, sb);  // the transpose of the rotation
        sa = _mm256_mul_ps(sa, turn);
        sb = _mm256_mul_ps(sb, turn);
        store(y + k, left, _mm256_fnmadd_ps(b, sa, _mm256_mul_ps(a, ca)));
        store(y + half + k, left, _mm256_fmadd_ps(a, sb, _mm256_mul_ps(b, cb)));
    }
}

template <class T = float>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const float* offset_or_null(uintptr_t address, int64_t by) {
    return address == 0 ? nullptr : at<const float>(address) + by;
}

// residual and total are 0 together.
void rms_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t total,
              uintptr_t rstd, int64_t rows, int64_t dim, float eps, float offset) {
    USERIP_CHECK((residual == 0) == (total == 0), "residual, total", "both or none", "one");
    threads::parallel_runs(rows, 2 * dim, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t i = r * dim;
            at(rstd)[r] =
                norm_row(at<const float>(x) + i, offset_or_null(residual, i), at<const float>(weight),
                         at(y) + i, total == 0 ? nullptr : at(total) + i, dim, eps, offset);
        }
    });
}

void rms_norm_backward(uintptr_t dy, uintptr_t d_total, uintptr_t x, uintptr_t rstd,
                       uintptr_t weight, uintptr_t dx, int64_t rows, int64_t dim, float offset) {
    threads::parallel_runs(rows, 3 * dim, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t i = r * dim;
            norm_row_backward(at<const float>(dy) + i, offset_or_null(d_total, i),
                              at<const float>(x) + i, at<const float>(rstd)[r], at<const float>(weight),
                              at(dx) + i, dim, offset);
        }
    });
}

// act: 0 SiLU, 1 GELU (tanh).
void gated(uintptr_t gate, uintptr_t up, uintptr_t y, int64_t values, int act) {
    USERIP_CHECK(act == 0 || act == 1, "act", "0 or 1", act);
    const auto run = act == 0 ? gate_chunk<Silu> : gate_chunk<GeluTanh>;
    threads::parallel_runs((values + kChunk - 1) / kChunk, 4 * kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kChunk; i < std::min(values, end * kChunk); i += kChunk) {
            run(at<const float>(gate) + i, at<const float>(up) + i, at(y) + i,
                std::min(kChunk, values - i));
        }
    });
}

void gated_backward(uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t d_gate, uintptr_t d_up,
                    int64_t values, int act) {
    USERIP_CHECK(act == 0 || act == 1, "act", "0 or 1", act);
    const auto run = act == 0 ? gate_chunk_backward<Silu> : gate_chunk_backward<GeluTanh>;
    threads::parallel_runs((values + kChunk - 1) / kChunk, 4 * kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kChunk; i < std::min(values, end * kChunk); i += kChunk) {
            run(at<const float>(dy) + i, at<const float>(gate) + i, at<const float>(up) + i,
                at(d_gate) + i, at(d_up) + i, std::min(kChunk, values - i));
        }
    });
}

// x [rows, heads, dim] with a row stride, y contiguous; cosine and sine [rows, dim].
void rope(uintptr_t x, int64_t row_stride, uintptr_t cosine, uintptr_t sine, uintptr_t y,
          int64_t rows, int64_t heads, int64_t dim, bool backward) {
    USERIP_CHECK(dim % 2 == 0, "dim", "even", dim);
    threads::parallel_runs(rows, 2 * heads * dim, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            for (int64_t h = 0; h < heads; ++h) {
                rotate(at<const float>(x) + r * row_stride + h * dim, at<const float>(cosine) + r * dim,
                       at<const float>(sine) + r * dim, at(y) + (r * heads + h) * dim, dim / 2,
                       backward ? -1.0f : 1.0f);
            }
        }
    });
}

}  // namespace

void bind_frozen_block(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("rms_norm", &rms_norm, release());
    m.def("rms_norm_backward", &rms_norm_backward, release());
    m.def("gated", &gated, release());
    m.def("gated_backward", &gated_backward, release());
    m.def("rope", &rope, release());
}

}  // namespace userip_fast

#else  // other processors run the reference

void userip_fast::bind_frozen_block(py::module_&) {}

#endif
