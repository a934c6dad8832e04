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

constexpr int64_t kPartialFloats = 1 << 15;  // of sums between blocks of columns
constexpr int64_t kTasksEach = 3;            // for every thread, where there is enough to do

double now() {
#if defined(POMONA_NO_THREADS)
  return 0.0;
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

void clear(float* from, int64_t n) {
  if (n > 0) std::memset(from, 0, static_cast<size_t>(n) * sizeof(float));
}

void copy(const float* from, float* to, int64_t n) { std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float)); }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row with its borders, as wide as a pool reads it.
struct PoolLine {
  int64_t places, width;  // where windows may begin, one by one; numbers
  int64_t left, columns;  // border before the input, and columns of the kernel, both without those in the border at all places

  PoolLine(const pomona_node& a, const Shape& x, const Shape& y) {
    places = (y.w - 1) * a.stride[1] + 1;
    left = std::min<int64_t>(a.padding[1], places - 1);
    const int64_t skipped = a.padding[1] - left;
    columns = std::min(a.kernel[1] - skipped, left + x.w);
    width = std::max(left + x.w, places + columns - 1);
  }
};

}  // namespace

int64_t Plan::scratch_floats(const Net& net, const Step& step) const {
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  if (step.op == POMONA_MAX_POOL || step.op == POMONA_AVG_POOL) {
    const PoolLine line(net.nodes[step.node].attributes, x, y);
    return line.width + 2 * line.places + 2 * y.w + 5 * kMaxLanes;
  }
  if (step.groups > 1) return x.c / step.groups * step.scratch.channel_stride + kMaxTile;
  if (step.panel_width == 0) return 0;
  const int64_t partial = step.blocks.size() > 1 ? kPartialFloats + kDenseRows * kMaxTile : 0;
  return step.blocks[0].num_channels * step.panel_width + kMaxLanes + partial;
}

// Zeros between the rows, between the samples, and around.
void Plan::clear_border(const Net& net, int32_t value, int64_t channel, int64_t n) {
  const Layout& l = layouts_[static_cast<size_t>(value)];
  const Shape& s = net.shapes[static_cast<size_t>(value)];
  if (!l.is_padded(s)) return;
  float* const data = at(value, channel);
  clear(data - l.lead, l.lead);
  for (int64_t sample = 0; sample < n; ++sample) {
    float* const image = data + sample * l.sample_stride();
    if (l.row_stride > s.w)
      for (int64_t y = 0; y < s.h; ++y) clear(image + y * l.row_stride + s.w, l.row_stride - s.w);
    clear(image + s.h * l.row_stride, (l.rows - s.h) * l.row_stride);
  }
  clear(data + n * l.sample_stride(), l.channel_stride - l.lead - n * l.sample_stride());
}

void Plan::copy_in(const Net& net, size_t input, const float* from, int64_t n, Team& team) {
  const Shape& s = net.shapes[input];
  const Layout& l = layouts_[input];
  const int32_t value = static_cast<int32_t>(input);
  if (s.rank == 3) {
    team.each(s.c, [&](int64_t c, int) {
      for (int64_t sample = 0; sample < n; ++sample)
        for (int64_t y = 0; y < s.h; ++y)
          copy(from + ((sample * s.c + c) * s.h + y) * s.w, at(value, c) + sample * l.sample_stride() + y * l.row_stride, s.w);
      clear_border(net, value, c, n);
    });
    return;
  }
  // (sample, position, feature) -> (feature, sample, position), in squares
  constexpr int64_t kSquare = 32;
  team.each(divide_up(s.c, kSquare), [&](int64_t square, int) {
    const int64_t first = square * kSquare, last = std::min(s.c, first + kSquare);
    for (int64_t sample = 0; sample < n; ++sample)
      for (int64_t p0 = 0; p0 < s.w; p0 += kSquare)
        for (int64_t c = first; c < last; ++c) {
          float* const to = at(value, c) + sample * l.sample_stride();
          for (int64_t p = p0; p < std::min(s.w, p0 + kSquare); ++p) to[p] = from[(sample * s.w + p) * s.c + c];
        }
    for (int64_t c = first; c < last; ++c) clear_border(net, value, c, n);
  });
}

void Plan::copy_out(const Net& net, int32_t value, float* to, int64_t n, Team& team) {
  const Shape& s = net.shapes[static_cast<size_t>(value)];
  const Layout& l = layouts_[static_cast<size_t>(value)];
  if (s.rank == 3) {
    team.each(s.c, [&](int64_t c, int) {
      for (int64_t sample = 0; sample < n; ++sample)
        for (int64_t y = 0; y < s.h; ++y)
          copy(at(value, c) + sample * l.sample_stride() + y * l.row_stride, to + ((sample * s.c + c) * s.h + y) * s.w, s.w);
    });
    return;
  }
  constexpr int64_t kSquare = 32;
  team.each(n * divide_up(s.w, kSquare), [&](int64_t task, int) {
    const int64_t sample = task / divide_up(s.w, kSquare), p0 = task % divide_up(s.w, kSquare) * kSquare;
    for (int64_t c0 = 0; c0 < s.c; c0 += kSquare)
      for (int64_t p = p0; p < std::min(s.w, p0 + kSquare); ++p)
        for (int64_t c = c0; c < std::min(s.c, c0 + kSquare); ++c)
          to[(sample * s.w + p) * s.c + c] = at(value, c)[sample * l.sample_stride() + p];
  });
}

// The images of one channel of one sample.
void Plan::copy_images(const Net& net, const Step& step, int64_t sample, int64_t channel, float* to) {
  const pomona_node& a = net.nodes[step.node].attributes;
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const int64_t width = step.scratch.row_stride, stride = a.stride[1];
  const float* const from = at(step.in[0], channel) + sample * in.sample_stride();
  for (const Step::Image& image : step.images) {
    // Columns first_column + stride * i of the input, where it has them.
    const int64_t begin = image.first_column < 0 ? std::min(width, divide_up(-image.first_column, stride)) : 0;
    const int64_t there = x.w - 1 - image.first_column;
    const int64_t end = there < 0 ? begin : std::max(begin, std::min(width, there / stride + 1));
    for (int64_t y = 0; y < step.image_rows; ++y, to += width) {
      const int64_t row = image.first_row + y * a.stride[0];
      if (row < 0 || row >= x.h) {
        clear(to, width);
        continue;
      }
      const float* const line = from + row * in.row_stride + image.first_column + stride * begin;
      clear(to, begin);
      if (stride == 1) copy(line, to + begin, end - begin);
      else if (stride == 2) net.kernels->every_second(line, to + begin, end - begin);
      else
        for (int64_t i = begin; i < end; ++i) to[i] = line[stride * (i - begin)];
      clear(to + end, width - end);
    }
  }
}

