// Masks, what is multiplied or zeroed under them, and what is left afterwards.

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "pomona.h"
#include "scores.h"

namespace pomona {
namespace {

constexpr int64_t kTieBlock = 256;

struct Keep {
  int32_t threshold;
  int64_t num_ties;  // -1: all
};

int check_keep(int32_t threshold, int64_t num_ties) {
  return threshold < 1 || num_ties < -1 ? POMONA_BAD_VALUE : POMONA_OK;
}

// For each chunk, how many keys equal to its tensor's threshold precede it in that tensor; empty if no tensor limits its
// ties. Must be called before anything is written.
template <typename ScoreOf, typename KeepOf>
std::vector<int64_t> ties_before(const Work& work, ScoreOf&& score_of, KeepOf&& keep_of) {
  bool is_limited = false;
  for (size_t i = 0; i < work.chunks.size() && !is_limited; ++i) is_limited = keep_of(work.chunks[i].tensor).num_ties > 0;
  if (!is_limited) return {};
  const Kernels& kernel = kernels();
  std::vector<int64_t> before(work.chunks.size());
  work.run([&](const Chunk& chunk, int64_t index, int) {
    const Keep keep = keep_of(chunk.tensor);
    if (keep.num_ties <= 0) return;
    int64_t greater = 0, equal = 0;
    for_floats(score_of(chunk.tensor), chunk.begin, chunk.n, [&](const float* a, const float* b, int64_t, int64_t m) {
      kernel.count(a, b, m, keep.threshold, &greater, &equal);
    });
    before[static_cast<size_t>(index)] = equal;
  });
  int64_t passed = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    if (i > 0 && work.chunks[i].tensor != work.chunks[i - 1].tensor) passed = 0;
    const int64_t equal = before[i];
    before[i] = passed;
    passed += equal;
  }
  return before;
}

// Calls f(begin, n, above) for consecutive parts of [0, n), in each of which exactly the keys > above are to be kept.
// Returns the sum of its results. At most `left` ties are kept (-1: all).
template <typename F>
int64_t split_at_ties(const float* a, const float* b, int64_t n, int32_t threshold, int64_t* left, F&& f) {
  if (*left < 0) return f(0, n, threshold - 1);
  const Kernels& kernel = kernels();
  const auto count_equal = [&](int64_t begin, int64_t m) {
    int64_t greater = 0, equal = 0;
    kernel.count(a + begin, b ? b + begin : nullptr, m, threshold, &greater, &equal);
    return equal;
  };
  int64_t kept = 0;
  for (int64_t begin = 0; begin < n;) {
    if (*left == 0) return kept + f(begin, n - begin, threshold);
    int64_t part = std::min(kTieBlock, n - begin);
    int64_t equal = count_equal(begin, part);
    if (equal > *left) {  // the last tie to be kept is in this block: the part ends after it
      equal = 0;
      for (part = 0; equal < *left; ++part) equal += count_equal(begin + part, 1);
    }
    kept += f(begin, part, threshold - 1);
    *left -= equal;
    begin += part;
  }
  return kept;
}

// Runs f(chunk, left) for all chunks. At most `left` (-1: all) of the chunk's ties are to be kept; f returns how many keys
// it kept.
template <typename ScoreOf, typename KeepOf, typename F>
void run_masked(const Work& work, int64_t num_tensors, int64_t* kept, ScoreOf&& score_of, KeepOf&& keep_of, F&& f) {
  const std::vector<int64_t> before = ties_before(work, score_of, keep_of);
  std::vector<int64_t> chunk_kept(work.chunks.size());
  work.run([&](const Chunk& chunk, int64_t index, int) {
    int64_t left = keep_of(chunk.tensor).num_ties;
    if (left > 0) left = std::max<int64_t>(0, left - before[static_cast<size_t>(index)]);
    chunk_kept[static_cast<size_t>(index)] = f(chunk, left);
  });
  if (kept == nullptr) return;
  std::fill(kept, kept + num_tensors, 0);
  for (size_t i = 0; i < chunk_kept.size(); ++i) kept[work.chunks[i].tensor] += chunk_kept[i];
}

// Calls f(a, b, begin, n, above) for parts of a chunk, in each of which the keys > above are to be kept.
template <typename F>
int64_t for_parts(const pomona_score& score, const Chunk& chunk, int32_t threshold, int64_t left, F&& f) {
  int64_t kept = 0;
  for_floats(score, chunk.begin, chunk.n, [&](const float* a, const float* b, int64_t begin, int64_t n) {
    kept += split_at_ties(a, b, n, threshold, &left, [&](int64_t offset, int64_t m, int32_t above) {
      return f(a + offset, b ? b + offset : nullptr, begin + offset, m, above);
    });
  });
  return kept;
}

// x *= 0 by bits, for types without arithmetic here: infinities and NaNs become a NaN, all others a signed zero.
template <typename Bits>
void drop(Bits* values, const uint8_t* mask, int64_t n, Bits exponent) {
  const Bits sign = static_cast<Bits>(Bits{1} << (sizeof(Bits) * 8 - 1)), nan = static_cast<Bits>(~sign);
  for (int64_t i = 0; i < n; ++i) {
    const Bits value = values[i];
    const Bits zero = static_cast<Bits>(value & sign);
    const Bits dropped = (value & exponent) == exponent ? static_cast<Bits>(zero | nan) : zero;
    values[i] = mask[i] ? value : dropped;
  }
}

void drop_any(void* values, int32_t type, const uint8_t* mask, int64_t n) {
  switch (type) {
    case POMONA_BF16: return drop<uint16_t>(static_cast<uint16_t*>(values), mask, n, 0x7f80);
    case POMONA_F16: return drop<uint16_t>(static_cast<uint16_t*>(values), mask, n, 0x7c00);
    default: return drop<uint64_t>(static_cast<uint64_t*>(values), mask, n, 0x7ff0000000000000);
  }
}

int check_keeps(int64_t num, const int32_t* thresholds, const int64_t* num_ties) {
  if (num > 0 && (thresholds == nullptr || num_ties == nullptr)) return POMONA_BAD_POINTER;
  for (int64_t i = 0; i < num; ++i) {
    if (const int error = check_keep(thresholds[i], num_ties[i])) return error;
  }
  return POMONA_OK;
}

int check_arrays(const void* const* values, const int64_t* sizes, const int32_t* types, int64_t num, int num_threads) {
  if (num < 0) return POMONA_BAD_SIZE;
  if (num_threads < 1) return POMONA_BAD_VALUE;
  if (num > 0 && (values == nullptr || sizes == nullptr || types == nullptr)) return POMONA_BAD_POINTER;
  int64_t total = 0;
  for (int64_t i = 0; i < num; ++i) {
    if (const int error = check_array(values[i], sizes[i], types[i])) return error;
    if (total > kMaxTotal / 8 - sizes[i]) return POMONA_BAD_SIZE;
    total += sizes[i];
  }
  return POMONA_OK;
}

// The number whose bits, in this type, are these.
double real_of(uint64_t bits, int32_t type) {
  double value = 0.0;
  float narrow = 0.0f;
  if (type == POMONA_F64) {
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  if (type == POMONA_F32) {
    const uint32_t single = static_cast<uint32_t>(bits);
    std::memcpy(&narrow, &single, sizeof narrow);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits);
    kernels().to_float(&half, 1, type, &narrow);
  }
  return narrow;
}

uint64_t infinity_of(int32_t type) {
  switch (type) {
    case POMONA_BF16: return 0x7f80;
    case POMONA_F16: return 0x7c00;
    case POMONA_F64: return 0x7ff0000000000000;
    default: return POMONA_KEY_INFINITE;
  }
}

struct Extent {
  uint64_t smallest = std::numeric_limits<uint64_t>::max();
  uint64_t largest = 0;

