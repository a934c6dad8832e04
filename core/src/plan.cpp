// Laying a network out for some number of samples: where values are, which nodes are done together, weights as entries.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

namespace pomona {
namespace {

template <typename T>
constexpr int64_t kAlign = kMaxLanes<T>;  // numbers: one cache line
template <typename T>
constexpr int64_t kSlack = 2 * kMaxTile<T> + 256;  // numbers that vectors may read beyond a value
template <typename T>
constexpr int64_t kTile = std::is_same_v<T, float> ? 96 : 256;  // positions that go together at most
template <typename T>
constexpr int64_t kCache = (1 << 15) / sizeof(T);   // numbers of a first-level cache: what a tile reads again and again
constexpr double kLeastUses = 12;                   // of one input by the rows of a layer, for copying it to pay
constexpr int64_t kLeastEntries = 10;               // of a row in one block
constexpr double kDenseFrom = 0.6;                  // density from which a layer is faster as if it had no zeros
constexpr int32_t kMostParts = 16;                  // that a weight is kept as, in int16
constexpr float kMostWeight = 32767.0f / 32768.0f;  // of one part
constexpr int64_t kBytesOfTap = 64;                 // while a layer is planned: its places, images and pieces
constexpr int64_t kBytesOfValue = 128;              // while a network is planned

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
// An odd number of cache lines, so that the same positions of many channels do not share a few sets of the cache.
template <typename T>
int64_t spread(int64_t numbers) {
  constexpr int64_t kLineOf = kAlign<T>;
  return numbers >= 16 * kLineOf && numbers / kLineOf % 2 == 0 ? numbers + kLineOf : numbers;
}
int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// How far windows reach beyond the input along one axis.
struct Reach {
  int64_t before, after;
};

Reach reach(int64_t size, int64_t out, int64_t kernel, int64_t padding, int64_t dilation) {
  return {padding, std::max<int64_t>(0, out - 1 - padding + (kernel - 1) * dilation - (size - 1))};
}

class Classes {  // union-find
 public:
  explicit Classes(size_t num) : parent_(num) { std::iota(parent_.begin(), parent_.end(), size_t{0}); }
  size_t find(size_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }
  void join(size_t i, size_t j) { parent_[find(i)] = find(j); }

 private:
  std::vector<size_t> parent_;
};

// Memory of which parts are taken and given back; best fit.
class Gaps {
 public:
  explicit Gaps(int64_t first) : end_(first), most_(first) {}
  int64_t most() const { return most_; }

  // The smallest gap that is large enough, the first of these, or else what is behind the last part.
  int64_t take(int64_t size) {
    const auto best = by_size_.lower_bound({size, 0});
    if (best == by_size_.end()) {
      end_ += size;
      most_ = std::max(most_, end_);
      return end_ - size;
    }
    const auto [length, offset] = *best;
    by_size_.erase(best);
    sizes_.erase(offset);
    if (length > size) add(offset + size, length - size);
    return offset;
  }

  void give_back(int64_t offset, int64_t size) {
    auto next = sizes_.lower_bound(offset);
    if (next != sizes_.end() && next->first == offset + size) {
      size += next->second;
      next = remove(next);
    }
    if (next != sizes_.begin() && (--next, next->first + next->second == offset)) {
      offset = next->first;
      size += next->second;
      remove(next);
    }
    if (offset + size == end_) end_ = offset;
    else add(offset, size);
  }

 private:
  using Sizes = std::map<int64_t, int64_t>;  // by offset
  void add(int64_t offset, int64_t size) {
    sizes_[offset] = size;
    by_size_.insert({size, offset});
  }
  Sizes::iterator remove(Sizes::iterator gap) {
    by_size_.erase({gap->second, gap->first});
    return sizes_.erase(gap);
  }

