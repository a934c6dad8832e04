// Threads for many short jobs in a row: woken once, they then watch for the next one.
#ifndef POMONA_TEAM_H
#define POMONA_TEAM_H

#include <cstdint>

#if !defined(POMONA_NO_THREADS)
#include <atomic>
#include <thread>

#include "pool.h"
#endif

namespace pomona {

constexpr int64_t kTaskFloats = 1 << 13;

#if defined(POMONA_NO_THREADS)

constexpr int kMaxThreads = 1;

class Team {
 public:
  static constexpr int size() { return 1; }
  template <typename F>
  void each(int64_t num_tasks, F&& f) {
    for (int64_t task = 0; task < num_tasks; ++task) f(task, 0);
  }
};

template <typename F>
void with_team(int, F&& f) {
  Team team;
  f(team);
}

#else

class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }

  // Calls f(task, worker) once for every task in [0, num_tasks), 0 <= worker < size(); returns when all are done. Of
  // the one thread that with_team's function runs in.
  template <typename F>
  void each(int64_t num_tasks, F&& f) {
    if (size_ <= 1 || num_tasks <= 1 || num_tasks > kMost) {
      for (int64_t task = 0; task < num_tasks; ++task) f(task, driver_);
      return;
    }
    fn_ = [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); };
    context_ = const_cast<void*>(static_cast<const void*>(&f));
    left_.store(num_tasks, std::memory_order_relaxed);
    word_.store(static_cast<uint64_t>(num_tasks) << kBits, std::memory_order_release);
    work(driver_);
    while (left_.load(std::memory_order_acquire) != 0) relax(0);
  }

  void help(int worker) {
    for (int idle = 0; !finished_.load(std::memory_order_acquire); ++idle) {
      if (work(worker)) idle = 0;
      relax(idle);
    }
  }

  void begin(int worker) { driver_ = worker; }
  void finish() { finished_.store(true, std::memory_order_release); }

 private:
  static constexpr int kBits = 24;
  static constexpr int64_t kMost = 1 << 20;

  // A job is one word, its number of tasks above the next task: who adds one to it knows from the same word whether he
  // got a task of this job, however late he comes.
  bool work(int worker) {
    bool any = false;
    for (;;) {
      const uint64_t now = word_.load(std::memory_order_relaxed);
      if ((now & kNext) >= now >> kBits) return any;
      const uint64_t mine = word_.fetch_add(1, std::memory_order_acq_rel);
      const uint64_t task = mine & kNext;
      if (task >= mine >> kBits) return any;
      fn_(context_, static_cast<int64_t>(task), worker);
      left_.fetch_sub(1, std::memory_order_release);
      any = true;
    }
  }

  static void relax(int idle) {
    if (idle > 1 << 12) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr uint64_t kNext = (uint64_t{1} << kBits) - 1;
  const int size_;
  int driver_ = 0;
  Task fn_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> word_{0};
  alignas(64) std::atomic<int64_t> left_{0};
  std::atomic<bool> finished_{false};
};

// Calls f(team) in one thread while the others help.
template <typename F>
void with_team(int num_threads, F&& f) {
  num_threads = num_threads < 1 ? 1 : num_threads > kMaxThreads ? kMaxThreads : num_threads;
  Team team(num_threads);
  parallel(num_threads, num_threads, [&](int64_t task, int worker) {
    if (task != 0) return team.help(worker);
    team.begin(worker);
    f(team);
    team.finish();
  });
}

#endif

// f(i, worker) for all i < num, which have `floats` each to read or write: some at a time, where one is no task worth
// giving.
template <typename F>
void each_of(Team& team, int64_t num, int64_t floats, F&& f) {
  const int64_t together = floats >= kTaskFloats ? 1 : kTaskFloats / (floats < 1 ? 1 : floats);
  team.each((num + together - 1) / together, [&](int64_t task, int worker) {
    const int64_t first = task * together, end = first + together < num ? first + together : num;
    for (int64_t i = first; i < end; ++i) f(i, worker);
  });
}

}  // namespace pomona

#endif
