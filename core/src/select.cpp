// The k-th largest key of many tensors, exactly, usually in one pass over them.
//
// A sample gives a bracket [low, high] that most probably holds the wanted key. One pass counts the keys above it and
// gathers the few inside, among which the order statistic is found. When the bracket missed, the counts tell on which
// side, and a wider one follows; when it holds too many keys to gather, as with ties, a histogram of it narrows it down.
// Both shrink an interval of which everything is known exactly, so the result does not depend on the sample.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pomona.h"
#include "scores.h"

namespace pomona {
namespace {

constexpr int kBits = 11;
constexpr int64_t kBins = int64_t{1} << kBits;
constexpr int64_t kSmallTotal = int64_t{1} << 15;     // so few that all their keys are gathered
constexpr int64_t kSampleBlock = 16;                  // a cache line of float32
constexpr int64_t kMinSampleBlocks = int64_t{1} << 10;
// Standard deviations of a sample of independent keys on either side. Keys of one block of a convolution's weights are
// alike, which makes the true deviation about 2.4 times as large.
constexpr double kHalfWidth = 8.0;

// A bracket holds more keys the more there are in all, like the square root of their number even where the sample grows
// with it. Were these limits constants, a billion keys would not fit, and each selection would take further passes.
int64_t max_gathered(int64_t total) { return std::max(int64_t{1} << 22, total / 128); }
int64_t max_sample_blocks(int64_t total) { return std::max(int64_t{1} << 16, total / 4096); }

int bits_in(uint32_t x) {
  int bits = 0;
  for (; x != 0; x >>= 1) ++bits;
  return bits;
}

// The smallest shift that maps [0, width] to at most kBins bins.
int shift_for(uint32_t width) { return std::max(0, bits_in(width) - kBits); }

struct Found {
  int32_t threshold;
  int64_t num_greater, num_equal;
};

// The rank-th largest (1 <= rank <= n) of keys in [low, high].
Found select_among(const int32_t* keys, int64_t n, int64_t rank, int32_t low, int32_t high) {
  int64_t greater = 0;
  std::unique_ptr<int32_t[]> few;
  while (low < high) {
    const int shift = shift_for(static_cast<uint32_t>(high - low));
    uint32_t bins[kHistogramLanes][kBins] = {};
    int64_t i = 0;
    for (; i + kHistogramLanes <= n; i += kHistogramLanes) {
      for (int lane = 0; lane < kHistogramLanes; ++lane) ++bins[lane][(keys[i + lane] - low) >> shift];
    }
    for (; i < n; ++i) ++bins[0][(keys[i] - low) >> shift];
    int bin = (high - low) >> shift;
    int64_t inside = 0;
    for (;; --bin) {
      inside = 0;
      for (int lane = 0; lane < kHistogramLanes; ++lane) inside += bins[lane][bin];
      if (rank <= inside) break;
      rank -= inside;
      greater += inside;
    }
    const int64_t first = low + (static_cast<int64_t>(bin) << shift);
    high = static_cast<int32_t>(std::min<int64_t>(high, first + (int64_t{1} << shift) - 1));
    low = static_cast<int32_t>(first);
    if (low == high) {
      n = inside;
      break;
    }
    // One more than fit: each key is written, and stays if it is inside.
    std::unique_ptr<int32_t[]> fewer(new int32_t[static_cast<size_t>(inside) + 1]);
    int64_t m = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int32_t key = keys[j];
      fewer[static_cast<size_t>(m)] = key;
      m += (key >= low) & (key <= high);
    }
    few = std::move(fewer);
    keys = few.get();
    n = m;
  }
  return {low, greater, n};
}

// Keys at fixed random places, so that the k-th largest of all can be guessed.
class Sample {
 public:
  Sample(const pomona_score* scores, const Work& work, int64_t k) : total_(work.total) {
    const double share = static_cast<double>(k) / static_cast<double>(total_);
    share_ = share;
    // As many as leave about a quarter of what may be gathered inside the bracket.
    const double wanted = 2.0 * kHalfWidth * static_cast<double>(total_) / (static_cast<double>(max_gathered(total_)) / 4.0);
    const double keys = wanted * wanted * share * (1.0 - share);
    int64_t num_blocks = static_cast<int64_t>(std::min(keys / kSampleBlock, static_cast<double>(max_sample_blocks(total_))));
    num_blocks = std::max(num_blocks, std::min(int64_t{8} * kMinSampleBlocks, std::max(kMinSampleBlocks, total_ / 2048)));
    num_blocks = std::min(num_blocks, total_ / kSampleBlock);
    draw(scores, work, num_blocks);
    std::memset(coarse_, 0, sizeof coarse_);
    for (const int32_t key : keys_) ++coarse_[key >> kCoarse];
  }

