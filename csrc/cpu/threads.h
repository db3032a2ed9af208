// Threads of the CPU kernels: a pool that never waits for whoever has not come.
//
// A region is a queue of items that whoever is awake takes from, the caller first. A worker that
// another process keeps off its processor takes nothing and nobody waits for it, as a team of
// OpenMP would at its barrier; what a late thread can hold up is the one item it is at. How many
// take part is what torch.set_num_threads says, at most `limit`.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>

namespace userip_fast::threads {

// Threads of a region that is called from here.
int count();

// Most threads of a region; 0 for as many as OpenMP says.
void set_limit(int limit);

// Whether other processes want the processors that this one runs on; looks at most every 20 ms.
// While they do nobody spins: neither this pool, nor OpenMP's threads where that can be told.
bool crowded();

namespace detail {
using Run = void (*)(const void* body, int64_t item, int thread);
void run(int64_t items, Run run, const void* body);
}  // namespace detail

// Runs body(item, thread) for every item; thread < count() and no two at a time have the same. The
// first exception is rethrown here. Within a region, and beside another one, it runs alone.
template <typename Body>
void parallel_for(int64_t items, const Body& body) {
    struct Shared {
        const Body& body;
        std::mutex mutex;
        std::exception_ptr error;
    } shared{body, {}, {}};
    detail::run(
        items,
        [](const void* p, int64_t item, int thread) {
            auto& shared = *static_cast<Shared*>(const_cast<void*>(p));
            try {
                shared.body(item, thread);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(shared.mutex);
                if (!shared.error) shared.error = std::current_exception();
            }
        },
        &shared);
    if (shared.error) std::rethrow_exception(shared.error);
}

// As above by runs of items, body(begin, end): the fewest that are worth handing over, `cost` of an
// item being about so many operations on a value.
template <typename Body>
void parallel_runs(int64_t items, int64_t cost, const Body& body) {
    constexpr int64_t kAlone = 1 << 15;  // some 10 us: what it costs to wake another thread
    const int64_t run = (kAlone / 2 + cost - 1) / (cost > 0 ? cost : 1);
    if (items * cost <= kAlone) {
        crowded();
        if (items > 0) body(int64_t{0}, items);
        return;
    }
    parallel_for((items + run - 1) / run, [&](int64_t i, int) {
        body(i * run, i * run + run < items ? i * run + run : items);
    });
}

}  // namespace userip_fast::threads
