// Adam on named rows, each with its own step count; the formula is in
// userip_fast/ops/sparse_adam.py. Rows are distinct, so threads never share one. The work is bound
// by memory: 7 words per value.
#include <cmath>
#include <cstdint>

#include "bindings.h"
#include "check.h"
#include "cpu/threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace userip_fast {
namespace {

struct Row {
    float* theta;
    float* m;
    float* v;
    const float* grad;
    float beta1, beta2, eps;
    float step_size;  // lr / (1 - beta1^t)
    float root;       // sqrt(1 - beta2^t)
};

void update_scalar(const Row& r, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float g = r.grad[i];
        r.m[i] = r.m[i] * r.beta1 + g * (1 - r.beta1);
        r.v[i] = r.v[i] * r.beta2 + g * g * (1 - r.beta2);
        r.theta[i] -= r.step_size * r.m[i] / (std::sqrt(r.v[i]) / r.root + r.eps);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) int64_t update_avx2(const Row& r, int64_t dim) {
    const __m256 beta1 = _mm256_set1_ps(r.beta1), rest1 = _mm256_set1_ps(1 - r.beta1);
    const __m256 beta2 = _mm256_set1_ps(r.beta2), rest2 = _mm256_set1_ps(1 - r.beta2);
    const __m256 step_size = _mm256_set1_ps(r.step_size), eps = _mm256_set1_ps(r.eps);
    const __m256 root = _mm256_set1_ps(r.root);
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8) {
        const __m256 g = _mm256_loadu_ps(r.grad + i);
        const __m256 m = _mm256_fmadd_ps(_mm256_loadu_ps(r.m + i), beta1, _mm256_mul_ps(g, rest1));
        const __m256 v = _mm256_fmadd_ps(_mm256_loadu_ps(r.v + i), beta2,
                                         _mm256_mul_ps(_mm256_mul_ps(g, g), rest2));
        const __m256 denominator = _mm256_add_ps(_mm256_div_ps(_mm256_sqrt_ps(v), root), eps);
        const __m256 change = _mm256_div_ps(_mm256_mul_ps(step_size, m), denominator);
        _mm256_storeu_ps(r.m + i, m);
        _mm256_storeu_ps(r.v + i, v);
        _mm256_storeu_ps(r.theta + i, _mm256_sub_ps(_mm256_loadu_ps(r.theta + i), change));
    }
    return i;
}
#endif

void sparse_adam(uintptr_t theta, uintptr_t m, uintptr_t v, uintptr_t step, uintptr_t rows,
                 uintptr_t grad, int64_t num_rows, int64_t total_rows, int64_t dim, double lr,
                 double beta1, double beta2, double eps) {
    auto* steps = reinterpret_cast<int32_t*>(step);
    const auto* row_ids = reinterpret_cast<const int64_t*>(rows);
    for (int64_t i = 0; i < num_rows; ++i) {
        USERIP_CHECK(row_ids[i] >= 0 && row_ids[i] < total_rows, "rows", "ids of theta's rows",
                     row_ids[i]);
    }
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    const auto update = [&](int64_t i) {
        const int64_t row = row_ids[i], at = row * dim;
        const double t = ++steps[row];
        const Row r{reinterpret_cast<float*>(theta) + at,
                    reinterpret_cast<float*>(m) + at,
                    reinterpret_cast<float*>(v) + at,
                    reinterpret_cast<const float*>(grad) + i * dim,
                    static_cast<float>(beta1),
                    static_cast<float>(beta2),
                    static_cast<float>(eps),
                    static_cast<float>(lr / (1 - std::pow(beta1, t))),
                    static_cast<float>(std::sqrt(1 - std::pow(beta2, t)))};
        int64_t done = 0;
#if defined(__x86_64__)
        if (avx2) done = update_avx2(r, dim);
#endif
        update_scalar(r, done, dim);
    };
    threads::parallel_runs(num_rows, 4 * dim, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) update(i);
    });
}

}  // namespace

void bind_sparse_adam(py::module_& m) {
    m.def("sparse_adam", &sparse_adam, py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast
