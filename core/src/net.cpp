// Networks: checks of what comes from outside, shapes, and the interface.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "guarded.h"

namespace pomona {
namespace {

constexpr int64_t kDefaultMaxBytes = int64_t{1} << 34;
constexpr int64_t kInCache = 4 << 20;    // bytes of the largest value of all samples; or
constexpr int64_t kTogether = 14 << 20;  // where what is read is used
constexpr double kIntensity = 50.0;      // times
constexpr double kFilled = 0.98;  // of the lanes that work is done in, from which one sample fills them well enough
constexpr double kMacsEach = 1 << 19;  // for which a further thread pays
constexpr size_t kNear = 12;           // nodes
constexpr int32_t kMostNodes = 1 << 20;

int copy_matrix(const pomona_tensor& from, Budget* budget, Matrix* to) {
  const int64_t size = product({from.rows, from.cols});
  if (size < 0 || from.num_values < 0 || from.num_values > size) return POMONA_BAD_SIZE;
  const bool is_dense = from.starts == nullptr;
  if (is_dense && from.num_values != size) return POMONA_BAD_SIZE;
  if (from.num_values > 0 && (from.values == nullptr || (!is_dense && from.columns == nullptr)))
    return POMONA_BAD_POINTER;
  if (!budget->take(from.num_values, is_dense ? 4 : 8)) return POMONA_BAD_SIZE;
  if (!is_dense && !budget->take(from.rows + 1, 8)) return POMONA_BAD_SIZE;
  to->rows = from.rows;
  to->cols = from.cols;
  if (!is_dense) {
    if (from.starts[0] != 0 || from.starts[from.rows] != from.num_values) return POMONA_BAD_VALUE;
    for (int64_t row = 0; row < from.rows; ++row) {
      const int64_t begin = from.starts[row], end = from.starts[row + 1];
      if (begin > end || begin < 0 || end > from.num_values) return POMONA_BAD_VALUE;
      int64_t previous = -1;
      for (int64_t i = begin; i < end; ++i) {
        if (from.columns[i] <= previous || from.columns[i] >= from.cols) return POMONA_BAD_VALUE;
        previous = from.columns[i];
      }
    }
    to->starts.assign(from.starts, from.starts + from.rows + 1);
    to->columns.assign(from.columns, from.columns + from.num_values);
  }
  to->values.assign(from.values, from.values + from.num_values);
  to->num_nonzero = std::count_if(to->values.begin(), to->values.end(), [](float x) { return x != 0.0f; });
  return POMONA_OK;
}

bool is_good(const pomona_type& type) {
  if (type.dtype != POMONA_FLOAT32 && type.dtype != POMONA_INT32 && type.dtype != POMONA_INT64) return false;
  if (type.rank < 1 || type.rank > POMONA_MAX_DIMENSIONS) return false;
  int64_t size = 1;
  for (int i = 0; i < type.rank; ++i) {
    if (type.dims[i] < 1) return false;
    size = product({size, type.dims[i]});
    if (size < 0) return false;
  }
  return true;
}

Shape shape_of(const pomona_type& type) {
  const int32_t* const dims = type.dims;
  switch (type.rank) {
    case 1: return {1, dims[0], 1, 1, 1, type.dtype};
    case 2: return {2, dims[1], 1, dims[0], 1, type.dtype};
    case 3: return {3, dims[0], dims[1], dims[2], 1, type.dtype};
    default: return {4, int64_t{dims[0]} * dims[1], dims[2], dims[3], dims[0], type.dtype};
  }
}

// Output size of a window along one axis, or -1.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  if (kernel < 1 || stride < 1 || padding < 0 || dilation < 1) return -1;
  const int64_t most = std::numeric_limits<int32_t>::max() / 4;
  if (kernel > most || stride > most || padding > most || dilation > most) return -1;
  const int64_t reach = (kernel - 1) * dilation + 1;
  const int64_t free = size + 2 * padding - reach;
  if (free < 0) return -1;
  int64_t num = (free + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (num - 1) * stride >= size + padding) --num;
  return num;
}

// Shape of what a node yields, from its operands'.
int infer(const Net& net, const Node& node, Shape* out) {
  const Attributes& a = node.attributes;
  const Traits& traits = traits_of(node.op);
  const size_t num = node.operands.size();
  const auto operand = [&](size_t i) { return net.shapes[static_cast<size_t>(node.operands[i])]; };
  if (num < static_cast<size_t>(traits.least_operands) || num > static_cast<size_t>(traits.most_operands))
    return POMONA_BAD_VALUE;
  for (size_t i = 0; i < num; ++i)
    if ((traits.takes >> operand(i).dtype & 1) == 0) return POMONA_BAD_VALUE;
  const Shape x = operand(0);
  const auto is_tensor = [&](int32_t index) { return index >= 0 && static_cast<size_t>(index) < net.matrices.size(); };
  if (traits.reads(POMONA_ATTRIBUTE_WEIGHT) && !is_tensor(a.weight)) return POMONA_BAD_VALUE;
  if (a.bias != -1 && !is_tensor(a.bias)) return POMONA_BAD_VALUE;
  const Matrix* const weight = net.weight(node);
  if (weight != nullptr && weight->rows < 1) return POMONA_BAD_VALUE;
  if (a.bias != -1) {
    const Matrix& bias = net.matrices[static_cast<size_t>(a.bias)];
    if (!bias.is_dense() || bias.cols != 1 || bias.rows != weight->rows) return POMONA_BAD_VALUE;
  }
  *out = x;
  switch (node.op) {
    case POMONA_CONV: {
      if (x.rank != 3 || a.groups < 1 || x.c % a.groups != 0 || weight->rows % a.groups != 0) return POMONA_BAD_VALUE;
      const int64_t h = windows(x.h, a.kernel[0], a.stride[0], a.padding[0], a.dilation[0], false);
      const int64_t w = windows(x.w, a.kernel[1], a.stride[1], a.padding[1], a.dilation[1], false);
      if (h < 1 || w < 1 || weight->cols != product({x.c / a.groups, a.kernel[0], a.kernel[1]}))
        return POMONA_BAD_VALUE;
      *out = {3, weight->rows, h, w};
      break;
    }
    case POMONA_LINEAR:
      if (x.rank > 2 || weight->cols != x.c) return POMONA_BAD_VALUE;
      out->c = weight->rows;
      break;
    case POMONA_SCALE:
      if (x.rank > 3 || !weight->is_dense() || weight->rows != x.c || weight->cols != 1) return POMONA_BAD_VALUE;
      break;
    case POMONA_CLIP:
      if (!(a.low <= a.high)) return POMONA_BAD_VALUE;
      break;
    case POMONA_ADD:
      if (!(operand(1) == x)) return POMONA_BAD_VALUE;
      break;
    case POMONA_MUL:
      if (!(operand(1) == x || (x.rank == 3 && operand(1) == Shape{3, x.c, 1, 1}))) return POMONA_BAD_VALUE;
      break;
    case POMONA_MAX_POOL:
    case POMONA_AVG_POOL: {
      const int64_t h = windows(x.h, a.kernel[0], a.stride[0], a.padding[0], 1, a.ceil);
      const int64_t w = windows(x.w, a.kernel[1], a.stride[1], a.padding[1], 1, a.ceil);
      if (x.rank != 3 || h < 1 || w < 1) return POMONA_BAD_VALUE;
      if (2 * a.padding[0] > a.kernel[0] || 2 * a.padding[1] > a.kernel[1]) return POMONA_BAD_VALUE;
      *out = {3, x.c, h, w};
      break;
    }
    case POMONA_MEAN:
      if (x.rank != 3) return POMONA_BAD_VALUE;
      *out = {3, x.c, 1, 1};
      break;
    case POMONA_UPSAMPLE:
      if (x.rank != 3 || a.stride[0] < 1 || a.stride[1] < 1) return POMONA_BAD_VALUE;
      *out = {3, x.c, product({x.h, a.stride[0]}), product({x.w, a.stride[1]})};
      break;
    case POMONA_FLATTEN:
      if (x.rank == 2) return POMONA_BAD_VALUE;
      *out = {1, x.size(), 1, 1};
      break;
    case POMONA_CONCAT:
      if (x.rank == 2 || x.rank > 3) return POMONA_BAD_VALUE;
      for (size_t i = 1; i < num; ++i) {
        const Shape other = operand(i);
        if (other.rank != x.rank || other.h != x.h || other.w != x.w) return POMONA_BAD_VALUE;
        out->c += other.c;
      }
      break;
    default:
      if (traits.kind != kElementwise) return POMONA_BAD_VALUE;
  }
  return product({out->c, out->h, out->w}) < 0 ? POMONA_BAD_SIZE : POMONA_OK;
}

int64_t bytes_each(const Net& net) { return net.units.empty() ? sizeof(float) : sizeof(int16_t); }

// Units of int16: so large that the range fits, and those of what is added to it or taken over; see pomona_net.h.
int find_units(const float* ranges, Net* net) {
  constexpr float kSteps = 32767.0f, kLeast = 1e-18f, kMost = 1e18f;  // so that quotients of units are numbers
  for (size_t value = 0; value < net->shapes.size(); ++value) {
    const float range = ranges[value];
    if (!(range >= 0.0f && range <= kMost)) return POMONA_BAD_VALUE;
    float unit = std::max(range * POMONA_HEADROOM / kSteps, kLeast);
    if (value >= net->inputs.size()) {
      const Node& node = net->nodes[value - net->inputs.size()];
      const auto of = [&](size_t i) { return net->units[static_cast<size_t>(node.operands[i])]; };
      switch (traits_of(node.op).unit) {
        case kOwn: break;
        case kOperand: unit = of(0); break;
        case kLargest:
          for (size_t i = 0; i < node.operands.size(); ++i) unit = std::max(unit, of(i));
      }
    }
    net->units.push_back(std::min(unit, kMost));
  }
  return POMONA_OK;
}

int build(const pomona_graph& graph, const pomona_net_options* options, Net* net, int32_t* bad_node) {
  if (options != nullptr) net->options = *options;
  if (net->options.max_bytes < 0 || net->options.micro_batch < 0 || net->options.dense < 0 || net->options.dense > 2 ||
      (net->options.ranges == nullptr && net->options.num_ranges != 0))
    return POMONA_BAD_VALUE;
  if (net->options.max_bytes == 0) net->options.max_bytes = kDefaultMaxBytes;
  for (const int32_t num :
       {graph.num_inputs, graph.num_nodes, graph.num_operands, graph.num_attributes, graph.num_tensors,
        graph.num_outputs})
    if (num < 0 || num > kMostNodes) return POMONA_BAD_SIZE;
  if (graph.num_inputs < 1 || graph.num_outputs < 1) return POMONA_BAD_VALUE;
  if (graph.inputs == nullptr || graph.outputs == nullptr || (graph.nodes == nullptr && graph.num_nodes > 0) ||
      (graph.operands == nullptr && graph.num_operands > 0) ||
      (graph.attributes == nullptr && graph.num_attributes > 0) || (graph.tensors == nullptr && graph.num_tensors > 0))
    return POMONA_BAD_POINTER;
  net->budget = Budget(net->options.max_bytes);
  if (!net->budget.take(int64_t{graph.num_inputs} + graph.num_nodes, 2 * sizeof(Shape)) ||
      !net->budget.take(graph.num_outputs, 4) || !net->budget.take(graph.num_tensors, sizeof(Matrix)) ||
      !net->budget.take(graph.num_nodes, sizeof(Node)))
    return POMONA_BAD_SIZE;
  for (int32_t i = 0; i < graph.num_inputs; ++i) {
    if (!is_good(graph.inputs[i])) return POMONA_BAD_VALUE;
    net->inputs.push_back(shape_of(graph.inputs[i]));
  }
  net->shapes = net->inputs;
  net->matrices.resize(static_cast<size_t>(graph.num_tensors));
  for (int32_t i = 0; i < graph.num_tensors; ++i) {
    const int error = copy_matrix(graph.tensors[i], &net->budget, &net->matrices[static_cast<size_t>(i)]);
    if (error != POMONA_OK) return error;
  }
  for (int32_t i = 0; i < graph.num_nodes; ++i) {
    *bad_node = i;
    const pomona_node& a = graph.nodes[i];
    const Traits* const traits = find_traits(a.op);
    if (traits == nullptr || a.first_operand < 0 || a.num_operands < 1 ||
        a.first_operand > graph.num_operands - a.num_operands || a.first_attribute < 0 || a.num_attributes < 0 ||
        a.first_attribute > graph.num_attributes - a.num_attributes)
      return POMONA_BAD_VALUE;
    Node node{a.op, {}, {}};
    if (!read_attributes(graph.attributes + a.first_attribute, a.num_attributes, *traits, &node.attributes))
      return POMONA_BAD_VALUE;
    if (!net->budget.take(a.num_operands, 8)) return POMONA_BAD_SIZE;
    for (int32_t k = 0; k < a.num_operands; ++k) {
      const int32_t value = graph.operands[a.first_operand + k];
      if (value < 0 || value >= net->value_of(static_cast<size_t>(i))) return POMONA_BAD_VALUE;
      node.operands.push_back(value);
    }
    Shape shape;
    const int error = infer(*net, node, &shape);
    if (error != POMONA_OK) return error;
    net->shapes.push_back(shape);
    net->nodes.push_back(std::move(node));
  }
  *bad_node = -1;
  for (int32_t i = 0; i < graph.num_outputs; ++i) {
    if (graph.outputs[i] < 0 || static_cast<size_t>(graph.outputs[i]) >= net->shapes.size() ||
        net->shapes[static_cast<size_t>(graph.outputs[i])].dtype != POMONA_FLOAT32)
      return POMONA_BAD_VALUE;
    net->outputs.push_back(graph.outputs[i]);
  }
  if (!net->budget.take(static_cast<int64_t>(net->shapes.size()), 8)) return POMONA_BAD_SIZE;
  net->output_at.assign(net->shapes.size(), -1);
  for (size_t i = net->outputs.size(); i-- > 0;)
    net->output_at[static_cast<size_t>(net->outputs[i])] = static_cast<int64_t>(i);
  net->seconds.assign(net->nodes.size(), 0.0);
  net->kernels = &net_kernels();
  if (net->options.ranges != nullptr) {
    if (static_cast<size_t>(net->options.num_ranges) != net->shapes.size()) return POMONA_BAD_VALUE;
    if (!net->budget.take(net->options.num_ranges, sizeof(float))) return POMONA_BAD_SIZE;
    const int error = find_units(net->options.ranges, net);
    if (error != POMONA_OK) return error;
    net->options.ranges = nullptr;  // the caller's
  }
  const int64_t lanes = kLine / bytes_each(*net);
  double of_features = 0.0, filled = 0.0;
  for (size_t i = 0; i < net->nodes.size(); ++i) {
    const Shape& shape = net->shapes[static_cast<size_t>(net->value_of(i))];
    const double macs = static_cast<double>(net->macs_of(net->nodes[i], shape, false));
    const int64_t positions = shape.h * shape.w, taken = shape.h == 1 ? shape.w : shape.h * (shape.w + 1);
    if (positions == 1) of_features += macs;
    filled += macs * static_cast<double>(positions) / static_cast<double>((taken + lanes - 1) / lanes * lanes);
    net->macs += macs;
    net->largest = std::max(net->largest, shape.size());
  }
  net->is_of_features = 10.0 * of_features >= net->macs;
  net->is_filled = filled > kFilled * net->macs;
  return POMONA_OK;
}

// How many of `batch` samples go through the network together.
int64_t samples_together(const Net& net, int64_t batch) {
  const int64_t side_by_side = kLine / bytes_each(net);  // a vector of the widest kind, and a cache line
  batch = std::min(batch, net.most_samples);
  if (net.options.micro_batch > 0) return std::min<int64_t>(net.options.micro_batch, batch);
  if (net.is_filled) return 1;
  // A vector is filled by the positions of one image, and better by those of many; by one sample of features it is not.
  if (!net.is_of_features && batch < side_by_side / 2) return 1;
  if (batch <= side_by_side) return net.is_of_features ? batch : std::min(side_by_side, net.most_samples);
  int64_t samples = side_by_side;
  while (samples * 2 <= batch && samples * 2 * net.largest <= kInCache / 2 / bytes_each(net)) samples *= 2;
  return samples;
}

// From where on no value of all samples has more than `most` bytes.
size_t first_within(const Net& net, int64_t samples, int64_t most) {
  size_t first = net.nodes.size();
  const int64_t numbers = most / bytes_each(net) / samples;
  while (first > 0 && net.shapes[static_cast<size_t>(net.value_of(first - 1))].size() <= numbers) --first;
  return first;
}

// From where on samples go together: where their activations stay in a cache, or in a larger one while there is enough
// to do with each. At a place near there where few values are handed over.
size_t find_split(const Net& net, int64_t samples) {
  const size_t num = net.nodes.size();
  size_t first = first_within(net, samples, kTogether);
  double macs = 0.0, numbers = 0.0;
  for (size_t i = first; i < num; ++i) {
    const Shape& shape = net.shapes[static_cast<size_t>(net.value_of(i))];
    macs += static_cast<double>(net.macs_of(net.nodes[i], shape, false));
    if (net.nodes[i].op == POMONA_CONV) numbers += static_cast<double>(shape.size());
  }
  if (macs < kIntensity * numbers) first = first_within(net, samples, kInCache);
  if (first == 0 || first == num) return first;
  std::vector<size_t> last_use(net.shapes.size(), 0);
  for (size_t i = 0; i < num; ++i)
    for (const int32_t value : net.nodes[i].operands) last_use[static_cast<size_t>(value)] = i;
  size_t best = first;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (size_t split = first; split < std::min(num, first + kNear); ++split) {
    int64_t crossing = 0;
    for (size_t value = 0; value < static_cast<size_t>(net.value_of(split)); ++value)
      if (last_use[value] >= split) crossing += net.shapes[value].size();
    if (crossing < least) least = crossing, best = split;
  }
  return best;
}

int route_for(Net* net, int64_t samples, Route** route, int32_t* bad_node) {
  const auto found = net->routes.find(samples);
  if (found != net->routes.end()) {
    *route = &found->second;
    return POMONA_OK;
  }
  Route made;
  Budget budget = net->budget;
  const size_t split = samples == 1 ? 0 : find_split(*net, samples), num = net->nodes.size();
  int error = POMONA_OK;
  if (split > 0) error = Plan::make(*net, 1, 0, split, &budget, &made.one, bad_node);
  if (error == POMONA_OK && (split < num || num == 0))
    error = Plan::make(*net, samples, split, num, &budget, &made.all, bad_node);
  if (error != POMONA_OK) return error;
  if (made.one && made.all)
    for (const int32_t value : made.all->inputs()) {
      if (value < net->value_of(0) || net->output_of(value) >= 0) continue;
      const int64_t size = net->shapes[static_cast<size_t>(value)].size();
      if (!budget.take(size, 4 * samples)) return POMONA_BAD_SIZE;
      made.between[value].resize(static_cast<size_t>(size * samples));
    }
  net->budget = budget;
  *route = &net->routes.emplace(samples, std::move(made)).first->second;
  return POMONA_OK;
}

// Samples [first, first + n) of a batch.
void run_route(Net& net, Route& route, int64_t first, int64_t n, const void* const* inputs, float* const* outputs,
               Team& team) {
  const auto to = [&](int32_t value, int64_t sample) {
    const int64_t output = net.output_of(value), size = net.shapes[static_cast<size_t>(value)].size();
    return output < 0 ? route.between[value].data() + sample * size : outputs[output] + (first + sample) * size;
  };
  const auto from = [&](int32_t value, int64_t sample) -> const float* {
    if (value >= net.value_of(0)) return to(value, sample);
    return static_cast<const float*>(inputs[value]) + (first + sample) * net.shapes[static_cast<size_t>(value)].size();
  };
  std::vector<const float*> sources;
  std::vector<float*> targets;
  const auto run = [&](Plan& plan, int64_t sample, int64_t num) {
    sources.clear();
    targets.clear();
    for (const int32_t value : plan.inputs()) sources.push_back(from(value, sample));
    for (const int32_t value : plan.outputs()) targets.push_back(to(value, sample));
    plan.run(net, num, sources.data(), targets.data(), team);
  };
  if (route.one)
    for (int64_t sample = 0; sample < n; ++sample) run(*route.one, sample, 1);
  if (route.all) run(*route.all, 0, n);
}

}  // namespace