  // Bounds outside of which the wanted key lies with little probability; `factor` widens them.
  void bracket(double factor, int32_t* low, int32_t* high) const {
    const double n = static_cast<double>(keys_.size());
    const double half = factor * kHalfWidth * std::sqrt(n * share_ * (1.0 - share_)) + 2.0;
    const double top = std::floor(share_ * n - half), bottom = std::ceil(share_ * n + half);
    *high = top < 1.0 ? POMONA_KEY_MAX : upper(static_cast<int64_t>(top));
    *low = bottom > n ? 1 : std::max(1, lower(static_cast<int64_t>(bottom)));
  }

 private:
  static constexpr int kCoarse = 31 - kBits;       // bits below the coarse bins
  static constexpr int kFine = kCoarse - 10;       // and below the fine ones: bounds are as exact as 1 in 8,192

  void draw(const pomona_score* scores, const Work& work, int64_t num_blocks) {
    // One block in each of num_blocks equal stretches, so that places come in order and a chunk is found by walking on.
    struct Place {
      int64_t tensor, begin;
    };
    std::vector<Place> places(static_cast<size_t>(num_blocks));
    uint64_t state = 0x706f6d6f6e61;
    size_t chunk = 0;
    int64_t passed = 0;
    const double stretch = static_cast<double>(total_) / static_cast<double>(num_blocks);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const double u = static_cast<double>(next_random(&state) >> 11) * 0x1p-53;
      const int64_t at = std::min(total_ - 1, static_cast<int64_t>((static_cast<double>(i) + u) * stretch));
      while (passed + work.chunks[chunk].n <= at) passed += work.chunks[chunk++].n;
      const Chunk& c = work.chunks[chunk];
      places[static_cast<size_t>(i)] = {c.tensor, c.begin + std::max<int64_t>(0, at - passed) / kSampleBlock * kSampleBlock};
    }
    keys_.resize(static_cast<size_t>(num_blocks * kSampleBlock));
    int32_t* out = keys_.data();
    constexpr size_t kAhead = 24;
    for (size_t i = 0; i < places.size(); ++i) {
      if (i + kAhead < places.size()) {
        const Place& ahead = places[i + kAhead];
        prefetch(element(scores[ahead.tensor].a, scores[ahead.tensor].a_type, ahead.begin));
        if (scores[ahead.tensor].b) prefetch(element(scores[ahead.tensor].b, scores[ahead.tensor].b_type, ahead.begin));
      }
      const pomona_score& score = scores[places[i].tensor];
      const int64_t n = std::min(kSampleBlock, score.n - places[i].begin);
      for_floats(score, places[i].begin, n, [&](const float* a, const float* b, int64_t, int64_t m) {
        for (int64_t j = 0; j < m; ++j) {
          const float value = b ? a[j] * b[j] : a[j];
          std::memcpy(out + j, &value, sizeof value);
          out[j] &= POMONA_KEY_MAX;
        }
        out += m;
      });
    }
    keys_.resize(static_cast<size_t>(out - keys_.data()));
  }

  static uint64_t next_random(uint64_t* state) {  // SplitMix64
    uint64_t z = (*state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  static void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
  }

  // The first and the last key of the fine bin of the rank-th largest key of the sample.
  int32_t lower(int64_t rank) const { return fine_bin(rank) << kFine; }
  int32_t upper(int64_t rank) const { return (fine_bin(rank) << kFine) + ((1 << kFine) - 1); }

  int32_t fine_bin(int64_t rank) const {
    int bin = static_cast<int>(kBins) - 1;
    for (; rank > coarse_[bin]; --bin) rank -= coarse_[bin];
    int64_t fine[1 << 10] = {};
    for (const int32_t key : keys_) {
      if (key >> kCoarse == bin) ++fine[(key >> kFine) & 1023];
    }
    int part = 1023;
    for (; rank > fine[part]; --part) rank -= fine[part];
    return (bin << 10) + part;
  }

  int64_t total_;
  double share_;
  std::vector<int32_t> keys_;
  int64_t coarse_[kBins];
};

struct alignas(64) Worker {  // a cache line of its own
  Tally tally;
  std::unique_ptr<int32_t[]> keys;
  std::vector<uint32_t> lanes;
  std::vector<int64_t> bins;
  int64_t num_in_lanes = 0;

