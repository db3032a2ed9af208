// Posteriors over codes from a table of event scores; the formula is in
// userip_fast/ops/profile_posterior.py. A user's rows are added in registers, a stretch of columns
// at a time, in an order that is its own: threads and other users leave no trace. Up to kRun events
// are added in fp32, such sums in fp64. The work is bound by reading table rows.
#include "bindings.h"

#if defined(__x86_64__)

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/avx2.h"
#include "cpu/threads.h"

namespace userip_fast {
namespace {

constexpr int64_t kRun = 32;        // events that are added up in fp32
constexpr int64_t kAhead = 12;      // events between asking for a row and adding it
constexpr int64_t kTogether = 16;   // users whose sums wait for their softmax: they overlap better
constexpr int64_t kLine = 16;       // floats in a cache line
constexpr int64_t kNear = 1 << 22;  // floats of a table that caches hold, which need not be asked

struct Table {
    const float* rows;
    int64_t num_kinds, codes, padded;  // padded: codes up to a multiple of eight
    const int64_t* kinds;
    const float* weights;  // null for ones
    int64_t num_events;
};

// sum[0 : 8 kEights] = prior + rows of events [begin, end), the columns from `column` on; at most
// `left` are there. Events take turns in kChains sums, so that one addition need not wait for
// another.
template <int kEights, int kChains, bool kWeighted>
USERIP_AVX2 void add_columns(const Table& t, int64_t begin, int64_t end, int64_t column,
                             int64_t left, const double* prior, double* sum) {
    const float* base = t.rows + column;
    do {
        const int64_t stop = std::min(end, begin + kRun);
        __m256 acc[kChains][kEights];
        for (auto& chain : acc) {
            for (__m256& x : chain) x = _mm256_setzero_ps();
        }
        const auto add = [&](int64_t n, __m256* chain) USERIP_AVX2 {
            const float* row = base + t.kinds[n] * t.codes;
            const __m256 weight = kWeighted ? _mm256_set1_ps(t.weights[n]) : _mm256_setzero_ps();
            for (int i = 0; i < kEights; ++i) {
                const __m256 x =
                    kEights == 1 ? load(row, left, 0.0f) : _mm256_loadu_ps(row + 8 * i);
                chain[i] =
                    kWeighted ? _mm256_fmadd_ps(x, weight, chain[i]) : _mm256_add_ps(x, chain[i]);
            }
        };
        int64_t n = begin;
        for (; n + kChains <= stop; n += kChains) {
            for (int c = 0; c < kChains; ++c) add(n + c, acc[c]);
        }
        for (; n < stop; ++n) add(n, acc[0]);
        for (int i = 0; i < kEights; ++i) {
            for (int half = kChains / 2; half > 0; half /= 2) {
                for (int c = 0; c < half; ++c) {
                    acc[c][i] = _mm256_add_ps(acc[c][i], acc[c + half][i]);
                }
            }
            const double* from = prior + 8 * i;
            double* to = sum + 8 * i;
            const __m128 low = _mm256_castps256_ps128(acc[0][i]);
            const __m128 high = _mm256_extractf128_ps(acc[0][i], 1);
            _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(from), _mm256_cvtps_pd(low)));
            _mm256_storeu_pd(to + 4,
                             _mm256_add_pd(_mm256_loadu_pd(from + 4), _mm256_cvtps_pd(high)));
        }
        begin = stop, prior = sum;
    } while (begin < end);
}

// sum = prior + the rows of one user's events; all three are padded with -inf.
template <bool kWeighted>
USERIP_AVX2 void add_events(const Table& t, int64_t begin, int64_t end, const double* prior,
                            double* sum) {
    const int64_t codes = t.codes;
    if (t.num_kinds * codes > kNear) {
        // The rows of the user after this one, or so: past its events lie the next one's.
        for (int64_t n = begin + kAhead; n < std::min(end + kAhead, t.num_events); ++n) {
            const float* row = t.rows + t.kinds[n] * codes;
            for (int64_t i = 0; i < codes; i += kLine) {
                _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
            }
        }
    }
    int64_t c = 0;
    for (; c + 64 <= codes; c += 64)
        add_columns<8, 1, kWeighted>(t, begin, end, c, 64, prior + c, sum + c);
    for (; c + 16 <= codes; c += 16)
        add_columns<2, 4, kWeighted>(t, begin, end, c, 16, prior + c, sum + c);
    for (; c < codes; c += 8)
        add_columns<1, 4, kWeighted>(t, begin, end, c, codes - c, prior + c, sum + c);
}

