// Threads: a few that stay, each taking the next task as it gets free.
#ifndef POMONA_POOL_H
#define POMONA_POOL_H

#include <cstdint>

namespace pomona {

constexpr int kMaxThreads = 64;

using Task = void (*)(void* context, int64_t task, int worker);

// Calls fn(context, task, worker) once for every task in [0, num_tasks), with 0 <= worker < num_threads <= kMaxThreads,
// never two at a time for one worker; returns when all are done. Tasks must not throw. While another thread of the
// program is in here, and where no threads can be had, all tasks run in the calling thread.
void run_tasks(int num_threads, int64_t num_tasks, Task fn, void* context);

template <typename F>
void parallel(int num_threads, int64_t num_tasks, F&& f) {
  if (num_threads <= 1 || num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) f(task, 0);
    return;
  }
  run_tasks(
      num_threads, num_tasks,
      [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace pomona

#endif
