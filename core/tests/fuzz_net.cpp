// Networks at random, for every instruction set of the machine. Meant for sanitizers (`make sanitize`): arrays have
// exactly their size. First valid ones, whose outputs are compared with a few plain loops in double; then hostile ones,
// of which pomona_net_new must return an error or a network that runs, in bounded memory and time; then very long ones.
// Arguments: how many valid networks, how many hostile ones, the seed; and the only hostile case to be done.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <malloc.h>
#endif

#include "pomona.h"
#include "pomona_net.h"

namespace {

std::atomic<uint64_t> current_case{0};  // what to name when something is not true
uint64_t seed = 1;

#define CHECK(claim)                                                                                      \
  do {                                                                                                    \
    if (!(claim)) {                                                                                       \
      std::fprintf(stderr, "%s:%d: not true: %s (seed %llu, case %llu)\n", __FILE__, __LINE__, #claim,    \
                   static_cast<unsigned long long>(seed), static_cast<unsigned long long>(current_case)); \
      std::abort();                                                                                       \
    }                                                                                                     \
  } while (false)

// Memory: what is allocated now and at most, where the system tells sizes; and one allocation, from now, that fails.
std::atomic<int64_t> live{0}, most_live{0}, until_failure{-1};

int64_t size_of_block(void* block) {
#if defined(__linux__)
  return static_cast<int64_t>(malloc_usable_size(block));
#else
  (void)block;
  return 0;
#endif
}

void* allocate(size_t size) {
  if (until_failure >= 0 && until_failure-- == 0) return nullptr;
  void* const block = std::malloc(size == 0 ? 1 : size);
  const int64_t now = live += size_of_block(block);
  for (int64_t most = most_live; now > most && !most_live.compare_exchange_weak(most, now);) {
  }
  return block;
}

[[gnu::noinline]] void release(void* block) {
  live -= size_of_block(block);
  std::free(block);
}

}  // namespace

void* operator new(size_t size) {
  if (void* const block = allocate(size)) return block;
  throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* block) noexcept { release(block); }
void operator delete[](void* block) noexcept { release(block); }
void operator delete(void* block, size_t) noexcept { release(block); }
void operator delete[](void* block, size_t) noexcept { release(block); }

namespace {

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }
int64_t between(Random& random, int64_t low, int64_t high) { return low + below(random, high - low + 1); }
bool one_in(Random& random, int64_t n) { return below(random, n) == 0; }

// 1 ... 2^bits, small and large ones alike.
int64_t any_size(Random& random, int bits) { return 1 + below(random, int64_t{1} << below(random, bits + 1)); }

struct Tensor {
  pomona_tensor tensor{};  // without pointers until Graph::view
  std::vector<float> values;
  std::vector<int32_t> columns;
  std::vector<int64_t> starts;
  bool is_dense = true;
};

struct Size {
  int rank;
  int64_t c, h, w;
  int64_t outer = 1;  // of four dimensions: the first, of which c is a multiple
  int32_t dtype = POMONA_FLOAT32;
  int64_t size() const { return c * h * w; }
  bool operator==(const Size& other) const {
    return rank == other.rank && c == other.c && h == other.h && w == other.w && outer == other.outer &&
           dtype == other.dtype;
  }
};

// A node with all the attributes that there are; `reads`: which of them it hands over, one bit each.
struct Node {
  int32_t op = 0, first_operand = 0, num_operands = 0;
  int32_t weight = -1, bias = -1;
  int32_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int32_t groups = 1, ceil = 0, count_padding = 0;
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  uint64_t reads = 0;
};

void add_attributes(const Node& node, std::vector<pomona_attribute>* to) {
  const auto add = [&](int32_t name, int32_t first, int32_t second = 0) {
    if ((node.reads >> name & 1) != 0) to->push_back({name, {{first, second, 0, 0}}});
  };
  const auto add_number = [&](int32_t name, float number) {
    if ((node.reads >> name & 1) == 0) return;
    to->push_back({name, {}});
    to->back().value.numbers[0] = number;
  };
  add(POMONA_ATTRIBUTE_WEIGHT, node.weight);
  add(POMONA_ATTRIBUTE_BIAS, node.bias);
  add(POMONA_ATTRIBUTE_KERNEL, node.kernel[0], node.kernel[1]);
  add(POMONA_ATTRIBUTE_STRIDE, node.stride[0], node.stride[1]);
  add(POMONA_ATTRIBUTE_PADDING, node.padding[0], node.padding[1]);
  add(POMONA_ATTRIBUTE_DILATION, node.dilation[0], node.dilation[1]);
  add(POMONA_ATTRIBUTE_GROUPS, node.groups);
  add(POMONA_ATTRIBUTE_CEIL, node.ceil);
  add(POMONA_ATTRIBUTE_COUNT_PADDING, node.count_padding);
  add_number(POMONA_ATTRIBUTE_LOW, node.low);
  add_number(POMONA_ATTRIBUTE_HIGH, node.high);
}

struct Graph {
  std::vector<pomona_type> inputs;
  std::vector<Node> nodes;
  std::vector<int32_t> operands;
  std::vector<Tensor> tensors;
  std::vector<int32_t> outputs;
  std::vector<Size> sizes;  // of all values
  std::vector<pomona_tensor> views;
  std::vector<pomona_node> encoded;
  std::vector<pomona_attribute> attributes;

  pomona_graph view() {
    encoded.clear();
    attributes.clear();
    for (const Node& node : nodes) {
      const int32_t first = static_cast<int32_t>(attributes.size());
      add_attributes(node, &attributes);
      encoded.push_back({node.op, node.first_operand, node.num_operands, first,
                         static_cast<int32_t>(attributes.size()) - first});
    }
    encoded.shrink_to_fit();
    attributes.shrink_to_fit();
    views.clear();
    views.reserve(tensors.size());
    for (Tensor& t : tensors) {
      views.push_back(t.tensor);
      views.back().values = t.values.data();
      views.back().columns = t.is_dense ? nullptr : t.columns.data();
      views.back().starts = t.is_dense ? nullptr : t.starts.data();
    }
    const auto num = [](const auto& list) { return static_cast<int32_t>(list.size()); };
    return {inputs.data(),  encoded.data(), operands.data(), attributes.data(), views.data(),  outputs.data(),
            num(inputs),    num(encoded),   num(operands),   num(attributes),   num(tensors),  num(outputs)};
  }
};

int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t room = size + 2 * padding - (kernel - 1) * dilation - 1;
  if (room < 0) return 0;
  int64_t num = room / stride + 1;
  if (ceil && room % stride != 0 && num * stride < size + padding) ++num;
  return num;
}

constexpr double kFixedError = 0.05;  // of the largest value, in int16: products of values double what is off

float normal(Random& random) { return std::normal_distribution<float>()(random); }

