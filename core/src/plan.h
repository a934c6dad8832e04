// A network: what it computes (Net), and how it is laid out for some number of samples at a time (Plan).
#ifndef POMONA_PLAN_H
#define POMONA_PLAN_H

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "net_kernels.h"
#include "operations.h"
#include "pomona_net.h"
#include "team.h"

namespace pomona {

constexpr int64_t kMostElements = int64_t{1} << 31;

// Some sizes multiplied, or -1 if that is above kMostElements.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) {
    if (size < 0 || (size > 0 && result > kMostElements / size)) return -1;
    result *= size;
  }
  return result;
}

// Bytes that may still be allocated.
class Budget {
 public:
  explicit Budget(int64_t bytes = 0) : left_(bytes) {}
  int64_t left() const { return left_; }
  bool take(int64_t num, int64_t bytes_each) {  // false: there are not so many
    if (num > left_ / bytes_each) return false;
    left_ -= num * bytes_each;
    return true;
  }

 private:
  int64_t left_;
};

// (features) is c; (positions, features) is c = features, w = positions; (channels, height, width) is itself; of four
// dimensions the first two are c together, `outer` times something.
struct Shape {
  int32_t rank = 0;
  int64_t c = 0, h = 1, w = 1;
  int64_t outer = 1;
  int32_t dtype = POMONA_FLOAT32;
  int64_t size() const { return c * h * w; }
  bool operator==(const Shape& other) const {
    return rank == other.rank && c == other.c && h == other.h && w == other.w && outer == other.outer;
  }
};

struct Matrix {
  std::vector<float> values;
  std::vector<int32_t> columns;
  std::vector<int64_t> starts;  // empty where dense
  int64_t rows = 0, cols = 0;
  int64_t num_nonzero = 0;

  bool is_dense() const { return starts.empty(); }
  // Calls f(column, value) for the entries of a row that are not zero, or for all of them.
  template <typename F>
  void each(int64_t row, bool with_zeros, F&& f) const;
};

struct Node {
  int32_t op;
  Attributes attributes;
  std::vector<int32_t> operands;
};

struct Net;

// A network laid out for some number of samples. See Layers, in float32 or in int16.
class Plan {
 public:
  // Of nodes [first, last). Returns POMONA_OK or an error, with the node it is of.
  static int make(const Net& net, int64_t samples, size_t first, size_t last, Budget* budget,
                  std::unique_ptr<Plan>* plan, int32_t* bad_node);
  virtual ~Plan() = default;

  const std::vector<int32_t>& inputs() const { return inputs_; }    // values that come from before or outside
  const std::vector<int32_t>& outputs() const { return outputs_; }  // values that are used later or outside

  // Memory of the threads: not in them, where an exception would end the process.
  virtual void prepare(int num_threads) = 0;

  // n <= samples; inputs[i] and outputs[i] are of the values above, (n, *shape), float32.
  virtual void run(Net& net, int64_t n, const float* const* inputs, float* const* outputs, Team& team) = 0;

  virtual int64_t activation_bytes() const = 0;
  virtual int64_t weight_bytes() const = 0;

 protected:
  std::vector<int32_t> inputs_, outputs_;
};

// How a number of samples go through a network: nodes [0, split) one sample after the other, while activations are too
// large for a cache to hold those of all, and nodes [split, ...) all samples together.
struct Route {
  std::unique_ptr<Plan> one, all;                 // either may be missing
  std::map<int32_t, std::vector<float>> between;  // values handed over, (sample, *shape)
};

struct Net {
  std::vector<Shape> inputs;
  std::vector<Node> nodes;
  std::vector<Matrix> matrices;
  std::vector<int32_t> outputs;
  std::vector<Shape> shapes;       // of all values
  std::vector<int64_t> output_at;  // of a value, its first place in outputs, or -1
  pomona_net_options options{};
  std::vector<float> units;  // of all values, in int16; empty in float32
  const AllNetKernels* kernels = nullptr;
  Budget budget;                    // what the routes leave of max_bytes
  std::map<int64_t, Route> routes;  // by the number of samples
  int64_t most_samples = 64;        // that go together
  bool is_of_features = false;      // layers of one position do a good part of the work
  bool is_filled = false;           // vectors are, by the positions of one sample
  int64_t largest = 1;              // value
  double macs = 0.0;                // of one sample
  std::vector<double> seconds;
  bool profile = false;