// Positions [first, first + positions) of all rows of a layer; x is what lies at the first of them in channel 0.
void Plan::run_tiles(const Net& net, const Step& step, const float* x, int64_t first, int64_t positions, Team& team) {
  const NetKernels& kernels = *net.kernels;
  const int64_t lanes = kernels.lanes, vectors = divide_up(positions, lanes);
  const int64_t num_tiles = divide_up(vectors, step.max_vectors);
  const int64_t channel_stride = step.images.empty() ? layouts_[static_cast<size_t>(step.in[0])].channel_stride : step.scratch.channel_stride;
  int64_t num_chunks = std::min(divide_up(kTasksEach * (team.size() > 1 ? team.size() : 0), num_tiles), divide_up(step.num_rows, 16));
  num_chunks = std::max<int64_t>(num_chunks, 1);
  if (step.blocks.size() > 1) num_chunks = std::max(num_chunks, divide_up(step.num_rows * step.max_vectors * lanes, kPartialFloats));
  const int64_t rows_each = divide_up(divide_up(step.num_rows, num_chunks), kDenseRows) * kDenseRows;
  num_chunks = divide_up(step.num_rows, rows_each);
  const size_t width = static_cast<size_t>(step.num_rows + 1);
  team.each(num_tiles * num_chunks, [&](int64_t task, int worker) {
    const int64_t index = task / num_chunks, chunk = task % num_chunks;
    const int64_t begin = vectors * index / num_tiles, end = vectors * (index + 1) / num_tiles;
    const int num = static_cast<int>(end - begin);
    const int64_t position = begin * lanes;
    Tile tile = tile_of(step, x, first, position);
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
    const int64_t panel_floats = step.blocks[0].num_channels * step.panel_width + kMaxLanes;
    float* const panel = scratch_[static_cast<size_t>(worker)].data();
    if (step.blocks.size() > 1) {
      tile.partial = panel + panel_floats;
      tile.partial_stride = num * lanes;
    }
    const float* const from = x + position;
    const int64_t unused = (step.panel_vectors - num) * lanes;
    for (size_t b = 0; b < step.blocks.size(); ++b) {
      const Block& block = step.blocks[b];
      for (int64_t c = 0; c < block.num_channels; ++c)
        for (const Step::Piece& piece : step.pieces)
          kernels.copy(from + (block.first_channel + c) * channel_stride + piece.from, panel + c * step.panel_width + piece.to,
                       piece.length - unused);
      tile.x = panel;
      tile.is_first = b == 0;
      tile.is_last = b + 1 == step.blocks.size();
      kernels.sparse(tile, step.entries.data(), step.starts.data() + b * width, num);
    }
  });
}

void Plan::run_layer(const Net& net, const Step& step, int64_t n, Team& team) {
  const Layout& out = layouts_[static_cast<size_t>(step.out)];
  const Shape& shape = net.shapes[static_cast<size_t>(step.out)];
  const float* const x = step.images.empty() ? at(step.in[0]) : arena_.data() + step.scratch.offset;
  const auto copy_all = [&](int64_t sample) {
    team.each(net.shapes[static_cast<size_t>(step.in[0])].c, [&](int64_t c, int) {
      copy_images(net, step, sample, c, arena_.data() + step.scratch.offset + c * step.scratch.channel_stride);
    });
  };
  if (step.is_vector) {
    if (!step.images.empty()) copy_all(0);
    const int64_t num_chunks = team.size() == 1 ? 1 : std::min<int64_t>(team.size() * kTasksEach, divide_up(step.num_rows, 64));
    const int64_t rows_each = divide_up(step.num_rows, num_chunks);
    team.each(num_chunks, [&](int64_t chunk, int) {
      Tile tile = tile_of(step, x, 0, 0);
      tile.first_row = static_cast<int32_t>(std::min(step.num_rows, chunk * rows_each));
      tile.last_row = static_cast<int32_t>(std::min(step.num_rows, (chunk + 1) * rows_each));
      if (step.is_dense) net.kernels->dense_vector(tile, step.values.data(), static_cast<int64_t>(step.offsets.size()));
      else net.kernels->sparse_vector(tile, step.entries.data(), step.starts.data());
    });
    return;
  }
  // Tiles write every position of an image and between its rows; what lies around is cleared here.
  const int64_t image = (shape.h - 1) * out.row_stride + shape.w;  // positions, up to the last one
  if (!step.shares && out.is_padded(shape)) {
    for (int64_t c = 0; c < shape.c; ++c) {
      float* const data = at(step.out, c);
      clear(data - out.lead, out.lead);
      const int64_t end = (n - 1) * out.sample_stride() + image;
      clear(data + end, out.channel_stride - out.lead - end);
      if (!step.images.empty())
        for (int64_t sample = 0; sample + 1 < n; ++sample)
          clear(data + sample * out.sample_stride() + image, out.sample_stride() - image);
    }
  }
  if (step.images.empty()) return run_tiles(net, step, x, 0, (n - 1) * out.sample_stride() + image, team);
  for (int64_t sample = 0; sample < n; ++sample) {
    if (step.groups > 1) {
      run_groups(net, step, sample, image, team);
      continue;
    }
    copy_all(sample);
    run_tiles(net, step, x, sample * out.sample_stride(), image, team);
  }
}