  void empty_lanes() {
    const size_t stride = bins.size();
    for (size_t i = 0; i < lanes.size(); ++i) bins[i % stride] += lanes[i];
    std::fill(lanes.begin(), lanes.end(), 0);
    num_in_lanes = 0;
  }
};

Tally sum(const std::vector<Worker>& workers) {
  Tally total;
  for (const Worker& w : workers) {
    total.num_greater += w.tally.num_greater;
    total.num_infinite += w.tally.num_infinite;
    total.num_nan += w.tally.num_nan;
  }
  return total;
}

// What a chunk has above the bracket, and where its keys inside are.
struct Segment {
  int64_t greater, begin, n;
};

// Copies keys in [low, high] to `keys` as far as there is room. Returns how many there are, or, if that is more and
// `segments` are wanted (one a chunk), which need them all, something above `capacity`.
int64_t gather_all(const pomona_score* scores, const Work& work, int32_t low, int32_t high, int32_t* keys,
                   int64_t capacity, Segment* segments, Tally* tally) {
  const Kernels& kernel = kernels();
  std::vector<Worker> workers(static_cast<size_t>(work.num_threads));
  for (Worker& w : workers) w.keys.reset(new int32_t[kChunk + kGatherSlack]);
  std::atomic<int64_t> used{0};
  work.run([&](const Chunk& chunk, int64_t index, int worker) {
    if (segments != nullptr && used.load(std::memory_order_relaxed) > capacity) return;
    Worker& mine = workers[static_cast<size_t>(worker)];
    const int64_t before = mine.tally.num_greater;
    int64_t n = 0;
    for_floats(scores[chunk.tensor], chunk.begin, chunk.n, [&](const float* a, const float* b, int64_t, int64_t m) {
      n += kernel.gather(a, b, m, low, high, mine.keys.get() + n, &mine.tally);
    });
    const int64_t begin = used.fetch_add(n, std::memory_order_relaxed);
    if (segments != nullptr) segments[index] = {mine.tally.num_greater - before, begin, n};
    const int64_t room = std::min(n, capacity - begin);
    if (room > 0) std::memcpy(keys + begin, mine.keys.get(), static_cast<size_t>(room) * sizeof(int32_t));
  });
  *tally = sum(workers);
  return used.load();
}

// Writes counts of the bins; returns how many keys are in [low, high]. tally->num_greater is of `high`.
int64_t histogram_all(const pomona_score* scores, const Work& work, int32_t low, int32_t high, int shift, int64_t* bins,
                      int64_t num_bins, Tally* tally) {
  const Kernels& kernel = kernels();
  constexpr int64_t kLaneLimit = int64_t{1} << 31;
  std::vector<Worker> workers(static_cast<size_t>(work.num_threads));
  for (Worker& w : workers) {
    w.bins.assign(static_cast<size_t>(num_bins + 2), 0);
    w.lanes.assign(kHistogramLanes * w.bins.size(), 0);
  }
  work.run([&](const Chunk& chunk, int64_t, int worker) {
    Worker& mine = workers[static_cast<size_t>(worker)];
    for_floats(scores[chunk.tensor], chunk.begin, chunk.n, [&](const float* a, const float* b, int64_t, int64_t m) {
      kernel.histogram(a, b, m, low, high, shift, num_bins, mine.lanes.data(), &mine.tally);
    });
    mine.num_in_lanes += chunk.n;
    if (mine.num_in_lanes >= kLaneLimit) mine.empty_lanes();
  });
  std::fill(bins, bins + num_bins, 0);
  int64_t greater = 0, inside = 0;
  for (Worker& w : workers) {
    w.empty_lanes();
    for (int64_t i = 0; i < num_bins; ++i) {
      bins[i] += w.bins[static_cast<size_t>(i)];
      inside += w.bins[static_cast<size_t>(i)];
    }
    greater += w.bins[static_cast<size_t>(num_bins + 1)];
  }
  *tally = sum(workers);
  tally->num_greater = greater;
  return inside;
}

struct Count {
  int64_t greater, equal;
};

std::vector<Count> count_all(const pomona_score* scores, const Work& work, int32_t threshold) {
  const Kernels& kernel = kernels();
  std::vector<Count> counts(work.chunks.size());  // of each chunk
  work.run([&](const Chunk& chunk, int64_t index, int) {
    Count count{};
    for_floats(scores[chunk.tensor], chunk.begin, chunk.n, [&](const float* a, const float* b, int64_t, int64_t m) {
      kernel.count(a, b, m, threshold, &count.greater, &count.equal);
    });
    counts[static_cast<size_t>(index)] = count;
  });
  return counts;
}

// Shrinks an interval of keys until the wanted one is known.
class Selector {
 public:
  // `counts`: of each tensor the keys above the threshold and equal to it.
  Selector(const pomona_score* scores, const Work& work, int64_t k, pomona_counts* counts)
      : scores_(scores), work_(work), k_(k), counts_(counts) {}

