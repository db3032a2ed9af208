// The element-wise parts of a frozen transformer block in fp32: RMSNorm (with the residual sum),
// the gated activation, and RoPE; each forward and for the gradient of its inputs. Formulas are in
// userip_fast/ops/frozen_block.py. A thread owns whole rows, so results do not depend on their
// number.
#include "bindings.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstdint>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace userip_fast {
namespace {

constexpr int64_t kChunk = 4096;  // values of the gated activation that are taken at a time

// What is compiled once per instruction set; of pairs the first is of SiLU.
struct Rows {
    float (*norm)(const float* x, const float* residual, const float* weight, float* y,
                  float* total, int64_t dim, float eps, float offset);
    void (*norm_backward)(const float* dy, const float* d_total, const float* x, float rstd,
                          const float* weight, float* dx, int64_t dim, float offset);
    void (*gate[2])(const float* gate, const float* up, float* y, int64_t n);
    void (*gate_backward[2])(const float* dy, const float* gate, const float* up, float* d_gate,
                             float* d_up, int64_t n);
    void (*rotate)(const float* x, const float* cosine, const float* sine, float* y, int64_t half,
                   float sign);
};

#define USERIP_TEXT "cpu/frozen_block_isa.h"
#include "cpu/every_isa.h"

Rows rows_of_set() {
    return USERIP_OF_SET(kFrozenBlock, rows)();
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
    const auto norm = rows_of_set().norm;
    threads::parallel_runs(rows, 2 * dim, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t i = r * dim;
            at(rstd)[r] =
                norm(at<const float>(x) + i, offset_or_null(residual, i), at<const float>(weight),
                     at(y) + i, total == 0 ? nullptr : at(total) + i, dim, eps, offset);
        }
    });
}

void rms_norm_backward(uintptr_t dy, uintptr_t d_total, uintptr_t x, uintptr_t rstd,
                       uintptr_t weight, uintptr_t dx, int64_t rows, int64_t dim, float offset) {
    const auto norm_backward = rows_of_set().norm_backward;
    threads::parallel_runs(rows, 3 * dim, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t i = r * dim;
            norm_backward(at<const float>(dy) + i, offset_or_null(d_total, i),
                          at<const float>(x) + i, at<const float>(rstd)[r], at<const float>(weight),
                          at(dx) + i, dim, offset);
        }
    });
}

// act: 0 SiLU, 1 GELU (tanh).
void gated(uintptr_t gate, uintptr_t up, uintptr_t y, int64_t values, int act) {
    USERIP_CHECK(act == 0 || act == 1, "act", "0 or 1", act);
    const auto run = rows_of_set().gate[act];
    threads::parallel_runs(
        (values + kChunk - 1) / kChunk, 4 * kChunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * kChunk; i < std::min(values, end * kChunk); i += kChunk) {
                run(at<const float>(gate) + i, at<const float>(up) + i, at(y) + i,
                    std::min(kChunk, values - i));
            }
        });
}

void gated_backward(uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t d_gate, uintptr_t d_up,
                    int64_t values, int act) {
    USERIP_CHECK(act == 0 || act == 1, "act", "0 or 1", act);
    const auto run = rows_of_set().gate_backward[act];
    threads::parallel_runs(
        (values + kChunk - 1) / kChunk, 4 * kChunk, [&](int64_t begin, int64_t end) {
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
    const auto rotate = rows_of_set().rotate;
    threads::parallel_runs(rows, 2 * heads * dim, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            for (int64_t h = 0; h < heads; ++h) {
                rotate(at<const float>(x) + r * row_stride + h * dim,
                       at<const float>(cosine) + r * dim, at<const float>(sine) + r * dim,
                       at(y) + (r * heads + h) * dim, dim / 2, backward ? -1.0f : 1.0f);
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