  Sizes sizes_;
  std::set<std::pair<int64_t, int64_t>> by_size_;
  int64_t end_, most_;
};

}  // namespace

// Convolutions read their input where it is if they move over it one by one and it is not much larger than the output:
// then both have rows of the same stride, and positions in the one are positions in the other.
template <typename T>
bool Layers<T>::is_in_place(const Net& net, const Node& node) const {
  const Attributes& a = node.attributes;
  const Shape& x = net.shapes[static_cast<size_t>(node.operands[0])];
  const Shape& y = net.shapes[static_cast<size_t>(net.value_of(static_cast<size_t>(&node - net.nodes.data())))];
  return a.stride[0] == 1 && a.stride[1] == 1 && 4 * x.w <= 5 * y.w + 12 && 4 * x.h <= 5 * y.h + 12 &&
         x.w + a.padding[1] <= 2 * x.w && x.h + a.padding[0] <= 2 * x.h;
}

template <typename T>
int Layers<T>::lay_out(const Net& net) {
  const size_t num = net.shapes.size();
  layouts_.resize(num);
  std::vector<bool> is_used(num, false);
  for (const int32_t value : inputs_) is_used[static_cast<size_t>(value)] = true;
  for (size_t i = first_; i < last_; ++i) is_used[static_cast<size_t>(net.value_of(i))] = true;
  // Values of one height and width are laid out alike, and so are those that a convolution joins.
  std::map<std::tuple<int64_t, int64_t>, size_t> sizes;
  std::vector<size_t> size_of(num);
  for (size_t i = 0; i < num; ++i)
    size_of[i] = sizes.emplace(std::make_tuple(net.shapes[i].h, net.shapes[i].w), sizes.size()).first->second;
  Classes classes(sizes.size());
  struct Need {
    int64_t width = 0, height = 0, above = 0, left = 0;
  };
  std::vector<Need> needs(sizes.size());
  for (size_t i = 0; i < num; ++i) {
    Need& need = needs[size_of[i]];
    need.width = std::max(need.width, net.shapes[i].w);
    need.height = std::max(need.height, net.shapes[i].h);
  }
  for (size_t i = first_; i < last_; ++i) {
    const Node& node = net.nodes[i];
    if (node.op != POMONA_CONV || !is_in_place(net, node)) continue;
    const Attributes& a = node.attributes;
    const size_t in = static_cast<size_t>(node.operands[0]), out = static_cast<size_t>(net.value_of(i));
    const Shape &x = net.shapes[in], &y = net.shapes[out];
    const Reach rows = reach(x.h, y.h, a.kernel[0], a.padding[0], a.dilation[0]);
    const Reach columns = reach(x.w, y.w, a.kernel[1], a.padding[1], a.dilation[1]);
    Need& need = needs[size_of[in]];
    need.width = std::max(need.width, x.w + std::max(columns.before, columns.after));
    need.height = std::max(need.height, x.h + std::max(rows.before, rows.after));
    need.above = std::max(need.above, rows.before);
    need.left = std::max(need.left, columns.before);
    classes.join(size_of[in], size_of[out]);
  }
  std::vector<Need> joined(sizes.size());
  for (size_t i = 0; i < needs.size(); ++i) {
    Need& all = joined[classes.find(i)];
    all.width = std::max(all.width, needs[i].width);
    all.height = std::max(all.height, needs[i].height);
    all.above = std::max(all.above, needs[i].above);
    all.left = std::max(all.left, needs[i].left);
  }
  for (size_t i = 0; i < num; ++i) {
    const Need& need = joined[classes.find(size_of[i])];
    Layout& l = layouts_[i];
    if (product({samples_, need.width, need.height}) < 0) return POMONA_BAD_SIZE;
    l.row_stride = need.width * samples_;
    l.rows = need.height;
    l.lead = round_up((need.above * need.width + need.left) * samples_, kAlign<T>);
    l.channel_stride = l.positions() == 1 ? 1 : spread<T>(round_up(l.lead + l.positions(), kAlign<T>));
    const int64_t most =
        std::min<int64_t>(std::numeric_limits<int32_t>::max(), budget_.left() / static_cast<int64_t>(sizeof(T)));
    if (is_used[i] && net.shapes[i].c > most / l.channel_stride) return POMONA_BAD_SIZE;
  }
  return POMONA_OK;
}

// Images side by side for what cannot be read in place: for each row within the stride, and each column within it, one
// whose positions are the output's. Where the output's rows leave no room beside them, one for each column of the
// kernel.
template <typename T>
int Layers<T>::use_strided(const Net& net, Step<T>* step, std::vector<int64_t>* places) {
  const Attributes& a = net.nodes[step->node].attributes;
  const Shape& y = net.shapes[static_cast<size_t>(step->out)];
  const int64_t row_stride = layouts_[static_cast<size_t>(step->out)].row_stride;
  const auto steps = [&](int axis) {  // whole strides from the first position to the first and the last tap
    const int64_t last = int64_t{a.kernel[axis] - 1} * a.dilation[axis];
    return std::make_pair(floor_divide(-a.padding[axis], a.stride[axis]),
                          floor_divide(last - a.padding[axis], a.stride[axis]));
  };
  const auto [top, bottom] = steps(0);
  const auto [left, right] = steps(1);
  std::vector<int64_t> rows, columns;  // the first of the image that each tap reads
  for (int64_t ky = 0; ky < a.kernel[0]; ++ky) {
    const int64_t row = ky * a.dilation[0] - a.padding[0];
    rows.push_back(row - (floor_divide(row, a.stride[0]) - top) * a.stride[0]);
  }
  for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
    const int64_t column = kx * a.dilation[1] - a.padding[1];
    const bool fits = (y.w + right - left) * samples_ <= row_stride;
    columns.push_back(fits ? column - (floor_divide(column, a.stride[1]) - left) * a.stride[1] : column);
  }
  const auto distinct = [](std::vector<int64_t> list) {
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
    return list;
  };
  const auto index = [](const std::vector<int64_t>& list, int64_t x) {
    return std::lower_bound(list.begin(), list.end(), x) - list.begin();
  };
  const std::vector<int64_t> first_rows = distinct(rows), first_columns = distinct(columns);
  step->image_rows = y.h + bottom - top;
  for (const int64_t row : first_rows)
    for (const int64_t column : first_columns) step->images.push_back({row, column});
  if (product({row_stride, step->image_rows, static_cast<int64_t>(step->images.size())}) < 0) return POMONA_BAD_SIZE;
  // Where, from an output position, the input of each tap is.
  for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
      const int64_t first_row = rows[static_cast<size_t>(ky)], first_column = columns[static_cast<size_t>(kx)];
      const int64_t image = index(first_rows, first_row) * static_cast<int64_t>(first_columns.size()) +
                            index(first_columns, first_column);
      const int64_t down = (ky * a.dilation[0] - a.padding[0] - first_row) / a.stride[0];
      const int64_t along = (kx * a.dilation[1] - a.padding[1] - first_column) / a.stride[1];
      (*places)[static_cast<size_t>(ky * a.kernel[1] + kx)] =
          (image * step->image_rows + down) * row_stride + along * samples_;
    }
  Layout& l = step->scratch;
  l.row_stride = row_stride;
  l.rows = step->image_rows * static_cast<int64_t>(step->images.size());
  l.channel_stride = spread<T>(round_up(l.positions() + kMaxLanes<T>, kAlign<T>));
  if (layouts_[static_cast<size_t>(step->out)].positions() > 1) step->groups = a.groups;
  return POMONA_OK;
}

