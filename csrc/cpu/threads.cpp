#include "cpu/threads.h"

#include <omp.h>
#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/resource.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "bindings.h"

namespace userip_fast::threads {
namespace {

std::atomic<int> limit{0};
thread_local bool inside = false;  // of a region: a nested one runs alone

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Some 10 us of it cost less than to sleep and be woken; on a crowded machine the first look is the
// last, since who is waited for may need this very processor.
template <typename Value, typename Done>
Value wait_until(const std::atomic<Value>& value, const Done& done) {
    for (int spins = crowded() ? 0 : 200; spins > 0; --spins) {
        if (done(value.load(std::memory_order_acquire))) break;
        pause();
    }
    for (Value now; !done(now = value.load(std::memory_order_acquire));) value.wait(now);
    return value.load(std::memory_order_acquire);
}

// One region at a time. `gate` is 2 * region + open in its upper half, and in its lower half the
// workers inside. They enter only while it is open, so that the region's data outlive them.
class Pool {
  public:
    void run(int64_t items, int threads, detail::Run run, const void* body) {
        try {
            for (; workers_ < threads - 1; ++workers_) {
                std::thread([this, born = turn_.load()] { work(born); }).detach();
            }
        } catch (const std::system_error&) {  // no more threads to be had: those there do it
        }
        next_ = 0, items_ = items, run_ = run, body_ = body, slots_ = 1, threads_ = threads;
        const uint32_t turn = turn_.load(std::memory_order_relaxed) + 1;
        gate_.store(uint64_t(turn) << 32 | kOpen, std::memory_order_release);
        turn_.store(turn, std::memory_order_release);
        const int wanted = int(std::min<int64_t>(threads, items)) - 1;
        if (wanted >= workers_) {
            turn_.notify_all();
        } else {
            for (int i = 0; i < wanted; ++i) turn_.notify_one();
        }
        take(0);
        gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
        wait_until(gate_, [](uint64_t gate) { return (gate & kInside) == 0; });
    }

    std::mutex mutex;  // of whose region it is

  private:
    static constexpr uint64_t kOpen = uint64_t{1} << 31, kInside = kOpen - 1;

    void take(int thread) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) {
            run_(body_, i, thread);
        }
    }

    void work(uint32_t seen) {
        inside = true;
        for (;;) {
            seen = wait_until(turn_, [&](uint32_t turn) { return turn != seen; });
            uint64_t gate = gate_.load(std::memory_order_acquire);
            while ((gate & kOpen) != 0 &&
                   !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
            }
            if ((gate & kOpen) == 0) continue;
            seen = uint32_t(gate >> 32);
            const int slot = slots_.fetch_add(1, std::memory_order_relaxed);
            if (slot < threads_) take(slot);
            if (((gate_.fetch_sub(1, std::memory_order_acq_rel) - 1) & (kOpen | kInside)) == 0) {
                gate_.notify_all();
            }
        }
    }

    std::atomic<uint64_t> gate_{0};
    std::atomic<uint32_t> turn_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> slots_{0};
    int64_t items_ = 0;
    int threads_ = 0, workers_ = 0;
    detail::Run run_ = nullptr;
    const void* body_ = nullptr;
};

// How OpenMP's threads, torch's among them, wait at a barrier. libgomp lets them spin for
// milliseconds, in which a thread that others keep off the processor gets no nearer; but hardly at
// all while there are more threads than processors. So a team of that many is kept, asleep, for as
// long as the machine is crowded. LLVM's and Intel's runtimes can be told.
class Quiet {
  public:
    void set([[maybe_unused]] bool wanted) {
#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
        if (wanted == on_) return;
        using Blocktime = void (*)(int);
        if (auto* set = reinterpret_cast<Blocktime>(dlsym(RTLD_DEFAULT, "kmp_set_blocktime"))) {
            set(wanted ? 0 : 200);
            on_ = wanted;
        } else if (wanted && omp_get_max_threads() > 1) {
            // Where there are no threads to be had, it stays as it is.
            const int more = std::max(2, omp_get_num_procs() - omp_get_max_threads() + 3);
            on_ = true;  // before the thread looks
            try {
                thread_ = new std::thread([this, more] {
#pragma omp parallel num_threads(more)
                    asm volatile("" ::: "memory");
                    std::unique_lock<std::mutex> lock(mutex_);
                    changed_.wait(lock, [this] { return !on_; });
                });
            } catch (const std::system_error&) {
                thread_ = nullptr;
            }
        } else if (!wanted) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                on_ = false;
            }
            changed_.notify_all();
            if (thread_ != nullptr) thread_->join();
            delete thread_;
            thread_ = nullptr;
        }
