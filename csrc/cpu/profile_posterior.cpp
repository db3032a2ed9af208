// Posteriors over codes from a table of event scores; the formula is in
// userip_fast/ops/profile_posterior.py. A user's rows are added in registers, a stretch of columns
// at a time, in an order that is its own: threads and other users leave no trace. Up to kRun events
// are added in fp32, such sums in fp64. The work is bound by reading table rows.
#include "bindings.h"

#if defined(__x86_64__)

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace userip_fast {
namespace {

constexpr int64_t kRun = 32;        // events that are added up in fp32
constexpr int64_t kAhead = 12;      // events between asking for a row and adding it
constexpr int64_t kTogether = 16;   // users whose sums wait for their softmax: they overlap better
constexpr int64_t kLine = 16;       // floats in a cache line
constexpr int64_t kNear = 1 << 22;  // floats of a table that caches hold, which need not be asked

constexpr double kNever =
    -std::numeric_limits<double>::infinity();  // log p of a code past the last

struct Table {
    const float* rows;
    int64_t num_kinds, codes, padded;  // padded: codes up to a multiple of sixteen
    const int64_t* kinds;
    const float* weights;  // null for ones
    int64_t num_events;
};

#define USERIP_TEXT "cpu/profile_posterior_isa.h"
#include "cpu/every_isa.h"

void profile_posterior(uintptr_t table, int64_t num_kinds, int64_t codes, uintptr_t kinds,
                       uintptr_t weights, int64_t num_events, uintptr_t offsets, int64_t num_users,
                       uintptr_t log_prior, uintptr_t log_resp, uintptr_t evidence) {
    const Table t{reinterpret_cast<const float*>(table),
                  num_kinds,
                  codes,
                  (codes + 15) / 16 * 16,
                  reinterpret_cast<const int64_t*>(kinds),
                  reinterpret_cast<const float*>(weights),
                  num_events};
    const auto* first = reinterpret_cast<const int64_t*>(offsets);
    USERIP_CHECK(first[0] == 0 && first[num_users] == num_events, "offsets",
                 "a first entry of 0 and a last one of the number of events", first[num_users]);
    std::atomic<int64_t> bad_user{num_users}, bad_kind{num_events};
    std::vector<double> prior(t.padded, kNever);
    std::copy_n(reinterpret_cast<const double*>(log_prior), codes, prior.begin());
    const auto judge = USERIP_OF_SET(kProfilePosterior, judge);
    const auto users = [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
            if (first[u] < 0 || first[u] > first[u + 1] || first[u + 1] > num_events) {
                bad_user = u;
                return;
            }
        }
        std::vector<double> sums(kTogether * t.padded, kNever);
        const int64_t wrong =
            judge(t, first, begin, end, prior.data(), sums.data(),
                  reinterpret_cast<float*>(log_resp), reinterpret_cast<double*>(evidence));
        if (wrong < first[end]) bad_kind = wrong;
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