// The nearest whole number, but not -2^15, of which a product with itself would not fit; a NaN becomes 0.
int16_t rounded(float x) {
  return x == x ? static_cast<int16_t>(__builtin_rintf(std::clamp(x, -32767.0f, 32767.0f))) : int16_t{0};
}
template <typename T>
T bias_of(float value, float unit) {
  if constexpr (std::is_same_v<T, float>) return value;
  else return rounded(value / unit);
}
// What units of an input, or of a residual, are multiplied by for those of the result.
Twice factor_of(float value, float quotient) { return Twice::of(rounded(value * quotient * 32768.0f)); }
// As how many equal ones a weight is kept: what is 1 and more does not fit into an int16.
template <typename T>
int32_t parts_of(float value, float factor) {
  if constexpr (std::is_same_v<T, float>) return 1;
  const float weight = value * factor, magnitude = weight < 0.0f ? -weight : weight;
  if (!(magnitude > kMostWeight)) return 1;  // a NaN too
  return magnitude / kMostWeight < kMostParts ? 1 + static_cast<int32_t>(magnitude / kMostWeight) : kMostParts;
}
template <typename T>
Factor<T> part_of(float value, float factor) {
  if constexpr (std::is_same_v<T, float>) return value;
  else return factor_of(value / static_cast<float>(parts_of<T>(value, factor)), factor);
}

// How often the unit of a result is doubled for that of the sums it is made of, so that few weights are kept in parts.
// (If instead the result had the larger unit, units would grow from layer to layer.)
int32_t num_doublings(const Matrix& matrix, const float* bias, float factor, float unit) {
  constexpr int64_t kMorePart = 16;  // one more of so many
  constexpr int32_t kMost = 15;
  float largest = 0.0f, largest_bias = 0.0f;  // a NaN is none
  for (const float value : matrix.values) largest = std::max(largest, value < 0.0f ? -value : value);
  for (int64_t row = 0; bias != nullptr && row < matrix.rows; ++row)
    largest_bias = std::max(largest_bias, bias[row] < 0.0f ? -bias[row] : bias[row]);
  for (int32_t num = 0; num < kMost; ++num, factor *= 0.5f, unit *= 2.0f) {
    if (!(largest_bias / unit <= 32767.0f) || !(largest * factor < kMostParts * kMostWeight)) continue;
    int64_t more = 0;
    for (const float value : matrix.values) more += parts_of<int16_t>(value, factor) - 1;
    if (more * kMorePart <= matrix.num_nonzero) return num;
  }
  return kMost;
}