// Entries are ascending; a few are zeros that are stored. Large ones have few entries, whatever the density.
Tensor matrix(Random& random, int64_t rows, int64_t cols) {
  Tensor t;
  t.tensor.rows = rows;
  t.tensor.cols = cols;
  const double densities[] = {0.0, 0.05, 0.3, 0.7, 1.0};
  const double density = densities[below(random, 5)];
  const float scale = 1.0f / std::sqrt(static_cast<float>(std::max(1.0, density * static_cast<double>(cols))));
  if (rows * cols > 200000) {
    t.is_dense = false;
    t.starts.assign(static_cast<size_t>(rows) + 1, 0);
    const int64_t row = below(random, rows), num = std::min<int64_t>(cols, below(random, 20));
    std::vector<int32_t> columns;
    for (int64_t i = 0; i < num; ++i) columns.push_back(static_cast<int32_t>(below(random, cols)));
    std::sort(columns.begin(), columns.end());
    columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
    t.columns = columns;
    for (size_t i = 0; i < columns.size(); ++i) t.values.push_back(normal(random));
    for (int64_t r = row + 1; r <= rows; ++r) t.starts[static_cast<size_t>(r)] = static_cast<int64_t>(columns.size());
  } else {
    t.is_dense = one_in(random, 2);
    if (!t.is_dense) t.starts.push_back(0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < cols; ++k) {
        const bool is_there = static_cast<double>(below(random, 1000)) < 1000 * density;
        const float value = is_there && !one_in(random, 50) ? scale * normal(random) : one_in(random, 2) ? 0.0f : -0.0f;
        if (!t.is_dense && !is_there) continue;
        t.values.push_back(value);
        if (!t.is_dense) t.columns.push_back(static_cast<int32_t>(k));
      }
      if (!t.is_dense) t.starts.push_back(static_cast<int64_t>(t.values.size()));
    }
  }
  t.tensor.num_values = static_cast<int64_t>(t.values.size());
  return t;
}

Tensor column(Random& random, int64_t rows) {
  Tensor t;
  t.tensor.rows = t.tensor.num_values = rows;
  t.tensor.cols = 1;
  for (int64_t i = 0; i < rows; ++i) t.values.push_back(rows > 10000 ? 1.0f : 0.5f * normal(random));
  return t;
}

Size size_of(const pomona_type& s) {
  if (s.rank == 1) return {1, s.dims[0], 1, 1, 1, s.dtype};
  if (s.rank == 2) return {2, s.dims[1], 1, s.dims[0], 1, s.dtype};
  if (s.rank == 3) return {3, s.dims[0], s.dims[1], s.dims[2], 1, s.dtype};
  return {4, int64_t{s.dims[0]} * s.dims[1], s.dims[2], s.dims[3], s.dims[0], s.dtype};
}

pomona_type type_of(const Size& s) {
  const auto narrow = [](int64_t n) { return static_cast<int32_t>(n); };
  if (s.rank == 1) return {s.dtype, 1, {narrow(s.c), 1, 1, 1}};
  if (s.rank == 2) return {s.dtype, 2, {narrow(s.w), narrow(s.c), 1, 1}};
  if (s.rank == 3) return {s.dtype, 3, {narrow(s.c), narrow(s.h), narrow(s.w), 1}};
  return {s.dtype, 4, {narrow(s.outer), narrow(s.c / s.outer), narrow(s.h), narrow(s.w)}};
}

// A network that is valid, of at most `most` numbers a value; where `is_extreme`, of any sizes and attributes that fit.
class Maker {
 public:
  Maker(Random& random, bool is_extreme, bool is_wide)
      : random_(random),
        is_extreme_(is_extreme),
        is_wide_(is_wide),
        most_(is_extreme ? int64_t{1} << 31
              : is_wide  ? 12000
                         : 2500) {}

  Graph make() {
    const int64_t num_inputs = one_in(random_, 4) ? 2 : 1;
    for (int64_t i = 0; i < num_inputs; ++i) {
      Size size = i > 0 && one_in(random_, 2) ? graph_.sizes[0] : input();
      if (i > 0 && one_in(random_, 4)) size.dtype = static_cast<int32_t>(between(random_, POMONA_INT32, POMONA_INT64));
      graph_.inputs.push_back(type_of(size));
      graph_.sizes.push_back(size);
    }
    const int64_t num_nodes = below(random_, is_wide_ ? 4 : 10);
    for (int64_t i = 0; i < num_nodes; ++i)
      for (int tries = 0; tries < 30 && !add(static_cast<int32_t>(below(random_, POMONA_NUM_OPS))); ++tries) {
      }
    const int64_t num_outputs = between(random_, 1, 3);
    for (int64_t i = 0; i < num_outputs; ++i) graph_.outputs.push_back(i == 0 && size(last()).dtype == POMONA_FLOAT32 ? last() : any());
    return graph_;
  }

 private:
  int32_t last() const { return static_cast<int32_t>(graph_.sizes.size()) - 1; }
  // Any value of float32; the first one is.
  int32_t any() {
    const int32_t value = one_in(random_, 2) ? last() : static_cast<int32_t>(below(random_, last() + 1));
    return size(value).dtype == POMONA_FLOAT32 ? value : 0;
  }
  const Size& size(int32_t value) const { return graph_.sizes[static_cast<size_t>(value)]; }

  Size input() {
    if (is_extreme_) {
      const int rank = one_in(random_, 4) ? static_cast<int>(between(random_, 1, 2)) : 3;
      Size s{rank, any_size(random_, 12), 1, 1};
      if (rank != 1) s.w = std::max<int64_t>(1, any_size(random_, 30) / s.c);
      if (rank == 3) s.h = std::max<int64_t>(1, any_size(random_, 30) / (s.c * s.w));
      return s;
    }
    if (is_wide_) return {3, between(random_, 30, 90), between(random_, 3, 11), between(random_, 3, 11)};
    switch (below(random_, 5)) {
      case 0: return {1, between(random_, 1, 300), 1, 1};
      case 1: return {2, between(random_, 1, 60), 1, between(random_, 1, 40)};
      case 2: {
        const int64_t outer = between(random_, 1, 4);
        return {4, outer * between(random_, 1, 4), between(random_, 1, 12), between(random_, 1, 12), outer};
      }
      default: return {3, between(random_, 1, 9), between(random_, 1, 16), between(random_, 1, 16)};
    }
  }

  int32_t tensor(Tensor t) {
    graph_.tensors.push_back(std::move(t));
    return static_cast<int32_t>(graph_.tensors.size()) - 1;
  }

  int64_t attribute(int64_t most_small, int bits) {
    return is_extreme_ && one_in(random_, 3) ? any_size(random_, bits) : between(random_, 1, most_small);
  }