Net::~Net() = default;

const Matrix* Net::weight(const Node& node) const {
  return node.attributes.weight < 0 ? nullptr : &matrices[static_cast<size_t>(node.attributes.weight)];
}

const float* Net::bias(const Node& node) const {
  return node.attributes.bias < 0 ? nullptr : matrices[static_cast<size_t>(node.attributes.bias)].values.data();
}

int64_t Net::macs_of(const Node& node, const Shape& out, bool with_zeros) const {
  if (traits_of(node.op).kind != kLayer) return 0;
  const Matrix& matrix = *weight(node);
  return (with_zeros ? matrix.rows * matrix.cols : matrix.num_nonzero) * out.h * out.w;
}

}  // namespace pomona

struct pomona_net {
  pomona::Net net;
};

extern "C" {

int pomona_net_new(const pomona_graph* graph, const pomona_net_options* options, pomona_net** net, int32_t* bad_node) {
  int32_t unused;
  if (bad_node == nullptr) bad_node = &unused;
  *bad_node = -1;
  if (graph == nullptr || net == nullptr) return POMONA_BAD_POINTER;
  *net = nullptr;
  return pomona::guarded([&]() -> int {
    std::unique_ptr<pomona_net> made(new pomona_net);
    int error = pomona::build(*graph, options, &made->net, bad_node);
    if (error != POMONA_OK) return error;
    pomona::Route* route;
    error = pomona::route_for(&made->net, 1, &route, bad_node);
    if (error == POMONA_OK) *net = made.release();
    return error;
  });
}

void pomona_net_free(pomona_net* net) { delete net; }

int pomona_net_type(const pomona_net* net, int32_t value, pomona_type* type) {
  if (net == nullptr || type == nullptr) return POMONA_BAD_POINTER;
  if (value < 0 || static_cast<size_t>(value) >= net->net.shapes.size()) return POMONA_BAD_VALUE;
  const pomona::Shape& s = net->net.shapes[static_cast<size_t>(value)];
  const auto narrow = [](int64_t size) { return static_cast<int32_t>(size); };
  switch (s.rank) {
    case 1: *type = {s.dtype, 1, {narrow(s.c), 1, 1, 1}}; break;
    case 2: *type = {s.dtype, 2, {narrow(s.w), narrow(s.c), 1, 1}}; break;
    case 3: *type = {s.dtype, 3, {narrow(s.c), narrow(s.h), narrow(s.w), 1}}; break;
    default: *type = {s.dtype, 4, {narrow(s.outer), narrow(s.c / s.outer), narrow(s.h), narrow(s.w)}};
  }
  return POMONA_OK;
}

int pomona_net_run(pomona_net* handle, int64_t batch, const void* const* inputs, float* const* outputs,
                   int num_threads) {
  if (handle == nullptr) return POMONA_BAD_POINTER;
  if (batch < 0 || num_threads < 1) return POMONA_BAD_VALUE;
  if (batch == 0) return POMONA_OK;
  if (inputs == nullptr || outputs == nullptr) return POMONA_BAD_POINTER;
  pomona::Net& net = handle->net;
  for (size_t i = 0; i < net.inputs.size(); ++i)
    if (inputs[i] == nullptr) return POMONA_BAD_POINTER;
  for (size_t i = 0; i < net.outputs.size(); ++i)
    if (outputs[i] == nullptr) return POMONA_BAD_POINTER;
  return pomona::guarded([&]() -> int {
    // What goes together is decided, and laid out, before anything runs.
    std::vector<std::pair<int64_t, pomona::Route*>> parts;
    for (int64_t first = 0; first < batch;) {
      const int64_t samples = pomona::samples_together(net, batch - first);
      pomona::Route* route;
      int32_t bad_node;
      const int error = pomona::route_for(&net, samples, &route, &bad_node);
      if (error == POMONA_BAD_SIZE && samples > 1) {  // one by one they fitted when the network was made
        net.most_samples = samples / 2;
        continue;
      }
      if (error != POMONA_OK) return error;
      parts.emplace_back(first, route);
      first += samples;
    }
    const double most = 1.0 + net.macs * static_cast<double>(batch) / pomona::kMacsEach;
    const int threads = static_cast<int>(std::min<double>(num_threads, most));
    for (const auto& part : parts) {
      if (part.second->one) part.second->one->prepare(threads);
      if (part.second->all) part.second->all->prepare(threads);
    }
    pomona::with_team(threads, [&](pomona::Team& team) {
      for (size_t i = 0; i < parts.size(); ++i) {
        const int64_t end = i + 1 < parts.size() ? parts[i + 1].first : batch;
        pomona::run_route(net, *parts[i].second, parts[i].first, end - parts[i].first, inputs, outputs, team);
      }
    });
    for (size_t i = 0; i < net.outputs.size(); ++i) {
      const size_t same = static_cast<size_t>(net.output_of(net.outputs[i]));
      const size_t floats = static_cast<size_t>(net.shapes[static_cast<size_t>(net.outputs[i])].size() * batch);
      if (same != i) std::memcpy(outputs[i], outputs[same], floats * sizeof(float));
    }
    return POMONA_OK;
  });
}

int pomona_net_profile(pomona_net* handle, int profile, double* seconds) {
  if (handle == nullptr || seconds == nullptr) return POMONA_BAD_POINTER;
  pomona::Net& net = handle->net;
  std::copy(net.seconds.begin(), net.seconds.end(), seconds);
  std::fill(net.seconds.begin(), net.seconds.end(), 0.0);
  net.profile = profile != 0;
  return POMONA_OK;
}

int pomona_net_about(const pomona_net* handle, pomona_net_info* info) {
  if (handle == nullptr || info == nullptr) return POMONA_BAD_POINTER;
  const pomona::Net& net = handle->net;
  *info = {};
  for (const auto& [samples, route] : net.routes) {
    for (const pomona::Plan* plan : {route.one.get(), route.all.get()}) {
      if (plan == nullptr) continue;
      info->activation_bytes += plan->activation_bytes();
      info->weight_bytes += plan->weight_bytes();
    }
    for (const auto& [value, floats] : route.between) info->activation_bytes += static_cast<int64_t>(floats.size()) * 4;
  }
  const auto add = [](int64_t* sum, int64_t more) {  // each is at most 2^62
    *sum = *sum > std::numeric_limits<int64_t>::max() - more ? std::numeric_limits<int64_t>::max() : *sum + more;
  };
  for (size_t i = 0; i < net.nodes.size(); ++i) {
    const pomona::Shape& out = net.shapes[static_cast<size_t>(net.value_of(i))];
    add(&info->macs, net.macs_of(net.nodes[i], out, false));
    add(&info->dense_macs, net.macs_of(net.nodes[i], out, true));
  }
  return POMONA_OK;
}
}