template <typename T>
int64_t in_panel(const Step<T>& step, int64_t place) {  // every tap is in a piece, and these ascend
  const auto after = [](int64_t at, const typename Step<T>::Piece& piece) { return at < piece.from; };
  const typename Step<T>::Piece& piece = *(std::upper_bound(step.pieces.begin(), step.pieces.end(), place, after) - 1);
  return piece.to + place - piece.from;
}

template <typename T>
int Layers<T>::add_weights(const Net& net, Step<T>* step) {
  const Node& node = net.nodes[step->node];
  const Attributes& a = node.attributes;
  const Matrix& matrix = *net.weight(node);
  const Shape& x = net.shapes[static_cast<size_t>(step->in[0])];
  const Layout& in = layouts_[static_cast<size_t>(step->in[0])];
  const bool is_conv = node.op == POMONA_CONV;
  const int64_t groups = is_conv ? a.groups : 1, channels = x.c / groups, rows_each = matrix.rows / groups;
  const int64_t taps = is_conv ? int64_t{a.kernel[0]} * a.kernel[1] : 1;
  step->num_rows = matrix.rows;
  const float* const bias = net.bias(node);
  float unit = unit_of(net, step->out), factor = unit_of(net, step->in[0]) / unit;
  step->is_vector = layouts_[static_cast<size_t>(step->out)].positions() == 1;
  if (!std::is_same_v<T, float> && !step->is_vector) {
    step->scales_residual = step->residual >= 0 && unit_of(net, step->residual) != unit;
    if (step->scales_residual) step->residual_factor = factor_of(1.0f, unit_of(net, step->residual) / unit);
    step->num_doublings = num_doublings(matrix, bias, factor, unit);
    for (int32_t i = 0; i < step->num_doublings; ++i) unit *= 2.0f, factor *= 0.5f;
  }
  if (step->is_vector) {
    step->vector_bias = bias;
  } else if (bias != nullptr) {
    if (!budget_.take(matrix.rows, sizeof(T))) return POMONA_BAD_SIZE;
    for (int64_t row = 0; row < matrix.rows; ++row) step->bias.push_back(bias_of<T>(bias[row], unit));
  }
  // Offset of each tap within a channel.
  if (!budget_.take(taps, kBytesOfTap)) return POMONA_BAD_SIZE;
  std::vector<int64_t> places(static_cast<size_t>(taps), 0);
  if (is_conv && !is_in_place(net, node)) {
    const int error = use_strided(net, step, &places);
    if (error != POMONA_OK) return error;
  } else if (is_conv) {
    for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
        const int64_t row = ky * a.dilation[0] - a.padding[0], column = kx * a.dilation[1] - a.padding[1];
        places[static_cast<size_t>(ky * a.kernel[1] + kx)] = row * in.row_stride + column * samples_;
      }
  }
  const bool is_strided = !step->images.empty();
  const int64_t channel_stride = is_strided ? step->scratch.channel_stride : in.channel_stride;
  if (x.c > std::numeric_limits<int32_t>::max() / channel_stride) return POMONA_BAD_SIZE;

  const auto offset = [&](int64_t row, int64_t column) {
    const int64_t channel = (step->groups > 1 ? 0 : row / rows_each * channels) + column / taps;
    return channel * channel_stride + places[static_cast<size_t>(column % taps)];
  };

  const double density =
      static_cast<double>(matrix.num_nonzero) / static_cast<double>(std::max<int64_t>(1, matrix.rows * matrix.cols));
  const bool as_dense = net.options.dense == POMONA_DENSE_ALWAYS || (net.options.dense == 0 && density >= kDenseFrom);
  const bool is_contiguous = step->is_vector && !is_strided && channel_stride == 1 && taps == 1;
  step->is_dense = as_dense && groups == 1 && (step->is_vector ? is_contiguous : matrix.rows >= kDenseRows);
  if (step->is_vector) {
    const int64_t numbers = x.c * channel_stride;
    vector_floats_ = std::max(vector_floats_, std::is_same_v<T, float> ? 0 : numbers + matrix.rows + kLine);
  }
  if (step->is_vector && step->is_dense) {
    if (!budget_.take(matrix.rows, matrix.cols * 4)) return POMONA_BAD_SIZE;
    step->vector_columns = matrix.cols;
    step->vector_values.resize(static_cast<size_t>(matrix.rows * matrix.cols));
    for (int64_t row = 0; row < matrix.rows; ++row)
      matrix.each(row, false, [&](int64_t k, float value) {
        step->vector_values[static_cast<size_t>(row * matrix.cols + k)] = value;
      });
    return POMONA_OK;
  }
  if (step->is_dense) {
    // A column with a weight of several parts is there so often.
    std::vector<int32_t> parts(static_cast<size_t>(matrix.cols), 1);
    for (int64_t row = 0; row < matrix.rows; ++row)
      matrix.each(row, false, [&](int64_t k, float value) {
        parts[static_cast<size_t>(k)] = std::max(parts[static_cast<size_t>(k)], parts_of<T>(value, factor));
      });
    std::vector<int64_t> first(static_cast<size_t>(matrix.cols) + 1, 0);
    for (int64_t k = 0; k < matrix.cols; ++k)
      first[static_cast<size_t>(k) + 1] = first[static_cast<size_t>(k)] + parts[static_cast<size_t>(k)];
    const int64_t rows = round_up(matrix.rows, kDenseRows), num = first.back();
    if (!budget_.take(rows, num * 4) || !budget_.take(num, 16)) return POMONA_BAD_SIZE;
    step->values.assign(static_cast<size_t>(rows * num), Factor<T>{});
    for (int64_t row = 0; row < matrix.rows; ++row)
      matrix.each(row, false, [&](int64_t k, float value) {
        for (int64_t i = 0; i < parts_of<T>(value, factor); ++i)
          step->values[static_cast<size_t>((row / kDenseRows * num + first[static_cast<size_t>(k)] + i) * kDenseRows +
                                           row % kDenseRows)] = part_of<T>(value, factor);
      });
    for (int64_t k = 0; k < matrix.cols; ++k)
      for (int32_t i = parts[static_cast<size_t>(k)]; i > 0; --i)
        step->offsets.push_back(static_cast<int32_t>(offset(0, k)));
    step->max_vectors = kernels_of(net).max_dense_vectors;
    return POMONA_OK;
  }

  // Row by row into the blocks: the entries of block b's row r are counted first, then placed.
  int64_t num_entries = as_dense ? matrix.rows * matrix.cols : matrix.num_nonzero;
  if (!step->is_vector && !std::is_same_v<T, float>)
    for (int64_t row = 0; row < matrix.rows; ++row)
      matrix.each(row, false, [&](int64_t, float value) { num_entries += parts_of<T>(value, factor) - 1; });
  if (num_entries > std::numeric_limits<int32_t>::max()) return POMONA_BAD_SIZE;
  if (!budget_.take(num_entries, sizeof(Entry<T>))) return POMONA_BAD_SIZE;
  plan_tiles(net, channels, places, num_entries, step);
  const int64_t num_blocks = static_cast<int64_t>(step->blocks.size());
  const size_t width = static_cast<size_t>(matrix.rows + 1);
  if (!budget_.take(num_blocks, 12 * (matrix.rows + 1))) return POMONA_BAD_SIZE;
  std::vector<int32_t> counts(static_cast<size_t>(num_blocks) * width + 1, 0);
  const int64_t block_channels = step->blocks[0].num_channels;
  const auto block_of = [&](int64_t column) { return num_blocks == 1 ? 0 : column / taps / block_channels; };
  const auto parts = [&](float value) { return step->is_vector ? 1 : parts_of<T>(value, factor); };
  for (int64_t row = 0; row < matrix.rows; ++row)
    matrix.each(row, as_dense, [&](int64_t k, float value) {
      counts[static_cast<size_t>(block_of(k)) * width + static_cast<size_t>(row)] += parts(value);
    });
  step->starts.assign(counts.size(), 0);
  int32_t sum = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    step->starts[i] = sum;
    sum += counts[i];
  }
  std::vector<int32_t> next(step->starts);
  if (step->is_vector) step->vector_entries.resize(static_cast<size_t>(num_entries));
  else step->entries.resize(static_cast<size_t>(num_entries));
  for (int64_t row = 0; row < matrix.rows; ++row)
    matrix.each(row, as_dense, [&](int64_t k, float value) {
      const int64_t block = block_of(k);
      int64_t place = offset(row, k);
      if (step->panel_width > 0)
        place = (k / taps - step->blocks[static_cast<size_t>(block)].first_channel) * step->panel_width +
                in_panel(*step, places[static_cast<size_t>(k % taps)]);
      int32_t& at = next[static_cast<size_t>(block) * width + static_cast<size_t>(row)];
      if (step->is_vector) step->vector_entries[static_cast<size_t>(at++)] = {static_cast<int32_t>(place), value};
      else
        for (int32_t i = parts(value); i > 0; --i)
          step->entries[static_cast<size_t>(at++)] = {static_cast<int32_t>(place), part_of<T>(value, factor)};
    });
  return POMONA_OK;
}