  ~Net();
  int64_t output_of(int32_t value) const { return output_at[static_cast<size_t>(value)]; }
  int32_t value_of(size_t node) const { return static_cast<int32_t>(inputs.size() + node); }
  const Matrix* weight(const Node& node) const;
  const float* bias(const Node& node) const;
  int64_t macs_of(const Node& node, const Shape& out, bool with_zeros) const;
};

// Where the numbers of a value are: element (channel, y, x, sample) is at
// channel * channel_stride + lead + y * row_stride + x * samples + sample, in numbers from `offset` of the arena. With
// many samples the next column is a vector further, and nothing is ever unaligned. What lies between and around rows is
// zero: the padding of convolutions.
struct Layout {
  int64_t row_stride = 1, rows = 1, lead = 0, channel_stride = 1;
  int64_t offset = 0;
  int64_t positions() const { return rows * row_stride; }
};

// Column-blocked entries of a sparse matrix: block b's row r is entries[starts[b * (rows + 1) + r] ...].
struct Block {
  int64_t first_channel, num_channels;
};

template <typename T>
struct Step {
  int32_t op;
  size_t node;              // whose time it is
  std::vector<int32_t> in;  // values
  int32_t out;
  int32_t residual = -1;  // a value, or -1
  int32_t act = -1;
  float low = 0.0f, high = 0.0f;
  Units units;                   // of operands and result
  int32_t num_doublings = 0;     // of sums, whose unit is that much larger
  bool scales_residual = false;  // see Epilogue
  Twice residual_factor;
  bool shares = false;  // the result takes the place of an operand

  // Of convolutions and linear layers.
  bool is_dense = false;   // all rows take all inputs
  bool is_vector = false;  // one position: in float32
  int64_t num_rows = 0;
  std::vector<int32_t> starts;
  std::vector<Entry<T>> entries;
  std::vector<T> bias;        // a row each, or empty
  std::vector<Block> blocks;  // one, and no panel, unless the inputs of a tile are too many for the cache
  int64_t panel_width = 0;    // numbers a channel, copied side by side; 0: read where they are
  struct Piece {
    int64_t from, length, to;  // offset within a channel, numbers for the widest tile, and where in the panel
  };
  std::vector<Piece> pieces;      // what a panel takes of each channel
  int64_t panel_vectors = 0;      // of the widest tile
  std::vector<Factor<T>> values;  // dense
  std::vector<int32_t> offsets;
  std::vector<Entry<float>> vector_entries;  // of one position
  std::vector<float> vector_values;          // likewise, dense
  int64_t vector_columns = 0;
  const float* vector_bias = nullptr;
  int64_t max_vectors = 1;
  // Strided inputs are first copied, image by image: rows first_row + stride * y, columns first_column + stride * x.
  struct Image {
    int64_t first_row, first_column;
  };
  std::vector<Image> images;
  int64_t image_rows = 0;
  Layout scratch;      // all images of a channel one after the other
  int64_t groups = 1;  // copied and done one after the other, in the memory of one
  const Bits<T>* mask = nullptr;
};

// Memory that begins with a cache line: a vector that lies across two of them takes two loads.
template <typename T>
class Lines {
 public:
  T* data() { return numbers_.empty() ? nullptr : numbers_.data() + skipped_; }
  int64_t size() const { return size_; }
  void resize(int64_t size) {  // contents are lost
    constexpr size_t kEach = kLine / sizeof(T);
    numbers_.assign(static_cast<size_t>(size) + kEach, T{0});
    skipped_ = (kEach - reinterpret_cast<uintptr_t>(numbers_.data()) / sizeof(T) % kEach) % kEach;
    size_ = size;
  }

 private:
  std::vector<T> numbers_;
  size_t skipped_ = 0;
  int64_t size_ = 0;
};

// T is float, or int16_t: multiples of a value's unit, see net_kernels.h.
template <typename T>
class Layers final : public Plan {
 public:
  static int make(const Net& net, int64_t samples, size_t first, size_t last, Budget* budget,
                  std::unique_ptr<Plan>* plan, int32_t* bad_node);

  void prepare(int num_threads) override;
  void run(Net& net, int64_t n, const float* const* inputs, float* const* outputs, Team& team) override;
  int64_t activation_bytes() const override { return arena_.size() * static_cast<int64_t>(sizeof(T)); }
  int64_t weight_bytes() const override;