// Group by group, each with the images of its own channels only.
void Plan::run_groups(const Net& net, const Step& step, int64_t sample, int64_t positions, Team& team) {
  const int64_t channels = net.shapes[static_cast<size_t>(step.in[0])].c / step.groups, rows = step.num_rows / step.groups;
  const int64_t lanes = net.kernels->lanes, vectors = divide_up(positions, lanes), first = sample * layouts_[static_cast<size_t>(step.out)].sample_stride();
  team.each(step.groups, [&](int64_t group, int worker) {
    float* const images = scratch_[static_cast<size_t>(worker)].data();
    for (int64_t c = 0; c < channels; ++c) copy_images(net, step, sample, group * channels + c, images + c * step.scratch.channel_stride);
    for (int64_t begin = 0; begin < vectors; begin += step.max_vectors) {
      Tile tile = tile_of(step, images, first, begin * lanes);
      tile.first_row = static_cast<int32_t>(group * rows);
      tile.last_row = static_cast<int32_t>((group + 1) * rows);
      net.kernels->sparse(tile, step.entries.data(), step.starts.data(), static_cast<int>(std::min(step.max_vectors, vectors - begin)));
    }
  });
}

// A tile at a position of all that is done together, all rows in one block.
Tile Plan::tile_of(const Step& step, const float* x, int64_t first, int64_t position) {
  Tile tile{};
  tile.x = x + position;
  tile.out = at(step.out) + first + position;
  tile.row_stride = layouts_[static_cast<size_t>(step.out)].channel_stride;
  tile.epilogue.bias = step.bias;
  tile.epilogue.residual = step.residual < 0 ? nullptr : at(step.residual) + first + position;
  tile.epilogue.mask = step.mask == nullptr ? nullptr : step.mask + first + position;
  tile.epilogue.act = step.act;
  tile.epilogue.low = step.low;
  tile.epilogue.high = step.high;
  tile.is_first = tile.is_last = true;
  return tile;
}

// First down the rows, a whole line at a time, then along the line at every place, of which every stride-th counts.
void Plan::pool(const Net& net, const Step& step, int64_t channel, int64_t n, float* scratch) {
  const pomona_node& a = net.nodes[step.node].attributes;
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const Layout& out = layouts_[static_cast<size_t>(step.out)];
  const NetKernels& kernels = *net.kernels;
  const bool is_max = step.op == POMONA_MAX_POOL, counts_padding = (a.flags & POMONA_COUNT_PADDING) != 0;
  const int64_t stride = a.stride[1];
  const auto [places, width, left, columns] = PoolLine(a, x, y);
  // In whole vectors: what is read beyond a row ends in the right border, which is then made anew.
  const auto whole = [&](int64_t num) { return divide_up(num, kernels.lanes) * kernels.lanes; };
  const float border = is_max ? -std::numeric_limits<float>::infinity() : 0.0f;
  float* const line = scratch;
  float* const along = line + width + kMaxLanes;
  float* const picked = along + 2 * (places + kMaxLanes);
  float* const inverse = picked + y.w + kMaxLanes;
  std::fill(line, line + left, border);
  // How many columns of each window count.
  for (int64_t j = 0; j < y.w; ++j) {
    const int64_t begin = j * stride - a.padding[1], end = begin + a.kernel[1];
    const int64_t num = counts_padding ? std::min(x.w + a.padding[1], end) - begin : std::min(x.w, end) - std::max<int64_t>(0, begin);
    inverse[j] = 1.0f / static_cast<float>(num);
  }
  for (int64_t sample = 0; sample < n; ++sample) {
    const float* const from = at(step.in[0], channel) + sample * in.sample_stride();
    float* const to = at(step.out, channel) + sample * out.sample_stride();
    for (int64_t i = 0; i < y.h; ++i) {
      const int64_t top = i * a.stride[0] - a.padding[0], bottom = top + a.kernel[0];
      const int64_t first = std::max<int64_t>(0, top), last = std::min(x.h, bottom);
      kernels.copy(from + first * in.row_stride, line + left, x.w);
      for (int64_t row = first + 1; row < last; ++row) {
        if (is_max) kernels.maximum(from + row * in.row_stride, line + left, whole(x.w));
        else kernels.add(from + row * in.row_stride, line + left, line + left, whole(x.w));
      }
      std::fill(line + left + x.w, line + width, border);
      kernels.copy(line, along, places);
      for (int64_t k = 1; k < columns; ++k) {
        if (is_max) kernels.maximum(line + k, along, whole(places));
        else kernels.add(line + k, along, along, whole(places));
      }
      float* const result = to + i * out.row_stride;
      if (stride == 2) kernels.every_second(along, picked, y.w);
      if (stride <= 2) copy(stride == 1 ? along : picked, result, y.w);
      else
        for (int64_t j = 0; j < y.w; ++j) result[j] = along[stride * j];
      if (!is_max) {
        const int64_t rows = counts_padding ? std::min(x.h + a.padding[0], bottom) - top : last - first;
        const float factor = 1.0f / static_cast<float>(rows);
        for (int64_t j = 0; j < y.w; ++j) result[j] *= factor * inverse[j];
      }
    }
  }
  clear_border(net, step.out, channel, n);
}