// How many positions go together, and whether the inputs of that many are first copied side by side, in blocks of
// channels that stay in the cache.
template <typename T>
void Layers<T>::plan_tiles(const Net& net, int64_t channels, const std::vector<int64_t>& places, int64_t num_entries,
                           Step<T>* step) const {
  const int64_t all = net.shapes[static_cast<size_t>(step->in[0])].c;
  step->blocks = {{0, channels}};
  step->max_vectors = kernels_of(net).max_vectors;
  if (step->is_vector) return;
  const Layout& out = layouts_[static_cast<size_t>(step->out)];
  const Shape& y = net.shapes[static_cast<size_t>(step->out)];
  const int64_t positions = (y.h - 1) * out.row_stride + y.w * samples_;  // as run_layer counts them
  const int64_t lanes = kernels_of(net).lanes, vectors = (positions + lanes - 1) / lanes;
  step->max_vectors = std::min<int64_t>(kernels_of(net).max_vectors, kTile<T> / lanes);
  const double uses = static_cast<double>(num_entries) / static_cast<double>(all);  // of one loaded vector
  const int64_t num_tiles = (vectors + step->max_vectors - 1) / step->max_vectors;
  const int64_t tile = (vectors + num_tiles - 1) / num_tiles * lanes;  // the widest, where they are as equal as can be
  if (channels != all) return;
  // Taps near each other read one piece of a channel.
  std::vector<int64_t> sorted(places);
  std::sort(sorted.begin(), sorted.end());
  std::vector<typename Step<T>::Piece> pieces;
  int64_t width = 0;
  for (const int64_t place : sorted) {
    if (!pieces.empty() && place - pieces.back().from < pieces.back().length + lanes) {
      const int64_t length = round_up(place - pieces.back().from + tile, lanes);
      width += length - pieces.back().length;
      pieces.back().length = length;
    } else {
      pieces.push_back({place, tile, width});
      width += tile;
    }
  }
  if (channels * width <= kCache<T> || uses * static_cast<double>(tile) < kLeastUses * static_cast<double>(width))
    return;
  step->pieces = pieces;
  step->panel_vectors = tile / lanes;
  step->panel_width = width;
  // As many channels as stay in the first-level cache, or more where rows have few entries in these: between blocks
  // sums go to memory and back.
  const int64_t busy = kLeastEntries * channels * step->num_rows / std::max<int64_t>(1, num_entries);
  const int64_t most = std::clamp(busy * step->panel_width, kCache<T>, 2 * kCache<T>);
  const int64_t per_block = std::clamp<int64_t>(most / step->panel_width, 1, channels);
  const int64_t num_blocks = (channels + per_block - 1) / per_block, even = (channels + num_blocks - 1) / num_blocks;
  step->blocks.clear();
  for (int64_t first = 0; first < channels; first += even)
    step->blocks.push_back({first, std::min(even, channels - first)});
}