  bool add(int32_t op) {
    Node a;
    a.op = op;
    std::vector<int32_t> operands = {any()};
    const Size x = size(operands[0]);
    Size y = x;
    const bool with_bias = one_in(random_, 2);
    switch (op) {
      case POMONA_CONV:
      case POMONA_MAX_POOL:
      case POMONA_AVG_POOL: {
        if (x.rank != 3) return false;
        const bool is_pool = op != POMONA_CONV, is_same = one_in(random_, 2);
        a.ceil = is_pool ? static_cast<int32_t>(below(random_, 2)) : 0;
        a.count_padding = op == POMONA_AVG_POOL ? static_cast<int32_t>(below(random_, 2)) : 0;
        a.reads = 1u << POMONA_ATTRIBUTE_KERNEL | 1u << POMONA_ATTRIBUTE_STRIDE | 1u << POMONA_ATTRIBUTE_PADDING;
        a.reads |= is_pool ? 1u << POMONA_ATTRIBUTE_CEIL
                           : 1u << POMONA_ATTRIBUTE_DILATION | 1u << POMONA_ATTRIBUTE_GROUPS;
        if (op == POMONA_AVG_POOL) a.reads |= 1u << POMONA_ATTRIBUTE_COUNT_PADDING;
        for (int i = 0; i < 2; ++i) {
          const int64_t axis = i == 0 ? x.h : x.w;
          a.kernel[i] = static_cast<int32_t>(is_same ? 3 : attribute(5, 29));
          a.stride[i] = static_cast<int32_t>(is_same ? 1 : attribute(3, 29));
          a.dilation[i] = static_cast<int32_t>(is_same || is_pool ? 1 : attribute(3, 29));
          a.padding[i] = static_cast<int32_t>(is_same              ? 1
                                              : one_in(random_, 2) ? 0
                                                                   : attribute(is_extreme_ ? 4 : 9, 29));
          if (is_extreme_ && one_in(random_, 3)) a.padding[i] = a.kernel[i] / 2;
          if (is_pool) a.padding[i] = std::min(a.padding[i], a.kernel[i] / 2);
          (i == 0 ? y.h : y.w) =
              windows(axis, a.kernel[i], a.stride[i], a.padding[i], a.dilation[i], a.ceil != 0);
        }
        if (y.h < 1 || y.w < 1) return false;
        if (is_pool) break;
        if (one_in(random_, 3)) a.groups = static_cast<int32_t>(one_in(random_, 2) ? x.c : between(random_, 1, x.c));
        if (x.c % a.groups != 0) return false;
        y.c = a.groups * between(random_, 1, std::max<int64_t>(1, (is_wide_ ? 40 : 9) / a.groups));
        const double cols = static_cast<double>(x.c / a.groups) * a.kernel[0] * a.kernel[1];
        if (cols > 2147483648.0 || cols * static_cast<double>(y.c) > 2147483648.0) return false;
        if (!is_extreme_ && cols * static_cast<double>(y.size()) > 3e6) return false;
        break;
      }
      case POMONA_LINEAR:
        if (x.rank > 2) return false;
        y.c = is_extreme_ ? any_size(random_, 16) : between(random_, 1, 70);
        if (x.c * y.c > int64_t{1} << 31) return false;
        break;
      case POMONA_CLIP:
        a.low = normal(random_);
        a.high = a.low + std::abs(normal(random_));
        a.reads = 1u << POMONA_ATTRIBUTE_LOW | 1u << POMONA_ATTRIBUTE_HIGH;
        break;
      case POMONA_ADD:
      case POMONA_MUL: {
        const int32_t other = any();
        const bool may = size(other) == x || (op == POMONA_MUL && x.rank == 3 && size(other) == Size{3, x.c, 1, 1});
        if (!may) return false;
        operands.push_back(other);
        break;
      }
      case POMONA_SCALE:
        if (x.rank > 3) return false;
        break;
      case POMONA_MEAN:
        if (x.rank != 3) return false;
        y = {3, x.c, 1, 1};
        break;
      case POMONA_UPSAMPLE:
        if (x.rank != 3) return false;
        a.reads = 1u << POMONA_ATTRIBUTE_STRIDE;
        for (int i = 0; i < 2; ++i) a.stride[i] = static_cast<int32_t>(attribute(3, 29));
        y = {3, x.c, x.h * a.stride[0], x.w * a.stride[1]};
        break;
      case POMONA_FLATTEN:
        if (x.rank == 2) return false;
        y = {1, x.size(), 1, 1};
        break;
      case POMONA_CONCAT:
        if (x.rank == 2 || x.rank == 4) return false;
        for (int64_t i = below(random_, 3); i > 0; --i) {
          const int32_t other = any();
          if (size(other).rank != x.rank || size(other).h != x.h || size(other).w != x.w) continue;
          operands.push_back(other);
          y.c += size(other).c;
        }
        break;
      default: break;
    }
    if (y.h > most_ || y.w > most_ || y.c > most_ ||
        static_cast<double>(y.c) * static_cast<double>(y.h) * static_cast<double>(y.w) > static_cast<double>(most_))
      return false;
    if (op == POMONA_CONV) a.weight = tensor(matrix(random_, y.c, x.c / a.groups * a.kernel[0] * a.kernel[1]));
    if (op == POMONA_LINEAR) a.weight = tensor(matrix(random_, y.c, x.c));
    if (op == POMONA_SCALE && x.c > 1 << 20) return false;
    if (op == POMONA_SCALE) a.weight = tensor(column(random_, x.c));
    if (a.weight >= 0 && with_bias) a.bias = tensor(column(random_, y.c));
    if (a.weight >= 0) a.reads |= 1u << POMONA_ATTRIBUTE_WEIGHT;
    if (a.bias >= 0) a.reads |= 1u << POMONA_ATTRIBUTE_BIAS;
    a.first_operand = static_cast<int32_t>(graph_.operands.size());
    a.num_operands = static_cast<int32_t>(operands.size());
    graph_.operands.insert(graph_.operands.end(), operands.begin(), operands.end());
    graph_.nodes.push_back(a);
    graph_.sizes.push_back(y);
    return true;
  }

  Random& random_;
  const bool is_extreme_, is_wide_;
  const int64_t most_;
  Graph graph_;
};

// One sample through a network, in double: a value's numbers in the order of the interface. Where `with_zeros`, weights
// that are zero are multiplied too, which matters to infinities and NaNs only.
class Reference {
 public:
  Reference(const Graph& graph, bool with_zeros) : graph_(graph), with_zeros_(with_zeros) {
    rows_.resize(graph.tensors.size());
    for (const Node& a : graph.nodes)
      if (a.op == POMONA_CONV || a.op == POMONA_LINEAR)
        rows_[static_cast<size_t>(a.weight)] = rows_of(graph.tensors[static_cast<size_t>(a.weight)]);
  }

  std::vector<std::vector<double>> run(const std::vector<const float*>& inputs) const {
    std::vector<std::vector<double>> values;
    for (size_t i = 0; i < inputs.size(); ++i) values.emplace_back(inputs[i], inputs[i] + graph_.sizes[i].size());
    for (const Node& a : graph_.nodes) {
      std::vector<const std::vector<double>*> in;
      std::vector<Size> sizes;
      for (int32_t i = 0; i < a.num_operands; ++i) {
        const size_t value = static_cast<size_t>(graph_.operands[static_cast<size_t>(a.first_operand + i)]);
        in.push_back(&values[value]);
        sizes.push_back(graph_.sizes[value]);
      }
      std::vector<double> out = apply(a, in, sizes, graph_.sizes[values.size()]);
      for (double& x : out) x = static_cast<float>(x);  // which underflows as theirs
      values.push_back(std::move(out));
    }
    return values;
  }

