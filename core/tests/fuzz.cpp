// Random calls of the whole interface, each checked against a few plain lines, for every instruction set of the machine.
// Meant for sanitizers (`make sanitize`): arrays have exactly their size. Argument: how many rounds.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "pomona.h"

#define CHECK(claim)                                                                  \
  do {                                                                                \
    if (!(claim)) {                                                                   \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #claim);      \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

namespace {

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

float draw(Random& random, int kind) {
  const float x = std::normal_distribution<float>()(random);
  switch (kind) {
    case 0: return x;
    case 1: return std::round(x);                                                         // ties
    case 2: return below(random, 20) == 0 ? x : -0.0f;                                    // mostly zeros
    case 3: return 1.0f;                                                                  // all equal
    case 4: return x * 1e-42f;                                                            // denormals
    case 5: return below(random, 50) == 0 ? std::numeric_limits<float>::infinity() : x;
    case 6: return below(random, 50) == 0 ? std::numeric_limits<float>::quiet_NaN() : x;
    default: return std::exp(8.0f * x);
  }
}

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// One array in one of the four types, and its values as float32.
struct Array {
  int32_t type;
  std::vector<char> bytes;
  std::vector<float> values;

  Array(Random& random, int64_t n, int kind) : type(static_cast<int32_t>(below(random, 3))) {
    type = type == 2 ? POMONA_F64 : type;
    if (below(random, 2)) type = POMONA_F32;
    const size_t size = type == POMONA_BF16 ? 2 : type == POMONA_F64 ? 8 : 4;
    bytes.resize(size * static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      float x = draw(random, kind);
      char* at = bytes.data() + size * static_cast<size_t>(i);
      if (type == POMONA_F64) {
        const double wide = x;
        std::memcpy(at, &wide, size);
      } else if (type == POMONA_BF16) {
        uint32_t bits = static_cast<uint32_t>(bits_of(x)) & 0xffff0000u;
        std::memcpy(&x, &bits, sizeof x);
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(at, &half, size);
      } else {
        std::memcpy(at, &x, size);
      }
      values.push_back(x);
    }
  }
};

struct Case {
  std::vector<Array> a, b;
  std::vector<std::vector<uint8_t>> inside;
  std::vector<pomona_score> scores;
  std::vector<std::vector<int32_t>> keys;
  std::vector<int32_t> all;

  Case(Random& random, int64_t largest) {
    const int64_t num = 1 + below(random, 6);
    const bool is_product = below(random, 2);
    const bool is_masked = below(random, 3) == 0;
    const int kind = static_cast<int>(below(random, 8));
    for (int64_t i = 0; i < num; ++i) {
      const int64_t n = below(random, 4) == 0 ? below(random, 40) : below(random, largest);
      a.emplace_back(random, n, kind);
      b.emplace_back(random, is_product ? n : 0, kind == 4 ? 0 : kind);
      keys.emplace_back();
      inside.emplace_back();
      for (int64_t j = 0; j < n; ++j) {
        const float x = a.back().values[static_cast<size_t>(j)];
        const volatile float score = is_product ? x * b.back().values[static_cast<size_t>(j)] : x;
        inside.back().push_back(static_cast<uint8_t>(below(random, 2)));
        const int32_t key = bits_of(score) & POMONA_KEY_MAX;
        const int32_t masked = inside.back().back() ? std::max(key, 0x00800000) : 0;
        keys.back().push_back(is_masked ? masked : key);
      }
      all.insert(all.end(), keys.back().begin(), keys.back().end());
    }
    for (size_t i = 0; i < a.size(); ++i) {
      scores.push_back({a[i].bytes.data(), is_product ? b[i].bytes.data() : nullptr,
                        static_cast<int64_t>(keys[i].size()), a[i].type, b[i].type,
                        is_masked ? inside[i].data() : nullptr});
    }
    std::sort(all.begin(), all.end(), std::greater<int32_t>());
  }

  int64_t num() const { return static_cast<int64_t>(scores.size()); }
  int64_t count(const std::function<bool(int32_t)>& claim) const { return std::count_if(all.begin(), all.end(), claim); }
};

void check_select(const Case& c, int64_t k, int threads) {
  pomona_kth_largest s;
  std::vector<pomona_counts> counts(c.scores.size());
  CHECK(pomona_select(c.scores.data(), c.num(), k, threads, &s, counts.data()) == POMONA_OK);
  const int64_t nonzero = c.count([](int32_t key) { return key > 0; });
  const int32_t t = k == 0 ? POMONA_KEY_MAX : nonzero < k ? 1 : c.all[static_cast<size_t>(k - 1)];
  CHECK(s.threshold == t);
  CHECK(s.num_greater == c.count([&](int32_t key) { return key > t; }));
  CHECK(s.num_equal == c.count([&](int32_t key) { return key == t; }));
  CHECK(s.num_infinite == c.count([](int32_t key) { return key == POMONA_KEY_INFINITE; }));
  CHECK(s.num_nan == c.count([](int32_t key) { return key > POMONA_KEY_INFINITE; }));
  for (size_t i = 0; i < counts.size(); ++i) {
    const std::vector<int32_t>& keys = c.keys[i];
    CHECK(counts[i].num_greater == std::count_if(keys.begin(), keys.end(), [&](int32_t key) { return key > t; }));
    CHECK(counts[i].num_equal == std::count(keys.begin(), keys.end(), t));
  }
}

void check_histogram(const Case& c, Random& random, int threads) {
  const int shift = 15 + static_cast<int>(below(random, 16));
  const int32_t x = static_cast<int32_t>(random() & POMONA_KEY_MAX), y = static_cast<int32_t>(random() & POMONA_KEY_MAX);
  const int32_t low = std::min(x, y), high = std::max(x, y);
  std::vector<int64_t> bins(static_cast<size_t>((high - low) >> shift) + 1);
  pomona_tally tally;
  CHECK(pomona_histogram(c.scores.data(), c.num(), low, high, shift, bins.data(), static_cast<int64_t>(bins.size()),
                         threads, &tally) == POMONA_OK);
  for (const int32_t key : c.all) {
    if (key >= low && key <= high) --bins[static_cast<size_t>((key - low) >> shift)];
  }
  for (const int64_t bin : bins) CHECK(bin == 0);
  CHECK(tally.num_greater == c.count([&](int32_t key) { return key > high; }));

  const int64_t inside = c.count([&](int32_t key) { return key >= low && key <= high; });
  std::vector<int32_t> keys(static_cast<size_t>(below(random, inside + 10)));
  int64_t count = 0;
  CHECK(pomona_gather(c.scores.data(), c.num(), low, high, keys.data(), static_cast<int64_t>(keys.size()), threads,
                      &count) == POMONA_OK);
  CHECK(count == inside);
  for (int64_t i = 0; i < std::min<int64_t>(count, static_cast<int64_t>(keys.size())); ++i) {
    CHECK(keys[static_cast<size_t>(i)] >= low && keys[static_cast<size_t>(i)] <= high);
  }
}

void check_masks(Case& c, Random& random, int threads) {
  std::vector<int32_t> thresholds;
  std::vector<int64_t> ties, kept(c.scores.size()), greater(c.scores.size()), equal(c.scores.size());
  std::vector<std::vector<uint8_t>> masks, expected;
  std::vector<uint8_t*> pointers;
  for (const auto& keys : c.keys) {
    const int32_t key = keys.empty() ? 1 : keys[static_cast<size_t>(below(random, static_cast<int64_t>(keys.size())))];
    thresholds.push_back(std::max(1, key));
    ties.push_back(below(random, 3) == 0 ? -1 : below(random, 8) == 0 ? 0 : below(random, 600));
    masks.emplace_back(keys.size());
    expected.emplace_back();
    int64_t left = ties.back();
    for (const int32_t other : keys) {
      const bool is_tie = other == thresholds.back();
      expected.back().push_back(other > thresholds.back() || (is_tie && (left < 0 || left > 0)));
      if (is_tie && left > 0) --left;
    }
  }
  for (auto& mask : masks) pointers.push_back(mask.data());
  CHECK(pomona_mask(c.scores.data(), c.num(), thresholds.data(), ties.data(), pointers.data(), threads, kept.data()) ==
        POMONA_OK);
  CHECK(masks == expected);
  for (size_t i = 0; i < masks.size(); ++i) CHECK(kept[i] == std::count(masks[i].begin(), masks[i].end(), 1));

  CHECK(pomona_count(c.scores.data(), c.num(), thresholds[0], greater.data(), equal.data(), threads) == POMONA_OK);
  for (size_t i = 0; i < masks.size(); ++i) {
    CHECK(equal[i] == std::count(c.keys[i].begin(), c.keys[i].end(), thresholds[0]));
  }

  std::vector<void*> targets;
  std::vector<int32_t> types;
  for (Array& a : c.a) {  // the targets are what the scores are made of
    targets.push_back(a.bytes.data());
    types.push_back(a.type);
  }
  CHECK(pomona_multiply(c.scores.data(), c.num(), thresholds.data(), ties.data(), targets.data(), types.data(), threads,
                        kept.data()) == POMONA_OK);
  for (size_t i = 0; i < c.a.size(); ++i) {
    if (c.a[i].type != POMONA_F32) continue;
    for (size_t j = 0; j < masks[i].size(); ++j) {
      float now;
      std::memcpy(&now, c.a[i].bytes.data() + 4 * j, sizeof now);
      const volatile float product = c.a[i].values[j] * static_cast<float>(masks[i][j]);
      CHECK(std::isnan(now) ? std::isnan(product) : bits_of(now) == bits_of(product));
    }
  }
}

void check_zeros(Case& c, Random& random, int threads) {
  std::vector<void*> values;
  std::vector<const void*> constant;
  std::vector<const uint8_t*> pruned;
  std::vector<int64_t> sizes, rows;
  std::vector<int32_t> types;
  std::vector<std::vector<int64_t>> counts;
  std::vector<int64_t*> places;
  for (size_t i = 0; i < c.a.size(); ++i) {
    const int64_t n = static_cast<int64_t>(c.a[i].values.size());
    const int64_t parts = 1 + below(random, 9);
    rows.push_back(n > 0 && n % parts == 0 ? n / parts : std::max<int64_t>(1, n));
    values.push_back(c.a[i].bytes.data());
    constant.push_back(values.back());
    pruned.push_back(c.inside[i].data());
    sizes.push_back(n);
    types.push_back(c.a[i].type);
    counts.emplace_back(static_cast<size_t>(n / rows.back()));
  }
  for (auto& count : counts) places.push_back(count.data());
  std::vector<double> largest(sizes.size()), smallest(sizes.size());
  CHECK(pomona_zero(values.data(), sizes.data(), types.data(), pruned.data(), c.num(), threads, largest.data()) ==
        POMONA_OK);
  CHECK(pomona_survey(constant.data(), sizes.data(), types.data(), rows.data(), c.num(), threads, places.data(),
                      smallest.data()) == POMONA_OK);
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::vector<int64_t> expected(counts[i].size());
    double most = 0.0, least = std::numeric_limits<double>::infinity();
    const auto larger = [](double x, double y) { return std::isnan(x) || x > y ? x : y; };
    for (size_t j = 0; j < c.a[i].values.size(); ++j) {
      const double magnitude = std::fabs(c.a[i].values[j]);
      if (c.inside[i][j]) {
        most = larger(most, magnitude);
      } else if (magnitude != 0.0) {
        ++expected[j / static_cast<size_t>(rows[i])];
        least = -larger(-least, -magnitude);
      }
    }
    CHECK(counts[i] == expected);
    CHECK(std::isnan(most) ? std::isnan(largest[i]) : largest[i] == most);
    CHECK(std::isnan(least) ? std::isnan(smallest[i]) : smallest[i] == least);
  }
}

void check_refusals() {
  alignas(8) float x[4] = {};
  pomona_kth_largest s;
  int64_t count = 0;
  const auto select = [&](pomona_score score, int64_t k, int threads) {
    pomona_counts counts;
    return pomona_select(&score, 1, k, threads, &s, &counts);
  };
  CHECK(select({x, nullptr, 4, 9, 0, nullptr}, 1, 1) == POMONA_BAD_TYPE);
  CHECK(select({x, x, 4, 0, -1, nullptr}, 1, 1) == POMONA_BAD_TYPE);
  CHECK(select({x, nullptr, -1, 0, 0, nullptr}, 0, 1) == POMONA_BAD_SIZE);
  CHECK(select({x, nullptr, INT64_MAX, 0, 0, nullptr}, 0, 1) == POMONA_BAD_SIZE);
  CHECK(select({nullptr, nullptr, 4, 0, 0, nullptr}, 0, 1) == POMONA_BAD_POINTER);
  CHECK(select({reinterpret_cast<char*>(x) + 1, nullptr, 2, 0, 0, nullptr}, 0, 1) == POMONA_BAD_POINTER);
  CHECK(select({x, nullptr, 4, 0, 0, nullptr}, 5, 1) == POMONA_BAD_VALUE);
  CHECK(select({x, nullptr, 4, 0, 0, nullptr}, -1, 1) == POMONA_BAD_VALUE);
  CHECK(select({x, nullptr, 4, 0, 0, nullptr}, 1, 0) == POMONA_BAD_VALUE);
  pomona_counts counts;
  CHECK(pomona_select(nullptr, 1, 0, 1, &s, &counts) == POMONA_BAD_POINTER);
  CHECK(pomona_select(nullptr, 0, 0, 1, &s, nullptr) == POMONA_OK);
  const pomona_score score = {x, nullptr, 4, 0, 0, nullptr};
  CHECK(pomona_select(&score, 1, 0, 1, &s, nullptr) == POMONA_BAD_POINTER);
  CHECK(pomona_histogram(&score, 1, 0, POMONA_KEY_MAX, 20, &count, 1, 1, nullptr) == POMONA_BAD_SIZE);
  CHECK(pomona_gather(&score, 1, 5, 4, nullptr, 0, 1, &count) == POMONA_BAD_VALUE);
  const int32_t threshold = 0;
  const int64_t ties = -1;
  uint8_t* mask = nullptr;
  CHECK(pomona_mask(&score, 1, &threshold, &ties, &mask, 1, nullptr) == POMONA_BAD_VALUE);
  void* values = x;
  const void* constant = x;
  const int64_t size = 4, row = 3;
  const int32_t type = POMONA_F32;
  const uint8_t* pruned = nullptr;
  int64_t* counts_of_rows = &count;
  double number = 0.0;
  CHECK(pomona_zero(&values, &size, &type, &pruned, 1, 1, nullptr) == POMONA_BAD_POINTER);
  CHECK(pomona_survey(&constant, &size, &type, &row, 1, 1, &counts_of_rows, &number) == POMONA_BAD_SIZE);
  CHECK(pomona_set_isa(-1) == POMONA_BAD_VALUE);
}

void fuzz(uint64_t seed, int rounds) {
  Random random(seed);
  for (int round = 0; round < rounds; ++round) {
    Case c(random, round % 8 == 0 ? 100000 : 1500);
    const int64_t total = static_cast<int64_t>(c.all.size());
    const int threads = 1 + round % 4;
    for (const int64_t k : {int64_t{0}, total / 10, total, below(random, total + 1)}) check_select(c, k, threads);
    check_histogram(c, random, threads);
    check_masks(c, random, threads);
    Case other(random, round % 8 == 0 ? 100000 : 1500);
    check_zeros(other, random, threads);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
  check_refusals();
  for (int isa = 0; isa <= pomona_max_isa(); ++isa) {
    CHECK(pomona_set_isa(isa) == POMONA_OK);
    std::thread other(fuzz, 2, rounds);  // two callers at a time
    fuzz(static_cast<uint64_t>(isa), rounds);
    other.join();
  }
  std::printf("pomona %s: %d rounds on %d instruction sets\n", pomona_version(), rounds, pomona_max_isa() + 1);
  return 0;
}