#endif
    }

  private:
    [[maybe_unused]] bool on_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread* thread_ = nullptr;
};

// What the threads of a process share; never destroyed, since they outlive main. A child made by
// fork has none of them: it starts with new ones.
struct State {
    Pool pool;
    std::mutex looking;
    Quiet quiet;
    std::atomic<bool> crowded{false};
    std::atomic<int64_t> next_look_us{0};
    int64_t since_us = 0, switches = 0, cpu_us = 0;
};
std::atomic<State*> shared{nullptr};

State& state() {
    if (State* s = shared.load(std::memory_order_acquire)) return *s;
    auto* made = new State;
    State* none = nullptr;
    if (!shared.compare_exchange_strong(none, made)) {
        delete made;
        return *none;
    }
#if defined(__linux__)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { shared = nullptr; }); });
#endif
    return *made;
}

// Being put off a processor for somebody else happens some 250 times a second of processor time
// where somebody else wants it, a few times where nobody does.
void look(State& s, int64_t now_us) {
#if defined(__linux__)
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto us = [](const timeval& t) { return int64_t(t.tv_sec) * 1000000 + t.tv_usec; };
    const int64_t cpu = us(usage.ru_utime) + us(usage.ru_stime);
    const int64_t spent = cpu - s.cpu_us, switched = usage.ru_nivcsw - s.switches;
    if (spent < 10000) return;  // too little to tell
    const bool was = s.crowded, now = switched * 1000000 > spent * (was ? 20 : 60);
    s.cpu_us = cpu, s.switches = usage.ru_nivcsw;
    if (now) s.since_us = now_us;
    if (was && now_us - s.since_us < 1000000) return;  // quiet for a second first
    s.crowded = now;
    s.quiet.set(now);
#endif
}

}  // namespace

int count() {
    const int most = limit.load(std::memory_order_relaxed), threads = omp_get_max_threads();
    return most > 0 ? std::min(most, threads) : threads;
}

void set_limit(int most) {
    limit = std::max(0, most);
}

bool crowded() {
    State& s = state();
    using namespace std::chrono;
    const int64_t now = duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
    if (now >= s.next_look_us.load(std::memory_order_relaxed) && s.looking.try_lock()) {
        const std::lock_guard<std::mutex> lock(s.looking, std::adopt_lock);
        s.next_look_us = now + 20000;
        look(s, now);
    }
    return s.crowded.load(std::memory_order_relaxed);
}

void detail::run(int64_t items, Run run, const void* body) {
    const int threads = int(std::min<int64_t>(items, count()));
    if (!inside) crowded();
    if (threads > 1 && !inside) {
        Pool& pool = state().pool;
        if (pool.mutex.try_lock()) {
            const std::lock_guard<std::mutex> lock(pool.mutex, std::adopt_lock);
            inside = true;
            pool.run(items, threads, run, body);
            inside = false;
            return;
        }
    }
    for (int64_t i = 0; i < items; ++i) run(body, i, 0);
}

}  // namespace userip_fast::threads

namespace userip_fast {

void bind_threads(py::module_& m) {
    m.def("set_thread_limit", &threads::set_limit, py::arg("limit"),
          "Most threads of a kernel; 0 for as many as OpenMP says.");
    m.def("thread_limit", [] { return threads::limit.load(); }, "What set_thread_limit has set.");
    m.def("num_threads", &threads::count, "Threads that a kernel called from here uses.");
    m.def("crowded", &threads::crowded,
          "Whether other processes want the processors that this one runs on. While they do, "
          "threads that wait, torch's too, sleep instead of spinning. Kernels look by themselves.");
}

}  // namespace userip_fast