  double smallest_as(int32_t type) const {
    if (largest > infinity_of(type)) return std::numeric_limits<double>::quiet_NaN();
    return smallest >= infinity_of(type) ? std::numeric_limits<double>::infinity() : real_of(smallest, type);
  }
};

}  // namespace
}  // namespace pomona

using namespace pomona;

extern "C" {

int pomona_mask(const pomona_score* scores, int64_t num_scores, const int32_t* thresholds, const int64_t* num_ties,
                uint8_t* const* masks, int num_threads, int64_t* kept) {
  return guarded([&]() -> int {
    Work work;
    if (const int error = check_scores(scores, num_scores, num_threads, &work)) return error;
    if (const int error = check_keeps(num_scores, thresholds, num_ties)) return error;
    if (num_scores > 0 && masks == nullptr) return POMONA_BAD_POINTER;
    for (int64_t i = 0; i < num_scores; ++i) {
      if (scores[i].n > 0 && masks[i] == nullptr) return POMONA_BAD_POINTER;
    }
    const auto score_of = [&](int64_t i) -> const pomona_score& { return scores[i]; };
    const auto keep_of = [&](int64_t i) { return Keep{thresholds[i], num_ties[i]}; };
    run_masked(work, num_scores, kept, score_of, keep_of, [&](const Chunk& chunk, int64_t left) {
      uint8_t* mask = masks[chunk.tensor];
      return for_parts(scores[chunk.tensor], chunk, thresholds[chunk.tensor], left,
                       [&](const float* a, const float* b, int64_t begin, int64_t n, int32_t above) {
                         return kernels().mask(a, b, n, above, mask + begin);
                       });
    });
    return POMONA_OK;
  });
}

int pomona_multiply(const pomona_score* scores, int64_t num_scores, const int32_t* thresholds, const int64_t* num_ties,
                    void* const* targets, const int32_t* target_types, int num_threads, int64_t* kept) {
  return guarded([&]() -> int {
    Work work;
    if (const int error = check_scores(scores, num_scores, num_threads, &work)) return error;
    if (const int error = check_keeps(num_scores, thresholds, num_ties)) return error;
    if (num_scores > 0 && (targets == nullptr || target_types == nullptr)) return POMONA_BAD_POINTER;
    for (int64_t i = 0; i < num_scores; ++i) {
      if (const int error = check_array(targets[i], scores[i].n, target_types[i])) return error;
    }
    const auto score_of = [&](int64_t i) -> const pomona_score& { return scores[i]; };
    const auto keep_of = [&](int64_t i) { return Keep{thresholds[i], num_ties[i]}; };
    run_masked(work, num_scores, kept, score_of, keep_of, [&](const Chunk& chunk, int64_t left) {
      void* target = targets[chunk.tensor];
      const int32_t type = target_types[chunk.tensor];
      return for_parts(scores[chunk.tensor], chunk, thresholds[chunk.tensor], left,
                       [&](const float* a, const float* b, int64_t begin, int64_t n, int32_t above) -> int64_t {
                         if (type == POMONA_F32) {
                           return kernels().multiply(a, b, n, above, static_cast<float*>(target) + begin);
                         }
                         uint8_t mask[kBlock];
                         int64_t part_kept = 0;
                         for (int64_t i = 0; i < n; i += kBlock) {
                           const int64_t m = std::min(kBlock, n - i);
                           part_kept += kernels().mask(a + i, b ? b + i : nullptr, m, above, mask);
                           char* values = static_cast<char*>(target) + (begin + i) * size_of(type);
                           drop_any(values, type, mask, m);
                         }
                         return part_kept;
                       });
    });
    return POMONA_OK;
  });
}

int pomona_finite(const void* const* tensors, const int64_t* sizes, const int32_t* types, int64_t num_tensors,
                  int num_threads, int64_t* num_bad) {
  return guarded([&]() -> int {
    Work work;
    if (num_bad == nullptr) return POMONA_BAD_POINTER;
    if (const int error = check_arrays(tensors, sizes, types, num_tensors, num_threads)) return error;
    for (int64_t i = 0; i < num_tensors; ++i) work.add(i, sizes[i]);
    work.use_threads(num_threads);
    std::vector<int64_t> bad(work.chunks.size());
    work.run([&](const Chunk& chunk, int64_t index, int) {
      const int32_t type = types[chunk.tensor];
      bad[static_cast<size_t>(index)] = kernels().nonfinite(element(tensors[chunk.tensor], type, chunk.begin), chunk.n, type);
    });
    *num_bad = 0;
    for (const int64_t n : bad) *num_bad += n;
    return POMONA_OK;
  });
}

int pomona_zero(void* const* values, const int64_t* sizes, const int32_t* types, const uint8_t* const* pruned,
                int64_t num_tensors, int num_threads, double* largest) {
  return guarded([&]() -> int {
    Work work;
    if (const int error = check_arrays(values, sizes, types, num_tensors, num_threads)) return error;
    if (num_tensors > 0 && pruned == nullptr) return POMONA_BAD_POINTER;
    for (int64_t i = 0; i < num_tensors; ++i) {
      if (sizes[i] > 0 && pruned[i] == nullptr) return POMONA_BAD_POINTER;
      work.add(i, sizes[i]);
    }
    work.use_threads(num_threads);
    std::vector<uint64_t> lost(work.chunks.size());
    work.run([&](const Chunk& chunk, int64_t index, int) {
      const int32_t type = types[chunk.tensor];
      char* begin = static_cast<char*>(values[chunk.tensor]) + chunk.begin * size_of(type);
      lost[static_cast<size_t>(index)] = kernels().zero(begin, pruned[chunk.tensor] + chunk.begin, chunk.n, type);
    });
    if (largest == nullptr) return POMONA_OK;
    std::vector<uint64_t> most(static_cast<size_t>(num_tensors));
    for (size_t i = 0; i < lost.size(); ++i) {
      uint64_t& mine = most[static_cast<size_t>(work.chunks[i].tensor)];
      mine = std::max(mine, lost[i]);
    }
    for (int64_t i = 0; i < num_tensors; ++i) largest[i] = real_of(most[static_cast<size_t>(i)], types[i]);
    return POMONA_OK;
  });
}

int pomona_survey(const void* const* values, const int64_t* sizes, const int32_t* types, const int64_t* row_sizes,
                  int64_t num_tensors, int num_threads, int64_t* const* counts, double* smallest) {
  return guarded([&]() -> int {
    Work work;
    if (const int error = check_arrays(values, sizes, types, num_tensors, num_threads)) return error;
    if (num_tensors > 0 && (row_sizes == nullptr || counts == nullptr || smallest == nullptr)) return POMONA_BAD_POINTER;
    for (int64_t i = 0; i < num_tensors; ++i) {
      if (row_sizes[i] < 1 || sizes[i] % row_sizes[i] != 0) return POMONA_BAD_SIZE;
      if (sizes[i] > 0 && counts[i] == nullptr) return POMONA_BAD_POINTER;
      work.add_rows(i, sizes[i], row_sizes[i]);
    }
    work.use_threads(num_threads);
    std::vector<Extent> extents(work.chunks.size());
    work.run([&](const Chunk& chunk, int64_t index, int) {
      Extent& extent = extents[static_cast<size_t>(index)];
      const int32_t type = types[chunk.tensor];
      const int64_t row = row_sizes[chunk.tensor];
      for (int64_t begin = chunk.begin; begin < chunk.begin + chunk.n; begin += row) {
        int64_t count = 0;
        for (int64_t i = 0; i < row; i += kChunk) {
          const char* piece = element(values[chunk.tensor], type, begin + i);
          count += kernels().survey(piece, std::min(kChunk, row - i), type, &extent.smallest, &extent.largest);
        }
        counts[chunk.tensor][begin / row] = count;
      }
    });
    std::vector<Extent> whole(static_cast<size_t>(num_tensors));
    for (size_t i = 0; i < extents.size(); ++i) {
      Extent& mine = whole[static_cast<size_t>(work.chunks[i].tensor)];
      mine.smallest = std::min(mine.smallest, extents[i].smallest);
      mine.largest = std::max(mine.largest, extents[i].largest);
    }
    for (int64_t i = 0; i < num_tensors; ++i) smallest[i] = whole[static_cast<size_t>(i)].smallest_as(types[i]);
    return POMONA_OK;
  });
}

}