void Plan::run_step(const Net& net, const Step& step, int64_t n, Team& team) {
  const NetKernels& kernels = *net.kernels;
  const Shape& x = net.shapes[static_cast<size_t>(step.in[0])];
  const Shape& y = net.shapes[static_cast<size_t>(step.out)];
  const Layout& in = layouts_[static_cast<size_t>(step.in[0])];
  const Layout& out = layouts_[static_cast<size_t>(step.out)];
  // Calls f(channel, from, to, positions) for lines of the same length in operand and result.
  const auto lines = [&](auto&& f) {
    team.each(y.c, [&](int64_t c, int) {
      for (int64_t sample = 0; sample < n; ++sample)
        for (int64_t row = 0; row < y.h; ++row)
          f(c, sample * in.sample_stride() + row * in.row_stride, sample * out.sample_stride() + row * out.row_stride);
      if (!step.shares) clear_border(net, step.out, c, n);
    });
  };
  // Of one layout and padded with zeros that an operation keeps: all positions of a channel at once.
  const auto channels = [&](auto&& f) {
    team.each(y.c, [&](int64_t c, int) { f(c); });
  };
  const int64_t whole = n * out.sample_stride();
  switch (step.op) {
    case POMONA_CONV:
    case POMONA_LINEAR: return run_layer(net, step, n, team);
    case POMONA_RELU:
    case POMONA_CLIP:
    case POMONA_GELU:
    case POMONA_GELU_TANH:
    case POMONA_SILU:
    case POMONA_SIGMOID:
    case POMONA_TANH:
    case POMONA_HARDSWISH:
    case POMONA_HARDSIGMOID:
      if (!out.is_padded(y)) {
        if (out.channel_stride == whole) return kernels.unary(step.op, at(step.in[0]), at(step.out), y.c * whole, step.low, step.high);
        return channels([&](int64_t c) { kernels.unary(step.op, at(step.in[0], c), at(step.out, c), whole, step.low, step.high); });
      }
      return lines([&](int64_t c, int64_t from, int64_t to) {
        kernels.unary(step.op, at(step.in[0], c) + from, at(step.out, c) + to, y.w, step.low, step.high);
      });
    case POMONA_ADD:
      return channels([&](int64_t c) {
        kernels.add(at(step.in[0], c), at(step.in[1], c), at(step.out, c), whole);
        if (!step.shares) clear_border(net, step.out, c, n);
      });
    case POMONA_MUL:
      if (net.shapes[static_cast<size_t>(step.in[1])] == x)
        return channels([&](int64_t c) {
          kernels.multiply(at(step.in[0], c), at(step.in[1], c), at(step.out, c), whole);
          clear_border(net, step.out, c, n);
        });
      return channels([&](int64_t c) {
        const Layout& factors = layouts_[static_cast<size_t>(step.in[1])];
        for (int64_t sample = 0; sample < n; ++sample) {
          const int64_t first = sample * out.sample_stride();
          kernels.scale(at(step.in[0], c) + first, at(step.in[1], c)[sample * factors.sample_stride()], 0.0f, at(step.out, c) + first,
                        out.sample_stride());
        }
        clear_border(net, step.out, c, n);
      });
    case POMONA_SCALE: {
      const float *factor = net.weight(net.nodes[step.node])->values.data(), *shift = net.bias(net.nodes[step.node]);
      return lines([&](int64_t c, int64_t from, int64_t to) {
        kernels.scale(at(step.in[0], c) + from, factor[c], shift == nullptr ? 0.0f : shift[c], at(step.out, c) + to, y.w);
      });
    }
    case POMONA_MAX_POOL:
    case POMONA_AVG_POOL:
      return team.each(y.c, [&](int64_t c, int worker) { pool(net, step, c, n, scratch_[static_cast<size_t>(worker)].data()); });
    case POMONA_MEAN:
      return channels([&](int64_t c) {
        for (int64_t sample = 0; sample < n; ++sample) {
          // What lies between the rows is zero.
          const float sum = kernels.sum(at(step.in[0], c) + sample * in.sample_stride(), (x.h - 1) * in.row_stride + x.w);
          at(step.out, c)[sample * out.sample_stride()] = sum / static_cast<float>(x.h * x.w);
        }
        clear_border(net, step.out, c, n);
      });
    case POMONA_FLATTEN:
      return team.each(x.c, [&](int64_t c, int) {
        for (int64_t row = 0; row < x.h; ++row) {
          const float* const from = at(step.in[0], c) + row * in.row_stride;
          float* const to = at(step.out, (c * x.h + row) * x.w);
          if (n == 1 && out.channel_stride == 1) {
            copy(from, to, x.w);
            continue;
          }
          for (int64_t column = 0; column < x.w; ++column)
            for (int64_t sample = 0; sample < n; ++sample)
              to[column * out.channel_stride + sample * out.sample_stride()] = from[sample * in.sample_stride() + column];
          if (out.is_padded(y))
            for (int64_t column = 0; column < x.w; ++column) clear_border(net, step.out, (c * x.h + row) * x.w + column, n);
        }
      });
    case POMONA_CONCAT: {
      int64_t first = 0;
      for (const int32_t value : step.in) {
        const int64_t num = net.shapes[static_cast<size_t>(value)].c;
        // Values of one height and width are laid out alike, zeros included.
        team.each(num, [&](int64_t c, int) {
          const int64_t lead = out.lead;
          copy(at(value, c) - lead, at(step.out, first + c) - lead, out.channel_stride);
        });
        first += num;
      }
      return;
    }
    default: return;
  }
}