 private:
  void find_ends(const Net& net);
  int lay_out(const Net& net);
  int add_steps(const Net& net, int32_t* bad_node);
  int add_weights(const Net& net, Step<T>* step);
  void plan_tiles(const Net& net, int64_t channels, const std::vector<int64_t>& places, int64_t num_entries,
                  Step<T>* step) const;
  const Bits<T>* mask_for(const Layout& layout, const Shape& shape);  // nullptr: above max_bytes
  int use_strided(const Net& net, Step<T>* step, std::vector<int64_t>* places);
  int allocate(const Net& net);
  bool is_in_place(const Net& net, const Node& node) const;

  void run_step(const Net& net, const Step<T>& step, Team& team);
  void run_layer(const Net& net, const Step<T>& step, Team& team);
  void run_vector(const Net& net, const Step<T>& step, const T* x, Team& team);
  void run_tiles(const Net& net, const Step<T>& step, const T* x, int64_t positions, Team& team);
  void run_groups(const Net& net, const Step<T>& step, int64_t positions, Team& team);
  Tile<T> tile_of(const Net& net, const Step<T>& step, const T* x, int64_t position);
  void copy_images(const Net& net, const Step<T>& step, int64_t channel, T* to);
  template <typename Line>
  void pool(const Net& net, const Step<T>& step, int64_t channel, Line* scratch);
  void mean(const Net& net, const Step<T>& step, int64_t channel, int worker);
  void copy_in(const Net& net, int32_t value, const float* from, int64_t n, Team& team);
  void copy_out(const Net& net, int32_t value, float* to, int64_t n, Team& team);
  void clear_border(const Net& net, int32_t value, int64_t channel);
  bool is_padded(const Net& net, int32_t value) const {
    const Layout& l = layouts_[static_cast<size_t>(value)];
    const Shape& shape = net.shapes[static_cast<size_t>(value)];
    return l.lead > 0 || l.row_stride > shape.w * samples_ || l.rows > shape.h;
  }
  int64_t scratch_numbers(const Net& net, const Step<T>& step) const;  // of each thread
  int64_t scratch_floats(const Net& net, const Step<T>& step) const;   // likewise
  template <typename Number = T>
  static const NetKernels<Number>& kernels_of(const Net& net) {
    if constexpr (std::is_same_v<Number, float>) return net.kernels->float32;
    else return net.kernels->int16;
  }
  static float unit_of(const Net& net, int32_t value) {
    return net.units.empty() ? 1.0f : net.units[static_cast<size_t>(value)];
  }
  T* at(int32_t value, int64_t channel = 0) {
    const Layout& l = layouts_[static_cast<size_t>(value)];
    return arena_.data() + l.offset + channel * l.channel_stride + l.lead;
  }

  int64_t samples_ = 1;
  Budget budget_;  // while it is made: what is left
  size_t first_ = 0, last_ = 0;
  std::vector<Layout> layouts_;  // of values
  std::vector<Step<T>> steps_;
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t>, std::vector<Bits<T>>> masks_;
  Lines<T> arena_;
  int64_t scratch_numbers_ = 0, scratch_floats_ = 0;
  std::vector<Lines<T>> scratch_;  // of threads
  std::vector<Lines<float>> float_scratch_;
  int64_t vector_floats_ = 0;
  Lines<float> vector_;  // inputs and sums of a layer of one position
};

template <typename F>
void Matrix::each(int64_t row, bool with_zeros, F&& f) const {
  if (is_dense()) {
    for (int64_t k = 0; k < cols; ++k) {
      const float value = values[static_cast<size_t>(row * cols + k)];
      if (with_zeros || value != 0.0f) f(k, value);
    }
    return;
  }
  int64_t next = 0;
  for (int64_t i = starts[static_cast<size_t>(row)]; i < starts[static_cast<size_t>(row) + 1]; ++i) {
    const int64_t k = columns[static_cast<size_t>(i)];
    if (with_zeros)
      for (; next < k; ++next) f(next, 0.0f);
    if (with_zeros || values[static_cast<size_t>(i)] != 0.0f) f(k, values[static_cast<size_t>(i)]);
    next = k + 1;
  }
  if (with_zeros)
    for (; next < cols; ++next) f(next, 0.0f);
}

}  // namespace pomona

#endif