 private:
  struct Entry {
    int64_t k;
    double value;
  };
  using Rows = std::vector<std::vector<Entry>>;

  Rows rows_of(const Tensor& t) const {
    Rows rows(static_cast<size_t>(t.tensor.rows));
    for (int64_t row = 0; row < t.tensor.rows; ++row) {
      std::vector<double> line(static_cast<size_t>(t.tensor.cols), 0.0);
      if (t.is_dense) std::copy_n(t.values.begin() + row * t.tensor.cols, t.tensor.cols, line.begin());
      else
        for (int64_t i = t.starts[static_cast<size_t>(row)]; i < t.starts[static_cast<size_t>(row) + 1]; ++i)
          line[static_cast<size_t>(t.columns[static_cast<size_t>(i)])] = t.values[static_cast<size_t>(i)];
      for (int64_t k = 0; k < t.tensor.cols; ++k)
        if (with_zeros_ || line[static_cast<size_t>(k)] != 0.0)
          rows[static_cast<size_t>(row)].push_back({k, line[static_cast<size_t>(k)]});
    }
    return rows;
  }

  static double sigmoid(double x) {
    return 1.0 / (1.0 + std::exp(-std::max(x, -88.0)));
  }  // not 0 at -infinity, as in float

  static double unary(const Node& a, double x) {
    if (std::isnan(x)) return x;
    switch (a.op) {
      case POMONA_RELU: return std::max(x, 0.0);
      case POMONA_CLIP: return std::min(std::max(x, static_cast<double>(a.low)), static_cast<double>(a.high));
      case POMONA_GELU: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
      case POMONA_GELU_TANH: return x * sigmoid(2.0 * std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x));
      case POMONA_SILU: return x * sigmoid(x);
      case POMONA_SIGMOID: return sigmoid(x);
      case POMONA_TANH: return std::tanh(x);
      case POMONA_HARDSWISH: return x * (std::min(std::max(x + 3.0, 0.0), 6.0) / 6.0);
      default: return std::min(std::max(x + 3.0, 0.0), 6.0) / 6.0;
    }
  }

  std::vector<double> apply(const Node& a, const std::vector<const std::vector<double>*>& in,
                            const std::vector<Size>& sizes, const Size& y) const {
    const std::vector<double>& from = *in[0];
    const Size& x = sizes[0];
    std::vector<double> out(static_cast<size_t>(y.size()));
    const auto bias = [&](int64_t row) {
      return a.bias < 0
                 ? 0.0
                 : static_cast<double>(graph_.tensors[static_cast<size_t>(a.bias)].values[static_cast<size_t>(row)]);
    };
    const auto number = [&](int64_t c, int64_t row, int64_t col) {
      return from[static_cast<size_t>((c * x.h + row) * x.w + col)];
    };
    size_t next = 0;
    switch (a.op) {
      case POMONA_CONV:
        for (int64_t o = 0; o < y.c; ++o)
          for (int64_t i = 0; i < y.h; ++i)
            for (int64_t j = 0; j < y.w; ++j) {
              double sum = bias(o);
              for (const Entry& e : rows_[static_cast<size_t>(a.weight)][static_cast<size_t>(o)]) {
                const int64_t kx = e.k % a.kernel[1], ky = e.k / a.kernel[1] % a.kernel[0];
                const int64_t c = e.k / a.kernel[1] / a.kernel[0] + o / (y.c / a.groups) * (x.c / a.groups);
                const int64_t row = i * a.stride[0] + ky * a.dilation[0] - a.padding[0];
                const int64_t col = j * a.stride[1] + kx * a.dilation[1] - a.padding[1];
                if (row >= 0 && row < x.h && col >= 0 && col < x.w) sum += e.value * number(c, row, col);
              }
              out[next++] = sum;
            }
        break;
      case POMONA_LINEAR:
        for (int64_t p = 0; p < y.w; ++p)
          for (int64_t o = 0; o < y.c; ++o) {
            double sum = bias(o);
            for (const Entry& e : rows_[static_cast<size_t>(a.weight)][static_cast<size_t>(o)])
              sum += e.value * from[static_cast<size_t>(p * x.c + e.k)];
            out[next++] = sum;
          }
        break;
      case POMONA_ADD:
        for (; next < out.size(); ++next) out[next] = from[next] + (*in[1])[next];
        break;
      case POMONA_MUL:
        for (; next < out.size(); ++next)
          out[next] = from[next] * (*in[1])[sizes[1] == x ? next : next / static_cast<size_t>(x.h * x.w)];
        break;
      case POMONA_SCALE:
        for (; next < out.size(); ++next) {
          const size_t c = x.rank == 3 ? next / static_cast<size_t>(x.h * x.w) : next % static_cast<size_t>(x.c);
          out[next] = from[next] * static_cast<double>(graph_.tensors[static_cast<size_t>(a.weight)].values[c]) +
                      bias(static_cast<int64_t>(c));
        }
        break;
      case POMONA_MAX_POOL:
      case POMONA_AVG_POOL:
        for (int64_t c = 0; c < y.c; ++c)
          for (int64_t i = 0; i < y.h; ++i)
            for (int64_t j = 0; j < y.w; ++j) {
              double most = -std::numeric_limits<double>::infinity(), sum = 0.0;
              int64_t inside = 0, in_padding = 0;
              for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
                for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
                  const int64_t row = i * a.stride[0] + ky - a.padding[0], col = j * a.stride[1] + kx - a.padding[1];
                  in_padding += row < x.h + a.padding[0] && col < x.w + a.padding[1];
                  if (row < 0 || row >= x.h || col < 0 || col >= x.w) continue;
                  ++inside;
                  const double value = number(c, row, col);
                  sum += value;
                  if (value > most || std::isnan(value)) most = value;
                }
              out[next++] = a.op == POMONA_MAX_POOL
                                ? (std::isnan(sum) && has_nan(a, x, from, c, i, j) ? std::nan("") : most)
                                : sum / static_cast<double>(a.count_padding != 0 ? in_padding : inside);
            }
        break;
      case POMONA_MEAN:
        for (; next < out.size(); ++next) {
          double sum = 0.0;
          for (int64_t i = 0; i < x.h * x.w; ++i)
            sum += from[next * static_cast<size_t>(x.h * x.w) + static_cast<size_t>(i)];
          out[next] = sum / static_cast<double>(x.h * x.w);
        }
        break;
      case POMONA_UPSAMPLE:
        for (int64_t c = 0; c < y.c; ++c)
          for (int64_t i = 0; i < y.h; ++i)
            for (int64_t j = 0; j < y.w; ++j) out[next++] = number(c, i / a.stride[0], j / a.stride[1]);
        break;
      case POMONA_FLATTEN: return from;
      case POMONA_CONCAT:
        for (const std::vector<double>* part : in)
          next = static_cast<size_t>(std::copy(part->begin(), part->end(), out.begin() + static_cast<int64_t>(next)) -
                                     out.begin());
        break;
      default:
        for (; next < out.size(); ++next) out[next] = unary(a, from[next]);
    }
    return out;
  }

  static bool has_nan(const Node& a, const Size& x, const std::vector<double>& from, int64_t c, int64_t i,
                      int64_t j) {
    for (int64_t row = std::max<int64_t>(0, i * a.stride[0] - a.padding[0]);
         row < std::min(x.h, i * a.stride[0] - a.padding[0] + a.kernel[0]); ++row)
      for (int64_t col = std::max<int64_t>(0, j * a.stride[1] - a.padding[1]);
           col < std::min(x.w, j * a.stride[1] - a.padding[1] + a.kernel[1]); ++col)
        if (std::isnan(from[static_cast<size_t>((c * x.h + row) * x.w + col)])) return true;
    return false;
  }

  const Graph& graph_;
  const bool with_zeros_;
  std::vector<Rows> rows_;
};

