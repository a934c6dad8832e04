// What JavaScript has to know of pomona_net.h: where its structs keep what. And which kernels run: the only ones.

#include <cstddef>
#include <cstdint>

#include "net_kernels.h"
#include "pomona_net.h"

#define SIZE(type) static_cast<int32_t>(sizeof(type))
#define PLACE(type, field) static_cast<int32_t>(offsetof(type, field))

namespace {

// In the order of web/pomona.js, which compares it with its own.
constexpr int32_t kLayout[] = {
    POMONA_NUM_OPS, POMONA_NUM_ATTRIBUTES, POMONA_MAX_DIMENSIONS,
    SIZE(pomona_node), PLACE(pomona_node, op), PLACE(pomona_node, first_operand), PLACE(pomona_node, num_operands),
    PLACE(pomona_node, first_attribute), PLACE(pomona_node, num_attributes),
    SIZE(pomona_attribute), PLACE(pomona_attribute, name), PLACE(pomona_attribute, value),
    SIZE(pomona_type), PLACE(pomona_type, dtype), PLACE(pomona_type, rank), PLACE(pomona_type, dims),
    SIZE(pomona_tensor), PLACE(pomona_tensor, values), PLACE(pomona_tensor, columns), PLACE(pomona_tensor, starts),
    PLACE(pomona_tensor, rows), PLACE(pomona_tensor, cols), PLACE(pomona_tensor, num_values),
    SIZE(pomona_graph), PLACE(pomona_graph, inputs), PLACE(pomona_graph, nodes), PLACE(pomona_graph, operands),
    PLACE(pomona_graph, attributes), PLACE(pomona_graph, tensors), PLACE(pomona_graph, outputs),
    PLACE(pomona_graph, num_inputs), PLACE(pomona_graph, num_nodes), PLACE(pomona_graph, num_operands),
    PLACE(pomona_graph, num_attributes), PLACE(pomona_graph, num_tensors), PLACE(pomona_graph, num_outputs),
    SIZE(pomona_net_options), PLACE(pomona_net_options, max_bytes), PLACE(pomona_net_options, micro_batch),
    PLACE(pomona_net_options, dense), PLACE(pomona_net_options, ranges), PLACE(pomona_net_options, num_ranges),
    SIZE(pomona_net_info), PLACE(pomona_net_info, activation_bytes), PLACE(pomona_net_info, weight_bytes),
    PLACE(pomona_net_info, macs), PLACE(pomona_net_info, dense_macs),
};

}  // namespace

const pomona::AllNetKernels& pomona::net_kernels() { return *portable_net_kernels(); }

extern "C" {

__attribute__((export_name("pomona_layout"))) const int32_t* pomona_layout() { return kLayout; }
__attribute__((export_name("pomona_layout_length"))) int32_t pomona_layout_length() {
  return sizeof kLayout / sizeof kLayout[0];
}
}