template <typename T>
int Layers<T>::add_steps(const Net& net, int32_t* bad_node) {
  const size_t num_values = net.shapes.size();
  std::vector<int> uses(num_values, 0);
  for (size_t i = first_; i < last_; ++i)
    for (const int32_t value : net.nodes[i].operands) ++uses[static_cast<size_t>(value)];
  for (const int32_t value : outputs_) uses[static_cast<size_t>(value)] += 2;  // never only an intermediate
  std::vector<int32_t> only_user(num_values, -1);
  for (size_t i = first_; i < last_; ++i)
    for (const int32_t value : net.nodes[i].operands)
      if (uses[static_cast<size_t>(value)] == 1) only_user[static_cast<size_t>(value)] = static_cast<int32_t>(i);

  std::vector<bool> is_done(net.nodes.size(), false);
  for (size_t i = first_; i < last_; ++i) {
    if (is_done[i]) continue;
    *bad_node = static_cast<int32_t>(i);
    const Node& node = net.nodes[i];
    Step<T> step;
    step.op = node.op;
    step.node = i;
    step.in = node.operands;
    step.out = net.value_of(i);
    step.low = node.attributes.low;
    step.high = node.attributes.high;
    if (traits_of(step.op).kind == kLayer) {
      // A sum with what exists already, then an activation, are done before the result is stored.
      const auto follow = [&]() { return only_user[static_cast<size_t>(step.out)]; };
      int32_t user = follow();
      if (user >= 0 && net.nodes[static_cast<size_t>(user)].op == POMONA_ADD) {
        const std::vector<int32_t>& terms = net.nodes[static_cast<size_t>(user)].operands;
        const int32_t other = terms[0] == step.out ? terms[1] : terms[0];
        const bool exists = other < net.value_of(first_) || is_done[static_cast<size_t>(other - net.value_of(0))];
        if (other != step.out && exists) {
          step.residual = other;
          is_done[static_cast<size_t>(user)] = true;
          step.out = net.value_of(static_cast<size_t>(user));
          user = follow();
        }
      }
      if (user >= 0) {
        const Node& next = net.nodes[static_cast<size_t>(user)];
        if (next.op == POMONA_RELU || next.op == POMONA_CLIP) {
          step.act = next.op;
          step.low = next.attributes.low;
          step.high = next.attributes.high;
          is_done[static_cast<size_t>(user)] = true;
          step.out = net.value_of(static_cast<size_t>(user));
        }
      }
      const int error = add_weights(net, &step);
      if (error != POMONA_OK) return error;
      const Layout& l = layouts_[static_cast<size_t>(step.out)];
      const Shape& shape = net.shapes[static_cast<size_t>(step.out)];
      if (l.row_stride > shape.w * samples_ || l.rows > shape.h) {
        step.mask = mask_for(l, shape);
        if (step.mask == nullptr) return POMONA_BAD_SIZE;
      }
    }
    is_done[i] = true;
    const int32_t other = step.residual >= 0 ? step.residual : step.in.back();
    step.units = {unit_of(net, step.in[0]), unit_of(net, other), 1.0f / unit_of(net, step.out),
                  unit_of(net, step.in[0]) == unit_of(net, step.out)};
    steps_.push_back(std::move(step));
  }
  *bad_node = -1;
  return POMONA_OK;
}