// Inputs and outputs of a network for some samples, each array of exactly its size.
struct Arrays {
  std::vector<std::vector<float>> inputs, outputs;
  std::vector<const void*> from;
  std::vector<float*> to;

  Arrays(const std::vector<Size>& in, const std::vector<Size>& out, int64_t batch) {
    for (const Size& s : in) inputs.emplace_back(static_cast<size_t>(batch * s.size()));
    for (const Size& s : out) outputs.emplace_back(static_cast<size_t>(batch * s.size()));
    for (auto& array : inputs) from.push_back(array.data());
    for (auto& array : outputs) to.push_back(array.data());
  }

  int run(pomona_net* net, int64_t batch, int threads) {
    for (auto& array : outputs) std::fill(array.begin(), array.end(), 12345.0f);
    return pomona_net_run(net, batch, from.data(), to.data(), threads);
  }
};

// In int16, with the ranges that the values have: within a few thousandths of them, unless errors grow on the way.
void check_fixed(Random& random, const Graph& graph, const pomona_graph& view, pomona_net_options options,
                 const Reference& plain, const std::vector<Size>& in, const std::vector<Size>& out) {
  const int64_t batch = one_in(random, 4) ? between(random, 10, 70) : between(random, 1, 9);
  Arrays arrays(in, out, batch);
  for (auto& array : arrays.inputs)
    for (float& x : array) x = normal(random);
  std::vector<float> ranges(graph.sizes.size(), 0.0f);
  std::vector<std::vector<std::vector<double>>> want;
  for (int64_t sample = 0; sample < batch; ++sample) {
    std::vector<const float*> from;
    for (size_t i = 0; i < in.size(); ++i) from.push_back(arrays.inputs[i].data() + sample * in[i].size());
    want.push_back(plain.run(from));
    for (size_t value = 0; value < ranges.size(); ++value)
      for (const double x : want.back()[value])
        if (std::isfinite(x)) ranges[value] = std::max(ranges[value], static_cast<float>(std::min(1e17, std::abs(x))));
  }
  options.ranges = ranges.data();
  options.num_ranges = static_cast<int32_t>(ranges.size());
  pomona_net* net = nullptr;
  CHECK(pomona_net_new(&view, &options, &net, nullptr) == POMONA_OK);
  CHECK(arrays.run(net, batch, 1) == POMONA_OK);
  const std::vector<std::vector<float>> once = arrays.outputs;
  CHECK(arrays.run(net, batch, static_cast<int>(between(random, 2, 3))) == POMONA_OK);
  for (size_t i = 0; i < once.size(); ++i)
    CHECK(std::memcmp(once[i].data(), arrays.outputs[i].data(), once[i].size() * sizeof(float)) == 0);
  double largest = 1.0;  // of all values: errors of one may be those of another
  for (const float range : ranges) largest = std::max<double>(largest, range);
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t j = 0; j < once[i].size(); ++j) {
      const size_t size = static_cast<size_t>(out[i].size());
      const double x = want[j / size][static_cast<size_t>(graph.outputs[i])][j % size];
      CHECK(std::isfinite(once[i][j]));
      if (std::isfinite(x) && largest < 1e6) CHECK(std::abs(once[i][j] - x) <= kFixedError * largest);
    }
  pomona_net_free(net);
}

void check_valid(Random& random, bool is_wide) {
  const Graph made = Maker(random, false, is_wide).make();
  Graph graph(made);  // copies have no room to spare
  const pomona_graph view = graph.view();
  pomona_net_options options{};
  options.micro_batch = static_cast<int32_t>(below(random, 5));
  options.dense = static_cast<int32_t>(below(random, 3));
  pomona_net* net = nullptr;
  int32_t bad_node = 0;
  CHECK(pomona_net_new(&view, one_in(random, 5) ? nullptr : &options, &net, &bad_node) == POMONA_OK);
  CHECK(bad_node == -1);
  for (size_t i = 0; i < graph.sizes.size(); ++i) {
    pomona_type type;
    CHECK(pomona_net_type(net, static_cast<int32_t>(i), &type) == POMONA_OK && size_of(type) == graph.sizes[i]);
  }
  std::vector<Size> in(graph.sizes.begin(), graph.sizes.begin() + static_cast<int64_t>(graph.inputs.size())), out;
  for (const int32_t value : graph.outputs) out.push_back(graph.sizes[static_cast<size_t>(value)]);
  const Reference plain(graph, false), with_zeros(graph, true);
  check_fixed(random, graph, view, options, plain, in, out);
  for (int round = 0; round < 2; ++round) {
    const int64_t batch = one_in(random, 4) ? between(random, 10, 40) : between(random, 1, 9);
    Arrays arrays(in, out, batch);
    // What was there before must not matter.
    for (auto& array : arrays.inputs) std::fill(array.begin(), array.end(), std::numeric_limits<float>::quiet_NaN());
    CHECK(arrays.run(net, batch, 1) == POMONA_OK);
    const int64_t strange = one_in(random, 2) ? below(random, batch) : -1;  // a sample with infinities and NaNs
    for (auto& array : arrays.inputs)
      for (size_t i = 0; i < array.size(); ++i) {
        array[i] = one_in(random, 10) ? -0.0f : normal(random);
        if (static_cast<int64_t>(i / (array.size() / static_cast<size_t>(batch))) == strange && one_in(random, 40))
          array[i] = one_in(random, 3) ? std::numeric_limits<float>::quiet_NaN()
                                       : std::copysign(std::numeric_limits<float>::infinity(), array[i]);
      }
    CHECK(arrays.run(net, batch, 1) == POMONA_OK);
    const std::vector<std::vector<float>> once = arrays.outputs;
    CHECK(arrays.run(net, batch, static_cast<int>(between(random, 2, 3))) == POMONA_OK);
    for (size_t i = 0; i < once.size(); ++i)
      CHECK(std::memcmp(once[i].data(), arrays.outputs[i].data(), once[i].size() * sizeof(float)) == 0);
    for (int64_t sample = 0; sample < batch; ++sample) {
      std::vector<const float*> from;
      for (size_t i = 0; i < in.size(); ++i) from.push_back(arrays.inputs[i].data() + sample * in[i].size());
      const std::vector<std::vector<double>> want = plain.run(from);
      const std::vector<std::vector<double>> may_be = sample == strange ? with_zeros.run(from) : want;
      double largest = 1.0;
      for (const auto& value : want)
        for (const double x : value)
          if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
      for (size_t i = 0; i < out.size(); ++i) {
        const size_t value = static_cast<size_t>(graph.outputs[i]);
        for (size_t j = 0; j < want[value].size(); ++j) {
          const double got = arrays.outputs[i][static_cast<size_t>(sample * out[i].size()) + j], x = want[value][j];
          if (std::isnan(got)) CHECK(std::isnan(may_be[value][j]));
          else if (!std::isfinite(x)) CHECK(got == x);
          else CHECK(std::abs(got - x) <= 3e-5 * largest);
        }
      }
    }
  }
  pomona_net_free(net);
}

