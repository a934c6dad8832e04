// Running a plan.
#include <algorithm>
#include <cstring>
#include <limits>

#include "plan.h"

#if !defined(POMONA_NO_THREADS)
#include <chrono>
#endif

namespace pomona {
namespace {

constexpr int64_t kPartialSums = 1 << 15;  // between blocks of columns
constexpr int64_t kTasksEach = 3;          // for every thread, where there is enough to do

double now() {
#if defined(POMONA_NO_THREADS)
  return 0.0;
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

template <typename T>
void clear(T* from, int64_t n) {
  if (n > 0) std::memset(from, 0, static_cast<size_t>(n) * sizeof(T));
}

template <typename T>
void copy(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

// One number, in units or out of them.
template <typename T>
T number_of(float value, float per_unit) {
  if constexpr (std::is_same_v<T, float>) return value;
  else if (value != value) return 0;
  else return static_cast<int16_t>(__builtin_rintf(std::clamp(value * per_unit, -32768.0f, 32767.0f)));
}
template <typename T>
float value_of(T number, float unit) {
  if constexpr (std::is_same_v<T, float>) return number;
  else return static_cast<float>(number) * unit;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
T least() {
  if constexpr (std::is_same_v<T, float>) return -std::numeric_limits<float>::infinity();
  else return std::numeric_limits<T>::lowest();
}

// Whether 0 yields 0.
bool keeps_zero(int32_t op, float low, float high) {
  return op == POMONA_CLIP ? low <= 0.0f && high >= 0.0f : traits_of(op).keeps_zero;
}

// A row with its borders, as wide as a pool reads it.
struct PoolLine {
  int64_t places, width;  // where windows may begin, one by one; columns in all
  // Border before the input, and columns of the kernel, both without those in the border at all places.
  int64_t left, columns;

  PoolLine(const Attributes& a, const Shape& x, const Shape& y) {
    places = (y.w - 1) * a.stride[1] + 1;
    left = std::min<int64_t>(a.padding[1], places - 1);
    const int64_t skipped = a.padding[1] - left;
    columns = std::min(a.kernel[1] - skipped, left + x.w);
    width = std::max(left + x.w, places + columns - 1);
  }
};

// Of a pool, in numbers of its lines.
int64_t pool_scratch(const PoolLine& line, const Shape& y, int64_t samples) {
  return (2 * line.width + 2 * line.places + 2 * y.w) * samples + 7 * kMaxLanes<int16_t>;
}

}  // namespace

template <typename T>
int64_t Layers<T>::scratch_numbers(const Net& net, const Step<T>& step) const {
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  if (step.op == POMONA_MAX_POOL) return pool_scratch(PoolLine(net.nodes[step.node].attributes, x, y), y, samples_);
  if (step.groups > 1) return x.c / step.groups * step.scratch.channel_stride + kMaxTile<T>;
  if (step.panel_width == 0) return 0;
  const int64_t partial = step.blocks.size() > 1 ? kPartialSums + kDenseRows * kMaxTile<T> : 0;
  return step.blocks[0].num_channels * step.panel_width + kMaxLanes<T> + partial;
}

// What is summed in float32.
template <typename T>
int64_t Layers<T>::scratch_floats(const Net& net, const Step<T>& step) const {
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  if (step.op == POMONA_AVG_POOL) return pool_scratch(PoolLine(net.nodes[step.node].attributes, x, y), y, samples_);
  return step.op == POMONA_MEAN ? 2 * samples_ : 0;
}

// Zeros between the rows, and around.
template <typename T>
void Layers<T>::clear_border(const Net& net, int32_t value, int64_t channel) {
  if (!is_padded(net, value)) return;
  const Layout& l = layouts_[static_cast<size_t>(value)];
  const Shape& s = net.shapes[static_cast<size_t>(value)];
  T* const data = at(value, channel);
  const int64_t width = s.w * samples_;
  clear(data - l.lead, l.lead);
  if (l.row_stride > width)
    for (int64_t y = 0; y + 1 < s.h; ++y) clear(data + y * l.row_stride + width, l.row_stride - width);
  const int64_t end = (s.h - 1) * l.row_stride + width;
  clear(data + end, l.channel_stride - l.lead - end);
}

template <typename T>
void Layers<T>::copy_in(const Net& net, int32_t value, const float* from, int64_t n, Team& team) {
  const Shape& s = net.shapes[static_cast<size_t>(value)];
  const Layout& l = layouts_[static_cast<size_t>(value)];
  const float per_unit = 1.0f / unit_of(net, value);
  constexpr int64_t kSquare = 32;
  if (s.rank >= 3) {
    each_of(team, s.c, s.h * s.w * samples_, [&](int64_t c, int) {
      for (int64_t y = 0; y < s.h; ++y) {
        T* const to = at(value, c) + y * l.row_stride;
        if (samples_ == 1) {
          kernels_of(net).write(from + (c * s.h + y) * s.w, per_unit, to, s.w);
          continue;
        }
        if (n < samples_) clear(to, s.w * samples_);
        for (int64_t x0 = 0; x0 < s.w; x0 += kSquare)
          for (int64_t sample = 0; sample < n; ++sample) {
            const float* const row = from + ((sample * s.c + c) * s.h + y) * s.w;
            for (int64_t x = x0; x < std::min(s.w, x0 + kSquare); ++x)
              to[x * samples_ + sample] = number_of<T>(row[x], per_unit);
          }
      }
      clear_border(net, value, c);
    });
    return;
  }
  // (sample, position, feature) -> (feature, position, sample), in squares
  team.each(divide_up(s.c, kSquare), [&](int64_t square, int) {
    const int64_t first = square * kSquare, last = std::min(s.c, first + kSquare);
    if (n < samples_)
      for (int64_t c = first; c < last; ++c) clear(at(value, c), s.w * samples_);
    for (int64_t sample = 0; sample < n; ++sample)
      for (int64_t p0 = 0; p0 < s.w; p0 += kSquare)
        for (int64_t c = first; c < last; ++c)
          for (int64_t p = p0; p < std::min(s.w, p0 + kSquare); ++p)
            at(value, c)[p * samples_ + sample] = number_of<T>(from[(sample * s.w + p) * s.c + c], per_unit);
    for (int64_t c = first; c < last; ++c) clear_border(net, value, c);
  });
}

template <typename T>
void Layers<T>::copy_out(const Net& net, int32_t value, float* to, int64_t n, Team& team) {
  const Shape& s = net.shapes[static_cast<size_t>(value)];
  const Layout& l = layouts_[static_cast<size_t>(value)];
  const float unit = unit_of(net, value);
  constexpr int64_t kSquare = 32;
  if (s.rank >= 3) {
    each_of(team, s.c, s.h * s.w * samples_, [&](int64_t c, int) {
      for (int64_t y = 0; y < s.h; ++y) {
        const T* const from = at(value, c) + y * l.row_stride;
        if (samples_ == 1) {
          kernels_of(net).read(from, unit, to + (c * s.h + y) * s.w, s.w);
          continue;
        }
        for (int64_t x0 = 0; x0 < s.w; x0 += kSquare)
          for (int64_t sample = 0; sample < n; ++sample) {
            float* const row = to + ((sample * s.c + c) * s.h + y) * s.w;
            for (int64_t x = x0; x < std::min(s.w, x0 + kSquare); ++x)
              row[x] = value_of(from[x * samples_ + sample], unit);
          }
      }
    });
    return;
  }
  team.each(n * divide_up(s.w, kSquare), [&](int64_t task, int) {
    const int64_t sample = task / divide_up(s.w, kSquare), p0 = task % divide_up(s.w, kSquare) * kSquare;
    for (int64_t c0 = 0; c0 < s.c; c0 += kSquare)
      for (int64_t p = p0; p < std::min(s.w, p0 + kSquare); ++p)
        for (int64_t c = c0; c < std::min(s.c, c0 + kSquare); ++c)
          to[(sample * s.w + p) * s.c + c] = value_of(at(value, c)[p * samples_ + sample], unit);
  });
}

// The images of one channel.
template <typename T>
void Layers<T>::copy_images(const Net& net, const Step<T>& step, int64_t channel, T* to) {
  const Attributes& a = net.nodes[step.node].attributes;
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const int64_t width = step.scratch.row_stride, columns = width / samples_, stride = a.stride[1];
  const T* const from = at(step.in[0], channel);
  for (const typename Step<T>::Image& image : step.images) {
    // Columns first_column + stride * i of the input, where it has them.
    const int64_t begin = image.first_column < 0 ? std::min(columns, divide_up(-image.first_column, stride)) : 0;
    const int64_t there = x.w - 1 - image.first_column;
    const int64_t end = there < 0 ? begin : std::max(begin, std::min(columns, there / stride + 1));
    for (int64_t y = 0; y < step.image_rows; ++y, to += width) {
      const int64_t row = image.first_row + y * a.stride[0];
      if (row < 0 || row >= x.h) {
        clear(to, width);
        continue;
      }
      const T* const line = from + row * in.row_stride + (image.first_column + stride * begin) * samples_;
      T* const there_to = to + begin * samples_;
      clear(to, begin * samples_);
      if (stride == 1) copy(line, there_to, (end - begin) * samples_);
      else if (stride == 2 && samples_ == 1) kernels_of(net).every_second(line, there_to, end - begin);
      else
        for (int64_t i = 0; i < end - begin; ++i) copy(line + stride * i * samples_, there_to + i * samples_, samples_);
      clear(to + end * samples_, (columns - end) * samples_);
    }
  }
}

// All rows of a layer; x is what lies at the first position of channel 0.
template <typename T>
void Layers<T>::run_tiles(const Net& net, const Step<T>& step, const T* x, int64_t positions, Team& team) {
  const NetKernels<T>& kernels = kernels_of(net);
  const int64_t lanes = kernels.lanes, vectors = divide_up(positions, lanes);
  const int64_t num_tiles = divide_up(vectors, step.max_vectors);
  const int64_t channel_stride =
      step.images.empty() ? layouts_[static_cast<size_t>(step.in[0])].channel_stride : step.scratch.channel_stride;
  int64_t num_chunks =
      std::min(divide_up(kTasksEach * (team.size() > 1 ? team.size() : 0), num_tiles), divide_up(step.num_rows, 16));
  num_chunks = std::max<int64_t>(num_chunks, 1);
  if (step.blocks.size() > 1)
    num_chunks = std::max(num_chunks, divide_up(step.num_rows * step.max_vectors * lanes, kPartialSums));
  const int64_t rows_each = divide_up(divide_up(step.num_rows, num_chunks), kDenseRows) * kDenseRows;
  num_chunks = divide_up(step.num_rows, rows_each);
  const size_t width = static_cast<size_t>(step.num_rows + 1);
  team.each(num_tiles * num_chunks, [&](int64_t task, int worker) {
    const int64_t index = task / num_chunks, chunk = task % num_chunks;
    const int64_t begin = vectors * index / num_tiles, end = vectors * (index + 1) / num_tiles;
    const int num = static_cast<int>(end - begin);
    const int64_t position = begin * lanes;
    Tile<T> tile = tile_of(net, step, x, position);
    tile.first_row = static_cast<int32_t>(chunk * rows_each);
    tile.last_row = static_cast<int32_t>(std::min(step.num_rows, (chunk + 1) * rows_each));
    if (step.is_dense) {
      kernels.dense(tile, step.values.data(), step.offsets.data(), static_cast<int64_t>(step.offsets.size()), num);
      return;
    }
    if (step.panel_width == 0) {
      kernels.sparse(tile, step.entries.data(), step.starts.data(), num);
      return;
    }
    const int64_t panel_numbers = step.blocks[0].num_channels * step.panel_width + kMaxLanes<T>;
    T* const panel = scratch_[static_cast<size_t>(worker)].data();
    if (step.blocks.size() > 1) {
      tile.partial = panel + panel_numbers;
      tile.partial_stride = num * lanes;
    }
    const T* const from = x + position;
    const int64_t unused = (step.panel_vectors - num) * lanes;
    for (size_t b = 0; b < step.blocks.size(); ++b) {
      const Block& block = step.blocks[b];
      for (int64_t c = 0; c < block.num_channels; ++c)
        for (const typename Step<T>::Piece& piece : step.pieces)
          kernels.copy(from + (block.first_channel + c) * channel_stride + piece.from,
                       panel + c * step.panel_width + piece.to, piece.length - unused);
      tile.x = panel;
      tile.is_first = b == 0;
      tile.is_last = b + 1 == step.blocks.size();
      kernels.sparse(tile, step.entries.data(), step.starts.data() + b * width, num);
    }
  });
}

// A layer of one position, in float32.
template <typename T>
void Layers<T>::run_vector(const Net& net, const Step<T>& step, const T* x, Team& team) {
  Tile<float> tile{};
  if constexpr (std::is_same_v<T, float>) {
    tile = tile_of(net, step, x, 0);
  } else {
    const bool has_images = !step.images.empty();
    const Layout& in = has_images ? step.scratch : layouts_[static_cast<size_t>(step.in[0])];
    const int64_t numbers = net.shapes[static_cast<size_t>(step.in[0])].c * in.channel_stride, lead = in.lead;
    kernels_of(net).read(x - lead, step.units.a, vector_.data(), numbers);
    tile.x = vector_.data() + lead;
    tile.out = vector_.data() + numbers;
    tile.row_stride = 1;
  }
  tile.epilogue.bias = step.vector_bias;
  const int64_t num_chunks =
      team.size() == 1 ? 1 : std::min<int64_t>(team.size() * kTasksEach, divide_up(step.num_rows, 64));
  const int64_t rows_each = divide_up(step.num_rows, num_chunks);
  team.each(num_chunks, [&](int64_t chunk, int) {
    Tile<float> part = tile;
    part.first_row = static_cast<int32_t>(std::min(step.num_rows, chunk * rows_each));
    part.last_row = static_cast<int32_t>(std::min(step.num_rows, (chunk + 1) * rows_each));
    if (step.is_dense) net.kernels->dense_vector(part, step.vector_values.data(), step.vector_columns);
    else net.kernels->sparse_vector(part, step.vector_entries.data(), step.starts.data());
  });
  if constexpr (!std::is_same_v<T, float>) {
    const int64_t stride = layouts_[static_cast<size_t>(step.out)].channel_stride;
    T* const out = at(step.out);
    const T* const residual = step.residual < 0 ? nullptr : at(step.residual);
    for (int64_t row = 0; row < step.num_rows; ++row) {
      float sum = tile.out[row];
      if (residual != nullptr) sum += value_of(residual[row * stride], step.units.b);
      if (step.act == POMONA_RELU) sum = std::max(sum, 0.0f);
      if (step.act == POMONA_CLIP) sum = std::clamp(sum, step.low, step.high);
      out[row * stride] = number_of<T>(sum, step.units.per_out);
    }
  }
}

template <typename T>
void Layers<T>::run_layer(const Net& net, const Step<T>& step, Team& team) {
  const Layout& out = layouts_[static_cast<size_t>(step.out)];
  const Shape& shape = net.shapes[static_cast<size_t>(step.out)];
  const bool has_images = !step.images.empty();
  const T* const x = has_images ? arena_.data() + step.scratch.offset : at(step.in[0]);
  if (has_images && step.groups == 1)
    each_of(team, net.shapes[static_cast<size_t>(step.in[0])].c, step.scratch.positions(), [&](int64_t c, int) {
      copy_images(net, step, c, arena_.data() + step.scratch.offset + c * step.scratch.channel_stride);
    });
  if (step.is_vector) return run_vector(net, step, x, team);
  // Tiles write every position up to the last of the image, between its rows too; what lies around is cleared here.
  const int64_t positions = (shape.h - 1) * out.row_stride + shape.w * samples_;
  if (!step.shares && is_padded(net, step.out)) {
    for (int64_t c = 0; c < shape.c; ++c) {
      T* const data = at(step.out, c);
      clear(data - out.lead, out.lead);
      clear(data + positions, out.channel_stride - out.lead - positions);
    }
  }
  if (step.groups > 1) return run_groups(net, step, positions, team);
  run_tiles(net, step, x, positions, team);
}

// Group by group, each with the images of its own channels only.
template <typename T>
void Layers<T>::run_groups(const Net& net, const Step<T>& step, int64_t positions, Team& team) {
  const int64_t channels = net.shapes[static_cast<size_t>(step.in[0])].c / step.groups,
                rows = step.num_rows / step.groups;
  const int64_t lanes = kernels_of(net).lanes, vectors = divide_up(positions, lanes);
  each_of(team, step.groups, channels * step.scratch.positions(), [&](int64_t group, int worker) {
    T* const images = scratch_[static_cast<size_t>(worker)].data();
    for (int64_t c = 0; c < channels; ++c)
      copy_images(net, step, group * channels + c, images + c * step.scratch.channel_stride);
    for (int64_t begin = 0; begin < vectors; begin += step.max_vectors) {
      Tile<T> tile = tile_of(net, step, images, begin * lanes);
      tile.first_row = static_cast<int32_t>(group * rows);
      tile.last_row = static_cast<int32_t>((group + 1) * rows);
      kernels_of(net).sparse(tile, step.entries.data(), step.starts.data(),
                             static_cast<int>(std::min(step.max_vectors, vectors - begin)));
    }
  });
}

// A tile at a position of all that is done together, all rows in one block.
template <typename T>
Tile<T> Layers<T>::tile_of(const Net& net, const Step<T>& step, const T* x, int64_t position) {
  const float per_unit = 1.0f / unit_of(net, step.out);
  Tile<T> tile{};
  tile.x = x + position;
  tile.out = at(step.out) + position;
  tile.row_stride = layouts_[static_cast<size_t>(step.out)].channel_stride;
  tile.epilogue.bias = step.bias.empty() ? nullptr : step.bias.data();
  tile.epilogue.residual = step.residual < 0 ? nullptr : at(step.residual) + position;
  tile.epilogue.num_doublings = step.num_doublings;
  tile.epilogue.scales_residual = step.scales_residual;
  tile.epilogue.residual_factor = step.residual_factor;
  tile.epilogue.mask = step.mask == nullptr ? nullptr : step.mask + position;
  tile.epilogue.act = step.act;
  tile.epilogue.low = number_of<T>(step.low, per_unit);
  tile.epilogue.high = number_of<T>(step.high, per_unit);
  tile.is_first = tile.is_last = true;
  return tile;
}

// First down the rows, a whole line at a time, then along the line at every place, of which every stride-th counts.
// Lines are of numbers, or, of int16 that are added up, of floats.
template <typename T>
template <typename Line>
void Layers<T>::pool(const Net& net, const Step<T>& step, int64_t channel, Line* scratch) {
  constexpr bool kIsSame = std::is_same_v<Line, T>;
  const Attributes& a = net.nodes[step.node].attributes;
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const Layout& out = layouts_[static_cast<size_t>(step.out)];
  const NetKernels<Line>& kernels = kernels_of<Line>(net);
  const bool is_max = step.op == POMONA_MAX_POOL, counts_padding = a.count_padding;
  const int64_t stride = a.stride[1];
  const PoolLine shape(a, x, y);
  const int64_t width = shape.width * samples_, places = shape.places * samples_, there = x.w * samples_;
  // In whole vectors: what is read beyond a row ends in the right border, which is then made anew.
  const auto whole = [&](int64_t num) { return divide_up(num, kernels.lanes) * kernels.lanes; };
  const Line border = is_max ? least<Line>() : Line{0};
  Line* const line = scratch;
  Line* const row = line + shape.left * samples_;
  Line* const along = line + width + kMaxLanes<Line>;
  Line* const picked = along + places + kMaxLanes<Line>;
  Line* const next = picked + places + y.w * samples_ + kMaxLanes<Line>;
  Line* const result = next + there + kMaxLanes<Line>;
  const auto join = [&](const Line* from, Line* to, int64_t num) {
    if (is_max) kernels.maximum(from, to, num);
    else kernels.add(from, to, to, num, Units{});
  };
  std::fill(line, row, border);
  for (int64_t i = 0; i < y.h; ++i) {
    const int64_t top = i * a.stride[0] - a.padding[0], bottom = top + a.kernel[0];
    const int64_t first = std::max<int64_t>(0, top), last = std::min(x.h, bottom);
    const auto line_at = [&](int64_t k) -> const Line* {
      const T* const from = at(step.in[0], channel) + k * in.row_stride;
      if constexpr (kIsSame) return from;
      else return kernels_of(net).read(from, 1.0f, next, there), next;
    };
    kernels.copy(line_at(first), row, there);
    for (int64_t k = first + 1; k < last; ++k) join(line_at(k), row, whole(there));
    std::fill(row + there, line + width, border);
    kernels.copy(line, along, places);
    for (int64_t k = 1; k < shape.columns; ++k) join(line + k * samples_, along, whole(places));
    T* const there_to = at(step.out, channel) + i * out.row_stride;
    Line* to = result;
    if constexpr (kIsSame) to = there_to;
    if (stride == 1) {
      copy(along, to, y.w * samples_);
    } else if (stride == 2 && samples_ == 1) {
      kernels.every_second(along, picked, y.w);
      copy(picked, to, y.w);
    } else {
      for (int64_t j = 0; j < y.w; ++j) copy(along + stride * j * samples_, to + j * samples_, samples_);
    }
    if (is_max) continue;
    const int64_t rows = counts_padding ? std::min(x.h + a.padding[0], bottom) - top : last - first;
    for (int64_t j = 0; j < y.w; ++j) {
      const int64_t begin = j * stride - a.padding[1], end = begin + a.kernel[1];
      const int64_t columns =
          counts_padding ? std::min(x.w + a.padding[1], end) - begin : std::min(x.w, end) - std::max<int64_t>(0, begin);
      const float factor = 1.0f / static_cast<float>(rows * columns);
      for (int64_t sample = 0; sample < samples_; ++sample) to[j * samples_ + sample] *= factor;
    }
    if constexpr (!kIsSame) kernels_of(net).write(result, step.units.a * step.units.per_out, there_to, y.w * samples_);
  }
  clear_border(net, step.out, channel);
}

// The mean over the places of many samples.
template <typename T>
void Layers<T>::mean(const Net& net, const Step<T>& step, int64_t channel, int worker) {
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const NetKernels<float>& kernels = net.kernels->float32;
  const float factor = 1.0f / static_cast<float>(x.h * x.w);
  const T* const from = at(step.in[0], channel);
  T* const to = at(step.out, channel);
  if (samples_ == 1) {  // what lies between the rows is zero
    const float sum = kernels_of(net).sum(from, (x.h - 1) * in.row_stride + x.w);
    to[0] = number_of<T>(sum * factor, step.units.a * step.units.per_out);
    return;
  }
  float* const sums = float_scratch_[static_cast<size_t>(worker)].data();
  float* const place = sums + samples_;
  clear(sums, samples_);
  for (int64_t row = 0; row < x.h; ++row)
    for (int64_t column = 0; column < x.w; ++column) {
      kernels_of(net).read(from + row * in.row_stride + column * samples_, 1.0f, place, samples_);
      kernels.add(place, sums, sums, samples_, Units{});
    }
  kernels.scale(sums, factor, 0.0f, sums, samples_, Units{});
  kernels_of(net).write(sums, step.units.a * step.units.per_out, to, samples_);
}

template <typename T>
void Layers<T>::run_step(const Net& net, const Step<T>& step, Team& team) {
  const NetKernels<T>& kernels = kernels_of(net);
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const Layout& out = layouts_[static_cast<size_t>(step.out)];
  const int64_t width = y.w * samples_, positions = (y.h - 1) * out.row_stride + width;
  const auto channels = [&](auto&& f) {
    each_of(team, y.c, positions, [&](int64_t c, int) {
      f(c);
      if (!step.shares) clear_border(net, step.out, c);
    });
  };
  // Line by line, where an operation would make something else of the zeros between.
  const auto lines = [&](auto&& f) {
    channels([&](int64_t c) {
      for (int64_t row = 0; row < y.h; ++row) f(c, row * in.row_stride, row * out.row_stride);
    });
  };
  switch (step.op) {
    case POMONA_CONV:
    case POMONA_LINEAR: return run_layer(net, step, team);
    case POMONA_ADD:
      return channels([&](int64_t c) {
        kernels.add(at(step.in[0], c), at(step.in[1], c), at(step.out, c), positions, step.units);
      });
    case POMONA_MUL:
      if (net.shapes[static_cast<size_t>(step.in[1])] == x)
        return channels([&](int64_t c) {
          kernels.multiply(at(step.in[0], c), at(step.in[1], c), at(step.out, c), positions, step.units);
        });
      if (samples_ == 1)
        return channels([&](int64_t c) {
          const float factor = value_of(*at(step.in[1], c), step.units.b);
          kernels.scale(at(step.in[0], c), factor, 0.0f, at(step.out, c), positions, step.units);
        });
      return lines([&](int64_t c, int64_t from, int64_t to) {
        for (int64_t column = 0; column < width; column += samples_)
          kernels.multiply(at(step.in[0], c) + from + column, at(step.in[1], c), at(step.out, c) + to + column,
                           samples_, step.units);
      });
    case POMONA_SCALE: {
      const float *factor = net.weight(net.nodes[step.node])->values.data(), *shift = net.bias(net.nodes[step.node]);
      return lines([&](int64_t c, int64_t from, int64_t to) {
        kernels.scale(at(step.in[0], c) + from, factor[c], shift == nullptr ? 0.0f : shift[c], at(step.out, c) + to,
                      width, step.units);
      });
    }
    case POMONA_MAX_POOL:
    case POMONA_AVG_POOL:
      return each_of(team, y.c, x.h * x.w * samples_, [&](int64_t c, int worker) {
        if (step.op == POMONA_MAX_POOL) pool<T>(net, step, c, scratch_[static_cast<size_t>(worker)].data());
        else pool<float>(net, step, c, float_scratch_[static_cast<size_t>(worker)].data());
      });
    case POMONA_MEAN:
      return each_of(team, y.c, x.h * x.w * samples_, [&](int64_t c, int worker) {
        mean(net, step, c, worker);
        clear_border(net, step.out, c);
      });
    case POMONA_UPSAMPLE: {
      const int32_t* const times = net.nodes[step.node].attributes.stride;
      return channels([&](int64_t c) {
        for (int64_t row = 0; row < y.h; ++row) {
          T* const to = at(step.out, c) + row * out.row_stride;
          if (row % times[0] != 0) {
            copy(to - out.row_stride, to, width);
            continue;
          }
          const T* const from = at(step.in[0], c) + row / times[0] * in.row_stride;
          for (int64_t column = 0, next = 0; column < x.w; ++column)
            for (int32_t i = 0; i < times[1]; ++i, next += samples_) {
              if (samples_ == 1) to[next] = from[column];
              else copy(from + column * samples_, to + next, samples_);
            }
        }
      });
    }
    case POMONA_FLATTEN:
      return each_of(team, x.c, x.h * x.w * samples_, [&](int64_t c, int) {
        for (int64_t row = 0; row < x.h; ++row) {
          const T* const from = at(step.in[0], c) + row * in.row_stride;
          const int64_t first = (c * x.h + row) * x.w;
          if (out.channel_stride == samples_) {
            copy(from, at(step.out, first), x.w * samples_);
            continue;
          }
          for (int64_t column = 0; column < x.w; ++column) {
            copy(from + column * samples_, at(step.out, first + column), samples_);
            clear_border(net, step.out, first + column);
          }
        }
      });
    case POMONA_CONCAT: {
      int64_t first = 0;
      for (const int32_t value : step.in) {
        const int64_t num = net.shapes[static_cast<size_t>(value)].c;
        Units units = step.units;
        units.a = unit_of(net, value);
        // Values of one height and width are laid out alike, zeros included.
        each_of(team, num, out.channel_stride, [&](int64_t c, int) {
          const T* const from = at(value, c) - out.lead;
          T* const to = at(step.out, first + c) - out.lead;
          if (units.a == unit_of(net, step.out)) copy(from, to, out.channel_stride);
          else kernels.scale(from, 1.0f, 0.0f, to, out.channel_stride, units);
        });
        first += num;
      }
      return;
    }
    default:  // elementwise
      if (out.channel_stride == positions && in.channel_stride == positions && team.size() == 1)
        return kernels.unary(step.op, at(step.in[0]), at(step.out), y.c * positions, step.low, step.high, step.units);
      if (keeps_zero(step.op, step.low, step.high))
        return channels([&](int64_t c) {
          kernels.unary(step.op, at(step.in[0], c), at(step.out, c), positions, step.low, step.high, step.units);
        });
      return lines([&](int64_t c, int64_t from, int64_t to) {
        kernels.unary(step.op, at(step.in[0], c) + from, at(step.out, c) + to, width, step.low, step.high, step.units);
      });
  }
}

template <typename T>
void Layers<T>::prepare(int num_threads) {
  const size_t threads = static_cast<size_t>(std::max(1, std::min(num_threads, kMaxThreads)));
  const auto make_room = [&](auto* all, int64_t size) {
    if (all->size() < threads) all->resize(threads);
    for (size_t i = 0; i < threads; ++i)
      if ((*all)[i].size() < size) (*all)[i].resize(size);
  };
  make_room(&scratch_, scratch_numbers_);
  make_room(&float_scratch_, scratch_floats_);
}

template <typename T>
void Layers<T>::run(Net& net, int64_t n, const float* const* inputs, float* const* outputs, Team& team) {
  for (size_t i = 0; i < inputs_.size(); ++i) copy_in(net, inputs_[i], inputs[i], n, team);
  for (const Step<T>& step : steps_) {
    const double begin = net.profile ? now() : 0.0;
    run_step(net, step, team);
    if (net.profile) net.seconds[step.node] += now() - begin;
  }
  for (size_t i = 0; i < outputs_.size(); ++i) copy_out(net, outputs_[i], outputs[i], n, team);
}

template class Layers<float>;
template class Layers<int16_t>;

}  // namespace pomona