template <typename T>
const Bits<T>* Layers<T>::mask_for(const Layout& l, const Shape& shape) {
  const auto key = std::make_tuple(l.row_stride, l.rows, shape.h, shape.w);
  std::vector<Bits<T>>& mask = masks_[key];
  if (mask.empty()) {
    // A vector may begin with the last one.
    const int64_t positions = round_up(l.positions(), kAlign<T>) + kMaxLanes<T>;
    if (!budget_.take(positions, sizeof(T))) return nullptr;
    mask.assign(static_cast<size_t>(positions), 0);
    for (int64_t y = 0; y < shape.h; ++y) {
      const auto row = mask.begin() + y * l.row_stride;
      std::fill(row, row + shape.w * samples_, -1);
    }
  }
  return mask.data();
}

// Memory is used again when the last reader of what was there is done.
template <typename T>
int Layers<T>::allocate(const Net& net) {
  const size_t num = net.shapes.size();
  std::vector<int64_t> last(num, -1);
  for (size_t s = 0; s < steps_.size(); ++s) {
    for (const int32_t value : steps_[s].in) last[static_cast<size_t>(value)] = static_cast<int64_t>(s);
    if (steps_[s].residual >= 0) last[static_cast<size_t>(steps_[s].residual)] = static_cast<int64_t>(s);
  }
  for (const int32_t value : outputs_) last[static_cast<size_t>(value)] = static_cast<int64_t>(steps_.size());

  const int64_t num_steps = static_cast<int64_t>(steps_.size());
  struct Piece {
    int64_t offset, size;
  };
  Gaps gaps(kSlack<T>);
  std::vector<std::vector<Piece>> ending(static_cast<size_t>(num_steps) + 1);  // by the last step that needs them
  const auto place = [&](int64_t size, int64_t until) {
    const int64_t offset = gaps.take(size);
    ending[static_cast<size_t>(until)].push_back({offset, size});
    return offset;
  };
  const auto size_of = [&](size_t value) {
    return round_up(net.shapes[value].c * layouts_[value].channel_stride + kMaxLanes<T>, kAlign<T>);
  };
  for (const int32_t input : inputs_) {
    const size_t value = static_cast<size_t>(input);
    layouts_[value].offset = place(size_of(value), std::max<int64_t>(last[value], 0));
  }
  for (size_t s = 0; s < steps_.size(); ++s) {
    Step<T>& step = steps_[s];
    const int64_t now = static_cast<int64_t>(s);
    if (s > 0)
      for (const Piece& piece : ending[s - 1]) gaps.give_back(piece.offset, piece.size);
    const size_t out = static_cast<size_t>(step.out);
    // Where it can, a result takes the place of what it is computed from position by position.
    int32_t over = -1;
    if (step.residual >= 0 && step.residual != step.in[0]) over = step.residual;
    else if (traits_of(step.op).is_in_place) over = step.in[0];
    const bool may = over >= 0 && net.shapes[static_cast<size_t>(over)] == net.shapes[out];
    std::vector<Piece>& here = ending[s];
    const auto piece = std::find_if(here.begin(), here.end(), [&](const Piece& p) {
      return may && p.offset == layouts_[static_cast<size_t>(over)].offset;
    });
    step.shares = piece != here.end();
    if (step.shares) {
      const Piece shared = *piece;
      here.erase(piece);
      layouts_[out].offset = shared.offset;
      ending[static_cast<size_t>(std::max(last[out], now))].push_back(shared);
    } else {
      layouts_[out].offset = place(size_of(out), std::max(last[out], now));
    }
    if (!step.images.empty() && step.groups == 1) {
      const int64_t size = net.shapes[static_cast<size_t>(step.in[0])].c * step.scratch.channel_stride + kAlign<T>;
      step.scratch.offset = place(round_up(size, kAlign<T>), now);
    }
  }
  const int64_t numbers = gaps.most() + kSlack<T>;
  if (!budget_.take(numbers, sizeof(T))) return POMONA_BAD_SIZE;
  arena_.resize(numbers);
  return POMONA_OK;
}

