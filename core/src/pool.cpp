#include "pool.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#else
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#endif

namespace pomona {
namespace {

// How long a thread that has nothing to do watches before it sleeps. To be woken takes from 50 us to a tick of the
// system's clock, where that first queues it behind the thread that woke it.
constexpr std::chrono::microseconds kPatience{1000};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

int process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return static_cast<int>(getpid());
#endif
}

// Threads started here are for no signal of the program's.
class BlockedSignals {
 public:
#if defined(_WIN32)
  BlockedSignals() {}
#else
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

class Pool {
 public:
  const int process = process_id();

  void run(int num_threads, int64_t num_tasks, Task fn, void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || !start(num_threads - 1)) {
      for (int64_t task = 0; task < num_tasks; ++task) fn(context, task, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      fn_ = fn;
      context_ = context;
      num_tasks_ = num_tasks;
      next_.store(0, std::memory_order_relaxed);
      std::fegetenv(&environment_);
      wanted_ = std::min(num_threads - 1, num_workers_);
      busy_ = wanted_;
      ++job_;
      announced_.store(job_, std::memory_order_relaxed);
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  bool start(int num_workers) {
    BlockedSignals blocked;
    while (num_workers_ < num_workers) {
      try {
        std::thread(&Pool::serve, this, num_workers_ + 1, job_).detach();
      } catch (const std::system_error&) {
        break;
      }
      ++num_workers_;
    }
    return num_workers_ > 0;
  }

  void serve(int worker, int64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      lock.unlock();
      watch(seen);
      lock.lock();
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (worker > wanted_) continue;
      lock.unlock();
      std::fesetenv(&environment_);  // rounding and flushing of denormals as the caller has them
      work(worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void watch(int64_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (announced_.load(std::memory_order_relaxed) == seen && std::chrono::steady_clock::now() < end)
      for (int i = 0; i < 32; ++i) pause();
  }

  void work(int worker) {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks_) return;
      fn_(context_, task, worker);
    }
  }

  std::mutex turn_;  // held by the one thread whose job this is; guards num_workers_
  int num_workers_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  int64_t job_ = 0;
  std::atomic<int64_t> announced_{0};  // job_, for a look without the mutex
  int wanted_ = 0, busy_ = 0;
  Task fn_ = nullptr;
  void* context_ = nullptr;
  int64_t num_tasks_ = 0;
  std::fenv_t environment_;
  std::atomic<int64_t> next_{0};
};

// Never destroyed: its threads wait in it until the process ends. A forked child has none of its parent's threads, and
// perhaps a mutex that nobody will unlock: it leaves that pool alone and makes its own.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (found == nullptr || found->process != process_id()) {
    Pool* mine = new Pool;
    if (current.compare_exchange_strong(found, mine, std::memory_order_acq_rel)) return *mine;
    delete mine;
  }
  return *found;
}

}  // namespace

void run_tasks(int num_threads, int64_t num_tasks, Task fn, void* context) {
  num_threads = static_cast<int>(std::min<int64_t>({num_threads, num_tasks, kMaxThreads}));
  pool().run(num_threads, num_tasks, fn, context);
}

}  // namespace pomona