  pomona_kth_largest select() {
    if (k_ == 0) {
      count_at(POMONA_KEY_MAX);
    } else if (work_.total <= kSmallTotal) {
      num_inside_ = work_.total;  // at most
    } else {
      try_sample();
    }
    while (!is_found_) {
      if (num_inside_ >= 0 && num_inside_ <= max_gathered(work_.total)) {
        gather(low_, high_);
      } else {
        narrow(low_, high_);
      }
    }
    if (!has_counts_) count_each();
    return {greater_, num_equal_, tally_.num_infinite, tally_.num_nan, low_, num_passes_};
  }

 private:
  void try_sample() {
    const Sample sample(scores_, work_, k_);
    for (const double factor : {1.0, 4.0}) {
      int32_t low = 0, high = 0;
      sample.bracket(factor, &low, &high);
      low = std::max(low, low_);
      high = std::min(high, high_);
      if (low > high) return;
      const bool has_room = gather(low, high);
      if (!has_room) narrow(low, high);
      if (is_found_ || !has_room) return;
    }
  }

  // One pass that gathers [low, high]; false if there is no room, which tells nothing.
  bool gather(int32_t low, int32_t high) {
    const int64_t capacity = std::min(max_gathered(work_.total), num_inside_ < 0 ? work_.total : num_inside_);
    const std::unique_ptr<int32_t[]> keys(new int32_t[static_cast<size_t>(capacity)]);
    Tally tally;
    std::vector<Segment> segments(work_.chunks.size());
    const int64_t n = gather_all(scores_, work_, low, high, keys.get(), capacity, segments.data(), &tally);
    ++num_passes_;
    if (n > capacity) return false;
    tally_ = tally;
    const int64_t rank = k_ - tally.num_greater;
    if (rank > n && low == 1) {  // fewer than k keys are not zero, and those up to `high` are all here
      const int64_t ones = std::count(keys.get(), keys.get() + n, 1);
      finish(1, tally.num_greater + n - ones, ones);
      count_each(segments, keys.get());
    } else if (rank < 1 || rank > n) {
      step_aside(low, high, tally.num_greater, n);
    } else {
      const Found found = select_among(keys.get(), n, rank, low, high);
      finish(found.threshold, tally.num_greater + found.num_greater, found.num_equal);
      count_each(segments, keys.get());
    }
    return true;
  }

  // From what one pass gathered.
  void count_each(const std::vector<Segment>& segments, const int32_t* keys) {
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& s = segments[i];
      int64_t greater = s.greater, equal = 0;
      for (int64_t j = s.begin; j < s.begin + s.n; ++j) {
        greater += keys[j] > low_;
        equal += keys[j] == low_;
      }
      add(work_.chunks[i].tensor, greater, equal);
    }
    has_counts_ = true;
  }

  // By one more pass.
  void count_each() {
    const std::vector<Count> counts = count_all(scores_, work_, low_);
    ++num_passes_;
    for (size_t i = 0; i < counts.size(); ++i) add(work_.chunks[i].tensor, counts[i].greater, counts[i].equal);
    has_counts_ = true;
  }

  void add(int64_t tensor, int64_t greater, int64_t equal) {
    counts_[tensor].num_greater += greater;
    counts_[tensor].num_equal += equal;
  }

  // One pass that finds which 2,048th of [low, high] the wanted key is in.
  void narrow(int32_t low, int32_t high) {
    const int shift = shift_for(static_cast<uint32_t>(high - low));
    std::vector<int64_t> bins(static_cast<size_t>(((high - low) >> shift) + 1));
    const int64_t num_bins = static_cast<int64_t>(bins.size());
    const int64_t n = histogram_all(scores_, work_, low, high, shift, bins.data(), num_bins, &tally_);
    ++num_passes_;
    int64_t rank = k_ - tally_.num_greater;
    if (rank > n && low == 1) return count_at(1);
    if (rank < 1 || rank > n) return step_aside(low, high, tally_.num_greater, n);
    int64_t bin = num_bins - 1;
    for (; rank > bins[static_cast<size_t>(bin)]; --bin) rank -= bins[static_cast<size_t>(bin)];
    const int64_t first = low + (bin << shift);
    low_ = static_cast<int32_t>(first);
    high_ = static_cast<int32_t>(std::min<int64_t>(high, first + (int64_t{1} << shift) - 1));
    greater_ = k_ - rank;
    num_inside_ = bins[static_cast<size_t>(bin)];
    if (low_ == high_) finish(low_, greater_, num_inside_);
  }