void Plan::run(Net& net, int64_t num_samples, const float* const* inputs, float* const* outputs, int num_threads) {
  const size_t threads = static_cast<size_t>(std::max(1, std::min(num_threads, kMaxThreads)));
  if (scratch_.size() < threads) scratch_.resize(threads);
  for (size_t i = 0; i < threads; ++i)  // here, not where an exception would end the process
    if (scratch_[i].size() < scratch_floats_) scratch_[i].resize(scratch_floats_);
  with_team(static_cast<int>(threads), [&](Team& team) {
    for (int64_t first = 0; first < num_samples; first += samples_) {
      const int64_t n = std::min(samples_, num_samples - first);
      for (size_t i = 0; i < net.inputs.size(); ++i) copy_in(net, i, inputs[i] + first * net.inputs[i].size(), n, team);
      for (const Step& step : steps_) {
        const double begin = net.profile ? now() : 0.0;
        run_step(net, step, n, team);
        if (net.profile) net.seconds[step.node] += now() - begin;
      }
      for (size_t i = 0; i < net.outputs.size(); ++i) {
        const int32_t value = net.outputs[i];
        copy_out(net, value, outputs[i] + first * net.shapes[static_cast<size_t>(value)].size(), n, team);
      }
    }
  });
}

}  // namespace pomona
