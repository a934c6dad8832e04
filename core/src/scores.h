// What the functions of the interface share: checks at the door, and tensors cut into chunks.
#ifndef POMONA_SCORES_H
#define POMONA_SCORES_H

#include <algorithm>
#include <cstdint>
#include <vector>

#include "guarded.h"
#include "kernels.h"
#include "pomona.h"
#include "pool.h"

namespace pomona {

constexpr int64_t kChunk = int64_t{1} << 14;        // elements of one task
constexpr int64_t kBlock = int64_t{1} << 10;        // elements converted to float at a time
constexpr int64_t kThreadShare = int64_t{1} << 19;  // elements that make waking a thread worth it: 0.1 to 0.2 ms of work
constexpr int64_t kMaxTotal = int64_t{1} << 62;

inline int size_of(int32_t type) {
  switch (type) {
    case POMONA_F32: return 4;
    case POMONA_BF16:
    case POMONA_F16: return 2;
    case POMONA_F64: return 8;
    default: return 0;
  }
}

inline int check_array(const void* values, int64_t n, int32_t type) {
  const int size = size_of(type);
  if (size == 0) return POMONA_BAD_TYPE;
  if (n < 0 || n > kMaxTotal / 8) return POMONA_BAD_SIZE;
  const bool is_misaligned = reinterpret_cast<uintptr_t>(values) % static_cast<uintptr_t>(size) != 0;
  return (n > 0 && values == nullptr) || is_misaligned ? POMONA_BAD_POINTER : POMONA_OK;
}

struct Chunk {
  int64_t tensor, begin, n;
};

// Tensors cut into chunks, in order.
struct Work {
  std::vector<Chunk> chunks;
  int64_t total = 0;
  int num_threads = 1;

  void add(int64_t tensor, int64_t n) {
    for (int64_t begin = 0; begin < n; begin += kChunk) chunks.push_back({tensor, begin, std::min(kChunk, n - begin)});
    total += n;
  }

  // The same in chunks of whole rows.
  void add_rows(int64_t tensor, int64_t n, int64_t row) {
    const int64_t step = std::max<int64_t>(1, kChunk / row) * row;
    for (int64_t begin = 0; begin < n; begin += step) chunks.push_back({tensor, begin, std::min(step, n - begin)});
    total += n;
  }

  // To be called after the last `add`.
  void use_threads(int limit) {
    const int64_t useful = std::max<int64_t>(1, total / kThreadShare);
    num_threads = static_cast<int>(std::min<int64_t>({limit, useful, kMaxThreads}));
  }

  template <typename F>  // f(chunk, index of the chunk, worker)
  void run(F&& f) const {
    parallel(num_threads, static_cast<int64_t>(chunks.size()),
             [&](int64_t i, int worker) { f(chunks[static_cast<size_t>(i)], i, worker); });
  }
};

inline int check_scores(const pomona_score* scores, int64_t num_scores, int num_threads, Work* work) {
  if (num_scores < 0) return POMONA_BAD_SIZE;
  if (num_scores > 0 && scores == nullptr) return POMONA_BAD_POINTER;
  if (num_threads < 1) return POMONA_BAD_VALUE;
  for (int64_t i = 0; i < num_scores; ++i) {
    const pomona_score& s = scores[i];
    if (const int error = check_array(s.a, s.n, s.a_type)) return error;
    if (s.b != nullptr) {
      if (const int error = check_array(s.b, s.n, s.b_type)) return error;
    }
    if (work->total > kMaxTotal / 8 - s.n) return POMONA_BAD_SIZE;
    work->add(i, s.n);
  }
  work->use_threads(num_threads);
  return POMONA_OK;
}

inline const char* element(const void* values, int32_t type, int64_t i) {
  return static_cast<const char*>(values) + i * size_of(type);
}

// Calls f(a, b, begin, n) with float32 arrays for consecutive parts of elements [begin, begin + n) of a score: for all at
// once where they lie in memory as float32, and otherwise for blocks that are computed on the stack.
template <typename F>
void for_floats(const pomona_score& score, int64_t begin, int64_t n, F&& f) {
  const bool is_product = score.b != nullptr;
  const bool is_masked = score.inside != nullptr;
  if (!is_masked && score.a_type == POMONA_F32 && (!is_product || score.b_type == POMONA_F32)) {
    f(static_cast<const float*>(score.a) + begin, is_product ? static_cast<const float*>(score.b) + begin : nullptr,
      begin, n);
    return;
  }
  float buffers[2][kBlock], masked[kBlock];
  const auto as_float = [](const void* values, int32_t type, int64_t i, int64_t m, float* buffer) -> const float* {
    if (type == POMONA_F32) return static_cast<const float*>(values) + i;
    kernels().to_float(element(values, type, i), m, type, buffer);
    return buffer;
  };
  for (const int64_t end = begin + n; begin < end; begin += kBlock) {
    const int64_t m = std::min(kBlock, end - begin);
    const float* a = as_float(score.a, score.a_type, begin, m, buffers[0]);
    const float* b = is_product ? as_float(score.b, score.b_type, begin, m, buffers[1]) : nullptr;
    if (is_masked) {
      kernels().among(a, b, score.inside + begin, m, masked);
      f(masked, nullptr, begin, m);
    } else {
      f(a, b, begin, m);
    }
  }
}

}  // namespace pomona

#endif