// Any number, mostly one at which something changes.
int64_t any_number(Random& random, int bits) {
  switch (below(random, 5)) {
    case 0: return between(random, -2, 8);
    case 1: return static_cast<int64_t>(random()) >> (64 - bits);
    case 2: return std::numeric_limits<int32_t>::max() - below(random, 2);
    default: {
      const int64_t power = int64_t{1} << below(random, bits - 1);
      return (one_in(random, 4) ? -power : power) + between(random, -1, 1);
    }
  }
}

int32_t any_int32(Random& random) { return static_cast<int32_t>(any_number(random, 32)); }

// Changes something, and if that are sizes, what must then fit or be refused before it is read.
void mutate(Random& random, Graph* graph, pomona_graph* view, pomona_net_options* options) {
  const auto pick = [&](auto& list) -> auto& {
    return list[static_cast<size_t>(below(random, static_cast<int64_t>(list.size())))];
  };
  switch (below(random, 12)) {
    case 0: {
      pomona_type& type = pick(graph->inputs);
      const int64_t which = below(random, 8);
      (which == 0 ? type.dtype : which < 3 ? type.rank : type.dims[below(random, 4)]) = any_int32(random);
      break;
    }
    case 1:
    case 2:
    case 3:
    case 4: {
      if (graph->nodes.empty()) break;
      Node& a = pick(graph->nodes);
      int32_t* const fields[] = {&a.op,         &a.first_operand, &a.num_operands, &a.weight,    &a.bias,
                                 &a.kernel[0],  &a.kernel[1],     &a.stride[0],    &a.stride[1], &a.padding[0],
                                 &a.padding[1], &a.dilation[0],   &a.dilation[1],  &a.groups,    &a.ceil,
                                 &a.count_padding};
      *fields[below(random, 16)] = any_int32(random);
      if (one_in(random, 6)) a.reads ^= uint64_t{1} << below(random, POMONA_NUM_ATTRIBUTES);
      if (one_in(random, 3)) a.op = static_cast<int32_t>(below(random, POMONA_NUM_OPS));
      if (one_in(random, 20)) a.low = std::numeric_limits<float>::quiet_NaN();
      if (one_in(random, 20)) a.high = -std::numeric_limits<float>::infinity();
      break;
    }
    case 5:
      if (!graph->operands.empty())
        pick(graph->operands) = one_in(random, 2) ? any_int32(random) : static_cast<int32_t>(below(random, 12));
      break;
    case 6: pick(graph->outputs) = any_int32(random); break;
    case 7: {  // a count; larger ones are true
      const auto resize = [&](auto* list, int32_t* count) {
        *count = any_int32(random);
        if (*count <= static_cast<int32_t>(list->size()) || *count > 1 << 20) return;
        *count = std::min(*count, 1 << 14);
        const auto some = *list;
        while (static_cast<int32_t>(list->size()) < *count)
          list->push_back(some.empty() ? typename std::decay_t<decltype(*list)>::value_type{}
                                       : some[list->size() % some.size()]);
      };
      switch (below(random, 5)) {
        case 0: resize(&graph->inputs, &view->num_inputs); break;
        case 1: resize(&graph->nodes, &view->num_nodes); break;
        case 2: resize(&graph->operands, &view->num_operands); break;
        case 3: resize(&graph->tensors, &view->num_tensors); break;
        default: resize(&graph->outputs, &view->num_outputs);
      }
      break;
    }
    case 8: options->max_bytes = one_in(random, 4) ? any_number(random, 64) : any_size(random, 20); break;
    case 9:
      options->micro_batch = one_in(random, 2) ? any_int32(random) : static_cast<int32_t>(below(random, 64));
      break;
    default: {
      if (graph->tensors.empty()) break;
      Tensor& t = pick(graph->tensors);
      switch (below(random, 7)) {
        case 0: t.tensor.rows = any_number(random, one_in(random, 4) ? 64 : 32); break;
        case 1: t.tensor.cols = any_number(random, one_in(random, 4) ? 64 : 32); break;
        case 2: t.tensor.num_values = any_number(random, one_in(random, 4) ? 64 : 32); break;
        case 3:
          if (!t.starts.empty()) pick(t.starts) = any_number(random, one_in(random, 2) ? 64 : 8);
          break;
        case 4:
          if (!t.columns.empty()) pick(t.columns) = any_int32(random);
          break;
        case 5:
          if (!t.values.empty()) pick(t.values) = one_in(random, 2) ? std::numeric_limits<float>::infinity() : -1e38f;
          break;
        default: t.is_dense = !t.is_dense;
      }
      const auto grow = [](auto* list, int64_t size) {
        if (size > static_cast<int64_t>(list->size()) && size <= 1 << 24) list->resize(static_cast<size_t>(size));
      };
      grow(&t.starts, t.tensor.rows < 0 || t.tensor.rows > 1 << 24 ? 0 : t.tensor.rows + 1);
      grow(&t.columns, t.tensor.num_values);
      grow(&t.values, t.tensor.num_values);
    }
  }
}

// Changes what only the encoded form has: where a node's attributes are, their names, and how many there are.
void mutate_encoded(Random& random, Graph* graph, pomona_graph* view) {
  if (!one_in(random, 6)) return;
  if (one_in(random, 3)) view->num_attributes = static_cast<int32_t>(below(random, view->num_attributes + 1)) - 1;
  if (!graph->encoded.empty()) {
    pomona_node& a = graph->encoded[static_cast<size_t>(below(random, static_cast<int64_t>(graph->encoded.size())))];
    (one_in(random, 2) ? a.first_attribute : a.num_attributes) =
        one_in(random, 2) ? any_int32(random) : static_cast<int32_t>(below(random, 8));
  }
  if (!graph->attributes.empty() && one_in(random, 2))
    graph->attributes[static_cast<size_t>(below(random, static_cast<int64_t>(graph->attributes.size())))].name =
        one_in(random, 2) ? any_int32(random) : static_cast<int32_t>(below(random, POMONA_NUM_ATTRIBUTES));
}

