// One pool of threads for all kernels. A job is a number of tasks that whoever is free takes; the caller works too.
#pragma once

#include <cstdint>

namespace octavo {

// Worker threads beside the caller's: threads() - 1. Changing it waits for a running operation to end.
void set_threads(int n);
int threads();

// While it lives, the threads are the caller's alone and their number stays: for operations of several jobs.
class Turn {
  public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
};

using TaskFn = void (*)(void* context, int64_t task, int thread);
void run_tasks(int64_t n_tasks, TaskFn fn, void* context);

// Calls fn(task, thread) for every task in 0..n_tasks - 1; thread is in 0..threads() - 1.
template <class Fn>
void parallel(int64_t n_tasks, const Fn& fn) {
    const TaskFn call = [](void* context, int64_t task, int thread) { (*static_cast<const Fn*>(context))(task, thread); };
    run_tasks(n_tasks, call, const_cast<Fn*>(&fn));
}

}  // namespace octavo
