// Workers spin for a moment after a job, because in decoding the next one follows within microseconds, and then sleep:
// torch's own threads, and everybody else's, find the cores free.
#include "pool.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace octavo {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kPausesPerLook = 32;  // at the clock, which takes longer than a pause

inline void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits until done() holds, spinning at first; returns whether it did within the time.
template <class Done>
bool spin(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < kPausesPerLook; ++i) {
            if (done()) return true;
            pause_cpu();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

class Pool {
  public:
    explicit Pool(int n) : pid_(getpid()) {
        for (int i = 1; i < n; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        stop_ = true;
        announce();
        for (auto& worker : workers_) worker.join();
    }

    int size() const { return int(workers_.size()) + 1; }
    bool inherited() const { return pid_ != getpid(); }  // by a fork, which copies no threads

    void run(int64_t n_tasks, TaskFn fn, void* context) {
        fn_ = fn;
        context_ = context;
        n_tasks_ = n_tasks;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(int(workers_.size()), std::memory_order_relaxed);
        announce();
        take_tasks(0);
        const auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
        while (!spin(done)) std::this_thread::yield();  // somebody else has the worker's core
    }

  private:
    void announce() {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }

    void take_tasks(int thread) {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;) fn_(context_, task, thread);
    }

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
            if (!spin(called)) generation_.wait(seen, std::memory_order_acquire);
            if (!called()) continue;
            ++seen;
            if (stop_) return;
            take_tasks(thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    const pid_t pid_;
    std::vector<std::thread> workers_;
    std::atomic<uint32_t> generation_{0};
    std::atomic<bool> stop_{false};
    TaskFn fn_ = nullptr;
    void* context_ = nullptr;
    int64_t n_tasks_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> busy_{0};
};

std::recursive_mutex mutex;  // one operation at a time
std::unique_ptr<Pool> pool;
std::atomic<int> wanted{1};

// A fork waits for the running operation, whose thread would never give the lock back in the new process.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { new (&mutex) std::recursive_mutex; });

}  // namespace

void set_threads(int n) {
    const std::lock_guard lock(mutex);
    wanted = n;
}

int threads() { return wanted; }

Turn::Turn() { mutex.lock(); }
Turn::~Turn() { mutex.unlock(); }

void run_tasks(int64_t n_tasks, TaskFn fn, void* context) {
    if (n_tasks <= 0) return;
    const std::lock_guard lock(mutex);
    if (pool && pool->inherited()) (void)pool.release();  // its threads do not exist here
    if (!pool || pool->size() != wanted) {
        pool.reset();
        pool = std::make_unique<Pool>(wanted);
    }
    if (n_tasks == 1 || pool->size() == 1) {
        for (int64_t task = 0; task < n_tasks; ++task) fn(context, task, 0);
        return;
    }
    pool->run(n_tasks, fn, context);
}

}  // namespace octavo
