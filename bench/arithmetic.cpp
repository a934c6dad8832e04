// Which arithmetic suits scattered zeros: float32, int8 in blocks of four inputs (VNNI), or int16 rounded to the upper
// half. Register tiles over positions, one weight after the other, one core; nothing else that a network needs.
//
//   g++ -O3 -march=native -std=c++17 bench/arithmetic.cpp -o /tmp/arithmetic && taskset -c 1 /tmp/arithmetic
//
// Needs AVX-512 with VNNI. Each form has its own best number of vectors. Times are the least of 40, in microseconds.

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

struct Float {
  using Number = float;
  using Sum = float;
  static constexpr int kLanes = 16, kInputs = 1;
  struct Entry {
    int32_t offset;
    float value;
  };
  static Entry entry(int32_t offset) { return {offset, 0.01f}; }
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector add(Vector sum, const Entry& e, const float* x) {
    return _mm512_fmadd_ps(_mm512_set1_ps(e.value), _mm512_loadu_ps(x), sum);
  }
  static void store(float* to, Vector sum) { _mm512_storeu_ps(to, sum); }
};

struct Int8 {  // four inputs side by side, of which a block has one or more weights
  using Number = uint8_t;
  using Sum = int32_t;
  static constexpr int kLanes = 16, kInputs = 4;
  struct Entry {
    int32_t offset, four;
  };
  static Entry entry(int32_t offset) { return {offset, 0x01010101}; }
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector add(Vector sum, const Entry& e, const uint8_t* x) {
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(x), _mm512_set1_epi32(e.four));
  }
  static void store(int32_t* to, Vector sum) { _mm512_storeu_si512(to, sum); }
};

struct Int16 {
  using Number = int16_t;
  using Sum = int16_t;
  static constexpr int kLanes = 32, kInputs = 1;
  struct Entry {
    int32_t offset, both;
  };
  static Entry entry(int32_t offset) { return {offset, 0x00100010}; }
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector add(Vector sum, const Entry& e, const int16_t* x) {
    return _mm512_adds_epi16(sum, _mm512_mulhrs_epi16(_mm512_set1_epi32(e.both), _mm512_loadu_si512(x)));
  }
  static void store(int16_t* to, Vector sum) { _mm512_storeu_si512(to, sum); }
};

struct Layer {
  const char* name;
  int inputs, outputs, side, kernel;
};

template <typename Form>
struct Problem {
  std::vector<typename Form::Number> x;
  std::vector<typename Form::Sum> out;
  std::vector<typename Form::Entry> entries;
  std::vector<int> starts{0};
  int positions, stride;

  Problem(const Layer& layer, double density) {
    positions = layer.side * (layer.side + layer.kernel / 2);
    stride = (positions + 127) / 128 * 128 + 160;
    x.assign(static_cast<size_t>(layer.inputs) * stride + (1 << 14), 1);
    out.assign(static_cast<size_t>(layer.outputs) * stride + (1 << 12), 0);
    std::mt19937 random(1);
    std::bernoulli_distribution is_kept(density);
    for (int row = 0; row < layer.outputs; ++row) {
      for (int tap = 0; tap < layer.kernel * layer.kernel; ++tap) {
        const int place = tap / layer.kernel * (layer.side + 1) + tap % layer.kernel;
        for (int input = 0; input < layer.inputs; input += Form::kInputs) {
          bool is_any = false;
          for (int i = 0; i < Form::kInputs; ++i) is_any |= is_kept(random);
          if (is_any) entries.push_back(Form::entry(input * stride + Form::kInputs * place));
        }
      }
      starts.push_back(static_cast<int>(entries.size()));
    }
  }

  template <int kNum>
  void run() {
    for (int p = 0; p < positions; p += kNum * Form::kLanes)
      for (size_t row = 0; row + 1 < starts.size(); ++row) {
        typename Form::Vector sums[kNum];
        for (auto& sum : sums) sum = Form::zero();
        for (int i = starts[row]; i < starts[row + 1]; ++i) {
          const auto* const from = x.data() + entries[i].offset + Form::kInputs * p;
#pragma GCC unroll 12
          for (int v = 0; v < kNum; ++v)
            sums[v] = Form::add(sums[v], entries[i], from + Form::kInputs * Form::kLanes * v);
        }
        for (int v = 0; v < kNum; ++v) Form::store(out.data() + row * stride + p + Form::kLanes * v, sums[v]);
      }
  }

  template <int kNum>
  double microseconds() {
    using Clock = std::chrono::steady_clock;
    double least = 1e9;
    for (int i = 0; i < 40; ++i) {
      const auto begin = Clock::now();
      run<kNum>();
      least = std::min(least, std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    return least;
  }

  template <int... kNums>
  double best(std::integer_sequence<int, kNums...>) {
    return std::min({microseconds<kNums>()...});
  }
};

template <typename Form>
double measure(const Layer& layer, double density) {
  return Problem<Form>(layer, density).best(std::integer_sequence<int, 1, 2, 3, 4, 6, 8>());
}

int main() {
  std::printf("| layer | zeros | float32 | int8 in blocks of 4 | int16 |\n| --- | --- | --- | --- | --- |\n");
  for (const Layer& layer : {Layer{"1x1 64-256 @56", 64, 256, 56, 1}, Layer{"1x1 256-64 @56", 256, 64, 56, 1},
                             Layer{"1x1 1024-256 @14", 1024, 256, 14, 1}, Layer{"1x1 512-2048 @7", 512, 2048, 7, 1},
                             Layer{"3x3 64-64 @56", 64, 64, 56, 3}, Layer{"3x3 256-256 @14", 256, 256, 14, 3},
                             Layer{"3x3 512-512 @7", 512, 512, 7, 3}})
    for (const double zeros : {0.9, 0.95}) {
      const double kept = 1 - zeros;
      std::printf("| %s | %.0f %% | %.0f | %.0f | %.0f |\n", layer.name, 100 * zeros, measure<Float>(layer, kept),
                  measure<Int8>(layer, kept), measure<Int16>(layer, kept));
    }
}