// Weights and biases of the size that a node, changed, asks for.
void mend(Random& random, Graph* graph) {
  for (size_t i = 0; i < graph->nodes.size(); ++i) {
    const Node& a = graph->nodes[i];
    if (a.op != POMONA_CONV || a.weight < 0 || a.weight >= static_cast<int32_t>(graph->tensors.size()) || a.groups < 1)
      continue;
    if (a.first_operand < 0 || a.first_operand >= static_cast<int32_t>(graph->operands.size())) continue;
    const int32_t operand = graph->operands[static_cast<size_t>(a.first_operand)];
    if (operand < 0 || operand >= static_cast<int32_t>(graph->sizes.size())) continue;
    const Size x = static_cast<size_t>(operand) < graph->inputs.size()
                       ? size_of(graph->inputs[static_cast<size_t>(operand)])
                       : graph->sizes[static_cast<size_t>(operand)];
    const double cols = static_cast<double>(x.c / a.groups) * a.kernel[0] * a.kernel[1];
    const int64_t rows = graph->tensors[static_cast<size_t>(a.weight)].tensor.rows;
    if (cols < 1 || rows < 1 || rows > 1 << 16 || cols * static_cast<double>(rows) > 2147483648.0) continue;
    graph->tensors[static_cast<size_t>(a.weight)] = matrix(random, rows, x.c / a.groups * a.kernel[0] * a.kernel[1]);
  }
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Tally {
  int64_t made = 0, run = 0, refused[8] = {};
  double slowest = 0.0, most_memory = 0.0;  // seconds, and of max_bytes and 64 KiB
};

// Runs what was accepted, if that is not much to compute; returns how much memory was in use at most, arrays apart.
int64_t run_accepted(Random& random, pomona_net* net, const Graph& graph, const pomona_graph& view, Tally* tally) {
  double work = 0.0, numbers = 0.0;
  const auto size_of_value = [&](int32_t value) {
    pomona_type type;
    CHECK(pomona_net_type(net, value, &type) == POMONA_OK);
    for (const int32_t size : type.dims) CHECK(size >= 1);
    return size_of(type);
  };
  for (int32_t i = 0; i < view.num_nodes; ++i) {
    const Node& a = graph.nodes[static_cast<size_t>(i)];
    const double size = static_cast<double>(size_of_value(view.num_inputs + i).size());
    const bool is_pool = a.op == POMONA_MAX_POOL || a.op == POMONA_AVG_POOL;
    const Size x = size_of_value(view.operands[a.first_operand]);
    if (is_pool)
      work += size *
              (4.0 + static_cast<double>(std::min<int64_t>(a.kernel[0], x.h)) +
               static_cast<double>(std::min<int64_t>(a.kernel[1], x.w))) *
              a.stride[1];
    if (a.op == POMONA_CONV)
      work += static_cast<double>(x.size()) * (1.0 + std::min(a.stride[0], a.kernel[0])) * (1.0 + a.kernel[1]);
    numbers += size;
  }
  pomona_net_info info;
  CHECK(pomona_net_about(net, &info) == POMONA_OK);
  CHECK(info.macs >= 0 && info.macs <= info.dense_macs && info.activation_bytes >= 0 && info.weight_bytes >= 0);
  std::vector<Size> in, out;
  for (int32_t i = 0; i < view.num_inputs; ++i) in.push_back(size_of_value(i));
  for (int32_t i = 0; i < view.num_outputs; ++i) out.push_back(size_of_value(view.outputs[i]));
  for (const Size& s : in) numbers += static_cast<double>(s.size());
  for (const Size& s : out) numbers += static_cast<double>(s.size());
  if (work + numbers + static_cast<double>(info.dense_macs) > 1e6) return 0;
  ++tally->run;
  const int64_t batch = between(random, 1, 5);
  const int64_t before = live;
  Arrays arrays(in, out, batch);
  const int64_t ours = live - before;
  most_live = live.load();
  for (auto& array : arrays.inputs) std::fill(array.begin(), array.end(), 1.0f);
  const int threads = static_cast<int>(between(random, 1, 2));
  if (one_in(random, 8) && threads == 1) {
    until_failure = below(random, 40);
    const int status = arrays.run(net, batch, threads);
    until_failure = -1;
    CHECK(status == POMONA_OK || status == POMONA_NO_MEMORY || status == POMONA_BAD_SIZE);
    CHECK(pomona_net_about(net, &info) == POMONA_OK);
  }
  CHECK(arrays.run(net, batch, threads) == POMONA_OK);
  return most_live - ours;
}

void check_hostile(uint64_t index, Tally* tally) {
  Random random(seed * 0x9e3779b97f4a7c15u + index);
  Graph graph = Maker(random, one_in(random, 2), false).make();
  pomona_net_options options{};
  options.max_bytes = one_in(random, 3) ? any_size(random, 26) : int64_t{1} << 26;
  options.micro_batch = static_cast<int32_t>(below(random, 5));
  options.dense = static_cast<int32_t>(below(random, 3));
  pomona_graph counts = graph.view();
  const pomona_graph at_first = counts;
  for (int64_t i = below(random, 4); i > 0; --i) mutate(random, &graph, &counts, &options);
  if (one_in(random, 2)) mend(random, &graph);
  if (one_in(random, 20)) options.dense = any_int32(random);
  // Without max_bytes a few would be refused by the machine only.
  if (options.max_bytes == 0 || options.max_bytes > int64_t{1} << 26) options.max_bytes = int64_t{1} << 26;
  Graph exact(graph);
  pomona_graph view = exact.view();
  mutate_encoded(random, &exact, &view);
  const auto changed = [](int32_t now, int32_t before, int32_t* count) {
    if (now != before) *count = now;
  };
  changed(counts.num_inputs, at_first.num_inputs, &view.num_inputs);
  changed(counts.num_nodes, at_first.num_nodes, &view.num_nodes);
  changed(counts.num_operands, at_first.num_operands, &view.num_operands);
  changed(counts.num_tensors, at_first.num_tensors, &view.num_tensors);
  changed(counts.num_outputs, at_first.num_outputs, &view.num_outputs);
  if (one_in(random, 50)) {
    switch (below(random, 9)) {
      case 8: view.attributes = nullptr; break;
      case 0: view.inputs = nullptr; break;
      case 1: view.nodes = nullptr; break;
      case 2: view.operands = nullptr; break;
      case 3: view.tensors = nullptr; break;
      case 4: view.outputs = nullptr; break;
      default:
        if (exact.views.empty()) break;
        pomona_tensor& t = exact.views[static_cast<size_t>(below(random, static_cast<int64_t>(exact.views.size())))];
        if (one_in(random, 2)) t.values = nullptr;
        else t.columns = nullptr;
    }
  }
  std::vector<float> ranges;
  if (one_in(random, 3)) {
    const int64_t num = int64_t{std::max(0, view.num_inputs)} + std::max(0, view.num_nodes);
    const float some[] = {0.0f, 1e-30f, 1e-3f, 1.0f, 8.0f, 1e17f};
    for (int64_t i = 0; i < std::min<int64_t>(num, 1 << 16); ++i) ranges.push_back(some[below(random, 6)]);
    const float bad[] = {-1.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
    if (!ranges.empty() && one_in(random, 10))
      ranges[static_cast<size_t>(below(random, static_cast<int64_t>(ranges.size())))] = bad[below(random, 3)];
    options.ranges = one_in(random, 50) ? nullptr : ranges.data();
    options.num_ranges = one_in(random, 20) ? any_int32(random) : static_cast<int32_t>(ranges.size());
  }
  const double begin = seconds();
  const int64_t before = live;
  most_live = before;
  if (one_in(random, 16)) until_failure = below(random, 100);
  pomona_net* net = nullptr;
  int32_t bad_node = -7;
  const int status = pomona_net_new(&view, &options, &net, &bad_node);
  const bool was_short = until_failure < 0;
  until_failure = -1;
  CHECK((status == POMONA_OK) == (net != nullptr));
  CHECK(bad_node >= -1 && bad_node < std::max(1, view.num_nodes));
  CHECK(status == POMONA_OK || status == POMONA_BAD_SIZE || status == POMONA_BAD_POINTER ||
        status == POMONA_BAD_VALUE || (status == POMONA_NO_MEMORY && was_short));
  int64_t most = most_live;
  if (net == nullptr) {
    ++tally->refused[-status];
    CHECK(live == before);
  } else {
    ++tally->made;
    most = std::max(most, run_accepted(random, net, exact, view, tally));
  }
  const double memory = static_cast<double>(most - before);
  pomona_net_free(net);
  tally->slowest = std::max(tally->slowest, seconds() - begin);
  const double limit = static_cast<double>(std::max<int64_t>(0, options.max_bytes) + (1 << 16));
  tally->most_memory = std::max(tally->most_memory, memory / limit);
  CHECK(memory <= 2.0 * limit);
  CHECK(seconds() - begin < 30.0);
}

// As many nodes as may be: a chain; all of them needed at the end; one value in all of them.
void check_long(int32_t num) {
  for (int kind = 0; kind < 4; ++kind) {
    Graph graph;
    graph.inputs.push_back({POMONA_FLOAT32, 1, {1, 1, 1, 1}});
    Tensor one;
    one.tensor.rows = one.tensor.cols = one.tensor.num_values = 1;
    one.values = {1.0f};
    graph.tensors.push_back(one);
    for (int32_t i = 0; i < num; ++i) {
      Node a;
      a.op = kind == 3 ? POMONA_LINEAR : POMONA_RELU;
      if (kind == 3) a.weight = 0, a.reads = 1u << POMONA_ATTRIBUTE_WEIGHT;
      a.first_operand = i;
      a.num_operands = 1;
      graph.operands.push_back(kind == 1 ? i / 2 : kind == 2 ? 0 : i);
      graph.nodes.push_back(a);
    }
    for (int32_t i = 0; i < (kind == 0 || kind == 3 ? 1 : num); ++i) graph.outputs.push_back(num - i);
    const pomona_graph view = graph.view();
    pomona_net* net = nullptr;
    const double begin = seconds();
    CHECK(pomona_net_new(&view, nullptr, &net, nullptr) == POMONA_OK);
    Arrays arrays({{1, 1, 1, 1}}, std::vector<Size>(graph.outputs.size(), Size{1, 1, 1, 1}), 1);
    arrays.inputs[0][0] = 3.0f;
    CHECK(arrays.run(net, 1, 1) == POMONA_OK);
    for (const auto& output : arrays.outputs) CHECK(output[0] == 3.0f);
    pomona_net_free(net);
    CHECK(seconds() - begin < 60.0);
  }
}

void check_empty() {  // no nodes: the output is the input
  Graph graph;
  graph.inputs.push_back({POMONA_FLOAT32, 3, {2, 3, 5, 1}});
  graph.outputs = {0, 0};
  const pomona_graph view = graph.view();
  pomona_net* net = nullptr;
  CHECK(pomona_net_new(&view, nullptr, &net, nullptr) == POMONA_OK);
  const Size size{3, 2, 3, 5};
  Arrays arrays({size}, {size, size}, 7);
  for (size_t i = 0; i < arrays.inputs[0].size(); ++i) arrays.inputs[0][i] = static_cast<float>(i);
  CHECK(arrays.run(net, 7, 2) == POMONA_OK);
  CHECK(arrays.outputs[0] == arrays.inputs[0] && arrays.outputs[1] == arrays.inputs[0]);
  CHECK(arrays.run(net, 0, 2) == POMONA_OK);
  CHECK(arrays.run(net, -1, 1) == POMONA_BAD_VALUE && arrays.run(net, 1, 0) == POMONA_BAD_VALUE);
  CHECK(pomona_net_run(net, 1, nullptr, arrays.to.data(), 1) == POMONA_BAD_POINTER);
  CHECK(pomona_net_run(nullptr, 1, arrays.from.data(), arrays.to.data(), 1) == POMONA_BAD_POINTER);
  pomona_net_free(net);
  pomona_net_free(nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t num_valid = argc > 1 ? std::atoll(argv[1]) : 200, num_hostile = argc > 2 ? std::atoll(argv[2]) : 3000;
  seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  const int64_t only = argc > 4 ? std::atoll(argv[4]) : -1;
  std::printf("pomona %s: networks, seed %llu\n", pomona_version(), static_cast<unsigned long long>(seed));
  check_empty();
  const auto valid = [&](uint64_t which) {
    Random random(seed + which * 1000003u);
    for (int64_t i = 0; i < num_valid; ++i) {
      current_case = static_cast<uint64_t>(i);
      check_valid(random, i % 8 == 7);
    }
  };
  for (int isa = 0; isa <= pomona_max_isa(); ++isa) {
    CHECK(pomona_set_isa(isa) == POMONA_OK);
    std::thread other(valid, 100);  // two callers at a time
    valid(static_cast<uint64_t>(isa));
    other.join();
  }
  std::printf("%lld valid ones on each of %d instruction sets, as two callers\n", static_cast<long long>(2 * num_valid),
              pomona_max_isa() + 1);
  std::fflush(stdout);
  Tally tally;
  for (int64_t i = only < 0 ? 0 : only; i < (only < 0 ? num_hostile : only + 1); ++i) {
    current_case = static_cast<uint64_t>(i);
    CHECK(pomona_set_isa(static_cast<int>(i % (pomona_max_isa() + 1))) == POMONA_OK);
    check_hostile(static_cast<uint64_t>(i), &tally);
  }
  std::printf(
      "%lld hostile ones: %lld accepted, %lld of them run; refused by value %lld, by size %lld, by pointer %lld, for "
      "memory %lld\n",
      static_cast<long long>(num_hostile), static_cast<long long>(tally.made), static_cast<long long>(tally.run),
      static_cast<long long>(tally.refused[-POMONA_BAD_VALUE]), static_cast<long long>(tally.refused[-POMONA_BAD_SIZE]),
      static_cast<long long>(tally.refused[-POMONA_BAD_POINTER]),
      static_cast<long long>(tally.refused[-POMONA_NO_MEMORY]));
  std::printf("at most %.2f s each, and %.2f of max_bytes and 64 KiB\n", tally.slowest, tally.most_memory);
  std::fflush(stdout);
  check_long(num_hostile > 0 ? 1 << 17 : 1 << 10);
  return 0;
}