template <typename T>
void Layers<T>::find_ends(const Net& net) {
  std::vector<bool> is_in(net.shapes.size(), false), is_out(net.shapes.size(), false);
  const int32_t first = net.value_of(first_), last = net.value_of(last_);
  for (size_t i = first_; i < net.nodes.size(); ++i)
    for (const int32_t value : net.nodes[i].operands) {
      if (i < last_ && value < first) is_in[static_cast<size_t>(value)] = true;
      if (i >= last_ && value >= first && value < last) is_out[static_cast<size_t>(value)] = true;
    }
  for (const int32_t value : net.outputs) {
    // An output that is an input of the network goes through the last plan.
    if (value >= first && value < last) is_out[static_cast<size_t>(value)] = true;
    if (value < net.value_of(0) && last_ == net.nodes.size())
      is_in[static_cast<size_t>(value)] = is_out[static_cast<size_t>(value)] = true;
  }
  for (size_t value = 0; value < net.shapes.size(); ++value) {
    if (is_in[value]) inputs_.push_back(static_cast<int32_t>(value));
    if (is_out[value]) outputs_.push_back(static_cast<int32_t>(value));
  }
}

template <typename T>
int Layers<T>::make(const Net& net, int64_t samples, size_t first, size_t last, Budget* budget,
                    std::unique_ptr<Plan>* plan, int32_t* bad_node) {
  std::unique_ptr<Layers> made(new Layers);
  made->samples_ = samples;
  made->first_ = first;
  made->last_ = last;
  made->budget_ = *budget;
  const int64_t num_values = static_cast<int64_t>(net.shapes.size());
  if (!made->budget_.take(num_values, sizeof(Step<T>) + sizeof(Layout) + kBytesOfValue)) return POMONA_BAD_SIZE;
  made->find_ends(net);
  int error = made->lay_out(net);
  if (error == POMONA_OK) error = made->add_steps(net, bad_node);
  for (const Step<T>& step : made->steps_) {
    made->scratch_numbers_ = std::max(made->scratch_numbers_, made->scratch_numbers(net, step));
    made->scratch_floats_ = std::max(made->scratch_floats_, made->scratch_floats(net, step));
  }
  if (error == POMONA_OK && !(made->budget_.take(made->scratch_numbers_, sizeof(T)) &&
                              made->budget_.take(made->scratch_floats_ + made->vector_floats_, sizeof(float))))
    error = POMONA_BAD_SIZE;
  if (error == POMONA_OK) error = made->allocate(net);
  if (error != POMONA_OK) return error;
  made->vector_.resize(made->vector_floats_);
  *budget = made->budget_;
  plan->reset(made.release());
  return POMONA_OK;
}

template <typename T>
int64_t Layers<T>::weight_bytes() const {
  size_t bytes = 0;
  for (const Step<T>& step : steps_)
    bytes += (step.entries.size() + step.vector_entries.size()) * sizeof(Entry<T>) +
             (step.starts.size() + step.offsets.size() + step.values.size() + step.vector_values.size()) * 4;
  return static_cast<int64_t>(bytes);
}

int Plan::make(const Net& net, int64_t samples, size_t first, size_t last, Budget* budget, std::unique_ptr<Plan>* plan,
               int32_t* bad_node) {
  const auto make = net.units.empty() ? Layers<float>::make : Layers<int16_t>::make;
  return make(net, samples, first, last, budget, plan, bad_node);
}

template class Layers<float>;
template class Layers<int16_t>;

}  // namespace pomona