  // The wanted key is not in [low, high], which holds n keys.
  void step_aside(int32_t low, int32_t high, int64_t greater, int64_t n) {
    if (k_ <= greater) {
      low_ = high + 1;
      num_inside_ = greater - greater_;
    } else {
      high_ = low - 1;
      greater_ = greater + n;
      num_inside_ = -1;
    }
  }

  void count_at(int32_t key) {
    int64_t equal = 0;
    histogram_all(scores_, work_, key, key, 0, &equal, 1, &tally_);
    ++num_passes_;
    finish(key, tally_.num_greater, equal);
  }

  void finish(int32_t threshold, int64_t num_greater, int64_t num_equal) {
    low_ = high_ = threshold;
    greater_ = num_greater;
    num_equal_ = num_equal;
    is_found_ = true;
  }

  const pomona_score* scores_;
  const Work& work_;
  const int64_t k_;
  pomona_counts* const counts_;
  bool has_counts_ = false;
  int32_t low_ = 1, high_ = POMONA_KEY_MAX;  // the wanted key is in here, unless fewer than k are not zero
  int64_t greater_ = 0;                      // keys above high_
  int64_t num_inside_ = -1;                  // keys in [low_, high_], at most; -1: not known
  int64_t num_equal_ = 0;
  int num_passes_ = 0;
  bool is_found_ = false;
  Tally tally_;
};

}  // namespace
}  // namespace pomona

using namespace pomona;

extern "C" {

int pomona_select(const pomona_score* scores, int64_t num_scores, int64_t k, int num_threads, pomona_kth_largest* out,
                  pomona_counts* counts) {
  return guarded([&]() -> int {
    Work work;
    if (out == nullptr || (num_scores > 0 && counts == nullptr)) return POMONA_BAD_POINTER;
    if (const int error = check_scores(scores, num_scores, num_threads, &work)) return error;
    if (k < 0 || k > work.total) return POMONA_BAD_VALUE;
    std::fill(counts, counts + num_scores, pomona_counts{0, 0});
    *out = Selector(scores, work, k, counts).select();
    return POMONA_OK;
  });
}

int pomona_histogram(const pomona_score* scores, int64_t num_scores, int32_t low, int32_t high, int shift, int64_t* bins,
                     int64_t num_bins, int num_threads, pomona_tally* out) {
  return guarded([&]() -> int {
    Work work;
    if (bins == nullptr) return POMONA_BAD_POINTER;
    if (low < 0 || high < low || shift < 0 || shift > 30) return POMONA_BAD_VALUE;
    if (num_bins > (int64_t{1} << 16) || num_bins < (static_cast<int64_t>(high - low) >> shift) + 1) return POMONA_BAD_SIZE;
    if (const int error = check_scores(scores, num_scores, num_threads, &work)) return error;
    Tally tally;
    histogram_all(scores, work, low, high, shift, bins, num_bins, &tally);
    if (out != nullptr) *out = {tally.num_greater, tally.num_infinite, tally.num_nan};
    return POMONA_OK;
  });
}

int pomona_gather(const pomona_score* scores, int64_t num_scores, int32_t low, int32_t high, int32_t* keys,
                  int64_t capacity, int num_threads, int64_t* count) {
  return guarded([&]() -> int {
    Work work;
    if (count == nullptr || (keys == nullptr && capacity > 0)) return POMONA_BAD_POINTER;
    if (low < 0 || high < low) return POMONA_BAD_VALUE;
    if (capacity < 0) return POMONA_BAD_SIZE;
    if (const int error = check_scores(scores, num_scores, num_threads, &work)) return error;
    Tally tally;
    *count = gather_all(scores, work, low, high, keys, capacity, nullptr, &tally);
    return POMONA_OK;
  });
}

int pomona_count(const pomona_score* scores, int64_t num_scores, int32_t threshold, int64_t* greater, int64_t* equal,
                 int num_threads) {
  return guarded([&]() -> int {
    Work work;
    if (num_scores > 0 && (greater == nullptr || equal == nullptr)) return POMONA_BAD_POINTER;
    if (threshold < 0) return POMONA_BAD_VALUE;
    if (const int error = check_scores(scores, num_scores, num_threads, &work)) return error;
    const std::vector<Count> counts = count_all(scores, work, threshold);
    std::fill(greater, greater + num_scores, 0);
    std::fill(equal, equal + num_scores, 0);
    for (size_t i = 0; i < counts.size(); ++i) {
      greater[work.chunks[i].tensor] += counts[i].greater;
      equal[work.chunks[i].tensor] += counts[i].equal;
    }
    return POMONA_OK;
  });
}

}