// Of one user's sums: log_resp[0 : codes] = sum - evidence.
USERIP_AVX2 void normalise(const double* sum, int64_t codes, float* log_resp, double* evidence) {
    __m256d high4 = _mm256_loadu_pd(sum);
    for (int64_t k = 4; k < codes; k += 4) high4 = _mm256_max_pd(high4, _mm256_loadu_pd(sum + k));
    __m128d high2 = _mm_max_pd(_mm256_castpd256_pd128(high4), _mm256_extractf128_pd(high4, 1));
    high2 = _mm_max_pd(high2, _mm_permute_pd(high2, 1));
    high4 = _mm256_broadcastsd_pd(high2);
    __m256 total8 = _mm256_setzero_ps();
    for (int64_t k = 0; k < codes; k += 8) {
        const __m256d low = _mm256_sub_pd(_mm256_loadu_pd(sum + k), high4);
        const __m256d rest = _mm256_sub_pd(_mm256_loadu_pd(sum + k + 4), high4);
        const __m256 below = _mm256_set_m128(_mm256_cvtpd_ps(rest), _mm256_cvtpd_ps(low));
        store(log_resp + k, codes - k, below);
        total8 = _mm256_add_ps(total8, exp8(below));
    }
    __m128 total = _mm_add_ps(_mm256_castps256_ps128(total8), _mm256_extractf128_ps(total8, 1));
    total = _mm_add_ps(total, _mm_movehl_ps(total, total));
    const float log_total = std::log(_mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total))));
    *evidence = _mm_cvtsd_f64(high2) + log_total;
    const __m256 shift = _mm256_set1_ps(log_total);
    for (int64_t k = 0; k < codes; k += 8) {
        store(log_resp + k, codes - k, _mm256_sub_ps(load(log_resp + k, codes - k, 0.0f), shift));
    }
}

// First of events [begin, end) whose kind is no row of the table; `end` where there is none.
USERIP_AVX2 int64_t first_bad(const Table& t, int64_t begin, int64_t end) {
    const __m256i last = _mm256_set1_epi64x(t.num_kinds - 1);
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
        // At a page's end the processor stops reading ahead; a hint may point past what is ours.
        _mm_prefetch(reinterpret_cast<const char*>(t.kinds + n) + 4096, _MM_HINT_T0);
        const __m256i kind = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.kinds + n));
        // Negative where below 0, or above the last.
        const __m256i sign = _mm256_or_si256(kind, _mm256_sub_epi64(last, kind));
        if (_mm256_movemask_pd(_mm256_castsi256_pd(sign)) != 0) break;
    }
    while (n < end && t.kinds[n] >= 0 && t.kinds[n] < t.num_kinds) ++n;
    return n;
}

void profile_posterior(uintptr_t table, int64_t num_kinds, int64_t codes, uintptr_t kinds,
                       uintptr_t weights, int64_t num_events, uintptr_t offsets, int64_t num_users,
                       uintptr_t log_prior, uintptr_t log_resp, uintptr_t evidence) {
    const Table t{reinterpret_cast<const float*>(table),
                  num_kinds,
                  codes,
                  (codes + 7) / 8 * 8,
                  reinterpret_cast<const int64_t*>(kinds),
                  reinterpret_cast<const float*>(weights),
                  num_events};
    const auto* first = reinterpret_cast<const int64_t*>(offsets);
    USERIP_CHECK(first[0] == 0 && first[num_users] == num_events, "offsets",
                 "a first entry of 0 and a last one of the number of events", first[num_users]);
    std::atomic<int64_t> bad_user{num_users}, bad_kind{num_events};
    std::vector<double> prior(t.padded, -std::numeric_limits<double>::infinity());
    std::copy_n(reinterpret_cast<const double*>(log_prior), codes, prior.begin());
    const auto add = t.weights == nullptr ? add_events<false> : add_events<true>;
    const auto users = [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
            if (first[u] < 0 || first[u] > first[u + 1] || first[u + 1] > num_events) {
                bad_user = u;
                return;
            }
        }
        std::vector<double> sums(kTogether * t.padded);
        for (int64_t from = begin; from < end; from += kTogether) {
            const int64_t to = std::min(end, from + kTogether);
            const int64_t wrong = first_bad(t, first[from], first[to]);
            if (wrong < first[to]) {
                bad_kind = wrong;
                return;
            }
            for (int64_t u = from; u < to; ++u) {
                add(t, first[u], first[u + 1], prior.data(), &sums[(u - from) * t.padded]);
            }
            for (int64_t u = from; u < to; ++u) {
                normalise(&sums[(u - from) * t.padded], codes,
                          reinterpret_cast<float*>(log_resp) + u * codes,
                          reinterpret_cast<double*>(evidence) + u);
            }
        }
    };
    // By the mean number of events, and a softmax, say as dear as four: who has more is a run that
    // takes longer, while others go on with the rest.
    threads::parallel_runs((num_users + kTogether - 1) / kTogether,
                           codes * (num_events * kTogether / std::max<int64_t>(num_users, 1) + 64),
                           [&](int64_t begin, int64_t end) {
                               users(begin * kTogether, std::min(num_users, end * kTogether));
                           });
    USERIP_CHECK(bad_user == num_users, "profile_posterior: offsets", "ascending numbers of events",
                 first[bad_user]);
    USERIP_CHECK(bad_kind == num_events, "profile_posterior: kinds", "rows of the table",
                 t.kinds[bad_kind]);
}

}  // namespace

void bind_profile_posterior(py::module_& m) {
    m.def("profile_posterior", &profile_posterior, py::call_guard<py::gil_scoped_release>());
}

}  // namespace userip_fast

#else  // other processors run the reference

void userip_fast::bind_profile_posterior(py::module_&) {}

#endif
